"""A decay that branches off a checkpoint is the run that would have decayed, and leaves the other one alone."""

from __future__ import annotations

import sys

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from harness.runs import fit
from lightning_eff.cli import main
from lightning_eff.functional.averaging import CURVES

pytestmark = pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")


class Net(BoringModel):
    """A constant rate, or one that decays from a step to another."""

    def __init__(self, begin: int = 1000, end: int = 1001, falls: float = 1.0) -> None:
        super().__init__()
        self.begin, self.end, self.falls = begin, end, falls

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(16, 32))  # equal batches: a plain resume deals them anew

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)

        def factor(step):
            done = min(1.0, max(0.0, (step - self.begin) / (self.end - self.begin)))
            return self.falls**step * (0.25 + 0.75 * CURVES["cosine"](done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.fixture
def branch(monkeypatch, tmp_path, capsys):
    """A run at a constant rate with checkpoints at steps 4 and 8, and the command in its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    torch.manual_seed(0)
    model = Net()
    torch.save(model.state_dict(), "start.pt")
    keep = ModelCheckpoint("run", "{step}", every_n_train_steps=4, save_top_k=-1)
    fit(model, keep, max_steps=8, limit_val_batches=0)
    callbacks = [
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "run", "save_top_k": 1, "every_n_train_steps": 1}},
        {"class_path": "EarlyStopping", "init_args": {"monitor": "nothing"}},
        {"class_path": "ZClip", "init_args": {"warmup_steps": 1000, "max_grad_norm": None}},
    ]
    quiet = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 0, "accelerator": "cpu"}

    def run(*options, falls=1.0, **more):
        config = {
            "seed_everything": 0,
            "trainer": {**quiet, "max_epochs": 1, "callbacks": callbacks},
            "model": {"class_path": "tests.cli.test_branch_decay.Net", "init_args": {"falls": falls}},
            **more,
        }
        with open("config.yaml", "w") as file:
            yaml.safe_dump(config, file)
        line = ["branch-decay", "run/step=4.ckpt", "--config", "config.yaml", "-o", "out.ckpt", *options]
        status = main(line)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.needs("jsonargparse")
def test_it_is_the_run_that_decays(branch, tmp_path):
    status, out, err = branch("--steps", "6", "--curve", "cosine", "--least", "0.25")
    assert status == 0, err
    assert "out.ckpt: steps 4 to 10, rate from 0.01 to 0.25 of it by cosine" in out
    decayed = torch.load("out.ckpt", weights_only=True)
    assert decayed["global_step"] == 10

    model = Net(begin=4, end=10)
    model.load_state_dict(torch.load("start.pt", weights_only=True))
    fit(model, max_steps=10, limit_val_batches=0)
    assert all(torch.equal(decayed["state_dict"][name], value) for name, value in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["step=4.ckpt", "step=8.ckpt"]

    status, out, err = branch("--steps", "6")
    assert status == 1
    assert "out.ckpt exists; --overwrite replaces it" in err


@pytest.mark.needs("jsonargparse")
@pytest.mark.filterwarnings("ignore:.*configure_optimizers. will be overridden")
def test_the_optimizer_of_the_config_is_the_one_that_decays(branch):
    adam = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.5}}
    schedule = {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}}
    status, _, err = branch("--steps", "2", optimizer=adam, lr_scheduler=schedule)
    assert status == 0, err
    (schedule,) = torch.load("out.ckpt", weights_only=True)["lr_schedulers"]
    assert schedule["factor"] == 1.0


@pytest.mark.needs("jsonargparse")
def test_a_rate_that_is_not_stable_is_said(branch):
    with pytest.warns(UserWarning, match=r"from 0.01 to 0.00531 between steps 4 and 7: the decay was multiplied"):
        assert branch("--steps", "3", falls=0.9)[0] == 0


def test_what_cannot_be_branched_off(branch):
    torch.save({"weight": torch.ones(1)}, "run/step=4.ckpt")
    status, _, err = branch("--steps", "3")
    assert status == 1
    assert "step=4.ckpt does not say its step" in err
