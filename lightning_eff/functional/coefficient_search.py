"""Find the coefficients of a merge by trying them: a greedy soup, or an evolution that may subtract checkpoints.

Both take a function from coefficients to a score, lower is better: the validation loss of the merged model. They know
nothing of models or files. Each call is a whole validation, so both count them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lightning_eff.arguments import check, check_count, check_number, check_numbers

# Each is a whole validation, and each set of coefficients is as long as there are checkpoints.
_MOST_CHECKPOINTS = 10_000
_MOST_EVALUATIONS = 1_000_000

Evaluate = Callable[[Sequence[float]], float]


class Found(NamedTuple):
    """The best coefficients, their score, and every trial in its order."""

    weights: list[float]
    score: float
    trials: list[tuple[list[float], float]]


class _Trials:
    """Calls ``evaluate`` and remembers; a score of NaN is the worst."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.all: list[tuple[list[float], float]] = []

    def __call__(self, weights: Sequence[float]) -> float:
        score = float(self.evaluate(list(weights)))
        score = math.inf if math.isnan(score) else score
        self.all.append((list(weights), score))
        return score

    def best(self) -> Found:
        weights, score = min(self.all, key=lambda trial: trial[1])
        return Found(weights, score, self.all)


def greedy_soup(evaluate: Evaluate, count: int) -> Found:
    """The uniform average of those checkpoints that help: from the best one on, each is kept if the score is no worse.

    Args:
        evaluate: score of coefficients, lower is better; called ``2 * count - 1`` times.
        count: number of checkpoints, from 1 to 10,000.

    Raises:
        ValueError: an argument of a wrong type or out of its range.

    Source: Wortsman et al., Model soups (arXiv 2203.05482), recipe 1.

    Example:
        >>> greedy_soup(lambda w: abs(w[0] - 0.5) + w[1], count=3).weights
        [0.5, 0.0, 0.5]
    """
    _check_evaluate(evaluate)
    check_count("count", count, most=_MOST_CHECKPOINTS)
    trials = _Trials(evaluate)
    alone = [trials([float(i == j) for j in range(count)]) for i in range(count)]
    order = sorted(range(count), key=alone.__getitem__)
    chosen, best = {order[0]}, alone[order[0]]
    for index in order[1:]:
        trial = chosen | {index}
        score = trials([1 / len(trial) if j in trial else 0.0 for j in range(count)])
        if score <= best:
            chosen, best = trial, score
    return Found([1 / len(chosen) if j in chosen else 0.0 for j in range(count)], best, trials.all)


def evolve(
    evaluate: Evaluate,
    start: Sequence[Sequence[float]],
    *,
    evaluations: int = 100,
    parents: int = 3,
    mutation: float = 0.2,
    seed: int = 0,
) -> Found:
    """Coefficients by evolution: they sum to 1 and may be negative.

    The idea is LCSC's (arXiv 2404.02241); its population, crossover and mutation are not published, and these are ours:
    a child lies on the line through two of the best ``parents`` (from a quarter before the one to a quarter behind the
    other), plus Gaussian noise that falls to a tenth. Lines and noise without a mean keep the sum, so that nothing is
    ever divided by a sum near 0.

    Args:
        evaluate: score of coefficients, lower is better.
        start: the first generation, e.g. the weights of several schemes: each sums to 1.
        evaluations: calls of ``evaluate`` in all, from ``len(start)`` to 1,000,000.
        parents: how many of the best are bred from, >= 2.
        mutation: standard deviation of the noise at first, in units of a coefficient, > 0.
        seed: of a private generator; the global one is left alone.

    Raises:
        ValueError: an argument of a wrong type or out of its range.

    Example:
        >>> found = evolve(lambda w: (w[0] - 0.7) ** 2, [[1.0, 0.0], [0.5, 0.5]], evaluations=50)
        >>> round(found.weights[0], 1), len(found.trials)
        (0.7, 50)
    """
    _check_evaluate(evaluate)
    ok = isinstance(start, Sequence) and not isinstance(start, str) and len(start) > 0
    check("start", start, ok, "a list of sets of coefficients, at least one")
    for weights in start:
        check_numbers("start", weights)
    check("start", start, len({len(weights) for weights in start}) == 1, "sets of as many coefficients each")
    check_count("evaluations", evaluations, least=len(start), most=_MOST_EVALUATIONS)
    check_count("parents", parents, least=2)
    check_number("mutation", mutation, above=0)
    check("seed", seed, isinstance(seed, int) and not isinstance(seed, bool), "an integer")
    if any(abs(math.fsum(weights) - 1) > 1e-6 for weights in start):
        raise ValueError("start: each set of coefficients must sum to 1")
    trials, generator = _Trials(evaluate), random.Random(seed)
    for weights in start:
        trials(weights)
    if len(start[0]) == 1:
        return trials.best()  # one coefficient can only be 1
    for number in range(len(start), evaluations):
        best = sorted(trials.all, key=lambda trial: trial[1])[:parents]
        first, second = generator.choice(best)[0], generator.choice(best)[0]
        place = generator.uniform(-0.25, 1.25)
        sigma = mutation * (1 - 0.9 * number / evaluations)
        noise = [generator.gauss(0, sigma) for _ in first]
        mean = math.fsum(noise) / len(noise)
        trials([a + place * (b - a) + n - mean for a, b, n in zip(first, second, noise, strict=True)])
    return trials.best()


def _check_evaluate(evaluate: Any) -> None:
    check("evaluate", evaluate, callable(evaluate), "a function from coefficients to a score")
