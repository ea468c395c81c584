"""A model's tree of modules without the wrappers around them.

Names are clean: without the ``_orig_mod`` of ``torch.compile`` and the ``module`` of DDP, so that they stay the same
whichever way a model is wrapped.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_eff.arguments import check_instance


def clean_named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by clean name, in the order of ``model.named_parameters()``, tied ones once, under their first name.

    Args:
        model: wrapped (DDP, ``torch.compile``, checkpointing) or not.

    Example:
        >>> import torch
        >>> model = nn.Sequential(torch.compile(nn.Linear(2, 2, bias=False)))
        >>> [name for name, _ in model.named_parameters()]
        ['0._orig_mod.weight']
        >>> list(clean_named_parameters(model))
        ['0.weight']
    """
    check_instance("model", model, nn.Module, "an nn.Module")
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in walk("", unwrap(model)):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (join(path, name), parameter))
    return dict(found.values())


def clean_named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by clean name, parents first, shared ones once, without the wrappers around them.

    Args:
        model: wrapped (DDP, ``torch.compile``, checkpointing) or not.

    Example:
        >>> import torch
        >>> list(clean_named_modules(nn.Sequential(torch.compile(nn.Linear(2, 2)))))
        ['', '0']
    """
    check_instance("model", model, nn.Module, "an nn.Module")
    return dict(walk("", unwrap(model)))


def unwrap(module: nn.Module) -> nn.Module:
    """Without ``torch.compile``, DDP and DataParallel around it."""
    while True:
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
        else:
            return module


def children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each child."""
    return [(name, unwrap(child)) for name, child in module._modules.items() if child is not None]


def walk(path: str, module: nn.Module, seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The module and all below it, parents first, shared ones once."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in children(module):
        yield from walk(join(path, name), child, seen)


def join(path: str, name: str) -> str:
    """A child's path."""
    return f"{path}.{name}" if path else name


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of `clean_named_modules`, and wherever else what it replaces is, as in shared blocks.

    It is frozen, where all parameters of what it replaces are.

    Raises:
        KeyError: nothing is at that path.
    """
    modules = clean_named_modules(root)
    before = modules[path]
    if {parameter.requires_grad for parameter in before.parameters()} == {False}:
        module.requires_grad_(False)
    for parent in modules.values():
        for name, child in parent._modules.items():
            if child is not None and unwrap(child) is before:
                parent._modules[name] = module
