"""Exponential and power-function averages of weights that are kept while training, and what is made of them afterwards.

In a plain torch loop::

    shadow = float32_copies(model.parameters())                              # once
    ...
    optimizer.step()
    ema_update_(shadow, model.parameters(), warmup_decay(step, decay=0.999))  # each step, from step 1

A power-function average weighs step t by t^gamma: its width stays the same fraction of the run (``sigma_rel``), however
long that is. From snapshots of two of them, an average of any other width can be made after the run
(:func:`posthoc_weights`). Source: Karras et al., arXiv 2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_eff.arguments import check, check_count, check_number, check_numbers

_SMALL = 1 << 12  # elements of a tensor whose operator costs more than its arithmetic

_GROUP = 1 << 24  # elements that are cast at a time: 64 MB in float32, large enough to hide the launches

MAX_WIDTH = 1 / math.sqrt(12)
"""Upper bound of ``sigma_rel``: that of the uniform average over the whole run, gamma = 0."""


def float32_copies(tensors: Iterable[Tensor], device: torch.device | str | None = None) -> list[Tensor]:
    """Shadows to average into: float32 (float64 for float64), real copies, without gradient.

    In bfloat16 an average with a decay of 0.99 or more does not move at all: a change is smaller than half a digit.

    Args:
        tensors: floating-point tensors, e.g. parameters.
        device: where the copies are kept; by default each where its tensor is.

    Raises:
        ValueError: ``device`` names none.

    Example:
        >>> float32_copies([torch.ones(2, dtype=torch.bfloat16)])
        [tensor([1., 1.])]
    """
    _check_device(device)
    return [
        tensor.detach().to(device or tensor.device, torch.promote_types(tensor.dtype, torch.float32), copy=True)
        for tensor in tensors
    ]


@torch.no_grad()
def ema_update_(shadows: Sequence[Tensor], tensors: Iterable[Tensor], decay: float) -> None:
    """shadow <- decay * shadow + (1 - decay) * tensor, in place; one ``_foreach`` call where the dtypes are equal.

    Args:
        shadows: of :func:`float32_copies`.
        tensors: the weights now, with the shapes of the shadows; bfloat16 and float16 too. Those of another dtype or
            device than theirs are cast or copied in groups of up to 64 MB.
        decay: weight of the past, in [0, 1]; 0 copies.

    Raises:
        ValueError: ``decay`` is out of its range.

    Example:
        >>> shadow = [torch.zeros(2)]
        >>> ema_update_(shadow, [torch.ones(2)], decay=0.75)
        >>> shadow
        [tensor([0.2500, 0.2500])]
    """
    check_number("decay", decay, least=0, most=1)
    shadows, tensors = list(shadows), list(tensors)
    if not shadows:
        return
    pairs = zip(shadows, tensors, strict=True)
    if len(shadows) == len(tensors) and all((s.dtype, s.device) == (t.dtype, t.device) for s, t in pairs):
        torch._foreach_lerp_(shadows, tensors, 1 - decay)
        return
    # lerp takes one dtype. Cast beside the shadows, since the difference is what must not be rounded to bfloat16.
    for group in _groups(shadows, tensors):
        wide = [tensor.to(shadow.device).to(shadow.dtype) for shadow, tensor in group]
        torch._foreach_lerp_([shadow for shadow, _ in group], wide, 1 - decay)


def _groups(shadows: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Pairs of up to ``_GROUP`` elements together: what is cast at a time, and not all weights at once."""
    group: list[tuple[Tensor, Tensor]] = []
    size = 0
    for shadow, tensor in zip(shadows, tensors, strict=True):
        pairs = [(shadow, tensor)]
        if tensor.numel() > _GROUP:
            rows = max(1, _GROUP * len(tensor) // tensor.numel())
            pairs = list(zip(torch.split(shadow, rows), torch.split(tensor, rows), strict=True))
        for pair in pairs:
            if group and size + pair[1].numel() > _GROUP:
                yield group
                group, size = [], 0
            group.append(pair)
            size += pair[1].numel()
    if group:
        yield group


class Shadows:
    """Shadows of many tensors, of which small ones of one form lie in one piece.

    A thousand small tensors are so averaged by a few operators in place of a thousand.

    Args:
        tensors: as of :func:`float32_copies`.
        device: where the shadows are kept; by default each where its tensor is.

    Example:
        >>> weights = [torch.zeros(2, 3), torch.zeros(4, 3)]
        >>> shadows = Shadows(weights)
        >>> shadows.update(shadows.sort([weight + 1 for weight in weights]), decay=0.75)
        >>> [shadow.mean().item() for shadow in shadows.tensors]
        [0.25, 0.25]
    """

    def __init__(self, tensors: Iterable[Tensor], device: torch.device | str | None = None) -> None:
        self.tensors = float32_copies(tensors, device)
        """One for each tensor, in their order."""
        forms: dict[Any, list[int]] = {}
        for index, shadow in enumerate(self.tensors):
            if shadow.dim() > 0 and shadow.numel() <= _SMALL:
                forms.setdefault((shadow.device, shadow.dtype, shadow.shape[1:]), []).append(index)
        self._pieces: list[tuple[list[int], Tensor]] = []
        for indices in forms.values():
            if len(indices) > 1:
                parts = [self.tensors[index] for index in indices]
                piece = torch.cat(parts)
                self._pieces.append((indices, piece))
                for index, view in zip(indices, torch.split(piece, [len(part) for part in parts]), strict=True):
                    self.tensors[index] = view
        self._together = {index for indices, _ in self._pieces for index in indices}
        self._alone = [shadow for index, shadow in enumerate(self.tensors) if index not in self._together]

    def append(self, tensor: Tensor, device: torch.device | str | None = None) -> None:
        """Shadow one more."""
        copies = float32_copies([tensor], device)
        self.tensors += copies
        self._alone += copies

    def sort(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """The tensors as ``update`` takes them, to be kept from step to step; those beside the pieces come last."""
        alone = [tensor for index, tensor in enumerate(tensors) if index not in self._together]
        return [*([tensors[index] for index in indices] for indices, _ in self._pieces), alone]

    @torch.no_grad()
    def update(self, tensors: Sequence[list[Tensor]], decay: float) -> None:
        """What :func:`ema_update_` does, for tensors from ``sort``; they may be on another device."""
        for (_, piece), group in zip(self._pieces, tensors[:-1], strict=True):
            piece.lerp_(torch.cat(group).to(piece), 1 - decay)
        ema_update_(self._alone, tensors[-1], decay)


def half_life_decay(half_life: float, every_n_steps: int = 1) -> float:
    """The decay of one update with which a weight's share has halved after ``half_life`` steps.

    Args:
        half_life: in optimizer steps, > 0.
        every_n_steps: steps between two updates of the average, >= 1.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> half_life_decay(100, every_n_steps=100)
        0.5
    """
    check_number("half_life", half_life, above=0, unit="steps")
    check_count("every_n_steps", every_n_steps)
    return float(0.5 ** (every_n_steps / half_life))


def warmup_decay(update: int, decay: float, inv_gamma: float = 1.0, power: float = 2 / 3) -> float:
    """min(decay, 1 - (1 + (update - 1) / inv_gamma)^-power): short at first, so that initial weights are forgotten.

    Args:
        update: which update of the average this is, from 1; the first copies (decay 0).
        decay: where it ends, in [0, 1]. With the defaults 0.999 is reached after 31,600 updates.
        inv_gamma: updates until it begins to rise, > 0.
        power: how fast it rises; 2/3 for long runs, 3/4 reaches 0.999 after 10,000.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> [round(warmup_decay(update, decay=0.999), 4) for update in (1, 2, 11, 1001)]
        [0.0, 0.37, 0.7978, 0.99]
    """
    check_count("update", update, unit="updates are counted from 1")
    check_number("decay", decay, least=0, most=1)
    check_number("inv_gamma", inv_gamma, above=0)
    check_number("power", power, above=0)
    return float(min(decay, 1 - (1 + (update - 1) / inv_gamma) ** -power))


def power_from_width(sigma_rel: float) -> float:
    """gamma of the power-function average whose width is ``sigma_rel`` of the run.

    The largest root of x^3 + 7 x^2 + (16 - s^-2) x + (12 - s^-2).

    Args:
        sigma_rel: the standard deviation of the profile as a fraction of the time since the start of training,
            in (0, 1 / sqrt(12)).

    Raises:
        ValueError: ``sigma_rel`` is out of its range.

    Example:
        >>> round(power_from_width(0.10), 6)
        6.937204
    """
    check_number("sigma_rel", sigma_rel, above=0, below=MAX_WIDTH)
    inverse = sigma_rel**-2
    # Newton from the right: the polynomial is convex for x > 0 and sigma_rel < 1 / (gamma + 2), so that it falls
    # monotonically on the largest root.
    x = 1 / sigma_rel
    while True:
        value = ((x + 7) * x + 16 - inverse) * x + 12 - inverse
        lower = x - value / ((3 * x + 14) * x + 16 - inverse)
        if not lower < x:
            return x
        x = lower


def width_from_power(gamma: float) -> float:
    """``sigma_rel`` of a power-function average: sqrt((gamma + 1) / ((gamma + 2)^2 (gamma + 3))).

    Args:
        gamma: the power, above -1.

    Example:
        >>> round(width_from_power(6.937204), 6)
        0.1
    """
    check_number("gamma", gamma, above=-1)
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def power_decay(step: int, gamma: float, every_n_steps: int = 1) -> float:
    """The decay of one update of a power-function average: (1 - every_n_steps / step)^(gamma + 1).

    Args:
        step: the optimizer step after which this is, counted from 1; up to ``every_n_steps`` it copies (decay 0).
        gamma: of :func:`power_from_width`, above -1.
        every_n_steps: steps since the update before.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> round(power_decay(10, gamma=6.937204), 6)
        0.433325
    """
    check_count("step", step, unit="steps are counted from 1")
    check_number("gamma", gamma, above=-1)
    check_count("every_n_steps", every_n_steps)
    return float(max(0.0, 1 - every_n_steps / step) ** (gamma + 1))


def posthoc_weights(
    steps: Sequence[float], sigma_rels: Sequence[float], sigma_rel: float, step: float | None = None
) -> list[float]:
    """Weights of stored power-function averages that give the average of another width: the closest in least squares.

    Args:
        steps: the step of each stored average, > 0.
        sigma_rels: the width of each, of the same length; two widths at several steps (0.05 and 0.10 in the paper) are
            enough for every width between them, and for wider ones.
        sigma_rel: the width that is wanted, in (0, 1 / sqrt(12)).
        step: the step that it is wanted at; by default the last. Not after it.

    Returns:
        One weight for each stored average, summing to 1; some are negative.

    Raises:
        ValueError: a length, a width or a step out of its range, or an average that is there twice.

    Example:
        >>> [round(weight, 3) for weight in posthoc_weights([400, 400], [0.05, 0.10], 0.07)]
        [0.438, 0.562]
    """
    gammas, wanted, step = _posthoc_arguments(steps, sigma_rels, sigma_rel, step)
    matrix = _correlations(steps, gammas, steps, gammas)
    right = _correlations(steps, gammas, [step], [wanted])
    solution = torch.linalg.solve(matrix, right)[:, 0]
    return [float(value) for value in solution / solution.sum()]


def posthoc_error(
    steps: Sequence[float], sigma_rels: Sequence[float], sigma_rel: float, step: float | None = None
) -> float:
    """How far the profile of :func:`posthoc_weights` is from the wanted one, relative to it: 0 exact, 1 worthless.

    Stored averages that are too few, too early or too wide say so here. The arguments are those of
    :func:`posthoc_weights`.

    Args:
        steps: the step of each stored average.
        sigma_rels: the width of each.
        sigma_rel: the width that is wanted.
        step: the step that it is wanted at; by default the last.

    Example:
        >>> round(posthoc_error([400, 400], [0.05, 0.10], 0.07), 3), round(posthoc_error([400], [0.10], 0.05), 3)
        (0.056, 0.468)
    """
    weights = torch.tensor(posthoc_weights(steps, sigma_rels, sigma_rel, step), dtype=torch.float64)
    gammas, wanted, step = _posthoc_arguments(steps, sigma_rels, sigma_rel, step)
    norm = float(_correlations([step], [wanted], [step], [wanted]))
    cross = _correlations(steps, gammas, [step], [wanted])[:, 0]
    square = weights @ _correlations(steps, gammas, steps, gammas) @ weights - 2 * (weights @ cross) + norm
    return math.sqrt(max(0.0, float(square)) / norm)


def _posthoc_arguments(
    steps: Sequence[float], sigma_rels: Sequence[float], sigma_rel: float, step: float | None
) -> tuple[list[float], float, float]:
    check_numbers("steps", steps, above=0)
    check_numbers("sigma_rels", sigma_rels, above=0, below=MAX_WIDTH)
    check_number("sigma_rel", sigma_rel, above=0, below=MAX_WIDTH)
    check_number("step", step, above=0, optional=True)
    if len(steps) != len(sigma_rels):
        raise ValueError(
            f"sigma_rels: {len(sigma_rels)} widths for {len(steps)} stored averages (steps); one for each is needed"
        )
    if len(set(zip(steps, sigma_rels, strict=True))) != len(steps):
        raise ValueError(f"steps={list(steps)}: an average of the same step and width is there twice")
    step = max(steps) if step is None else step
    check("step", step, step <= max(steps), f"in (0, {max(steps)}], up to the last stored step")
    return [power_from_width(stored) for stored in sigma_rels], power_from_width(sigma_rel), step


def _correlations(ta: Sequence[float], ga: Sequence[float], tb: Sequence[float], gb: Sequence[float]) -> Tensor:
    """Inner products of profiles that end at ``ta`` and ``tb`` with powers ``ga`` and ``gb``: (len(ta), len(tb))."""
    time_a, power_a = (torch.tensor(list(values), dtype=torch.float64)[:, None] for values in (ta, ga))
    time_b, power_b = (torch.tensor(list(values), dtype=torch.float64)[None, :] for values in (tb, gb))
    exponent = torch.where(time_a < time_b, power_b, -power_a)
    scale = (power_a + 1) * (power_b + 1) / (power_a + power_b + 1) / torch.maximum(time_a, time_b)
    return scale * (time_a / time_b) ** exponent


def _check_device(device: Any) -> None:
    if device is None or isinstance(device, torch.device):
        return
    try:
        known = isinstance(device, str) and torch.device(device) is not None
    except RuntimeError:
        known = False
    check("device", device, known, "a torch.device, the name of one, such as 'cuda:0', or None")
