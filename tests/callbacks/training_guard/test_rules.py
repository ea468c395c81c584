"""The rules, on streams of numbers."""

from __future__ import annotations

import math
import random

import pytest

from lightning_eff.callbacks import AlarmRule, ExplodingLoss, GradientSpikes, NonFiniteLoss


def _alarms(rule: AlarmRule, values: list[float]) -> list[int]:
    return [step for step, value in enumerate(values, start=1) if rule.judge(step, value) is not None]


def test_a_loss_that_is_not_finite():
    nan, inf = math.nan, math.inf
    assert _alarms(NonFiniteLoss(), [1.0, nan, 1.0, inf, nan, 1.0]) == [5]
    assert _alarms(NonFiniteLoss(patience=1), [1.0, nan, 1.0, -inf]) == [2, 4]


def test_an_explosion_is_seen_when_its_patience_is_over():
    noise = random.Random(0)
    healthy = [2.0 + noise.gauss(0, 0.1) for _ in range(200)]
    rule = ExplodingLoss()  # above 1.5 times the level, in five steps in a row
    assert _alarms(rule, [*healthy, *[3.5] * 4, 2.0, *[3.5] * 4, math.nan, 3.5]) == [210, 211]


def test_a_slow_rise_does_not_move_the_level():
    rise = [2.0 + 0.005 * i for i in range(1, 300)]  # above 3.0 from step 251 on
    assert _alarms(ExplodingLoss(), [2.0] * 50 + rise)[0] == 255


@pytest.mark.parametrize("noise", ["gauss(1, 0.3)", "gauss(0, 1)", "lognormvariate(0, 0.5)", "expovariate(1)"])
@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_noise_is_no_explosion(noise, scale):
    kind, arguments = noise.removesuffix(")").split("(")
    draw = getattr(random.Random(0), kind)
    values = [scale * abs(draw(*map(float, arguments.split(",")))) for _ in range(10_000)]
    assert _alarms(ExplodingLoss(), values) == []


def test_a_negative_loss():
    assert _alarms(ExplodingLoss(), [-4.0] * 60 + [-2.5] * 10 + [-1.9] * 5) == [75]  # the limit is -2


def test_there_is_no_alarm_before_the_first_level():
    assert _alarms(ExplodingLoss(over_n_steps=50, patience=1), [1.0] * 49 + [100.0]) == []
    assert _alarms(ExplodingLoss(over_n_steps=50, patience=1), [1.0] * 50 + [100.0]) == [51]


def test_too_many_spikes():
    counts = [0, 1, 1, 2, 2, 2, 2, 3, 4, 5]  # as ZClip counts them
    assert _alarms(GradientSpikes(count=3, within=3), counts) == [10]


@pytest.mark.parametrize("rule", [NonFiniteLoss, ExplodingLoss, GradientSpikes])
def test_a_rule_goes_on_from_its_state(rule):
    noise = random.Random(0)
    values = [*(2.0 + noise.random() for _ in range(60)), *[90.0] * 6, math.nan, math.nan, 91.0, 110.0]
    whole = _alarms(rule(), values)
    assert whole
    for cut in (10, 63, 67):
        first, second = rule(), rule()
        _alarms(first, values[:cut])
        second.load_state_dict(first.state_dict())
        assert [cut + step for step in _alarms(second, values[cut:])] == [step for step in whole if step > cut]


@pytest.mark.parametrize(
    ("rule", "argument", "value"),
    [
        (NonFiniteLoss, "patience", 0),
        (ExplodingLoss, "factor", 1.0),
        (ExplodingLoss, "deviations", -1.0),
        (ExplodingLoss, "factor", float("nan")),
        (ExplodingLoss, "over_n_steps", 1),
        (ExplodingLoss, "patience", True),
        (GradientSpikes, "count", 0),
        (GradientSpikes, "within", 0),
    ],
)
def test_bad_arguments(rule, argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        rule(**{argument: value})
