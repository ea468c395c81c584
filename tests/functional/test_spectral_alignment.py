"""The singular vector, the counts and the rule by arming, against float64 and worked examples."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_eff.functional.spectral_alignment import (
    CollapseConfig,
    CollapseState,
    alignment,
    collapse_update,
    collapsed_share,
    leading_singular_pair,
    majority_fraction,
    sign_diversity,
)
from lightning_eff.kernels.alignment import alignment_stats


def _matrix(out: int, size: int, gap: float, seed: int = 0) -> torch.Tensor:
    """float64, singular values 1, 1 / gap, then falling slowly."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(out, size)
    u, _ = torch.linalg.qr(torch.randn(out, rank, dtype=torch.float64, generator=generator))
    v, _ = torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=generator))
    values = torch.cat([torch.ones(1), torch.linspace(1 / gap, 0.1 / gap, rank - 1)]).double()
    return u * values @ v.T


def _start(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (7, 1), (1, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_with_a_gap_it_is_the_svd(shape, dtype):
    exact = 50 * _matrix(*shape, gap=3.0)  # the largest value squared overflows float16
    weight = exact.to(dtype)
    pair = leading_singular_pair(weight, _start(shape[1]), iterations=24)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    assert pair.v.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert abs(pair.sigma.item() / s[0].item() - 1) < tolerance
    assert 1 - abs((pair.v.double() @ vh[0]).item()) < tolerance
    assert 1 - abs((pair.u.double() @ u[:, 0]).item()) < tolerance
    assert (pair.v.double() @ vh[0]) * (pair.u.double() @ u[:, 0]) > 0  # of one sign together
    assert pair.residual.item() < tolerance


def test_without_a_gap_the_residual_says_so():
    """1024 x 1024 of independent numbers: after 8 iterations from a random start the vector is far from converged."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    _, _, vh = torch.linalg.svd(weight.double())
    few = leading_singular_pair(weight, _start(1024), 8)
    assert abs(few.v.double() @ vh[0]) < 0.9
    assert few.residual > 0.05
    many = leading_singular_pair(weight, _start(1024), 256)
    assert many.residual < 1e-4
    assert abs(many.v.double() @ vh[0]) > 0.9999


def test_one_iteration_at_a_time_is_the_same_as_all_at_once():
    weight, v = _matrix(20, 30, 1.2), _start(30).double()
    whole = leading_singular_pair(weight, v, 12)
    for _ in range(12):
        pair = leading_singular_pair(weight, v)
        v = pair.v
    torch.testing.assert_close(pair, whole, rtol=1e-12, atol=1e-12)


def test_it_follows_a_weight_that_changes():
    """One iteration a change keeps up, and keeps the sign."""
    weight, other = _matrix(40, 40, 3.0), _matrix(40, 40, 3.0, seed=5)
    pair = leading_singular_pair(weight, _start(40), 50)
    for step in range(1, 101):
        mixed = (1 - 0.003 * step) * weight + 0.003 * step * other
        last, pair = pair, leading_singular_pair(mixed, pair.v)
        assert last.v @ pair.v.to(last.v) > 0.9
    exact = torch.linalg.svd(mixed).Vh[0]
    assert abs(pair.v.double() @ exact) > 0.999


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_a_weight_without_a_singular_vector_keeps_the_vector(bad):
    v = torch.tensor([0.6, 0.8])
    pair = leading_singular_pair(torch.full((3, 2), bad), v)
    torch.testing.assert_close(pair.v, v)
    assert pair.residual == math.inf


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"weight of shape \(3, 2\) and v of shape \(3,\)"):
        leading_singular_pair(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="iterations=0 is not allowed"):
        leading_singular_pair(torch.ones(3, 2), torch.ones(2), 0)


def test_alignments_agree_with_the_counts():
    x = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(2)) + 0.2
    v = torch.nn.functional.normalize(torch.ones(16), dim=0)
    values = alignment(x, v)
    torch.testing.assert_close(
        values.double(), torch.cosine_similarity(x.double(), v.double(), dim=-1), rtol=0, atol=1e-6
    )
    counts = alignment_stats(x, v)
    assert counts.positive == (values > 0).sum()
    m = majority_fraction(counts.positive, counts.negative)
    assert m.item() == pytest.approx(max((values > 0).float().mean().item(), (values < 0).float().mean().item()))
    assert majority_fraction(counts.negative, counts.positive) == m  # whichever sign the vector has
    assert sign_diversity(m).item() == pytest.approx(4 * m.item() * (1 - m.item()))


def test_alignment_is_that_of_the_output_with_u():
    """<W x, u> = sigma <x, v>, methods/spectral_alignment.md 3.2."""
    weight, x = (
        _matrix(20, 30, 2.0),
        torch.randn(100, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    pair = leading_singular_pair(weight, _start(30).double(), 100)
    torch.testing.assert_close(x @ weight.T @ pair.u, pair.sigma * (x @ pair.v))
    assert torch.equal((x @ weight.T @ pair.u > 0), alignment(x, pair.v) > 0)


def test_no_token_has_a_sign():
    assert majority_fraction(torch.tensor(0), torch.tensor(0)).isnan()


def run(rows, trusted=True, **config):
    """Feed observations of one layer; whether it was collapsed after each, and the state."""
    state = CollapseState.of(1, CollapseConfig(**config))
    found = [bool(collapse_update(torch.tensor([m]), torch.tensor([trusted]), state)) for m in rows]
    return found, state


RULE = dict(threshold=0.9, hysteresis=0.2, patience=2, look_back=3)


def test_a_layer_that_was_never_diverse_is_never_collapsed():
    found, state = run([1.0] * 20, **RULE)
    assert not any(found)
    assert not state.armed.item()
    assert state.lowest.item() == 1.0


def test_an_armed_layer_that_returns_to_collapse():
    #          collapsed, diverse (armed by the median of 3 at the third), back: the second in a row counts
    found, state = run([1.0, 1.0, 0.6, 0.6, 0.6, 0.95, 0.95, 1.0, 0.6, 1.0], **RULE)
    assert found == [False] * 6 + [True, True, False, False]
    assert state.armed.item()


@pytest.mark.parametrize(
    ("armed", "collapsed", "share"),
    [
        ([1, 0, 0, 0, 0], [1, 0, 0, 0, 0], 0.0),  # two armed layers of five say nothing
        ([1, 1, 0, 0, 0], [1, 1, 0, 0, 0], 0.0),
        ([1, 1, 1, 0, 0], [1, 0, 0, 0, 0], 0.2),  # of all that are watched, not of the armed ones
        ([1, 1], [1, 0], 0.5),  # fewer are watched: all of them armed
        ([1, 0], [1, 0], 0.0),
        ([1], [1], 1.0),
    ],
)
def test_the_share_is_of_all_layers_and_of_three_at_least(armed, collapsed, share):
    state = CollapseState.of(len(armed), CollapseConfig(**RULE))
    state.lowest = torch.where(torch.tensor(armed).bool(), 0.5, 1.0)
    assert collapsed_share(torch.tensor(collapsed).bool(), state).item() == pytest.approx(share)


def test_one_diverse_observation_arms_nothing():
    found, state = run([1.0, 0.5, 1.0, 1.0, 1.0], **RULE)
    assert not any(found)
    assert not state.armed.item()


def test_what_is_not_trusted_changes_nothing():
    found, state = run([0.6] * 5, trusted=False, **RULE)
    assert not any(found)
    assert state.observations.item() == 0
    assert state.history.isnan().all()


def test_nothing_is_collapsed_by_an_observation_without_trust():
    state = CollapseState.of(1, CollapseConfig(**RULE))
    for m in (0.6, 0.6, 0.6, 1.0, 1.0):
        collapse_update(torch.tensor([m]), torch.tensor([True]), state)
    assert state.collapsed.item()
    assert not collapse_update(torch.tensor([1.0]), torch.tensor([False]), state).item()
    assert not collapse_update(torch.tensor([math.nan]), torch.tensor([True]), state).item()
    assert state.collapsed.item()  # and it is not forgotten
    assert collapse_update(torch.tensor([1.0]), torch.tensor([True]), state).item()


def test_layers_are_judged_apart():
    state = CollapseState.of(3, CollapseConfig(**RULE))
    rows = [[1.0, 0.6, 0.6]] * 3 + [[1.0, 1.0, 0.6]] * 2
    for row in rows:
        collapsed = collapse_update(torch.tensor(row), torch.ones(3, dtype=torch.bool), state)
    assert collapsed.tolist() == [False, True, False]
    assert state.armed.tolist() == [False, True, True]


def test_a_state_goes_on_exactly():
    generator = torch.Generator().manual_seed(0)
    rows = 0.5 + 0.5 * torch.rand(30, 4, generator=generator).sqrt()
    trusted = torch.rand(30, 4, generator=generator) > 0.2
    whole, half = (CollapseState.of(4, CollapseConfig(**RULE)) for _ in range(2))
    for step in range(30):
        collapse_update(rows[step], trusted[step], whole)
        collapse_update(rows[step], trusted[step], half)
        saved = half.state_dict()
        half = CollapseState.of(4, CollapseConfig(**RULE))
        half.load_state_dict(saved)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(half.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)


def test_another_window_keeps_who_is_armed():
    _, state = run([0.6] * 4, **RULE)
    other = CollapseState.of(1, CollapseConfig(**{**RULE, "look_back": 5}))
    other.load_state_dict(state.state_dict())
    assert other.armed.item()
    assert other.observations.item() == 0
    collapse_update(torch.tensor([0.5]), torch.tensor([True]), other)
    assert other.lowest.item() == pytest.approx(0.6)  # one observation is no window of five


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("threshold", 0.5),
        ("threshold", 1.01),
        ("hysteresis", -0.1),
        ("hysteresis", 0.49),
        ("patience", 0),
        ("look_back", 0),
    ],
)
def test_bad_rules(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value} is not allowed"):
        CollapseConfig(**{argument: value})
