"""Slices on disk are ordinary checkpoints, hold nothing of other parties, and fit together or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import models
from conftest import PLANS, U_SHAPED, identity
from noren.errors import HandshakeRefused, ModelError, PlanError
from noren.parties.fitness import TOLERANCE, compare
from noren.parties.server import SpanServer
from noren.partition import slices
from noren.partition.plan import Plan
from noren.partition.slices import MANIFEST, read_manifest, weights_digest, write_slice
from noren.partition.sources import open_checkpoint
from noren.partition.stage import Stage, open_slice
from noren.types import PROTOCOL, Hello, Message, Terms

CUT = "client :1, server 1:3, client 3:"
CLASSIFIED = "sequence-classification"


@pytest.fixture(scope="session")
def cut(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each party's slice of the small Llama, under the plan of three stages."""
    place, checkpoint = tmp_path_factory.mktemp("slices"), open_checkpoint(llama_folder)
    (llama_folder / "tokenizer_config.json").write_text('{"marked": true}')
    plan = Plan.parse(U_SHAPED, 8)
    for party in plan.parties:
        write_slice(checkpoint, plan, party, place / party)
    return {party: place / party for party in plan.parties}


SLICED = [
    *[(name, "causal-lm", shape) for name in ("llama", "gpt2", "gpt_neo", "gemma3_text") for shape in ("u", "tail")],
    *[(name, "causal-lm", "u") for name in ("falcon new", "mixtral", "deepseek_v3", "lfm2", "gpt_neox", "granite")],
    *[("bert", CLASSIFIED, shape) for shape in ("u", "tail")],
    *[("deberta-v2 convolution", CLASSIFIED, shape) for shape in ("u", "tail")],
]


@pytest.mark.parametrize(("name", "task", "shape"), SLICED)
def test_slices_are_ordinary_checkpoints_and_equal_the_whole(name: str, task: str, shape: str, tmp_path: Path) -> None:
    whole = models.save(tmp_path / "whole", name, task)
    text = CUT if shape == "u" else ", ".join(PLANS[2])
    plan = models.plan_of(text, whole)
    folders = {party: tmp_path / party for party in plan.parties}
    for party, folder in folders.items():
        write_slice(open_checkpoint(tmp_path / "whole"), plan, party, folder, task=task)
        headed = AutoModelForCausalLM if task == "causal-lm" else AutoModelForSequenceClassification
        cls = headed if plan.holds_head(party) else AutoModel
        model, report = cls.from_pretrained(folder, output_loading_info=True)
        assert model.config.num_hidden_layers == len(plan.kept(party))
        assert not report["unexpected_keys"] and not report["mismatched_keys"]
        blocks = [key for key in report["missing_keys"] if ".0." in key or ".1." in key]
        assert not blocks  # what is missing lies around the blocks, with other parties
    split = models.connect(folders, text, task)
    differences = compare(whole, split, gradients=shape == "u")
    # Experts sum in another order where pads were routed to others (about 3e-7); all else is equal bit for bit.
    assert max(differences.values()) <= (TOLERANCE if name in ("mixtral", "deepseek_v3") else 0.0), differences


def test_a_slice_holds_nothing_of_another_party(cut: dict[str, Path], llama_folder: Path) -> None:
    whole = open_checkpoint(llama_folder)
    tensors = whole.read(whole.files)
    client, server = (load_file(cut[party] / "model.safetensors") for party in ("client", "server"))
    kept = Plan.parse(U_SHAPED, 8).kept("client")
    assert {k.split(".")[2] for k in client if ".layers." in k} == {"0", "1", "2", "3"}
    for key, tensor in client.items():
        if ".layers." in key:
            parts = key.split(".")
            key = ".".join([*parts[:2], str(kept[int(parts[2])]), *parts[3:]])
        assert torch.equal(tensor, tensors[key]), key
    assert not [k for k in server if ".layers." not in k]
    for key, tensor in server.items():
        parts = key.split(".")
        assert torch.equal(tensor, tensors[".".join([*parts[:2], str(int(parts[2]) + 2), *parts[3:]])]), key
    assert len(client) + len(server) == len(tensors)
    # Values, not only names: no tensor of one is among the other's (norms, biases and matrices are all random here).
    values = {t.numpy().tobytes() for t in client.values()}
    assert not values & {t.numpy().tobytes() for t in server.values()}
    # Nor do the files hold more bytes than their tensors and a header.
    for party, part in (("client", client), ("server", server)):
        nbytes = sum(t.nbytes for t in part.values())
        assert nbytes < (cut[party] / "model.safetensors").stat().st_size < nbytes + 100 * (len(part) + 2)


def test_only_the_client_gets_the_tokenizer(cut: dict[str, Path]) -> None:
    assert sorted(p.name for p in cut["server"].iterdir()) == ["config.json", "model.safetensors", MANIFEST]
    assert json.loads((cut["client"] / "tokenizer_config.json").read_text()) == {"marked": True}
    assert (cut["client"] / "generation_config.json").is_file()
    assert json.loads((cut["server"] / "config.json").read_text())["vocab_size"] == slices.UNUSED_VOCABULARY


