"""Which tensors are compressed, decided from their sizes alone and so equally on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_eff.arguments import check, check_count, check_instance, is_count
from lightning_eff.compression.interface import Compressor, all_reduce_bytes

WORTH = 0.9
"""A tensor is compressed if that takes less than this fraction of the bytes: the rest of it is lost for something."""


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor: its first dimension by all others; of a vector one row.

    Leading dimensions of 1, as position embeddings have, are none.

    Example:
        >>> as_matrix((64, 3, 7, 7)), as_matrix((1, 1024, 768)), as_matrix((10,))
        ((64, 147), (1024, 768), (1, 10))
    """
    if len(shape) < 2:
        return 1, prod(shape)
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape[0], prod(shape[1:])


def in_memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The shape with the dimensions as they lie in memory: the rows of a channels-last convolution are its channels.

    Example:
        >>> in_memory_order(torch.zeros(2, 3).T)
        (2, 3)
    """
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim))
    return tuple(tensor.shape[dim] for dim in order)


def pays(compressor: Compressor, shape: Sequence[int], itemsize: int, world_size: int) -> bool:
    """Whether a tensor is compressed: a large enough matrix, for which clearly fewer bytes are sent than dense.

    Args:
        compressor: with its settings.
        shape: of the tensor as it lies in memory, see :func:`in_memory_order`.
        itemsize: bytes of an element.
        world_size: number of ranks.
    """
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
        shapes: of the trainable parameters, by name, in the order of the model.
        world_size: number of ranks, >= 1.
        dtype: of the gradients.

    Raises:
        ValueError: an argument of a wrong type or out of its range.

    Example:
        >>> from lightning_eff.compression import ArcTopK
        >>> shapes = {"weight": (1000, 1000), "bias": (1000,)}
        >>> predict(ArcTopK(ratio=0.2), shapes, world_size=2)
        Prediction(bytes_sent=820000.0, dense_bytes=4004000.0, compressed=('weight',), dense=('bias',))
    """
    check_instance("compressor", compressor, Compressor, "a Compressor, such as ArcTopK()")
    ok = isinstance(shapes, Mapping) and all(isinstance(name, str) and _is_shape(shapes[name]) for name in shapes)
    check("shapes", shapes, ok, "a dictionary of names and shapes, such as {'weight': (64, 64)}")
    check_count("world_size", world_size)
    check_instance("dtype", dtype, torch.dtype, "a torch.dtype")
    itemsize = torch.empty((), dtype=dtype).element_size()
    units: dict[str, tuple[tuple[str, ...], Sequence[int]]] = {name: ((name,), shapes[name]) for name in shapes}
    if compressor.whole_buckets:
        cap = bucket_cap_mb(itemsize * sum(map(prod, shapes.values())))
        groups = bucket_names(shapes, cap, itemsize)
        units = {names[0]: (tuple(names), (1, sum(prod(shapes[name]) for name in names))) for names in groups}
    compressed: set[str] = set()
    sent = whole = 0.0
    for names, shape in units.values():
        rows, columns = as_matrix(shape)
        dense = all_reduce_bytes(rows * columns * itemsize, world_size)
        chosen = pays(compressor, shape, itemsize, world_size)
        compressed.update(names if chosen else ())
        sent += compressor.bytes_sent(rows, columns, itemsize, world_size) if chosen else dense
        whole += dense
    return Prediction(
        sent,
        whole,
        tuple(name for name in shapes if name in compressed),
        tuple(name for name in shapes if name not in compressed),
    )


def _is_shape(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(is_count(size, 0) for size in value)


def bucket_names(shapes: Mapping[str, Sequence[int]], bucket_mb: float | None, itemsize: int) -> list[list[str]]:
    """Names by bucket, in the order in which DDP reduces them: the last parameters of the model first.

    Args:
        shapes: of the trainable parameters, by name, in the order of the model.
        bucket_mb: DDP's ``bucket_cap_mb``, in MiB; None for its default: 1 for the first bucket, then 25.
        itemsize: bytes of an element.
    """
    buckets: list[list[str]] = [[]]
    size = 0
    for name in reversed(list(shapes)):
        buckets[-1].append(name)
        size += itemsize * prod(shapes[name])
        if size >= 2**20 * (bucket_mb or (1 if len(buckets) == 1 else 25)):
            buckets.append([])
            size = 0
    return [bucket for bucket in buckets if bucket]


def bucket_cap_mb(gradient_bytes: float) -> float:
    """MiB of a bucket: about a dozen buckets, for overlap, of one MiB at least, as ``torch.compile`` asks for.

    Example:
        >>> bucket_cap_mb(24 * 2**20)
        2.0
    """
    return min(25.0, max(1.0, gradient_bytes / 2**20 / 12))
