"""What decides on an alarm in benchmarks/spectral_alignment.py: the monitor's rule on recorded signals, and the scalar
detectors that it is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.spectral_runs import EVERY, RECORDS, WORKLOADS, exploded
from lightning_eff.callbacks import SpectralAlignmentMonitor
from lightning_eff.functional.spectral_alignment import CollapseConfig, CollapseState, collapse_update, collapsed_share

BURN_IN = 50  # steps in which no detector may speak


# --- detectors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """The monitor's arguments that decide on an alarm."""

    every_n_steps: int
    config: CollapseConfig
    max_residual: float
    severity: float

    @classmethod
    def default(cls) -> Rule:
        monitor = SpectralAlignmentMonitor()
        return cls(monitor.every_n_steps, monitor.config, monitor.max_residual, monitor.severity)


def collapses(run: dict[str, Any], rule: Rule) -> tuple[list[float], list[list[str]]]:
    """At every observation the share of layers that have collapsed, as the monitor takes it, and which."""
    interval = str(rule.every_n_steps)
    stride = rule.every_n_steps // EVERY
    majority, residual = run["majority"][interval][::stride], run["residual"][interval][::stride]
    state = CollapseState.of(majority.shape[1], rule.config)
    shares, names = [], []
    for m, r in zip(majority, residual, strict=True):
        collapsed = collapse_update(m, r <= rule.max_residual, state)
        shares.append(collapsed_share(collapsed, state).item())
        names.append([name for name, is_one in zip(run["layers"], collapsed.tolist(), strict=True) if is_one])
    return shares, names


def onsets(signal: Sequence[float], threshold: float, every: int = 1) -> list[int]:
    """Steps at which a signal comes to or above a threshold, after the burn-in; NaN is below, infinity above."""
    above = [value >= threshold for value in signal]
    return [i * every for i in range(1, len(above)) if above[i] and not above[i - 1] and i * every >= BURN_IN]


def z_scores(values: Tensor, alpha: float) -> list[float]:
    """Of the logarithm, against its running mean and deviation before this step. A value that is not finite: inf."""
    mean = var = 0.0
    scores = []
    for step, value in enumerate(values.double().log().tolist()):
        weight = max(1 - alpha, 1 / (step + 1))
        scores.append(math.inf if not math.isfinite(value) else (value - mean) / math.sqrt(var + 1e-6) if step else 0.0)
        if math.isfinite(value):
            difference = value - mean
            mean += weight * difference
            var = (1 - weight) * (var + weight * difference**2)
    return scores


def growth(values: Tensor, lag: int) -> list[float]:
    """Logarithm of the ratio to the value ``lag`` steps ago; to none with lag 0."""
    logs = values.double().clamp(min=1e-12).log()
    if lag:
        logs = torch.cat([torch.zeros(min(lag, len(logs))), logs[lag:] - logs[:-lag]])
    return [value if math.isfinite(value) else math.inf for value in logs.tolist()]


def scalar_detectors() -> Iterator[tuple[str, str, Callable[[dict[str, Any]], list[float]]]]:
    """(detector, variant, signal of a record): which variant of each and its threshold are tuned."""
    for alpha in (0.9, 0.97, 0.99):
        for name, scalar in (("gradient norm, z-score", "grad_norm"), ("loss, z-score", "loss")):
            yield name, f"alpha {alpha}", lambda run, s=scalar, a=alpha: z_scores(run["scalars"][s], a)
    for lag in (20, 50, 100):
        yield "weight norm", f"growth in {lag} steps", lambda run, lag=lag: growth(run["scalars"]["weight_norm"], lag)
    for lag in (0, 20, 50, 100):
        variant = f"growth in {lag} steps" if lag else "value"
        yield "maximal attention logit", variant, lambda run, lag=lag: _logits(run, lag)


def _logits(run: dict[str, Any], lag: int) -> list[float]:
    values = run["scalars"]["max_logit"]
    return [-math.inf] * len(values) if values.isnan().all() else growth(values, lag)


# --- how alarms are judged -------------------------------------------------------------------------------------------


def records(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What is recorded of these seeds; what is missing is said."""
    paths = [RECORDS / f"{name}-{seed}.pt" for name in WORKLOADS for seed in seeds]
    missing = [path.stem for path in paths if not path.exists()]
    if len(missing) == len(paths):
        raise SystemExit(f"nothing is recorded in {RECORDS}: run the part 'record' first")
    if missing:
        print(f"not recorded, and left out: {', '.join(missing)}")
    return [torch.load(path) for path in paths if path.exists()]


def judge(run: dict[str, Any], alarms: list[int]) -> tuple[int, int, int | None, int | None]:
    """Healthy steps, false alarms in them, the first alarm of a run that diverges, and the step at which it did.

    The steps before the fault are healthy. An alarm after the loss has passed twice its minimum is none in time.
    """
    workload = WORKLOADS[run["workload"]]
    steps = len(run["scalars"]["loss"])
    if not workload.diverges:
        return steps - BURN_IN, len(alarms), None, None
    end = exploded(run["scalars"]["loss"].tolist())
    late = [step for step in alarms if step >= workload.fault_at and (end is None or step < end)]
    early = [step for step in alarms if step < workload.fault_at]
    return max(0, workload.fault_at - BURN_IN), len(early), late[0] if late else None, end


def leads(runs: Sequence[dict[str, Any]], alarms: Sequence[list[int]]) -> tuple[int, list[int]]:
    """All false alarms, and the steps of warning in each run that diverges (0: none)."""
    judged = [judge(run, steps) for run, steps in zip(runs, alarms, strict=True)]
    return sum(false for _, false, _, _ in judged), [
        0 if first is None else end - first for _, _, first, end in judged if end is not None
    ]


def score(found: list[int]) -> tuple[int, int]:
    """Runs warned of, then the warning; more than 100 steps are not better than 100."""
    return sum(lead > 0 for lead in found), sum(min(lead, 100) for lead in found)
