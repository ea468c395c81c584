"""Spectral alignment: do all inputs of a layer fall on one side of its weight's leading singular vector?

With v the leading right singular vector of a weight W (out, in), a token's alignment is <x, v> / |x|, x the layer's
input. A healthy layer has both signs; in a representation that collapses one sign takes all (arXiv 2510.04202). The
paper's exact rule is not public: the detection by arming, with its thresholds, is this package's own.

In a plain torch loop, each observation of a layer::

    pair = leading_singular_pair(weight, v)                     # one step of power iteration from the last v
    counts = alignment_stats(x, pair.v)                         # lightning_eff.kernels.alignment
    majority = majority_fraction(counts.positive, counts.negative)
    collapsed = collapse_update(majority[None], pair.residual[None] < 0.3, state)

Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_eff.arguments import check_count, check_number

__all__ = [
    "CollapseConfig",
    "CollapseState",
    "SingularPair",
    "alignment",
    "collapse_update",
    "collapsed_share",
    "leading_singular_pair",
    "majority_fraction",
    "sign_diversity",
    "why_unarmed",
]


_MOST_ITERATIONS = 1_000_000


class SingularPair(NamedTuple):
    """A leading singular value with its vectors, as far as they are known; float32 (float64 for a float64 weight).

    Attributes:
        sigma: 0-d, a lower bound of the leading singular value that rises to it.
        u: (out,), length 1.
        v: (in,), length 1; its product with the vector that the iteration began with is not negative.
        residual: 0-d, |W^T u - s v| / s of the vector that the last iteration began with: 0 for a singular vector.
            It says that v belongs to *a* singular value; that it is the largest one, any start makes almost sure.
            Infinite where there is nothing to find: a weight of zeros, or one with a NaN.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor
    residual: Tensor


@torch.no_grad()
def leading_singular_pair(weight: Tensor, v: Tensor, iterations: int = 1) -> SingularPair:
    """Power iteration on W^T W, from a vector that is kept between calls.

    A start from a random vector needs hundreds of iterations where the spectrum has no gap. Weights change little from
    step to step, so one iteration from the last vector keeps up with them; ``residual`` says whether it does.

    Args:
        weight: (out, in), floating. Two products with it are taken in its own dtype for each iteration; no copy is
            made of it.
        v: (in,), the vector to begin with, of any length but 0.
        iterations: from 1 to 1,000,000.

    Raises:
        ValueError: shapes that do not fit, or ``iterations`` out of its range.

    Example:
        >>> pair = leading_singular_pair(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.ones(2), iterations=8)
        >>> round(pair.sigma.item(), 4), [round(x, 4) for x in pair.v.tolist()]
        (3.0, [1.0, 0.0])
    """
    if weight.ndim != 2 or v.shape != weight.shape[1:]:
        raise ValueError(f"weight of shape {tuple(weight.shape)} and v of shape {tuple(v.shape)} are not 2-d and (in,)")
    check_count("iterations", iterations, most=_MOST_ITERATIONS)
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    v = _unit(v.to(exact), v)
    for _ in range(iterations):
        forward = (weight @ v.to(weight.dtype)).to(exact)
        length = torch.linalg.vector_norm(forward)
        u = _unit(forward, forward)
        back = (weight.T @ u.to(weight.dtype)).to(exact)  # of u, not of `forward`: float16 would overflow
        sigma = torch.linalg.vector_norm(back)
        residual = torch.linalg.vector_norm(back - length * v) / length
        v = _unit(back, v)
    return SingularPair(sigma, u, v, torch.where(residual.isfinite(), residual, math.inf))


def _unit(vector: Tensor, otherwise: Tensor) -> Tensor:
    """The vector with length 1; the other one in place of a vector of zeros or one that is not finite."""
    length = torch.linalg.vector_norm(vector)
    usable = (length > 0) & length.isfinite()
    return torch.where(usable, vector / length, otherwise.to(vector))


