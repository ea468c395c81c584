"""What GradES knows of the matrices that it watches, during one fit."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_eff.callbacks.grades.units import FreezableUnits
from lightning_eff.functional.grades import (
    FALLEN,
    FIELDS,
    INDEX,
    MEMORY,
    SMOOTH,
    GradESConfig,
    GradESState,
    MatrixMetric,
    Metric,
    grades_forecast,
    grades_update,
    settled_units,
)
from lightning_eff.functional.grades_unfreezing import grades_signal, neighbour_signal, units_to_unfreeze
from lightning_eff.training.heat_map import HeatMap
from lightning_eff.training.host_copy import HostCopy
from lightning_eff.training.namespaces import MisconfigurationException
from lightning_eff.training.trainer import loss_of

Unfreeze = Literal["loss", "neighbours"]


class UnitWatch:
    """Measures the units, keeps their state and their picture, and says which are to be frozen or unfrozen.

    Args:
        units: those of the model that is trained now.
        config: when a unit has converged.
        metric: what is measured.
        unfreeze: what speaks for unfreezing; None: nothing.
        heat_map: whether there is a picture.
        device: where the state lies.
    """

    def __init__(
        self,
        units: FreezableUnits,
        config: GradESConfig,
        metric: Metric,
        unfreeze: Unfreeze | None,
        heat_map: bool,
        device: torch.device,
    ) -> None:
        self.units = units
        self.frozen: dict[str, int] = {}
        """Name of each frozen unit -> the step at which it was frozen."""
        self.map = HeatMap(units.names) if heat_map else None
        self._state = GradESState(len(units.names), config).to(device)
        self._metric = MatrixMetric(units.tensors(), metric)
        self._rule: list[str] = [metric, config.tau_mode]
        self._unfreeze = unfreeze
        self._scale: Tensor | None = None  # of the gradients that are kept
        self._elements = torch.tensor([units.elements(m.parameters) for m in units.matrices], device=device)
        numbers = {matrix.block: number for number, matrix in enumerate(units.matrices)}
        self._blocks = torch.tensor([numbers[matrix.block] for matrix in units.matrices], device=device)

    def check(
        self, optimizer: Optimizer, index: int, scale: Tensor | None, *, armed: bool, done: float | None, step: int
    ) -> bool:
        """Measure the units of one optimizer that are not frozen; False if there is none.

        Args:
            optimizer: whose step is due.
            index: its number.
            scale: what the gradients are multiplied by, 0-d; None for nothing.
            armed: whether the grace period is over.
            done: the part of the run that is behind it, with this step; None: a run without an end.
            step: for the picture.
        """
        owners = zip(self.units.names, self.units.optimizer, strict=True)
        members = [unit for unit, (name, owner) in enumerate(owners) if owner == index and name not in self.frozen]
        if not members:
            return False
        state = self._state
        rates = self.units.rates(optimizer) if self._metric.metric == "gain" else None
        metric = self._metric.measure(members, rates)
        if scale is not None and self._metric.metric != "weight_change":
            if self._scale is not None and self._metric.metric == "grad_change":
                # The difference of gradients of two scales says nothing.
                metric = torch.where(scale == self._scale.to(scale), metric, torch.nan)
            metric = metric / scale
            self._scale = scale.detach().clone()
        ratio = grades_update(metric, state, armed=armed, done=done)
        if self._unfreeze == "neighbours":
            grades_signal(neighbour_signal(state, ratio, self._blocks), state)
        if self.map is not None:
            self.map.add(step, metric / (self._elements if state.config.tau_mode == "absolute" else state["level"]))
        return True

    def note(self) -> None:
        """Keep what the metric is now, for a forecast later."""
        self._state["earlier"].copy_(self._state["recent"])

    def outlook(self) -> HostCopy:
        """Send to the host what a forecast is made from."""
        return HostCopy(self._state.values)

    def forecast(self, outlook: HostCopy, done: float, since: float) -> list[float]:
        """At which part of the run each unit will have settled, infinity for never; see ``grades_forecast``."""
        state = GradESState(self._state.units, self._state.config, outlook.read())
        return grades_forecast(state, done, since).tolist()

    def hear_loss(self, loss: Tensor) -> None:
        """Take the loss, 0-d and equal on all ranks, as what speaks for unfreezing."""
        grades_signal(loss, self._state)

    def decide(self) -> HostCopy:
        """Send to the host which units have converged, the most settled lowest, and which are to be unfrozen."""
        settled = settled_units(self._state)
        rising = units_to_unfreeze(self._state) if self._unfreeze is not None else torch.zeros_like(settled)
        return HostCopy(torch.stack([settled, rising.to(settled.dtype)]))

    def chosen(self, decision: HostCopy, limit: int) -> tuple[list[int], list[int]]:
        """The units to be frozen, the most settled first if not all may be, and those to be unfrozen."""
        settled, rising = decision.read().tolist()
        unfrozen = [unit for unit, flag in enumerate(rising) if flag]
        ready = sorted((value, unit) for unit, value in enumerate(settled) if value == value)  # without NaN
        room = max(0, limit - len(self.frozen) + len(unfrozen))
        return sorted(unit for _, unit in ready[:room]), unfrozen

    def mark(self, step: int, frozen: list[int], unfrozen: list[int]) -> None:
        """Note that units were frozen and unfrozen; what is kept of the frozen ones is freed."""
        self._state.mark(frozen, unfrozen)
        self._metric.forget(frozen)
        for unit in unfrozen:
            del self.frozen[self.units.names[unit]]
        self.frozen |= {self.units.names[unit]: step for unit in frozen}

    def count(self) -> str:
        """In words."""
        return f"{len(self.frozen)} of {len(self.units.names)} matrices"

    def describe(self, step: int, frozen: list[int], unfrozen: list[int]) -> tuple[str, str]:
        """An event in one line, and the names in it."""
        units = (("froze", frozen), ("unfroze", unfrozen))
        events = [(verb, [self.units.names[unit] for unit in of]) for verb, of in units if of]
        counts = ", ".join(f"{verb} {len(names)}" for verb, names in events)
        lists = "".join(f"\n\n{verb}: {', '.join(names)}" for verb, names in events)
        return f"GradES, step {step}: {counts}; {self.count()} are frozen", lists

    def why_none(self) -> str:
        """Why no unit has been frozen, in words. Waits for the device, once."""
        config = self._state.config
        relative = config.tau_mode != "absolute"
        # Observations before the first that is compared with a threshold.
        first = {"remaining": SMOOTH, "relative": MEMORY, "absolute": 1}[config.tau_mode]
        names = ("count", "recent" if config.tau_mode == "remaining" else "metric", "level", "streak")
        rows = zip(*torch.stack([self._state[name] for name in names]).tolist(), self.units.names, strict=True)
        seen = [(int(count), m / level if relative else m, int(streak), name) for count, m, level, streak, name in rows
                if count]  # fmt: skip
        if not seen:
            return "none of them ever had a gradient that changed"
        most = max(count for count, *_ in seen)
        if most <= first:
            return f"none was checked more than {most} times, and the first {first} tell what is usual for it"
        compared = [(-streak, value, name) for count, value, streak, name in seen if count > first]
        streak, value, name = min(compared)
        at = f"{name}, the most settled, was at {value:.3g}{' of its level' if relative else ''} at its last check"
        below, needed, pays = f"below tau={config.tau:g}", f"patience={config.patience}", ""
        if config.tau_mode == "remaining":
            at = f"{name}, the most settled, was at {value:.3g} of its mean over the run at its last checks"
            below = (
                f"below {FALLEN:g} of it, the rest of the run good for less than tau={config.tau:g} of what there was,"
            )
            pays = ". GradES pays where the rate decays to 0 or the data are learned; in a run like this leave it out"
        if -streak >= config.patience:
            return f"{at} and had settled, but the run ended before the next of max_events was due"
        if streak:
            return f"{at}, {below}, but only for {-streak} in a row, and {needed} are asked for"
        return f"{at}, and after the grace period a matrix has to be {below} for {needed} checks in a row{pays}"

    def scalars(self, each: bool) -> dict[str, float | Tensor]:
        """What is logged; with ``each`` also the metric of every matrix."""
        roles = Counter(matrix.role for matrix in self.units.matrices)
        frozen = Counter(matrix.role for matrix in self.units.matrices if matrix.name in self.frozen)
        values: dict[str, float | Tensor] = {
            "frozen_ratio": len(self.frozen) / len(self.units.names),
            "frozen_params": float(self.units.elements(self.units.frozen_parameters(self.frozen))),
            **{f"frozen_{role}": float(frozen[role]) for role in roles},
        }
        if each:
            # NaN before a matrix was observed: no curve of what there is not yet.
            metric = torch.where(self._state["count"] > 0, self._state["metric"].float(), torch.nan)
            for unit, name in enumerate(self.units.names):
                values[f"metric/{name}"] = metric[unit]
                values[f"metric_per_element/{name}"] = metric[unit] / self._elements[unit]
        return values

    def copies(self, *, by_reference: bool = False) -> dict[str, Tensor]:
        """What the metric compares with: this rank's, on the host or where it is."""
        return dict(self._metric.copies) if by_reference else self._metric.state_dict()

    def state_dict(self, *, by_reference: bool = False) -> dict[str, Any]:
        """All but the copies; equal on all ranks. On the host, or the tensors themselves, which nothing waits for."""
        values, scale = self._state.values, self._scale
        if not by_reference:
            values = values.to("cpu", torch.float64, copy=True)
            scale = None if scale is None else scale.to("cpu", copy=True)
        return {
            "names": list(self.units.names),
            "rule": self._rule,
            "values": values,
            "frozen": dict(self.frozen),
            "scale": scale,
            "map": None if self.map is None else self.map.state_dict(by_reference=by_reference),
        }

    def load_state_dict(self, state: Mapping[str, Any], copies: Mapping[str, Tensor]) -> None:
        """Go on from a saved state, each unit by its name; new ones start anew, and a warning tells of lost ones."""
        names = self.units.names
        lost = [name for name in state["names"] if name not in names]
        if lost:
            warnings.warn(f"GradES watches {len(lost)} saved matrices no longer, such as {lost[0]!r}", stacklevel=2)
        values = _of_rule(state, self._rule)
        self._state.values.zero_()
        for old, name in enumerate(state["names"]):
            if name in names:
                self._state.values[:, names.index(name)] = values[:, old]
        self.frozen = {name: step for name, step in state["frozen"].items() if name in names}
        self._scale = state["scale"]
        self._metric.load_state_dict(copies)
        if self.map is not None and state["map"] is not None:
            self.map.load_state_dict(state["map"])


