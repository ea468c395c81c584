"""MISA: train a few modules at a time, sampled by their importance (arXiv 2511.00056).

A module is one weight matrix, or a whole layer. In a plain torch loop::

    sampler = Sampler(sizes, SamplerConfig(budget=0.03), total=number_of_all_parameters)
    for interval in ...:
        active = sampler.select()                       # indices of the modules to train; freeze the others
        ... T steps, measured[i] being the mean over them of what `importance` says, of active[i] ...
        sampler.measure(active, measured)

Everything here is small and on the host; nothing depends on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_eff.arguments import (
    check,
    check_choice,
    check_count,
    check_counts,
    check_flag,
    check_instance,
    check_number,
    is_number,
)

Auto = Literal["auto"]
Variant = Literal["paper", "official"]
Sampling = Literal["importance", "uniform", "cyclic"]

CLIP = 5.0
"""Largest exponent of ``variant="official"``, as in the released code."""

WIDEST = 10.0
"""Largest difference of two exponents with ``eta="auto"`` and ``variant="paper"``."""

EFFECTIVE = 0.5
"""What ``eta="auto"`` aims at: the probabilities amount to this fraction of the modules that have had a turn."""

CLEAR = 1.05
"""Probabilities that differ by less than this factor are as good as uniform."""


def importance(previous: Tensor, measured: Tensor, *, beta: float, variant: Variant, interval: int) -> Tensor:
    """One step of the recursion for modules that were active in an interval.

    ``"paper"``: G = beta G' + (1 - beta) x, from G' = 0.
    ``"official"``: G = (beta G' + (1 - beta) x) / (1 - beta^k), as the released code has it: dividing what was divided
    before, so that a constant x of 1 gives 1, 2.78, 4.96, ...

    Args:
        previous: G', shape (n,), 0 for a module that was never active.
        measured: x, shape (n,): ``"paper"``: the mean over the interval's steps of the squared gradient norm, divided
            by the number of elements; ``"official"``: the mean of the gradient norm. NaN, where nothing was
            measured, leaves G as it was.
        beta: weight of the past, in [0, 1).
        variant: see above.
        interval: k, the number of this interval, from 1; not used by ``"paper"``.

    Example:
        >>> previous = torch.tensor([0.0, 1.0])
        >>> importance(previous, torch.tensor([1.0, torch.nan]), beta=0.9, variant="paper", interval=1)
        tensor([0.1000, 1.0000])
    """
    check_number("beta", beta, least=0, below=1)
    check_choice("variant", variant, Variant)
    check_count("interval", interval)
    mixed = beta * previous + (1 - beta) * measured
    if variant == "official":
        mixed = mixed / (1 - beta**interval)
    return torch.where(measured.isfinite(), mixed, previous)


def debiased(values: Tensor, turns: Tensor, beta: float) -> Tensor:
    """The paper's G without its bias towards 0: divided by 1 - beta^n after n turns; a constant x gives x at once.

    Args:
        values: G, shape (n,).
        turns: how often each was active, shape (n,); 0 counts as 1.
        beta: the weight of the past that it was made with, in [0, 1).

    Example:
        >>> debiased(torch.tensor([0.1, 0.19]), torch.tensor([1, 2]), beta=0.9)
        tensor([1.0000, 1.0000])
    """
    check_number("beta", beta, least=0, below=1)
    return values / (1 - beta ** turns.clamp(min=1).to(values.dtype))


def probabilities(values: Tensor, *, eta: float, variant: Variant) -> Tensor:
    """Sampling probabilities of all modules from their importance, shape (n,); they sum to 1.

    ``"paper"``: p ~ exp(eta G), the distribution that has the largest sum of p G - KL(p, uniform) / eta.
    ``"official"``: p ~ exp(min(5, eta G^2)).

    Args:
        values: importance, shape (n,).
        eta: how much it counts, >= 0; 0 is uniform.
        variant: see above.

    Example:
        >>> probabilities(torch.tensor([0.0, 1.0]), eta=1.0, variant="paper")
        tensor([0.2689, 0.7311])
    """
    check_number("eta", eta, least=0)
    check_choice("variant", variant, Variant)
    return _softmax(values, eta, variant)


def _softmax(values: Tensor, eta: float | Tensor, variant: Variant) -> Tensor:
    exponent = eta * values if variant == "paper" else (eta * values.square()).clamp(max=CLIP)
    return torch.softmax(exponent, dim=0)


def perplexity(p: Tensor) -> Tensor:
    """How many modules some probabilities amount to: exp of their entropy, a 0-d tensor; n if all n are equal.

    Args:
        p: probabilities, shape (n,), summing to 1.

    Example:
        >>> perplexity(torch.tensor([0.5, 0.5, 0.0, 0.0]))
        tensor(2.)
    """
    return torch.exp(-torch.xlogy(p, p).sum())


def _eta_for(values: Tensor, effective: float, variant: Variant) -> Tensor:
    """The smallest eta at which the probabilities amount to so many modules, a 0-d tensor; 0 for equal importance.

    Perplexity falls with eta. Where many are equals it never comes so far, and eta ends by ``WIDEST`` or ``CLIP``.
    """
    x = values if variant == "paper" else values.square()
    spread = x.max() - x.min()
    most = WIDEST / spread if variant == "paper" else CLIP / x.max()
    most = torch.where(spread > 1e-6 * x.max(), most, 0.0)
    low, high = torch.zeros_like(most), most
    for _ in range(40):
        middle = (low + high) / 2
        wide = perplexity(_softmax(values, middle, variant)) > effective
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return high


@dataclass(frozen=True)
class SamplerConfig:
    """How modules are sampled.

    Args:
        budget: the sampled modules have less than this fraction of all parameters, in (0, 1].
        units: so many modules, >= 1, whatever their sizes; replaces ``budget``. None: ``budget`` decides.
        eta: how strongly importance decides. ``"auto"``: so that the probabilities amount to half of the modules that
            have had a turn (their perplexity), at every sample from what is known then. Or a number, >= 0, in units of
            1 / G, see ``importance``; 0 is uniform.
        beta: weight of the past in the importance, in [0, 1).
        sampling: ``"importance"``; ``"uniform"``: all with equal probability; ``"cyclic"``: in the order given.
        variant: ``"paper"`` or ``"official"`` recursion and probabilities.
        sample_last: of the modules that had a turn, this many that have waited longest come first, >= 0. With
            ``"importance"`` only. None: 2, and with ``eta="auto"`` in every second sample only, since a sample may
            have room for no more.
        debias: ``"paper"``: sample by the ``debiased`` importance.
        seed: of the private random generator.

    Raises:
        ValueError: an argument out of its range.
    """

    budget: float = 0.03
    units: int | None = None
    eta: float | Auto = "auto"
    beta: float = 0.8
    sampling: Sampling = "importance"
    variant: Variant = "paper"
    sample_last: int | None = None
    debias: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("budget", self.budget, above=0, most=1)
        check_count("units", self.units, optional=True)
        eta = self.eta
        good = eta == "auto" if isinstance(eta, str) else is_number(eta) and eta >= 0
        check("eta", eta, good, "a number of at least 0, or 'auto'")
        check_number("beta", self.beta, least=0, below=1)
        check_choice("sampling", self.sampling, Sampling)
        check_choice("variant", self.variant, Variant)
        check_count("sample_last", self.sample_last, least=0, optional=True)
        check_flag("debias", self.debias)
        check_count("seed", self.seed, least=0)


class Sampler:
    """Which modules have had their turn, how important each is, and which come next.

    Args:
        sizes: number of elements of each module.
        config: how to sample.
        total: number of elements that ``budget`` is a fraction of; None: the sum of ``sizes``.

    Raises:
        ValueError: an argument of a wrong type or out of its range, or no module fits the budget.

    Attributes:
        importance: G, float64 tensor of shape (n,).
        turns: intervals that each module was active in, int64 tensor of shape (n,).
        last: the number of the interval in which each was last selected, -1 for never.
        interval: how often ``select`` was called.
        drawn: turns that importance has decided: given by a draw in which others were left out and not all were as
            likely.

    Example:
        >>> sampler = Sampler([4, 4, 4, 4], SamplerConfig(budget=0.5, sampling="cyclic"))
        >>> sampler.select(), sampler.select()
        ([0, 1], [2, 3])
    """

    def __init__(self, sizes: Sequence[int], config: SamplerConfig, total: int | None = None) -> None:
        check_counts("sizes", sizes, least=0)
        check_instance("config", config, SamplerConfig, "a SamplerConfig")
        check_count("total", total, optional=True)
        self.sizes, self.config = list(sizes), config
        self.total = sum(sizes) if total is None else total
        count = len(self.sizes)
        self.importance = torch.zeros(count, dtype=torch.float64)
        self.turns = torch.zeros(count, dtype=torch.int64)
        self.last = [-1] * count
        self.interval = self.drawn = 0
        self._start = 0  # of the next cycle
        self._drawn_by: tuple[Tensor, Tensor] | None = None  # importance and turns, and the probabilities of these
        self.generator = torch.Generator().manual_seed(config.seed)
        if not any(self.fits(size) for size in self.sizes):
            smallest = min(self.sizes, default=0)
            raise ValueError(
                f"budget={config.budget!r} of {self.total:,} parameters in total is less than the smallest module, "
                f"which has {smallest:,}: it must be at least {smallest / max(1, self.total):.3g}"
            )

    def fits(self, size: int) -> bool:
        """Whether modules of this many elements together are within the budget."""
        return self.config.units is not None or size <= self.config.budget * self.total

    @property
    def probabilities(self) -> Tensor:
        """Of each module to be drawn first, among those that had a turn; float64 tensor of shape (n,)."""
        of = torch.stack([self.importance, self.turns.double()])
        if self._drawn_by is None or not torch.equal(self._drawn_by[0], of):  # eta="auto" takes a millisecond
            self._drawn_by = of, self._probabilities()
        return self._drawn_by[1]

    def _probabilities(self) -> Tensor:
        config = self.config
        if config.sampling != "importance":
            return torch.full_like(self.importance, 1 / len(self.sizes))
        values = self.importance
        if config.variant == "paper" and config.debias:
            values = debiased(values, self.turns, config.beta)
        if not isinstance(config.eta, str):
            return _softmax(values, config.eta, config.variant)
        turned = [index for index, turns in enumerate(self.turns.tolist()) if turns]
        if not turned:
            return torch.full_like(values, 1 / len(values))
        known = values[turned]
        eta = _eta_for(known, EFFECTIVE * len(turned), config.variant)
        return _softmax(torch.where(self.turns > 0, values, known.mean()), eta, config.variant)

    @property
    def _tells_apart(self) -> bool:
        """Whether one is more than 5 % likelier than another."""
        p = self.probabilities
        return bool(p.max() >= CLEAR * p.min())

    @property
    def waiting(self) -> int:
        """How many modules that fit have not had a turn, and so come first."""
        return sum(last < 0 and self.fits(size) for last, size in zip(self.last, self.sizes, strict=True))

    def eta_advice(self) -> str | None:
        """What to tell a user whose number for ``eta`` has no effect: none is more than 5 % likelier than another."""
        config, largest = self.config, float(self.importance.max())
        if config.sampling != "importance" or isinstance(config.eta, str) or config.eta == 0:
            return None
        if self._tells_apart:
            return None
        decides = 1 / (largest if config.variant == "paper" else largest**2) if largest > 0 else float("inf")
        if config.eta >= decides:
            return None  # the modules are about as important as each other, and that is not for eta to change
        return (
            f"eta={config.eta}) samples as good as uniformly: the largest importance is {largest:.2g}, and importance "
            f"decides from an eta of about {decides:.2g}, or set eta='auto'"
        )

    def why_none(self) -> str | None:
        """Why importance has decided no turn, and what would change it; None where it has, or was not asked to."""
        config, count = self.config, len(self.sizes)
        if self.drawn or config.sampling != "importance" or config.eta == 0:
            return None
        if waiting := self.waiting:
            return (
                f"{count - waiting} of {count} have had a turn, and those without one come first. Make "
                "first_every_n_steps smaller, the budget larger, or the run longer"
            )
        if self.fits(sum(self.sizes)) and (config.units is None or config.units >= count):
            return f"each sample has room for all {count}. Make the budget smaller, or sample more with include"
        if not self._tells_apart:
            why = "all are about as important as each other"
            return why if config.eta == "auto" else f"{why}, or eta is too small: set eta='auto'"
        if config.sample_last:
            return f"sample_last={config.sample_last} may fill each sample. Make it smaller, or the budget larger"
        return "the run ended with the first round. Make it longer, or first_every_n_steps smaller"

    def measure(self, active: Sequence[int], measured: Tensor) -> None:
        """Take what was measured of the modules that were active in the last interval, see ``importance``."""
        index = torch.tensor(list(active), dtype=torch.int64)
        measured = measured.to("cpu", torch.float64)
        self.turns[index] += measured.isfinite()
        self.importance[index] = importance(
            self.importance[index],
            measured,
            beta=self.config.beta,
            variant=self.config.variant,
            interval=max(1, self.interval),
        )

    def select(self) -> list[int]:
        """The modules of the next interval, in ascending order; what does not fit any more is left out.

        ``"importance"``: those that never had a turn, in random order; then the ``sample_last`` that have waited
        longest; then a weighted sample without replacement. ``"cyclic"`` begins where the last selection ended.
        """
        chosen: list[int] = []
        size = 0
        limit = len(self.sizes) if self.config.units is None else self.config.units
        order, first = self._order()
        for candidate in order:
            if len(chosen) < limit and self.fits(size + self.sizes[candidate]):
                chosen.append(candidate)
                size += self.sizes[candidate]
            elif self.config.sampling == "cyclic" and self.fits(self.sizes[candidate]):
                break  # the next selection begins with it
        self._start = (chosen[-1] + 1) % len(self.sizes)
        if self.config.sampling == "importance":
            left = any(self.fits(self.sizes[i]) for i in set(order[first:]).difference(chosen))
            self.drawn += len(set(chosen).difference(order[:first])) if left and self._tells_apart else 0
        for index in chosen:
            self.last[index] = self.interval
        self.interval += 1
        return sorted(chosen)

    def _order(self) -> tuple[list[int], int]:
        """All modules, and how many of them come first whatever their importance."""
        count, config = len(self.sizes), self.config
        if config.sampling == "cyclic":
            return [(self._start + i) % count for i in range(count)], count
        # The largest of log p + Gumbel noise, one after the other, are a weighted sample without replacement.
        noise = torch.rand(count, generator=self.generator, dtype=torch.float64).clamp(min=1e-300)
        keys = self.probabilities.log() - (-noise.log()).log()
        drawn = torch.argsort(keys, descending=True, stable=True).tolist()
        if config.sampling == "uniform":
            return drawn, 0
        waited = sorted((i for i in drawn if self.last[i] >= 0), key=lambda i: self.last[i])
        first = [i for i in torch.randperm(count, generator=self.generator).tolist() if self.last[i] < 0]
        if config.sample_last is not None:
            first += waited[: config.sample_last]
        elif config.eta != "auto" or self.interval % 2:
            first += waited[:2]
        return first + [i for i in drawn if i not in set(first)], len(first)

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly."""
        return {
            "importance": self.importance.clone(),
            "turns": self.turns.clone(),
            "last": list(self.last),
            "interval": self.interval,
            "drawn": self.drawn,
            "start": self._start,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state of as many modules."""
        self.importance, self.turns = state["importance"].clone(), state["turns"].clone()
        self.last, self.interval, self._start = list(state["last"]), state["interval"], state["start"]
        self.drawn = state.get("drawn", 0)  # 0.1 did not count them
        self.generator.set_state(state["generator"])
