"""Ways to clip that ZClip is compared with, written from their papers' formulas.

A clip is called once a step with the norm of all gradients of one model, its weights and its gradients by name, and
returns what the gradients are to be multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_eff.functional.zclip import ZClipConfig, ZClipState, zclip_update

Clip = Callable[[Tensor, dict[str, Tensor], dict[str, Tensor]], Tensor | float]


class Fixed:
    """The clip of ``torch.nn.utils.clip_grad_norm_`` at a fixed norm; infinity clips nothing."""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __call__(self, norm: Tensor, *_: object) -> Tensor | float:
        return (self.limit / (norm + 1e-6)).clamp(max=1.0) if math.isfinite(self.limit) else 1.0


class AutoClip:
    """At a percentile of all norms so far; the tenth in Seetharaman et al., arXiv 2007.14469."""

    def __init__(self, percentile: float = 10.0) -> None:
        self.percentile, self.norms = percentile, []

    def __call__(self, norm: Tensor, *_: object) -> Tensor | float:
        self.norms.append(norm)
        limit = torch.quantile(torch.stack(self.norms), self.percentile / 100)
        return (limit / (norm + 1e-6)).clamp(max=1.0)


class AGC:
    """Adaptive clipping of Brock et al., arXiv 2102.06171, equation 3: each unit by its own weights.

    A unit's gradient is at most ``factor`` times the norm of its weights, which count ``eps`` at least. A unit is a row
    of a weight, or the whole of a gain or bias; the last layer is left alone, as in the paper.
    """

    def __init__(self, factor: float = 0.01, eps: float = 1e-3) -> None:
        self.factor, self.eps = factor, eps

    def __call__(self, norm: Tensor, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> float:
        last = list(gradients)[-1].rpartition(".")[0]
        for name, gradient in gradients.items():
            if name.rpartition(".")[0] == last:
                continue
            rows = (lambda x: x.flatten(1)) if gradient.ndim > 1 else (lambda x: x[None])
            allowed = self.factor * rows(weights[name]).norm(dim=1).clamp(min=self.eps)
            scale = (allowed / rows(gradient).norm(dim=1)).clamp(max=1.0)  # of a gradient of 0: infinity, then 1
            rows(gradient).mul_(scale[:, None])
        return 1.0


class Z:
    """ZClip, with its default arguments where none are given, by the very function that the callback calls."""

    def __init__(self, **arguments: Any) -> None:
        self.state = ZClipState(ZClipConfig(**arguments))

    def __call__(self, norm: Tensor, *_: object) -> Tensor:
        return zclip_update(norm, self.state).float()
