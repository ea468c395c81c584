"""Top-K: each rank sends its own largest elements with their places, by an all-gather."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_eff.arguments import check_number
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
        check_number("ratio", ratio, above=0, most=1)
        self.ratio = ratio

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        """See :class:`Compressor`: float32 values and int32 places."""
        return all_gather_bytes(8 * kept_count(rows * columns, self.ratio), world_size)

    def exchange(self, bucket: Bucket) -> Exchange:
        """See :class:`Compressor`."""
        sizes = [kept_count(gradient.numel(), self.ratio) for gradient in bucket.gradients]
        gathered = yield AllGather(self._choose(bucket, sizes))
        # By rank, then by matrix. In the order of the ranks, so that all of them round alike.
        values = [sent[: sum(sizes)].split(sizes) for sent in gathered]
        places = [sent[sum(sizes) :].view(torch.int32).split(sizes) for sent in gathered]
        for index, gradient in enumerate(bucket.gradients):
            if bucket.errors is not None:
                own = places[bucket.rank][index].long()
                bucket.keep(index, bucket.input(index).flatten().index_fill_(0, own, 0).view_as(gradient))
            mean = torch.zeros(gradient.numel(), device=bucket.device)
            for its_values, its_places in zip(values, places, strict=True):
                mean.index_add_(0, its_places[index].long(), its_values[index])
            gradient.copy_(mean.div_(bucket.world_size).view_as(gradient))

    @staticmethod
    def _choose(bucket: Bucket, sizes: list[int]) -> Tensor:
        """All values, then all places, in one float32 buffer."""
        values, places = [], []
        for index, size in enumerate(sizes):
            tensor = bucket.input(index).flatten()
            place = tensor.abs().topk(size, sorted=False).indices
            values.append(tensor[place])
            places.append(place.to(torch.int32))
        # The bits of an int32 below 2^31 - 2^23, and no bucket is as large, are a finite float32.
        return torch.cat([*values, *(place.view(torch.float32) for place in places)])
