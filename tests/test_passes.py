"""Forward passes between forward and backward: kept, computed again, block by block, together. All the same numbers."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import U_SHAPED
from noren.adapters.lora import Lora
from noren.errors import OverBudget, ProtocolError
from noren.partition.stage import Frame, Stage
from noren.training.passes import HOW, Passes, _block_by_block
from noren.training.span_trainer import SpanTrainer

LORA = Lora(r=4, targets=["q_proj", "v_proj", "down_proj"])
PLENTY = 1 << 30


def passes_of(folder: Path, most: int, **more: int) -> Passes:
    return Passes(Stage.load(folder, U_SHAPED, "server", "causal-lm"), most, **more)


def trainer_of(passes: Passes, name: str, lora: Lora = LORA) -> SpanTrainer:
    trainer = SpanTrainer(passes, lora, name, seed=len(name))
    torch.manual_seed(len(name))
    for parameter in trainer.parameters:
        parameter.data = torch.randn_like(parameter) * 0.1
    return trainer


def frame(*lengths: int, seed: int = 0, padding: str = "left") -> Frame:
    generator = torch.Generator().manual_seed(seed)
    return Frame(torch.randn(sum(lengths), 48, generator=generator), list(lengths), padding)


def gradient(rows: int, seed: int = 9) -> Tensor:
    return torch.randn(rows, 48, generator=torch.Generator().manual_seed(seed))


def step(trainer: SpanTrainer, *, dropout: bool = False) -> list[Tensor]:
    """Output, gradient of the input and of the adapter, of one pass alone."""
    out = trainer.forward("1.0", frame(7, 3, 5), dropout=dropout)
    back = trainer.backward("1.0", gradient(15))
    return [out, back, *trainer.gradients().values()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("how", ["by block", "again", "again by block"])
def test_a_pass_computed_again_gives_the_same_bits(llama_folder: Path, how: str, dropout: float) -> None:
    lora = Lora(r=4, targets=LORA.targets, dropout=dropout)
    plenty = passes_of(llama_folder, PLENTY)
    kept = trainer_of(plenty, "a", lora)
    kept.forward("1.0", frame(7, 3, 5), dropout=dropout > 0)
    size = plenty.nbytes
    kept.forget()
    expected = step(kept, dropout=dropout > 0)
    tight = passes_of(llama_folder, int(size * {"by block": 0.3, "again": 1.01, "again by block": 0.02}[how]))
    trainer = trainer_of(tight, "a", lora)
    if how == "again":  # there is room for one pass, and another is there first
        other = trainer_of(tight, "other", lora)
        other.forward("1.0", frame(7, 3, 5, seed=4), dropout=dropout > 0)
    found = step(trainer, dropout=dropout > 0)
    assert (tight.by_block, tight.again) == ((1, 0) if how == "by block" else (0, 1)) and not tight.nbytes
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    if how == "again":  # it had made room, and is computed again itself
        other.backward("1.0", gradient(15))
        assert tight.again == 2


def test_what_is_kept_at_once_has_a_limit(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at every moment: kept, and under way."""
    one = passes_of(llama_folder, PLENTY)
    trainer_of(one, "a").forward("1.0", frame(20, 20), dropout=False)
    most = int(2.5 * one.nbytes)
    passes = passes_of(llama_folder, most)
    highest = [0.0]
    compute: Callable[..., Any] = passes._try

    def watched(*given: Any) -> Any:
        graph = compute(*given)
        highest[0] = max(highest[0], passes.nbytes + graph.nbytes)
        return graph

    monkeypatch.setattr(passes, "_try", watched)
    trainers = [trainer_of(passes, f"t{'x' * n}") for n in range(24)]
    for trainer in trainers:
        trainer.forward("1.0", frame(20, 20), dropout=False)
    assert passes.by_block > 2  # of 24, two as a whole, some by block, and the rest not at all
    for trainer in reversed(trainers):
        trainer.backward("1.0", gradient(40))
    assert one.nbytes * 1.9 < highest[0] <= most and passes.nbytes == 0 and passes.again > 5
    with pytest.raises(OverBudget, match="use a smaller one"):
        trainer_of(passes_of(llama_folder, 3000), "a").forward("1.0", frame(20), dropout=False)


