"""What averages add to a checkpoint: bytes of all files, and seconds of a save, by ranks.

    python -m benchmarks.average_files                      # 1, 2 and 4 ranks under plain DDP
    python -m benchmarks.average_files --beside CHECKOUT    # and another checkout's package, in turn

The 1 M GPT's sizes as bare matrices, an EMA and a full window of six snapshots. Rows go to
benchmarks/results/average_files.csv.
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
from typing import Any
from unittest import mock

import lightning as L
import torch

PARAMETERS, WINDOW, SAVES = 1 << 20, 6, 7
REPOSITORY = Path(__file__).parent.parent


class Matrices(L.LightningModule):
    """As many parameters as are wanted, in 16 matrices."""

    def __init__(self) -> None:
        super().__init__()
        side = PARAMETERS // 16 // 256
        self.layers = torch.nn.ModuleList(torch.nn.Linear(256, side, bias=False) for _ in range(16))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return sum(layer(batch).square().mean() for layer in self.layers)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Saves(L.Callback):
    """Saves at the end, again and again; a rank's seconds from the first one's begin to the last one's end, and those
    of them in which it waited for the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: list[float] = []
        self.sync_seconds: list[float] = []

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        fsync = os.fsync

        def timed(descriptor: int) -> None:
            begin = time.perf_counter()
            fsync(descriptor)
            self.sync_seconds[-1] += time.perf_counter() - begin

        with mock.patch.object(os, "fsync", timed):
            for save in range(SAVES):
                self.sync_seconds.append(0.0)
                trainer.strategy.barrier()
                begin = time.perf_counter()
                trainer.save_checkpoint(self.folder / f"{save}" / "run.ckpt")
                trainer.strategy.barrier()
                self.seconds.append(time.perf_counter() - begin)


def rank(folder: Path, averages: bool) -> None:
    """One rank's run, in a process that torchrun started."""
    from lightning_eff.callbacks import EMA, CheckpointAveraging

    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    saves = Saves(folder)
    own = [CheckpointAveraging(window=WINDOW, every_n_steps=1), EMA(0.999)] if averages else []
    ranks = int(os.environ["WORLD_SIZE"])
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=WINDOW + 2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*own, saves],
    )
    trainer.fit(Matrices(), torch.utils.data.DataLoader(torch.randn(128, 256), batch_size=4))
    if trainer.is_global_zero:
        times = [saves.seconds[2:], saves.sync_seconds[2:]]  # the first ones make folders and buffers
        (folder / "seconds.json").write_text(json.dumps(times))


def measured(package: Path, ranks: int, averages: bool) -> tuple[int, int, float, float]:
    """Bytes and files of a checkpoint, and the median seconds of a save and of rank zero's fsyncs in one."""
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, "--rank", temporary, *(["--averages"] if averages else [])]
        environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, cwd=temporary, check=True, stderr=subprocess.DEVNULL)
        sizes = [path.stat().st_size for path in (Path(temporary) / "0").rglob("*") if path.is_file()]
        seconds, syncs = json.loads((Path(temporary) / "seconds.json").read_text())
    return sum(sizes), len(sizes), statistics.median(seconds), statistics.median(syncs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="another checkout, whose package is measured too")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--averages", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        rank(arguments.rank, arguments.averages)
        return
    from benchmarks.rows import CONSOLE, show, write_rows

    packages = {"this": REPOSITORY, **({"before": arguments.beside.resolve()} if arguments.beside else {})}
    rows = []
    for ranks in arguments.ranks:
        plain = measured(REPOSITORY, ranks, averages=False)
        for name, package in reversed(packages.items()):
            size, files, seconds, syncs = measured(package, ranks, averages=True)
            rows.append(
                {
                    "package": name,
                    "ranks": ranks,
                    "parameters": PARAMETERS,
                    "window": WINDOW,
                    "files": files,
                    "megabytes": round(size / 1e6, 2),
                    "over_plain_megabytes": round((size - plain[0]) / 1e6, 2),
                    "one_model_megabytes": round(PARAMETERS * 4 / 1e6, 2),
                    "save_ms": round(seconds * 1e3, 1),
                    "fsync_ms": round(syncs * 1e3, 1),
                    "plain_save_ms": round(plain[2] * 1e3, 1),
                    "saves": SAVES - 2,
                }
            )
    show("A checkpoint with averages", rows)
    CONSOLE.print(write_rows("average_files", rows))


if __name__ == "__main__":
    main()
