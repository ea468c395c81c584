"""What GradientStats takes of a step that it measures, and what its statistics take beside torch's operators.

    python -m benchmarks.gradient_stats   # wants the machine for itself

The 10.8 M GPT, one thread. `operators`: the same numbers by one operator after the other on each whole tensor, as the
reference on a CPU took them before. The check of GradES reads norms and sums alone.

Rows go to benchmarks/results/gradient_stats.csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpt import GPT_10M, constant, text, train
from benchmarks.rows import publish
from harness.runs import begin
from harness.timing import in_turn
from lightning_eff.callbacks import GradientStats
from lightning_eff.kernels.tensor_stats import tensor_stats

EVERY = 2


def operators(gradients: list[Tensor], extremes: bool) -> list[list[Tensor]]:
    """One operator after the other."""
    found = []
    for gradient in gradients:
        sizes = gradient.abs()
        numbers = [sizes.sum(), gradient.square().sum()]
        if extremes:
            numbers.append(torch.where(sizes.isnan(), 0.0, sizes).amax())
            numbers += [(gradient == 0).sum(), (~sizes.isfinite()).sum()]
        found.append(numbers)
    return found


def seconds_of_hooks(steps: int) -> tuple[list[float], list[float], float]:
    """CPU seconds of the hook in steps that are measured and in others, and the median of a whole step between."""
    stats = GradientStats(every_n_steps=EVERY)
    hooks: list[float] = []
    begun: list[float] = []
    hook = stats.on_before_optimizer_step

    def timed(*arguments: Any) -> None:
        begun.append(time.process_time())
        hook(*arguments)
        hooks.append(time.process_time() - begun[-1])

    stats.on_before_optimizer_step = timed  # type: ignore[method-assign]
    train(constant(GPT_10M), text(GPT_10M, 4), stats, max_steps=steps)
    whole = statistics.median(after - before for before, after in itertools.pairwise(begun))
    return hooks[EVERY - 1 :: EVERY], hooks[::EVERY], whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25, help="of the statistics, in turn")
    parser.add_argument("--steps", type=int, default=40, help="of the run, half of which are measured")
    arguments = parser.parse_args()
    begin(0)
    gradients = [torch.randn_like(parameter) for parameter in constant(GPT_10M).parameters()]
    calls: dict[str, Callable[[], Any]] = {
        "norms and sums": lambda: tensor_stats(gradients),
        "norms and sums, operators": lambda: operators(gradients, extremes=False),
        "extremes too": lambda: tensor_stats(gradients, extremes=True),
        "extremes too, operators": lambda: operators(gradients, extremes=True),
    }

    def seconds(name: str) -> float:
        start = time.process_time()
        calls[name]()
        return time.process_time() - start

    for name in calls:
        calls[name]()
    found = in_turn({name: partial(seconds, name) for name in calls}, arguments.rounds)
    measured, others, step = seconds_of_hooks(arguments.steps)
    found |= {"hook, a step that is measured": measured, "hook, another step": others}
    rows = []
    for name, figures in found.items():
        low, middle, high = statistics.quantiles([1e3 * each for each in figures], n=4)
        row = {"what": name, "times": len(figures), "ms": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3)}
        rows.append({**row, "step_ms": round(1e3 * step, 1), "of_a_step": round(middle / 1e3 / step, 5)})
    publish("Statistics of gradients, 10.8 M parameters", "gradient_stats", rows)


if __name__ == "__main__":
    main()