def _of_rule(state: Mapping[str, Any], rule: list[str]) -> Tensor:
    """The saved values, as a run by ``rule`` (metric, tau_mode) goes on from them.

    Version 1 of the state did not say by which rule it was, and had neither of today's defaults nor the last rows.
    """
    old: Tensor = state["values"]
    values = torch.cat([old, old.new_zeros(len(FIELDS) - len(old), old.shape[1])])
    if len(old) <= INDEX["recent"]:
        values[INDEX["recent"]] = values[INDEX["metric"]]
    same = state["rule"] == rule if "rule" in state else rule[0] != "gain" and rule[1] != "remaining"
    if not same:
        warnings.warn(
            f"GradES goes on by metric={rule[0]!r}, tau_mode={rule[1]!r}, and the checkpoint is of another rule: what "
            "is frozen stays so, and what is usual for each matrix is learned anew",
            stacklevel=2,
        )
        for name in ("metric", "level", "count", "streak", "recent", "earlier"):
            values[INDEX[name]] = 0.0
    return values


def mean_loss(trainer: Trainer, outputs: Any, known: bool) -> Tensor | None:
    """The loss that a training step has returned, its mean over the ranks; None for a batch that it skips. Collective.

    Args:
        trainer: whose step has ended.
        outputs: what ``training_step`` has returned.
        known: whether it has returned a loss before.

    Raises:
        MisconfigurationException: it has never returned one, as with manual optimization it need not.
    """
    loss = loss_of(outputs)
    if loss is None:
        if known or trainer.lightning_module.automatic_optimization:
            return None
        raise MisconfigurationException(
            "GradES(unfreeze='loss') needs training_step to return the loss, and it returned "
            f"{type(outputs).__name__}: return it, or take unfreeze='neighbours'"
        )
    mean = trainer.strategy.reduce(loss.clone(), reduce_op="mean")
    assert isinstance(mean, Tensor)
    return mean


def charts(each: bool) -> dict[str, list[Any]]:
    """Of what `UnitWatch.scalars` gives, for TensorBoard."""
    found: dict[str, list[Any]] = {
        "frozen (share)": ["Multiline", ["grades/frozen_ratio"]],
        "saved of the backward pass (share)": ["Multiline", ["grades/backward_flops_saved"]],
        **{
            f"frozen matrices: {role}": ["Multiline", [f"grades/frozen_{role}"]]
            for role in ("attention", "ffn", "other")
        },
    }
    if each:
        found["metric per element"] = ["Multiline", ["grades/metric_per_element/.*"]]
    return found
