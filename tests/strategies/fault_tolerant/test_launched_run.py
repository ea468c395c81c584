"""A whole run as a user starts it: `lightning-eff launch`, a script, a replica that is killed in the middle."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness import REPOSITORY
from harness.processes import environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(700),
    pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft has wheels for Linux x86-64 only"),
]

SCRIPT = """
import json, os, signal, sys
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_eff.strategies import FaultTolerantDDPStrategy

folder, victim = sys.argv[1], sys.argv[2]


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 1))
        self.losses = []

    def training_step(self, batch, batch_idx):
        me = ".".join(os.environ[name] for name in ("REPLICA_GROUP_ID", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"))
        if me == f"{victim}.0" and (self.current_epoch, batch_idx) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def on_train_batch_end(self, *_):
        if (self.trainer.fit_loop.epoch_loop.batch_idx + 1) % 2 == 0:
            self.losses.append([self.trainer.global_step, float(self.trainer.callback_metrics["loss"])])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5), "interval": "step"}]


L.seed_everything(3, verbose=False)
x = torch.randn(3 * 8 * 4, 4)
data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 4, shuffle=True, num_workers=2, prefetch_factor=2)
module = Regression()
trainer = L.Trainer(
    strategy=FaultTolerantDDPStrategy(), devices=int(os.environ["LOCAL_WORLD_SIZE"]), accelerator="cpu",
    max_epochs=3, accumulate_grad_batches=2,
    callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)],
    logger=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, data)
with open(f"{folder}/end-{os.environ['REPLICA_GROUP_ID']}.{os.environ['LOCAL_RANK']}.json", "w") as file:
    weights = [p.tolist() for p in module.parameters()]
    json.dump({"step": trainer.global_step, "weights": weights, "losses": module.losses}, file)
"""


# The same under Lightning's other name, by the strategy's string.
OTHER_NAME = {
    "import lightning as L": "import pytorch_lightning as L",
    "from lightning.pytorch.callbacks": "from pytorch_lightning.callbacks",
    "from lightning_eff.strategies import FaultTolerantDDPStrategy": "import lightning_eff",
    "FaultTolerantDDPStrategy()": "'ddp_ft'",
}


def launch(
    folder: Path, victim: str, replicas: int, processes: int, package: str = "lightning.pytorch"
) -> dict[str, dict[str, Any]]:
    folder.mkdir()
    script = SCRIPT
    for ours, other in OTHER_NAME.items() if package == "pytorch_lightning" else ():
        assert ours in script
        script = script.replace(ours, other)
    (folder / "train.py").write_text(script)
    command = [sys.executable, "-m", "lightning_eff", "launch", "--replicas", str(replicas), "--grace", "60"]
    done = subprocess.run(
        [*command, "--nproc-per-node", str(processes), str(folder / "train.py"), str(folder), victim],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert ("restart 1 of 10" in done.stderr) == (victim != "nobody")
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("end-*.json"))}


def flat(weights: Any) -> list[float]:
    return [number for each in weights for number in flat(each)] if isinstance(weights, list) else [weights]


@pytest.mark.parametrize(
    ("replicas", "processes", "victim", "steps", "package"),
    [
        (3, 1, "1.0", 12, "lightning.pytorch"),
        (2, 2, "1.1", 9, "lightning.pytorch"),
        (3, 1, "1.0", 12, "pytorch_lightning"),
    ],
)
def test_a_killed_process_leaves_no_trace_in_the_result(tmp_path, replicas, processes, victim, steps, package):
    """AdamW, dropout, accumulation of 2, two data workers with prefetch, a kill in mid-epoch and mid-window."""
    whole = launch(tmp_path / "whole", "nobody", replicas, processes)
    killed = launch(tmp_path / "killed", victim, replicas, processes, package)
    assert [end["step"] for end in whole.values()] == replicas * processes * [steps]
    assert len(killed) >= (replicas - 1) * processes  # the victim has come back, or the run was over before
    reference = whole["end-0.0"]
    for end in [*whole.values(), *killed.values()]:
        assert end["step"] == steps
        assert flat(end["weights"]) == pytest.approx(flat(reference["weights"]), abs=1e-6)
    losses = dict(reference["losses"])
    assert sorted(losses) == list(range(1, steps + 1))
    for end in killed.values():
        for step, loss in end["losses"]:
            assert loss == pytest.approx(losses[step], abs=1e-6)
    names = [{path.name for path in (tmp_path / run).glob("*.ckpt")} for run in ("whole", "killed")]
    assert names[0] == names[1] == {f"step={step}.ckpt" for step in range(4, steps + 1, 4)}
