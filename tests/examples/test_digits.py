"""The digits example: its accuracy, and its command line."""

import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI

from examples.digits import DigitsDataModule, DigitsModule
from harness import REPOSITORY
from harness.runs import fit

CONFIG = REPOSITORY / "examples" / "digits" / "config.yaml"


def trained() -> L.Trainer:
    L.seed_everything(0, verbose=False)
    return fit(DigitsModule(), data=DigitsDataModule(), max_epochs=3, num_sanity_val_steps=0)


def test_accuracy_and_repeatability():
    first, second = trained(), trained()
    assert first.callback_metrics["val_acc"] > 0.95
    assert torch.equal(first.callback_metrics["train_loss"], second.callback_metrics["train_loss"])


def test_train_and_validation_images_are_all_the_images_once():
    data = DigitsDataModule()
    data.setup()
    train_indices, val_indices = set(data.train_data.indices), set(data.val_data.indices)
    assert train_indices.isdisjoint(val_indices)
    assert train_indices | val_indices == set(range(1797))


@pytest.mark.needs("jsonargparse")
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
