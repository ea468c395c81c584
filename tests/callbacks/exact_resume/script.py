"""A user's training script: shuffled data with noise in workers, dropout, accumulation.

Arguments: a folder; and "exact", "plain", or the id of a row of the contract's table, whose callback trains beside.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_eff.callbacks import ExactResume
from tests.callbacks.exact_resume.runs import Net, Noisy, loader
from tests.suite.runs import fit
from tests.suite.table import ROWS


def main(folder: str, exact: bool) -> None:
    torch.set_num_threads(1)
    L.seed_everything(int(os.environ.get("RANK", 0)), verbose=False)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        accumulate_grad_batches=2,
        val_check_interval=3,
        default_root_dir=folder,
        callbacks=[*([ExactResume()] if exact else []), ModelCheckpoint(every_n_train_steps=2, save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Net(), loader(2, partial(Noisy, 22 * ranks)), loader(0, partial(Noisy, 8)))


def beside(folder: str, name: str) -> None:
    """Another callback."""
    L.seed_everything(0, verbose=False)
    row = next(row for row in ROWS if row.id == name)
    fit(row, Path(folder), model="drawn", around=[] if row.callback is ExactResume else [ExactResume()])


if __name__ == "__main__":
    if sys.argv[2] in ("exact", "plain"):
        main(sys.argv[1], sys.argv[2] == "exact")
    else:
        beside(*sys.argv[1:])
