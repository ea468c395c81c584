from __future__ import annotations

import csv
import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from harness.runs import quiet_trainer
from lightning_eff.strategies import FaultTolerantDDPStrategy
from lightning_eff.strategies.fault_tolerant.rendezvous import LeftBehindError
from lightning_eff.strategies.fault_tolerant.writer import NewerCheckpoints, adopt_places, begin_to_write, places


def test_another_writer_carries_a_csv_file_on(tmp_path: Path) -> None:
    """By itself a CSVLogger deletes what it finds."""
    first = CSVLogger(tmp_path, name="run")
    first.log_metrics({"loss": 1.0}, step=0)
    first.save()
    file = Path(first.log_dir) / "metrics.csv"
    file.write_text(file.read_text() + "0.5")  # killed in the midst of a line
    second = CSVLogger(tmp_path, name="run")
    trainer = quiet_trainer(accelerator="cpu", logger=second)
    trainer.strategy.connect(BoringModel())
    adopt_places(trainer, {"versions": [first.version], "folders": [], "saved": []})
    begin_to_write(trainer)
    second.log_metrics({"loss": 0.5, "accuracy": 0.1}, step=1)
    second.save()
    assert places(trainer)["versions"] == [0]
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["step"], row["loss"], row["accuracy"]) for row in rows] == [("0", "1.0", ""), ("1", "0.5", "0.1")]


def save(path: Path, step: int) -> None:
    torch.save({"global_step": step, "weights": torch.ones(3)}, path)


def test_nobody_saves_over_a_later_step(tmp_path: Path) -> None:
    """A replica that was asleep while the others went on, and finds itself the writer."""
    save(tmp_path / "of an earlier run.ckpt", 1000)
    os.utime(tmp_path / "of an earlier run.ckpt", (1, 1))
    newer = NewerCheckpoints()
    last = tmp_path / "last.ckpt"
    newer.refuse_older(last, 10)
    save(last, 10)
    newer.note_own(last, 10)
    newer.refuse_older(last, 20)
    save(tmp_path / "step=30.ckpt", 30)
    (tmp_path / "of another program.ckpt").write_text("no checkpoint")
    newer.refuse_older(last, 30)
    with pytest.raises(LeftBehindError, match="is of step 30, and this replica would save step 20"):
        newer.refuse_older(last, 20)


@pytest.fixture
def strategy() -> FaultTolerantDDPStrategy:
    pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")
    return FaultTolerantDDPStrategy(max_replicas=1, replica=0, lighthouse="http://127.0.0.1:9")


def test_a_later_step_that_appears_while_one_is_saved(strategy: FaultTolerantDDPStrategy, tmp_path: Path) -> None:
    write = strategy.checkpoint_io.save_checkpoint

    def slow(checkpoint: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        write(checkpoint, path, *args, **kwargs)
        save(tmp_path / "last.ckpt", 30)

    strategy.checkpoint_io.save_checkpoint = slow  # type: ignore[method-assign]
    with pytest.raises(LeftBehindError, match="is of step 30, and this replica would save step 20"):
        strategy.save_checkpoint({"global_step": 20}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 30
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_does_not_end_the_run(strategy: FaultTolerantDDPStrategy, tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{n}.ckpt" for n in (1, 2, 3))
    strategy.save_checkpoint({"global_step": 1}, first)
    write = strategy.checkpoint_io.save_checkpoint

    def full(checkpoint: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    strategy.checkpoint_io.save_checkpoint = full  # type: ignore[method-assign]
    with pytest.warns(UserWarning, match=r"a checkpoint could not be written .*No space left.*training goes on"):
        strategy.save_checkpoint({"global_step": 2}, second)
    strategy.remove_checkpoint(first)  # as ModelCheckpoint does
    assert [path.name for path in tmp_path.iterdir()] == ["1.ckpt"]
    strategy.checkpoint_io.save_checkpoint = write  # type: ignore[method-assign]
    strategy.save_checkpoint({"global_step": 3}, third)
    strategy.remove_checkpoint(first)
    assert [path.name for path in tmp_path.iterdir()] == ["3.ckpt"]


def test_a_resumed_run_does_not_save_within_its_first_window(strategy: FaultTolerantDDPStrategy) -> None:
    """ModelCheckpoint would, with the gradients of one replica; a run begins at steps that are saved."""
    saver = ModelCheckpoint(every_n_train_steps=2)
    trainer: Any = SimpleNamespace(enable_validation=False, checkpoint_callbacks=[saver], global_step=6)
    strategy._fitting = cast(Any, SimpleNamespace(trainer=trainer))
    strategy.on_train_start()
    assert saver._last_global_step_saved == 6
