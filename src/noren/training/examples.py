"""One record made one example, by task; what a record must hold is in the head of `noren.training.data`.

Everything raised here is a `DataError` that names the record, the column and the remedy, and quotes no data
but the names of columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from noren.errors import DataError
from noren.training.formats import Record

Message = tuple[str, str]
"""Role and content of one message of a conversation."""


Names = Mapping[str, str]
"""The column name of every role."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One example, before tokens.

    Attributes:
        text: what is learned (causal-lm), classified, or asked (the question of question-answering).
        prompt: causal-lm: what comes before `text` and is not learned, with the line break that parts them.
        label: sequence-classification: index in the label names.
        context: question-answering: the passage that holds the answer.
        answer: question-answering: the answer, equal to `context[answer_start:][:len(answer)]`.
        answer_start: question-answering: where the answer begins, in characters.
        messages: causal-lm: a conversation. `text` then holds it in the plain template (`render_plain`).
        where: file and line, for errors; two examples from different lines may be equal.
    """

    text: str
    prompt: str | None = None
    label: int | None = None
    context: str | None = None
    answer: str | None = None
    answer_start: int | None = None
    messages: tuple[Message, ...] = ()
    where: str = field(default="", compare=False)


def render_plain(messages: tuple[Message, ...], generate: bool = False) -> str:
    """Return a conversation in the plain template: a line "role: content" for each message.

    With `generate`, the start of the assistant's next line follows: "assistant:", and no space, since most
    tokenizers make the space a part of the word after it.
    """
    lines = "".join(f"{role}: {content}\n" for role, content in messages)
    return lines + "assistant:" if generate else lines


def language_example(record: Record, names: Names) -> Example:
    """One causal-lm example: a conversation, a prompt with its response, or a text."""
    fields = record.fields
    if fields.get(names["messages"]) is not None:
        messages = _messages(record, names["messages"])
        return Example(text=render_plain(messages), messages=messages, where=record.where)
    if fields.get(names["prompt"]) is not None and fields.get(names["response"]) is not None:
        prompt = _text(record, names["prompt"], "prompt", empty=True)
        response = _text(record, names["response"], "response")
        if prompt and not prompt[-1].isspace() and not response[0].isspace():
            prompt += "\n"
        return Example(text=response, prompt=prompt or None, where=record.where)
    if names["text"] not in fields:
        if names["prompt"] in fields or names["response"] in fields:  # half a pair: say which half is missing
            _text(record, names["prompt"], "prompt", empty=True)
            _text(record, names["response"], "response")
        _value(record, names["text"], "text (or prompt and response, or messages)")
    return Example(text=_text(record, names["text"], "text"), where=record.where)


def _messages(record: Record, column: str) -> tuple[Message, ...]:
    value = record.fields[column]
    if not isinstance(value, list) or not value:
        raise DataError(f"{record.where}: column {column!r} must be a list of messages with role and content")
    messages = []
    for number, message in enumerate(value, start=1):
        keys = ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in keys):
            raise DataError(
                f"{record.where}: message {number} of column {column!r} must be an object whose role and "
                f"content are both text"
            )
        messages.append((message["role"], message["content"]))
    if not any(role == "assistant" and content.strip() for role, content in messages):
        raise DataError(
            f"{record.where}: column {column!r} has no filled message of the role assistant, so nothing to "
            f"learn; remove the row"
        )
    return tuple(messages)


def classified_examples(records: Iterable[Record], names: Names) -> tuple[list[Example], list[str]]:
    """Every record as an example of sequence-classification, and the sorted label names."""
    found = [(_text(record, names["text"], "text"), _label(record, names["label"]), record.where) for record in records]
    distinct = {name for _, name, _ in found}
    labels = sorted(distinct)
    if all(name.removeprefix("-").isdecimal() for name in distinct):
        labels.sort(key=int)
    number = {name: index for index, name in enumerate(labels)}
    return [Example(text=text, label=number[name], where=where) for text, name, where in found], labels


def _label(record: Record, column: str) -> str:
    value = _value(record, column, "label")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    if value is None or isinstance(value, str):
        raise DataError(f"{record.where}: no label (column {column!r} is empty); label the row or remove it")
    raise DataError(f"{record.where}: the label (column {column!r}) must be text or a number, one a row")


def question_example(record: Record, names: Names) -> Example:
    """One example of question-answering; its answer is found in the context where the record does not say."""
    question = _text(record, names["question"], "question")
    context = _text(record, names["context"], "context")
    answer, start = _answer(record, names["answer"])
    where = f"{record.where}: the answer (column {names['answer']!r})"
    if start is None:
        start = context.find(answer)
        if start < 0:
            raise DataError(f"{where} does not occur in the context; it must be a piece of it, letter for letter")
    elif start < 0 or context[start : start + len(answer)] != answer:
        raise DataError(
            f"{where} does not stand at answer_start = {start} of the context; "
            f"count in characters from 0, and keep the answer letter for letter"
        )
    return Example(text=question, context=context, answer=answer, answer_start=start, where=record.where)


def _answer(record: Record, column: str) -> tuple[str, int | None]:
    """The first answer of a record, and its start where the record says it.

    Accepted are a text (with a column `answer_start`, if there is one; else its first place in the context
    counts), SQuAD's list of {text, answer_start}, and the {text: [...], answer_start: [...]} of its hub copy.
    """
    value = _value(record, column, "answer")
    start = record.fields.get("answer_start")
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, dict):
        start = value.get("answer_start")
        value = value.get("text")
        value = value[0] if isinstance(value, list) and value else value
        start = start[0] if isinstance(start, list) and start else start
    if not value:
        raise DataError(f"{record.where}: no answer (column {column!r} is empty); remove questions without an answer")
    if isinstance(start, str) and start.strip().isdecimal():
        start = int(start)
    if not isinstance(value, str) or not (start is None or isinstance(start, int)):
        raise DataError(
            f"{record.where}: the answer (column {column!r}) must be text, or an object with text and "
            f"answer_start, a whole number"
        )
    return value, start


def _value(record: Record, column: str, role: str) -> Any:
    if column not in record.fields:
        found = ", ".join(repr(str(name)[:40]) for name in record.fields) or "none"
        raise DataError(
            f"{record.where}: no column {column!r}; columns found: {found}; set {role} to one of them "
            f'(a csv or tsv file without a header line has columns "1", "2", ...)'
        )
    return record.fields[column]


def _text(record: Record, column: str, role: str, empty: bool = False) -> str:
    """A field that must be text, and filled unless `empty`."""
    value = _value(record, column, role)
    if value is None or (isinstance(value, str) and not value.strip() and not empty):
        raise DataError(f"{record.where}: empty {role} (column {column!r}); fill it or remove the row")
    if not isinstance(value, str):
        raise DataError(f"{record.where}: column {column!r} must be text, not {type(value).__name__}")
    return value
