"""Rand-K: random elements, the same on every rank, by an all-reduce."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_eff.arguments import check_number
from lightning_eff.compression.interface import (
    AllReduce,
    Bucket,
    Compressor,
    ErrorFeedback,
    Exchange,
    all_reduce_bytes,
    kept_count,
)
from lightning_eff.kernels.philox import philox_words


class RandK(Compressor):
    """k = max(1, int(ratio n m)) elements at places that all ranks draw alike, so that no places are sent.

    The elements, shifted round by a random number, are cut into k runs of equal length, and one is drawn of each: every
    element has the probability k / (n m), as if k of all had been drawn, for the work of k random numbers.

    The places are drawn by Philox on the gradients' own device, from the seed, the step and the parameter's name: the
    same on all ranks and after a resume.

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
        check_number("ratio", ratio, above=0, most=1)
        self.ratio = ratio

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        """See :class:`Compressor`."""
        return all_reduce_bytes(itemsize * kept_count(rows * columns, self.ratio), world_size)

    def exchange(self, bucket: Bucket) -> Exchange:
        """See :class:`Compressor`."""
        dtype = bucket.gradients[0].dtype
        places = [
            _draw(gradient.numel(), kept_count(gradient.numel(), self.ratio), bucket.seed, stream, bucket.device)
            for gradient, stream in zip(bucket.gradients, bucket.streams, strict=True)
        ]
        values = torch.cat([bucket.input(index).flatten()[place] for index, place in enumerate(places)])
        mean = yield AllReduce(values.div_(bucket.world_size).to(dtype))

        del values
        parts = torch.split(mean, [len(place) for place in places])
        for index, (gradient, place, part) in enumerate(zip(bucket.gradients, places, parts, strict=True)):
            scale = 1.0 if self.keeps_memory else gradient.numel() / len(place)
            if bucket.errors is not None:
                tensor = bucket.input(index).flatten()
                tensor.index_add_(0, place, tensor[place], alpha=-scale)
                bucket.keep(index, tensor.view_as(gradient))
            gradient.zero_()
            gradient.view(-1)[place] = (part.to(torch.float32) * scale).to(gradient.dtype)


def _draw(numel: int, count: int, seed: int, stream: int, device: torch.device) -> Tensor:
    """int64 (count,): different places in [0, numel), made on the device, the same on all ranks and devices.

    A word times a length, without its low 32 bits, is an even draw below that length, to one part in 2^32 / length.
    """
    words = philox_words(seed, stream, count + 1, device)
    edges = torch.arange(count + 1, device=device).mul_(numel).floor_divide_(count)
    places = edges[:-1] + (words[:-1].mul_(edges[1:] - edges[:-1]) >> 32)
    places += words[-1] * numel >> 32
    return torch.where(places < numel, places, places - numel)
