"""Strategy strings, and short names for a LightningCLI of the user's own, registered without importing Lightning.

``import lightning_eff`` must stay quick, and `lightning-eff doctor` must run where Lightning cannot be imported. So the
names are registered at once if Lightning is loaded, else right after it has made its registry. Without that import none
is known: Lightning has entry points for callbacks, which it asks for after it has looked up the strategy.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

# Lightning goes by two names, each with a registry and strategies of its own: its module -> where ours are.
_REGISTRIES = {
    "lightning.pytorch.strategies": "lightning_eff.strategies",
    "pytorch_lightning.strategies": "lightning_eff.pytorch_lightning.strategies",
}

# LightningCLI knows a class by its short name once it is imported.
_CLI = "lightning.pytorch.cli"


# As Lightning names its own.
START_METHODS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}


class Entry(NamedTuple):
    """A family of strings: what builds the strategy, and what it says of itself."""

    name: str
    """Without "ddp_"."""

    factory: str
    """In the module of strategies, a class or its class method; called with ``start_method`` and ``arguments``."""

    arguments: dict[str, Any]
    description: str
    start_methods: dict[str, str] = START_METHODS
    """Prefix of the string -> how the processes are started."""

    ending: str = ""
    """Of the string, as Lightning names its own: "_find_unused_parameters_true"."""


_COMPRESSED = "CompressedDDPStrategy.by_string"

_COMPRESSORS = {
    "arc_topk": ("ArcTopK", "which reduces the rows of each gradient that matter (ARC-Top-K)"),
    "topk": ("TopK", "which reduces the largest elements of each gradient"),
    "randk": ("RandK", "which reduces random elements of each gradient"),
    "powersgd": ("PowerSGD", "which reduces a low-rank approximation of each gradient"),
    "fp16": ("FP16", "which reduces gradients as float16"),
    "bf16": ("BF16", "which reduces gradients as bfloat16"),
    "int8": ("Int8", "which reduces gradients as 8-bit integers"),
}

_UNUSED = "_find_unused_parameters_true"

ENTRIES = (
    *(Entry(name, _COMPRESSED, {"compressor": compressor}, what) for name, (compressor, what) in _COMPRESSORS.items()),
    *(
        Entry(
            name,
            _COMPRESSED,
            {"compressor": compressor, "find_unused_parameters": True},
            f"{what}, without error feedback; parameters may go unused",
            ending=_UNUSED,
        )
        for name, (compressor, what) in _COMPRESSORS.items()
    ),
    Entry(
        "ft",
        "FaultTolerantDDPStrategy",
        {},
        "which outlives its replicas",
        {"ddp": "popen"},  # a replica is started by `lightning-eff launch`
    ),
)

OTHERS = {
    "fsdp2": (
        "FSDP2Strategy",
        "FSDP2 on any module: weights, gradients and optimizer state are sharded over all ranks",
    )
}
"""Strings of strategies that are no DDP: the class that builds the strategy, and what it says of itself."""


def register() -> None:
    """Make the names known, with either name of Lightning, now or when it is imported."""
    for name, act in {**dict.fromkeys(_REGISTRIES, _fill), _CLI: _import_all}.items():
        if name in sys.modules:
            act(sys.modules[name])
        else:
            sys.meta_path.insert(0, _WhenImported(name, act))


def _import_all(cli: ModuleType) -> None:
    for room in ("callbacks", "strategies"):
        import_module(f"lightning_eff.{room}")


def _fill(strategies: ModuleType) -> None:
    registry, ours = strategies.StrategyRegistry, _REGISTRIES[strategies.__name__]
    for entry in ENTRIES:
        for prefix, start_method in entry.start_methods.items():
            registry.register(
                f"{prefix}_{entry.name}{entry.ending}",
                partial(_build, ours, entry.factory),
                description=f"DDP, {entry.description}, with `start_method` '{start_method}'",
                override=True,
                start_method=start_method,
                **entry.arguments,
            )
    for name, (factory, description) in OTHERS.items():
        registry.register(name, partial(_build, ours, factory), description=description, override=True)


def _build(module: str, factory: str, **arguments: Any) -> Any:
    """Import the strategy when somebody asks for it."""
    build: Callable[..., Any] = attrgetter(factory)(import_module(module))
    return build(**arguments)


class _WhenImported(MetaPathFinder):
    """Lets the usual finders find a module, and acts when it has been executed; then it is gone."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.act = act

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            self.act(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
