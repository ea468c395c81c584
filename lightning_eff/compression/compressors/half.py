"""The gradients in 16 bits on the wire."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightning_eff.compression.interface import (
    AllReduce,
    Bucket,
    Compressor,
    ErrorFeedback,
    Exchange,
    all_reduce_bytes,
)


class _Half(Compressor):
    shows_nonfinite: ClassVar[bool] = True
    whole_buckets: ClassVar[bool] = True
    schemes: ClassVar[tuple[ErrorFeedback, ...]] = ("none",)
    dtype: ClassVar[torch.dtype]

    def __init__(self, start_step: int = 0) -> None:
        super().__init__(start_step=start_step, min_numel=0)

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        """See :class:`Compressor`."""
        return all_reduce_bytes(2 * rows * columns, world_size)

    def exchange(self, bucket: Bucket) -> Exchange:
        """See :class:`Compressor`."""
        (gradient,) = bucket.gradients
        # Divided before the cast: the sum over the ranks stays in float16's range.
        sent = (gradient / bucket.world_size).to(self.dtype)
        if bucket.errors is not None:
            bucket.errors[0].copy_(gradient).sub_(sent, alpha=bucket.world_size)
        gradient.copy_((yield AllReduce(sent)))


class FP16(_Half):
    """Gradients as float16 on the wire, half of float32's bytes.

    The division by the world size comes before the cast, so that a sum over ranks does not overflow. Values above
    65504 times the world size become infinite, values below 6e-8 zero. With a GradScaler, whose scale makes gradients
    large, BF16 is the safer choice.

    Args:
        start_step: steps at the beginning that are reduced dense.

    Raises:
        ValueError: ``start_step`` is no integer of at least 0.
    """

    dtype = torch.float16


class BF16(_Half):
    """Gradients as bfloat16 on the wire, half of float32's bytes: float32's range, three significant digits.

    Args:
        start_step: steps at the beginning that are reduced dense.

    Raises:
        ValueError: ``start_step`` is no integer of at least 0.
    """

    dtype = torch.bfloat16
