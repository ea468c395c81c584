"""Rules on what grows: on streams of numbers, and what they look at in a run."""

from __future__ import annotations

import logging
import math
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness.faults import InjectedError
from harness.operators import OperatorCounter
from harness.runs import fit
from lightning_eff.callbacks import (
    AlarmRule,
    AttentionLogits,
    ExplodingLoss,
    SpectralAlignmentMonitor,
    TrainingGuard,
    WeightGrowth,
)
from lightning_eff.callbacks.training_guard.growth import squared_norm
from tests.callbacks.training_guard.guard_models import AtBatch, kill
from tests.suite.runs import SaveAt
from tests.suite.runs import fit as fit_tiny
from tests.suite.table import DDP, FSDP2, SINGLE


def _alarms(rule: AlarmRule, values: list[float], every: int = 10) -> list[int]:
    return [step for i, value in enumerate(values, start=1) if rule.judge(step := i * every, value) is not None]


def _sums(rates: list[float]) -> list[float]:
    """Squared norms to which each look adds as much as a rate has it: the square of it."""
    values = [100.0]
    for rate in rates:
        values.append(values[-1] + rate**2)
    return values


class TestWeightGrowth:
    def test_a_rate_that_grows_by_two_percent_a_step(self):
        rates = [1.0] * 30 + [1.02 ** (10 * i) for i in range(1, 15)]
        found = _alarms(WeightGrowth(), _sums(rates))
        assert 310 < found[0] <= 400

    def test_healthy_growth_is_none(self):
        noise = random.Random(0)
        for rates in (
            [1 + noise.gauss(0, 0.2) for _ in range(300)],  # constant
            [math.cos(i / 191) for i in range(300)],  # falls
            [5 * math.exp(-i / 10) + 1 for i in range(300)],  # fast at first
            [i / 100 for i in range(300)],  # a warm-up of 3,000 steps
        ):
            assert _alarms(WeightGrowth(), _sums(rates)) == []

    @pytest.mark.parametrize("scale", [1e-6, 1e6])
    def test_it_has_no_unit(self, scale):
        values = _sums([1.0] * 30 + [1.02 ** (10 * i) for i in range(1, 15)])
        assert _alarms(WeightGrowth(), [scale * v for v in values]) == _alarms(WeightGrowth(), values)

    def test_growth_that_is_small_beside_the_weights_is_none(self):
        values = [1e6 + v for v in _sums([0.1] * 30 + [1.0] * 20)]
        assert _alarms(WeightGrowth(), values) == []

    def test_weights_that_shrink_and_then_grow(self):
        values = [100 * 0.99**i for i in range(30)]
        assert _alarms(WeightGrowth(), values + [values[-1] * 1.05**i for i in range(1, 10)]) != []


class TestAttentionLogits:
    def test_growth_after_calm(self):
        values = [min(i, 12.0) for i in range(1, 31)] + [12 * 1.02 ** (10 * i) for i in range(1, 15)]
        found = _alarms(AttentionLogits(), values)
        assert 300 < found[0] <= 370
        assert _alarms(AttentionLogits(), [v / 12 for v in values]) == []  # small ones do no harm

    def test_the_growth_that_every_run_begins_with_is_none(self):
        assert _alarms(AttentionLogits(), [1.5**i for i in range(12)] + [1.5**12] * 50) == []

    def test_logits_that_are_too_large_from_the_start_on(self):
        values = [1.5**i for i in range(20)]  # above 200 from the 15th on
        assert _alarms(AttentionLogits(), values)[0] == 170  # the median of three, in two looks
        assert _alarms(AttentionLogits(), [300.0, 310.0] * 20) == []  # a model that is trained on

    def test_small_logits_are_none(self):
        assert _alarms(AttentionLogits(), [1.0] * 30 + [8.0] * 20) == []

    def test_a_single_large_one_is_none(self):
        assert _alarms(AttentionLogits(), [20.0] * 30 + [100.0] + [20.0] * 10) == []


@pytest.mark.parametrize("rule", [WeightGrowth, AttentionLogits])
def test_a_rule_goes_on_from_its_state_and_can_begin_anew(rule):
    values = _sums([1.0] * 30 + [1.02 ** (10 * i) for i in range(1, 40)])
    whole = _alarms(rule(), values)
    assert whole
    for cut in (3, 12, 31, 40):
        first, second = rule(), rule()
        _alarms(first, values[:cut])
        second.load_state_dict(first.state_dict())
        rest = [10 * (cut + i) for i, v in enumerate(values[cut:], 1) if second.judge(10 * (cut + i), v) is not None]
        assert rest == [step for step in whole if step > 10 * cut]
    first.begin_anew()
    assert _alarms(first, values) == whole


