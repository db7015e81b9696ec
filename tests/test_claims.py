"""Every promise of the threat model names tests, and those tests are there, run, and are not expected to fail."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCUMENT = TESTS.parent / "docs" / "threat_model.md"
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")
SECTION = "## What is promised"
NEVER_RUN = {"skip", "xfail", "nightly", "slow"}
"""Marks that keep a test out of the ordinary run, or let it fail; a condition (`skipif`) is judged by what it says."""


def rows(text: str) -> list[list[str]]:
    """The cells of the table of promises, without its head."""
    section = text.split(f"\n{SECTION}\n", 1)[1].split("\n## ", 1)[0]
    table = [line.strip() for line in section.splitlines() if line.lstrip().startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def marks(node: ast.expr) -> set[str]:
    """Names of the marks in a decorator or in `pytestmark`: of a skip with a condition, only if it always holds."""
    if isinstance(node, ast.List | ast.Tuple):
        return set().union(*map(marks, node.elts))
    call, name = (node, node.func) if isinstance(node, ast.Call) else (None, node)
    if not isinstance(name, ast.Attribute):
        return set()
    conditions = call.args if call is not None and name.attr in ("skipif", "xfail") else []
    conditions = [*conditions, *(word.value for word in call.keywords if word.arg == "condition")] if call else []
    if name.attr == "skipif":
        return {"skip"} if any(isinstance(c, ast.Constant) and c.value for c in conditions) else set()
    return {name.attr}


def gives_up(function: ast.FunctionDef) -> bool:
    """Whether a test skips itself, or expects to fail, without asking anything; or does nothing."""
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    body = [node for node in body if not isinstance(node, ast.Pass)]
    calls = [node.value.func for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    return not body or any(isinstance(f, ast.Attribute) and f.attr in ("skip", "xfail") for f in calls)


def faults(text: str, folder: Path) -> list[str]:
    """What is wrong with the promises of a document, given the folder of the tests that it names."""
    found, trees = list[str](), dict[str, ast.Module]()
    for cells in rows(text):
        promise = cells[0][:60]
        if len(cells) != 3 or not all(cells):
            found.append(
                f"{promise!r}: {len(cells)} cells, of which some may be empty; promise, means and tests are wanted"
            )
            continue
        if not (named := NAMED.findall(cells[2])):
            found.append(f"{promise!r}: no test")
        if NAMED.sub("", cells[2]).strip(" ,"):
            found.append(f"{promise!r}: {NAMED.sub('', cells[2]).strip(' ,')!r} is no test's name")
        for file, name in named:
            if not (folder / file).is_file():
                found.append(f"{file}: no such file")
                continue
            tree = trees.setdefault(file, ast.parse((folder / file).read_text(encoding="utf-8")))
            found += [f"{file}::{name}: {fault}" for fault in faults_of(tree, name)]
    return found


def faults_of(tree: ast.Module, name: str) -> list[str]:
    """What keeps a test of a module from showing anything."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    if len(functions) != 1:
        return [f"{len(functions)} tests of that name"]
    own = set().union(*map(marks, functions[0].decorator_list))
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "pytestmark" for t in node.targets):
            own |= marks(node.value)
    out = [f"is marked {mark!r}" for mark in sorted(own & NEVER_RUN)]
    return [*out, "gives up"] if gives_up(functions[0]) else out


def test_T30_every_promise_has_its_tests() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    promised = rows(text)
    count = len({name for cells in promised for name in NAMED.findall(cells[-1])})
    print(f"[T30] {len(promised)} promises, {count} tests")
    assert len(promised) >= 25 and count >= 60
    assert len({cells[0] for cells in promised}) == len(promised)
    assert faults(text, TESTS) == []


def test_T30_the_means_are_there() -> None:
    """Files that a row names as the means of a promise exist."""
    source = TESTS.parent / "src" / "noren"
    named = [name for cells in rows(DOCUMENT.read_text()) for name in re.findall(r"`([\w/]+(?:\.py)?)`", cells[1])]
    paths = [name for name in named if "/" in name or name.endswith(".py")]
    assert len(paths) > 20
    assert [name for name in paths if not (source / name).exists()] == []


def table(cell: str) -> str:
    """A document of one promise."""
    return f"# x\n{SECTION}\n\n| p | m | t |\n|---|---|---|\n| a promise | means | {cell} |\n"


MODULE = """
import pytest
{module}
@pytest.mark.parametrize("n", [1])
{mark}
def test_it(n):
    "Words."
    {body}
"""
WRONG = {
    "is marked 'skip'": {"mark": "@pytest.mark.skip"},
    "is marked 'skip' ": {"mark": "@pytest.mark.skip(reason='later')"},
    "is marked 'skip'  ": {"mark": "@pytest.mark.skipif(True, reason='later')"},
    "is marked 'xfail'": {"mark": "@pytest.mark.xfail(strict=True)"},
    "is marked 'nightly'": {"mark": "@pytest.mark.nightly"},
    "is marked 'skip'   ": {"module": "pytestmark = [pytest.mark.timeout(3), pytest.mark.skip]"},
    "gives up": {"body": "pytest.skip('later')"},
    "gives up ": {"body": "pass"},
}


@pytest.mark.parametrize("fault", WRONG)
def test_T30_a_test_that_shows_nothing_is_found(fault: str, tmp_path: Path) -> None:
    text = table("`test_x.py::test_it`") + "\n## More\n| y |\n"
    good = {"module": "", "mark": "@pytest.mark.skipif(n == 3, reason='none here')", "body": "assert n == 1"}
    (tmp_path / "test_x.py").write_text(MODULE.format(**good))
    assert faults(text, tmp_path) == []
    (tmp_path / "test_x.py").write_text(MODULE.format(**good | WRONG[fault]))
    assert faults(text, tmp_path) == [f"test_x.py::test_it: {fault.strip()}"]


def test_T30_a_promise_without_a_test_is_found(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("def test_it():\n    assert 1 + 1 == 2\n")
    wrong = {
        "tested by hand": "no test",
        "`test_x.py::test_other`": "0 tests of that name",
        "`test_y.py::test_it`": "no such file",
        "`test_x.py::test_it`, mostly": "'mostly' is no test's name",
        "": "some may be empty",
    }
    for cell, words in wrong.items():
        assert any(words in fault for fault in faults(table(cell), tmp_path)), cell
