"""Run one part: 0 if all of its rows are right, 1 otherwise.

python -m benchmarks.gpu smoke            # on the GPU
GPU_SMALL=1 python -m benchmarks.gpu smoke
python -m benchmarks.gpu rows FOLDER      # what a run left there, to benchmarks/results/; needs no GPU
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path

import torch

from benchmarks.gpu.faults import plant
from benchmarks.gpu.report import OUT, SMALL, Report
from benchmarks.gpu.rows import to_csv

PARTS = {
    **dict.fromkeys(("environment", "smoke", "bench", "compile", "zclip", "big", "tiny"), "kernels"),
    **dict.fromkeys(("steps", "syncs", "snapshots"), "training"),
    **dict.fromkeys(("gloo", "nccl", "fsdp2"), "ranks"),
    "layers": "layers",
}


def main() -> int:
    """The part that the command names."""
    part = sys.argv[1]
    if part == "rows":
        print(*to_csv(Path(sys.argv[2])), sep="\n")
        return 0
    if not SMALL and not torch.cuda.is_available():
        print("torch finds no GPU here; GPU_SMALL=1 runs the part small on the CPU")
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if fault := os.environ.get("GPU_FAULT"):
        plant(fault)
    report = Report(part)
    getattr(importlib.import_module(f"benchmarks.gpu.{PARTS[part]}"), part if part != "compile" else "compile_")(report)
    return min(report.wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
