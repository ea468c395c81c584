"""GradES: which matrices have converged, by what they can still gain or how their gradients change (arXiv 2509.01842).

In a plain torch loop::

    matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    metric = MatrixMetric([{name: p} for name, p in matrices.items()], "gain")  # once
    state = GradESState(len(matrices), GradESConfig(tau=0.02))
    ...
    loss.backward()
    rates = dict.fromkeys(matrices, optimizer.param_groups[0]["lr"])
    done = (step + 1) / total_steps
    grades_update(metric.measure(rates=rates), state, armed=done > 0.5, done=done)  # every few steps, before the update
    for parameter, settled in zip(matrices.values(), settled_units(state).isfinite().tolist()):
        ...

A unit is a matrix or a LoRA pair. All is taken and decided on the device: nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lightning_eff.arguments import check, check_choice, check_count, check_flag, check_number
from lightning_eff.functional.gradients import (
    Sharding,
    as_real,
    is_dtensor,
    local_grad,
    sharding_of,
    statistics_dtype,
    sum_over_ranks_,
)
from lightning_eff.kernels.tensor_stats import tensor_stats

Metric = Literal["gain", "grad_change", "grad", "weight_change"]
TauMode = Literal["remaining", "relative", "absolute"]

MEMORY = 5
"""Observations that a running mean (a matrix's level, a signal to unfreeze) remembers; a level has at least as many."""

SMOOTH = 10
"""Observations that ``recent`` remembers, and that come before the first decision by ``"remaining"``.

Where a model has learned its data, the gradient of a batch is that of its rare hard samples: from check to check it
differs by more than its mean."""

FALLEN = 0.5
"""By ``"remaining"`` nothing is frozen that is not below this part of its own mean, however little of the run is left:
a constant rate with constant gradients has not settled."""

FIELDS = (
    "metric",  # the last observation, 0 before the first
    "level",  # running mean of the metric: over all of the run, or in the grace period and fixed after it
    "count",  # observations
    "streak",  # observations below the threshold in a row, after the grace period
    "frozen",
    "signal",  # running mean of what speaks for unfreezing
    "baseline",  # the signal when the unit was frozen
    "rise",  # observations of the signal above `unfreeze_factor * baseline` in a row
    "reopened",  # times that it was unfrozen
    "recent",  # running mean of the last observations
    "earlier",  # what `recent` was at half of the grace period, for a forecast
)
INDEX = {name: index for index, name in enumerate(FIELDS)}


@dataclass(frozen=True)
class GradESConfig:
    """When a unit has converged.

    Args:
        tau: the threshold, > 0.
        tau_mode: ``"remaining"``: the part of what a unit has had so far, summed over the run, that the rest of the run
            would bring if it went on as it now is; ``"relative"``: a fraction of the unit's own level, the mean of its
            last observations in the grace period; ``"absolute"``: in units of the metric, as in the paper.
        patience: observations below the threshold in a row, >= 1. Twice as many each time that it was unfrozen.
        unfreeze_factor: a frozen unit is to be unfrozen when its signal has been above this many times what it was
            at the freezing for ``patience`` observations, > 1; None: never.

    Raises:
        ValueError: an argument out of its range.
    """

    tau: float
    tau_mode: TauMode = "remaining"
    patience: int = 3
    unfreeze_factor: float | None = None

    def __post_init__(self) -> None:
        check_number("tau", self.tau, above=0)
        check_choice("tau_mode", self.tau_mode, TauMode)
        check_count("patience", self.patience)
        check_number("unfreeze_factor", self.unfreeze_factor, above=1, optional=True)


@dataclass
class GradESState:
    """What is known of each unit, on the device of the metric.

    Attributes:
        units: how many there are.
        config: when they have converged.
        values: float64 (float32 on MPS) tensor of shape (len(FIELDS), units), in the order of ``FIELDS``.
    """

    units: int
    config: GradESConfig
    values: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if not self.values.numel():
            self.values = torch.zeros(len(FIELDS), self.units, dtype=torch.float64)

    def __getitem__(self, name: str) -> Tensor:
        """The row of that name in ``FIELDS``, of shape (units,); shares memory with ``values``."""
        return self.values[INDEX[name]]

    def to(self, device: torch.device) -> GradESState:
        """Move to ``device`` in place."""
        if self.values.device != device:
            self.values = self.values.to(statistics_dtype(device)).to(device)
        return self

    def mark(self, frozen: Sequence[int], unfrozen: Sequence[int] = ()) -> None:
        """Note that units have been frozen, or unfrozen again; their counters start anew."""
        for units, value in ((frozen, 1.0), (unfrozen, 0.0)):
            if units:
                index = torch.tensor(units).to(self.values.device, non_blocking=True)
                for name in ("streak", "rise"):
                    self[name].index_fill_(0, index, 0.0)
                self["frozen"].index_fill_(0, index, value)
                if value:
                    self["baseline"].index_copy_(0, index, self["signal"].index_select(0, index))
                else:
                    self["reopened"].index_add_(0, index, torch.ones_like(index, dtype=self.values.dtype))


def grades_update(metric: Tensor, state: GradESState, *, armed: bool, done: float | None = None) -> Tensor:
    """Take one observation of each unit.

    NaN, infinity and exactly 0 (no gradient, a skipped step, an expert that was not asked) are no observations: they
    change nothing. Nothing is below a threshold on its first observation.

    Args:
        metric: of shape (units,), as from ``MatrixMetric.measure``.
        state: changed in place.
        armed: whether the grace period is over.
        done: the part of the run that is behind it, > 0, for ``tau_mode="remaining"``; None: a run without an end, of
            which as much is to come as there was.

    Returns:
        The metric over its threshold, of shape (units,): below 1 is converged; NaN without an observation or threshold.

    Example:
        >>> state = GradESState(2, GradESConfig(tau=0.5, tau_mode="absolute", patience=2))
        >>> for metric in ([1.0, 1.0], [1.0, 0.4], [1.0, 0.3]):
        ...     ratio = grades_update(torch.tensor(metric, dtype=torch.float64), state, armed=True)
        >>> ratio
        tensor([2.0000, 0.6000], dtype=torch.float64)
    """
    check_flag("armed", armed)
    check_number("done", done, above=0, optional=True)
    state.to(metric.device)
    metric = metric.to(state.values.dtype)
    level, count, recent, mode = state["level"], state["count"], state["recent"], state.config.tau_mode
    seen = metric.isfinite() & (metric > 0) & (state["frozen"] == 0)
    value = torch.where(seen, metric, 0.0)

    def mean(of: Tensor, memory: int | None, learning: Tensor) -> Tensor:
        keep = count / (count + 1)
        if memory is not None:
            keep = keep.clamp(max=1 - 1 / memory)
        return torch.where(learning, keep * of + (1 - keep) * value, of)

    recent.copy_(mean(recent, SMOOTH, seen))
    if mode == "remaining":
        learned = count >= SMOOTH
        level.copy_(mean(level, None, seen))
        ratio = _ratio(recent, level, state.config, done)
    elif mode == "relative":
        learned = count >= MEMORY
        ratio = metric / (state.config.tau * level)
        level.copy_(mean(level, MEMORY, seen & ~learned if armed else seen))
    else:
        learned = count >= 1
        ratio = metric / state.config.tau
        level.copy_(mean(level, MEMORY, seen))
    ratio = torch.where(seen & learned, ratio, torch.nan)
    if armed:
        streak = torch.where(ratio < 1, state["streak"] + 1, 0.0)
        state["streak"].copy_(torch.where(seen, streak, state["streak"]))
    state["metric"].copy_(torch.where(seen, metric, state["metric"]))
    count.add_(seen)
    return ratio


def _ratio(recent: Tensor, level: Tensor, config: GradESConfig, done: Tensor | float | None) -> Tensor:
    """By ``"remaining"``: what is to come over ``tau`` of what there was; and ``recent`` is far below its own mean."""
    ahead = 1.0 if done is None else (1 - done) / done
    if isinstance(ahead, Tensor):
        return recent / level * (ahead / config.tau).clamp(min=1 / FALLEN)
    return recent / level * max(ahead / config.tau, 1 / FALLEN)


def settled_units(state: GradESState) -> Tensor:
    """For each unit that is to be frozen now its last metric over its level, NaN for all others; of shape (units,).

    Args:
        state: not changed; :meth:`GradESState.mark` notes what was done.

    Example:
        >>> state = GradESState(2, GradESConfig(tau=0.5, tau_mode="absolute", patience=2))
        >>> for metric in ([1.0, 1.0], [1.0, 0.4], [1.0, 0.3]):
        ...     _ = grades_update(torch.tensor(metric, dtype=torch.float64), state, armed=True)
        >>> settled_units(state).isfinite()
        tensor([False,  True])
    """
    needed = state.config.patience * torch.exp2(state["reopened"])
    settled = (state["streak"] >= needed) & (state["frozen"] == 0)
    last = state["recent" if state.config.tau_mode == "remaining" else "metric"]
    return torch.where(settled, last / state["level"].clamp(min=torch.finfo(torch.float32).tiny), torch.nan)


def grades_forecast(state: GradESState, done: float, since: float) -> Tensor:
    """At which part of the run each unit will have settled, if its metric goes on falling as it has; of shape (units,).

    The fall is taken as exponential, from ``earlier`` at ``since`` to ``recent`` now; a metric that has risen is taken
    to stay. 0 for what is frozen already, infinity for what will not settle.

    Args:
        state: on whatever device; it is read, so that the host waits.
        done: the part of the run that is behind it, in (0, 1).
        since: the part that was when ``earlier`` was noted, in (0, ``done``).

    Example:
        >>> state = GradESState(1, GradESConfig(tau=0.1, tau_mode="absolute"))
        >>> _ = grades_update(torch.tensor([1.0]), state, armed=False)
        >>> state["earlier"].copy_(state["recent"])
        tensor([1.], dtype=torch.float64)
        >>> for _ in range(30):
        ...     _ = grades_update(torch.tensor([0.5]), state, armed=False)
        >>> round(grades_forecast(state, done=0.4, since=0.2).item(), 2)  # halved in 0.2 of the run
        0.88
    """
    check_number("done", done, above=0, below=1)
    check_number("since", since, above=0, below=done)
    values = state.values.to("cpu", torch.float64)
    recent, earlier, level = (values[INDEX[name]] for name in ("recent", "earlier", "level"))
    fall = torch.where((earlier > recent) & (recent > 0), (earlier / recent).log() / (done - since), 0.0)
    when = torch.linspace(done, 1.0, 201, dtype=torch.float64)[:, None]
    ahead = recent * torch.exp(-fall * (when - done))
    if state.config.tau_mode == "remaining":
        brought = torch.cat([torch.zeros_like(recent)[None], (ahead[1:] + ahead[:-1]).cumsum(0) / 2]) * (1 - done) / 200
        settled = _ratio(ahead, (level * done + brought) / when, state.config, when) < 1
    else:
        settled = ahead < state.config.tau * (level if state.config.tau_mode == "relative" else 1.0)
    settled &= values[INDEX["count"]] > 0
    first = torch.where(settled.any(0), when[:, 0][settled.int().argmax(0)], torch.inf)
    return torch.where(values[INDEX["frozen"]] != 0, 0.0, first)


class MatrixMetric:
    """Measures the units in one pass over their gradients (or weights).

    ``"gain"``: learning rate times the sum of |g|, by which a step of that size along the gradient's signs (as Adam's
    about is) lowers the loss, to first order; ``"grad_change"``: sum of |g - g'|, g' being the gradient at the
    measurement before (the paper's formula where every step is measured); ``"grad"``: sum of |g|; ``"weight_change"``:
    sum of |w - w'| since the measurement before, as in the authors' code. The two changes keep one copy of what they
    measure, on the device and in its dtype; their first measurement has nothing to compare with and gives NaN, as does
    the one after a non-finite gradient.

    Complex tensors are taken as pairs of reals.
    With DTensors each rank measures and keeps its own part, and one all-reduce of (units,) numbers adds them up.

    Args:
        units: name and parameter, plain or DTensor, of each member of each unit.
        metric: what is measured.

    Raises:
        ValueError: an unknown metric.
    """

    def __init__(self, units: Sequence[Mapping[str, Tensor]], metric: Metric) -> None:
        check_choice("metric", metric, Metric)
        self.units = [dict(unit) for unit in units]
        self.metric: Metric = metric
        self.copies: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(
        self, members: Collection[int] | None = None, rates: Mapping[str, float | Tensor] | None = None
    ) -> Tensor:
        """Of shape (units,), on the first parameter's device: the metric, NaN for units without a gradient.

        Args:
            members: the units to be measured, all by default; others are NaN. Equal on all ranks.
            rates: the learning rate of each parameter by its name, for ``"gain"``; None: 1.

        Raises:
            ValueError: a parameter without a rate.
        """
        chosen = list(range(len(self.units)) if members is None else members)
        parts: dict[tuple[Sharding | None, torch.device], tuple[list[int], list[str], list[Tensor]]] = {}
        missing = []
        for unit in chosen:
            for name, parameter in self.units[unit].items():
                owners, names, tensors = parts.setdefault((sharding_of(parameter), parameter.device), ([], [], []))
                grad = local_grad(parameter)
                if grad is None:
                    missing.append(unit)
                    continue
                owners.append(unit)
                names.append(name)
                tensors.append(as_real(_local(parameter) if self.metric == "weight_change" else grad))
        device = next(iter(self.units[0].values())).device
        dtype = statistics_dtype(device)
        total = torch.full((len(self.units),), torch.nan, dtype=dtype)
        total[chosen] = 0.0
        total[missing] = torch.nan
        total = total.to(device, non_blocking=True)
        for (sharding, place), (owners, names, tensors) in parts.items():
            sums = torch.zeros(len(self.units), dtype=dtype, device=place)
            if tensors:
                index = torch.tensor(owners).to(place, non_blocking=True)
                each = self._sums(names, tensors).to(dtype)
                if self.metric == "gain" and rates is not None:
                    each = each * _rates(names, rates, each)
                sums.index_add_(0, index, each)
            total += sum_over_ranks_(sums, sharding).to(device, non_blocking=True)
        return total

    def _sums(self, names: Sequence[str], tensors: Sequence[Tensor]) -> Tensor:
        """What the metric is of each tensor."""
        if self.metric in ("gain", "grad"):
            return tensor_stats(tensors).l1
        copies = []
        for name, tensor in zip(names, tensors, strict=True):
            copy = self.copies.get(name)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = self.copies[name] = torch.full_like(tensor, torch.nan)  # so that the first change is none
            elif copy.device != tensor.device:
                copy = self.copies[name] = copy.to(tensor.device)
            copies.append(copy)
        change = tensor_stats(tensors, copies).change_l1
        assert change is not None
        return change

    def forget(self, units: Collection[int]) -> None:
        """Free the copies of units that are measured no longer."""
        for unit in units:
            for name in self.units[unit]:
                self.copies.pop(name, None)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the copies, on the host, by the names of the parameters."""
        return {name: copy.to("cpu", copy=True) for name, copy in self.copies.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from saved copies; they move to the device at the next measurement."""
        names = {name for unit in self.units for name in unit}
        self.copies = {name: copy.clone() for name, copy in state.items() if name in names}


def _rates(names: Sequence[str], rates: Mapping[str, float | Tensor], like: Tensor) -> Tensor:
    missing = next((name for name in names if name not in rates), None)
    check("rates", rates, missing is None, f"a learning rate for each parameter, and {missing!r} has none")
    chosen = [rates[name] for name in names]
    if any(isinstance(rate, Tensor) for rate in chosen):  # as of a capturable optimizer
        return torch.stack([torch.as_tensor(rate).detach().to(like) for rate in chosen])
    return torch.tensor(chosen, dtype=like.dtype).to(like.device, non_blocking=True)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if is_dtensor(parameter) else parameter  # type: ignore[attr-defined, no-any-return]
