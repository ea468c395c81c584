"""The metric against plain float64 arithmetic, and the decision step by step."""

from __future__ import annotations

import math

import pytest
import torch

from harness.operators import OperatorCounter
from lightning_eff.functional.grades import (
    FALLEN,
    MEMORY,
    SMOOTH,
    GradESConfig,
    GradESState,
    MatrixMetric,
    grades_forecast,
    grades_update,
    settled_units,
)
from lightning_eff.functional.grades_unfreezing import grades_signal, neighbour_signal, units_to_unfreeze
from lightning_eff.structure.flops import backward_flops


def _parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (7, 5), "b": (3, 11), "c": (13,)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for name, shape in shapes.items()
    }


def _units(parameters):
    """One matrix, and a pair."""
    return [{"a": parameters["a"]}, {"b": parameters["b"], "c": parameters["c"]}]


def _set_grads(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def _sum(tensors):
    return [tensors["a"].double().abs().sum().item(), sum(tensors[n].double().abs().sum().item() for n in ("b", "c"))]


# --- the metric ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_each_metric_is_the_sum_of_absolute_values(dtype):
    parameters = _parameters(dtype)
    metrics = {name: MatrixMetric(_units(parameters), name) for name in ("grad_change", "grad", "weight_change")}
    _set_grads(parameters, 1)
    before = {name: p.grad.clone() for name, p in parameters.items()}
    weights = {name: p.detach().clone() for name, p in parameters.items()}
    first = {name: metric.measure() for name, metric in metrics.items()}
    assert first["grad_change"].isnan().all()  # the authors' code says 0 here, which is below every threshold
    assert first["weight_change"].isnan().all()
    torch.testing.assert_close(first["grad"].tolist(), _sum(before))

    _set_grads(parameters, 2)
    torch.optim.SGD(parameters.values(), lr=0.1).step()
    expected = {
        "grad_change": _sum({name: p.grad.double() - before[name].double() for name, p in parameters.items()}),
        "grad": _sum({name: p.grad for name, p in parameters.items()}),
        "weight_change": _sum({n: p.detach().double() - weights[n].double() for n, p in parameters.items()}),
    }
    for name, metric in metrics.items():
        torch.testing.assert_close(metric.measure().tolist(), expected[name], rtol=1e-5, atol=0.0)
    assert not metrics["grad"].copies
    assert set(metrics["grad_change"].copies) == {"a", "b", "c"}


def test_a_gradient_that_is_missing_or_not_finite_is_no_observation():
    parameters = _parameters()
    metric = MatrixMetric(_units(parameters), "grad_change")
    seen = []
    for step, (spoil, value) in enumerate([(None, 0), ("b", None), ("a", math.inf), (None, 0), (None, 0)]):
        _set_grads(parameters, step)
        if spoil is not None and value is None:
            parameters[spoil].grad = None
        elif spoil is not None:
            parameters[spoil].grad[0, 0] = value
        seen.append(metric.measure().isfinite().tolist())
    # After a missing gradient the copy is still good; after an infinite one it has to be taken anew.
    assert seen == [[False, False], [True, False], [False, True], [False, True], [True, True]]


def test_units_that_are_left_out_keep_their_copies_and_forgotten_ones_free_them():
    parameters = _parameters()
    metric = MatrixMetric(_units(parameters), "grad_change")
    _set_grads(parameters, 0)
    metric.measure()
    metric.forget([0])
    assert set(metric.copies) == {"b", "c"}
    before = metric.copies["b"].clone()
    _set_grads(parameters, 1)
    assert metric.measure([0]).isnan().all()
    assert torch.equal(metric.copies["b"], before)


def test_saved_copies_go_on_exactly():
    parameters = _parameters()
    one = MatrixMetric(_units(parameters), "grad_change")
    _set_grads(parameters, 0)
    one.measure()
    saved = one.state_dict()
    other = MatrixMetric(_units(parameters), "grad_change")
    other.load_state_dict(saved | {"gone": torch.zeros(1)})
    _set_grads(parameters, 1)
    assert torch.equal(one.measure(), other.measure())
    assert torch.equal(saved["a"], saved["a"].clone())
    assert not torch.equal(saved["a"], one.copies["a"])  # the saved one is a copy of its own


# --- the decision --------------------------------------------------------------------------------------------------


def _feed(values, *, armed=True, units=1, **config):
    """The step (from 0) at which the unit is first to be frozen, and the state."""
    state = GradESState(units, GradESConfig(**config))
    at = None
    for step, value in enumerate(values):
        grades_update(torch.full((units,), value, dtype=torch.float64), state, armed=armed)
        if at is None and settled_units(state).isfinite().all():
            at = step
    return at, state


@pytest.mark.parametrize(
    ("values", "patience", "expected"),
    [
        ([5.0, 0.9, 0.9, 0.9], 1, 1),
        ([5.0, 0.9, 0.9, 0.9], 3, 3),
        ([5.0, 0.9, 1.1, 0.9, 0.9], 2, 4),  # in a row
        ([5.0, 1.0, 1.0], 1, None),  # strictly below, as in the paper
        ([0.5], 1, None),  # never on a first observation
        ([0.5, 0.5], 1, 1),
        ([5.0, math.nan, 0.9, math.inf, 0.9, 0.0, 0.9], 3, 6),  # what is no observation changes nothing
    ],
)
def test_an_absolute_threshold(values, patience, expected):
    assert _feed(values, tau=1.0, tau_mode="absolute", patience=patience)[0] == expected


def test_nothing_is_decided_in_the_grace_period():
    at, state = _feed([0.1] * 20, armed=False, tau=1.0, tau_mode="absolute", patience=1)
    assert at is None
    assert state["streak"].item() == 0


def test_a_relative_threshold_is_the_level_of_the_last_observations():
    state = GradESState(2, GradESConfig(tau=0.5, tau_mode="relative", patience=1))
    level = torch.zeros(2, dtype=torch.float64)
    values = torch.tensor([100.0, 10.0, 8.0, 8.0, 8.0, 8.0, 9.0], dtype=torch.float64)
    for count, value in enumerate(values):
        keep = min(count / (count + 1), 1 - 1 / MEMORY)
        metric = torch.stack([value, 1000 * value])  # a matrix a thousand times as large has another level
        level = keep * level + (1 - keep) * metric
        grades_update(metric, state, armed=False)
    torch.testing.assert_close(state["level"], level)
    ratio = grades_update(0.51 * level, state, armed=True)
    torch.testing.assert_close(ratio, torch.full((2,), 1.02, dtype=torch.float64))
    assert settled_units(state).isnan().all()
    grades_update(0.49 * level, state, armed=True)
    torch.testing.assert_close(settled_units(state), torch.full((2,), 0.49, dtype=torch.float64))
    torch.testing.assert_close(state["level"], level)  # fixed once the grace period is over


def test_a_level_takes_five_observations_even_without_a_grace_period():
    at, state = _feed([1.0] * MEMORY + [0.4], tau=0.5, tau_mode="relative", patience=1)
    assert at == MEMORY
    assert state["level"].item() == 1.0


def test_a_frozen_unit_is_watched_no_longer():
    _, state = _feed([5.0, 0.5], tau=1.0, tau_mode="absolute", patience=1, units=2)
    state.mark([0])
    grades_update(torch.tensor([3.0, 3.0]), state, armed=True)
    assert state["metric"].tolist() == [0.5, 3.0]
    assert settled_units(state).isnan().all()


def test_a_state_is_moved_between_the_dtypes_of_devices():
    state = GradESState(1, GradESConfig(tau=1.0))
    state["level"].fill_(2.0)  # a row shares memory
    assert state.values[1].item() == 2.0


# --- re-opening ----------------------------------------------------------------------------------------------------


def test_a_unit_is_reopened_when_its_signal_has_risen_and_needs_more_patience_then():
    state = GradESState(2, GradESConfig(tau=1.0, tau_mode="absolute", patience=2, unfreeze_factor=1.5))
    for _ in range(3):
        grades_signal(torch.tensor(1.0), state)
    state.mark([0])
    opened = []
    for value in (1.2, 1.2, math.nan, 9.0, 9.0):
        grades_signal(torch.tensor(value), state)
        opened.append(units_to_unfreeze(state).tolist())
    # 1.2 is below; with 9 the running mean passes 1.5 at once, and patience asks for it twice.
    assert opened == [[False, False]] * 4 + [[True, False]]
    state.mark([], [0])
    assert not units_to_unfreeze(state).any()
    needed = 0
    while settled_units(state)[0].isnan():
        grades_update(torch.tensor([0.5, math.nan]), state, armed=True)
        needed += 1
    assert needed == 1 + 2 * 2  # the first observation of all, and twice the patience


def test_the_signal_of_neighbours_is_their_mean_metric_over_level():
    state = GradESState(5, GradESConfig(tau=1.0, tau_mode="relative", patience=1))
    for _ in range(MEMORY):
        grades_update(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), state, armed=False)
    state.mark([0, 4])
    ratio = grades_update(torch.tensor([math.nan, 4.0, 12.0, 4.0, math.nan]), state, armed=True)
    groups = torch.tensor([0, 0, 0, 1, 2])
    # 2 and 4 times their level beside the first; the last has no neighbour, and takes the mean of all.
    expected = torch.tensor([3.0, 3.0, 3.0, 1.0, 7 / 3], dtype=torch.float64)
    torch.testing.assert_close(neighbour_signal(state, ratio, groups), expected)


