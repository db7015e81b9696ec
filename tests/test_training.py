"""Training a cut model is training the whole model: step by step, with any ordinary loop."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers import Trainer as HFTrainer

from conftest import PLANS, Parties, identity
from noren.adapters.checkpoint import load_folder, replacing, same_values, settle
from noren.errors import ConfigError, ProtocolError, SessionLost
from noren.parties.client import Client
from noren.training.batches import collate
from noren.training.loop import Trainer, Training
from noren.types import Close, Message
from test_crossing import ADAPTER, rows

ROUNDING = 5e-6
"""After 12 steps of AdamW in fp32 at lr 1e-2: the two sides sum norms in another order, and Adam divides by roots."""


def whole_twin(client: Client, model: Path, folder: Path) -> nn.Module:
    """The whole model with the very adapter that the cut one has now."""
    client.save_adapter(folder)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def largest_difference(client: Client, twin: nn.Module) -> float:
    state = client.adapter_state()
    own = {name.replace(".default.", "."): p for name, p in twin.named_parameters() if "lora_" in name}
    assert {f"base_model.model.{name}" for name in state} == own.keys()
    return max(float((own[f"base_model.model.{name}"] - t).detach().abs().max()) for name, t in state.items())


@pytest.mark.parametrize("stages", PLANS)
def test_training_equals_whole(stages: int, parties: Parties, llama_folder: Path, tmp_path: Path) -> None:
    client = parties.client(llama_folder, plan=PLANS[stages], adapter=ADAPTER)
    twin = whole_twin(client, llama_folder, tmp_path / "initial")
    settings = Training(steps=12, batch_size=2, accumulate=2, lr=1e-2, clip=0.05, warmup=2, weight_decay=0.01)
    split = Trainer(client.model, rows(), rows(2), settings, pad_id=0, seed=3, remote=client.remote()).run()
    whole = Trainer(twin, rows(), rows(2), settings, pad_id=0, seed=3).run()
    assert max(abs(a - b) for a, b in zip(split.losses, whole.losses, strict=True)) <= 1e-5
    assert split.evaluations.keys() == whole.evaluations.keys() == {0, 12}
    assert split.evaluations[12] < split.evaluations[0]
    assert largest_difference(client, twin) <= ROUNDING


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimisers_equal_whole(name: str, local_parties: Parties, llama_folder: Path, tmp_path: Path) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    twin = whole_twin(client, llama_folder, tmp_path / "initial")
    settings = Training(steps=6, batch_size=3, lr=1e-2 if name != "sgd" else 1.0, optimizer=name, schedule="cosine")
    for model, remote in ((client.model, client.remote()), (twin, None)):
        Trainer(model, rows(), [], settings, pad_id=0, seed=3, remote=remote).run()
    assert largest_difference(client, twin) <= 2 * ROUNDING


def test_clipping_is_by_the_norm_over_all_stages(local_parties: Parties, llama_folder: Path, tmp_path: Path) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    twin = whole_twin(client, llama_folder, tmp_path / "initial")
    norms = []
    for model in (client.model, twin):
        model.train()
        for _ in range(2):  # gradients of two backward passes add up before the norm is taken
            model(**collate(rows(), 0)).loss.backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        norms.append(float(nn.utils.clip_grad_norm_(parameters, math.inf)))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    own = [p for n, p in client.model.named_parameters() if p.requires_grad and "lora_remote" not in n]
    assert float(torch.stack([p.grad.norm() for p in own]).norm()) < 0.9 * norms[0], "the server's share counts"


@pytest.mark.parametrize("late", [False, True], ids=["before the next forward", "before the next backward"])
def test_cleared_gradients_are_cleared_remotely(
    late: bool, local_parties: Parties, llama_folder: Path, tmp_path: Path
) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    twin = whole_twin(client, llama_folder, tmp_path / "initial")
    for model in (client.model, twin):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        model.train()
        model(**collate(rows()[:3], 0)).loss.backward()
        if not late:
            optimizer.zero_grad()  # thought better of it
        loss = model(**collate(rows()[3:], 0)).loss
        if late:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert largest_difference(client, twin) <= ROUNDING


def test_forward_passes_that_share_a_backward(local_parties: Parties, llama_folder: Path, tmp_path: Path) -> None:
    """Several forward passes and one loss, as for pairs of a better and a worse answer; twice, so that they add up."""
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    twin = whole_twin(client, llama_folder, tmp_path / "initial")
    norms = []
    for model in (client.model, twin):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        model.train()
        for _ in range(2):
            better, worse = (model(**collate(part, 0)).loss for part in (rows()[:3], rows()[3:]))
            (better - 0.5 * worse).backward()
        norms.append(float(nn.utils.clip_grad_norm_(parameters, math.inf)))
        optimizer.step()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert largest_difference(client, twin) <= ROUNDING


def test_huggingface_trainer_unmodified(parties: Parties, llama_folder: Path, tmp_path: Path) -> None:
    client = parties.client(llama_folder, adapter=ADAPTER)
    twin = whole_twin(client, llama_folder, tmp_path / "initial")
    losses = []
    for name, model in (("split", client.model), ("whole", twin)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2,
            gradient_accumulation_steps=2, max_grad_norm=0.05, weight_decay=0.01, logging_steps=1, report_to=[],
            save_strategy="no", use_cpu=True, seed=1, disable_tqdm=True, lr_scheduler_type="linear",
        )  # fmt: skip
        trainer = HFTrainer(model, arguments, train_dataset=rows(), data_collator=lambda batch: collate(batch, 0))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        evaluated = trainer.evaluate(rows(2))["eval_loss"]
        losses[-1].append(evaluated)
    assert len(losses[0]) == 7
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) <= 1e-4
    client.span.flush()
    assert largest_difference(client, twin) <= 2 * ROUNDING
    run = next(iter(parties.servers["server"].runs.values()))
    assert run.trainer.step == 6


def test_the_peft_folder_loads_without_noren(parties: Parties, llama_folder: Path, tmp_path: Path) -> None:
    adapter = ADAPTER | {"targets": ["q_proj", "v_proj", "down_proj"], "rank_of": {"server": 2}}
    client = parties.client(llama_folder, adapter=adapter)
    settings = Training(steps=4, batch_size=3, lr=2e-2)
    Trainer(client.model, rows(), [], settings, pad_id=0, seed=3, remote=client.remote()).run()
    folder = client.save_adapter(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    batch = collate(rows(), 0)
    with torch.no_grad():
        untrained = base(**batch).logits
        alone = PeftModel.from_pretrained(base, folder).eval()(**batch).logits
        split = client.model.eval()(**batch).logits
    real = batch["attention_mask"].bool()
    assert (alone - split)[real].abs().max() <= 1e-5
    assert (alone - untrained)[real].abs().max() > 1e-2, "it learned something"


def test_the_peft_folder_comes_back_in(parties: Parties, llama_folder: Path, tmp_path: Path) -> None:
    client = parties.client(llama_folder, adapter=ADAPTER)
    settings = Training(steps=3, batch_size=3, lr=2e-2)
    Trainer(client.model, rows(), [], settings, pad_id=0, seed=3, remote=client.remote()).run()
    folder = client.save_adapter(tmp_path / "adapter")
    batch = collate(rows(), 0)
    with torch.no_grad():
        expected = client.model.eval()(**batch).logits
    second = parties.client(llama_folder, adapter=ADAPTER, name="second")
    second.load_adapter(folder)
    with torch.no_grad():
        got = second.model(**batch).logits
    assert torch.equal(got, expected)
    assert same_values(second.adapter_state(), load_folder(folder))


def test_two_clients_train_apart_on_one_base(local_parties: Parties, llama_folder: Path, tmp_path: Path) -> None:
    """Their steps alternate at one server; each ends as if it had been alone."""
    first = local_parties.client(llama_folder, adapter=ADAPTER)
    server = local_parties.servers["server"]
    second = Client(first.document, server.connect(identity("other")))
    settings = Training(steps=4, batch_size=3, lr=1e-2)
    twins = [whole_twin(client, llama_folder, tmp_path / f"i{i}") for i, client in enumerate((first, second))]
    data = [rows()[:4], rows()[2:]]
    trainers = [
        Trainer(client.model, part, [], settings, pad_id=0, seed=3, remote=client.remote())
        for client, part in zip((first, second), data, strict=True)
    ]
    for _ in range(4):
        for trainer, part in zip(trainers, data, strict=True):
            trainer.step([part])
    for client, twin, part in zip((first, second), twins, data, strict=True):
        alone = Trainer(twin, part, [], settings, pad_id=0, seed=3)
        for _ in range(4):
            alone.step([part])
        client.span.flush()
        assert largest_difference(client, twin) <= ROUNDING
    second.close()


def test_resume_is_bit_identical(local_parties: Parties, llama_folder: Path, tmp_path: Path) -> None:
    settings = Training(steps=8, batch_size=2, lr=1e-2, warmup=2, save_every=0)
    dropout = ADAPTER | {"dropout": 0.0}

    def trainer(client: Client) -> Trainer:
        return Trainer(
            client.model, rows(), rows(2), settings, pad_id=0, seed=3, remote=client.remote(),
            checkpoint=tmp_path / "checkpoint",
        )  # fmt: skip

    straight = local_parties.client(llama_folder, adapter=dropout, name="straight")
    trainer(straight).run()
    stopped = local_parties.client(llama_folder, adapter=dropout, name="stopped")
    half = trainer(stopped)
    half._report = lambda progress: half._stop.set() if progress.step == 5 else None
    outcome = half.run()
    assert outcome.interrupted and outcome.step == 5
    stopped.close()
    again = local_parties.client(llama_folder, adapter=dropout, name="again")  # a new server: nothing is left there
    rest = trainer(again)
    assert rest.resume() == 5
    assert rest.run().step == 8
    assert same_values(again.adapter_state(), straight.adapter_state())


def test_a_server_that_lost_the_adapter_is_not_trained_on(parties: Parties, llama_folder: Path) -> None:
    """A restarted server has a fresh adapter: going on silently would train another model."""
    client = parties.client(llama_folder, adapter=ADAPTER)
    trainer = Trainer(
        client.model, rows(), [], Training(steps=5, batch_size=3), pad_id=0, seed=3, remote=client.remote()
    )
    trainer.step([rows()])
    trainer.step([rows()])
    server = parties.servers["server"]
    for owner, name in list(server.runs):
        server.close_run(owner, name, forget=True)
    if parties.kind == "grpc":
        client.link.close()
    else:
        client.link._handler = server.connect(identity("client"))  # type: ignore[union-attr]
        client.link(client.hello())  # what a GrpcLink does by itself
    with pytest.raises(SessionLost, match=r"--resume|resume from the last checkpoint"):
        trainer.step([rows()])


def test_an_optimiser_that_the_server_lacks_is_refused(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    optimizer = torch.optim.RMSprop([p for p in client.model.parameters() if p.requires_grad])
    client.model(**collate(rows(), 0)).loss.backward()
    with pytest.raises(ConfigError, match="RMSprop is not known to the remote side"):
        optimizer.step()


def test_bf16_keeps_fp32_masters(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER, dtype="bfloat16")
    trainer = Trainer(
        client.model, rows(), [], Training(steps=2, batch_size=3), pad_id=0, seed=3, remote=client.remote()
    )
    trainer.run()
    state = client.adapter_state()
    assert {t.dtype for t in state.values()} == {torch.float32}
    assert all(m.tensors["hidden"].dtype == torch.bfloat16 for m in local_parties.seen if m.kind == "forward")


def test_gradients_cleared_between_forward_and_backward(
    local_parties: Parties, llama_folder: Path, tmp_path: Path
) -> None:
    """The loop `loss = model(x); zero_grad(); loss.backward()`, in which one batch was skipped before."""
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    twin = whole_twin(client, llama_folder, tmp_path / "initial")
    for model in (client.model, twin):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for step, part in enumerate((rows()[:3], rows()[3:])):
            loss = model(**collate(part, 0)).loss
            optimizer.zero_grad()
            loss.backward()
            if step:
                optimizer.step()
    assert largest_difference(client, twin) <= ROUNDING


def test_a_second_backward_over_one_forward_is_refused(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    loss = client.model(**collate(rows(), 0)).loss
    loss.backward(retain_graph=True)
    with pytest.raises(ProtocolError, match="a second backward over one forward pass does not cross the cut"):
        loss.backward()


def test_a_run_closed_elsewhere_is_not_trained_on(local_parties: Parties, llama_folder: Path) -> None:
    """The same owner starts the same run again: the first one must not go on with the base model alone."""
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    trainer = Trainer(client.model, rows(), [], Training(steps=5), pad_id=0, seed=3, remote=client.remote())
    trainer.step([rows()])
    trainer.step([rows()])
    second = local_parties.servers["server"].connect(identity("client"))
    second(client.hello())
    second(Message(Close()))
    with pytest.raises(SessionLost):
        trainer.step([rows()])


@pytest.mark.parametrize(
    ("change", "phrase"),
    [({"alpha": 64}, "alpha = 16"), ({"targets": ["q_proj"]}, "v_proj"), ({"parties": ["client"]}, "layers.[2-5]")],
)
def test_a_folder_made_otherwise_is_refused(
    change: dict[str, Any], phrase: str, local_parties: Parties, llama_folder: Path, tmp_path: Path
) -> None:
    folder = local_parties.client(llama_folder, adapter=ADAPTER).save_adapter(tmp_path / "adapter")
    other = local_parties.client(llama_folder, adapter=ADAPTER | change, name="other")
    with pytest.raises(ConfigError, match=phrase):
        other.load_adapter(folder)


def test_accumulated_gradients_do_not_survive_a_restart_unnoticed(
    local_parties: Parties, llama_folder: Path, tmp_path: Path
) -> None:
    """After `load_adapter` the state could be pushed again, but not the gradients of a step under way."""
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    client.load_adapter(client.save_adapter(tmp_path / "adapter"))
    client.model.train()
    client.model(**collate(rows()[:3], 0)).loss.backward()
    server = local_parties.servers["server"]
    for owner, name in list(server.runs):
        server.close_run(owner, name, forget=True)
    client.link._handler = server.connect(identity("client"))  # type: ignore[union-attr]
    with pytest.raises(SessionLost, match="noren train --resume"):
        client._reconnected(client.link(client.hello()))


def test_groups_of_different_rates_are_refused(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    parameters = [p for p in client.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters[:2], "lr": 1e-3}, {"params": parameters[2:], "lr": 1e-2}])
    client.model(**collate(rows(), 0)).loss.backward()
    with pytest.raises(ConfigError, match="different learning rates"):
        optimizer.step()


def test_a_closed_model_stays_closed(parties: Parties, llama_folder: Path) -> None:
    client = parties.client(llama_folder)
    client.close()
    with pytest.raises(ConfigError, match="was closed"):
        client.model(torch.ones(1, 3, dtype=torch.long))
    assert not parties.servers["server"].runs


def test_what_the_remote_layers_keep_is_not_promised(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder)
    with pytest.raises(ProtocolError, match="output_hidden_states"):
        client.model(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True)


@pytest.mark.parametrize("point", range(3))
def test_a_folder_is_replaced_whole_or_not_at_all(point: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before, between and after the two renames: the next process finds the old folder or the new one."""
    folder, count, rename = tmp_path / "kept", [0], os.replace
    for text in ("old", "new"):

        def killed(source: Path, target: Path, text: str = text) -> None:
            if text == "new" and count[0] == point:
                raise KeyboardInterrupt
            count[0] += text == "new"
            rename(source, target)

        monkeypatch.setattr(os, "replace", killed)
        with suppress(KeyboardInterrupt), replacing(folder) as draft:
            (draft / "words").write_text(text)
    monkeypatch.setattr(os, "replace", rename)
    settle(folder)
    assert (folder / "words").read_text() == ("new" if point == 2 else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
