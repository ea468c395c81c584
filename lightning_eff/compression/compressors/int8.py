"""Int8: blocks of numbers that share a scale, rounded at random."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_eff.arguments import check_count, refuse
from lightning_eff.compression.interface import (
    AllGather,
    AllToAll,
    Bucket,
    Compressor,
    ErrorFeedback,
    Exchange,
    all_to_all_bytes,
)


class Int8(Compressor):
    """Gradients as 8-bit integers on the wire, about a quarter of float32's bytes for any number of ranks.

    A bucket is cut into one part for each rank and these into blocks; a block is sent as integers in [-127, 127] and
    one float32 scale. Every rank collects its part from all others (all-to-all), averages it in float32, and sends
    the mean, rounded again, to all (all-gather). Numbers are rounded up or down at random, so that the mean is
    unbiased. (An all-reduce of the integers would lose a bit for every doubling of the ranks.)

    Args:
        block_size: numbers that share a scale, a multiple of 4; the scale adds 4 / block_size bytes to each.
        start_step: see :class:`Compressor`.
        seed: of the rounding; see :class:`Compressor`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> Int8().bytes_sent(rows=1000, columns=1000, itemsize=4, world_size=2)  # dense: 4,000,000
        1016080.0
    """

    collectives: ClassVar[int] = 2
    schemes: ClassVar[tuple[ErrorFeedback, ...]] = ("none",)
    shows_nonfinite: ClassVar[bool] = True  # in the scale of its block
    whole_buckets: ClassVar[bool] = True

    def __init__(self, block_size: int = 256, start_step: int = 0, seed: int = 0) -> None:
        super().__init__(start_step=start_step, min_numel=0, seed=seed)
        check_count("block_size", block_size, least=4)
        if block_size % 4:
            refuse("block_size", block_size, "a multiple of 4")
        self.block_size = block_size

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        """See :class:`Compressor`; a bucket is padded to whole blocks for each rank."""
        blocks = world_size * self._blocks(rows * columns, world_size)
        return 2 * all_to_all_bytes(blocks * (self.block_size + 4), world_size)

    def exchange(self, bucket: Bucket) -> Exchange:
        """See :class:`Compressor`."""
        (gradient,) = bucket.gradients
        numel = gradient.numel()
        generator = torch.Generator(bucket.device)
        generator.manual_seed((bucket.seed * 0x9E3779B97F4A7C15 + bucket.streams[0] * 65537 + bucket.rank) % 2**63)
        received = yield AllToAll(self._quantise(bucket, generator))
        mean = _unpack(received, self.block_size).mean(0, keepdim=True)
        del received
        gathered = yield AllGather(_pack_(mean, generator).view(-1))
        gradient.copy_(_unpack(gathered, self.block_size).view(-1)[:numel].view_as(gradient))

    def _blocks(self, numel: int, world_size: int) -> int:
        """Blocks of each rank's part of a bucket."""
        return -(-numel // (world_size * self.block_size))

    def _quantise(self, bucket: Bucket, generator: torch.Generator) -> Tensor:
        """uint8 (world size, bytes): this rank's gradients, a row for each rank."""
        (gradient,) = bucket.gradients
        blocks = self._blocks(gradient.numel(), bucket.world_size)
        values = torch.zeros(bucket.world_size, blocks, self.block_size, device=bucket.device)
        values.view(-1)[: gradient.numel()].copy_(gradient.view(-1))
        sent = _pack_(values, generator)
        if bucket.errors is not None:
            own = _unpack(sent, self.block_size).view(-1)[: gradient.numel()]
            bucket.errors[0].copy_(gradient).sub_(own.view_as(gradient))
        return sent


def _pack_(values: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 (parts, bytes) of float32 (parts, blocks, block size), which it overwrites: integers, then scales."""
    scales = torch.linalg.vector_norm(values, torch.inf, dim=-1, keepdim=True).div_(127)
    # A block of zeros has the scale 0; dividing by 1 leaves its zeros.
    values.div_(torch.where(scales == 0, 1, scales))
    values.add_(torch.rand(values.shape, generator=generator, device=values.device))
    integers = values.floor_().clamp_(-127, 127).to(torch.int8)
    parts = len(values)
    return torch.cat([integers.view(parts, -1).view(torch.uint8), scales.view(parts, -1).view(torch.uint8)], dim=1)


def _unpack(packed: Tensor, block_size: int) -> Tensor:
    """float32 (parts, blocks, block size) of :func:`_pack`'s bytes. A scale that is not finite gives NaN."""
    parts, width = packed.shape
    blocks = width // (block_size + 4)
    integers = packed[:, : blocks * block_size].view(torch.int8).view(parts, blocks, block_size)
    scales = packed[:, blocks * block_size :].contiguous().view(torch.float32).view(parts, blocks, 1)
    return integers.to(torch.float32).mul_(scales)
