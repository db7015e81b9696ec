"""Split equals whole, for every architecture that may be cut; the others are refused with a reason.

All numbers are fp32 with one thread. The arithmetic of a split model is that of the whole one on the same padded batch,
so differences are 0.0, bit for bit. The exceptions are mixtures of experts: pads cross as zeros instead of the
embedding of the pad token, are routed to other experts, and change the order in which an expert's sums over its tokens
are done (about 3e-7); TOLERANCE, 1e-5 relative to the largest value, is a hundred times what was seen, and a
thousandth of the smallest real mistake (layer numbers off by some, in `gpt2 scaled by layer`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import models
from conftest import PLANS, identity, local_line
from noren.adapters.lora import adapter_parameters
from noren.config import Document
from noren.errors import PlanError, UnfitModel
from noren.parties.client import ADAPTER, Client
from noren.parties.fitness import TOLERANCE, Verdict, check, compare, cut_in_process, require
from noren.parties.server import SpanServer
from noren.partition.blocks import BLOCK_KEY
from noren.partition.client import remote_span, whole_name
from noren.partition.stage import Stage

EXPERTS = {
    "mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared", "gpt_oss",
    "deepseek_v3", "glm4_moe", "jetmoe", "phimoe", "solar_open", "minimax_m2",
}  # fmt: skip
"""Equal within TOLERANCE; every other architecture is equal bit for bit."""

DECODERS = [
    "llama", "llama tied", "llama biased", "qwen2", "qwen2 windowed", "qwen3", "mistral", "gemma", "gemma2",
    "gemma3_text", "gpt2", "opt", "gpt_neox", "gpt_neo", "gpt_bigcode", "bloom", "falcon", "falcon new", "falcon alibi",
    "phi", "phi3", "olmo", "olmo2", "olmo3", "granite", "cohere", "cohere2", "stablelm", "starcoder2", "smollm3", "mpt",
    "gptj", "codegen", "glm", "glm4", "qwen3_next", "qwen3_5_text", "exaone4", "helium", "arcee", "ernie4_5",
    "seed_oss", "persimmon", "xglm", "biogpt", "lfm2", "bitnet", "apertus", "nanochat", "doge", "youtu",
    "cwm", "vaultgemma", "jais2", *sorted(EXPERTS),
]  # fmt: skip
ENCODERS = [
    "bert", "roberta", "distilbert", "electra", "deberta-v2", "deberta-v2 relative", "deberta-v2 convolution",
    "deberta", "deberta relative", "xlm-roberta", "albert", "camembert", "mobilebert", "megatron-bert",
    "roberta-prelayernorm", "rembert", "data2vec-text",
]  # fmt: skip
CLASSIFYING_DECODERS = [
    "llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma2", "opt", "bloom", "gpt_neo", "gpt_neox", "phi3", "falcon",
    "mpt", "stablelm",
]  # fmt: skip
ANSWERING_DECODERS = ["gpt2", "opt", "bloom", "gpt_neox", "falcon", "mpt", "mistral"]
CLASSIFIED, ANSWERED = "sequence-classification", "question-answering"
UNCACHED = {"no padding", "right padding", "head-tail"}
CACHED = {"left padding", "cached prefill", "cached decode", "chunk after a cache"}

UNFIT = [
    ("modernbert", CLASSIFIED, "first block has no attention norm"),
    ("t5", CLASSIFIED, "t5 is an encoder-decoder"),
    ("bart", ANSWERED, "bart is an encoder-decoder"),
    ("mamba", "causal-lm", "recurrent state"),
    ("mamba2", "causal-lm", "recurrent state"),
    ("rwkv", "causal-lm", "recurrent state"),
    ("gpt2 scaled by layer", "causal-lm", "split differs from whole by"),  # by the layer's number in the whole model
    ("diffllama", "causal-lm", "split differs from whole by"),  # lambda follows the layer's number
    ("openai-gpt", "causal-lm", "keeps no cache"),
    ("bert", "causal-lm", "sees later ones"),
    ("mpnet", CLASSIFIED, "split differs from whole by"),  # attention bias outside of the blocks
    ("qwen2_moe sparse", "causal-lm", "tensors are missing"),  # names layers by their number in the whole model
    ("minimax", "causal-lm", "cache of its own"),
    ("gemma3n_text", "causal-lm", "layer"),  # layers share keys and values
    ("phi3", ANSWERED, "no question-answering model"),
    ("llama", ANSWERED, "tensors are missing"),  # the class names its base model unlike its other classes
]


def assert_fit(verdict: Verdict, name: str, *, causal: bool, head_tail: bool = True) -> None:
    expected = UNCACHED | (CACHED if causal else set()) | ({"gradients"} if verdict.trainable else set())
    assert verdict.fit, verdict.reason
    assert verdict.reason == ""
    assert set(verdict.differences) == expected - (set() if head_tail else {"head-tail"})
    if name not in EXPERTS:
        assert not any(verdict.differences.values()), verdict.differences


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_is_fit(name: str) -> None:
    verdict = check(models.config(name), "causal-lm")
    assert_fit(verdict, name, causal=True, head_tail=name != "nanochat")


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_generation_equals_whole(name: str, tmp_path: Path) -> None:
    hybrid = models.config(name).model_type in ("qwen3_next", "qwen3_5_text")  # every 4th layer has attention
    whole = models.save(tmp_path, name, layers=12 if hybrid else 4, shard="1GB")
    split = cut_in_process(str(tmp_path), "client :4, server 4:8, client 8:" if hybrid else U_SHAPED, "causal-lm")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    a, b = (model.generate(**models.padded("left"), **options) for model in (whole, split))
    assert a.sequences.shape == (3, 17)
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.scores, b.scores, strict=True):
        if name in EXPERTS:
            assert (x - y).abs().max() <= TOLERANCE * max(1.0, float(x.abs().max()))
        else:
            assert torch.equal(x, y)


U_SHAPED = "client :1, server 1:3, client 3:"


@pytest.mark.parametrize("task", [CLASSIFIED, ANSWERED])
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_is_fit(name: str, task: str) -> None:
    verdict = check(models.config(name), task)
    assert_fit(verdict, name, causal=False)
    assert verdict.trainable == (name != "albert")  # its layers share their weights


@pytest.mark.parametrize(
    ("name", "task"), [(n, CLASSIFIED) for n in CLASSIFYING_DECODERS] + [(n, ANSWERED) for n in ANSWERING_DECODERS]
)
def test_decoder_with_a_task_head_is_fit(name: str, task: str) -> None:
    verdict = check(models.config(name), task)
    assert verdict.fit, verdict.reason
    assert not any(verdict.differences.values()), verdict.differences
    assert "left padding" in verdict.differences


@pytest.mark.parametrize(("name", "task", "reason"), UNFIT)
def test_unfit_is_refused_with_a_reason(name: str, task: str, reason: str) -> None:
    verdict = check(models.config(name), task)
    assert not verdict.fit
    assert reason in verdict.reason
    assert "\n" not in verdict.reason and "noren-check" not in verdict.reason


@pytest.mark.parametrize(("name", "task", "reason"), [row for row in UNFIT if row[0] in ("mamba", "rwkv")])
def test_refused_families_are_refused_on_loading_too(name: str, task: str, reason: str, tmp_path: Path) -> None:
    models.config(name).save_pretrained(tmp_path)
    with pytest.raises(UnfitModel, match=reason):
        Stage.load(tmp_path, "client :2, server 2:", "server", task)


def test_a_head_that_cannot_leave_is_refused(tmp_path: Path) -> None:
    models.save(tmp_path, "nanochat")
    with pytest.raises(UnfitModel, match="one norm acts both before its first block and after its last"):
        cut_in_process(str(tmp_path), PLANS_OF_FOUR["q = 0, head too"], "causal-lm")


def test_a_party_without_attention_layers_is_refused(tmp_path: Path) -> None:
    models.save(tmp_path, "qwen3_next", layers=8)
    with pytest.raises(PlanError, match="holds layers \\[4, 5\\].*none of which has full attention"):
        cut_in_process(str(tmp_path), "client :4, server 4:6, client 6:", "causal-lm")


@pytest.mark.parametrize("kept", [0, 4])
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2", "gpt_neo", "gpt_oss"])
def test_a_clients_own_config_is_enough_for_the_check(name: str, kept: int) -> None:
    """A client checks the config of its own slice, which may hold no layers."""
    from noren.partition.slices import slice_config

    own = slice_config(models.config(name), list(range(kept)), embedding=True, head=True, task="causal-lm")
    assert_fit(check(own, "causal-lm"), name, causal=True)


def test_the_check_leaves_the_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    check(models.config("gpt2"), "causal-lm")
    assert torch.equal(torch.rand(4), expected)


def test_verdicts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOREN_CACHE", str(tmp_path))
    with pytest.raises(UnfitModel, match="here: gpt2 .causal-lm. was checked and cannot be cut"):
        require(models.config("gpt2 scaled by layer"), "causal-lm", "here")
    [kept] = (tmp_path / "fit").iterdir()
    verdict = msgspec.json.decode(kept.read_bytes(), type=Verdict)
    assert not verdict.fit and verdict.differences["no padding"] > 1e-3
    kept.write_bytes(msgspec.json.encode(msgspec.structs.replace(verdict, fit=True)))
    assert require(models.config("gpt2 scaled by layer"), "causal-lm", "here").fit  # read, not checked again
    kept.write_bytes(b"{}")
    with pytest.raises(UnfitModel):  # a file of another version is not believed
        require(models.config("gpt2 scaled by layer"), "causal-lm", "here")
    assert require(models.config("gpt2"), "causal-lm", "here").fit  # other flags: another verdict
    assert len(list((tmp_path / "fit").iterdir())) == 2


@pytest.mark.parametrize("broken", ["weight", "order"])
def test_the_comparison_sees_a_wrong_stage(broken: str, tmp_path: Path) -> None:
    """The oracle itself: one changed weight, or two swapped layers, at the remote party show in every figure."""
    whole = models.save(tmp_path, "llama")
    split = cut_in_process(str(tmp_path), U_SHAPED, "causal-lm")
    layers = remote_span(split).handler._handler._host.stage.model.layers
    if broken == "weight":
        with torch.no_grad():
            layers[0].mlp.down_proj.weight[0] += 0.5
    else:
        first, second = (dict(layer.named_parameters()) for layer in layers)
        for name, parameter in first.items():
            parameter.data, second[name].data = second[name].data, parameter.data
    differences = compare(whole, split)
    assert min(differences.values()) > TOLERANCE, differences


def own_gradients(model: PreTrainedModel, side: str = "right") -> dict[str, torch.Tensor]:
    """Gradients of all parameters of the model's blocks, and of what the first block is given."""
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if BLOCK_KEY.match(name):
            parameter.requires_grad_(True).grad = None
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_(True))
        return seen[0]

    handle = model.get_input_embeddings().register_forward_hook(note)
    batch = models.padded(side)
    try:
        models.spread(model(**batch), batch["attention_mask"]).backward()
    finally:
        handle.remove()
    grads = {n: p.grad for n, p in model.named_parameters() if BLOCK_KEY.match(n) and p.grad is not None}
    assert seen[0].grad is not None
    return grads | {"embedding": seen[0].grad[batch["attention_mask"].bool()]}


