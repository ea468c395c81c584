"""`lightning-eff merge` of many checkpoints: time against the disk's read speed in the same run, and peak memory.

    python -m benchmarks.checkpoint_merge                       # 10 checkpoints of the 124 M GPT: 5 GB of disk
    python -m benchmarks.checkpoint_merge --config 1m --count 4 # a trial of the script itself

Every merge runs in a process of its own. The files leave the page cache before each (Linux), so that a merge and the
plain read that it is measured against both read the disk. The merged tensors are checked first; on a mismatch no time
is written.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from benchmarks.rows import write_rows
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from harness.memory import GIVES_BACK
from harness.timing import in_turn, over
from lightning_eff.merging import open_source

CONFIGS = Path(__file__).parent.parent / "examples/gpt/configs"

# What a merge needs beside Python and torch: the peak above what was held before.
_MERGE = """
import json, sys, time
from harness.memory import peak_resident, resident
import lightning_eff.cli.merge as merge
before = resident()
start = time.perf_counter()
status = merge.main(sys.argv[1:])
seconds = time.perf_counter() - start
print(json.dumps({"status": status, "seconds": seconds, "peak_mb": (peak_resident() - before) / 1e6}))
"""


def save_checkpoints(folder: Path, name: str, count: int) -> list[Path]:
    """Lightning checkpoints of random weights, without optimizer state."""
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    paths = []
    for step in range(1, count + 1):
        torch.manual_seed(step)
        module = GPTModule(GPTConfig(**settings["config"]))
        paths.append(folder / f"step={step}.ckpt")
        checkpoint = {
            "state_dict": module.state_dict(),
            "global_step": step,
            "pytorch-lightning_version": "2.6.0",
            "hyper_parameters": dict(module.hparams),
        }
        with paths[-1].open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # pages that are not on disk yet cannot leave the cache
    return paths


def forget(paths: list[Path]) -> None:
    """Let files leave the page cache, where the system can be told."""
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(paths: list[Path]) -> float:
    """Seconds to read the files and nothing else."""
    forget(paths)
    buffer = memoryview(bytearray(16 << 20))
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def write(path: Path, size: int) -> float:
    """Seconds to write and sync a file of so many bytes: what any merge has to do beside reading."""
    piece = os.urandom(16 << 20)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for done in range(0, size, len(piece)):
            file.write(piece[: size - done])
        os.fsync(file.fileno())
    return time.perf_counter() - start


def merge(paths: list[Path], output: Path, measure_memory: bool = False) -> tuple[float, float]:
    """Seconds of one merge, and its peak memory in MB above what it began with."""
    forget(paths)
    output.unlink(missing_ok=True)
    command = [sys.executable, "-c", _MERGE, *map(str, paths), "-o", str(output)]
    # To measure memory the allocator gives it back at once, so that the peak is what is held and not what is kept for
    # later. That takes time, so it is not done where time is measured.
    environment = {**os.environ, **(GIVES_BACK if measure_memory else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures = json.loads(done.stdout.splitlines()[-1])
    if figures["status"]:
        raise SystemExit(f"the merge failed: {done.stderr}")
    return float(figures["seconds"]), float(figures["peak_mb"])


def check(paths: list[Path], output: Path, weights: list[float]) -> None:
    """The merge is the sum in float64, rounded once, in every tensor."""
    merged, sources = open_source(output), [open_source(path) for path in paths]
    for name in merged.specs:
        expected = torch.zeros(merged.specs[name].shape, dtype=torch.float64)
        for source, weight in zip(sources, weights, strict=True):
            expected += weight * source.read(name).double()
        if not torch.allclose(merged.read(name).double(), expected, rtol=1e-6, atol=1e-8):
            raise SystemExit(f"{output.name}: {name} is not the average; no time is written")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="124m", choices=sorted(path.stem for path in CONFIGS.glob("*m.yaml")))
    parser.add_argument("--count", type=int, default=10, help="checkpoints")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; default: the system's temporary one")
    parser.add_argument("--no-rows", action="store_true", help="print only: a trial")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = save_checkpoints(Path(folder), args.config, args.count)
        fewer = paths[: max(1, args.count // 5)]
        outputs = {suffix: Path(folder) / f"merged.{suffix}" for suffix in ("ckpt", "safetensors")}
        peaks: dict[str, float] = {}
        for suffix, output in outputs.items():
            _, peaks[f"{suffix}, fewer"] = merge(fewer, output, measure_memory=True)
            _, peaks[suffix] = merge(paths, output, measure_memory=True)
            check(paths, output, [1 / args.count] * args.count)
        size_of_one, scratch = paths[0].stat().st_size, Path(folder) / "scratch"
        variants = {
            "read": lambda: read(paths),
            "read, fewer": lambda: read(fewer),
            "write": lambda: write(scratch, size_of_one),
        }
        for suffix, output in outputs.items():
            variants[suffix] = lambda o=output: merge(paths, o)[0]
            variants[f"{suffix}, fewer"] = lambda o=output: merge(fewer, o)[0]
        figures = in_turn(variants, args.rounds)
        rows = []
        for suffix, output in outputs.items():
            for more, used in (("", paths), (", fewer", fewer)):
                size = sum(path.stat().st_size for path in used)
                seconds = statistics.median(figures[suffix + more])
                reading = statistics.median(figures["read" + more])
                rows.append(
                    {
                        "model": args.config,
                        "checkpoints": len(used),
                        "model_mb": round(output.stat().st_size / 1e6, 1),
                        "read_mb": round(size / 1e6, 1),
                        "output": suffix,
                        "rounds": args.rounds,
                        "merge_s": round(seconds, 3),
                        "read_s": round(reading, 3),
                        "write_s": round(statistics.median(figures["write"]), 3),
                        "disk_mb_per_s": round(size / 1e6 / reading),
                        **over(figures, suffix + more, "read" + more, "over_read", digits=3),
                        "peak_mb": round(peaks[suffix + more], 1),
                        "peak_over_model": round(peaks[suffix + more] / (output.stat().st_size / 1e6), 2),
                    }
                )
    for row in rows:
        print(row)
    if not args.no_rows:
        print(write_rows("checkpoint_merge", rows))


if __name__ == "__main__":
    main()
