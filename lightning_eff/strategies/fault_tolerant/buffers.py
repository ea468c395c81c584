"""Buffers that a step changes, such as BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.nn.modules.batchnorm import _NormBase

from lightning_eff.strategies.fault_tolerant.operations import nothing, summed
from lightning_eff.training.run_parts import is_expanded

if TYPE_CHECKING:
    from lightning_eff.strategies.fault_tolerant.process_group import Gloo


@dataclass(frozen=True)
class _Held:
    """A buffer at one moment."""

    tensor: Tensor | None
    version: int
    content: Tensor | None


class Buffers:
    """They follow this replica's own micro-batches, and at the end of a step they are one replica's for all, as in DDP.

    Which of them a step changes may depend on the batch, so the replicas tell each other in each step.

    Args:
        module: whose buffers they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._begun: dict[str, _Held] = {}

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._begun)

    def begin(self) -> None:
        """A step begins; they are what they are."""
        self._begun = self._held()

    def restore(self) -> None:
        """As at the beginning of the step."""
        self._put_back(self._begun)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around passes that leave no trace in them."""
        before = self._held()
        yield
        self._put_back(before)

    def changes(self) -> Tensor:
        """What `share` takes, as the largest over the processes of a replica: (buffers, 3).

        Whether this process has changed it since the step began, its size, and its size with a minus.
        """
        rows, unseen = [], self._norms(training=True)
        for name, buffer in self._named():
            changed = _is_another(buffer, self._begun.get(name)) or name in unseen
            size = -1 if buffer is None else buffer.numel()
            rows.append([changed and not (buffer is not None and is_expanded(buffer)), size, -size])
        return torch.tensor(rows, dtype=torch.int64)

    def share(self, changes: Tensor, group: Gloo) -> list[Any] | None:
        """Names and values of those that any replica has changed, as one has them, for all; None if there are none."""
        if not len(changes):
            nothing(group)
            return None
        found = summed(group, changes.clone(), ReduceOp.MAX).tolist()
        # A table of positions, say, may have been made anew for a longer batch on some: each keeps its own.
        names = [
            name
            for (name, _), (changed, largest, least) in zip(self._named(), found, strict=True)
            if changed and largest == -least > 0
        ]
        if not names:
            return None
        buffers: dict[str, Any] = dict(self._named())
        # float64 holds the values of smaller types, and counts, exactly.
        flat = torch.cat([buffers[name].detach().double().cpu().flatten() for name in names])
        group.broadcast_one(flat, 0).wait()
        return [names, flat]

    @torch.no_grad()
    def adopt(self, shared: list[Any] | None) -> None:
        """Take what `share` gave."""
        if shared is None:
            return
        names, flat = shared
        present: dict[str, Any] = dict(self._named())
        buffers = [present[name] for name in names]
        for buffer, part in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def _named(self) -> Iterator[tuple[str, Tensor | None]]:
        """Also those that are None, which another replica may have set."""
        for path, part in self.module.named_modules():
            for name, buffer in part._buffers.items():
                yield f"{path}.{name}".lstrip("."), buffer

    def _held(self) -> dict[str, _Held]:
        """A table that no step writes to, such as a mask, is copied once and not in each."""
        unseen = self._norms(training=False)
        return {
            name: _Held(buffer, _version(buffer), None if buffer is None else buffer.detach().clone())
            if name in unseen or _is_another(buffer, self._begun.get(name))
            else self._begun[name]
            for name, buffer in self._named()
        }

    @torch.no_grad()
    def _put_back(self, held: dict[str, _Held]) -> None:
        present, unseen = dict(self._named()), self._norms(training=True)
        for name, before in held.items():
            if present.get(name) is not before.tensor:
                path, _, own = name.rpartition(".")
                setattr(self.module.get_submodule(path), own, before.tensor)
            # What nobody has written to stays as it is, so that it does not count as changed.
            if before.tensor is not None and (_version(before.tensor) != before.version or name in unseen):
                before.tensor.copy_(before.content)  # type: ignore[arg-type]

    def _norms(self, training: bool) -> set[str]:
        """Batch norm's statistics, of all or of those that train: kernels write them without a new version."""
        return {
            f"{path}.{name}".lstrip(".")
            for path, part in self.module.named_modules()
            if isinstance(part, _NormBase) and (part.training or not training)
            for name, buffer in part._buffers.items()
            if buffer is not None
        }


def _is_another(buffer: Tensor | None, before: _Held | None) -> bool:
    """Whether it was written to, or another tensor is in its place, whose versions begin at 0 again."""
    return before is None or buffer is not before.tensor or _version(buffer) != before.version


def _version(buffer: Tensor | None) -> int:
    """What grows when torch writes to it. Made by a validation in inference mode, it has none and is not written to."""
    return 0 if buffer is None or buffer.is_inference() else buffer._version
