"""Whether the replicas' weights are the same bits, and which parameter is the first that is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lightning_eff.functional.gradients import is_dtensor
from lightning_eff.training.host_copy import HostCopy

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element
_HALF = 2**32


class WeightsHash:
    """A number for each parameter, and one for all of them, of 64 bits.

    A parameter's is the sum of its elements' bits, modulo 2^64: it changes with every single bit. The number for all
    tells the parameters apart. Both are computed on the device and read later.

    Sharded parameters (FSDP2) are not looked at: their ranks hold different parts.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        chosen = {name: p for name, p in parameters.items() if not is_dtensor(p) and p.numel()}
        self.names = list(chosen)
        self._parameters = list(chosen.values())
        self._each: HostCopy | None = None
        self._all: HostCopy | None = None

    @torch.no_grad()
    def take(self) -> None:
        """Of the weights as they are now; nothing waits for the device."""
        if not self._parameters:
            return
        sums = [parameter.detach().view(-1).view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64)
                if parameter.is_contiguous() else
                parameter.detach().contiguous().view(-1).view(_INTEGERS[parameter.element_size()]).sum(dtype=torch.int64)
                for parameter in self._parameters]  # fmt: skip
        each = torch.stack([value.to(sums[0].device) for value in sums])
        odd = torch.arange(1, 2 * len(sums), 2, device=each.device)
        self._each, self._all = HostCopy(each), HostCopy((each * odd).sum())

    def halves(self) -> list[float]:
        """The number for all as two of 32 bits, which a float64 holds exactly; NaN if none was taken."""
        if self._all is None:
            return [torch.nan, torch.nan]
        number = int(self._all.read().numpy())
        return [float(number // _HALF), float(number % _HALF)]

    def each(self) -> Tensor:
        """The numbers of the parameters when ``take`` was called last."""
        assert self._each is not None
        return self._each.read()


def differing(halves: npt.NDArray[np.float64]) -> list[int]:
    """The ranks whose number is not that of most; of two, or of halves that differ, the later ones.

    Args:
        halves: two numbers for each rank; with a NaN nothing was taken yet.

    Example:
        >>> differing(np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 3.0]]))
        [2]
    """
    rows = [tuple(row) for row in halves.tolist()]
    if all(row == rows[0] for row in rows) or np.isnan(halves).any():
        return []
    counts = Counter(rows)
    usual = max(counts, key=lambda row: (counts[row], -rows.index(row)))
    return [rank for rank, row in enumerate(rows) if row != usual]


def first_difference(names: Sequence[str], gathered: Tensor, rank: int, other: int) -> str:
    """The first parameter in which two ranks differ, of (ranks, parameters) numbers."""
    return names[int((gathered[rank] != gathered[other]).nonzero()[0])]
