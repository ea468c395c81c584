"""Alignment statistics in plain torch: what the kernel is held to."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def alignment_counts(x: Tensor, v: Tensor, bins: int, eps: float) -> Tensor:
    """int64 (bins + 4,): the histogram, then the tokens with a positive, negative, zero and non-finite alignment."""
    values = x.to(torch.float32)
    dots = (values * v).sum(dim=1)
    norms = values.square().sum(dim=1).sqrt()
    alignment = dots / (norms + eps)
    finite = alignment.isfinite() & norms.isfinite()
    places = ((alignment + 1) * (bins / 2)).floor().clamp(0, bins - 1)
    # bincount has no fixed-size, deterministic form on a GPU; a comparison has.
    numbers = torch.arange(bins, device=x.device)
    histogram = ((places[:, None] == numbers) & finite[:, None]).sum(dim=0)
    events = [(dots > 0) & finite, (dots < 0) & finite, (dots == 0) & finite, ~finite]
    return torch.cat([histogram, torch.stack([event.sum() for event in events])])
