"""The rate at each step, a resume by other arguments, and a run that continues exactly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from harness.runs import fit
from lightning_eff.functional.wsd import WSD


def optimizer(*rates: float, **arguments) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    return torch.optim.AdamW(groups, **arguments)


def stepped(schedule: WSD, steps: int) -> list[float]:
    """The first group's rate at each update."""
    rates = []
    for _ in range(steps):
        rates.append(float(schedule.optimizer.param_groups[0]["lr"]))
        schedule.optimizer.step()
        schedule.step()
    return rates


def test_a_decay_by_its_curve_from_the_rates_of_each_group():
    schedule = WSD(optimizer(0.1, 0.4), ends=10, warmup_steps=4, decay_steps=4, least=0.1)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 1] + [0.1 + 0.9 * (1 - math.sqrt(x)) for x in (0.25, 0.5, 0.75)] + [0.1, 0.1]
    assert stepped(schedule, 12) == pytest.approx([0.1 * factor for factor in expected])
    assert schedule.get_last_lr() == pytest.approx([0.01, 0.04])


def test_with_several_ends_the_rate_is_full_again_behind_each():
    schedule = WSD(optimizer(1.0), ends=[10, 20], decay_steps=0.2, curve="linear")
    assert schedule.begins == [8, 16]  # a fifth of all steps up to each end
    assert stepped(schedule, 22) == pytest.approx([*[1.0] * 9, 0.5, *[1.0] * 7, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_a_resumed_run_goes_by_the_arguments_that_it_is_given():
    first = WSD(optimizer(0.5), ends=10, decay_steps=2, curve="linear")
    stepped(first, 9)
    assert first.get_last_lr() == [0.25]
    saved = copy.deepcopy((first.optimizer.state_dict(), first.state_dict()))
    later = WSD(optimizer(0.5), ends=20, decay_steps=2, curve="linear")
    later.optimizer.load_state_dict(saved[0])
    later.load_state_dict(saved[1])
    assert stepped(later, 11) == [0.5] * 10 + [0.25]
    same = WSD(optimizer(0.5), ends=10, decay_steps=2, curve="linear")
    same.optimizer.load_state_dict(saved[0])
    same.load_state_dict(saved[1])
    assert stepped(same, 2) == [0.25, 0.0]


def test_a_rate_that_is_a_tensor_stays_that_tensor():
    rate = torch.tensor(1.0)
    weights = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=rate)
    schedule = WSD(weights, ends=4, decay_steps=2, curve="linear")
    stepped(schedule, 3)
    assert float(rate) == 0.5
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": 0})
    assert float(rate) == 1.0


class Decaying(BoringModel):
    """Trained by a rate that decays twice."""

    def configure_optimizers(self):
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = WSD(sgd, ends=[4, 8], decay_steps=2)
        return {"optimizer": sgd, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:You're resuming from a checkpoint")
def test_a_lightning_run_that_is_broken_off_in_a_decay_is_the_unbroken_one(tmp_path):
    torch.manual_seed(0)
    start = Decaying().state_dict()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    def run(*callbacks, **arguments):
        model = Decaying()
        model.load_state_dict(start)
        data = torch.utils.data.DataLoader(torch.ones(8, 32))  # equal batches: a plain resume deals them anew
        fit(model, *callbacks, data=data, limit_val_batches=0, **arguments)
        return model.state_dict()

    whole = run(checkpoint, max_steps=8)
    for step in (3, 4, 7):
        resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt", max_steps=8)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"ends": []}, r"ends=\[\]"),
        ({"ends": [5, 5]}, r"ends=\[5, 5\]"),
        ({"ends": 0}, "ends=0"),
        ({"decay_steps": 1.5}, "decay_steps=1.5"),
        ({"decay_steps": 0}, "decay_steps=0"),
        ({"curve": "exponential"}, "curve='exponential'"),
        ({"least": 2}, "least=2"),
        ({"warmup_steps": 9}, "ends at step 10 would begin at step 8, and what is before it ends at step 9"),
        ({"ends": [10, 11], "decay_steps": 2}, "ends at step 11 would begin at step 9, and what is before it ends"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        WSD(optimizer(1.0), **{"ends": 10, **arguments})
