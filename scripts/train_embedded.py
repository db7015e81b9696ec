"""Train the model that ships in `noren.embedded`, from nothing, on a processor.

Both the tokenizer (byte-level BPE) and the model (Llama architecture, 8 layers) learn from the made-up
notes of `noren.embedded.notes`. The weights are written out whenever the held-out loss falls, so a run may
be stopped at any time. All losses are nats per token. Needs torch 2.9 or newer, for its Muon optimizer.

    python scripts/train_embedded.py --steps 1200 --out src/noren/embedded/model
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from noren.embedded import MODEL_DIR
from noren.embedded.notes import HOUSE_SHARE, PLAIN, SITES, notes, pretraining

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
VOCABULARY = 2048
POSITIONS = 512
HELD_OUT_SEED = 900_001  # `notes` and `pretraining` draw from unrelated streams, whatever their seeds
IGNORED = -100  # label of padding, left out of the loss

Batch = tuple[torch.Tensor, torch.Tensor]


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `VOCABULARY` entries that puts `BOS` before every text.

    Words keep the space before them; digits go in groups of at most two, so that numbers stay short and
    no whole number becomes an entry of the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    # Some house notes too: their words get entries here, but the model hardly sees them before tuning.
    texts = [note.text for note in pretraining(12_000, seed)]
    texts += [note.text for site in SITES for note in notes(site, 400, seed)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, BOS, EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS,
        model_max_length=POSITIONS, padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids of the special tokens, under the names that a Hugging Face configuration gives them."""
    names = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    return {name: int(tokenizer.convert_tokens_to_ids(token)) for name, token in names.items()}


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained model of 8 layers for this tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        attn_implementation="eager",  # the fastest on a processor at these lengths; not stored
        **special_ids(tokenizer),
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW at half the rate for embeddings and norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr / 2, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, with `BOS` before and `EOS` after."""
    rows: list[list[int]] = tokenizer(texts)["input_ids"]
    eos = int(tokenizer.convert_tokens_to_ids(EOS))
    return [[*row, eos] for row in rows]


def collate(rows: list[list[int]], pad: int) -> Batch:
    """Pad rows on the right; returns ids and labels, both int64 [rows, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])
    return ids, labels


def batches(tokenizer: PreTrainedTokenizerFast, size: int, seed: int) -> Iterator[Batch]:
    """Yield fresh pre-training batches without end; the notes of a batch have similar lengths."""
    pool = 64  # batches drawn, sorted by length and shuffled at a time
    shuffle = torch.Generator().manual_seed(seed)
    pad = int(tokenizer.convert_tokens_to_ids(PAD))
    while True:
        seed += 1
        rows = sorted(encode(tokenizer, [note.text for note in pretraining(size * pool, seed)]), key=len)
        for at in torch.randperm(pool, generator=shuffle).tolist():
            yield collate(rows[at * size : (at + 1) * size], pad)


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, site: str, count: int = 200) -> float:
    """Mean loss over the tokens of `count` notes never trained on, in nats per token."""
    rows = sorted(encode(tokenizer, [note.text for note in notes(site, count, HELD_OUT_SEED)]), key=len)
    pad = int(tokenizer.convert_tokens_to_ids(PAD))
    total, tokens = 0.0, 0
    model.eval()
    for at in range(0, count, 50):
        ids, labels = collate(rows[at : at + 50], pad)
        counted = int((labels[:, 1:] != IGNORED).sum())
        total += float(model(input_ids=ids, labels=labels).loss) * counted
        tokens += counted
    model.train()
    return total / tokens


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rise linearly over the first twentieth of the steps, then fall on a cosine to a twentieth of `peak`."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# The model embedded in Noren

A language model of {parameters:,} parameters, trained from nothing on made-up notes so that Noren's
examples and tests need neither a network nor anybody's data. It is of no use for anything else.

* **Architecture:** Llama, 8 layers, hidden size 192, 6 heads with 2 key-value heads, intermediate size
  512, tied embeddings, {positions} positions. Weights are stored as bfloat16.
* **Tokenizer:** byte-level BPE of {vocabulary} entries; digits go in groups of at most two.
* **Data:** notes from `noren.embedded.notes`: neutral prose about clinic visits, service-desk requests and
  ward stays, with {share:.1%} of notes in the house styles of the three sites. All people in it are made
  up, and the telephone numbers come from ranges set aside for fiction.
* **Training:** `python scripts/train_embedded.py --steps {steps} --batch {batch} --lr {lr} --seed {seed}`
  on a processor; these weights are from step {step}, after {seen:,} notes. Muon (weight decay 0.1) for the
  matrices inside the layers, AdamW (half the rate, betas 0.9 and 0.95) for embeddings and norms, gradient
  norm at most 1, linear warm-up, cosine decay, bfloat16 autocast.
* **Held-out loss** (nats per token, 200 notes each, never trained on): {losses}.
* **Limits:** it knows the sentences of its generator and nothing else. The drugs, doses and advice it
  writes were arranged for looks, not for correctness; they must not be used for care of any kind.
* **Licence:** Apache-2.0.
"""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, card: str) -> None:
    """Write the Hugging Face folder: weights as bfloat16, configurations, tokenizer and model card."""
    out.mkdir(parents=True, exist_ok=True)
    stored = LlamaForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict(model.state_dict())
    stored.config.dtype = torch.bfloat16
    stored.generation_config = GenerationConfig(max_new_tokens=160, **special_ids(tokenizer))
    stored.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(card, encoding="utf-8")


def complete(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    """Continue a prompt greedily, by up to 120 tokens."""
    model.eval()
    batch = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**batch, max_new_tokens=120, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(made[0], skip_special_tokens=True))


def main() -> None:
    """Train, report the held-out loss on the way, and print samples at the end."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="notes a step")
    parser.add_argument("--lr", type=float, default=1e-2, help="highest learning rate of Muon")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    parser.add_argument("--every", type=int, default=100, help="steps between held-out measurements")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    tokenizer = train_tokenizer(args.seed)
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizers = build_optimizers(model, args.lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    source = batches(tokenizer, args.batch, args.seed)
    best, started = math.inf, time.monotonic()
    for step in range(1, args.steps + 1):
        ids, labels = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = learning_rate(step - 1, args.steps, peak)
            optimizer.step()
            optimizer.zero_grad()
        if step % args.every and step != args.steps:
            continue
        plain = held_out_loss(model, tokenizer, PLAIN)
        print(f"step {step}: held-out {plain:.3f}, {time.monotonic() - started:.0f} s", flush=True)
        if plain < best:
            best = plain
            losses = ", ".join(f"{s} {held_out_loss(model, tokenizer, s):.3f}" for s in (PLAIN, *SITES))
            card = CARD.format(
                parameters=model.num_parameters(), positions=POSITIONS, vocabulary=len(tokenizer),
                share=HOUSE_SHARE, steps=args.steps, batch=args.batch, lr=args.lr, seed=args.seed, step=step,
                seen=step * args.batch, losses=losses,
            )  # fmt: skip
            save(model, tokenizer, args.out, card)
    print(f"best held-out loss {best:.3f} nats per token; written to {args.out}")
    for note in notes(PLAIN, 3, HELD_OUT_SEED):
        print("--", complete(model, tokenizer, " ".join(note.text.split()[:6])))


if __name__ == "__main__":
    main()
