"""The loss at the cloud: the same numbers, fewer bytes, and labels that leave only where the document says so."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from conftest import Parties, identity
from noren.adapters.lora import Lora
from noren.config import Document
from noren.errors import ConfigError, PolicyRefused, ProtocolError, UnfitModel
from noren.parties.client import Client
from noren.parties.policy import Policy
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.training.loop import Trainer
from noren.types import Forward, Message
from test_crossing import ADAPTER
from test_together import datasets, differ, settings

PLANS = {2: ["client :3", "cloud 3:"], 3: ["client :2", "edge 2:4", "server 4:"]}
CLOSE = 1e-5
"""Largest difference of adapters in fp32: the same sums of losses, in another order."""


def learned(parties: Parties, folder: Path, loss_at: str, **training: Any) -> Any:
    plan = PLANS[3]
    adapter = ADAPTER | {"parties": sorted({line.split()[0] for line in plan})}
    client = parties.client(folder, plan=plan, adapter=adapter, seed=1, loss_at=loss_at, name=f"at-{loss_at}")
    data = datasets()[0]
    trainer = Trainer(client.model, data, data[:2], settings(**training), pad_id=0, seed=3, remote=client.remote())
    outcome = trainer.run()
    return outcome, client.adapter_state(), client.traffic.total_bytes


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_it_is_the_same_loss(
    llama_folder: Path, parties: Parties, micro_batches: int, caplog: pytest.LogCaptureFixture
) -> None:
    more: dict[str, Any] = {"micro_batches": micro_batches, "accumulate": 2, "optimizer": "sgd", "lr": 0.1}
    here, state, nbytes = learned(parties, llama_folder, "client", **more)
    asked = len(parties.seen)
    assert not any("labels" in message.tensors for message in parties.seen) and "labels leave" not in caplog.text
    there, other, fewer = learned(parties, llama_folder, "cloud", **more)
    assert there.losses == pytest.approx(here.losses, abs=1e-5)
    assert there.evaluations == pytest.approx(here.evaluations, abs=1e-5)
    assert differ(state, other) <= CLOSE
    assert fewer < nbytes and "labels leave this machine" in caplog.text
    trained = [m for m in parties.seen[asked:] if isinstance(m.meta, Forward) and m.meta.train]
    assert len(trained) > 4 and all(m.tensors["labels"].shape == m.tensors["hidden"].shape[:1] for m in trained)
    back = [m for m in parties.seen[asked:] if m.kind == "backward"]
    assert all(m.tensors["gradient"].shape[1] == 1 for m in back), "no gradient of logits crosses"
    evaluated = [m for m in parties.seen[asked:] if isinstance(m.meta, Forward) and not m.meta.train]
    assert evaluated and not any("labels" in m.tensors for m in evaluated)


def cloud(folder: Path, stack: ExitStack, policy: Policy | None = None, **fields: Any) -> Client:
    stage = Stage.load(folder, PLANS[2], "cloud", "causal-lm")
    lora = ADAPTER | {"parties": ["client", "cloud"]}
    server = SpanServer(stage, lora=msgspec.convert(lora, Lora))
    stack.callback(server.close)
    values = {"model": str(folder), "plan": PLANS[2], "adapter": lora, "seed": 1, "loss_at": "cloud"} | fields
    client = Client(Document.of(values, Path.cwd()), server.connect(identity("client")), policy=policy or Policy())
    stack.callback(client.close)
    return client


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.tensor([5, 99_999]), "below"),
        (torch.tensor([5, -7]), "must be -100"),
        (torch.tensor([5]), "carries 'labels'"),
        (torch.tensor([5.0, 6.0]), "carries 'labels'"),
        (None, "carries 'labels'"),
    ],
    ids=["too high", "negative", "too few", "float", "none"],
)
def test_labels_are_checked(llama_folder: Path, labels: Tensor | None, words: str) -> None:
    with ExitStack() as stack:
        client = cloud(llama_folder, stack)
        meta = Forward(session="1.0", start=0, lengths=[2], padding="left", train=True)
        tensors = {"hidden": torch.ones(2, 48)} | ({"labels": labels} if labels is not None else {})
        with pytest.raises(ProtocolError, match=words):
            client.link(Message(meta, tensors))
        other = cloud(llama_folder, stack, loss_at="client")
        with pytest.raises(ProtocolError, match="exactly one tensor"):
            other.link(Message(meta, {"hidden": torch.ones(2, 48), "labels": torch.tensor([1, 2])}))


def test_a_policy_keeps_labels_here(llama_folder: Path) -> None:
    with ExitStack() as stack, pytest.raises(PolicyRefused, match="labels_stay"):
        cloud(llama_folder, stack, policy=Policy(labels_stay=True))


def test_a_head_that_is_worked_on_afterwards_is_refused(llama_folder: Path) -> None:
    """As Gemma does, whose logits are capped after the head."""
    with ExitStack() as stack:
        client = cloud(llama_folder, stack)
        forward = client.hf.forward

        def capped(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            out["logits"] = torch.tanh(out["logits"])
            return out

        client.hf.forward = capped
        trainer = Trainer(client.model, datasets()[0], [], settings(), pad_id=0, seed=3, remote=client.remote())
        with pytest.raises(UnfitModel, match="after the head"):
            trainer.run()


def test_a_document_says_where_the_loss_can_be(llama_folder: Path) -> None:
    values: dict[str, Any] = {"model": str(llama_folder), "plan": PLANS[2], "loss_at": "cloud"}
    assert Document.of(values, Path.cwd()).run.loss_at == "cloud"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"plan": ["client :2", "cloud 2:6", "client 6:"]}, "ends at another party"),
        ({"task": "sequence-classification"}, 'is for task = "causal-lm"'),
        ({"wire": {"activations": "delta"}}, 'but "delta"'),
    ]
    for more, words in wrong:
        with pytest.raises(ConfigError, match=words):
            Document.of(values | more, Path.cwd())
