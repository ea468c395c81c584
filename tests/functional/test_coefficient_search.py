import math
import random

import pytest

from lightning_eff.functional.coefficient_search import evolve, greedy_soup

BEST = [0.7, -0.4, 0.5, 0.2]  # sums to 1, and no soup reaches it


def distance(weights):
    return math.dist(weights, BEST)


def alone(count):
    return [[float(i == j) for j in range(count)] for i in range(count)]


def test_greedy_takes_what_helps_in_the_order_of_merit():
    found = greedy_soup(distance, 4)
    assert len(found.trials) == 7
    assert found.weights == [0.5, 0.0, 0.5, 0.0]  # the first and the third; neither of the others helps
    assert found.score == distance(found.weights) == min(score for _, score in found.trials)


def test_evolution_finds_what_no_soup_can():
    found = evolve(distance, alone(4), evaluations=300)
    assert len(found.trials) == 300
    assert found.score < 0.1 * greedy_soup(distance, 4).score
    assert found.weights[1] < -0.3
    assert all(math.fsum(weights) == pytest.approx(1, abs=1e-9) for weights, _ in found.trials)


def test_evolution_repeats_by_its_seed_and_leaves_the_global_generator_alone():
    state = random.getstate()
    first, again = (evolve(distance, alone(4), evaluations=50, seed=3) for _ in range(2))
    assert first == again
    assert evolve(distance, alone(4), evaluations=50, seed=4).weights != first.weights
    assert random.getstate() == state


@pytest.mark.parametrize("search", [lambda f: greedy_soup(f, 3), lambda f: evolve(f, alone(3), evaluations=30)])
def test_a_score_of_nan_is_the_worst(search):
    found = search(lambda weights: math.nan if weights[0] > 0 else weights[1])
    assert math.isfinite(found.score)
    assert found.weights[0] <= 0


def test_one_checkpoint():
    assert greedy_soup(lambda weights: 3.0, 1).weights == [1.0]
    assert evolve(lambda weights: 3.0, [[1.0]], evaluations=100).trials == [([1.0], 3.0)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: greedy_soup(distance, 0), "count=0"),
        (lambda: evolve(distance, []), r"start=\[\] is not allowed"),
        (
            lambda: evolve(distance, alone(4), evaluations=3),
            "evaluations=3 is not allowed: it must be an integer from 4 to",
        ),
        (lambda: evolve(distance, alone(4), parents=1), "parents=1"),
        (lambda: evolve(distance, alone(4), mutation=0), "mutation=0"),
        (lambda: evolve(distance, [[0.5, 0.4, 0, 0]]), "must sum to 1"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
