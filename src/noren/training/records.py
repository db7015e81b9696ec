"""Where data may be: a file, a folder of files of one kind, or something that `datasets` reads.

The `datasets` package is imported only for a hub id, a folder saved with `save_to_disk`, and a folder that
holds none of the kinds of `noren.training.formats`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from noren.errors import DataError
from noren.training.formats import KINDS, Record, read_file

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_records(
    path: str, kind: str, base: Path, names: Mapping[str, str], roles: Iterable[str], split: str
) -> Iterator[Record]:
    """Yield the records of a file, a folder, or a `datasets` id.

    Args:
        path: what to read; a relative path starts at `base`.
        kind: "auto" (by suffix), "text", "jsonl", "csv" or "tsv". In a folder, a kind also selects the files.
        base: the folder in which relative paths start.
        names: the column name of every role ("text", "label", ...), as the run document gives them.
        roles: the roles that the task reads.
        split: the split to read, where `path` is for the `datasets` package.

    Raises:
        DataError: nothing can be read there, or a line of it is malformed.
    """
    place = base / Path(path).expanduser()
    numbered = any(names[role].isdecimal() for role in roles)
    if place.is_file():
        yield from read_file(place, kind, names, numbered)
    elif place.is_dir():
        files = _files_of(place, kind)
        if not files:
            yield from _datasets(str(place), split, names["label"], folder=place)
        for file in files:
            yield from read_file(file, kind, names, numbered)
    elif kind == "auto" and _may_be_hub_id(path, base):
        yield from _datasets(path, split, names["label"], folder=None)
    else:
        raise DataError(f"{place}: no such file or folder; {_near(place)}")


def _may_be_hub_id(path: str, base: Path) -> bool:
    """Whether a path that is not on disk reads as `name` or `owner/name`, and not as a local one misspelt."""
    if not _HUB_ID.fullmatch(path) or Path(path).suffix.lower() in KINDS:
        return False
    return "/" not in path or not (base / path).parent.is_dir()


def _near(place: Path) -> str:
    """What a folder holds that comes close to a missing name, as the remedy of an error."""
    if not place.parent.is_dir():
        return f"nor is there a folder {place.parent}"
    there = sorted(entry.name for entry in place.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(place.name, there, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"the folder holds: {', '.join(there[:8]) or 'nothing'}{', ...' if len(there) > 8 else ''}"


def _files_of(folder: Path, kind: str) -> list[Path]:
    """The files to read in a folder, by name; none where the folder is one for the `datasets` package.

    Hidden files and README.md (a data set's card) are passed over.
    """
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return []
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if not entries:
        raise DataError(f"{folder}: the folder is empty; put the data there, or name another path")
    known = [e for e in entries if e.is_file() and e.suffix.lower() in KINDS and e.name != "README.md"]
    if kind != "auto":
        chosen = [entry for entry in known if KINDS[entry.suffix.lower()] == kind]
        if not chosen:
            raise DataError(f"{folder}: no file of the format {kind!r}; it holds {_listed(entries)}")
        return chosen
    kinds = sorted({KINDS[entry.suffix.lower()] for entry in known})
    if len(kinds) > 1:
        raise DataError(
            f"{folder}: files of {len(kinds)} kinds ({', '.join(kinds)}): {_listed(known)}; "
            f"set format to one of them, or name one file"
        )
    return known


def _listed(entries: list[Path]) -> str:
    return ", ".join(entry.name for entry in entries[:6]) + (", ..." if len(entries) > 6 else "")


def _datasets(source: str, split: str, label: str, folder: Path | None) -> Iterator[Record]:
    """Yield the rows that the `datasets` package reads: a hub id, or a folder, for which no network is used.

    A folder is read as a stream, so that private data is not copied to the cache of `datasets`. Numbers of a
    ClassLabel column become its names.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f'{source}: reading this needs the package datasets: pip install "noren[datasets]"; '
            f"a file (.txt, .md, .jsonl, .json, .csv, .tsv) needs no package"
        ) from error
    try:
        if folder is None:
            rows = datasets.load_dataset(source, split=split)
        elif (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            rows = datasets.load_from_disk(source)
            if isinstance(rows, datasets.DatasetDict):
                if split not in rows:
                    found = ", ".join(rows)
                    raise DataError(f"{source}: no split {split!r}; found {found}; set split to one of them")
                rows = rows[split]
        else:
            rows = datasets.load_dataset(source, split=split, streaming=True)
        classes = (rows.features or {}).get(label)
        known = classes.names if isinstance(classes, datasets.ClassLabel) else None
        for number, row in enumerate(rows, start=1):
            if known is not None and row[label] is not None:
                row = {**row, label: known[row[label]] if row[label] >= 0 else None}
            yield Record(f"{source}, split {split}, row {number}", row)
    except DataError:
        raise
    except Exception as error:  # the package raises many kinds
        what = "the folder" if folder else "no such file or folder, and the id"
        raise DataError(
            f"{source}: {what} cannot be read by datasets as split {split!r} "
            f"({type(error).__name__}: {error}); check the path or id, and the split"
        ) from error
