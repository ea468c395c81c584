"""A small run that is ended from outside: in this process, or as a script of its own under any launcher."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_eff.callbacks import Preemption

BATCHES, VAL_BATCHES = 12, 4


class Resumable(DataLoader):
    """Goes on behind the batches that were given out when a checkpoint was saved."""

    given = first = 0
    asked: Any = None  # called for each batch

    def __iter__(self) -> Any:
        self.given, self.first = self.first, 0
        for batch in list(super().__iter__())[self.given :]:
            if self.asked is not None:
                self.asked()
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["given"]


class Net(nn.Sequential):
    """With a forward pass of its own: torch does not compile those of its containers."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self:
            inputs = layer(inputs)
        return inputs


class Model(L.LightningModule):
    """Notes its batches and its validations; no dropout, no shuffling: a resume is exact by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.seen: list[int] = []
        self.validated: list[tuple[int, float]] = []
        self.hooks = 0
        self.asked: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch_idx)
        return self.net(batch).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.hooks += 1

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.net(batch).square().mean())

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append((self.global_step, float(self.trainer.callback_metrics["val"])))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"},
        }

    def train_dataloader(self) -> DataLoader:
        loader = Resumable(torch.linspace(-1, 1, BATCHES * 2 * 4).view(-1, 4), batch_size=2)
        loader.asked = self.asked
        return loader

    def val_dataloader(self) -> DataLoader:
        return DataLoader(torch.linspace(-2, 2, VAL_BATCHES * 4).view(-1, 4), batch_size=1)


class Act(L.Callback):
    """Does something in a hook, at its n-th call, on one rank or on all.

    ``"data"`` stands for the call of the loader for a batch, ``"compile"`` for the compiler's backend, ``"sanity"`` for
    a batch of the sanity check.
    """

    def __init__(self, hook: str, at: int, act: Any, rank: int | None = None) -> None:
        self.at, self.act, self.rank, self.calls, self.hook = at, act, rank, 0, hook
        if hook not in ("data", "compile"):
            setattr(self, "on_validation_batch_start" if hook == "sanity" else hook, self._called)

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        if self.hook == "data":
            module.asked = lambda: self._called(trainer)
        elif self.hook == "compile":

            def backend(graph: Any, inputs: Any) -> Any:
                self._called(trainer)
                return graph.forward

            module.net.compile(backend=backend)

    def _called(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.sanity_checking != (self.hook == "sanity") and self.hook != "on_sanity_check_start":
            return
        self.calls += 1
        if self.calls == self.at and self.rank in (None, trainer.global_rank):
            self.act()


class Collectives(L.Callback):
    """Counts what a run asks of ``torch.distributed`` in its steps."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._inner = {name: getattr(torch.distributed, name) for name in ("broadcast", "all_reduce", "barrier")}

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        for name in self._inner:
            setattr(torch.distributed, name, self._counting(name))

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        for name, inner in self._inner.items():
            setattr(torch.distributed, name, inner)

    def _counting(self, name: str) -> Any:
        inner = self._inner[name]

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] = self.counts.get(name, 0) + 1
            return inner(*args, **kwargs)

        return counted


def send(name: str = "SIGTERM") -> None:
    os.kill(os.getpid(), getattr(signal, name))


def trainer(folder: Path, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    options: dict[str, Any] = dict(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        val_check_interval=4,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    own = [] if any(isinstance(c, ModelCheckpoint) for c in callbacks) else [ModelCheckpoint(folder, save_top_k=0)]
    return L.Trainer(**{**options, **kwargs}, callbacks=[*callbacks, *own])


def main(settings: dict[str, Any]) -> None:
    """Run as a script: what is to happen comes as JSON; what has happened is written beside the checkpoints."""
    torch.set_num_threads(1)
    folder = Path(settings["folder"])
    acts = [
        Act(hook, at, {"signal": send, "fail": _fail, "sleep": lambda: time.sleep(3)}[what], rank)
        for hook, at, what, rank in settings["acts"]
    ]
    L.seed_everything(1, verbose=False)
    model, counter = Model(), Collectives()
    callback = None if settings["preemption"] is None else Preemption(**settings["preemption"])
    saver = [ModelCheckpoint(folder, every_n_train_steps=settings["saves"])] if settings.get("saves") else []
    run = trainer(folder, *acts, counter, *([callback] if callback else []), *saver, **settings["trainer"])
    try:
        run.fit(model, ckpt_path=settings.get("ckpt_path"))
    finally:
        state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
        (folder / f"rank{run.global_rank}.json").write_text(
            json.dumps(
                {
                    "step": run.global_step,
                    "seen": model.seen,
                    "state": state,
                    "saved": callback and callback.saved,
                    "collectives": counter.counts,
                }
            )
        )


def _fail() -> None:
    raise ZeroDivisionError("a bug")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
