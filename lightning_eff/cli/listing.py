"""`lightning-eff list`: the suite's callbacks, strategies, plugins and compressors, one line each."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from lightning_eff._registration import ENTRIES, OTHERS
from lightning_eff.cli import tables
from lightning_eff.cli.parser import Parser

_DESCRIPTION = (
    "Callbacks, strategies, plugins and compressors of the suite, by the names that `lightning-eff fit` takes."
)


def make_parser() -> Parser:
    """There are no arguments."""
    return Parser("lightning-eff list", description=_DESCRIPTION)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the lists; return 0."""
    make_parser().parse_args(argv)
    print("--trainer.callbacks.help=NAME lists the arguments of a callback, and so on.")
    for title, rows in listed().items():
        tables.table(title, ["name", "what it does"], rows)
    return 0


def listed() -> dict[str, list[tuple[str, str]]]:
    """Title -> name and one line, of everything that the suite adds to the Trainer."""
    import lightning.pytorch as pl

    from lightning_eff.compression import Compressor

    strings = [(f"ddp_{entry.name}{entry.ending}", f"DDP, {entry.description}") for entry in ENTRIES]
    strings += [(name, description) for name, (_, description) in OTHERS.items()]
    found = {
        "Callbacks, --trainer.callbacks+=NAME": _classes("callbacks", pl.Callback),
        "Strategies, --trainer.strategy=NAME": strings + _classes("strategies", pl.strategies.Strategy),
        "Plugins, --trainer.plugins+=NAME": _classes("plugins", object),
        "Compressors, --trainer.strategy=CompressedDDPStrategy --trainer.strategy.compressor=NAME": _classes(
            "strategies", Compressor
        ),
    }
    return {title: rows for title, rows in found.items() if rows}


def _classes(room: str, base: type) -> list[tuple[str, str]]:
    """The classes of a kind that a room exports."""
    if find_spec(f"lightning_eff.{room}") is None:
        return []
    module: ModuleType = import_module(f"lightning_eff.{room}")
    exported = [getattr(module, name) for name in module.__all__]
    classes = [each for each in exported if inspect.isclass(each) and issubclass(each, base)]
    return [(cls.__name__, _first_sentence(cls)) for cls in classes if not inspect.isabstract(cls)]


def _first_sentence(cls: type) -> str:
    paragraph = (inspect.getdoc(cls) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).split(". ")[0].rstrip(".").replace("``", "")
