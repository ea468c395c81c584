"""What benchmarks/gpu.sh left in a folder, as rows of results: `python -m benchmarks.gpu rows FOLDER`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from benchmarks.rows import RESULTS, provenance

# `steps` is not among them: one turn of each callback says nothing, and its time allows no more.
CSV_PARTS = ("zclip", "syncs", "layers", "gloo", "nccl")


def to_csv(folder: Path, results: Path = RESULTS) -> list[Path]:
    """Write each part's rows to `gpu_<part>.csv` and the kernels' to `kernels_gpu.csv`, provenance as it was.

    Rows that are not right stay, marked so.
    """
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    written = []
    for part in CSV_PARTS:
        mine = [{name: value for name, value in row.items() if name != "part"} for row in rows if row["part"] == part]
        if not mine:
            continue
        # The columns by which rows are told apart first, the provenance last.
        columns = list(dict.fromkeys(name for row in mine for name in row if name not in provenance()))
        written.append(results / f"gpu_{part}.csv")
        with written[-1].open("w", newline="") as file:
            writer = csv.DictWriter(file, [*columns, *provenance()], restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(mine)
    if (kernels := folder / "kernels.csv").exists():
        written.append(results / "kernels_gpu.csv")
        written[-1].write_text(kernels.read_text())
    return written
