"""Pictures for the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import REPOSITORY

IMAGES = REPOSITORY / "docs" / "images"


def panels(columns: int = 1, width: float = 7.0, height: float = 4.0, **arguments: Any) -> tuple[Any, Any]:
    """A figure with axes side by side (one: the axes themselves), each of ``width`` x ``height`` inches."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=(width * columns, height), layout="constrained", **arguments)


def save(figure: Any, path: Path) -> Path:
    """Write a figure, and let it go."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def by_step(points: Iterable[tuple[Any, Any]]) -> dict[int, list[float]]:
    """Values of several runs by their step: ``(step, value)`` pairs, as numbers or their texts."""
    found: dict[int, list[float]] = {}
    for step, value in points:
        found.setdefault(int(step), []).append(float(value))
    return dict(sorted(found.items()))


def mean_and_range(axis: Any, values: dict[int, list[float]], band: bool = True, **arguments: Any) -> None:
    """Draw the mean over the runs as a line, and from the least to the greatest as a ``band``."""
    (line,) = axis.plot(list(values), [statistics.fmean(each) for each in values.values()], **arguments)
    if not band:
        return
    low, high = [min(each) for each in values.values()], [max(each) for each in values.values()]
    axis.fill_between(list(values), low, high, color=line.get_color(), alpha=0.12, linewidth=0)