def test_an_alarm_s_words():
    rule = WeightGrowth(patience=1)
    words = [rule.judge(10 * i, v) for i, v in enumerate(_sums([1.0] * 30 + [4.0] * 5), 1)]
    assert next(w for w in words if w).startswith("the squared norm of the weights has changed by +")
    rule = AttentionLogits(patience=1)
    words = [rule.judge(10 * i, v) for i, v in enumerate([20.0] * 30 + [90.0] * 3, 1)]
    assert next(w for w in words if w) == "the largest attention logit is 90, 4.5 times what it was until 50 steps ago"


@pytest.mark.parametrize(
    ("rule", "argument", "value"),
    [
        (WeightGrowth, "factor", 1.0),
        (WeightGrowth, "least", -0.1),
        (WeightGrowth, "over_n_steps", 5),
        (WeightGrowth, "every_n_steps", 0),
        (WeightGrowth, "patience", 0),
        (AttentionLogits, "factor", float("nan")),
        (AttentionLogits, "least", "much"),
        (AttentionLogits, "most", 10.0),
        (AttentionLogits, "over_n_steps", 5),
        (AttentionLogits, "every_n_steps", True),
        (AttentionLogits, "patience", 1.5),
        (AttentionLogits, "required", "no"),
    ],
)
def test_bad_values_are_met_at_the_door(rule, argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        rule(**{argument: value})


class Attends(L.LightningModule):
    """An attention whose logits are known: the same for each batch."""

    def __init__(self, attend: bool = True, scale: float = 3.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.attend, self.scale = nn.Linear(4, 4), attend, scale

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.attend:
            x = torch.eye(4).expand(2, 1, 4, 4)
            F.scaled_dot_product_attention(2 * self.scale * x, x, x)
        return self.head(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Values(TrainingGuard):
    """What the rules' numbers were, as they were judged."""

    def __init__(self, *rules: AlarmRule, **arguments: Any) -> None:
        super().__init__("warn", rules=list(rules), read_every_n_steps=1, **arguments)
        self.judged: list[tuple[int, float]] = []
        for rule in rules:
            judge = rule.judge
            rule.judge = lambda step, value, judge=judge: self._note(step, value, judge)

    def _note(self, step: int, value: float, judge: Any) -> str | None:
        self.judged.append((step, value))
        return judge(step, value)


DATA = DataLoader(torch.ones(40, 4), batch_size=2)


def test_logits_are_looked_at_in_some_steps():
    guard = Values(AttentionLogits(every_n_steps=4, over_n_steps=4))
    fit(Attends(), guard, data=DATA, max_steps=10, accumulate_grad_batches=2)
    assert guard.judged == [(1, 3.0), (5, 3.0), (9, 3.0)]


@pytest.mark.parametrize(("required", "level"), [(True, logging.WARNING), (False, logging.INFO)])
def test_a_model_without_attention_is_told_once(caplog, required, level):
    caplog.set_level(logging.INFO)
    guard = Values(AttentionLogits(every_n_steps=2, over_n_steps=2, required=required))
    fit(Attends(attend=False), guard, data=DATA, max_steps=6)
    assert [record.levelno for record in caplog.records if "has seen no attention" in record.message] == [level]
    assert guard.judged == []


def _syncs(*callbacks: L.Callback) -> int:
    with OperatorCounter() as counter:
        fit(Attends(), *callbacks, data=DATA, max_steps=9, logger=False)
    return counter.host_syncs


def test_no_step_waits_but_the_one_that_reads():
    guard = TrainingGuard("warn", rules="default", read_every_n_steps=10)
    assert _syncs(guard) - _syncs() == 1  # the numbers of all steps are read behind the last one


def test_an_exception_in_the_forward_pass_leaves_no_watch():
    class Breaks(Attends):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise InjectedError

    rule = AttentionLogits()
    with pytest.raises(InjectedError):
        fit(Breaks(), TrainingGuard("warn", rules=[rule]), data=DATA)
    F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 4, 4))
    assert rule._watch.take() is None


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
@pytest.mark.parametrize("gives", [InjectedError, None], ids=["an error", "no loss"])
def test_two_that_look_at_a_step_leave_compilation_as_it_was(gives):
    import torch._dynamo

    class Once(Attends):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            if batch_idx == 0 and gives is not None:
                raise gives
            return None if batch_idx == 0 else super().training_step(batch, batch_idx)

    monitor = SpectralAlignmentMonitor(include=["head"], every_n_steps=1)
    with pytest.raises(InjectedError) if gives else nullcontext():
        fit(Once(), monitor, TrainingGuard("warn", rules="default"), data=DATA)
    assert torch._dynamo.eval_frame._stance.stance == "default"


# --- the norm, and sharded weights -----------------------------------------------------------------------------------


def _norms(strategy: Any, folder: Path) -> list[tuple[int, float]]:
    guard = Values(WeightGrowth(every_n_steps=3, over_n_steps=3))
    fit_tiny(None, folder, strategy=strategy, callback=guard, steps=10)
    return guard.judged


def test_the_norm_is_that_of_the_whole_weights_on_every_strategy(pool, tmp_path):
    alone = _norms(SINGLE, tmp_path)
    assert [step for step, _ in alone] == [1, 3, 6, 9]
    for strategy in (DDP, FSDP2):
        for rank in pool.run(_norms, strategy, tmp_path):
            assert [step for step, _ in rank] == [step for step, _ in alone]
            # A shard's norm would be a third less. Adam makes steps of gradients that are rounding alone, as each
            # processor does it.
            assert [value for _, value in rank] == pytest.approx([value for _, value in alone], rel=1e-3)


def test_parameters_that_are_added_are_no_growth():
    def add(trainer: L.Trainer) -> None:
        trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.full((4, 4), 100.0))]})

    def run(*around: L.Callback) -> Values:
        guard = Values(WeightGrowth(least=0.0, over_n_steps=1, every_n_steps=1, patience=1))
        fit(Attends(), *around, guard, data=DATA, max_steps=12)
        return guard

    plain, added = run(), run(AtBatch(8, add))
    assert added.alarms == plain.alarms == 0
    assert [math.isnan(value) for _, value in added.judged] == [i == 8 for i in range(12)]


