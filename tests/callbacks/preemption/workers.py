"""A run whose batches come from workers, as a script of its own that a signal to all its processes may reach."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_eff.callbacks import ExactResume, Preemption
from tests.callbacks.preemption.runs import Model, trainer


class Data(Dataset):
    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), index / len(self))


def note(worker: int) -> None:
    """The user's own function of a worker's start."""
    Path(sys.argv[1], f"worker{worker}").touch()


class Loads(Model):
    """Says when it has made a step, and ends as it is told to in step 8."""

    def __init__(self, folder: Path, end: str, context: str | None) -> None:
        super().__init__()
        self.folder, self.end, self.context = folder, end, context

    def _loader(self, **more: Any) -> DataLoader:
        return DataLoader(Data(), batch_size=4, num_workers=2, multiprocessing_context=self.context, **more)

    def train_dataloader(self) -> DataLoader:
        return self._loader(worker_init_fn=note, persistent_workers=True)

    def val_dataloader(self) -> DataLoader:
        return self._loader()

    def on_train_batch_end(self, *args: Any) -> None:
        (self.folder / "steps").write_text(str(self.global_step))
        if self.global_step == 8 and self.end != "signal":
            if self.end == "fail":
                raise ZeroDivisionError("a bug")
            self.trainer.should_stop = True
        time.sleep(0.02)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, end, context, *callbacks = sys.argv[1:]
    known = {"Preemption": Preemption(signals=["SIGTERM", "SIGUSR1"]), "ExactResume": ExactResume()}
    L.seed_everything(1, verbose=False)
    validates = int(context == "fork")  # others take long to start
    options = {"num_sanity_val_steps": validates, "limit_val_batches": 2 * validates, "val_check_interval": 50}
    run = trainer(Path(folder), *(known[name] for name in callbacks), max_epochs=50, **options)
    run.fit(Loads(Path(folder), end, context))
