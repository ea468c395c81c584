"""Result rows with their provenance, shared by the benchmarks."""

from __future__ import annotations

import csv
import datetime
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch

import lightning_eff

RESULTS = Path(__file__).parent / "results"


class _Console:
    """Rich's, from its first use on: rows are written without extras, too."""

    def __getattr__(self, name: str) -> Any:
        from rich.console import Console

        return getattr(Console(), name)


CONSOLE = _Console()


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

    An older file is replaced; with a ``key``, only its rows that agree with new ones in these columns are. Those that
    stay are empty in a column that they lack.
    """
    stamped: list[Mapping[str, Any]] = [{**row, **provenance()} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    with _alone(path):
        if key:
            groups = _grouped(read_rows(name), key) | _grouped(stamped, key)
            stamped = [row for group in groups.values() for row in group]
        longest = max(stamped, key=len)
        columns = list(dict.fromkeys(name for row in (longest, *stamped) for name in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(stamped)
    return path


def _grouped(rows: Iterable[Mapping[str, Any]], key: Sequence[str]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[column]) for column in key), []).append(row)
    return groups


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


def show(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Print rows, or some of their columns, as a table, the provenance below."""
    from rich.console import Console
    from rich.table import Table

    columns = columns or list(rows[0])
    table = Table(*columns, title=title, caption=", ".join(provenance().values()))
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


def publish(title: str, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Show rows and write all of them to ``benchmarks/results/<name>.csv``."""
    show(title, rows, columns)
    print(write_rows(name, rows))
