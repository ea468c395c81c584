"""ARC-Top-K: a small shared sketch picks the same rows on every rank, and only these are reduced."""

from __future__ import annotations

from typing import ClassVar

from lightning_eff.arguments import check_count, check_number
from lightning_eff.compression.interface import (
    AllReduce,
    Bucket,
    Compressor,
    ErrorFeedback,
    Exchange,
    all_reduce_bytes,
    kept_count,
)
from lightning_eff.kernels.row_pack import pack_rows, row_scores, scatter_rows_, select_rows
from lightning_eff.kernels.row_sketch import MAX_RANK, row_sketch


class ArcTopK(Compressor):
    """ARC-Top-K (Chen et al., arXiv 2510.26709): the rows that matter on average over the ranks, by an all-reduce.

    With G the gradient of a matrix, n x m, and V a random m x r matrix of signs, equal on all ranks and new in every
    step: the sketches G V are summed over the ranks (n r numbers), the K = max(1, int(ratio n)) rows of the sum with
    the largest norms are selected, and these rows of G are averaged over the ranks (K m numbers). All ranks have the
    same sum, so no indices are sent. Of a convolution the rows are its output channels.

    Args:
        ratio: fraction of the rows that is sent, in (0, 1].
        rank: r, width of the sketch, 1 to 16.
        error_feedback: see :class:`Compressor`.
        eta: see :class:`Compressor`.
        start_step: see :class:`Compressor`.
        initial_ratio: the ratio falls linearly from here to ``ratio`` in the first ``ratio_steps`` steps after
            ``start_step``; None for a constant ratio.
        ratio_steps: see ``initial_ratio``.
        min_numel: see :class:`Compressor`.
        seed: see :class:`Compressor`.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> ArcTopK(ratio=0.2).bytes_sent(rows=1000, columns=1000, itemsize=4, world_size=2)  # dense: 4,000,000
        816000.0
    """

    collectives: ClassVar[int] = 2
    shows_nonfinite: ClassVar[bool] = True

    def __init__(
        self,
        ratio: float = 0.2,
        rank: int = 4,
        error_feedback: ErrorFeedback = "none",
        eta: float = 0.1,
        start_step: int = 0,
        initial_ratio: float | None = None,
        ratio_steps: int = 100,
        min_numel: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__(error_feedback, eta, start_step, min_numel, seed)
        check_number("ratio", ratio, above=0, most=1)
        check_count("rank", rank, most=MAX_RANK)
        check_number("initial_ratio", initial_ratio, above=0, most=1, optional=True)
        check_count("ratio_steps", ratio_steps)
        self.ratio = ratio
        self.rank = rank
        self.initial_ratio = initial_ratio
        self.ratio_steps = ratio_steps

    def ratio_at(self, step: int) -> float:
        """The ratio of a step, counted from the start of the run."""
        if self.initial_ratio is None:
            return self.ratio
        done = min(1.0, max(0, step - self.start_step) / self.ratio_steps)
        return self.initial_ratio + (self.ratio - self.initial_ratio) * done

    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        """See :class:`Compressor`: the sketch in float32 and the selected rows."""
        payload = 4 * rows * self.rank + itemsize * kept_count(rows, self.ratio) * columns
        return all_reduce_bytes(payload, world_size)

    def exchange(self, bucket: Bucket) -> Exchange:
        """See :class:`Compressor`."""
        matrices, errors = bucket.gradients, bucket.errors
        rows = [matrix.shape[0] for matrix in matrices]
        ratio = self.ratio_at(bucket.step)
        counts = [kept_count(n, ratio) for n in rows]
        sketch = yield AllReduce(row_sketch(matrices, self.rank, bucket.seed, bucket.streams, errors))
        selected = select_rows(row_scores(sketch), rows, counts)
        del sketch
        if bucket.device.type == "cpu":
            bucket.agreed = selected  # scores are sums, which unlike CPUs may round differently
        values = yield AllReduce(pack_rows(matrices, selected, counts, bucket.world_size, errors))
        scatter_rows_(matrices, values, selected, counts, errors, bucket.accepted)