@torch.no_grad()
def alignment(x: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """Cosine of each token with a direction: <x, v> / (|x| + eps), float32.

    Args:
        x: (..., in), any floating dtype.
        v: (in,), of length 1.
        eps: added to the norm, > 0.

    Returns:
        (...), in [-1, 1]; 0 for a token of zeros.

    Example:
        >>> alignment(torch.tensor([[3.0, 4.0], [0.0, -2.0]]), torch.tensor([1.0, 0.0])).tolist()
        [0.599..., 0.0]
    """
    check_number("eps", eps, above=0)
    x = x.float()
    cosine: Tensor = (x @ v.float()) / (torch.linalg.vector_norm(x, dim=-1) + eps)
    return cosine


def majority_fraction(positive: Tensor, negative: Tensor) -> Tensor:
    """Share of the more frequent sign, in [0.5, 1]; NaN where no token has one.

    Args:
        positive: number of tokens with a positive alignment, any shape.
        negative: with a negative one. Which sign is which is arbitrary, so the result does not depend on it.

    Example:
        >>> majority_fraction(torch.tensor([50, 1]), torch.tensor([50, 3]))
        tensor([0.5000, 0.7500])
    """
    return torch.maximum(positive, negative) / (positive + negative)


def sign_diversity(majority: Tensor) -> Tensor:
    """4 p (1 - p) of the share p of one sign: 1 for as many of both, 0 when all are on one side.

    Args:
        majority: shares, in [0, 1], of any shape.

    Example:
        >>> sign_diversity(torch.tensor([0.5, 0.9, 1.0]))
        tensor([1.0000, 0.3600, 0.0000])
    """
    return 4 * majority * (1 - majority)


@dataclass(frozen=True)
class CollapseConfig:
    """When a layer counts as collapsed. The rule and its defaults are this package's, not the paper's.

    Healthy runs begin collapsed, and some layers stay so. So a layer is *armed* once it has been diverse: once the
    median of its majority fraction over ``look_back`` observations has been at most ``threshold - hysteresis``. An
    armed layer has *collapsed* when its majority has been at least ``threshold`` for ``patience`` observations in a
    row.

    Args:
        threshold: majority fraction from which on a layer counts as collapsed, in (0.5, 1].
        hysteresis: how far below that a layer has to have been, >= 0, with ``threshold - hysteresis`` above 0.5.
        patience: observations in a row, >= 1.
        look_back: observations that the median is taken over, >= 1.

    Raises:
        ValueError: an argument out of its range.
    """

    threshold: float = 0.99
    hysteresis: float = 0.25
    patience: int = 3
    look_back: int = 16

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, above=0.5, most=1)
        check_number("hysteresis", self.hysteresis, least=0, below=self.threshold - 0.5)
        check_count("patience", self.patience)
        check_count("look_back", self.look_back)


@dataclass
class CollapseState:
    """What is remembered of each of some layers, on the device of the observations.

    Attributes:
        config: the rule.
        history: (look_back, layers), the last majorities that could be trusted; NaN: none yet.
        observations: (layers,), how many there were.
        lowest: (layers,), the lowest median over ``look_back`` observations so far; infinite before there is one.
        streak: (layers,), observations in a row at or above the threshold, up to the last one.
    """

    config: CollapseConfig
    history: Tensor
    observations: Tensor
    lowest: Tensor
    streak: Tensor

    @classmethod
    def of(cls, layers: int, config: CollapseConfig) -> CollapseState:
        """A state that has seen nothing."""
        counts = torch.zeros(layers, dtype=torch.int64)
        lowest = torch.full((layers,), math.inf)
        return cls(config, torch.full((config.look_back, layers), math.nan), counts, lowest, counts.clone())

    @property
    def armed(self) -> Tensor:
        """(layers,), bool: those that have been diverse."""
        return self.lowest <= self.config.threshold - self.config.hysteresis

    @property
    def collapsed(self) -> Tensor:
        """(layers,), bool: armed ones that have lastingly lost their diversity."""
        return self.armed & (self.streak >= self.config.patience)

    def take(self, places: list[int], other: CollapseState, others: list[int]) -> None:
        """Take over what another state of the same rule knows of some layers, by their places there and here."""
        for name in _TENSORS:
            getattr(self, name)[..., places] = getattr(other, name).to(self.history.device)[..., others]

    def to(self, device: torch.device) -> CollapseState:
        """Move to ``device`` in place."""
        if self.history.device != device:
            for name in _TENSORS:
                setattr(self, name, getattr(self, name).to(device))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to carry on exactly. Updates make new tensors, so these stay as they are."""
        return {name: getattr(self, name) for name in _TENSORS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a ``state_dict`` of as many layers; with another ``look_back`` the medians are taken anew.

        Which layers are armed follows from the lowest medians, so another threshold or hysteresis judges them anew.
        """
        for name in _TENSORS:
            saved, mine = state_dict[name], getattr(self, name)
            if saved.shape == mine.shape:
                setattr(self, name, saved.to(mine))
        if state_dict["history"].shape != self.history.shape:
            self.observations = torch.zeros_like(self.observations)