def test_the_manifest_says_what_was_cut(cut: dict[str, Path], llama_folder: Path) -> None:
    manifests = {party: read_manifest(folder) for party, folder in cut.items()}
    assert read_manifest(llama_folder) is None
    for party, manifest in manifests.items():
        assert manifest is not None
        assert (manifest.party, manifest.layers, manifest.model) == (party, 8, llama_folder.name)
        assert manifest.plan == ["client 0:2", "server 2:6", "client 6:8"]
        # One fingerprint for all parties, and the same as of the uncut folder.
        assert manifest.fingerprint == open_checkpoint(llama_folder).fingerprint
        part = open_slice(cut[party], U_SHAPED, party, "causal-lm")
        assert part.fingerprint == manifest.fingerprint


@pytest.mark.parametrize(
    ("folder", "plan", "party"),
    [
        ("client", "client :3, server 3:-2, client -2:", "client"),
        ("client", "client :2, server 2:", "client"),
        ("client", "client :2, other 2:-2, client -2:", "client"),
        ("client", ", ".join(U_SHAPED), "server"),
        ("server", ", ".join(U_SHAPED), "client"),
        ("server", "client :2, server 2:5, client 5:", "server"),
    ],
)
def test_another_plan_or_party_is_refused(folder: str, plan: str, party: str, cut: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match=f"is the slice of '{folder}' under the plan .*cut the model again"):
        open_slice(cut[folder], plan, party, "causal-lm")


def copied(folder: Path, place: Path) -> Path:
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


@pytest.mark.parametrize("edited", [b"", b"{", b'{"party": "client"}', "unknown", "typed"])
def test_an_edited_manifest_is_refused(edited: bytes | str, cut: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(cut["client"], tmp_path / "edited")
    values = json.loads((folder / MANIFEST).read_text())
    changes = {"unknown": {"more": 1}, "typed": {"layers": "8"}}
    text = edited if isinstance(edited, bytes) else json.dumps(values | changes[edited]).encode()
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(ModelError, match="noren.json: .*cut the model again with `noren slice`"):
        open_slice(folder, U_SHAPED, "client", "causal-lm")


def hello(fingerprint: str) -> Message:
    plan = ["client 0:2", "server 2:6", "client 6:8"]
    terms = Terms(fingerprint=fingerprint, plan=plan, task="causal-lm", dtype="float32", lora="", seed=0)
    return Message(Hello(protocol=PROTOCOL, run="r", terms=terms))


def test_a_digest_of_the_weights_enters_the_fingerprint(llama_folder: Path, tmp_path: Path) -> None:
    checkpoint, plan = open_checkpoint(llama_folder), Plan.parse(U_SHAPED, 8)
    digest = weights_digest(checkpoint)
    assert digest == weights_digest(open_checkpoint(llama_folder))
    client = write_slice(checkpoint, plan, "client", tmp_path / "client", digest=digest)
    server = write_slice(checkpoint, plan, "server", tmp_path / "server", digest=digest)
    assert client.fingerprint == server.fingerprint != checkpoint.fingerprint
    other = models.save(tmp_path / "other", "llama", layers=8)
    with torch.no_grad():
        before = weights_digest(open_checkpoint(tmp_path / "other"))
        other.model.norm.weight[3] += 1e-3
    other.save_pretrained(tmp_path / "changed", max_shard_size="60KB")
    changed = open_checkpoint(tmp_path / "changed")
    assert weights_digest(changed) != before
    assert changed.fingerprint == open_checkpoint(tmp_path / "other").fingerprint  # names and config are the same
    at = SpanServer(Stage.load(tmp_path / "server", U_SHAPED, "server", "causal-lm"))
    assert at.connect(identity("me"))(hello(client.fingerprint)).kind == "welcome"
    with pytest.raises(HandshakeRefused, match="model fingerprint differs"):
        at.connect(identity("me"))(hello(checkpoint.fingerprint))


def test_an_existing_folder_is_left_alone(llama_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "mine").write_text("kept")
    with pytest.raises(ModelError, match="client exists already; give another folder or remove it first"):
        write_slice(open_checkpoint(llama_folder), Plan.parse(U_SHAPED, 8), "client", tmp_path / "client")
    assert [p.name for p in tmp_path.rglob("*")] == ["client", "mine"]


@pytest.mark.parametrize("failure", [OSError("no space left"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(
    failure: BaseException, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(tensors: object, path: Path, **options: object) -> None:
        assert path.parent.is_dir() and (path.parent / "config.json").is_file()  # the draft is begun
        path.write_bytes(b"half")
        raise failure

    monkeypatch.setattr(slices, "save_file", broken)
    with pytest.raises(type(failure)):
        write_slice(open_checkpoint(llama_folder), Plan.parse(U_SHAPED, 8), "client", tmp_path / "sub" / "client")
    assert not list((tmp_path / "sub").iterdir())
