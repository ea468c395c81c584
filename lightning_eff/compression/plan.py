"""Which tensors are compressed, decided from their sizes alone and so equally on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from lightning_eff.compression.interface import Compressor, all_reduce_bytes

WORTH = 0.9
"""A tensor is compressed if that takes less than this fraction of the bytes: the rest of it is lost for something."""


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor: its first dimension by all others; of a vector one row.

    Example:
        >>> as_matrix((64, 3, 7, 7)), as_matrix((10,))
        ((64, 147), (1, 10))
    """
    if len(shape) < 2:
        return 1, prod(shape)
    return shape[0], prod(shape[1:])


def pays(compressor: Compressor, shape: Sequence[int], itemsize: int, world_size: int) -> bool:
    """Whether a tensor is compressed: a large enough matrix, for which clearly fewer bytes are sent than dense."""
    rows, columns = as_matrix(shape)
    if rows * columns < max(1, compressor.min_numel) or (len(shape) < 2 and not compressor.whole_buckets):
        return False
    dense = all_reduce_bytes(rows * columns * itemsize, world_size)
    return compressor.bytes_sent(rows, columns, itemsize, world_size) < WORTH * dense


@dataclass(frozen=True)
class Prediction:
    """What one rank sends in a step.

    Attributes:
        bytes_sent: with the compressor.
        dense_bytes: with plain DDP.
        compressed: names of the tensors that are compressed.
        dense: names of those that are not.
    """

    bytes_sent: float
    dense_bytes: float
    compressed: tuple[str, ...]
    dense: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """How many times fewer bytes are sent."""
        return self.dense_bytes / self.bytes_sent if self.bytes_sent else 1.0


def predict(
    compressor: Compressor, shapes: Mapping[str, Sequence[int]], world_size: int, dtype: torch.dtype = torch.float32
) -> Prediction:
    """Bytes that one rank sends in a step for parameters of these shapes.

    They are counted as the ring algorithms send them: an all-reduce of N bytes takes 2 (W - 1) / W N of each of W
    ranks, an all-gather (W - 1) N.

    Args:
        compressor: with its settings.
        shapes: of the trainable parameters, by name.
        world_size: number of ranks.
        dtype: of the gradients.

    Example:
        >>> from lightning_eff.compression import ArcTopK
        >>> shapes = {"weight": (1000, 1000), "bias": (1000,)}
        >>> predict(ArcTopK(ratio=0.2), shapes, world_size=2)
        Prediction(bytes_sent=820000.0, dense_bytes=4004000.0, compressed=('weight',), dense=('bias',))
    """
    itemsize = torch.empty((), dtype=dtype).element_size()
    compressed = {name for name, shape in shapes.items() if pays(compressor, shape, itemsize, world_size)}
    sent = dense = 0.0
    for name, shape in shapes.items():
        rows, columns = as_matrix(shape)
        whole = all_reduce_bytes(rows * columns * itemsize, world_size)
        sent += compressor.bytes_sent(rows, columns, itemsize, world_size) if name in compressed else whole
        dense += whole
    return Prediction(
        sent,
        dense,
        tuple(name for name in shapes if name in compressed),
        tuple(name for name in shapes if name not in compressed),
    )


def bucket_cap_mb(gradient_bytes: float) -> float:
    """MiB of a bucket: about a dozen buckets, for overlap, of one MiB at least, as ``torch.compile`` asks for.

    Example:
        >>> bucket_cap_mb(24 * 2**20)
        2.0
    """
    return min(25.0, max(1.0, gradient_bytes / 2**20 / 12))
