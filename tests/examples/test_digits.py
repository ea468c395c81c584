"""The digits example: its accuracy, and its command line."""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI

from examples.digits import DigitsDataModule, DigitsModule

CONFIG = Path(__file__).parents[2] / "examples" / "digits" / "config.yaml"


def fit(epochs: int) -> L.Trainer:
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(DigitsModule(), datamodule=DigitsDataModule())
    return trainer


def test_accuracy_and_repeatability():
    first, second = fit(3), fit(3)
    assert first.callback_metrics["val_acc"] > 0.95
    assert torch.equal(first.callback_metrics["train_loss"], second.callback_metrics["train_loss"])


def test_train_and_validation_images_are_all_the_images_once():
    data = DigitsDataModule()
    data.setup()
    train_indices, val_indices = set(data.train_data.indices), set(data.val_data.indices)
    assert train_indices.isdisjoint(val_indices)
    assert train_indices | val_indices == set(range(1797))


def test_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])  # pytest's own arguments, which Lightning would warn about
    overrides = f"""
        --trainer.accelerator cpu --trainer.max_epochs 1 --trainer.limit_train_batches 3
        --trainer.log_every_n_steps 1 --trainer.enable_progress_bar false --trainer.enable_model_summary false
        --trainer.logger.save_dir {tmp_path} --model.channels 4
    """
    cli = LightningCLI(args=["fit", "--config", str(CONFIG), *overrides.split()])
    assert cli.trainer.global_step == 3
    assert {"train_loss", "val_loss", "val_acc", "zclip/grad_norm"} <= set(cli.trainer.callback_metrics)
