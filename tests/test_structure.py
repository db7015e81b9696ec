"""The house: floors, doors, and what may not be in any room."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import noren

SOURCE = Path(noren.__file__).parent
FLOORS = {
    "types": 0, "errors": 0, "embedded": 0,
    "wire": 1, "partition": 1, "adapters": 1, "metrics": 1,
    "privacy": 2,
    "training": 3, "inference": 3, "federation": 3, "swarm": 3, "planner": 3,
    "parties": 4, "config": 4,
    "cli": 5, "report": 5,
}  # fmt: skip
ALLOWED_SIDEWAYS = {("parties", "config"), ("config", "parties"), ("cli", "report")}
"""The run document is composed of its owners' sections; the demo shows the report."""


def room(path: Path) -> str:
    relative = path.relative_to(SOURCE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imports(path: Path) -> list[str]:
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("noren"):
            inside = [f"noren.{alias.name}" for alias in node.names if alias.name in FLOORS]
            out += [node.module] if node.module != "noren" else inside
        elif isinstance(node, ast.Import):
            out += [alias.name for alias in node.names if alias.name.startswith("noren")]
    return out


def files() -> list[Path]:
    return [path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py"]


def test_imports_go_down_only() -> None:
    assert len(files()) > 30
    for path in files():
        here = room(path)
        assert here in FLOORS, f"{path}: a room without a floor"
        for name in imports(path):
            there = name.split(".")[1] if "." in name else here
            if there == here or (here, there) in ALLOWED_SIDEWAYS:
                continue
            assert FLOORS[there] < FLOORS[here], f"{path} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})"


def test_no_import_cycles() -> None:
    graph = {}
    for path in files():
        name = ".".join(("noren", *path.relative_to(SOURCE).with_suffix("").parts))
        graph[name.removesuffix(".__init__")] = set(imports(path))
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join((*path, module))}"
        if module in done:
            return
        for further in graph.get(module, ()):
            visit(further, (*path, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_public_names() -> None:
    assert noren.__all__ == ["Document", "Guard", "Handler", "Message", "NorenError", "Plan", "Stage", "load"]
    for name in noren.__all__:
        assert getattr(noren, name) is not None


def test_import_is_instant() -> None:
    """`import noren` loads neither torch nor transformers."""
    code = "import sys, noren; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_files_are_rooms_not_halls() -> None:
    """Most files stay under 300 lines; tables of words may be longer."""
    lengths = {path: len(path.read_text().splitlines()) for path in files() if path.parent.name != "embedded"}
    long = {str(path.relative_to(SOURCE)): n for path, n in lengths.items() if n > 400}
    assert not long, long
    assert sum(n > 300 for n in lengths.values()) <= len(lengths) // 8
