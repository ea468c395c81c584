"""Rand-K: random elements, the same on every rank, by an all-reduce."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_eff.arguments import check
from lightning_eff.compression.interface import (
    AllReduce,
    Bucket,
    Compressor,
    ErrorFeedback,
    Exchange,
    all_reduce_bytes,
    kept_count,
)


class RandK(Compressor):
    """k = max(1, int(ratio n m)) elements at places that all ranks draw alike, so that no places are sent.

    The elements, shifted round by a random number, are cut into k runs of equal length, and one is drawn of each: every
    element has the probability k / (n m), as if k of all had been drawn, for the work of k random numbers.

    Without error feedback the mean is multiplied by n m / k, which makes it unbiased; with error feedback it is not,
    which makes the compressor a contraction.

    Args:
        ratio: fraction of the elements that is sent, in (0, 1].
        error_feedback: see :class:`Compressor`.
        eta: see :class:`Compressor`.
        start_step: see :class:`Compressor`.
        min_numel: see :class:`Compressor`.
        seed: see :class:`Compressor`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> RandK(ratio=0.1).bytes_sent(rows=1000, columns=1000, itemsize=4, world_size=2)  # dense: 4,000,000
        400000.0
    """

    collectives: ClassVar[int] = 1

    def __init__(
        self,
        ratio: float = 0.1,
        error_feedback: ErrorFeedback = "none",
        eta: float = 0.1,
        start_step: int = 0,
        min_numel: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(error_feedback, eta, start_step, min_numel, seed)
        check("ratio", ratio, 0 < ratio <= 1, "in (0, 1]")
        self.ratio = ratio

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        """See :class:`Compressor`."""
        return all_reduce_bytes(itemsize * kept_count(rows * columns, self.ratio), world_size)

    def exchange(self, bucket: Bucket) -> Exchange:
        """See :class:`Compressor`."""
        inputs = [tensor.flatten() for tensor in bucket.inputs()]
        dtype = bucket.gradients[0].dtype
        places = [
            _draw(len(tensor), kept_count(len(tensor), self.ratio), bucket.seed, stream, bucket.device)
            for tensor, stream in zip(inputs, bucket.streams, strict=True)
        ]
        values = torch.cat([tensor[place] for tensor, place in zip(inputs, places, strict=True)])
        values.div_(bucket.world_size)
        mean = yield AllReduce(values.to(dtype))
        sizes = [len(place) for place in places]
        for index, (gradient, place, part) in enumerate(
            zip(bucket.gradients, places, torch.split(mean.to(torch.float32), sizes), strict=True)
        ):
            tensor = inputs[index]
            scale = 1.0 if self.keeps_memory else len(tensor) / len(place)
            if bucket.errors is not None:
                unsent: Tensor = tensor.index_add(0, place, tensor[place], alpha=-scale)
                bucket.keep(index, unsent.view_as(gradient))
            gradient.zero_()
            gradient.view(-1)[place] = (part * scale).to(gradient.dtype)


def _draw(numel: int, count: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """int64 (count,): different places in [0, numel), the same on all ranks and devices."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + stream) % 2**63)
    numbers = torch.rand(count + 1, generator=generator, dtype=torch.float64)
    edges = torch.arange(count + 1, dtype=torch.int64) * numel // count
    lengths = edges[1:] - edges[:-1]
    places = edges[:-1] + (numbers[:-1] * lengths).long()
    shift = int(numbers[-1] * numel)
    return ((places + shift) % numel).to(device)