# --- what it costs -------------------------------------------------------------------------------------------------


def test_nothing_waits_for_the_device():
    parameters = _parameters()
    metric = MatrixMetric(_units(parameters), "grad_change")
    state = GradESState(2, GradESConfig(tau=0.5, unfreeze_factor=2.0))
    _set_grads(parameters, 0)
    with OperatorCounter() as counter:
        for armed in (False, True):
            ratio = grades_update(metric.measure(), state, armed=armed)
            grades_signal(neighbour_signal(state, ratio, torch.tensor([0, 1])), state)
            settled_units(state)
            units_to_unfreeze(state)
            state.mark([0], [1])
    assert counter.host_syncs == 0


@pytest.mark.parametrize(
    "arguments",
    [{"tau": 0.0}, {"tau": -1.0}, {"tau": math.inf}, {"tau_mode": "both"}, {"patience": 0}, {"unfreeze_factor": 1.0}],
)
def test_bad_arguments(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        GradESConfig(**{"tau": 1.0, **arguments})


def test_an_unknown_metric():
    with pytest.raises(ValueError, match="metric='hessian'"):
        MatrixMetric([], "hessian")


# --- the backward pass ---------------------------------------------------------------------------------------------


def test_the_backward_pass_is_cut_behind_what_is_frozen_first():
    model = torch.nn.Sequential(
        torch.nn.Embedding(10, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 8), torch.nn.Linear(8, 2, bias=False)
    )
    linear, head = 2 * 32, 2 * 16
    assert backward_flops(model) == 2 * linear + 2 * head
    model[2].weight.requires_grad_(False)
    assert backward_flops(model) == linear + 2 * head  # the gradient still goes through, to the norm and embedding
    model[0].requires_grad_(False)
    assert backward_flops(model) == linear + 2 * head
    model[1].requires_grad_(False)
    assert backward_flops(model) == 2 * head  # behind the layer's bias
    model[2].requires_grad_(False)
    assert backward_flops(model) == head


# --- what is left to gain ------------------------------------------------------------------------------------------


def _settles(values, tau, patience=1, steps=100):
    """The check, counted from 0, at which a unit settles by ``"remaining"``: plainly, in Python's floats."""
    recent = level = 0.0
    streak = 0
    for check, value in enumerate(values):
        keep = check / (check + 1)
        level = keep * level + (1 - keep) * value
        keep = min(keep, 1 - 1 / SMOOTH)
        recent = keep * recent + (1 - keep) * value
        done = (check + 1) / steps
        settled = recent * (1 - done) < tau * level * done and recent < FALLEN * level and check >= SMOOTH
        streak = streak + 1 if settled else 0
        if streak == patience:
            return check
    return None


def _remaining(values, tau, patience=1, steps=100):
    state = GradESState(1, GradESConfig(tau=tau, patience=patience))
    for check, value in enumerate(values):
        grades_update(torch.tensor([value], dtype=torch.float64), state, armed=True, done=(check + 1) / steps)
        if settled_units(state).isfinite().item():
            return check
    return None


DECAYS = {
    "exponential": [math.exp(-0.08 * check) for check in range(100)],
    "cosine": [1e-6 * (1 + math.cos(math.pi * check / 100)) for check in range(100)],
    "linear, noisy": [1e6 * (100 - check) * (0.2 + check % 7) for check in range(100)],
}


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize(("tau", "patience"), [(0.02, 1), (0.02, 3), (0.1, 3)])
def test_a_matrix_settles_when_little_is_left_to_gain(name, tau, patience):
    expected = _settles(DECAYS[name], tau, patience)
    assert expected is not None
    assert SMOOTH < expected < 99
    assert _remaining(DECAYS[name], tau, patience) == expected


def test_what_goes_on_as_before_never_settles_however_little_is_left():
    assert _remaining([1.0] * 100, tau=0.5) is None
    assert _remaining([1.0] * 50 + [0.6] * 50, tau=0.5) is None
    fallen = [1.0] * 80 + [0.3] * 20
    assert 80 < _remaining(fallen, tau=0.1) == _settles(fallen, 0.1) < 99


def test_without_an_end_as_much_is_to_come_as_there_was():
    state = GradESState(1, GradESConfig(tau=0.1, patience=1))
    for value in (1.0,) * 20 + (0.01,) * 9:
        ratio = grades_update(torch.tensor([value], dtype=torch.float64), state, armed=True)
    assert ratio.item() == pytest.approx(state["recent"].item() / state["level"].item() / 0.1)


def test_the_gain_is_the_rate_times_the_gradient():
    parameters = _parameters()
    _set_grads(parameters, 3)
    metric = MatrixMetric(_units(parameters), "gain")
    rates = {name: torch.tensor(0.5) if name == "b" else 0.25 for name in parameters}
    factors = {name: float(rates[name]) for name in parameters}
    expected = _sum({name: factors[name] * p.grad.double() for name, p in parameters.items()})
    torch.testing.assert_close(metric.measure(rates=rates).tolist(), expected, rtol=1e-5, atol=0.0)
    assert not metric.copies
    torch.testing.assert_close(metric.measure().tolist(), _sum({n: p.grad for n, p in parameters.items()}))
    with pytest.raises(ValueError, match=r"rates=.*a learning rate for each parameter, and 'a' has none"):
        metric.measure(rates={"b": 1.0, "c": 1.0})


@pytest.mark.parametrize("mode", ["remaining", "relative", "absolute"])
def test_a_forecast_is_when_it_settles_if_the_fall_goes_on(mode):
    rates = torch.tensor([0.0, 6.0, 9.0, 12.0], dtype=torch.float64)
    config = GradESConfig(tau=0.05 if mode != "absolute" else 0.01, tau_mode=mode, patience=1)
    state, at = GradESState(4, config), [math.inf] * 4
    for check in range(1, 1001):
        done = check / 1000
        grades_update(torch.exp(-rates * done), state, armed=done > 0.4, done=done)
        if check == 200:
            state["earlier"].copy_(state["recent"])
        if check == 400:
            forecast = grades_forecast(state, 0.4, 0.2)
        for unit in settled_units(state).isfinite().nonzero().flatten().tolist():
            at[unit] = min(at[unit], done)
    assert at[0] == math.inf
    assert all(0.4 < each < 1 for each in at[2:])
    assert forecast.tolist() == pytest.approx(at, abs=0.02)
    state.mark([1])
    assert grades_forecast(state, 0.4, 0.2)[1] == 0.0
