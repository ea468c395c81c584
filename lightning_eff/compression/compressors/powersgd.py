"""PowerSGD: a low-rank approximation of the averaged gradient by one step of subspace iteration."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_eff.arguments import check_count
from lightning_eff.compression.interface import (
    AllReduce,
    Bucket,
    Compressor,
    ErrorFeedback,
    Exchange,
    all_reduce_bytes,
)
from lightning_eff.kernels.row_sketch import MAX_RANK, signs


class PowerSGD(Compressor):
    """PowerSGD (Vogels, Karimireddy and Jaggi, arXiv 1905.13727): G is sent as P Q', n x r and m x r.

    Q is orthogonalised, P = mean G Q is reduced and orthogonalised, Q = mean G' P is reduced, and P Q' is what the
    optimizer gets. Q is kept for the next step (warm start). It is the mathematics of PyTorch's hook of this name, with
    one collective for all P of a bucket and one for all Q, in an order that gloo takes, too.

    Args:
        rank: r, 1 to 16.
        error_feedback: ``"ef14"``, PowerSGD's own, or ``"none"``.
        start_step: see :class:`Compressor`. PyTorch's default is 1,000.
        min_numel: see :class:`Compressor`.
        seed: of the first Q; see :class:`Compressor`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> PowerSGD(rank=4).bytes_sent(rows=1000, columns=1000, itemsize=4, world_size=2)  # dense: 4,000,000
        32000.0
    """

    collectives: ClassVar[int] = 2
    shows_nonfinite: ClassVar[bool] = True
    schemes: ClassVar[tuple[ErrorFeedback, ...]] = ("none", "ef14")

    def __init__(
        self,
        rank: int = 4,
        error_feedback: ErrorFeedback = "ef14",
        start_step: int = 0,
        min_numel: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(error_feedback, start_step=start_step, min_numel=min_numel, seed=seed)
        check_count("rank", rank, most=MAX_RANK)
        self.rank = rank

    @property
    def keeps_memory(self) -> bool:
        """Q at least."""
        return True

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        """See :class:`Compressor`: P and Q in float32. With a side below r there is no such basis: it goes dense."""
        if min(rows, columns) < self.rank:
            return all_reduce_bytes(itemsize * rows * columns, world_size)
        return all_reduce_bytes(4 * self.rank * (rows + columns), world_size)

    def exchange(self, bucket: Bucket) -> Exchange:
        """See :class:`Compressor`."""
        matrices = range(len(bucket.gradients))
        starts = [self._start(bucket, index) for index in matrices]
        summed = yield AllReduce(torch.cat([bucket.input(index) @ starts[index] for index in matrices]))
        # QR and not Gram-Schmidt: it gives an orthonormal basis of a gradient of zeros as well.
        parts = torch.split(summed, [len(gradient) for gradient in bucket.gradients])
        left = [torch.linalg.qr(part).Q for part in parts]
        del summed, parts
        products = torch.cat([bucket.input(index).T @ left[index] for index in matrices])
        mean = yield AllReduce(products.div_(bucket.world_size))
        right = torch.split(mean, [gradient.shape[1] for gradient in bucket.gradients])
        for index, (gradient, p, q) in enumerate(zip(bucket.gradients, left, right, strict=True)):
            approximation = p @ q.T
            if bucket.errors is not None:
                bucket.keep(index, bucket.input(index).sub_(approximation))
            memory = bucket.memory[index]
            memory["q"] = bucket.if_accepted(q.clone(), memory.get("q", starts[index]))
            gradient.copy_(approximation)

    def _start(self, bucket: Bucket, index: int) -> Tensor:
        columns = bucket.gradients[index].shape[1]
        memory = bucket.memory[index]
        if "q" in memory and memory["q"].shape[1] != self.rank:  # of a checkpoint that had another rank
            del memory["q"]
        q = memory.get("q")
        if q is None:
            q = signs(columns, self.rank, bucket.seed, bucket.streams[index], bucket.device)
        basis: Tensor = torch.linalg.qr(q).Q
        return basis
