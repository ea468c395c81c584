"""Who imports whom: tests and benchmarks the harness, and nobody what is another's own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from harness import REPOSITORY

# What a room may import of ours, besides itself.
ALLOWED = {
    "harness": {"lightning_eff"},  # faults.py is built on its FaultInjector
    "benchmarks": {"harness", "examples", "lightning_eff"},
    "examples": {"lightning_eff"},
    "lightning_eff": set(),
    "tests": {"harness", "benchmarks", "examples", "lightning_eff"},
}


def faults(path: str, text: str) -> list[str]:
    """What a file of the repository imports that it should not, each in words."""
    room, found = path.split("/")[0], []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        for module, name in imported:
            other = module.split(".")[0]
            if other in ALLOWED and other not in ALLOWED[room] | {room}:
                found.append(f"{path} imports {module}")
            if other not in ("harness", "tests", "benchmarks"):
                continue
            if name.startswith("_"):
                found.append(f"{path} imports {name}, private to {module}")
            if any(part.startswith("test_") for part in [*module.split("."), name]):
                found.append(f"{path} imports from {module}, whose tests are its own")
    return found


def test_nobody_imports_what_is_anothers_own() -> None:
    paths = [path for room in ALLOWED for path in sorted((REPOSITORY / room).rglob("*.py"))]
    assert len(paths) > 300
    names = {path: path.relative_to(REPOSITORY).as_posix() for path in paths}
    assert [fault for path in paths for fault in faults(names[path], Path(path).read_text())] == []


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("benchmarks/a.py", "from tests.suite.models import Net", "imports tests.suite.models"),
        ("benchmarks/a.py", "def f():\n    import tests.suite", "imports tests.suite"),
        ("harness/a.py", "from benchmarks.rows import show", "imports benchmarks.rows"),
        ("lightning_eff/a.py", "from harness.pool import Pool", "imports harness.pool"),
        ("tests/test_a.py", "from harness.pool import _work", "_work, private to harness.pool"),
        ("tests/test_a.py", "from tests.cli.test_launch import alive", "test_launch, whose tests are its own"),
        ("tests/test_a.py", "from tests.cli import test_launch", "tests.cli, whose tests are its own"),
    ],
)
def test_each_fault_is_seen(path: str, text: str, words: str) -> None:
    (fault,) = faults(path, text)
    assert words in fault


def test_what_is_allowed_is_no_fault() -> None:
    text = "import torch\nfrom benchmarks.rows import show\nfrom harness.runs import fit\nfrom lightning_eff import _x"
    assert faults("tests/test_a.py", text) == []
