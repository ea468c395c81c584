"""The plan of the house, as CONTRIBUTING.md tells it, against the real imports."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_eff"

# Each room may import from itself and from the rooms of a lower number; rooms of one number from each other.
LEVELS = {
    "cli": 5,
    "pytorch_lightning": 5,
    "recipes": 5,
    "callbacks": 4,
    "strategies": 4,
    "plugins": 4,
    "training": 3,
    "merging": 2,
    "compression": 1,
    "functional": 1,
    "structure": 1,
    "metrics": 1,
    "layers": 1,
    "kernels": 0,
}
# At the root of the package: what everybody may import, and the package itself, which registers strategies by name.
FOUNDATION = {"arguments"}

METHOD_ROOMS = ("callbacks", "strategies", "plugins")
MOST_LINES = 400


def _modules(root: Path) -> dict[str, Path]:
    """Dotted name, a package by its own, -> file."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(path: Path, modules: dict[str, Path]) -> tuple[set[str], set[str]]:
    """The modules of the package that a file imports anywhere in it, and the top names of all others."""
    own, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in inner]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: imports are absolute"
            continue
        for name in names:
            (own if name.split(".")[0] == PACKAGE else others).add(name)
    return own, {name.split(".")[0] for name in others}


def _room(module: str) -> str:
    return [*module.split("."), ""][1]


def _method(module: str) -> tuple[str, ...] | None:
    """One entry, a file or a folder, of callbacks/, strategies/ or plugins/."""
    parts = module.split(".")
    return tuple(parts[1:3]) if len(parts) > 2 and parts[1] in METHOD_ROOMS else None


def faults(root: Path) -> list[str]:
    """What contradicts the plan, each in a sentence."""
    modules = _modules(root)
    found: list[str] = []
    users: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    through: dict[str, set[str]] = {name: _imports(path, modules)[0] for name, path in modules.items()}
    for module, path in modules.items():
        room = _room(module)
        level = LEVELS.get(room)
        if level is None and room not in ("", *FOUNDATION) and not room.startswith("_"):
            found.append(f"{module}: {room!r} is no room of the plan")
        own, others = _imports(path, modules)
        for other in sorted(own):
            above = LEVELS.get(_room(other))
            if level is not None and above is not None and above > level:
                found.append(f"{module} imports upward: {other}")
            mine, theirs = _method(module), _method(other)
            if mine and theirs and mine != theirs and "plugins" not in theirs:
                found.append(f"{module} imports another method: {other}")
        if level is not None and level < LEVELS["training"] and others & {"lightning", "pytorch_lightning"}:
            found.append(f"{module} imports lightning, below training")
        if (lines := len(path.read_text().splitlines())) > MOST_LINES:
            found.append(f"{module} has {lines} lines, more than {MOST_LINES}")
    # A module of training/ is used by two methods, be it through another module of training/.
    for module in modules:
        method = _method(module)
        if method is None:
            continue
        todo, seen = list(through[module]), set()
        while todo:
            other = todo.pop()
            if _room(other) == "training" and other not in seen:
                seen.add(other)
                users[other].add(method)
                todo += through[other]
    for module in modules:
        if _room(module) == "training" and module != f"{PACKAGE}.training" and len(users[module]) < 2:
            who = ", ".join("/".join(method) for method in users[module]) or "no method"
            found.append(f"{module} is used by {who} alone, and training/ holds what two methods share")
    return found


def test_the_house_keeps_its_plan() -> None:
    assert faults(ROOT) == []


FILES = {
    "__init__.py": "",
    "arguments.py": "",
    "kernels/__init__.py": "",
    "functional/__init__.py": "",
    "functional/one.py": "from lightning_eff import arguments, kernels",
    "training/__init__.py": "",
    "training/shared.py": "import lightning",
    "callbacks/__init__.py": "",
    "callbacks/one.py": "from lightning_eff.training import shared",
    "callbacks/two/__init__.py": "",
    "callbacks/two/inside.py": "def later():\n    from lightning_eff.training.shared import name",
}


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        (None, "", None),
        ("functional/one.py", "from lightning_eff.training import shared", "functional.one imports upward"),
        ("kernels/__init__.py", "def f():\n    import lightning_eff.functional.one", "kernels imports upward"),
        ("functional/one.py", "from lightning.pytorch import Trainer", "functional.one imports lightning"),
        ("functional/one.py", "import pytorch_lightning", "functional.one imports lightning"),
        ("callbacks/one.py", "from lightning_eff.callbacks.two import inside", "callbacks.one imports another method"),
        ("callbacks/one.py", "", "training.shared is used by callbacks/two alone"),
        ("training/new.py", "", "training.new is used by no method alone"),
        ("utils/__init__.py", "", "'utils' is no room"),
        ("callbacks/one.py", "from lightning_eff.training import shared\n" * 401, "has 401 lines"),
    ],
)
def test_each_fault_is_seen(tmp_path: Path, file: str | None, text: str, fault: str | None) -> None:
    for name, content in {**FILES, **({file: text} if file else {})}.items():
        path = tmp_path / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    found = faults(tmp_path)
    if fault is None:
        assert found == []
    else:
        assert any(fault in each for each in found), found
