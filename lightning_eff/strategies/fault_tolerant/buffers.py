"""Buffers that a forward pass changes, such as BatchNorm's running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_eff.strategies.fault_tolerant.operations import nothing

if TYPE_CHECKING:
    from lightning_eff.strategies.fault_tolerant.process_group import Gloo


class Buffers:
    """They follow this replica's own micro-batches, and at the end of a step they are one replica's for all, as in DDP.

    Args:
        module: whose buffers they are.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.changing: set[str] = set()
        """Names of those that a forward pass was seen to change."""
        self._before: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._begun = False

    def begin(self) -> None:
        """A step begins; they are what they are."""
        buffers = dict(self.module.named_buffers())
        # Batch norm's kernels write its statistics without a new version, so that they would not be noticed.
        for path, part in self.module.named_modules():
            if isinstance(part, _NormBase) and part.training:
                self.changing.update(f"{path}.{name}".lstrip(".") for name, _ in part.named_buffers(recurse=False))
        if self._begun:
            self._before = {name: buffers[name].clone() for name in self.changing if name in buffers}
        else:  # nothing is known yet
            self._before = {name: buffer.clone() for name, buffer in buffers.items()}
        self._begun = True
        self._versions = {name: buffer._version for name, buffer in buffers.items()}

    def note_changes(self) -> None:
        """After a forward pass."""
        for name, buffer in self.module.named_buffers():
            if buffer._version != self._versions.get(name):
                self.changing.add(name)

    def restore(self) -> None:
        """As at the beginning of the step."""
        self._copy({name: value for name, value in self._before.items() if name in self.changing})

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around passes that leave no trace in them."""
        before = {name: buffer.clone() for name, buffer in self.module.named_buffers() if name in self.changing}
        yield
        self._copy(before)

    def share(self, group: Gloo) -> Tensor | None:
        """Those of one replica, for all; None if none changes."""
        if not self.changing:
            nothing(group)
            return None
        buffers = dict(self.module.named_buffers())
        # float64 holds the values of smaller types, and counts, exactly.
        flat = torch.cat([buffers[name].detach().double().cpu().flatten() for name in sorted(self.changing)])
        group.broadcast_one(flat, 0).wait()
        return flat

    @torch.no_grad()
    def adopt(self, flat: Tensor | None) -> None:
        """Take what `share` gave."""
        if flat is None:
            return
        buffers = dict(self.module.named_buffers())
        parts = torch.split(flat, [buffers[name].numel() for name in sorted(self.changing)])
        for name, part in zip(sorted(self.changing), parts, strict=True):
            buffers[name].copy_(part.view_as(buffers[name]))

    @torch.no_grad()
    def _copy(self, values: dict[str, Tensor]) -> None:
        for name, buffer in self.module.named_buffers():
            if name in values:
                buffer.copy_(values[name])

    def handover(self) -> list[str]:
        """For a replica that comes in."""
        # In sharing, all broadcast the same buffers: not only those that a newcomer has seen to change.
        return sorted(self.changing)

    def take_over(self, changing: list[str]) -> None:
        """Take what a peer's `handover` gave."""
        self.changing.update(changing)
