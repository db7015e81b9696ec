"""What crosses the cut: real tokens' hidden states and lengths, and nothing that names a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from conftest import U_SHAPED, Parties
from noren.errors import HandshakeRefused
from noren.training.batches import collate
from noren.types import Backward, Forward, Message
from noren.wire.codecs import CODECS

VOCABULARY, HIDDEN = 128, 48
ADAPTER = {"r": 4, "targets": ["q_proj", "v_proj"]}


def rows(count: int = 6, length: int = 20) -> list[dict[str, list[int]]]:
    """Ragged training rows."""
    generator = torch.Generator().manual_seed(2)
    out = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (length - 2 * i,), generator=generator).tolist()
        out.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    return out


def train_once(client: Any) -> int:
    """One forward and backward; returns the number of real tokens."""
    batch = collate(rows(), 0)
    client.model.train()
    client.model(**batch).loss.backward()
    return int(batch["attention_mask"].sum())


def test_no_token_id_label_mask_or_padding(parties: Parties, llama_folder: Path) -> None:
    client = parties.client(llama_folder, adapter=ADAPTER)
    tokens = train_once(client)
    prompt = torch.tensor([[0, 0, 7, 8, 9], [3, 4, 5, 6, 7]])
    client.model.eval().generate(prompt, attention_mask=(prompt > 0).long(), max_new_tokens=4, pad_token_id=0)
    kinds = {message.kind for message in parties.seen}
    assert {"hello", "forward", "backward"} <= kinds
    for message in [*parties.seen, *parties.answers]:
        for name, tensor in message.tensors.items():
            assert name in {"hidden", "gradient"}
            assert tensor.is_floating_point() and tensor.dim() == 2 and tensor.shape[1] == HIDDEN, "no logits, no ids"
    forward = next(m for m in parties.seen if isinstance(m.meta, Forward))
    assert isinstance(forward.meta, Forward)
    assert forward.tensors["hidden"].shape == (tokens, HIDDEN), "real tokens only: no padding crosses"
    words = msgspec.to_builtins(forward.meta)
    assert words.pop("lengths") == [len(row["input_ids"]) for row in rows()]
    lists = {key: value for key, value in words.items() if isinstance(value, list) and value}
    assert not lists, f"no other list of numbers crosses: {lists}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_and_round_trips_a_step(dtype: str, parties: Parties, tmp_path: Path) -> None:
    """Two round trips a step; bytes are 4 x tokens x hidden x bytes an element, and at most 2 % more."""
    from conftest import tiny_llama

    tiny_llama(hidden_size=256, intermediate_size=64).save_pretrained(tmp_path)
    client = parties.client(tmp_path, adapter=ADAPTER, dtype=dtype)
    before = client.traffic.copy()
    tokens = train_once(client)
    crossed = client.traffic.since(before)
    floor = 4 * tokens * 256 * (4 if dtype == "float32" else 2)
    assert crossed.round_trips == 2
    assert dict(crossed.by_kind) == {"forward": 1, "backward": 1}
    assert floor <= crossed.total_bytes <= 1.02 * floor


def test_two_round_trips_a_step_with_the_optimiser(parties: Parties, llama_folder: Path) -> None:
    """The optimiser step of the remote side rides along: n steps are 2 n round trips, and one at the very end."""
    client = parties.client(llama_folder, adapter=ADAPTER)
    parameters = [p for p in client.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    before = client.traffic.copy()
    for _ in range(5):
        optimizer.zero_grad()
        train_once(client)
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    assert client.traffic.since(before).round_trips == 10
    client.span.flush()
    assert client.traffic.since(before).by_kind["step"] == 1
    run = next(iter(parties.servers["server"].runs.values()))
    assert run.trainer.step == 5


def test_a_frozen_first_stage_still_trains_the_server(parties: Parties, llama_folder: Path) -> None:
    client = parties.client(llama_folder, adapter=ADAPTER | {"parties": ["server"]})
    trained = [name for name, p in client.model.named_parameters() if p.requires_grad]
    assert [name.rpartition(".")[2] for name in trained] == ["lora_remote"]
    optimizer = torch.optim.SGD([p for p in client.model.parameters() if p.requires_grad], lr=1.0)
    before = client.adapter_state()
    train_once(client)
    assert any(isinstance(m.meta, Backward) for m in parties.seen)
    optimizer.step()
    after = client.adapter_state()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_head_tail_keeps_labels(parties: Parties, llama_folder: Path, whole: Any) -> None:
    """Where the server holds the head, its logits come back and the loss is still the client's."""
    client = parties.client(llama_folder, plan=["client :2", "server 2:"], adapter=ADAPTER)
    batch = collate(rows(), 0)
    # The same arithmetic but for where the head's product is taken: on packed instead of padded rows.
    with torch.no_grad():
        assert abs(client.model(**batch).loss - whole(**batch).loss) <= 1e-5
    train_once(client)
    assert all(set(m.tensors) <= {"hidden", "gradient"} for m in parties.seen)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"plan": ["client :1", "server 1:-2", "client -2:"]}, "plan differs"),
        ({"dtype": "bfloat16"}, "dtype differs"),
        ({"adapter": {"r": 8, "targets": ["q_proj"]}}, "adapter settings differs"),
        ({"fingerprint": "0" * 32}, "model fingerprint differs"),
        ({"protocol": 99}, "protocol version differs"),
        ({"task": "question-answering"}, "task differs"),
    ],
)
def test_a_mismatch_is_refused_with_both_values(
    change: dict[str, Any], phrase: str, local_parties: Parties, llama_folder: Path
) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER)
    hello = client.hello().meta
    fields: dict[str, Any] = {}
    if "plan" in change:
        fields["plan"] = change["plan"]
    elif "adapter" in change:
        from noren.adapters.lora import Lora

        fields["lora"] = msgspec.convert(change["adapter"], Lora).canonical()
    else:
        fields |= change
    with pytest.raises(HandshakeRefused) as caught:
        if "protocol" in fields:
            changed = msgspec.structs.replace(hello, run="another", **fields)
        else:
            changed = msgspec.structs.replace(
                hello, run="another", terms=msgspec.structs.replace(hello.terms, **fields)
            )
        client.link(Message(changed))
    sentence = str(caught.value)
    assert phrase in sentence
    [(name, theirs)] = fields.items()
    own = hello.protocol if name == "protocol" else getattr(hello.terms, name)
    assert str(own) in sentence and str(theirs) in sentence


