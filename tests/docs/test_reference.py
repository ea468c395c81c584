"""The pages of the reference: each public name once, each function with its arguments and an example that runs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest

from harness import REPOSITORY
from lightning_eff import functional

REFERENCE = REPOSITORY / "docs" / "reference"
ROOMS = [
    "lightning_eff",
    *(
        f"lightning_eff.{name}"
        for name in (
            *("callbacks", "strategies", "plugins", "metrics", "training", "compression", "layers", "structure"),
            *("merging", "kernels"),
        )
    ),
]


def public() -> dict[str, object]:
    """What the rooms export, and what the modules of `functional` define, by the path that a user imports."""
    found = {f"{room}.{name}": getattr(module, name) for room in ROOMS for module in [importlib.import_module(room)]
             for name in module.__all__}  # fmt: skip
    for info in pkgutil.iter_modules(functional.__path__):
        module = importlib.import_module(f"lightning_eff.functional.{info.name}")
        for name, obj in vars(module).items():
            if not name.startswith("_") and getattr(obj, "__module__", "") == module.__name__:
                found[f"{module.__name__}.{name}"] = obj
    return found


FUNCTIONS = {path: obj for path, obj in public().items() if inspect.isfunction(obj)}


@pytest.mark.parametrize("path", sorted(FUNCTIONS))
def test_a_function_has_its_arguments_and_an_example(path):
    function = FUNCTIONS[path]
    doc = inspect.getdoc(function) or ""
    described = re.search(r"^Args:\n((?:    .*\n|\n)*)", doc + "\n", re.MULTILINE)
    said = re.findall(r"^    (\w+):", described[1], re.MULTILINE) if described else []
    assert said == list(inspect.signature(function).parameters)
    assert re.search(r"^Example:\n    >>> ", doc, re.MULTILINE)


def documented() -> dict[str, list[str] | None]:
    """Room or object -> the members that its page names, None for all."""
    found: dict[str, list[str] | None] = {}
    for page in REFERENCE.glob("*.md"):
        for name, options in re.findall(r"^::: ([\w.]+)\n((?: {4}.*\n)*)", page.read_text() + "\n", re.MULTILINE):
            assert name not in found, f"{name} is on two pages"
            members = re.search(r"members: \[(.*)\]", options)
            found[name] = members[1].split(", ") if members else None
    return found


def test_every_public_name_is_on_a_page_and_every_object_once():
    pages, seen = documented(), {}
    for path, obj in public().items():
        room, _, name = path.rpartition(".")
        room = "lightning_eff.functional" if room.startswith("lightning_eff.functional.") else room
        if path in pages or (room in pages and (pages[room] is None or name in pages[room])):
            assert id(obj) not in seen, f"{path} is {seen.get(id(obj))}, which has its place already"
            seen[id(obj)] = path
        else:
            assert room == "lightning_eff.strategies", f"{path} is on no page"
    assert {id(obj) for obj in public().values()} == set(seen)


def test_every_page_is_listed():
    listed = set(re.findall(r"\]\((\w+\.md)\)", (REFERENCE / "index.md").read_text()))
    assert listed == {page.name for page in REFERENCE.glob("*.md")} - {"index.md"}
