"""ZClip's default on eight workloads and four faults, against no clip, a fixed one, the best fixed one and its rivals.

    python -m benchmarks.worth zclip-rates            # which rate each workload gets: the best of three without a clip
    python -m benchmarks.worth zclip [workload ...]   # all arms on clean and faulty runs, three seeds
    python -m benchmarks.worth zclip-report           # mean and worst regret of each arm, from the rows
    python -m benchmarks.worth zclip-relearn          # ZClip's `relearn_after` on three other seeds

**Regret**, fixed before anything was run: the part of what the best fixed clip learns that an arm does not learn,

    (score of the arm - score of the best fixed clip) / (score before training - score of the best fixed clip),

with scores averaged over the seeds: the held-out loss (a GAN: Frechet's distance of pixels), averaged over the last
fifth of the steps. A run that diverges, or ends worse than it began, counts 1. The best fixed clip is that of the
lowest score on seed 0 among no clip, 1.0 and seven values around the healthy norms (median / 10 and / 3, the 10th,
50th, 90th and 99th percentile, 3 times the last), searched anew for each workload and fault; then it runs on all seeds.
An arm may beat it: its regret is then below 0.

Faults: one batch in a hundred (two of 150) of random bytes or of noise at the scale of raw pixels ("noise"), with
random labels, or of one byte or one example repeated; or a rate twice that which is best without a clip.

Rows go to benchmarks/results/worth_zclip.csv, and worth_zclip_rates, _regret and _relearn.csv.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.rows import publish, read_rows, write_rows
from benchmarks.worth.clips import AGC, AutoClip, Clip, Fixed, Z
from benchmarks.worth.stacks import Stack
from benchmarks.worth.workloads import WORKLOADS, Workload

STEPS, SEEDS = 150, (0, 1, 2)
RELEARN = (25, 50, 100)
TWICE = "rate x 2"
NONE, ONE, BEST = "no clip", "1.0", "best fixed"
ARMS: dict[str, Callable[[], Clip]] = {
    NONE: partial(Fixed, math.inf),
    ONE: partial(Fixed, 1.0),
    "AutoClip": AutoClip,
    "AGC": AGC,
    "ZClip()": Z,
}


def rates() -> None:
    """The score of each workload without a clip at rates around the one that it has."""
    rows = []
    for name, workload in WORKLOADS.items():
        for factor in (1 / 3, 1, 3):
            rate = workload.rate * factor
            _, scores = Stack(workload, SEEDS, [ARMS[NONE]] * len(SEEDS), rate).train(STEPS)
            rows.append({"workload": name, "rate": f"{rate:.3g}", "score": f"{statistics.fmean(scores):.4g}"})
            print(rows[-1], flush=True)
        write_rows("worth_zclip_rates", rows, key=("workload",))


def best_rate(name: str) -> float:
    """Of the rows of `rates`."""
    rows = [row for row in read_rows("worth_zclip_rates") if row["workload"] == name]
    return float(min(rows, key=lambda row: _or_inf(float(row["score"])))["rate"])


def compare(names: list[str]) -> None:
    """Every arm on a workload, clean and with each fault."""
    for name in names or WORKLOADS:
        workload = replace(WORKLOADS[name], rate=best_rate(name))
        healthy = Stack(workload, [0], [ARMS[NONE]], workload.rate)
        healthy.train(STEPS)
        for fault in ("", *workload.faults, TWICE):
            rows = cell(name, workload, fault, torch.stack(healthy.norms).flatten())
            print(*rows, sep="\n", flush=True)
            write_rows("worth_zclip", rows, key=("workload", "fault"))


def cell(name: str, workload: Workload, fault: str, norms: torch.Tensor) -> list[dict[str, Any]]:
    """The rows of one workload with one fault."""
    rate = workload.rate * (2 if fault == TWICE else 1)
    low, middle, high, top = (float(torch.quantile(norms, q)) for q in (0.1, 0.5, 0.9, 0.99))
    limits = [math.inf, 1.0, middle / 10, middle / 3, low, middle, high, top, 3 * top]
    search = Stack(workload, [0] * len(limits), [partial(Fixed, limit) for limit in limits], rate)
    _, scores = search.train(STEPS, fault)
    best = min(zip(map(_or_inf, scores), limits, strict=True))[1]

    arms = {BEST: partial(Fixed, best), **ARMS}
    stack = Stack(workload, [*SEEDS] * len(arms), [clip for clip in arms.values() for _ in SEEDS], rate)
    start, scores = stack.train(STEPS, fault)
    found = {arm: scores[place * len(SEEDS) :][: len(SEEDS)] for place, arm in enumerate(arms)}
    least, begin = statistics.fmean(found[BEST]), statistics.fmean(start)
    return [
        {
            "workload": name,
            "fault": fault or "none",
            "arm": arm,
            "rate": f"{rate:g}",
            "median_norm": f"{middle:.3g}",
            "limit": f"{best:.3g}" if arm == BEST else "",
            "score_before": f"{begin:.4g}",
            "score": f"{statistics.fmean(each):.4g}",
            "score_by_seed": " ".join(f"{score:.4g}" for score in each),
            "regret": _regret(statistics.fmean(each), least, begin),
            "steps": STEPS,
        }
        for arm, each in found.items()
    ]


def relearn() -> None:
    """The regret of each `relearn_after` on other seeds than the rows of `compare`, whose best fixed clip is taken."""
    seeds, rows = [seed + len(SEEDS) for seed in SEEDS], []
    for best in (row for row in read_rows("worth_zclip") if row["arm"] == BEST):
        name, fault = best["workload"], best["fault"]
        workload = replace(WORKLOADS[name], rate=best_rate(name))
        clips = [partial(Fixed, float(best["limit"])), *(partial(Z, relearn_after=after) for after in RELEARN)]
        rate = workload.rate * (2 if fault == TWICE else 1)
        stack = Stack(workload, seeds * len(clips), [clip for clip in clips for _ in seeds], rate)
        start, scores = stack.train(STEPS, "" if fault == "none" else fault)
        least, begin = statistics.fmean(scores[: len(seeds)]), statistics.fmean(start)
        for place, after in enumerate(RELEARN, start=1):
            mine = slice(place * len(seeds), (place + 1) * len(seeds))
            states = {player: [clip.state for clip in each[mine]] for player, each in stack.clips.items()}
            shares = {
                player: statistics.fmean(float(state["clipped"] / state["steps"]) for state in each)
                for player, each in states.items()
            }
            rows.append(
                {
                    **{"workload": name, "fault": fault, "relearn_after": after},
                    "regret": _regret(statistics.fmean(scores[mine]), least, begin),
                    "clipped": " ".join(f"{player} {share:.3f}".strip() for player, share in shares.items()),
                    "relearned": int(sum(state["relearned"] for each in states.values() for state in each)),
                }
            )
            print(rows[-1], flush=True)
    publish("ZClip's relearn_after on other seeds", "worth_zclip_relearn", rows)


def _regret(score: float, least: float, begin: float) -> float:
    return round(min(1.0, _or_inf((score - least) / (begin - least))), 4)


def _or_inf(score: float) -> float:
    return score if math.isfinite(score) else math.inf


def report() -> None:
    """Mean and worst regret of each arm: over all runs, over the healthy ones, and over each fault."""
    found = read_rows("worth_zclip")
    rows = []
    for fault in ("all", *dict.fromkeys(row["fault"] for row in found)):
        chosen = [row for row in found if fault in ("all", row["fault"])]
        for arm in (BEST, *ARMS):
            regrets = {row["workload"] + (f", {row['fault']}" if fault == "all" else ""): float(row["regret"])
                       for row in chosen if row["arm"] == arm}  # fmt: skip
            worst = max(regrets, key=regrets.__getitem__)
            rows.append(
                {
                    "fault": fault,
                    "arm": arm,
                    "runs": len(regrets),
                    "mean_regret": round(statistics.fmean(regrets.values()), 4),
                    "worst_regret": regrets[worst],
                    "worst_at": worst,
                }
            )
    publish("Regret against the best fixed clip", "worth_zclip_regret", rows)
