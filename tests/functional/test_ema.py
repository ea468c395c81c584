import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from harness.operators import OperatorCounter
from lightning_eff.functional import ema
from lightning_eff.functional.averaging import weighted_average
from lightning_eff.functional.ema import (
    Shadows,
    ema_update_,
    float32_copies,
    half_life_decay,
    posthoc_error,
    posthoc_weights,
    power_decay,
    power_from_width,
    warmup_decay,
    width_from_power,
)

WIDTHS = {0.05: 16.972199, 0.10: 6.937204, 0.15: 3.557869, 0.20: 1.826214, 0.25: 0.719824, 0.28: 0.169344}


# --- running updates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_update_against_float64(dtype):
    weights = [[torch.randn(5, 3).to(dtype), torch.randn(7).to(dtype)] for _ in range(40)]
    shadows = float32_copies(weights[0])
    exact = [weight.double() for weight in weights[0]]
    for now in weights[1:]:
        ema_update_(shadows, now, decay=0.9)
        exact = [0.9 * average + 0.1 * weight.double() for average, weight in zip(exact, now, strict=True)]
    for shadow, average in zip(shadows, exact, strict=True):
        assert shadow.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(shadow.double(), average, rtol=1e-5, atol=1e-6)


def test_a_shadow_of_bfloat16_weights_moves():
    # In bfloat16 itself an average with this decay stays at 1 for ever.
    shadows = float32_copies([torch.ones(1, dtype=torch.bfloat16)])
    for _ in range(2000):
        ema_update_(shadows, [torch.full((1,), 2.0, dtype=torch.bfloat16)], decay=0.999)
    assert shadows[0].item() == pytest.approx(2 - 0.999**2000, abs=1e-3)


def test_one_call_for_float32_and_no_sync():
    shadows, weights = [torch.zeros(3), torch.zeros(2, 2)], [torch.nn.Parameter(torch.ones(3)), torch.ones(2, 2)]
    with OperatorCounter() as counter:
        ema_update_(shadows, weights, decay=0.5)
    assert counter.operators == {"aten::_foreach_lerp_": 1}
    assert counter.host_syncs == 0


@pytest.mark.parametrize("small", [True, False], ids=["many", "one"])
def test_weights_of_16_bits_are_cast_in_groups(small, monkeypatch):
    """In place of float32 copies of all of them at once, which would be twice the weights."""
    monkeypatch.setattr(ema, "_GROUP", 1000)
    shapes = [(7, 30)] * 20 if small else [(140, 30), (), (1, 1700), (3,)]
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    shadows = float32_copies([torch.randn(shape) for shape in shapes])
    whole = [torch.lerp(s, w.float(), 0.25) for s, w in zip(shadows, weights, strict=True)]
    with _LargestCast() as largest:
        ema_update_(shadows, weights, decay=0.75)
    assert all(torch.equal(s, w) for s, w in zip(shadows, whole, strict=True))
    assert largest.elements == (840 if small else 1700)  # four of 210, or a row that cannot be cut


class _LargestCast(TorchDispatchMode):
    """The most elements that one step of the averages has cast."""

    elements = 0
    _cast = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self._cast += result.numel()
        if func is torch.ops.aten._foreach_lerp_.Scalar:
            self.elements, self._cast = max(self.elements, self._cast), 0
        return result


def test_decay_0_copies_and_1_keeps_exactly():
    shadows, weights = [torch.randn(100)], [torch.randn(100)]
    before = shadows[0].clone()
    ema_update_(shadows, weights, decay=1.0)
    assert torch.equal(shadows[0], before)
    ema_update_(shadows, weights, decay=0.0)
    assert torch.equal(shadows[0], weights[0])
    ema_update_([], [], decay=0.5)


def test_copies_are_real():
    weight = torch.nn.Parameter(torch.ones(2))
    shadows = float32_copies([weight])
    with torch.no_grad():
        weight.fill_(5.0)
    assert shadows[0].tolist() == [1.0, 1.0]
    assert not shadows[0].requires_grad


def test_half_life():
    assert half_life_decay(1000) ** 1000 == pytest.approx(0.5)
    assert half_life_decay(1000, every_n_steps=10) == pytest.approx(half_life_decay(1000) ** 10)


def test_warm_up():
    values = [warmup_decay(update, 0.999) for update in range(1, 40_000)]
    assert values[0] == 0.0
    assert values == sorted(values)
    assert values[-1] == 0.999
    assert next(i for i, value in enumerate(values) if value == 0.999) == pytest.approx(31_622, abs=2)


# --- power functions ------------------------------------------------------------------------------------------------


