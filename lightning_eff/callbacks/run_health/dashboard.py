"""What RunHealth gives the loggers, and how a dashboard draws it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_eff.callbacks.run_health.stragglers import Window


def numbers(window: Window, times: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """What is logged, by name; what no step has told yet is left out.

    Args:
        window: the latest that the ranks have told each other.
        times: median and 99th percentile of what is logged beside it, by phase and callback.
    """
    told = window.values() | {f"seconds/{name}": seconds for name, (seconds, _) in times.items()}
    return {name: value for name, value in told.items() if value == value}  # NaN is none


def charts(details: bool) -> dict[str, list[Any]]:
    """For ``TensorBoardLayout``; ``details``: of every phase and callback too."""
    found: dict[str, list[Any]] = {
        "a step (seconds)": ["Multiline", ["run_health/step_seconds"]],
        "waiting for data (share of a step)": ["Multiline", ["run_health/data"]],
        "waiting for other ranks (share of a step)": ["Multiline", ["run_health/waiting"]],
        "busiest rank above the median one (share)": ["Multiline", ["run_health/spread"]],
    }
    if details:
        found["phases of a step (seconds)"] = ["Multiline", ["run_health/seconds/[^/]+"]]
        found["callbacks in a step (seconds)"] = ["Multiline", ["run_health/seconds/callbacks/.+"]]
    return found
