"""Rows of benchmarks/gpu.sh: one line for a person, one for a program, written as they come."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import provenance

SMALL = os.environ.get("GPU_SMALL") == "1"
DEVICE = torch.device("cpu" if SMALL else "cuda")
OUT = Path(os.environ.get("GPU_OUT", "gpu_out"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Report:
    """The rows of one part, and how many of them are wrong."""

    def __init__(self, part: str) -> None:
        self.part = part
        self.wrong = 0

    def row(self, what: str, right: bool = True, **figures: Any) -> None:
        """Write a row; one that is not right fails the part, which goes on."""
        self.wrong += not right
        words = [
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in figures.items()
        ]
        print("" if right else "WRONG", what, *words, sep="  ", flush=True)
        row = {"part": self.part, "what": what, "right": right, **figures, **provenance()}
        with (OUT / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """A failure is a row as well, and what follows goes on with the memory freed."""
        try:
            yield
        except Exception as error:
            self.row(what, False, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            with (OUT / "errors.txt").open("a") as file:
                file.write(f"\n### {self.part}: {what}\n{traceback.format_exc()[-5000:]}\n")
        finally:
            gc.collect()
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()


def difference(result: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest one, relative to the truth's largest element; infinite where something is not finite."""
    error = float((result.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")
