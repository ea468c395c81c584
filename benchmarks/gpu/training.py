"""Parts with a Trainer: a GPT's step with each callback against none, where the host waits, and snapshots."""

from __future__ import annotations

import collections
import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

from benchmarks.gpt import constant, parameters
from benchmarks.gpu.report import DEVICE, SMALL, Report
from examples.gpt.model import GPTConfig
from harness.operators import OperatorCounter
from harness.runs import quiet_trainer
from harness.timing import now
from lightning_eff.callbacks import (
    EMA,
    MISA,
    AsyncCheckpoint,
    CheckpointAveraging,
    ExactResume,
    GradES,
    GradientStats,
    ModelSurgery,
    Preemption,
    RunHealth,
    SpectralAlignmentMonitor,
    TrainingGuard,
    ZClip,
)
from lightning_eff.layers import CR, MoC, SkipV1
from lightning_eff.training.host_copy import HostCopy
from lightning_eff.training.snapshots import Place, SnapshotWindow

# The large one has the 121 M parameters of 17 of GPT-2's blocks: its vocabulary is that of bytes.
GPT, BATCH = (GPTConfig(32, 2, 2, 32), 2) if SMALL else (GPTConfig(512, 17, 12, 768), 16)

VARIANTS: dict[str, Callable[[], list[L.Callback]]] = {
    "none": list,
    "ZClip": lambda: [ZClip()],
    "ZClip skip": lambda: [ZClip(max_grad_norm=None, nonfinite="skip")],
    "GradES, each step": lambda: [GradES(every_n_steps=1, heat_map=False)],
    "GradES": lambda: [GradES(heat_map=False)],
    "SpectralAlignmentMonitor, every 5 steps": lambda: [SpectralAlignmentMonitor(every_n_steps=5, heat_map=False)],
    "EMA": lambda: [EMA(save="none")],
    "CheckpointAveraging, every 5 steps": lambda: [CheckpointAveraging(window=2, every_n_steps=5, save="none")],
    "TrainingGuard, every 10 steps": lambda: [TrainingGuard(every_n_steps=10, keep=2, margin=3, read_every_n_steps=5)],
    "TrainingGuard, default rules": lambda: [TrainingGuard(rules="default", action="warn")],
    "MISA": lambda: [MISA(first_every_n_steps=50, heat_map=False)],
    "Preemption": lambda: [Preemption(signals=["SIGUSR2"])],
    "RunHealth": lambda: [RunHealth(hang_seconds=None)],
    "GradientStats, each step": lambda: [GradientStats(every_n_steps=1)],
    "ExactResume": lambda: [ExactResume()],
    "MoC": lambda: [ModelSurgery(feed_forward=MoC(new_weights=True))],
    "SkipV1": lambda: [ModelSurgery(attention=SkipV1())],
    "CR, recomputed": lambda: [ModelSurgery(linear=CR(recompute=True))],
}
MONITORS = ("SpectralAlignmentMonitor", "EMA", "CheckpointAveraging", "TrainingGuard", "Preemption", "RunHealth",
            "GradientStats", "ExactResume")  # fmt: skip


class Clock(L.Callback):
    """The mean time of a step, behind a warm-up; it waits for the device twice."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.first, self.last = warmup, warmup + steps
        self.step_ms = self.host_ms = self.loss = float("nan")

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        if trainer.global_step == self.first:
            self._start = now()
        if trainer.global_step == self.last:
            self.host_ms = 1e3 * (time.perf_counter() - self._start) / (self.last - self.first)
            self.step_ms = 1e3 * (now() - self._start) / (self.last - self.first)
            self.loss = float(outputs["loss"])


class Losses(L.Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def train(callbacks: list[L.Callback], steps: int, **arguments: Any) -> L.Trainer:
    """The GPT on random bytes, the same in each run."""
    torch.manual_seed(0)
    data = torch.randint(256, (BATCH * 64, GPT.block_size + 1))
    module = constant(GPT, lr=1e-4)
    defaults: dict[str, Any] = {
        "precision": "bf16-mixed",
        "max_steps": steps,
        "log_every_n_steps": 10_000,
        "devices": 1,
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        defaults |= {"accelerator": "cpu" if SMALL else "gpu", "default_root_dir": folder, "limit_val_batches": 0}
        trainer = quiet_trainer(*callbacks, **(defaults | arguments))
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=BATCH))
    return trainer


def steps(report: Report) -> None:
    """Each callback's step against none, in turns; then all together in other precisions."""
    warmup, measured, turns = (2, 3, 1) if SMALL else (8, 24, 2)
    best: dict[str, Clock] = {}
    for turn in range(turns):
        for name, build in VARIANTS.items():
            with report.guarded(name):
                if not SMALL:
                    torch.cuda.reset_peak_memory_stats()
                clock = Clock(warmup, measured)
                trainer = train([*build(), clock], warmup + measured)
                best[name] = min(clock, best.get(name, clock), key=lambda each: each.step_ms)
                none = best["none"]
                # One that only watches ends with the same loss, up to the order of sums on a GPU.
                tolerance = 1e-2 * abs(none.loss) if name.startswith(MONITORS) else 0.3 * abs(none.loss)
                report.row(name, abs(clock.loss - none.loss) <= tolerance, turn=turn, step_ms=clock.step_ms,
                           host_ms=clock.host_ms, loss=clock.loss,
                           over_none_percent=100 * (clock.step_ms / none.step_ms - 1),
                           peak_gb=0.0 if SMALL else torch.cuda.max_memory_allocated() / 1e9,
                           million_parameters=parameters(trainer.lightning_module) / 1e6)  # fmt: skip
    for precision in ("bf16-true",) if SMALL else ("16-mixed", "bf16-true"):
        with report.guarded(f"together in {precision}"):
            names = ("ZClip", "GradES", "SpectralAlignmentMonitor, every 5 steps", "EMA")
            callbacks = [callback for name in names for callback in VARIANTS[name]()]
            trainer = train(callbacks, 12, precision=precision)
            finite = all(bool(p.isfinite().all()) for p in trainer.lightning_module.parameters())
            report.row(f"together in {precision}", finite, steps=trainer.global_step)


