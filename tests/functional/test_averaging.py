import math
import random

import pytest
import torch

from lightning_eff.functional.averaging import (
    CURVES,
    decay_from_weights,
    exponential_weights,
    linear_weights,
    loss_weights,
    scheme_weights,
    step_weights,
    uniform_weights,
    weighted_average,
    weights_from_decay,
    wsm_weights,
)
from lightning_eff.functional.ema import power_from_width

STEPS = [100, 200, 300, 400]


def trajectory(count, size=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    moves = torch.randn(count, size, dtype=torch.float64, generator=generator)
    return list(moves.cumsum(0))


# --- golden values: the tables of the WSM and PMA papers' equations, worked out by hand ------------------------------


@pytest.mark.parametrize(
    ("count", "curve", "expected"),
    [
        (4, "linear", [0.25, 0.25, 0.25, 0.25]),
        (4, "cosine", [0.1464, 0.3536, 0.3536, 0.1464]),
        (4, "1-sqrt", [0.5, 0.2071, 0.1589, 0.1340]),
        (8, "1-sqrt", [0.3536, 0.1464, 0.1124, 0.0947, 0.0835, 0.0755, 0.0694, 0.0646]),
        (8, "cosine", [0.0381, 0.1084, 0.1622, 0.1913, 0.1913, 0.1622, 0.1084, 0.0381]),
    ],
)
def test_wsm_weights_of_the_three_curves(count, curve, expected):
    assert wsm_weights(range(count), curve) == pytest.approx(expected, abs=5e-5)


def test_pma_weights():
    assert linear_weights(range(1, 11)) == pytest.approx([i / 55 for i in range(1, 11)])
    # The recursion's oldest weight; the closed form that the paper prints would sum to 0.6513 and 0.8926.
    assert exponential_weights(range(10), alpha=0.1)[0] == pytest.approx(0.3874, abs=5e-5)
    assert exponential_weights(range(10), alpha=0.2)[0] == pytest.approx(0.1342, abs=5e-5)


def test_exponential_weights_are_those_of_the_recursion():
    points = trajectory(7)
    average = points[0]
    for point in points[1:]:
        average = 0.3 * point + 0.7 * average
    torch.testing.assert_close(weighted_average(points, exponential_weights(range(7), 0.3)), average)


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", [*CURVES, lambda x: (1 - x) ** 3])
def test_wsm_is_the_trajectory_with_reweighted_updates(curve):
    points = trajectory(9)
    merged = weighted_average(points, wsm_weights(range(9), curve))
    shape = CURVES[curve] if isinstance(curve, str) else curve
    replayed = points[0].clone()
    for i in range(1, 9):
        replayed += shape(i / 9) * (points[i] - points[i - 1])
    torch.testing.assert_close(merged, replayed, rtol=0, atol=1e-13)


def test_uniform_merging_is_linear_decay():
    assert wsm_weights(range(0, 1000, 100), "linear") == pytest.approx(uniform_weights(range(10)), abs=1e-15)
    assert decay_from_weights(uniform_weights(STEPS)) == pytest.approx([1 - i / 4 for i in (1, 2, 3)])


def test_decay_and_weights_are_inverse():
    factors = [0.9, 0.9, 0.4, 0.0]
    assert decay_from_weights(weights_from_decay(factors)) == pytest.approx(factors)


def test_wsm_with_uneven_steps_reads_the_curve_where_the_steps_are():
    # Three quarters of the way after the first update: what an even grid of 5 has as its third factor.
    uneven = decay_from_weights(wsm_weights([0, 75, 100], "1-sqrt"))
    assert uneven == pytest.approx([1 - math.sqrt(0.75 * 2 / 3), 1 - math.sqrt(2 / 3)])
    assert wsm_weights([3, 6, 9, 12]) == pytest.approx(wsm_weights([0, 1, 2, 3]))


@pytest.mark.parametrize("scheme", ["uniform", "linear", "exponential", "wsm", "loss", "step"])
@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_every_scheme_sums_to_one_and_is_not_negative(scheme, count):
    steps = sorted(random.Random(0).sample(range(1, 10_000), count))
    weights = scheme_weights(scheme, steps, losses=[3.0 + i % 7 for i in range(count)])
    assert len(weights) == count
    assert math.fsum(weights) == pytest.approx(1, abs=1e-14)
    assert min(weights) >= 0


def test_penalties():
    assert loss_weights([1.0, 2.0], penalty=2) == pytest.approx([0.8, 0.2])
    assert loss_weights([1.0, 2.0, 3.0], penalty=0) == step_weights([1, 2, 3], penalty=0) == uniform_weights([1, 2, 3])
    assert loss_weights([1e-3, 1e3], penalty=200) == [1.0, 0.0]  # no overflow
    # A power-function profile over [0, 1] has its mean at (gamma + 1) / (gamma + 2).
    gamma, steps = power_from_width(0.1), range(1, 2001)
    mean = sum(w * s / 2000 for w, s in zip(step_weights(steps, gamma), steps, strict=True))
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), abs=1e-3)


