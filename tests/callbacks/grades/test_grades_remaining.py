"""GradES by default: matrices with little left to gain are frozen, and a run is told what that saves."""

from __future__ import annotations

import logging
import re
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_eff.callbacks import GradES
from lightning_eff.functional.wsd import WSD
from tests.callbacks.grades.grades_models import Model, Told, fit
from tests.suite.runs import SaveAt, assert_equal, weights

LONG = 60


class Decaying(Model):
    """The learning rate of one block falls to nothing, or that of all parameters."""

    def __init__(self, blocks, steps):
        super().__init__()
        self.falling, self.steps = blocks, steps

    def configure_optimizers(self):
        falls = [p for name, p in self.named_parameters() if any(block in name for block in self.falling)]
        known = {id(p) for p in falls}
        stays = [p for p in self.parameters() if id(p) not in known]
        pairs = [(falls, lambda step: max(0.0, 1 - step / self.steps) ** 2), (stays, lambda step: 1.0)]
        groups = [{"params": group} for group, _ in pairs if group]
        rates = [rate for group, rate in pairs if group]
        optimizer = torch.optim.SGD(groups, lr=0.05)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _said(caplog, words):
    return [
        record.message for record in caplog.records if record.message.startswith("GradES") and words in record.message
    ]


def test_by_default_what_has_little_left_to_gain_is_frozen_and_the_run_ends(caplog):
    grades = GradES(every_n_steps=1)
    with caplog.at_level(logging.INFO):
        trainer, _ = fit(grades, model=Decaying([""], LONG), max_steps=LONG)
    assert len(grades.frozen) == 12
    assert min(grades.frozen.values()) > LONG / 2
    assert trainer.global_step == max(grades.frozen.values()) < LONG
    (forecast,), (saved,) = _said(caplog, "if rate and"), _said(caplog, "which saved")
    assert forecast.startswith(
        "GradES, step 31 of 60: if rate and gradients go on falling as they have, 12 of 12 matri"
    )
    end, made = int(re.search(r"by step (\d+)", forecast)[1]), trainer.global_step
    assert abs(end - made) <= 6  # a rate that falls by a square falls faster than it has
    assert saved.endswith(f"and {1 - made / LONG:.1%} of the steps")


def test_each_matrix_has_the_rate_of_its_own_group():
    grades = GradES(every_n_steps=1, max_events=None)
    fit(grades, model=Decaying(["h.1."], LONG), max_steps=LONG)
    assert len(grades.frozen) == 6
    assert all(".h.1." in name for name in grades.frozen)


def test_a_run_that_goes_on_learning_is_told_so_at_half_time_and_at_the_end(caplog):
    grades = GradES(every_n_steps=1)
    with caplog.at_level(logging.INFO):
        fit(grades, model=Decaying([], LONG), max_steps=LONG)
    assert not grades.frozen
    (forecast,) = _said(caplog, "if rate and")
    assert "0 of 12 matrices will be frozen by the end, which saves 0.0% of the backward passes" in forecast
    assert forecast.endswith("in a run that is still learning leave it out")
    (why,) = _said(caplog, "froze nothing")
    assert why.endswith("in a run like this leave it out")


@pytest.mark.parametrize("at", [8, 16, 30, 31, 45])
def test_a_run_by_the_default_rule_resumes_exactly(at, tmp_path, caplog):
    def run(*callbacks, **arguments):
        grades, module = GradES(every_n_steps=1, release_state=True), Decaying([""], LONG)
        trainer, _ = fit(grades, *callbacks, model=module, max_steps=LONG, **arguments)
        return grades, weights(module), trainer.global_step

    path = tmp_path / "saved.ckpt"
    whole, straight, steps = run(SaveAt(at, path), enable_checkpointing=True)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        resumed, module, again = run(resume=path)
    assert len(_said(caplog, "if rate and")) == (at < 31)  # said once, at the end of step 31
    assert (again, resumed.frozen) == (steps, whole.frozen)
    assert_equal(straight, module)
    one, other = whole.state_dict(), resumed.state_dict()
    assert torch.equal(one["watch"].pop("values"), other["watch"].pop("values"))
    assert one == other


@pytest.mark.parametrize("rule", [{}, {"metric": "grad_change", "tau_mode": "relative", "tau": 0.5}])
def test_a_state_of_version_1_loads_and_what_another_rule_has_learned_is_forgotten(rule, tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(Told([(4, "attn.q.weight")]), SaveAt(8, path), enable_checkpointing=True)
    content = torch.load(path, weights_only=True)
    (saved,) = [state for name, state in content["callbacks"].items() if name.startswith("Told")]
    saved["version"] = 1
    del saved["noted"], saved["foretold"], saved["watch"]["rule"]
    level = saved["watch"]["values"][1].clone()
    saved["watch"]["values"] = saved["watch"]["values"][:9]
    content["callbacks"] = {"GradES": saved}
    torch.save(content, path)
    grades, seen = GradES(**rule), []

    class Looks(L.Callback):
        def on_train_start(self, trainer, module):
            seen.append(grades._fit.watch._state.values.clone())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(grades, Looks(), resume=path)
    warned = [str(each.message) for each in caught if "another rule" in str(each.message)]
    assert len(warned) == (not rule)
    assert set(grades.frozen.values()) == {5}  # what is frozen stays so
    assert seen[0][1].tolist() == (level.tolist() if rule else [0.0] * 12)
    assert seen[0][4].sum() == 2


@pytest.mark.parametrize("within", [False, True])
def test_a_rate_that_rises_again_is_refused(within):
    class Restarts(Model):
        def configure_optimizers(self):
            optimizer, schedulers = torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.lr_scheduler
            scheduler = schedulers.CosineAnnealingWarmRestarts(optimizer, 4)
            if within:
                first = schedulers.LinearLR(optimizer, total_iters=2)
                scheduler = schedulers.SequentialLR(optimizer, [first, scheduler], milestones=[2])
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    with pytest.raises(MisconfigurationException, match="WarmRestarts raises it again: set metric='grad'"):
        fit(GradES(), model=Restarts())
    if not within:
        fit(GradES(metric="grad"), model=Restarts())


def test_a_rate_that_decays_several_times_is_refused():
    class Decays(Model):
        ends: Any = (6, 12)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [{"scheduler": WSD(optimizer, self.ends), "interval": "step"}]

    with pytest.raises(MisconfigurationException, match="WSD with several ends raises it again"):
        fit(GradES(), model=Decays())
    once = Decays()
    once.ends = 12
    fit(GradES(), model=once)
