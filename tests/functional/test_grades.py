"""The metric against plain float64 arithmetic, and the decision step by step."""

from __future__ import annotations

import math

import pytest
import torch

from harness.operators import OperatorCounter
from lightning_eff.functional.grades import (
    MEMORY,
    GradESConfig,
    GradESState,
    MatrixMetric,
    grades_signal,
    grades_update,
    neighbour_signal,
    settled_units,
    units_to_unfreeze,
)
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
    state = GradESState(2, GradESConfig(tau=0.5, patience=1))
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
    at, state = _feed([1.0] * MEMORY + [0.4], tau=0.5, patience=1)
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
    state = GradESState(5, GradESConfig(tau=1.0, patience=1))
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
