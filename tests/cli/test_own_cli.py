"""A LightningCLI of the user's own: what it knows by short name, and from when on."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness.processes import environment
from harness.runs import QUIET

CLI = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
cli = LightningCLI(BoringModel, save_config_callback=None)
print(*(type(each).__name__ for each in (cli.trainer.strategy, *cli.trainer.callbacks)))
"""
STRATEGY, CALLBACK = "--trainer.strategy=ddp_bf16", "--trainer.callbacks+=ZClip"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("imports", "options", "words"),
    [
        ("import lightning_eff", [STRATEGY, CALLBACK], "CompressedDDPStrategy ZClip"),
        # The class's path imports the package, before there is a Trainer.
        ("", [STRATEGY, "--trainer.callbacks+=lightning_eff.callbacks.ZClip"], "CompressedDDPStrategy ZClip"),
        ("", [STRATEGY], "invalid strategy name: `strategy='ddp_bf16'`"),
        ("", [CALLBACK], "ZClip"),
    ],
)
def test_what_is_known(tmp_path, imports, options, words):
    (tmp_path / "train.py").write_text(imports + CLI)
    quiet = [f"--trainer.{name}={value}".lower() for name, value in QUIET.items()]
    command = [sys.executable, "train.py", "fit", "--trainer.fast_dev_run=1", "--trainer.accelerator=cpu", *quiet]
    run = subprocess.run(
        [*command, "--trainer.devices=1", *options], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert words in run.stdout + run.stderr
    assert (run.returncode == 0) == words.startswith("Compressed")
