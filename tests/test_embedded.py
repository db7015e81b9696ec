"""The embedded model and the generator of made-up notes it was trained on."""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from noren.embedded import MODEL_DIR
from noren.embedded.notes import HOUSE_SHARE, PLAIN, SITES, Note, notes, pretraining

HELD_OUT_SEED = 900_001  # the seed that scripts/train_embedded.py keeps for measuring
PLAIN_LOSS_BOUND = 0.9  # nats per token; measured 0.78
HOUSE_GAP = 0.4  # how much more a house style costs, at the least
LAYERS = 8
FOLDER_BYTES = 12_000_000


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_same_arguments_give_the_same_notes() -> None:
    assert notes("clinic", 20, 3) == notes("clinic", 20, 3)
    assert notes("clinic", 20, 3)[:5] == notes("clinic", 5, 3)
    assert notes("clinic", 20, 3) != notes("clinic", 20, 4)


def test_notes_are_fixed_for_all_python_versions() -> None:
    digest = hashlib.sha256()
    for site in (*SITES, PLAIN):
        for note in notes(site, 50, 7):
            digest.update(repr((note.site, note.text, note.secrets)).encode())
    assert digest.hexdigest() == "def7ff039f3c0a3e2e6a917df84d927541c594802a07f1ea874cda1a7bda9b24"


@pytest.mark.parametrize("site", [*SITES, PLAIN])
def test_secrets_stand_verbatim_in_the_text(site: str) -> None:
    for note in notes(site, 300, 1):
        assert note.site == site
        assert len(note.secrets) >= 4  # a person, a date, a telephone number and a record at least
        assert len(set(note.secrets)) == len(note.secrets)
        assert all(secret in note.text for secret in note.secrets)
        assert "{" not in note.text


def test_notes_hardly_repeat() -> None:
    texts = [note.text for site in SITES for note in notes(site, 500, 1)]
    assert len(set(texts)) == len(texts)
    assert not set(texts) & {note.text for site in SITES for note in notes(site, 500, 2)}


def test_each_site_has_a_style_of_its_own() -> None:
    usual = {site: _usual_words(notes(site, 200, 1)) for site in (*SITES, PLAIN)}
    for site, other in itertools.combinations(usual, 2):
        assert len(usual[site] & usual[other]) < 0.5 * len(usual[site] | usual[other])
    assert all("Imp: " in note.text for note in notes("clinic", 100, 1))
    assert not any("Imp: " in note.text for site in ("desk", "ward", PLAIN) for note in notes(site, 100, 1))


def _usual_words(sample: list[Note]) -> set[str]:
    """Words found in at least a fifth of the notes."""
    found = [_words(note.text) for note in sample]
    return {word for word in set().union(*found) if sum(word in one for one in found) >= len(found) / 5}


def test_pretraining_is_mostly_plain() -> None:
    sample = pretraining(2000, 1)
    house = sum(note.site != PLAIN for note in sample)
    assert {note.site for note in sample} == {*SITES, PLAIN}
    assert 0.5 * HOUSE_SHARE < house / len(sample) < 2 * HOUSE_SHARE


@pytest.mark.parametrize("site", ["", "Clinic", "lab"])
def test_unknown_site_names_the_valid_ones(site: str) -> None:
    with pytest.raises(ValueError, match=r"unknown site .*clinic, desk, ward, plain"):
        notes(site, 1, 0)


def test_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        notes("desk", -1, 0)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Return the embedded model in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(MODEL_DIR)


def test_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= set(files)
    assert sum(files.values()) <= FOLDER_BYTES
    assert "all people in it are made up" in " ".join((MODEL_DIR / "README.md").read_text().lower().split())


def test_model_has_the_promised_shape(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert model.config.model_type == "llama"
    assert model.config.num_hidden_layers == LAYERS
    assert model.config.vocab_size == len(tokenizer)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer.model_max_length == 512


def test_tokenizer_gives_texts_back(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    for site in (*SITES, PLAIN):
        for note in notes(site, 50, 5):
            ids = tokenizer(note.text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert 60 <= len(ids) <= 165
            assert tokenizer.decode(ids, skip_special_tokens=True) == note.text
    text = "Zoë's naïve 12½ °C"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_held_out_loss_is_low(loaded: tuple[Any, Any]) -> None:
    plain = _loss(loaded, PLAIN)
    assert plain < PLAIN_LOSS_BOUND
    for site in SITES:  # the house styles are left to be learnt
        assert _loss(loaded, site) > plain + HOUSE_GAP


def _loss(loaded: tuple[Any, Any], site: str) -> float:
    """Mean loss of 32 held-out notes, nats per token, end token left out."""
    model, tokenizer = loaded
    batch = tokenizer([n.text for n in notes(site, 32, HELD_OUT_SEED)], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.inference_mode():
        return float(model(**batch, labels=labels).loss)


@pytest.mark.parametrize(
    "prompt",
    [
        "Grace Okafor, aged 54, came to the clinic on 12 March 2024 with",
        "Omar Lindqvist in finance reported on 3 May 2025 that his laptop",
        "Ruth Patel, aged 71, was admitted to Rowan ward on",
    ],
)
def test_greedy_text_is_of_the_domain(loaded: tuple[Any, Any], prompt: str) -> None:
    model, tokenizer = loaded
    batch = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**batch, max_new_tokens=100, do_sample=False)
    new = made[0, batch["input_ids"].shape[1] :]
    words = re.findall(r"[a-z]+", tokenizer.decode(new, skip_special_tokens=True).lower())
    known = set().union(*(_words(note.text) for note in notes(PLAIN, 2000, 1)))
    assert len(words) >= 30
    assert sum(word in known for word in words) >= 0.9 * len(words)
    assert len(set(words)) >= 0.4 * len(words)  # not one phrase over and over
