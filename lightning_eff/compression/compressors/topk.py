"""Top-K: each rank sends its own largest elements with their places, by an all-gather."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_eff.arguments import check
from lightning_eff.compression.interface import (
    AllGather,
    Bucket,
    Compressor,
    ErrorFeedback,
    Exchange,
    all_gather_bytes,
    kept_count,
)


class TopK(Compressor):
    """The k = max(1, int(ratio n m)) elements of each rank's gradient that are largest in absolute value.

    Every rank has others, so values and places (8 bytes for each) go to all ranks by an all-gather: the bytes grow with
    the number of ranks, and near 1 / ratio of them it sends no less than an all-reduce would: all goes dense then.

    Args:
        ratio: fraction of the elements that is sent, in (0, 1].
        error_feedback: see :class:`Compressor`.
        eta: see :class:`Compressor`.
        start_step: see :class:`Compressor`.
        min_numel: see :class:`Compressor`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> TopK(ratio=0.1).bytes_sent(rows=1000, columns=1000, itemsize=4, world_size=2)  # dense: 4,000,000
        800000
    """

    collectives: ClassVar[int] = 1
    shows_nonfinite: ClassVar[bool] = True

    def __init__(
        self,
        ratio: float = 0.1,
        error_feedback: ErrorFeedback = "ef14",
        eta: float = 0.1,
        start_step: int = 0,
        min_numel: int = 4096,
    ) -> None:
        super().__init__(error_feedback, eta, start_step, min_numel)
        check("ratio", ratio, 0 < ratio <= 1, "in (0, 1]")
        self.ratio = ratio

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        """See :class:`Compressor`: float32 values and int32 places."""
        return all_gather_bytes(8 * kept_count(rows * columns, self.ratio), world_size)

    def exchange(self, bucket: Bucket) -> Exchange:
        """See :class:`Compressor`."""
        inputs = [tensor.flatten() for tensor in bucket.inputs()]
        places = [tensor.abs().topk(kept_count(len(tensor), self.ratio), sorted=False).indices for tensor in inputs]
        values = [tensor[place] for tensor, place in zip(inputs, places, strict=True)]
        # One buffer: the bits of an int32 below 2^31 - 2^23, and no bucket is as large, are a finite float32.
        numbers = torch.cat(places).to(torch.int32).view(torch.float32)
        gathered = yield AllGather(torch.cat([*values, numbers]))

        sizes = [len(place) for place in places]
        means = [torch.zeros_like(tensor) for tensor in inputs]
        for sent in gathered:  # in the order of the ranks, so that all of them round alike
            its_values, its_places = sent.split([len(numbers), len(numbers)])
            parts = zip(means, its_values.split(sizes), its_places.view(torch.int32).long().split(sizes), strict=True)
            for mean, value, place in parts:
                mean.index_add_(0, place, value)
        for index, (gradient, mean) in enumerate(zip(bucket.gradients, means, strict=True)):
            if bucket.errors is not None:
                unsent: Tensor = inputs[index].index_fill(0, places[index], 0)
                bucket.keep(index, unsent.view_as(gradient))
            gradient.copy_(mean.div_(bucket.world_size).view_as(gradient))
