"""MISA's arithmetic: golden values of both recursions, and what a sampler promises."""

import io
import itertools
import math
from collections import Counter

import pytest
import torch

from lightning_eff.functional.misa import Sampler, SamplerConfig, debiased, importance, perplexity, probabilities


def recursion(measured, *, variant, beta=0.8):
    value, values = torch.zeros(1, dtype=torch.float64), []
    for k, x in enumerate(measured, 1):
        x = torch.tensor([x], dtype=torch.float64)
        value = importance(value, x, beta=beta, variant=variant, interval=k)
        values.append(value.item())
    return values


def test_the_released_recursion_divides_again_what_was_divided():
    # Golden: the released optimizer run with a constant gradient norm of 1, beta 0.8.
    golden = [1.0, 2.7778, 4.9636, 7.0645, 8.7035, 9.7076]
    assert recursion([1.0] * 6, variant="official") == pytest.approx(golden, abs=5e-5)


def test_the_papers_recursion():
    # By hand: G = 0.8 G' + 0.2 x of x = 1, 1, 4.
    assert recursion([1.0, 1.0, 4.0], variant="paper") == pytest.approx([0.2, 0.36, 1.088], rel=1e-12)


def test_a_constant_measure_is_its_own_debiased_importance():
    values = torch.tensor(recursion([3.0] * 6, variant="paper"), dtype=torch.float64)
    assert debiased(values, torch.arange(1, 7), 0.8).tolist() == pytest.approx([3.0] * 6, rel=1e-12)
    assert debiased(torch.zeros(2), torch.tensor([0, 0]), 0.8).tolist() == [0.0, 0.0]
    assert debiased(torch.ones(1), torch.ones(1, dtype=torch.int64), 0.0).item() == 1.0


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_nothing_measured_leaves_the_importance_alone(variant):
    assert recursion([1.0, math.nan, math.inf], variant=variant)[1:] == recursion([1.0], variant=variant) * 2


def test_probabilities_by_hand():
    values = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    weights = [1.0, math.exp(0.5), math.exp(1.5)]
    paper = probabilities(values, eta=0.5, variant="paper").tolist()
    assert paper == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-12)
    weights = [1.0, math.exp(0.5), math.exp(4.5)]
    official = probabilities(values, eta=0.5, variant="official").tolist()
    assert official == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-12)
    weights = [1.0, math.exp(1.0), math.exp(5.0)]  # the exponent ends at 5
    official = probabilities(values, eta=1.0, variant="official").tolist()
    assert official == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-12)
    assert probabilities(values * 1e6, eta=1.0, variant="paper").tolist() == [0.0, 0.0, 1.0]


def test_the_papers_probabilities_solve_their_problem():
    """They have the largest sum of p G - KL(p, uniform) / eta."""
    values, eta = torch.tensor([0.1, 0.7, 1.3, 0.4], dtype=torch.float64), 2.0

    def objective(p):
        return (p * values).sum() - (p * (p * len(p)).log()).sum() / eta

    best = probabilities(values, eta=eta, variant="paper")
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        other = torch.softmax(best.log() + 0.1 * torch.randn(4, generator=generator, dtype=torch.float64), 0)
        assert objective(other) < objective(best)


# --- selection -----------------------------------------------------------------------------------------------------


def measured(sampler, values):
    """Give every module this importance, as if all had had a turn."""
    sampler.importance.copy_(torch.tensor(values, dtype=torch.float64))
    sampler.turns.fill_(10_000)  # no bias left
    sampler.last = [0] * len(values)
    sampler.interval = 1


