"""The same curves in another logger: CSV, MLflow or W&B, the last two offline, in files.

python -m examples.scripts.loggers csv | mlflow | wandb
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Literal

import lightning as L
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from examples.digits import DigitsDataModule, DigitsModule
from lightning_eff.callbacks import EMA, ZClip

Kind = Literal["csv", "mlflow", "wandb"]


def logger(kind: Kind, folder: str) -> Logger:
    """MLflow and W&B need their packages; neither needs a server here."""
    if kind == "csv":
        return CSVLogger(folder, name=None)
    if find_spec(kind) is None:
        raise ModuleNotFoundError(f"{kind} cannot be found. It comes with: pip install {kind}", name=kind)
    if kind == "mlflow":
        return MLFlowLogger("digits", tracking_uri=f"sqlite:///{folder}/mlflow.db")  # `mlflow ui` reads it
    return WandbLogger(project="digits", save_dir=folder, offline=True)  # `wandb sync` sends it later


def main(kind: Kind = "csv", steps: int = 230, folder: str = "logs/loggers") -> L.Trainer:
    """Train with scalars in that logger; pictures and the custom dashboard go to TensorBoard alone."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        max_steps=steps, accelerator="auto", devices=1, callbacks=[ZClip(), EMA(half_life=10)],
        logger=logger(kind, folder), log_every_n_steps=10, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(DigitsModule(), datamodule=DigitsDataModule())
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:2])  # type: ignore[arg-type]
