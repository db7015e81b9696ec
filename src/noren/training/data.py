"""Private data as the run document describes it: read into examples, split in training and held-out parts.

`Data` says where the data is and what its columns are called; `read_examples` reads it. The formats, and how
a file is cut in records, are in `noren.training.formats`; from examples to tensors is
`noren.training.batches`.

What a record must hold, by task (the names are those that `Data` gives):

    causal-lm                 `messages`, or `prompt` and `response`, or `text`: the first that is there
    sequence-classification   `text` and `label`
    question-answering        `question`, `context` and `answer`, a piece of the context

Nothing here leaves the process. Nothing is written to disk, but for the cache of the `datasets` package where
the path is a hub id.
"""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec

from noren.errors import DataError
from noren.training.examples import Example, classified_examples, language_example, question_example
from noren.training.records import read_records

__all__ = ["TASK_ROLES", "Data", "Example", "read_examples", "split_holdout"]

TASK_ROLES: dict[str, tuple[str, ...]] = {
    "causal-lm": ("messages", "prompt", "response", "text"),
    "sequence-classification": ("text", "label"),
    "question-answering": ("question", "context", "answer"),
}
_COLUMNS = ("text", "label", "prompt", "response", "messages", "question", "context", "answer")


class Data(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where private data is, what its columns are called, and how much of it is used.

    Attributes:
        path: a file, a folder of files of one kind, a folder of the `datasets` package, or a `datasets` id.
        format: "auto" goes by suffix: .txt and .md text, .jsonl and .json jsonl, .csv csv, .tsv tsv.
        text: column of the text. For a csv or tsv file without a header, columns are named "1", "2", ...
        label: column of the class.
        prompt: column of what comes before the response, and is not learned.
        response: column of what is learned.
        messages: column of a conversation, a list of objects with role and content.
        question: column of the question.
        context: column of the passage that holds the answer.
        answer: column of the answer: a text, or `text` and `answer_start` as SQuAD has them.
        split: the split to read of a `datasets` id or folder.
        holdout: share of the examples kept for evaluation, 0 <= holdout < 1.
        limit: at most this many examples, from the start; all where None.
        max_length: tokens an example may have; the rest is cut.

    Raises:
        ValueError: a field is out of its range.
    """

    path: str
    format: Literal["auto", "text", "jsonl", "csv", "tsv"] = "auto"
    text: str = "text"
    label: str = "label"
    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    question: str = "question"
    context: str = "context"
    answer: str = "answer"
    split: str = "train"
    holdout: float = 0.1
    limit: int | None = None
    max_length: int = 256

    def __post_init__(self) -> None:
        for name in ("path", "split", *_COLUMNS):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} must not be empty")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be at least 0 and below 1, not {self.holdout}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or left out for all examples, not {self.limit}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, not {self.max_length}")


def read_examples(data: Data, task: str, base: Path) -> tuple[list[Example], list[str]]:
    """Read private data as examples of a task.

    For sequence-classification the label names are those of all records, whatever the limit: a limit
    changes how many examples there are, not what a label number means. They are sorted, as numbers where
    all are whole numbers.

    Args:
        data: what to read.
        task: "causal-lm", "sequence-classification" or "question-answering".
        base: the folder in which a relative `data.path` starts.

    Returns:
        The examples, in the order of the data, and the sorted label names ([] for other tasks).

    Raises:
        DataError: the data cannot be read as said; the sentence names file, line and remedy.
    """
    if task not in TASK_ROLES:
        raise DataError(f"task {task!r} is not known; known are {', '.join(TASK_ROLES)}")
    names = {role: getattr(data, role) for role in _COLUMNS}
    records = read_records(data.path, data.format, base, names, TASK_ROLES[task], data.split)
    labels: list[str] = []
    if task == "sequence-classification":
        examples, labels = classified_examples(records, names)
        examples = examples[: data.limit]
    else:
        make = language_example if task == "causal-lm" else question_example
        examples = [make(record, names) for record in islice(records, data.limit)]
    if not examples:
        raise DataError(f"{base / data.path}: no examples; the data is empty")
    if data.holdout > 0:
        _check_holdout(len(examples), data.holdout, f"{base / data.path}: ")
    return examples, labels


def split_holdout(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Part examples in training and held-out ones, the same way for the same length, share and seed.

    The held-out part has `round(share * len(examples))` examples, but at least 1 and at most all but 1; none
    where the share is 0. Both parts keep the order of the examples.

    Raises:
        DataError: fewer than 2 examples and a share above 0.
    """
    if share <= 0:
        return list(examples), []
    _check_holdout(len(examples), share, "")
    count = min(max(round(share * len(examples)), 1), len(examples) - 1)
    chosen = set(random.Random(f"holdout {seed}").sample(range(len(examples)), count))
    train = [example for index, example in enumerate(examples) if index not in chosen]
    return train, [examples[index] for index in sorted(chosen)]


def _check_holdout(count: int, share: float, where: str) -> None:
    if count < 2:
        raise DataError(
            f"{where}{count} example{'s' * (count != 1)}, and holdout = {share} needs at least 2; "
            f"give more data or set holdout to 0"
        )
