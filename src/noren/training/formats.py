"""Files read as records: rows of named fields that know where they stand.

What each kind promises:

    text    a file with a blank line inside is cut in paragraphs at its blank lines; without one, every
            line is a record. Line breaks inside a paragraph are kept.
    jsonl   one JSON object a line; blank lines are skipped. A file named `.json` may also hold one list
            of objects, or the SQuAD layout (`data[].paragraphs[].qas[]`), one record a question.
    csv     RFC 4180 quoting, and a header line.
    tsv     cells between tabs, a header line, no quoting at all: a quotation mark is text, as in the
            files of GLUE.

A csv or tsv file without a header line is read by numbers: where a column that the task reads is named
by a whole number, the first line is data, and the columns are "1", "2", ... from the left.

All files are UTF-8, with or without a byte order mark. Everything raised here is a `DataError` that names
the file, the line or row, and the remedy, and quotes no data but the names of columns.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noren.errors import DataError

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
}
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Record:
    """One row: its fields by name, and `where` it stands ("train.csv, line 7")."""

    where: str
    fields: Mapping[str, Any]


def read_file(path: Path, kind: str, names: Mapping[str, str], numbered: bool) -> Iterator[Record]:
    """Yield the records of one file.

    Args:
        path: the file.
        kind: "auto" (by suffix), "text", "jsonl", "csv" or "tsv".
        names: the column name of every role; a text file's records have the column `names["text"]`, and
            those of a SQuAD file the columns `names["question"]`, `names["context"]`, `names["answer"]`.
        numbered: whether a csv or tsv file has no header line.

    Raises:
        DataError: unknown suffix, unreadable, not UTF-8, or malformed.
    """
    if kind == "auto":
        if path.suffix.lower() not in KINDS:
            raise DataError(
                f"{path}: unknown suffix {path.suffix!r}; known are {', '.join(KINDS)}; "
                f"rename the file or set format to text, jsonl, csv or tsv"
            )
        kind = KINDS[path.suffix.lower()]
    content = _content(path)
    if kind == "text":
        yield from _paragraphs(path, content, names["text"])
    elif kind == "jsonl":
        yield from _json(path, content, names)
    else:
        yield from _table(path, content, kind, numbered)


def _content(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        byte = raw[error.start]
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8, "
            f"for instance: iconv -f LATIN1 -t UTF-8"
        ) from error
    return text.replace("\r\n", "\n")


def _paragraphs(path: Path, content: str, column: str) -> Iterator[Record]:
    lines = content.split("\n")
    filled = [number for number, line in enumerate(lines) if line.strip()]
    if not filled:
        return
    in_paragraphs = filled[-1] - filled[0] + 1 > len(filled)  # a blank line between two that are not
    start = filled[0]
    for number, following in zip(filled, [*filled[1:], None], strict=True):
        if in_paragraphs and following == number + 1:
            continue
        yield Record(f"{path}, line {start + 1}", {column: "\n".join(lines[start : number + 1])})
        start = following or 0


def _json(path: Path, content: str, names: Mapping[str, str]) -> Iterator[Record]:
    if path.suffix.lower() == ".json" and content.strip():
        try:
            whole = json.loads(content)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):  # which several objects, one a line, also are
                raise _bad_json(path, error.lineno, error) from error
        else:
            yield from _json_whole(path, whole, names)
            return
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _bad_json(path, number, error) from error
        yield _object(where, value)


def _bad_json(path: Path, line: int, error: json.JSONDecodeError) -> DataError:
    return DataError(f"{path}, line {line}: not JSON ({error.msg}, column {error.colno}); mend or remove the line")


def _object(where: str, value: object) -> Record:
    if not isinstance(value, dict):
        raise DataError(f'{where}: {type(value).__name__} where an object is needed, such as {{"text": "..."}}')
    return Record(where, value)


def _json_whole(path: Path, whole: object, names: Mapping[str, str]) -> Iterator[Record]:
    if isinstance(whole, list):
        for number, value in enumerate(whole, start=1):
            yield _object(f"{path}, row {number}", value)
    elif isinstance(whole, dict) and isinstance(whole.get("data"), list):
        yield from _squad(path, whole["data"], names)
    else:
        yield _object(f"{path}, row 1", whole)


def _squad(path: Path, articles: list[Any], names: Mapping[str, str]) -> Iterator[Record]:
    """Yield one record a question of the SQuAD layout, under the column names of the run document."""
    where = str(path)
    try:
        for a, article in enumerate(articles):
            where = f"{path}, data[{a}]"
            for p, paragraph in enumerate(article["paragraphs"]):
                where = f"{path}, data[{a}].paragraphs[{p}]"
                context = paragraph["context"]
                for q, qa in enumerate(paragraph["qas"]):
                    where = f"{path}, data[{a}].paragraphs[{p}].qas[{q}]"
                    fields = {"question": qa["question"], "context": context, "answer": qa["answers"]}
                    yield Record(where, {names[role]: value for role, value in fields.items()})
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{where}: not the SQuAD layout ({error}); needed are data[].paragraphs[] with context and "
            f"qas[], each with question and answers; write other data as one object a line in a .jsonl file"
        ) from error


def _table(path: Path, content: str, kind: str, numbered: bool) -> Iterator[Record]:
    rows = _csv_rows(path, content) if kind == "csv" else _tsv_rows(content)
    columns: list[str] | None = None
    for line, cells in rows:
        if columns is None and not numbered:
            columns = cells
            twice = sorted({name for name in columns if columns.count(name) > 1})
            if twice:
                raise DataError(f"{path}, line {line}: the header names {', '.join(twice)} twice; rename one")
            continue
        columns = columns or [str(number) for number in range(1, len(cells) + 1)]
        if len(cells) != len(columns):
            quoting = " (quote cells that hold a comma)" if kind == "csv" else ""
            raise DataError(
                f"{path}, line {line}: {len(cells)} cells where the first line has {len(columns)}; "
                f"mend the line{quoting}"
            )
        yield Record(f"{path}, line {line}", dict(zip(columns, cells, strict=True)))


def _tsv_rows(content: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield number, line.split("\t")


def _csv_rows(path: Path, content: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each row starts, and its cells."""
    before = csv.field_size_limit(_LONGEST_CELL)  # the default of 131,072 characters is less than some documents
    try:
        reader = csv.reader((line + "\n" for line in content.split("\n")), strict=True)
        start = 1
        rows = []
        for cells in reader:
            if cells:
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {start}: not CSV ({error}); a quotation mark inside a quoted cell is written twice"
        ) from error
    finally:
        csv.field_size_limit(before)
    yield from rows