@pytest.mark.parametrize("most", [PLENTY, 0.2], ids=["kept", "computed again"])
def test_passes_of_several_runs_together_are_those_of_each(llama_folder: Path, most: float) -> None:
    """Rows under their own adapters: outputs and gradients within 1e-5 of each run alone (another order of sums)."""
    batches = {"a": (7, 3), "bb": (7, 7, 2), "ccc": (7,), "dddd": (4, 6)}  # the last one is of another width
    expected = {}
    for number, (name, lengths) in enumerate(batches.items()):
        alone = trainer_of(passes_of(llama_folder, PLENTY), name)
        out = alone.forward("1.0", frame(*lengths, seed=number), dropout=False)
        back = alone.backward("1.0", gradient(sum(lengths)))
        expected[name] = [out, back, *alone.gradients().values()]
    passes = passes_of(llama_folder, int(most) if most > 1 else 12_000)
    trainers = {name: trainer_of(passes, name) for name in batches}
    begun = [
        trainers[name].begin("1.0", frame(*lengths, seed=number), dropout=False)
        for number, (name, lengths) in enumerate(batches.items())
    ]
    outs = passes.forward(begun)
    assert passes.together == 3
    first = passes.backward([(one, gradient(len(one.frame.hidden))) for one in begun[:1]])  # the others come later
    backs = first + passes.backward([(one, gradient(len(one.frame.hidden))) for one in begun[1:]])
    assert passes.again == (2 if most > 1 else 4)  # what had gone with the first one's graph; or all
    for one, out, back in zip(begun, outs, backs, strict=True):
        trainer = one.run
        assert isinstance(trainer, SpanTrainer)
        found = [out, back, *trainer.gradients().values()]
        assert len(found) == len(expected[trainer.adapter]) > 4
        for mine, theirs in zip(found, expected[trainer.adapter], strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-5)
    alone = step(trainers["a"])  # and afterwards each adapter acts alone again
    assert torch.equal(alone[0], step(trainer_of(passes_of(llama_folder, PLENTY), "a"))[0])


def test_no_more_than_so_many_tokens_together(llama_folder: Path) -> None:
    passes = passes_of(llama_folder, PLENTY, joined=20)
    trainers = [trainer_of(passes, f"t{'x' * n}") for n in range(4)]
    passes.forward([one.begin("1.0", frame(8), dropout=False) for one in trainers])
    assert [len(graph.passes) for graph in passes._graphs] == [2, 2]


def test_dropout_is_never_drawn_for_others(llama_folder: Path) -> None:
    passes = passes_of(llama_folder, PLENTY)
    trainers = [trainer_of(passes, f"t{'x' * n}", Lora(r=4, targets=LORA.targets, dropout=0.1)) for n in range(3)]
    passes.forward([one.begin("1.0", frame(8), dropout=True) for one in trainers])
    assert passes.together == 0
    passes.forward([one.begin("1.1", frame(8), dropout=False) for one in trainers])
    assert passes.together == 3


def test_a_gradient_of_another_shape_is_refused(llama_folder: Path) -> None:
    trainer = trainer_of(passes_of(llama_folder, PLENTY), "a")
    trainer.forward("1.0", frame(8), dropout=False)
    with pytest.raises(ProtocolError, match="for an output"):
        trainer.backward("1.0", gradient(7))


@pytest.mark.parametrize("how", ["dropped", "too much"])
def test_what_no_gradient_comes_for_is_freed(llama_folder: Path, how: str) -> None:
    """Counted over all tensors that Python knows, wherever they hang."""

    def alive() -> int:
        gc.collect()
        known = (one for one in gc.get_objects() if type(one) is Tensor)
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in known}.values())

    passes = passes_of(llama_folder, PLENTY if how == "dropped" else 200_000)
    trainer = trainer_of(passes, "a")
    counts = []
    for _ in range(4):
        passes._per_token = dict.fromkeys(HOW, 0.0)  # as if it were not known to be too much
        trainer.forward("1.0", frame(60), dropout=False)
        trainer.forget()
        counts.append(alive())
    assert passes.by_block == (0 if how == "dropped" else 4) and not passes.nbytes
    assert max(counts) - min(counts) < 50_000, counts


def test_block_by_block_leaves_no_trace(llama_folder: Path) -> None:
    stage = Stage.load(llama_folder, U_SHAPED, "server", "causal-lm")
    before = [dict(module.__dict__) for module in stage.modules()]
    with _block_by_block(stage, lambda tensor: tensor):
        pass
    assert [dict(module.__dict__) for module in stage.modules()] == before
