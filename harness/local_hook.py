"""DDP's communication hook in one process, without a network: for tests of it, and for what it holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.memory import peak_bytes
from lightning_eff.compression import AllGather, AllReduce, Collective, Compressor, comm_hook


class LocalBucket:
    """What DDP gives to a communication hook, of some parameters."""

    def __init__(self, index: int, parameters: list[nn.Parameter], last: bool) -> None:
        self._index, self._parameters, self._last = index, parameters, last
        self._buffer = torch.zeros(sum(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype)
        self._gradients, offset = [], 0
        for parameter in parameters:
            self._gradients.append(self._buffer.as_strided(parameter.shape, parameter.stride(), offset))
            offset += parameter.numel()

    def fill(self, values: Any) -> None:
        """Give each gradient the values of a function of its parameter."""
        for gradient, parameter in zip(self._gradients, self._parameters, strict=True):
            gradient.copy_(values(parameter))

    def index(self) -> int:
        """As DDP's."""
        return self._index

    def buffer(self) -> Tensor:
        """As DDP's."""
        return self._buffer

    def parameters(self) -> list[nn.Parameter]:
        """As DDP's."""
        return self._parameters

    def gradients(self) -> list[Tensor]:
        """As DDP's."""
        return self._gradients

    def is_last(self) -> bool:
        """As DDP's."""
        return self._last


class LocalWork:
    """A collective that has been done, or is done as soon as somebody waits for it."""

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once

    def wait(self) -> None:
        """As a collective's."""
        self.at_once = True

    def is_completed(self) -> bool:
        """As a collective's."""
        return self.at_once


@contextmanager
def equal_ranks(world_size: int, at_once: bool = True) -> Iterator[None]:
    """DDP's hook in one process: every other rank sends what this one does, and it has arrived at once or never."""

    def launch(request: Collective, size: int, group: Any) -> tuple[LocalWork, Collective, Tensor]:
        tensor = request.tensor
        if isinstance(request, AllReduce):
            return LocalWork(at_once), request, tensor.mul_(size)
        return LocalWork(at_once), request, tensor.repeat(size, 1) if isinstance(request, AllGather) else tensor.clone()

    with (
        mock.patch.object(comm_hook, "_launch", launch),
        mock.patch.object(dist, "get_rank", return_value=0),
        mock.patch.object(dist, "get_world_size", return_value=world_size),
    ):
        yield


class LocalHook:
    """The hook over buckets of parameters; ``run`` is a backward pass."""

    def __init__(self, compressor: Compressor, *buckets: list[nn.Parameter]) -> None:
        names = {f"{i}.{j}": p for i, parameters in enumerate(buckets) for j, p in enumerate(parameters)}
        self.step = 0
        self.reduction = comm_hook.CompressedReduction(compressor, names, lambda: self.step)
        self.buckets = [LocalBucket(i, list(p), i == len(buckets) - 1) for i, p in enumerate(buckets)]

    def run(self, values: Any = None) -> list[Any]:
        """One backward pass: the futures of all buckets."""
        futures = []
        for bucket in self.buckets:
            if values is not None:
                bucket.fill(values)
            futures.append(self.reduction.reduce(bucket))  # type: ignore[arg-type]
        return futures


def copies_of_the_gradients(
    compressor: Compressor, *, at_once: bool = False, steps: int = 1, buckets: int = 12, size: int = 256
) -> float:
    """What steps take at their peak beside DDP's buckets, error memories included, in copies of the gradients.

    Of a square matrix in each bucket, on two ranks; without ``at_once`` nothing arrives before it is waited for.
    """
    parameters = [nn.Parameter(torch.zeros(size, size)) for _ in range(buckets)]
    with equal_ranks(2, at_once):
        local = LocalHook(compressor, *([parameter] for parameter in parameters))
        generator = torch.Generator().manual_seed(0)
        for bucket in local.buckets:
            bucket.fill(lambda p: torch.randn(p.shape, generator=generator))

        def train() -> None:
            for local.step in range(steps):
                local.run()

        return peak_bytes(train) / (4 * size**2 * buckets)