def test_it_is_the_optimizers_parameters_of_any_type():
    tensors = [nn.Parameter(torch.full((3, 2), 2.0)), nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))]
    tensors.append(nn.Parameter(torch.full((2,), 3.0, dtype=torch.float64)))
    optimizers = [torch.optim.SGD([tensor], lr=1.0) for tensor in (*tensors, nn.Parameter(torch.zeros(0)))]
    assert squared_norm(optimizers).item() == pytest.approx(6 * 4.0 + 4.0 + 18.0)
    assert squared_norm([]) is None


# --- changes of rate and data ----------------------------------------------------------------------------------------


class Rate(L.Callback):
    """Sets the rate before each batch."""

    def __init__(self, rates: list[float]) -> None:
        self.rates = rates

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.rates[trainer.global_step]


class Anew(AlarmRule):
    """At which steps it has begun anew."""

    def __init__(self) -> None:
        self.step, self.steps = 0, []

    def judge(self, step: int, value: float) -> None:
        self.step = step

    def begin_anew(self) -> None:
        self.steps.append(self.step + 1)


def test_rules_begin_anew_where_the_rate_is_warmed_again():
    rule, rates = Anew(), [0.1, 0.2, 0.2, 0.1, 0.02, 0.02, 0.1, 0.2, 0.21, 0.3]
    guard = TrainingGuard("warn", rules=[rule], read_every_n_steps=1)
    fit(Attends(), Rate(rates), guard, data=DATA, max_steps=10)
    assert rule.steps == [7, 8]  # and not where it rises beyond all that there was


def test_and_where_the_data_are_announced_to_be_others():
    rule = Anew()
    guard = TrainingGuard("warn", rules=[rule], read_every_n_steps=3)
    announce = AtBatch(4, lambda trainer: guard.expect_change())
    fit(Attends(), announce, guard, data=DATA, max_steps=8)
    assert rule.steps == [5]


def test_a_loss_that_rises_with_them_is_no_explosion():
    class Harder(Attends):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * 0 + (1.0 if batch_idx < 10 else 9.0)

    found = []
    for announced in (False, True):
        guard = TrainingGuard("warn", rules=[ExplodingLoss(over_n_steps=4, patience=2)], read_every_n_steps=1)
        change = [AtBatch(10, lambda trainer, guard=guard: guard.expect_change())] if announced else []
        fit(Harder(), *change, guard, data=DATA, max_steps=20)
        found.append(guard.alarms > 0)
    assert found == [True, False]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_judges_what_the_unbroken_one_did(tmp_path: Path):
    def run(*around: L.Callback, **more: Any) -> tuple[Values, dict[str, Any]]:
        rules = AttentionLogits(every_n_steps=3, over_n_steps=3), WeightGrowth(every_n_steps=3, over_n_steps=3)
        guard = Values(*rules)
        rates = [0.1, 0.2, 0.05, 0.05, 0.05, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]
        fit(Attends(), Rate(rates), guard, *around, data=DATA, max_steps=12, **more)
        return guard, guard.state_dict()

    unbroken, state = run()
    for step in (4, 5, 8):
        path = tmp_path / f"{step}.ckpt"
        with pytest.raises(InjectedError):
            run(SaveAt(step, path), AtBatch(step + 1, kill))
        resumed, resumed_state = run(ckpt_path=path)
        assert resumed.judged == unbroken.judged[-len(resumed.judged) :]
        assert resumed_state["rules"] == state["rules"]
        assert resumed_state["rates"] == state["rates"]
