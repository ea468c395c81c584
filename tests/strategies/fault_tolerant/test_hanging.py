"""A replica that hangs, under `lightning-eff launch`, with RunHealth: it ends, is restarted, and the others go on."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from harness import REPOSITORY, json_lines
from harness.processes import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft has wheels for Linux x86-64 only"),
]

STEPS = 150
HANGS_AT = 60
SCRIPT = """
import json, os, sys, time
import lightning as L
import torch
from torch.utils.data import DataLoader
from lightning_eff.callbacks import FaultInjector, RunHealth

folder, steps, at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
me = int(os.environ["REPLICA_GROUP_ID"])


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        return self.net(batch).square().mean()

    def on_train_batch_end(self, *_):
        line = {"time": time.time(), "step": self.trainer.global_step, "weights": self.net.weight.tolist()}
        with open(f"{folder}/steps-{me}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


L.seed_everything(3, verbose=False)
hang = [FaultInjector("hang", at)] if me == 1 and os.environ["LIGHTNING_EFF_RESTARTS"] == "0" else []
health = RunHealth(hang_seconds=2.0, action="abort", folder=f"{folder}/stacks-{me}")
L.Trainer(
    strategy="ddp_ft", devices=1, accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[health, *hang],
).fit(Model(), DataLoader(torch.randn(480, 4), 4))
"""


def test_a_replica_that_hangs_ends_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "lightning_eff", "launch", "--replicas", "3", "--grace", "60"]
    command += [str(tmp_path / "train.py"), str(tmp_path), str(STEPS), str(HANGS_AT)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=250)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert text.count("RunHealth: no sign of life for") == 1, text
    named = [line for line in text.splitlines() if "does not go on; it stands in step" in line]
    assert len(named) == 1, text
    assert f"it stands in step {HANGS_AT}, phase 'FaultInjector'" in named[0]
    assert text.count("[replica 1] ended with exit status 75: restart 1 of") == 1, text
    assert not any(f"[replica {other}] ended with" in text for other in (0, 2))
    assert [path.name for path in tmp_path.glob("stacks-*")] == ["stacks-1"]
    ends = [json_lines.read(tmp_path / f"steps-{replica}.jsonl")[-1] for replica in (0, 2)]
    assert [end["step"] for end in ends] == [STEPS, STEPS]
    assert ends[0]["weights"] == ends[1]["weights"]