def assert_same_gradients(whole: PreTrainedModel, split: PreTrainedModel, plan: str, layers: int) -> None:
    """Bitwise: every gradient that the client holds is the whole model's."""
    expected, cut = own_gradients(whole), models.plan_of(plan, whole)
    found = {n if n == "embedding" else whole_name(cut, n): g for n, g in own_gradients(split).items()}
    assert len({match[2] for name in found if (match := BLOCK_KEY.match(name))}) == layers
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, expected[name]), (name, float((gradient - expected[name]).abs().max()))


HEAD_TAIL = [
    *[(name, "causal-lm") for name in ("llama", "llama tied", "gemma2", "cohere", "gpt2", "granite", "youtu")],
    *[(name, "causal-lm") for name in ("lfm2", "xglm", "biogpt", "opt", "bloom", "falcon new")],
    *[(name, CLASSIFIED) for name in ("bert", "distilbert", "roberta", "llama", "qwen2", "gpt2")],
    *[(name, CLASSIFIED) for name in ("deberta-v2 relative", "deberta-v2 convolution", "eurobert")],
    *[(name, ANSWERED) for name in ("roberta", "bert", "distilbert", "megatron-bert", "roberta-prelayernorm")],
]


@pytest.mark.parametrize(("name", "task"), HEAD_TAIL)
def test_head_and_tail_equal_whole(name: str, task: str, tmp_path: Path) -> None:
    whole = models.save(tmp_path, name, task)
    split = cut_in_process(str(tmp_path), PLANS[2][0] + ", " + PLANS[2][1], task)
    # Gradients below: those of a tied embedding hold the head's share in the whole model, and do not at the client.
    assert not any(compare(whole, split, gradients=False).values())
    held = {name for name, _ in split.named_parameters()}
    assert not [n for n in held if n.startswith(("lm_head", "score", "classifier", "qa_outputs"))]
    assert_same_gradients(whole, split, "client :2, server 2:", layers=2)