def test_plans_of_the_document_reach_the_wire(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder, plan=U_SHAPED)
    assert client.hello().meta.terms.plan == ["client 0:2", "server 2:6", "client 6:8"]  # type: ignore[union-attr]


@pytest.mark.parametrize("codec", ["bf16", "fp16", "fp8", "int8", "int8-group", "int4", "zstd"])
def test_codecs_cross(codec: str, parties: Parties, llama_folder: Path) -> None:
    """Both directions of a step under one codec: as many bytes as it says, and about the same loss and gradients."""
    ids = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(1))
    found = {}
    for name in ("raw", codec):
        wire = {"activations": name, "gradients": name}
        client = parties.client(llama_folder, adapter=ADAPTER, wire=wire, name=f"with-{name}")
        before = client.traffic.copy()
        loss = client.model(ids, labels=ids).loss
        loss.backward()
        crossed = client.traffic.since(before).total_bytes
        gradients = torch.cat([p.grad.flatten() for p in client.model.parameters() if p.grad is not None])
        found[name] = (float(loss.detach()), gradients, crossed)
        client.close()
    (plain, expected, bytes_raw), (loss, gradients, crossed) = found["raw"], found[codec]
    size = CODECS[codec].size([64, 48], torch.float32)
    if CODECS[codec].fixed:
        assert abs(crossed - bytes_raw - 4 * (size - 64 * 48 * 4)) < 200, "headers differ by the codec's name only"
    limit = {"zstd": 0.0, "bf16": 0.02, "fp16": 0.01, "int4": 0.35}.get(codec, 0.1)
    error = float((gradients - expected).norm() / expected.norm())
    print(f"{codec}: {crossed / bytes_raw:.3f} of raw, loss off by {abs(loss - plain):.2e}, gradients by {error:.2e}")
    assert abs(loss - plain) <= limit * plain and error <= limit
    assert (error == 0.0) == CODECS[codec].lossless