_TENSORS = ("history", "observations", "lowest", "streak")


@torch.no_grad()
def collapse_update(majority: Tensor, trusted: Tensor, state: CollapseState) -> Tensor:
    """Take one observation of every layer into the state.

    Args:
        majority: (layers,), majority fractions; NaN for a layer without an observation.
        trusted: (layers,), bool: whether the singular vector has converged. What is not trusted changes nothing.
        state: changed in place; moved to the device of ``majority``.

    Returns:
        (layers,), bool: the layers that are collapsed now, by an observation that is trusted.

    Example:
        >>> state = CollapseState.of(2, CollapseConfig(look_back=2, patience=1))
        >>> for majority in ([0.6, 0.6], [0.6, 0.6], [0.6, 1.0]):
        ...     collapsed = collapse_update(torch.tensor(majority), torch.tensor([True, True]), state)
        >>> collapsed
        tensor([False,  True])
    """
    state.to(majority.device)
    majority = majority.to(state.history.dtype)
    trusted = trusted & majority.isfinite()
    # The oldest goes out, the newest comes in; a ring would need a place of its own for each layer.
    moved = torch.cat([state.history[1:], majority[None]])
    state.history = torch.where(trusted, moved, state.history)
    state.observations = state.observations + trusted
    full = trusted & (state.observations >= state.config.look_back)
    median = state.history.sort(dim=0).values[(state.config.look_back - 1) // 2]
    state.lowest = torch.where(full, torch.minimum(state.lowest, median), state.lowest)
    high = majority >= state.config.threshold
    state.streak = torch.where(trusted, torch.where(high, state.streak + 1, 0), state.streak)
    return state.collapsed & trusted


LEAST_ARMED = 3
"""Layers, without which nothing is said: one or two of many tell little about the model."""


def collapsed_share(collapsed: Tensor, state: CollapseState) -> Tensor:
    """Share of all watched layers that are collapsed; 0 while fewer than three are armed, or not all of fewer.

    Args:
        collapsed: (layers,), bool, from :func:`collapse_update`.
        state: of the same layers.

    Returns:
        0-d, in [0, 1].

    Example:
        >>> state = CollapseState.of(4, CollapseConfig())
        >>> collapsed_share(torch.tensor([True, False, False, False]), state)  # none is armed
        tensor(0.)
    """
    layers = len(collapsed)
    enough = state.armed.sum() >= min(LEAST_ARMED, layers)
    return collapsed.sum() / max(1, layers) * enough


def why_unarmed(state: CollapseState) -> str:
    """Why no layer of a state has ever been armed, in words. Waits for the device.

    Args:
        state: one of which ``armed`` is False everywhere.

    Example:
        >>> why_unarmed(CollapseState.of(1, CollapseConfig(look_back=5)))
        'there were 0 observations, fewer than look_back=5'
    """
    config, most = state.config, int(state.observations.max())
    if most < config.look_back:
        return f"there were {most} observations, fewer than look_back={config.look_back}"
    return (
        f"the most diverse one had a median of {float(state.lowest.min()):.4g} of its inputs on one side, and at most "
        f"threshold - hysteresis = {config.threshold - config.hysteresis:.4g} arms a layer. Layers fed by ReLU or GELU "
        "without a norm stay there in healthy runs: watch others with include, or lower hysteresis"
    )