def syncs(report: Report) -> None:
    """How often the host waits in ten steps that are not logged, and where: no more than without the callback."""
    # On the CPU what is read late counts too: there the steps lie before half time, from where GradES decides.
    first, last, steps = (2, 4, 12) if SMALL else (14, 24, 24)
    without = 0
    for name, build in VARIANTS.items():
        if (name == "ZClip skip" and SMALL) or name.startswith("CR"):
            continue  # the norm is read without a fused optimizer; CR looks once in 16 steps: their cards say so
        with report.guarded(name):
            detector = _OnCpu(first, last) if SMALL else _OnGpu(first, last)
            train([*build(), detector], steps)
            total = detector.total()
            without = total if name == "none" else without
            report.row(name, total <= without, waits=total, without=without, where=detector.where())


class _OnGpu(L.Callback):
    """torch's own detector, with the line that asked."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._stack = contextlib.ExitStack()
        self._caught: list[warnings.WarningMessage] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.first:
            self._caught = self._stack.enter_context(warnings.catch_warnings(record=True))  # type: ignore[assignment]
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
        if trainer.global_step == self.last - 1:
            self.on_train_end()

    def on_train_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._stack.close()

    on_exception = on_train_end

    def _lines(self) -> collections.Counter[str]:
        return collections.Counter(
            f"{Path(each.filename).parent.name}/{Path(each.filename).name}:{each.lineno}"
            for each in self._caught
            if "synchroniz" in str(each.message) and "prototype" not in str(each.message)
        )

    def total(self) -> int:
        return self._lines().total()

    def where(self) -> dict[str, int]:
        return dict(self._lines().most_common(5))


class _OnCpu(L.Callback):
    """The harness's counter, which stands for it on the CPU."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.counter = first, last, OperatorCounter()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.first:
            self.counter.__enter__()
        if trainer.global_step == self.last - 1:
            self.counter.__exit__(None, None, None)

    def total(self) -> int:
        return self.counter.host_syncs

    def where(self) -> dict[str, int]:
        return dict(self.counter.waits)


def snapshots(report: Report) -> None:
    """Copies are of their time, of a busy device too, and taking one does not wait."""
    model = constant(GPT).to(DEVICE)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    first = next(iter(tensors))
    places: tuple[Place, ...] = ("cpu", "model", "disk")
    for place in places:
        with tempfile.TemporaryDirectory() as folder, report.guarded(place):
            window = SnapshotWindow(2, place)
            window.folder = folder
            host: list[float] = []
            for step in range(4):
                now()
                start = time.perf_counter()
                window.take(step, tensors)
                host.append(1e3 * (time.perf_counter() - start))
            right, busy = [], 0.0
            for step in (5, 6, 7):
                expected = tensors[first].flatten()[0].item()
                if not SMALL:
                    torch.cuda._sleep(400_000_000)  # some 0.2 s
                start = time.perf_counter()
                window.take(step, tensors)
                busy = 1e3 * (time.perf_counter() - start)
                tensors[first].add_(1.0)
                right.append(window.read()[-1][first].flatten()[0].item() == expected)
            waits = not SMALL and place != "disk" and busy > 100  # mapped files are not pinned
            figures = (
                {} if SMALL else {"pinned_gb": torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) / 1e9}
            )
            report.row(place, all(right) and not waits, gb=size / 1e9, counted_gb=window.bytes_of(tensors) / 1e9,
                       first_ms=host[0], later_ms=host[3], behind_busy_device_ms=busy, **figures)  # fmt: skip
    with report.guarded("AsyncCheckpoint"):
        _async_checkpoint(report)
    with report.guarded("HostCopy"):
        x = torch.arange(1000.0, device=DEVICE)
        if not SMALL:
            torch.cuda._sleep(200_000_000)
        start = time.perf_counter()
        copy = HostCopy(x)
        x.zero_()
        milliseconds = 1e3 * (time.perf_counter() - start)
        report.row("HostCopy", copy.read().tolist() == list(range(1000)), queued_ms=milliseconds)


class _Save(L.Callback):
    """Saves twice, and remembers what the second file should hold, and how long the loop was held up."""

    def __init__(self, path: Path) -> None:
        self.path, self.ms = path, float("nan")
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step not in (3, 6):
            return
        self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        start = now()
        trainer.save_checkpoint(self.path)
        self.ms = 1e3 * (time.perf_counter() - start)


def _async_checkpoint(report: Report) -> None:
    """The file holds its step's weights, though training goes on meanwhile; Lightning's own save beside it."""
    for name, callbacks in {"Lightning's save": [], "AsyncCheckpoint": [AsyncCheckpoint()]}.items():
        with tempfile.TemporaryDirectory() as folder:
            save = _Save(Path(folder) / "step.ckpt")
            train([*callbacks, save], 9)
            found = torch.load(save.path, map_location=DEVICE, weights_only=True)["state_dict"]
            right = found.keys() == save.weights.keys() and all(map(torch.equal, found.values(), save.weights.values()))
            report.row(name, right, stall_ms=save.ms, gb=save.path.stat().st_size / 1e9)
