"""Gradients of several ranks for the tests of the compressors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eff.compression import AllGather, AllReduce, ArcTopK, Collective, Compressor, comm_hook

SHAPES = {"0.weight": (24, 16), "0.bias": (24,), "1.weight": (8, 3, 2, 2), "2.weight": (10, 24)}


class Always(ArcTopK):
    """Compresses also where it does not pay."""

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        return 0.0


def gradients(step: int, world_size: int, shapes: dict[str, tuple[int, ...]] | None = None) -> list[dict[str, Tensor]]:
    """For each rank; a common part and one of its own."""
    generator = torch.Generator().manual_seed(step)
    shapes = shapes or SHAPES
    common = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return [
        {name: tensor + torch.randn(tensor.shape, generator=generator) for name, tensor in common.items()}
        for _ in range(world_size)
    ]


def mean(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Over the ranks, in float64."""
    return {name: torch.stack([part[name].double() for part in parts]).mean(0) for name in parts[0]}


def memory_of(entries: list[dict[str, dict[str, Tensor]]]) -> list[Tensor]:
    """Every tensor of all memories, copied."""
    return [tensor.clone() for memory in entries for name in sorted(memory) for tensor in memory[name].values()]


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
        for gradient, parameter in zip(self._gradients, self._parameters, strict=True):
            gradient.copy_(values(parameter))

    def index(self) -> int:
        return self._index

    def buffer(self) -> Tensor:
        return self._buffer

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def gradients(self) -> list[Tensor]:
        return self._gradients

    def is_last(self) -> bool:
        return self._last


class LocalWork:
    """A collective that has been done, or is done as soon as somebody waits for it."""

    at_once = True

    def wait(self) -> None:
        self.at_once = True

    def is_completed(self) -> bool:
        return self.at_once


@contextmanager
def equal_ranks(world_size: int) -> Iterator[None]:
    """DDP's hook in one process: every other rank sends what this one does."""

    def launch(request: Collective, size: int, group: Any) -> tuple[LocalWork, Collective, Tensor]:
        tensor = request.tensor
        if isinstance(request, AllReduce):
            return LocalWork(), request, tensor.mul_(size)
        return LocalWork(), request, tensor.repeat(size, 1) if isinstance(request, AllGather) else tensor.clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comm_hook, "_launch", launch)
        patch.setattr(dist, "get_rank", lambda group=None: 0)
        patch.setattr(dist, "get_world_size", lambda group=None: world_size)
        yield


class LocalHook:
    """The hook over buckets of parameters; ``run`` is a backward pass."""

    def __init__(self, compressor: Compressor, *buckets: list[nn.Parameter]) -> None:
        names = {f"{i}.{j}": p for i, parameters in enumerate(buckets) for j, p in enumerate(parameters)}
        self.step = 0
        self.reduction = comm_hook.CompressedReduction(compressor, names, lambda: self.step)
        self.buckets = [LocalBucket(i, list(p), i == len(buckets) - 1) for i, p in enumerate(buckets)]

    def run(self, values: Any = None) -> list[Any]:
        futures = []
        for bucket in self.buckets:
            if values is not None:
                bucket.fill(values)
            futures.append(self.reduction.reduce(bucket))  # type: ignore[arg-type]
        return futures