@pytest.mark.parametrize("stages", PLANS)
@pytest.mark.parametrize(("name", "task"), [("llama", "causal-lm"), ("bert", CLASSIFIED)])
def test_stages_equal_whole(name: str, task: str, stages: int, tmp_path: Path) -> None:
    whole = models.save(tmp_path, name, task, layers=8)
    plan = ", ".join(PLANS[stages])
    split = cut_in_process(str(tmp_path), plan, task)
    assert not any(compare(whole, split).values())
    assert_same_gradients(whole, split, plan, layers=2 if stages == 2 else 4)


PLANS_OF_FOUR = {
    "p = 0": "client :0, server :-1, client -1:",
    "q = 0": "client :1, server 1:4, client 4:",
    "p = q = 0": "client :0, server :, client 4:",
    "p = 0, head too": "client :0, server :",
    "q = 0, head too": "client :3, server 3:",
}


@pytest.mark.parametrize("case", PLANS_OF_FOUR)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen2 windowed"])
def test_few_layers_at_the_client(name: str, case: str, tmp_path: Path) -> None:
    whole = models.save(tmp_path, name)
    plan = PLANS_OF_FOUR[case]
    split = cut_in_process(str(tmp_path), plan, "causal-lm")
    assert not any(compare(whole, split, gradients=False).values())
    assert_same_gradients(whole, split, plan, layers=len(models.plan_of(plan, whole).kept("client")))


