"""`generate` of a cut model gives the whole model's tokens and scores, in every mode, over every link."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoTokenizer, StoppingCriteria, StoppingCriteriaList, TextStreamer, pipeline

from conftest import PLANS, Parties

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.4},
}


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    """A left-padded batch."""
    ids = torch.randint(3, 128, (rows, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[0, :5], mask[2, :1] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(whole: Any, split: Any, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0} | options
    out = []
    for model in (whole, split):
        torch.manual_seed(5)
        out.append(model.generate(**inputs, return_dict_in_generate=True, output_scores=True, **options))
    return out[0], out[1]


def assert_same(a: Any, b: Any) -> None:
    # Bitwise: the remote layers see the same padded batch, and do the same arithmetic.
    assert torch.equal(a.sequences, b.sequences)
    assert len(a.scores) == len(b.scores) > 0
    for x, y in zip(a.scores, b.scores, strict=True):
        assert torch.equal(x, y), float((x - y).abs().max())


@pytest.mark.parametrize("mode", MODES)
def test_mode_equals_whole(mode: str, parties: Parties, llama_folder: Path, whole: Any) -> None:
    client = parties.client(llama_folder)
    assert_same(*both(whole, client.model, batch(), **MODES[mode]))


@pytest.mark.parametrize("stages", PLANS)
def test_stages_equal_whole(stages: int, parties: Parties, llama_folder: Path, whole: Any) -> None:
    client = parties.client(llama_folder, plan=PLANS[stages])
    assert_same(*both(whole, client.model, batch()))


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": "whole"}])
def test_drafts_equal_whole(options: dict[str, Any], parties: Parties, llama_folder: Path, whole: Any) -> None:
    client = parties.client(llama_folder)
    inputs = batch(1)
    inputs["input_ids"][:, 6:] = inputs["input_ids"][:, :6]
    if "assistant_model" in options:
        options = {"assistant_model": transformers.LlamaForCausalLM.from_pretrained(llama_folder).eval()}
    before = client.traffic.copy()
    a, b = both(whole, client.model, inputs, **options)
    assert_same(a, b)
    if "assistant_model" in options:  # drafts that are always right: far fewer round trips than tokens
        assert client.traffic.since(before).round_trips < 10


def test_round_trips_and_bytes_a_token(parties: Parties, llama_folder: Path) -> None:
    client = parties.client(llama_folder)
    before = client.traffic.copy()
    client.model.generate(**batch(1), max_new_tokens=20, do_sample=False)
    crossed = client.traffic.since(before)
    assert crossed.round_trips == 20  # the prefill gives the first token
    assert set(crossed.by_kind) == {"forward"}


def test_streamer_and_stopping_criteria(parties: Parties, keys: Path) -> None:
    from noren.embedded import MODEL_DIR

    class Twelve(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 24)

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    whole = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    client = parties.client(MODEL_DIR)
    inputs = tokenizer("Grace Okafor, aged 54, came to the clinic on", return_tensors="pt")
    heard = []

    class Ear(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            heard.append(text)

    stop = StoppingCriteriaList([Twelve()])
    a, b = both(whole, client.model, dict(inputs), stopping_criteria=stop, max_new_tokens=60)
    assert_same(a, b)
    assert a.sequences.shape[1] == 24
    out = client.model.generate(**inputs, max_new_tokens=10, do_sample=False, streamer=Ear(tokenizer, skip_prompt=True))
    assert "".join(heard).strip() == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :]).strip()


def test_pipeline_unmodified(parties: Parties) -> None:
    from noren.embedded import MODEL_DIR

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    whole = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    client = parties.client(MODEL_DIR)
    prompts = ["Grace Okafor, aged 54,", "Omar Lindqvist in finance reported on 3 May"]
    texts = [
        [r[0]["generated_text"] for r in pipeline("text-generation", model=model, tokenizer=tokenizer)(
            prompts, max_new_tokens=12, do_sample=False, batch_size=2)]
        for model in (whole, client.model)
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_a_copied_cache_goes_on_independently(local_parties: Parties, llama_folder: Path, whole: Any) -> None:
    """Prefix caching: two continuations of one prompt from copies of its cache."""
    import copy

    client = local_parties.client(llama_folder)
    prompt, tails = batch(1)["input_ids"], [torch.tensor([[5, 6, 7]]), torch.tensor([[9, 10, 11]])]
    results = []
    for model in (whole, client.model):
        with torch.no_grad():
            cache = model(prompt, use_cache=True).past_key_values
            results.append([model(t, past_key_values=copy.deepcopy(cache), use_cache=True).logits for t in tails])
    for a, b in zip(*results, strict=True):
        # The copy is a session of its own, which is replayed as one prefill: equal up to fp32 rounding.
        assert (a - b).abs().max() <= 1e-5
    assert client.span.replays == 2


def test_a_lost_session_is_replayed(local_parties: Parties, llama_folder: Path, whole: Any) -> None:
    """Every 5th step the server has forgotten everything; tokens are the same."""
    client = local_parties.client(llama_folder)
    server, count = local_parties.servers["server"], [0]
    step = server.sessions.step

    def forgetful(*args: Any) -> Any:
        count[0] += 1
        if count[0] % 5 == 0:
            server.sessions._sessions.clear()
        return step(*args)

    server.sessions.step = forgetful  # type: ignore[method-assign]
    for mode in ({}, {"num_beams": 3}):
        a, b = both(whole, client.model, batch(), **mode)
        assert torch.equal(a.sequences, b.sequences)
        # A replay is one prefill instead of several decodes: the sums are in another order.
        assert max(float((x - y).nan_to_num(0).abs().max()) for x, y in zip(a.scores, b.scores, strict=True)) <= 1e-4
    assert client.span.replays >= 5


def test_every_step_twice(local_parties: Parties, llama_folder: Path, whole: Any) -> None:
    """A network that delivers each request twice changes nothing, beams and drafts included."""
    client = local_parties.client(llama_folder)
    once = client.span.handler
    client.span.handler = lambda message: (once(message), once(message))[1]
    for mode in ({}, {"prompt_lookup_num_tokens": 4}):
        assert_same(*both(whole, client.model, batch(1), **mode))
    a, b = both(whole, client.model, batch(), num_beams=3)
    assert torch.equal(a.sequences, b.sequences)


def test_closing_ends_everything(parties: Parties, llama_folder: Path) -> None:
    client = parties.client(llama_folder)
    with client.model as model:
        model.generate(**batch(1), max_new_tokens=4, do_sample=False)
        assert len(parties.servers["server"].sessions) == 1
    assert len(parties.servers["server"].sessions) == 0
    assert not parties.servers["server"].runs


def test_finished_generations_free_their_sessions(local_parties: Parties, llama_folder: Path) -> None:
    """The next message tells the server which sessions are over."""
    client = local_parties.client(llama_folder)
    for _ in range(5):
        client.model.generate(**batch(1), max_new_tokens=3, do_sample=False)
    assert len(local_parties.servers["server"].sessions) <= 2