# --- the sum --------------------------------------------------------------------------------------------------------


def test_the_sum_is_in_float64_and_rounded_once():
    points = [point.to(torch.bfloat16) for point in trajectory(50)]
    merged = weighted_average(points, uniform_weights(range(50)), dtype=torch.float32)
    exact = torch.stack([point.double() for point in points]).mean(0)
    assert torch.equal(merged, exact.float())
    assert weighted_average(points, uniform_weights(range(50))).dtype == torch.bfloat16


def test_one_checkpoint_or_equal_ones_come_back_bit_by_bit():
    point = trajectory(1)[0].float()
    assert torch.equal(weighted_average([point], [1.0]), point)
    assert torch.equal(weighted_average([point] * 7, uniform_weights(range(7))), point)


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1 << 20,), ((1 << 20) + 1,)])
def test_any_shape_and_layout(shape):
    points = [torch.randn(shape) for _ in range(3)]
    expected = sum(weight * point.double() for weight, point in zip([2.0, -1.5, 0.5], points, strict=True)).float()
    assert torch.equal(weighted_average(iter(points), [2.0, -1.5, 0.5]), expected)
    if len(shape) == 2:
        assert torch.equal(weighted_average([point.t() for point in points], [2.0, -1.5, 0.5]), expected.t())


def test_other_dtypes():
    points = [torch.complex(torch.randn(4), torch.randn(4)) for _ in range(2)]
    torch.testing.assert_close(weighted_average(points, [0.5, 0.5]), (points[0] + points[1]) / 2)
    small = [torch.ones(4).to(torch.float8_e4m3fn)] * 2
    assert weighted_average(small, [0.5, 0.5], dtype=torch.float32).tolist() == [1.0] * 4


def test_the_result_shares_no_memory_and_has_no_gradient():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    merged = weighted_average([weight], [1.0])
    assert not merged.requires_grad
    assert merged.data_ptr() != weight.data_ptr()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform_weights([]), r"steps=\[\] is not allowed: it must be a list of finite numbers, at least one"),
        (lambda: linear_weights([100, 100]), "oldest first, none twice"),
        (lambda: wsm_weights([200, 100]), "oldest first"),
        (
            lambda: exponential_weights(STEPS, alpha=0),
            "alpha=0 is not allowed: .* above 0 and at most 1",
        ),
        (lambda: exponential_weights(STEPS, alpha=math.nan), "alpha=nan"),
        (lambda: wsm_weights(STEPS, "sqrt"), r"decay='sqrt' is not allowed: it must be one of \('linear', 'cosine'"),
        (lambda: wsm_weights(STEPS, lambda x: x), "never rise"),
        (lambda: wsm_weights(STEPS, lambda x: 2 - x), "within"),
        (lambda: wsm_weights(STEPS, lambda x: math.nan), "decay factors"),
        (lambda: weights_from_decay([0.5, -0.1]), "decay factors"),
        (lambda: loss_weights([1.0, 0.0]), r"losses=\[1.0, 0.0\] is not allowed: .* above 0"),
        (lambda: loss_weights([1.0, math.inf]), r"losses=\[1.0, inf\] is not allowed: .* finite"),
        (lambda: loss_weights([]), "at least one"),
        (lambda: loss_weights([1.0], penalty=-1), "penalty=-1 is not allowed"),
        (lambda: step_weights([0, 1]), "above 0"),
        (lambda: scheme_weights("mean", STEPS), "scheme='mean' is not allowed: it must be one of"),
        (lambda: scheme_weights("loss", STEPS), "needs one for each of the 4 checkpoints, found none"),
        (lambda: scheme_weights("loss", STEPS, losses=[1.0]), "found 1 of them"),
        (lambda: weighted_average([], []), r"weights=\[\] is not allowed"),
        (lambda: weighted_average([torch.ones(1)], [0.5, 0.5]), "2 weights for 1 tensors"),
        (lambda: weighted_average([torch.ones(1)] * 2, [1.0]), "more tensors than the 1 weights"),
        (lambda: weighted_average([torch.ones(1), torch.ones(2)], [0.5, 0.5]), r"shapes \(1,\) and \(2,\) differ"),
        (lambda: weighted_average([torch.ones(1, dtype=torch.int64)], [1.0]), "torch.int64 cannot be averaged"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
