"""From examples to padded tensors: tokenising, truncating, masking, padding, and the order of one epoch.

A row is a dict of lists of whole numbers. `input_ids` (and `token_type_ids`, where the tokenizer gives them)
have one number a token; by task there are also

    causal-lm                 `labels`, one a token: the token itself, or -100 where it is not learned
    sequence-classification   `label`, a list of one number
    question-answering        `start_positions` and `end_positions`, lists of one number: first and last
                              token of the answer

Letters for shapes: B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from noren.errors import DataError
from noren.training.data import TASK_ROLES
from noren.training.examples import Example, render_plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, list[int]]
IGNORED = -100
"""The label of a token that is not learned (the default of torch's cross entropy)."""

_ONE_A_ROW = {"label": "labels", "start_positions": "start_positions", "end_positions": "end_positions"}
_POSITIONS = ("start_positions", "end_positions")


@dataclass(frozen=True, slots=True)
class Encoded:
    """Rows of tokens, how many examples were dropped on the way, and how many of the rows were cut short."""

    rows: list[Row]
    dropped: int
    truncated: int = 0


def encode(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: str, max_length: int) -> Encoded:
    """Turn examples into rows of at most `max_length` tokens.

    causal-lm: prompt and text are tokenised as one; tokens that lie in the prompt are masked, and one that
    reaches from the prompt into the text (a space and a word, say) is learned. The end-of-text token follows,
    and is learned, unless the example was cut before it. A conversation is rendered with the tokenizer's chat
    template, which then brings its own special tokens and its own end, or else with the plain template
    (`render_plain`); what the assistant says is learned, in every turn. An example in which no token is left
    to predict is dropped.

    sequence-classification: the text is cut as the tokenizer cuts it, special tokens kept.

    question-answering: question and context as a pair; the context is cut at its end, special tokens kept. An
    example whose answer is not whole after that is dropped.

    Raises:
        DataError: every example was dropped; a chat template refuses a conversation; the task is
            question-answering and the tokenizer gives no offsets.
    """
    make: Callable[[Example, Any, int], tuple[Row, bool] | None]
    if task == "causal-lm":
        make = _language
    elif task == "sequence-classification":
        make = _classified
    elif task == "question-answering":
        if not tokenizer.is_fast:
            raise DataError(
                "question-answering needs a fast tokenizer, which says where each token stands in the text; "
                f"{type(tokenizer).__name__} is not one; take a model whose folder has a tokenizer.json"
            )
        make = _question
    else:
        raise DataError(f"task {task!r} is not known; known are {', '.join(TASK_ROLES)}")
    made = [make(example, tokenizer, max_length) for example in examples]
    kept = [one for one in made if one is not None]
    if examples and not kept:
        lost = "a whole answer" if task == "question-answering" else "a token to learn"
        first = f" (the first is {examples[0].where})" if examples[0].where else ""
        raise DataError(
            f"none of the {len(examples)} examples{first} keeps {lost} within max_length = {max_length} "
            f"tokens; raise max_length or shorten the data"
        )
    return Encoded([row for row, _ in kept], len(made) - len(kept), sum(cut for _, cut in kept))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with: the pad token, or the end-of-text token, or 0.

    Any id will do where the model reads the attention mask, as those here do; labels are padded with -100.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def collate(
    rows: Sequence[Row], pad_id: int, padding_side: Literal["right", "left"] = "right"
) -> dict[str, torch.Tensor]:
    """Pad rows to the longest, and stack them.

    A tokenizer without a pad token pads with its end-of-text id (`padding_id`): the attention mask, which is
    made here from the lengths of the rows, and not from their ids, hides the padding either way.

    Returns:
        int64 tensors: `input_ids`, `attention_mask` [B, T]; `token_type_ids` [B, T] where the rows have them
        (padded with 0); `labels` [B, T] (padded with -100) for causal-lm and [B] for sequence-classification;
        `start_positions` and `end_positions` [B], moved along with padding on the left.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("collate needs at least one row")
    lengths = [len(row["input_ids"]) for row in rows]
    longest = max(lengths)
    fill = {"input_ids": pad_id, "labels": IGNORED}

    def padded(values: Iterable[list[int]], filler: int) -> torch.Tensor:
        out = torch.full((len(rows), longest), filler, dtype=torch.int64)
        for index, value in enumerate(values):
            place = slice(0, len(value)) if padding_side == "right" else slice(longest - len(value), longest)
            out[index, place] = torch.tensor(value, dtype=torch.int64)
        return out

    batch = {"attention_mask": padded(([1] * length for length in lengths), 0)}
    for name in rows[0]:
        if name in _ONE_A_ROW:
            numbers = torch.tensor([row[name][0] for row in rows], dtype=torch.int64)
            if name in _POSITIONS and padding_side == "left":
                numbers += longest - torch.tensor(lengths, dtype=torch.int64)
            batch[_ONE_A_ROW[name]] = numbers
        else:
            batch[name] = padded((row[name] for row in rows), fill.get(name, 0))
    return batch


def batches(rows: Sequence[Row], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of one epoch, as lists of row indices: each row once, the last batch maybe short.

    The order depends on the number of rows, the seed and the epoch alone.

    Raises:
        ValueError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    order = list(range(len(rows)))
    random.Random(f"epoch {epoch} of seed {seed}").shuffle(order)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _language(example: Example, tokenizer: Any, max_length: int) -> tuple[Row, bool] | None:
    own_end = bool(example.messages) and bool(tokenizer.chat_template)
    text, spans = _conversation(example, tokenizer) if example.messages else _prompted(example)
    encoding = _tokenize(tokenizer, text, add_special_tokens=not own_end)
    row = _row(encoding)
    ids = row["input_ids"]
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        first = _token_at(start, text, encoding, tokenizer, not own_end, reaching=True)
        last = _token_at(end, text, encoding, tokenizer, not own_end, reaching=False)
        labels[first:last] = ids[first:last]
    eos = tokenizer.eos_token_id
    if eos is not None and not own_end and ids[-1:] != [eos]:
        ids.append(eos)
        labels.append(eos if spans[-1][1] == len(text) else IGNORED)
        if row.get("token_type_ids"):
            row["token_type_ids"].append(row["token_type_ids"][-1])
    row["labels"] = labels
    whole = len(ids)
    row = {name: values[:max_length] for name, values in row.items()}
    if all(label == IGNORED for label in row["labels"][1:]):  # the first token of a row is never predicted
        return None
    return row, whole > max_length


def _prompted(example: Example) -> tuple[str, list[tuple[int, int]]]:
    """The whole text of an example, and the character spans of it that are learned."""
    prompt = example.prompt or ""
    text = prompt + example.text
    return text, [(len(prompt), len(text))]


def _conversation(example: Example, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """A rendered conversation, and the character spans of what the assistant says in it."""

    def render(count: int, generate: bool) -> str:
        some = example.messages[:count]
        if not tokenizer.chat_template:
            return render_plain(some, generate)
        turns = [{"role": role, "content": content} for role, content in some]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))

    try:
        text = render(len(example.messages), generate=False)
        spans = []
        for index, (role, _) in enumerate(example.messages):
            if role == "assistant":
                # Some templates write earlier turns otherwise once later ones follow: compare with the whole.
                start = _same(text, render(index, generate=True)) if index else 0
                spans.append((start, _same(text, render(index + 1, generate=False))))
    except Exception as error:  # a template is a program of the model's authors, and may raise anything
        raise DataError(
            f"{example.where or 'a conversation'}: the tokenizer's chat template refuses it ({error}); "
            f"check the roles and their order"
        ) from error
    return text, spans


def _token_at(char: int, text: str, encoding: Any, tokenizer: Any, special: bool, reaching: bool) -> int:
    """Index of the first token that begins at a character or later; past the last token if there is none.

    With `reaching`, a token that begins before the character and ends after it counts too.
    """
    ids = encoding["input_ids"]
    if char >= len(text):
        return len(ids)
    if "offset_mapping" in encoding:
        spans = enumerate(encoding["offset_mapping"])
        if reaching:
            return next((index for index, (_, end) in spans if end > char), len(ids))
        return next((index for index, (start, end) in spans if start >= char and end > start), len(ids))
    before = _tokenize(tokenizer, text[:char], add_special_tokens=special)["input_ids"] if char else []
    return _same(ids, before)


def _same(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How long the common beginning of two sequences is."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))


def _classified(example: Example, tokenizer: Any, max_length: int) -> tuple[Row, bool]:
    assert example.label is not None, "read_examples labels every example of this task"
    row = _row(_tokenize(tokenizer, example.text))
    cut = len(row["input_ids"]) > max_length
    if cut:
        row = _row(_tokenize(tokenizer, example.text, truncation=True, max_length=max_length))
    row["label"] = [example.label]
    return row, cut


def _question(example: Example, tokenizer: Any, max_length: int) -> tuple[Row, bool] | None:
    assert example.context is not None and example.answer is not None and example.answer_start is not None
    encoding = _tokenize(tokenizer, example.text, example.context)
    row = _row(encoding)
    in_context = [index for index, part in enumerate(encoding.sequence_ids(0)) if part == 1]
    over = max(len(row["input_ids"]) - max_length, 0)
    if over >= len(in_context):
        return None
    kept = in_context[: len(in_context) - over]
    start = example.answer_start + len(example.answer) - len(example.answer.lstrip())
    end = example.answer_start + len(example.answer.rstrip())
    spans = encoding["offset_mapping"]
    inside = [index for index in kept if spans[index][1] > start and spans[index][0] < end]
    if not inside or spans[kept[-1]][1] < end:
        return None
    lost = set(in_context[len(kept) :])
    row = {name: [v for i, v in enumerate(values) if i not in lost] for name, values in row.items()}
    row["start_positions"], row["end_positions"] = [inside[0]], [inside[-1]]
    return row, over > 0


def _tokenize(tokenizer: Any, *texts: str, **options: Any) -> Any:
    return tokenizer(
        *texts,
        return_attention_mask=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
        **options,
    )


def _row(encoding: Any) -> Row:
    return {name: list(encoding[name]) for name in ("input_ids", "token_type_ids") if name in encoding}
