"""Optimizer state of some parameters: counted, released, and absent from checkpoints that resume exactly all the same.

An optimizer makes a parameter's state when it first steps it, and makes it anew after it was released. One device and
DDP save and load what is there. FSDP2's checkpoints expect the state of every parameter that can be trained, which
`allow_absent_states` mends.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.optim import LBFGS, Adagrad, Optimizer

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.wrapping import Wrapper

_ATTRIBUTE = "_lightning_eff_absent_states"


def state_bytes(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor] | None = None) -> int:
    """Bytes of optimizer state on this rank: of these parameters, or of all.

    Example:
        >>> import torch
        >>> weight = nn.Parameter(torch.ones(10))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> state_bytes([optimizer])  # two moments and a count of steps
        84
        >>> release_state([optimizer], [weight])
        84
        >>> state_bytes([optimizer])
        0
    """
    of = None if parameters is None else list(parameters)
    states = itertools.chain.from_iterable(
        optimizer.state.values() if of is None else (optimizer.state[p] for p in of if p in optimizer.state)
        for optimizer in optimizers
    )
    return sum(_bytes(state) for state in states)


def release_state(optimizers: Sequence[Optimizer], parameters: Iterable[Tensor]) -> int:
    """Forget the optimizer state of parameters, as if they had never been stepped; the groups stay as they are.

    Call it between two steps, on all ranks alike. See `check_release_support` for the optimizers that can do with it.

    Returns:
        The bytes that were held on this rank.
    """
    parameters = list(parameters)
    held = state_bytes(optimizers, parameters)
    for optimizer in optimizers:
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
    return held


def check_release_support(optimizers: Iterable[Optimizer], *, again: bool = True) -> None:
    """Say when the optimizers exist, in ``on_fit_start``, whether the state of some parameters can be released.

    Args:
        optimizers: ``trainer.optimizers``.
        again: whether a parameter may be trained again after its state was released.

    Raises:
        MisconfigurationException: for an optimizer whose state is not each parameter's own (LBFGS), is divided over
            ranks by whole parameters (ZeroRedundancyOptimizer), or is made once and never again (Adagrad, if the
            parameter may be trained again).
    """
    for optimizer in optimizers:
        why = None
        if isinstance(optimizer, LBFGS):
            why = "keeps one state for all parameters together"
        elif hasattr(optimizer, "consolidate_state_dict"):
            why = "divides the state over the ranks by whole parameters"
        elif again and isinstance(optimizer, Adagrad):
            why = "makes its state when it is built and cannot make it again"
        if why is not None:
            raise MisconfigurationException(
                f"{type(optimizer).__name__} {why}, so the state of single parameters cannot be released: use an "
                "optimizer such as AdamW or SGD"
            )


def allow_absent_states(strategy: Strategy) -> None:
    """Let checkpoints of a strategy lack the state of some parameters, and resume with just those that they have.

    Call it in ``setup``, on all ranks; again is harmless, and it stays for the strategy's life. Only
    ``ModelParallelStrategy`` (FSDP2) needs it. There PyTorch fills up what is missing, on saving with a step of zero
    gradients where the optimizer has no state at all yet, on loading for every parameter that can be trained, or fails.
    """
    if is_a(strategy, ModelParallelStrategy) and not hasattr(strategy, _ATTRIBUTE):
        setattr(strategy, _ATTRIBUTE, _AbsentStates(strategy))


class _AbsentStates:
    """Stands in front of two methods of one strategy."""

    def __init__(self, strategy: ModelParallelStrategy) -> None:
        self.strategy = strategy
        Wrapper(strategy, "optimizer_state", self.optimizer_state)
        Wrapper(strategy, "load_checkpoint", self.load_checkpoint)

    def optimizer_state(self, save: Callable[..., Any], optimizer: Optimizer) -> dict[str, Any]:
        if optimizer.state:
            return save(optimizer)  # type: ignore[no-any-return]
        with _trainable(optimizer, set()):  # so that the step which is to make the state makes none
            return save(optimizer)  # type: ignore[no-any-return]

    def load_checkpoint(
        self, load: Callable[..., Any], checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        optimizers = self.strategy.optimizers
        self.strategy.optimizers = []
        try:
            checkpoint: dict[str, Any] = load(checkpoint_path, weights_only=weights_only)
        finally:
            self.strategy.optimizers = optimizers
        path = Path(self.strategy.broadcast(checkpoint_path))
        saved = _FullStates(checkpoint) if path.is_file() else _ShardedStates(path)
        module = self.strategy.model
        assert module is not None
        for index, optimizer in enumerate(optimizers):
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
            with _trainable(optimizer, saved.present(index, module)):
                saved.load(index, optimizer, module)
        return checkpoint


class _FullStates:
    """Of a checkpoint in one file, which every rank has read."""

    def __init__(self, checkpoint: dict[str, Any]) -> None:
        self.saved: list[dict[str, Any]] = checkpoint.get("optimizer_states", [])

    def present(self, index: int, module: nn.Module) -> set[Tensor]:
        named = {_clean(name): parameter for name, parameter in module.named_parameters()}
        numbered = list(named.values())  # Lightning numbers them in the model's order, whatever the groups are
        return {
            numbered[key] if isinstance(key, int) else named[_clean(key)]
            for key, state in self.saved[index]["state"].items()
            if state
        }

    def load(self, index: int, optimizer: Optimizer, module: nn.Module) -> None:
        from lightning.fabric.strategies.model_parallel import _rekey_optimizer_state_if_needed
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

        saved = self.saved[index]
        if not saved["state"]:  # PyTorch takes none without any state
            for group, other in zip(optimizer.param_groups, saved["param_groups"], strict=True):
                group.update({key: value for key, value in other.items() if key != "params"})
            return
        options = StateDictOptions(broadcast_from_rank0=True, full_state_dict=True)
        saved = _rekey_optimizer_state_if_needed(saved, module)
        set_optimizer_state_dict(module, optimizer, optim_state_dict=saved, options=options)


class _ShardedStates:
    """Of a checkpoint with a file for each rank."""

    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        self.path = path
        self.keys = list(FileSystemReader(path).read_metadata().state_dict_metadata)

    def present(self, index: int, module: nn.Module) -> set[Tensor]:
        prefix = f"optimizer_{index}.state."
        keys = [key.removeprefix(prefix) for key in self.keys if key.startswith(prefix)]
        owners = {key.rpartition(".")[0] for key in keys}
        return {parameter for name, parameter in module.named_parameters() if _clean(name) in owners}

    def load(self, index: int, optimizer: Optimizer, module: nn.Module) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_optimizer_state_dict,
            set_optimizer_state_dict,
        )
        from torch.distributed.checkpoint.state_dict_loader import load

        state = {f"optimizer_{index}": get_optimizer_state_dict(module, optimizer)}
        load(state, checkpoint_id=self.path)
        options = StateDictOptions(cpu_offload=True)
        set_optimizer_state_dict(module, optimizer, optim_state_dict=state[f"optimizer_{index}"], options=options)


@contextmanager
def _trainable(optimizer: Optimizer, trainable: set[Tensor]) -> Iterator[None]:
    """For a while just these of the optimizer's parameters can be trained, which is what PyTorch's functions go by."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(parameter in trainable)
        yield
    finally:
        for parameter, was in zip(parameters, before, strict=True):
            parameter.requires_grad_(was)


def _clean(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        local = value.to_local() if is_dtensor(value) else value  # type: ignore[attr-defined]
        return local.numel() * local.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
