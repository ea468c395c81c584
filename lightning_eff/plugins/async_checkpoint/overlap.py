"""What may be copied while the training goes on, and who writes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_eff.training.dtensor import held

_PIECE = 1024 * 1024  # bytes, which stay in a cache with what comes of their comparison

Versions = tuple[int, int]
Pairs = Sequence[tuple[Tensor, Tensor]]


class Overlap:
    """Which tensors may be copied behind a save, because only optimizers write them and say so before.

    **Learned.** The first save of a kind is copied at once, and compared with what it was copied from when the time in
    which a late copy would go on is over. What somebody has written by then (sharpness-aware minimization, a momentum
    encoder, weights that are clamped behind a step) is never copied late.

    **Watched.** What is written while it is copied late, by torch's count of writes in place, is never copied late
    again, and that copy has failed. A write through ``.data`` is not counted: one that comes rarely is not seen.

    Args:
        tensors: gives what may be copied late: weights, and state of optimizers.
        kind: names what follows on a save of now, or is None where anybody may write.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], kind: Callable[[], str | None]) -> None:
        self._tensors = tensors
        self._kind = kind
        self._learned: set[str] = set()
        self._looked_at: tuple[str, Pairs] | None = None
        self._others: set[int] = set()  # addresses of storages that somebody else writes

    def owners(self) -> dict[int, list[Tensor]]:
        """What may be copied late now, by the address of its storage."""
        found: dict[int, list[Tensor]] = {}
        if self._kind() is not None:
            for tensor in {id(tensor): tensor for tensor in self._tensors()}.values():
                part = held(tensor)
                if type(part) in (Tensor, nn.Parameter) and part.layout is torch.strided and not part.is_inference():
                    found.setdefault(address(part), []).append(tensor)
        return {place: tensors for place, tensors in found.items() if place not in self._others}

    def has_to_learn(self, pairs: Pairs) -> bool:
        """Whether this save has to be copied at once, and is looked at."""
        kind = self._kind()
        self._looked_at = None
        if kind is None or kind in self._learned:
            return False
        self._looked_at = kind, pairs
        return True

    def time_is_over(self, *kinds: str) -> None:
        """Who writes what was saved of these kinds has done so; before an optimizer writes it."""
        if self._looked_at is None:
            return
        (kind, pairs), self._looked_at = self._looked_at, None
        if kind in kinds:
            self._others.update(address(source) for copy, source in pairs if not are_equal(copy, source))
            self._learned.add(kind)

    def leave_out(self, seen: Iterable[tuple[Tensor, Versions]]) -> int:
        """From now on those that have been written since; how many."""
        written = [tensor for tensor, before in seen if _versions(tensor) != before]
        self._others.update(address(held(tensor)) for tensor in written)
        return len(written)


BATCH, VALIDATION, LAST_VALIDATION = "batch", "validation", "last validation"


def what_follows(trainer: Trainer) -> str | None:
    """What follows on a save within ``fit``: behind a batch or a validation another batch, or an epoch's end.

    Behind an epoch's last batch anybody may write weights, and what follows has no name.
    """
    fit = trainer.fit_loop
    last = fit.epoch_loop.batch_progress.is_last_batch or trainer.should_stop
    last = last or trainer.global_step == trainer.max_steps
    if trainer.training:
        return None if last else BATCH
    if trainer.validating and trainer.state.fn == "fit":
        return LAST_VALIDATION if last else VALIDATION
    return None


def overlap_of(trainer: Trainer, *kinds: str) -> Overlap:
    """Of a run's weights and its optimizers' state, for saves of these kinds."""

    def tensors() -> list[Tensor]:
        return [*trainer.lightning_module.parameters(), *owned_by(trainer.optimizers)]

    def kind() -> str | None:
        follows = what_follows(trainer)
        return follows if follows in kinds else None

    return Overlap(tensors, kind)


def owned_by(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """The weights that optimizers train, and their state."""
    tensors: list[Tensor] = []
    for optimizer in optimizers:
        tensors += [weight for group in optimizer.param_groups for weight in group["params"]]
        for state in optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return tensors


def before_updates(call: Callable[[], None]) -> RemovableHandle:
    """Call something before any optimizer of the process writes; with a closure, which has forward and backward in it,
    behind that."""

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if args[1:] else kwargs.get("closure")  # the first one is the optimizer
        if closure is None:
            call()
            return None

        def whole() -> Any:
            result = closure()
            call()
            return result

        return ((args[0], whole, *args[2:]), kwargs) if args[1:] else (args, {**kwargs, "closure": whole})

    return register_optimizer_step_pre_hook(hook)


def versions(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Versions]]:
    """How often each of them has been written in place, as torch counts it."""
    return [(tensor, _versions(tensor)) for tensor in tensors]


def _versions(tensor: Tensor) -> Versions:
    return tensor._version, held(tensor)._version  # of a sharded one either is counted, as it is written or its part


def address(tensor: Tensor) -> int:
    """Of its storage."""
    return tensor.untyped_storage().data_ptr()


def as_bytes(tensor: Tensor) -> Any:
    """Those of a contiguous tensor in host memory, as an array of NumPy."""
    return tensor.detach().view(-1).view(torch.uint8).numpy()


def are_equal(copy: Tensor, source: Tensor) -> bool:
    """Whether a contiguous copy in host memory is what it was copied from, on the host bit by bit; waits for a GPU."""
    if source.device.type != "cpu":
        return torch.equal(source, copy.to(source.device))
    one, other = as_bytes(copy), as_bytes(source)
    return all(numpy.array_equal(one[at : at + _PIECE], other[at : at + _PIECE]) for at in range(0, len(one), _PIECE))