def test_widths_and_powers():
    for sigma_rel, gamma in WIDTHS.items():
        assert power_from_width(sigma_rel) == pytest.approx(gamma, abs=5e-7)
        assert width_from_power(gamma) == pytest.approx(sigma_rel, abs=1e-7)
    for sigma_rel in (1e-6, 0.001, 0.2886):
        assert width_from_power(power_from_width(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-9)


def test_decays_of_a_power_function():
    gamma = power_from_width(0.10)
    expected = {1: 0.0, 2: 0.00408, 10: 0.433325, 1000: 0.99209}
    assert {step: power_decay(step, gamma) for step in expected} == pytest.approx(expected, abs=5e-6)
    assert power_decay(50, gamma, every_n_steps=100) == 0.0


def walk(steps, every=1):
    """A random walk, and its power-function averages of every width and step that was asked for."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.zeros(200, dtype=torch.float64)
    widths = (0.05, 0.07, 0.10, 0.20)
    shadows = {width: [weights.clone()] for width in widths}
    stored = {}
    for step in range(1, steps + 1):
        weights += torch.randn(200, dtype=torch.float64, generator=generator)
        if step % every == 0:
            for width in widths:
                ema_update_(shadows[width], [weights], power_decay(step, power_from_width(width), every))
                stored[step, width] = shadows[width][0].clone()
    return weights, stored


def test_posthoc_golden_values():
    # Target 0.07 at 400 from snapshots at 100..400 of widths 0.05 and 0.10.
    steps, widths = [100, 200, 300, 400] * 2, [0.05] * 4 + [0.10] * 4
    weights = posthoc_weights(steps, widths, 0.07)
    assert weights == pytest.approx([0, 0, 0.0107, 0.4346, 0, -0.0006, -0.0439, 0.5992], abs=1e-4)
    assert sum(weights) == pytest.approx(1, abs=1e-12)


def test_posthoc_of_a_stored_average_is_that_average():
    steps, widths = [100, 200, 300, 400] * 2, [0.05] * 4 + [0.10] * 4
    for index, (step, width) in enumerate(zip(steps, widths, strict=True)):
        weights = posthoc_weights(steps, widths, width, step)
        assert weights == pytest.approx([float(i == index) for i in range(8)], abs=1e-9)
        assert posthoc_error(steps, widths, width, step) < 1e-6


@pytest.mark.parametrize(("width", "tolerance"), [(0.07, 0.02), (0.20, 0.05)])
def test_posthoc_against_an_average_that_was_kept(width, tolerance):
    now, stored = walk(2000)
    steps = [step for step in range(100, 2001, 100) for _ in range(2)]
    widths = [0.05, 0.10] * 20
    made = weighted_average(
        [stored[key] for key in zip(steps, widths, strict=True)], posthoc_weights(steps, widths, width)
    )
    kept = stored[2000, width]
    others = min((stored[2000, other] - kept).norm() for other in (0.05, 0.10))
    assert (made - kept).norm() < tolerance * (now - kept).norm()
    assert (made - kept).norm() < 0.1 * others  # far closer than what it was made of


def test_updates_every_few_steps_have_nearly_the_same_profile():
    (now, every_step), (_, sparse) = walk(2000), walk(2000, every=10)
    kept = every_step[2000, 0.10]
    assert (sparse[2000, 0.10] - kept).norm() < 0.1 * (now - kept).norm()


def test_the_error_tells_good_material_from_poor():
    assert posthoc_error([400, 400], [0.05, 0.10], 0.07) < 0.1
    assert posthoc_error([400, 400], [0.10, 0.20], 0.03) > 0.3


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ema_update_([torch.ones(1)], [torch.ones(1)], 1.5),
            "decay=1.5 is not allowed: it must be a number of at least 0 and at most 1",
        ),
        (lambda: float32_copies([torch.ones(1)], "gpu"), "device='gpu' is not allowed: it must be a torch.device"),
        (lambda: ema_update_([torch.ones(1)], [torch.ones(1)], math.nan), "decay=nan"),
        (lambda: ema_update_([torch.ones(1)], [], 0.5), "shorter"),
        (lambda: half_life_decay(0), "half_life=0 is not allowed"),
        (lambda: half_life_decay(10, every_n_steps=0), "every_n_steps=0"),
        (lambda: warmup_decay(0, 0.9), "counted from 1"),
        (lambda: warmup_decay(1, 2.0), "decay=2.0"),
        (lambda: warmup_decay(1, 0.9, power=0), "power=0 is not allowed: it must be a number above 0"),
        (lambda: power_from_width(0.3), "sigma_rel=0.3 is not allowed"),
        (lambda: power_from_width(0.0), "sigma_rel=0.0"),
        (lambda: width_from_power(-1), "gamma=-1"),
        (lambda: power_decay(0, 6.9), "step=0"),
        (
            lambda: posthoc_weights([], [], 0.1),
            r"steps=\[\] is not allowed: .* above 0, at least one",
        ),
        (lambda: posthoc_weights([1, 2], [0.1], 0.1), "1 widths for 2"),
        (lambda: posthoc_weights([0], [0.1], 0.1), r"steps=\[0\] is not allowed: .* above 0"),
        (lambda: posthoc_weights([1, 1], [0.1, 0.1], 0.1), "is there twice"),
        (lambda: posthoc_weights([100], [0.1], 0.1, step=200), "up to the last stored step"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shadows_in_pieces_have_the_bits_of_those_alone(dtype):
    shapes = [(), (3,), (5,), (4, 3), (2, 3), (0, 3), (70, 70), (2, 2, 3), (1, 2, 3)]
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    shadows, alone = Shadows(weights), float32_copies(weights)
    shadows.append(weights[0])
    alone += float32_copies(weights[:1])
    weights.append(weights[0])
    assert len(shadows._pieces) == 3
    current = shadows.sort(weights)
    for decay in (0.9, 0.0, 0.5):
        with torch.no_grad():
            for weight in weights:
                weight += 1
        shadows.update(current, decay)
        ema_update_(alone, weights, decay)
        for one, other in zip(shadows.tensors, alone, strict=True):
            assert one.shape == other.shape
            assert torch.equal(one, other)
