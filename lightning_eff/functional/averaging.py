"""Averages of checkpoints: the weights of every scheme, and the merge in float64.

Each scheme is a function from the steps of the checkpoints (oldest first), or their losses, to weights that sum to 1::

    weights = wsm_weights(steps=[1000, 2000, 3000, 4000], decay="1-sqrt")
    merged = weighted_average((checkpoint["layer.weight"] for checkpoint in checkpoints), weights)

| scheme | weights | source |
| --- | --- | --- |
| uniform | 1 / n | LAWA (arXiv 2209.14981), PMA's SMA (arXiv 2505.12082) |
| linear | i, normalised | PMA's WMA |
| exponential | the recursion m_i = alpha x_i + (1 - alpha) m_(i-1), m_1 = x_1 | PMA's EMA |
| wsm | those that give a decay of the learning rate in hindsight | WSM (arXiv 2507.17634), theorem 3.1 |
| loss, step | loss^-penalty, step^penalty, normalised | ours |

Averages that are kept at every step, and their reconstruction at another width, are in ``functional.ema``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eff.arguments import (
    are_numbers,
    check,
    check_choice,
    check_instance,
    check_number,
    check_numbers,
    refuse,
)
from lightning_eff.functional.gradients import statistics_dtype

Scheme = Literal["uniform", "linear", "exponential", "wsm", "loss", "step"]
Curve = Literal["linear", "cosine", "1-sqrt"]
Decay = Curve | Callable[[float], float]

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
"""Learning rate over a decay, as a fraction of the peak: from 1 at x = 0 to 0 at x = 1."""

_CHUNK = 1 << 17  # elements that are held in float64 beside the sum: 1 MiB, which stays in a core's cache


def uniform_weights(steps: Sequence[float]) -> list[float]:
    """The same weight for each: LAWA's average, and PMA's SMA.

    Args:
        steps: steps of the checkpoints, oldest first.

    Example:
        >>> uniform_weights([100, 200, 300, 400])
        [0.25, 0.25, 0.25, 0.25]
    """
    _check_steps(steps)
    return [1 / len(steps)] * len(steps)


def linear_weights(steps: Sequence[float]) -> list[float]:
    """PMA's WMA: weights 1, 2, ..., n over n (n + 1) / 2, by the order of the checkpoints and not by their distance.

    Args:
        steps: steps of the checkpoints, oldest first.

    Example:
        >>> linear_weights([100, 200, 300, 400])
        [0.1, 0.2, 0.3, 0.4]
    """
    _check_steps(steps)
    return _normalised([float(i) for i in range(1, len(steps) + 1)])


def exponential_weights(steps: Sequence[float], alpha: float = 0.2) -> list[float]:
    """PMA's EMA by its recursion, m_i = alpha x_i + (1 - alpha) m_(i-1) from m_1 = x_1.

    The oldest has (1 - alpha)^(n - 1), the i-th alpha (1 - alpha)^(n - i). (The closed form that the paper prints gives
    the oldest a factor alpha as well, and its weights do not sum to 1.)

    Args:
        steps: steps of the checkpoints, oldest first; only their number matters.
        alpha: weight of a new checkpoint, in (0, 1].

    Raises:
        ValueError: ``alpha`` is out of its range, or the steps do not rise.

    Example:
        >>> exponential_weights([100, 200, 300], alpha=0.5)
        [0.25, 0.25, 0.5]
    """
    _check_steps(steps)
    check_number("alpha", alpha, above=0, most=1)
    n = len(steps)
    return [(1 - alpha) ** (n - 1), *(alpha * (1 - alpha) ** (n - i) for i in range(2, n + 1))]


def wsm_weights(steps: Sequence[float], decay: Decay = "1-sqrt") -> list[float]:
    """Weights that decay the learning rate in hindsight, over the stretch that the checkpoints cover.

    The update that leads to the i-th checkpoint after the first, i = 1..k, is to count ``decay(i / (k + 1))`` times;
    with uneven steps, i is k times the fraction of the way in steps. :func:`weights_from_decay` turns that into
    weights. ``"linear"`` is the uniform average, exactly; **"1-sqrt" puts most weight on the oldest**, as the theorem
    has it. (The grid is ours: where the paper samples its curve is not known.)

    It is an identity on the trajectory that was run, and no run with a decayed rate: its gradients would differ.

    Args:
        steps: steps of the checkpoints, oldest first.
        decay: ``"linear"``, ``"cosine"``, ``"1-sqrt"``, or a function from [0, 1] that does not rise and stays
            within [0, 1]: the learning rate as a fraction of its peak.

    Raises:
        ValueError: the curve has no such name, rises or leaves [0, 1], or the steps do not rise.

    Source: WSM (arXiv 2507.17634), theorem 3.1.

    Example:
        >>> [round(weight, 4) for weight in wsm_weights([100, 200, 300, 400], "1-sqrt")]
        [0.5, 0.2071, 0.1589, 0.134]
    """
    _check_steps(steps)
    _check_decay(decay)
    curve = CURVES[decay] if isinstance(decay, str) else decay
    k = len(steps) - 1
    if k == 0:
        return [1.0]
    scale = k / (k + 1) / (steps[-1] - steps[0])
    return weights_from_decay([float(curve((step - steps[0]) * scale)) for step in steps[1:]])


def weights_from_decay(factors: Sequence[float]) -> list[float]:
    """Weights of k + 1 checkpoints with which the i-th of the k updates between them counts ``factors[i - 1]`` times.

    c_k = w_k, c_j = w_j - w_(j+1), c_0 = 1 - w_1: the inverse of :func:`decay_from_weights`.

    Args:
        factors: numbers of shape (k,), 1 >= w_1 >= ... >= w_k >= 0, oldest update first.

    Returns:
        Weights of shape (k + 1,), oldest checkpoint first; none is negative and they sum to 1.

    Raises:
        ValueError: a factor rises, or leaves [0, 1].

    Example:
        >>> weights_from_decay([0.75, 0.5, 0.25])
        [0.25, 0.25, 0.25, 0.25]
    """
    falling = are_numbers(factors) and all(a >= b for a, b in pairwise([1.0, *factors, 0.0]))
    check("factors", factors, falling, "a list of decay factors that fall within [0, 1] and never rise")
    return [a - b for a, b in pairwise([1.0, *factors, 0.0])]


def decay_from_weights(weights: Sequence[float]) -> list[float]:
    """How often each update between the checkpoints counts in their average: w_i = c_i + ... + c_k.

    Args:
        weights: of k + 1 checkpoints, oldest first, summing to 1.

    Returns:
        k factors, of the oldest update first.

    Example:
        >>> decay_from_weights([0.25, 0.25, 0.25, 0.25])
        [0.75, 0.5, 0.25]
    """
    check_numbers("weights", weights)
    return [math.fsum(weights[i:]) for i in range(1, len(weights))]


def loss_weights(losses: Sequence[float], penalty: float = 1.0) -> list[float]:
    """loss^-penalty, normalised: the lower the loss, the more weight. A penalty of 0 is the uniform average.

    This is our own form. Metric-weighted averaging (arXiv 2504.18580) also weighs by training loss with a "penalty
    factor", but its exact formula is not known to us, and this is not claimed to be it.

    Args:
        losses: positive losses, in the order of the checkpoints.
        penalty: how much the loss matters, >= 0.

    Raises:
        ValueError: a loss is not positive and finite, or the penalty is negative.

    Example:
        >>> [round(weight, 4) for weight in loss_weights([2.0, 1.0, 1.0], penalty=1.0)]
        [0.2, 0.4, 0.4]
    """
    check_numbers("losses", losses, above=0)
    check_number("penalty", penalty, least=0)
    smallest = min(losses)  # only ratios count, and they do not overflow
    return _normalised([(loss / smallest) ** -penalty for loss in losses])


def step_weights(steps: Sequence[float], penalty: float = 1.0) -> list[float]:
    """step^penalty, normalised: the later, the more weight. A penalty of 0 is the uniform average.

    Ours, as :func:`loss_weights`. With a penalty of gamma it is also the power-function profile of EDM2
    (arXiv 2312.02696), sampled at the checkpoints: ``step_weights(steps, power_from_width(0.1))``.

    Args:
        steps: positive steps of the checkpoints, oldest first.
        penalty: how much the step matters, >= 0.

    Raises:
        ValueError: a step is not positive, the steps do not rise, or the penalty is negative.

    Example:
        >>> step_weights([100, 300], penalty=1.0)
        [0.25, 0.75]
    """
    check_numbers("steps", steps, above=0)
    _check_steps(steps)
    check_number("penalty", penalty, least=0)
    return _normalised([(step / steps[-1]) ** penalty for step in steps])


def scheme_weights(
    scheme: Scheme,
    steps: Sequence[float],
    *,
    losses: Sequence[float] | None = None,
    alpha: float = 0.2,
    decay: Decay = "1-sqrt",
    penalty: float = 1.0,
) -> list[float]:
    """The weights of a scheme by its name; arguments of the other schemes have no effect, but are checked too.

    Args:
        scheme: ``"uniform"``, ``"linear"``, ``"exponential"``, ``"wsm"``, ``"loss"`` or ``"step"``.
        steps: steps of the checkpoints, oldest first.
        losses: the loss of each, for ``"loss"``.
        alpha: weight of a new checkpoint, for ``"exponential"``.
        decay: the curve, for ``"wsm"``.
        penalty: for ``"loss"`` and ``"step"``.

    Raises:
        ValueError: no such scheme, or an argument that it does not allow.

    Example:
        >>> scheme_weights("linear", [100, 200, 300, 400])
        [0.1, 0.2, 0.3, 0.4]
    """
    check_choice("scheme", scheme, Scheme)
    _check_steps(steps)
    if losses is not None:
        check_numbers("losses", losses)
    check_number("alpha", alpha, above=0, most=1)
    _check_decay(decay)
    check_number("penalty", penalty, least=0)
    if scheme == "uniform":
        return uniform_weights(steps)
    if scheme == "linear":
        return linear_weights(steps)
    if scheme == "exponential":
        return exponential_weights(steps, alpha)
    if scheme == "wsm":
        return wsm_weights(steps, decay)
    if scheme == "step":
        return step_weights(steps, penalty)
    if losses is None or len(losses) != len(steps):
        found = "none" if losses is None else f"{len(losses)} of them"
        raise ValueError(f"losses: scheme 'loss' needs one for each of the {len(steps)} checkpoints, found {found}")
    return loss_weights(losses, penalty)


def weighted_average(tensors: Iterable[Tensor], weights: Sequence[float], dtype: torch.dtype | None = None) -> Tensor:
    """sum_i weights[i] tensors[i], summed in float64 and rounded once.

    The tensors are taken one by one: a generator that reads them from files holds one at a time. Beside it are the
    float64 sum and a piece of 1 MiB.

    Args:
        tensors: floating-point or complex tensors of one shape, as many as weights.
        weights: their factors; any numbers, used as they are.
        dtype: of the result; by default that of the first tensor.

    Returns:
        A new contiguous tensor on the device of the first.

    Raises:
        ValueError: no tensor, not one for each weight, another shape, or a dtype that cannot be averaged.

    Example:
        >>> weighted_average([torch.zeros(2), torch.ones(2)], [0.25, 0.75])
        tensor([0.7500, 0.7500])
    """
    check_numbers("weights", weights)
    check_instance("dtype", dtype, torch.dtype, "a torch.dtype", optional=True)
    total: Tensor | None = None
    flat = torch.empty(0)
    shape = torch.Size()
    count = 0
    for tensor in tensors:
        if count == len(weights):
            raise ValueError(f"weights: there are more tensors than the {len(weights)} weights")
        tensor = tensor.detach()
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"tensors: one of {tensor.dtype} cannot be averaged; copy it from one checkpoint")
        if total is None:
            shape, dtype = tensor.shape, dtype or tensor.dtype
            wide = torch.complex128 if tensor.is_complex() else statistics_dtype(tensor.device)
            total = torch.zeros(shape, dtype=wide, device=tensor.device)
            flat = total.view(-1)
        if tensor.shape != shape:
            raise ValueError(f"tensors: shapes {tuple(shape)} and {tuple(tensor.shape)} differ")
        values = tensor.reshape(-1)
        for start in range(0, len(flat), _CHUNK):
            piece = slice(start, start + _CHUNK)
            flat[piece].add_(values[piece].to(flat), alpha=weights[count])
        count += 1
    if total is None or count != len(weights):
        raise ValueError(f"weights: {len(weights)} weights for {count} tensors")
    return total.to(dtype)


def _normalised(values: Sequence[float]) -> list[float]:
    total = math.fsum(values)
    return [value / total for value in values]


def _check_steps(steps: Any) -> None:
    check_numbers("steps", steps)
    if not all(a < b for a, b in pairwise(steps)):
        refuse("steps", list(steps), "the steps of the checkpoints, oldest first, none twice")


def _check_decay(decay: Any) -> None:
    ok = callable(decay) or (isinstance(decay, str) and decay in CURVES)
    check("decay", decay, ok, f"one of {tuple(CURVES)} or a function of [0, 1]")
