"""Sign diversity of alignments, accumulated over batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_eff.arguments import check_count
from lightning_eff.functional.spectral_alignment import majority_fraction, sign_diversity
from lightning_eff.kernels.alignment import MAX_BINS


class SignDiversity(Metric):
    """How alignments spread over both signs: the share of the majority, the sign diversity and the histogram.

    Args:
        bins: of the histogram, equal ones over [-1, 1], from 2 to 252.
        kwargs: what every torchmetrics metric takes.

    Raises:
        ValueError: ``bins`` out of its range.

    ``update`` takes alignments (cosines) of any shape and floating dtype; zeros and values that are not finite belong
    to neither sign. ``compute`` gives ``{"majority": share of the more frequent sign in [0.5, 1], "sign_diversity":
    4 p (1 - p) in [0, 1], "histogram": int64 (bins,) of the finite values}``, over all ranks; both shares are NaN
    before the first value with a sign.

    Example:
        >>> import torch
        >>> from lightning_eff.metrics import SignDiversity
        >>> metric = SignDiversity(bins=4)
        >>> metric.update(torch.tensor([0.9, 0.6, 0.3, -0.2]))
        >>> metric.compute()
        {'majority': tensor(0.7500), 'sign_diversity': tensor(0.7500), 'histogram': tensor([0, 1, 1, 2])}

    Source: Qiu et al., arXiv 2510.04202.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    histogram: Tensor
    positive: Tensor
    negative: Tensor

    def __init__(self, bins: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_count("bins", bins, least=2, most=MAX_BINS)
        self.bins = bins
        self.add_state("histogram", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("positive", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("negative", torch.tensor(0), dist_reduce_fx="sum")

    @override
    def update(self, alignments: Tensor) -> None:
        """Take alignments in."""
        values = alignments.detach().flatten().float()
        finite = values.isfinite()
        places = ((values + 1) * (self.bins / 2)).floor().clamp(0, self.bins - 1)
        places = torch.where(finite, places, self.bins).long()  # what is not finite goes into a bin that is left out
        counts = self.histogram.new_zeros(self.bins + 1).scatter_add_(0, places, torch.ones_like(places))
        self.histogram += counts[: self.bins]
        self.positive += ((values > 0) & finite).sum()
        self.negative += ((values < 0) & finite).sum()

    @override
    def compute(self) -> dict[str, Tensor]:
        """The two shares and the histogram of everything since the last reset."""
        majority = majority_fraction(self.positive, self.negative)
        return {"majority": majority, "sign_diversity": sign_diversity(majority), "histogram": self.histogram}
