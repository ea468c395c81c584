"""Ranks that train the example GPT over a shaped link, one fit after the other, in processes that stay.

    with Ranks(2) as ranks:
        for report in ranks.fit(Fit("arc_topk 0.2"), mbit=50): ...

Every rank is a process in a network namespace of its own (harness/network.py), on one core. A fit is set up
and warmed up over the free link, which is shaped when every rank stands before the first batch that counts: DDP's
broadcast of the weights costs no time. Seconds are taken from batch to batch, bytes from the counters of the interface.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import Self

from benchmarks import gpt
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPTConfig
from examples.gpt.module import GPTModule
from harness.network import DEVICE, Network
from harness.runs import quiet_lightning
from lightning_eff.strategies import BF16, FP16, ArcTopK, CompressedDDPStrategy, Int8, PowerSGD, RandK, TopK

SIZES = {
    "5m": GPTConfig(block_size=256, n_layer=6, n_head=4, n_embd=256),
    "20m": GPTConfig(block_size=256, n_layer=6, n_head=8, n_embd=512),
}
_MARK = "@@ "  # before a line to the parent: libraries print as well


@dataclass(frozen=True)
class Fit:
    """One training of every rank.

    Args:
        arm: Name in `ARMS`.
        size: Name in `SIZES`.
        steps: Measured steps, after `warmup` that are not (at the second one DDP arranges its buckets anew).
        warmup: Steps before them, over the free link.
        batch_size: Sequences of 256 bytes, a rank.
        lr: Learning rate, constant after 20 steps.
        seed: Of the weights and the data.
        val_every: Validate every so many steps (0: never), on `val_windows` windows, the same for every arm.
        val_windows: Windows of 256 bytes, over all ranks.
        target: Stop at the first validation with a loss this low.
    """

    arm: str
    size: str = "5m"
    steps: int = 5
    warmup: int = 2
    batch_size: int = 5
    lr: float = 1e-3
    seed: int = 0
    val_every: int = 0
    val_windows: int = 64
    target: float | None = None


# --- ways to reduce the gradients -------------------------------------------------------------------------------------


class _Hooked(DDPStrategy):
    """DDP with one of PyTorch's own communication hooks, which Lightning registers on CUDA only."""

    def __init__(self, hook: Callable[..., Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._hook = hook

    def _register_ddp_hooks(self) -> None:
        self.model.register_comm_hook(None, self._hook)  # type: ignore[union-attr, operator]


def _noop(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _torch_fp16() -> DDPStrategy:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    return _Hooked(fp16_compress_hook)


ARMS: dict[str, Callable[[], DDPStrategy]] = {
    "compute alone": lambda: _Hooked(_noop),
    "dense": DDPStrategy,
    "torch fp16": _torch_fp16,
    "fp16": lambda: CompressedDDPStrategy(FP16()),
    "bf16": lambda: CompressedDDPStrategy(BF16()),
    "int8": lambda: CompressedDDPStrategy(Int8()),
    "powersgd 4": lambda: CompressedDDPStrategy(PowerSGD(rank=4)),
    "topk 0.2": lambda: CompressedDDPStrategy(TopK(ratio=0.2)),
    "randk 0.2": lambda: CompressedDDPStrategy(RandK(ratio=0.2)),
    "arc_topk 0.2": lambda: CompressedDDPStrategy(ArcTopK(ratio=0.2)),
    "arc_topk 0.05": lambda: CompressedDDPStrategy(ArcTopK(ratio=0.05)),
    "arc_topk 0.2 ef14": lambda: CompressedDDPStrategy(ArcTopK(ratio=0.2, error_feedback="ef14")),
    "arc_topk 0.2 ef21": lambda: CompressedDDPStrategy(ArcTopK(ratio=0.2, error_feedback="ef21")),
    "arc_topk 0.2 ef21m": lambda: CompressedDDPStrategy(ArcTopK(ratio=0.2, error_feedback="ef21m")),
}


# --- the parent -------------------------------------------------------------------------------------------------------


class Ranks:
    """Worker processes, one a rank, that fit on demand. A context manager.

    Args:
        count: Number of ranks.
        loopback: All ranks on one machine, over its loopback device, instead of a machine each.
    """

    def __init__(self, count: int, loopback: bool = False) -> None:
        self.count = count
        self.loopback = loopback
        self.network = Network(1 if loopback else count)
        self._workers: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        self.network.__enter__()
        for rank in range(self.count):
            env = {"OMP_NUM_THREADS": "1", "BENCHMARK_DEVICE": DEVICE}
            if self.loopback:
                env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.count))
                env |= dict(LOCAL_WORLD_SIZE=str(self.count), GROUP_RANK="0", MASTER_ADDR="127.0.0.1")
                env |= dict(GLOO_SOCKET_IFNAME="lo", BENCHMARK_DEVICE="lo")
            where = 0 if self.loopback else rank
            command = [sys.executable, "-m", "benchmarks.slow_link"]
            self._workers.append(
                self.network.popen(where, command, env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.network.__exit__()

    def fit(
        self, fit: Fit, mbit: float | None, on_loss: Callable[[dict[str, float]], None] | None = None
    ) -> dict[str, Any]:
        """Train on every rank; what rank 0 reports (see `_Clock.report`). Each of its validations goes to `on_loss`."""
        for worker in self._workers:
            self._tell(worker, asdict(fit))
        self._hear("ready")
        self.network.shape(mbit)
        for worker in self._workers:
            self._tell(worker, {"go": True})
        report = self._hear("done", on_loss)
        self.network.shape(None)
        return report

    def _tell(self, worker: subprocess.Popen[str], message: dict[str, Any]) -> None:
        worker.stdin.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
        worker.stdin.flush()  # type: ignore[union-attr]

    def _hear(self, event: str, on_loss: Callable[[dict[str, float]], None] | None = None) -> dict[str, Any]:
        """Wait until every rank has said `event`; what rank 0 said with it."""
        first, *others = self._workers
        heard = self._hear_one(first, event, on_loss)
        for worker in others:
            self._hear_one(worker, event, None)
        return heard

    def _hear_one(
        self, worker: subprocess.Popen[str], event: str, on_loss: Callable[[dict[str, float]], None] | None
    ) -> dict[str, Any]:
        for line in worker.stdout:  # type: ignore[union-attr]
            if line.startswith(_MARK):
                message: dict[str, Any] = json.loads(line.removeprefix(_MARK))
                if message["event"] == event:
                    return message
                if on_loss is not None:
                    on_loss(message)
        raise RuntimeError(f"a rank has ended with exit code {worker.wait()}")


# --- the worker -------------------------------------------------------------------------------------------------------


class _Clock(L.Callback):
    """Seconds and bytes of every step, and of its parts; the validation's are left out."""

    def __init__(self, fit: Fit, device: str, ranks_on_device: int) -> None:
        self.fit = fit
        self._counters = [Path(f"/sys/class/net/{device}/statistics/{name}_bytes") for name in ("tx", "rx")]
        self._share = ranks_on_device
        self.steps: list[dict[str, float]] = []
        self._paused = self._now = 0.0

    def _bytes(self) -> list[float]:
        return [int(path.read_text()) / self._share for path in self._counters]

    def _mark(self) -> float:
        return time.perf_counter() - self._paused

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.steps:
            self._end_step()
        if len(self.steps) == self.fit.warmup:
            _say("ready")
            json.loads(sys.stdin.readline())
        self.steps.append({"start": self._mark(), **dict(zip(("sent", "received"), self._bytes(), strict=True))})

    def _end_step(self) -> None:
        step = self.steps[-1]
        sent, received = self._bytes()
        step |= {"end": self._mark(), "sent": sent - step["sent"], "received": received - step["received"]}

    def on_before_backward(self, *_: Any) -> None:
        self.steps[-1]["forward"] = self._mark()

    def on_after_backward(self, *_: Any) -> None:
        self.steps[-1]["backward"] = self._mark()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps[-1]["optimizer"] = self._mark()

    def on_validation_start(self, *_: Any) -> None:
        self._now = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        loss = float(trainer.callback_metrics["val_loss"])
        self._paused += time.perf_counter() - self._now
        seconds = self._mark() - self.steps[0]["start"]
        _say("loss", step=trainer.global_step, loss=loss, seconds=seconds)
        if self.fit.target is not None and loss <= self.fit.target:
            trainer.should_stop = True  # the same on all ranks: the loss is reduced

    def on_train_end(self, *_: Any) -> None:
        self._end_step()

    def report(self) -> dict[str, Any]:
        """Lists with an entry for each measured step."""
        parts = self.steps[self.fit.warmup :]
        return {
            "step_s": [step["end"] - step["start"] for step in parts],
            "forward_s": [step["forward"] - step["start"] for step in parts],
            "backward_s": [step["backward"] - step["forward"] for step in parts],
            "optimizer_s": [step["optimizer"] - step["backward"] for step in parts],
            "sent": [step["sent"] for step in parts],
            "received": [step["received"] for step in parts],
        }


def _say(event: str, **values: Any) -> None:
    print(_MARK + json.dumps({"event": event, **values}), flush=True)


def train(fit: Fit, data: TextDataModule, device: str) -> dict[str, Any]:
    """One fit of this rank: the clock's report."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    world = int(os.environ["WORLD_SIZE"])
    L.seed_everything(fit.seed, verbose=False)
    model = GPTModule(SIZES[fit.size], lr=fit.lr, schedule="constant", warmup_steps=20, fused=True)
    clock = _Clock(fit, device, local)
    gpt.train(
        model,
        data,
        clock,
        accelerator="cpu",
        devices=local,
        num_nodes=world // local,
        strategy=ARMS[fit.arm](),
        max_steps=fit.warmup + fit.steps,
        val_check_interval=fit.val_every or None,
        limit_val_batches=1.0 if fit.val_every else 0,
    )
    return {**clock.report(), "parameters": gpt.parameters(model)}


def main() -> None:
    """Fit whatever the parent asks for, until it closes the pipe."""
    torch.set_num_threads(1)
    quiet_lightning()
    device = os.environ["BENCHMARK_DEVICE"]
    for line in sys.stdin:
        fit = Fit(**json.loads(line))
        # Validation batches of the training's size: the parts of a rank are the same in every fit.
        data = TextDataModule(block_size=256, batch_size=fit.batch_size, val_windows=fit.val_windows, seed=fit.seed)
        _say("done", **train(fit, data, device))


if __name__ == "__main__":
    main()
