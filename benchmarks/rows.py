"""Result rows with their provenance, and side-by-side timing, shared by the benchmarks."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from rich.console import Console
from rich.table import Table

import lightning_eff

CONSOLE = Console()
RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, str]:
    """What a figure depends on besides the code: the device, the versions and the day."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"CPU, {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "lightning_eff": lightning_eff.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_rows(name: str, rows: Iterable[Mapping[str, Any]], key: Sequence[str] = ()) -> Path:
    """Write ``benchmarks/results/<name>.csv``, with the provenance in every row.

    An older file is replaced; with a ``key``, only its rows that agree with a new one in these columns are.
    """
    stamped: list[Mapping[str, Any]] = [{**row, **provenance()} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with _alone(path):
        if key:
            kept = {tuple(row[column] for column in key): row for row in read_rows(name)}
            kept |= {tuple(str(row[column]) for column in key): row for row in stamped}
            stamped = list(kept.values())
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(stamped[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(stamped)
    return path


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from writing the same file, where the system can: two of them may add rows at a time."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of ``benchmarks/results/<name>.csv``; none if there is no such file."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as a table, the provenance below."""
    table = Table(*rows[0], title=title, caption=", ".join(provenance().values()))
    for row in rows:
        table.add_row(*map(str, row.values()))
    CONSOLE.print(table)


def in_turn(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure every variant once a round, in an order that rotates, so that a slow moment hits them all alike."""
    names = list(variants)
    figures: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            figures[name].append(variants[name]())
    return figures


def ratio(figures: Mapping[str, list[float]], of: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of the ratios round by round."""
    ratios = [a / b for a, b in zip(figures[of], figures[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high
