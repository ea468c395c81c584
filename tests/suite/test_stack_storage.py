"""All callbacks together where saving fails: a folder that becomes read-only, a process killed while it saves."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from harness.runs import fit as harness_fit
from lightning_eff.callbacks import EMA, CheckpointAveraging, TrainingGuard, ZClip
from tests.suite.models import STEPS
from tests.suite.runs import fit

NOBODY = 65534


@contextlib.contextmanager
def _without_privileges() -> Iterator[None]:
    """Root may write everywhere; nobody else may."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


class _ReadOnlyFrom(L.Callback):
    def __init__(self, step: int, folder: Path) -> None:
        self.step = step
        self.folder = folder

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.folder.chmod(0o555)


def _callbacks(folder: Path) -> list[L.Callback]:
    return [
        ZClip(warmup_steps=4),
        EMA(decay=0.9, validate_with="average"),
        CheckpointAveraging(window=2, every_n_steps=2),
        TrainingGuard(),
        ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, save_last=True),
    ]


@pytest.fixture
def anybodys() -> Iterator[Path]:
    """A folder that whoever has no privileges can reach. Any pytest that starts closes those of all others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def test_a_folder_that_becomes_read_only(anybodys: Path) -> None:
    """Lightning says nothing of its own save (2.6) or ends the run; the suite warns. What was there is whole, nothing
    is half written, and a resume goes on."""
    folder = anybodys / "checkpoints"
    folder.mkdir()
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, -1)  # who closes it is its owner
    unbroken = fit(None, anybodys, around=_callbacks(anybodys / "unbroken")).outcome()
    refused = r"beside a checkpoint,? could not be written \(\[Errno 13\] Permission denied: '.*checkpoints/"
    with _without_privileges(), contextlib.suppress(PermissionError), pytest.warns(UserWarning, match=refused):
        fit(None, anybodys, around=[_ReadOnlyFrom(5, folder), *_callbacks(folder)])
    before = sorted(path.name for path in folder.iterdir())
    assert [name for name in before if name.startswith("epoch=")] == [
        f"epoch=0-step={step}.ckpt{suffix}" for step in (2, 4) for suffix in ("", ".ranks")
    ]
    assert not [name for name in before if "part" in name or "tmp" in name]
    for path in folder.glob("*.ckpt"):
        torch.load(path, weights_only=True)
    folder.chmod(0o777)
    resumed = fit(None, anybodys, around=_callbacks(folder), resume=folder / "epoch=0-step=4.ckpt")
    assert resumed.trainer.global_step == STEPS
    assert torch.equal(resumed.outcome()["parameters"]["head.weight"], unbroken["parameters"]["head.weight"])


class _Wide(L.LightningModule):
    """4 MB of weights, so that most of the time of a step goes into saving."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(1024, 1024)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.head(batch).square().mean()

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(64, 1024), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def _newest(folder: Path) -> Path | None:
    """The newest of Lightning's own checkpoints that loads; Lightning writes them in place, so that one may not."""
    found = sorted(folder.glob("step=*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")), reverse=True)
    for path in found:
        try:
            torch.load(path, weights_only=True)
        except Exception:
            continue
        return path
    return None


def _save_at_each_step(folder: Path) -> None:
    callbacks = _callbacks(folder)[:-1]
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    harness_fit(_Wide(), *callbacks, saver, max_steps=-1, max_epochs=-1, ckpt_path=_newest(folder))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_while_it_saves(tmp_path: Path) -> None:
    """Ten times `kill -9`: whatever has its final name is whole, and the run goes on from it."""
    moments = random.Random(0)
    steps = [0]
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-m", __name__, str(tmp_path)], start_new_session=True)
        try:
            begin, before = time.monotonic(), len(list(tmp_path.glob("step=*.ckpt")))
            while len(list(tmp_path.glob("step=*.ckpt"))) < before + 2:
                assert process.poll() is None
                assert time.monotonic() < begin + 120
                time.sleep(0.01)
            time.sleep(moments.random())
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for path in [*tmp_path.glob("ema-*.ckpt"), *tmp_path.glob("average-*.ckpt"), *tmp_path.glob("*.ranks/*")]:
            if not path.name.endswith(".part"):  # the next save writes it anew
                torch.load(path, weights_only=True)
        newest = _newest(tmp_path)
        assert newest is not None
        steps.append(torch.load(newest, weights_only=True)["global_step"])
        for path in tmp_path.glob("step=*.ckpt"):  # keeps the folder small
            if path != newest:
                path.unlink()
                path.with_name("average-" + path.name).unlink(missing_ok=True)
                path.with_name("ema-" + path.name).unlink(missing_ok=True)
    assert steps == sorted(set(steps))  # each attempt got further


if __name__ == "__main__":
    _save_at_each_step(Path(sys.argv[1]))
