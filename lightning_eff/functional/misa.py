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

from lightning_eff.arguments import check_choice, check_count, check_counts, check_flag, check_instance, check_number

Variant = Literal["paper", "official"]
Sampling = Literal["importance", "uniform", "cyclic"]

CLIP = 5.0
"""Largest exponent of ``variant="official"``, as in the released code."""


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
    """
    check_number("beta", beta, least=0, below=1)
    check_choice("variant", variant, Variant)
    check_count("interval", interval)
    mixed = beta * previous + (1 - beta) * measured
    if variant == "official":
        mixed = mixed / (1 - beta**interval)
    return torch.where(measured.isfinite(), mixed, previous)


def debiased(values: Tensor, turns: Tensor, beta: float) -> Tensor:
    """The paper's G without its bias towards 0: divided by 1 - beta^n after n turns; a constant x gives x at once."""
    check_number("beta", beta, least=0, below=1)
    return values / (1 - beta ** turns.clamp(min=1).to(values.dtype))


def probabilities(values: Tensor, *, eta: float, variant: Variant) -> Tensor:
    """Sampling probabilities of all modules from their importance, shape (n,); they sum to 1.

    ``"paper"``: p ~ exp(eta G), the distribution that has the largest sum of p G - KL(p, uniform) / eta.
    ``"official"``: p ~ exp(min(5, eta G^2)).

    Example:
        >>> probabilities(torch.tensor([0.0, 1.0]), eta=1.0, variant="paper")
        tensor([0.2689, 0.7311])
    """
    check_number("eta", eta, least=0)
    check_choice("variant", variant, Variant)
    exponent = eta * values if variant == "paper" else (eta * values.square()).clamp(max=CLIP)
    return torch.softmax(exponent, dim=0)


@dataclass(frozen=True)
class SamplerConfig:
    """How modules are sampled.

    Args:
        budget: the sampled modules have less than this fraction of all parameters, in (0, 1].
        units: so many modules, >= 1, whatever their sizes; replaces ``budget``. None: ``budget`` decides.
        eta: how strongly importance decides, >= 0; 0 is uniform. In units of 1 / G, see ``importance``.
        beta: weight of the past in the importance, in [0, 1).
        sampling: ``"importance"``; ``"uniform"``: all with equal probability; ``"cyclic"``: in the order given.
        variant: ``"paper"`` or ``"official"`` recursion and probabilities.
        sample_last: of the modules that had a turn, this many that have waited longest come first, >= 0. With
            ``"importance"`` only.
        debias: ``"paper"``: sample by the ``debiased`` importance.
        seed: of the private random generator.

    Raises:
        ValueError: an argument out of its range.
    """

    budget: float = 0.03
    units: int | None = None
    eta: float = 1.0
    beta: float = 0.8
    sampling: Sampling = "importance"
    variant: Variant = "paper"
    sample_last: int = 2
    debias: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("budget", self.budget, above=0, most=1)
        check_count("units", self.units, optional=True)
        check_number("eta", self.eta, least=0)
        check_number("beta", self.beta, least=0, below=1)
        check_choice("sampling", self.sampling, Sampling)
        check_choice("variant", self.variant, Variant)
        check_count("sample_last", self.sample_last, least=0)
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
        self.interval = 0
        self._start = 0  # of the next cycle
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
        config = self.config
        if config.sampling != "importance":
            return torch.full_like(self.importance, 1 / len(self.sizes))
        values = self.importance
        if config.variant == "paper" and config.debias:
            values = debiased(values, self.turns, config.beta)
        return probabilities(values, eta=config.eta, variant=config.variant)

    def eta_advice(self) -> str | None:
        """What to tell a user whose ``eta`` has no effect on a sample by importance: none is more than 5 % likelier."""
        config, p, largest = self.config, self.probabilities, float(self.importance.max())
        if config.sampling != "importance" or config.eta == 0 or p.max() >= 1.05 * p.min():
            return None
        decides = 1 / (largest if config.variant == "paper" else largest**2) if largest > 0 else float("inf")
        if config.eta >= decides:
            return None  # the modules are about as important as each other, and that is not for eta to change
        return (
            f"eta={config.eta}) samples as good as uniformly: the largest importance is {largest:.2g}, and importance "
            f"decides from an eta of about {decides:.2g}"
        )

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
        for candidate in self._order():
            if len(chosen) < limit and self.fits(size + self.sizes[candidate]):
                chosen.append(candidate)
                size += self.sizes[candidate]
            elif self.config.sampling == "cyclic" and self.fits(self.sizes[candidate]):
                break  # the next selection begins with it
        self._start = (chosen[-1] + 1) % len(self.sizes)
        for index in chosen:
            self.last[index] = self.interval
        self.interval += 1
        return sorted(chosen)

    def _order(self) -> list[int]:
        count = len(self.sizes)
        if self.config.sampling == "cyclic":
            return [(self._start + i) % count for i in range(count)]
        # The largest of log p + Gumbel noise, one after the other, are a weighted sample without replacement.
        noise = torch.rand(count, generator=self.generator, dtype=torch.float64).clamp(min=1e-300)
        keys = self.probabilities.log() - (-noise.log()).log()
        drawn = torch.argsort(keys, descending=True, stable=True).tolist()
        if self.config.sampling == "uniform":
            return drawn  # type: ignore[no-any-return]
        waited = sorted((i for i in drawn if self.last[i] >= 0), key=lambda i: self.last[i])
        first = [i for i in torch.randperm(count, generator=self.generator).tolist() if self.last[i] < 0]
        first += waited[: self.config.sample_last]
        return first + [i for i in drawn if i not in set(first)]

    def state_dict(self) -> dict[str, Any]:
        """All that is needed to go on exactly."""
        return {
            "importance": self.importance.clone(),
            "turns": self.turns.clone(),
            "last": list(self.last),
            "interval": self.interval,
            "start": self._start,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state of as many modules."""
        self.importance, self.turns = state["importance"].clone(), state["turns"].clone()
        self.last, self.interval, self._start = list(state["last"]), state["interval"], state["start"]
        self.generator.set_state(state["generator"])