@pytest.mark.parametrize("sampling", ["importance", "uniform", "cyclic"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_budget_holds_and_everyone_has_a_turn(sampling, seed):
    sizes = [8, 8, 24, 8, 32, 64, 8, 16]  # 64 fits alone
    sampler = Sampler(sizes, SamplerConfig(budget=64 / 400, sampling=sampling, seed=seed), total=400)
    seen = Counter()
    for _ in range(60):
        active = sampler.select()
        assert active == sorted(set(active))
        assert 0 < sum(sizes[i] for i in active) <= 64
        seen.update(active)
    assert set(seen) == set(range(8))


def test_those_without_a_turn_come_first():
    for seed in range(20):
        sampler = Sampler([1] * 10, SamplerConfig(budget=0.3, seed=seed, eta=50.0))
        turns = []
        for _ in range(4):
            active = sampler.select()
            turns.append(active)
            sampler.measure(active, torch.ones(len(active)))
        first_round = [i for active in turns[:3] for i in active]
        assert len(set(first_round)) == 9
        assert set(range(10)) - set(first_round) <= set(turns[3])


def test_those_that_have_waited_longest_come_next():
    sampler = Sampler([1] * 6, SamplerConfig(budget=0.5, sample_last=2, eta=1.0))
    measured(sampler, [100.0, 100.0, 100.0, 0.0, 0.0, 0.0])
    sampler.last, sampler.interval = [5, 5, 5, 1, 0, 5], 6
    for _ in range(1, 20):
        state = sampler.state_dict()
        assert {3, 4} < set(sampler.select())
        generator = sampler.generator.get_state()
        sampler.load_state_dict(state)
        sampler.generator.set_state(generator)


def test_drawn_as_the_probabilities_say():
    values = [0.0, 0.5, 1.0, 2.0]
    sampler = Sampler([1] * 4, SamplerConfig(units=2, sample_last=0, eta=1.0))
    measured(sampler, values)
    p = torch.softmax(torch.tensor(values, dtype=torch.float64), 0).tolist()
    assert sampler.probabilities.tolist() == pytest.approx(p)
    draws = 20_000
    seen = Counter(tuple(sampler.select()) for _ in range(draws))
    for i, j in itertools.combinations(range(4), 2):  # without replacement, one after the other
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert seen[(i, j)] / draws == pytest.approx(expected, abs=4 * math.sqrt(expected / draws))


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_auto_amounts_to_half_of_them_whatever_the_unit(variant, scale):
    values = [scale * (1 + i) for i in range(20)]
    sampler = Sampler([1] * 20, SamplerConfig(units=1, variant=variant, debias=False))
    measured(sampler, values)
    p = sampler.probabilities
    assert perplexity(p).item() == pytest.approx(10, rel=1e-6)
    assert p.tolist() == sorted(p.tolist())
    assert p.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_auto_shuts_out_none_of_many_equals(variant):
    """Fifteen equals cannot amount to eight. The bound of "official" is that of the released code."""
    sampler = Sampler([1] * 16, SamplerConfig(units=1, variant=variant, debias=False))
    measured(sampler, [1.0] * 15 + [0.0])
    p = sampler.probabilities
    assert (p[0] / p[15]).item() == pytest.approx(math.exp({"paper": 10, "official": 5}[variant]))
    measured(sampler, [1.0] * 16)
    assert sampler.probabilities.tolist() == pytest.approx([1 / 16] * 16)


def test_auto_follows_those_that_have_had_a_turn():
    sampler = Sampler([1] * 20, SamplerConfig(units=10, debias=False))
    assert sampler.probabilities.tolist() == pytest.approx([1 / 20] * 20)  # nothing is known
    sampler.importance[:10] = torch.arange(1.0, 11.0)
    sampler.turns[:10] = 1
    p = sampler.probabilities
    assert perplexity(p[:10] / p[:10].sum()).item() == pytest.approx(5, rel=1e-6)
    assert p[10:].tolist() == pytest.approx([p[4:6].prod().sqrt().item()] * 10)  # as a mean one: between the middle two


def test_auto_draws_even_where_a_sample_has_room_for_two():
    """Two that have waited longest would fill every sample: they do in every second one."""

    def turns(**arguments):
        sampler = Sampler([1] * 10, SamplerConfig(units=2, **arguments))
        seen = Counter()
        for _ in range(300):
            active = sampler.select()
            sampler.measure(active, torch.tensor([10.0 if i < 3 else 1.0 for i in active]))
            seen.update(active)
        return seen, sampler.drawn

    seen, drawn = turns()
    assert drawn == 2 * 147  # of 295 samples after the first round, those with an even number
    assert min(seen[i] for i in range(3)) > 1.5 * max(seen[i] for i in range(3, 10))
    seen, drawn = turns(sample_last=2)
    assert drawn == 0
    assert set(seen.values()) == {60}


def test_uniform_is_uniform_whatever_is_important():
    sampler = Sampler([1] * 5, SamplerConfig(units=1, sampling="uniform", eta=100.0))
    sampler.measure([0], torch.tensor([1e6]))
    seen = Counter(sampler.select()[0] for _ in range(5000))
    assert all(abs(seen[i] / 5000 - 0.2) < 0.025 for i in range(5))


def test_cyclic_goes_round_and_leaves_out_what_never_fits():
    sampler = Sampler([4, 4, 100, 6, 4], SamplerConfig(budget=0.1, sampling="cyclic"), total=100)
    assert [sampler.select() for _ in range(6)] == [[0, 1], [3, 4], [0, 1], [3, 4], [0, 1], [3, 4]]
    one = Sampler([4, 4, 100], SamplerConfig(units=1, sampling="cyclic"))  # a number of modules, whatever they have
    assert [one.select() for _ in range(4)] == [[0], [1], [2], [0]]
    two = Sampler([1, 1, 1], SamplerConfig(units=2, sampling="cyclic"))
    assert [two.select() for _ in range(3)] == [[0, 1], [0, 2], [1, 2]]


def test_what_does_not_fit_is_left_out_and_others_fill_the_budget():
    sampler = Sampler([6, 6, 1, 1], SamplerConfig(budget=0.8, sample_last=0), total=10)
    for _ in range(10):
        assert sum(sampler.sizes[i] for i in sampler.select()) == 8


@pytest.mark.parametrize(
    ("sampling", "eta"), [("importance", 0.3), ("importance", "auto"), ("uniform", "auto"), ("cyclic", "auto")]
)
def test_a_state_carries_on_exactly(sampling, eta):
    def go_on(sampler, intervals):
        turns = []
        for _ in range(intervals):
            active = sampler.select()
            sampler.measure(active, torch.tensor([float(i + 1) for i in active]))
            turns.append(active)
        return turns

    config = SamplerConfig(budget=0.4, sampling=sampling, eta=eta)
    unbroken, first, second = (Sampler([1] * 9, config) for _ in range(3))
    expected = go_on(unbroken, 20)
    assert go_on(first, 7) == expected[:7]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert go_on(second, 13) == expected[7:]
    assert torch.equal(second.importance, unbroken.importance)
    assert torch.equal(second.turns, unbroken.turns)
    assert second.last == unbroken.last
    assert second.drawn == unbroken.drawn


def test_the_users_random_numbers_are_left_alone():
    before = torch.get_rng_state()
    sampler = Sampler([1] * 9, SamplerConfig(budget=0.4))
    sampler.select()
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("budget", 0.0),
        ("budget", 1.5),
        ("units", 0),
        ("units", 1.5),
        ("eta", -1.0),
        ("eta", "automatic"),
        ("eta", None),
        ("eta", True),
        ("eta", math.inf),
        ("beta", 1.0),
        ("sampling", "greedy"),
        ("variant", "code"),
        ("sample_last", -1),
        ("seed", -1),
    ],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}={value!r} is not allowed: it must be "):
        SamplerConfig(**{argument: value})


def test_a_budget_that_nothing_fits_says_what_would():
    with pytest.raises(ValueError, match=r"budget=0.03 of 1,000 parameters.*has 40: it must be at least 0.04"):
        Sampler([40, 50], SamplerConfig(), total=1000)
