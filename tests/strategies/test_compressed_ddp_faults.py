"""Ranks that die, and processes that Lightning starts itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest

from harness.pool import WorkerError
from harness.processes import environment
from lightning_eff.strategies import ArcTopK, CompressedDDPStrategy
from tests.strategies.compressed_runs import ARC, train


class _Dies(L.Callback):
    """`kill -9` of rank 1, in the middle of a step."""

    def on_before_backward(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == 2 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def _loses_a_rank(folder: Path) -> None:
    train(folder, CompressedDDPStrategy(ArcTopK(**ARC, error_feedback="ef14")), _Dies())


def test_a_rank_that_dies_ends_the_others(pool, tmp_path):
    start = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        pool.using(grace=40, time_limit=80).run(_loses_a_rank, tmp_path)
    assert time.monotonic() - start < 75
    assert "exit code -9" in caught.value.tracebacks[1]
    assert "RuntimeError" in caught.value.tracebacks[0], "rank 0 did not end with an error"


_SCRIPT = """
import lightning as L, torch
import lightning_eff
from tests.suite.models import Net

if __name__ == "__main__":
    torch.set_num_threads(1)
    model = Net(optimizer="sgd")
    trainer = L.Trainer(strategy="{strategy}", devices=2, accelerator="cpu", max_steps=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0)
    trainer.fit(model)
    if trainer.global_rank == 0:
        print("ended:", trainer.state.status.value, trainer.strategy.traffic.steps)
"""


@pytest.mark.parametrize("strategy", ["ddp_bf16", pytest.param("ddp_spawn_bf16", marks=pytest.mark.slow)])
def test_a_string_is_all_that_a_user_writes(tmp_path, strategy):
    """Lightning starts the other process itself."""
    script = tmp_path / "train.py"
    script.write_text(_SCRIPT.format(strategy=strategy))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    # The processes of `ddp_spawn` keep the strategy's counters to themselves.
    assert f"ended: finished {0 if 'spawn' in strategy else 3}" in done.stdout