LORA = {
    "llama": ("causal-lm", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "gpt2": ("causal-lm", ["c_attn", "c_proj", "c_fc"]),
    "bert": (CLASSIFIED, ["query", "key", "value", "dense"]),
}
LORA_PLANS = {
    "u-shaped": "client :1, edge 1:2, server 2:4, client 4:",
    "head and tail": "client :1, edge 1:3, server 3:",
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT's remark on GPT-2's own kind of linear layer
@pytest.mark.parametrize("shape", LORA_PLANS)
@pytest.mark.parametrize("name", LORA)
def test_lora_gradients_of_every_party_equal_whole(name: str, shape: str, tmp_path: Path) -> None:
    task, targets = LORA[name]
    models.save(tmp_path / "model", name, task, layers=5)
    document = Document.of(
        {
            "model": str(tmp_path / "model"), "task": task, "plan": LORA_PLANS[shape].split(", "),
            "adapter": {"r": 4, "targets": targets},
        },
        tmp_path,
    )  # fmt: skip
    stages = {p: Stage.load(document.model, document.run.plan, p, task) for p in ("edge", "server")}
    server = SpanServer(stages["server"], lora=document.run.adapter)
    edge = SpanServer(stages["edge"], lora=document.run.adapter, following=local_line(server.connect))
    client = Client(document, handler=edge.connect(identity("me")))
    folder = client.save_adapter(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(1)
    fresh = load_file(path)
    assert all(not tensor.any() for key, tensor in fresh.items() if "lora_B" in key)
    save_file({k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in fresh.items()}, path)
    client.load_adapter(folder)
    base = type(models.tiny_model(models.config(name), task, 5)).from_pretrained(document.model).eval()
    whole = PeftModel.from_pretrained(base, folder, is_trainable=True).eval()

    batch = models.padded("right")
    losses = []
    for model in (whole, client.model):
        loss = models.spread(model(**batch), batch["attention_mask"])
        loss.backward()
        losses.append(loss.detach())
    prefix = "base_model.model."
    expected = {n.removeprefix(prefix): p.grad for n, p in adapter_parameters(whole, "default")}
    own = {client.whole_name(n): p.grad for n, p in adapter_parameters(client.hf, ADAPTER)}
    remote = {}
    for party, at in (("edge", edge), ("server", server)):
        [run] = at.runs.values()
        remote[party] = {n: p.grad for n, p in run.trainer._named()}
    found = own | remote["edge"] | remote["server"]
    # Bitwise, loss included: the same sums in the same order, in fp32.
    assert torch.equal(*losses)
    assert min(len(own), len(remote["edge"]), len(remote["server"])) >= 2 * len(targets)
    assert len(own) + len(remote["edge"]) + len(remote["server"]) == len(found)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient is not None and gradient.abs().max() > 0, key
        assert torch.equal(found[key], gradient), (key, float((found[key] - gradient).abs().max()))
    # What stands for the remote adapters in the client's optimiser: the norm of all their gradients (to fp32 rounding).
    norm = torch.cat([g.flatten() for part in remote.values() for g in part.values()]).double().norm()
    handle = client.span.lora_remote
    assert handle is not None and handle.grad is not None
    assert abs(float(handle.grad) - float(norm)) <= 1e-5 * float(norm)
    client.close()
    assert not server.runs and not edge.runs
