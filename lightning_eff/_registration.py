"""Strategy strings, registered without importing Lightning.

``import lightning_eff`` must stay quick, and `lightning-eff doctor` must run where Lightning cannot be imported. So the
names are registered at once if Lightning is loaded, else right after it has made its registry.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

_REGISTRY = "lightning.pytorch.strategies"


# As Lightning names its own.
START_METHODS = {"ddp": "popen", "ddp_spawn": "spawn", "ddp_fork": "fork", "ddp_notebook": "fork"}


class Entry(NamedTuple):
    """A family of strings: the function that builds the strategy, by its module, and what it says of itself."""

    name: str
    """Without "ddp_"."""

    factory: str
    """module:function; called with ``start_method`` and ``arguments``."""

    arguments: dict[str, Any]
    description: str
    start_methods: dict[str, str] = START_METHODS
    """Prefix of the string -> how the processes are started."""

    ending: str = ""
    """Of the string, as Lightning names its own: "_find_unused_parameters_true"."""


_COMPRESSED = "lightning_eff.strategies.compressed_ddp:build"

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
        "lightning_eff.strategies.fault_tolerant.strategy:FaultTolerantDDPStrategy",
        {},
        "which outlives its replicas",
        {"ddp": "popen"},  # a replica is started by `lightning-eff launch`
    ),
)

OTHERS = {
    "fsdp2": (
        "lightning_eff.strategies.fsdp2:FSDP2Strategy",
        "FSDP2 on any module: weights, gradients and optimizer state are sharded over all ranks",
    )
}
"""Strings of strategies that are no DDP: what builds the strategy, and what it says of itself."""


def register() -> None:
    """Register the strategy strings now, or when Lightning is imported."""
    if _REGISTRY in sys.modules:
        _fill(sys.modules[_REGISTRY])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _fill(strategies: ModuleType) -> None:
    registry = strategies.StrategyRegistry
    for entry in ENTRIES:
        for prefix, start_method in entry.start_methods.items():
            registry.register(
                f"{prefix}_{entry.name}{entry.ending}",
                partial(_build, entry.factory),
                description=f"DDP, {entry.description}, with `start_method` '{start_method}'",
                override=True,
                start_method=start_method,
                **entry.arguments,
            )
    for name, (factory, description) in OTHERS.items():
        registry.register(name, partial(_build, factory), description=description, override=True)


def _build(factory: str, **arguments: Any) -> Any:
    """Import the strategy when somebody asks for it."""
    module, name = factory.split(":")
    build: Callable[..., Any] = getattr(import_module(module), name)
    return build(**arguments)


class _WhenImported(MetaPathFinder):
    """Lets the usual finders find Lightning's strategies, and fills the registry behind them; then it is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_fill(module: ModuleType) -> None:
            execute(module)
            _fill(module)

        spec.loader.exec_module = execute_and_fill  # type: ignore[method-assign]
        return spec
