"""What compressed all-reduce saves on a slow link, what it costs on a fast one, and where it ends.

    python -m benchmarks.compressed_allreduce steps --mbit 200 50           # step times and bytes, side by side
    python -m benchmarks.compressed_allreduce steps --ranks 4 --size 20m --mbit loopback
    python -m benchmarks.compressed_allreduce losses --arms dense "arc_topk 0.2" --seeds 0 1 2
    python -m benchmarks.compressed_allreduce overhead                      # sketch, pack, scatter; on a GPU too
    python -m benchmarks.compressed_allreduce memory                        # the peak of a step, of each compressor

`steps` and `losses` need root and iproute2: every rank is a process in a network namespace, one core each. Rows go to
benchmarks/results/compressed_allreduce_<part>.csv as they come; a cell that is measured again replaces its row.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_cases import RANK, RATIO
from benchmarks.kernel_cases import SIZES as KERNEL_SIZES
from benchmarks.kernels import copy_bandwidth, milliseconds
from benchmarks.rows import CONSOLE, show, write_rows
from benchmarks.slow_link import ARMS, SIZES, Fit, Ranks
from harness.local_hook import copies_of_the_gradients
from lightning_eff.compression import BF16, FP16, ArcTopK, Int8, PowerSGD, RandK, TopK
from lightning_eff.kernels.row_pack import pack_rows, row_scores, scatter_rows_, select_rows
from lightning_eff.kernels.row_sketch import row_sketch

# --- steps ------------------------------------------------------------------------------------------------------------

_STEPS_KEY = ("ranks", "link_mbit", "size", "arm")


def steps(arguments: argparse.Namespace) -> None:
    """Every arm once a round on every link, in an order that rotates; a row for each after every round."""
    deadline = time.monotonic() + arguments.limit
    loopback = arguments.mbit == ["loopback"]
    links = [None] if loopback else [None if link == "free" else float(link) for link in arguments.mbit]
    arms = ["compute alone", *(arm for arm in arguments.arms if arm != "compute alone")]
    fit = dict(size=arguments.size, steps=arguments.steps, batch_size=arguments.batch_size)
    found: dict[tuple[float | None, str], list[dict[str, Any]]] = {(link, arm): [] for link in links for arm in arms}
    took: dict[tuple[float | None, str], float] = {}
    with Ranks(arguments.ranks, loopback) as ranks:
        for turn in range(arguments.rounds):
            for link in links:
                for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
                    start = time.monotonic()
                    if start + took.get((link, arm), 0) > deadline:
                        CONSOLE.print(f"no time left for round {turn + 1} of {arm} at {link}")
                        continue
                    found[link, arm].append(ranks.fit(Fit(arm, **fit), link))
                    took[link, arm] = time.monotonic() - start
                    rows = [_steps_row(arguments, each, found, each_link) for each_link, each in _done(found)]
                    path = write_rows("compressed_allreduce_steps", rows, key=_STEPS_KEY)
    show("Step time over a shaped link", rows, _SHOWN)
    CONSOLE.print(path)


_SHOWN = ("ranks", "link_mbit", "size", "arm", "rounds", "step_s", "over_dense", "sent_mb", "bound_s", "over_bound")


def _done(found: dict[tuple[float | None, str], list[dict[str, Any]]]) -> list[tuple[float | None, str]]:
    """What can be compared: measured, with the arms that a row refers to."""
    return [
        (link, arm)
        for (link, arm), reports in found.items()
        if reports and found[link, "compute alone"] and (found.get((link, "dense")) or arm == "compute alone")
    ]


def _cores_a_rank(ranks: int) -> float:
    return round(min(1.0, len(os.sched_getaffinity(0)) / ranks), 2)


def _median(reports: list[dict[str, Any]], name: str) -> float:
    return statistics.median(value for report in reports for value in report[name])


def _steps_row(
    arguments: argparse.Namespace,
    arm: str,
    found: dict[tuple[float | None, str], list[dict[str, Any]]],
    link: float | None,
) -> dict[str, Any]:
    reports, alone = found[link, arm], found[link, "compute alone"]
    every = [value for report in reports for value in report["step_s"]]
    low, middle, high = statistics.quantiles(every, n=4)
    sent = _median(reports, "sent")
    # What no schedule can beat: the collectives hide behind the backward pass, or it behind them.
    wire = sent * 8 / (link * 1e6) if link else 0.0
    parts = {name: _median(alone, f"{name}_s") for name in ("forward", "backward", "optimizer")}
    bound = parts["forward"] + parts["optimizer"] + max(parts["backward"], wire)
    ratios = [
        statistics.median(ours["step_s"]) / statistics.median(theirs["step_s"])
        for ours, theirs in zip(reports, found.get((link, "dense"), []), strict=False)
    ]
    config = SIZES[arguments.size]
    return {
        "ranks": arguments.ranks,
        "link_mbit": "loopback" if arguments.mbit == ["loopback"] else "unshaped" if link is None else f"{link:g}",
        "size": arguments.size,
        "arm": arm,
        "parameters": reports[0]["parameters"],
        "tokens_a_rank": arguments.batch_size * config.block_size,
        "cores_a_rank": _cores_a_rank(arguments.ranks),
        "rounds": len(reports),
        "steps_a_round": arguments.steps,
        "step_s": round(middle, 4),
        "step_s_q1": round(low, 4),
        "step_s_q3": round(high, 4),
        "over_dense": round(statistics.median(ratios), 4) if ratios else "",
        "sent_mb": round(sent / 1e6, 3),
        "received_mb": round(_median(reports, "received") / 1e6, 3),
        **{f"{name}_alone_s": round(seconds, 4) for name, seconds in parts.items()},
        "bound_s": round(bound, 4),
        "over_bound": round(middle / bound, 4),
    }


# --- losses -----------------------------------------------------------------------------------------------------------

_LOSSES_KEY = ("link_mbit", "ranks", "size", "arm", "lr", "seed", "step")


def losses(arguments: argparse.Namespace) -> None:
    """Train each arm for the same number of steps, or to the target; a row for each validation, as it comes."""
    link = None if arguments.mbit in ("loopback", "free") else float(arguments.mbit)
    tokens = arguments.batch_size * SIZES[arguments.size].block_size
    with Ranks(arguments.ranks, loopback=arguments.mbit == "loopback") as ranks:
        for lr, seed, arm in itertools.product(arguments.lr, arguments.seeds, arguments.arms):
            fit = Fit(
                arm,
                size=arguments.size,
                steps=arguments.steps,
                warmup=0,
                batch_size=arguments.batch_size,
                lr=lr,
                seed=seed,
                val_every=arguments.val_every,
                target=arguments.target,
            )

            def write(point: dict[str, float], arm: str = arm, lr: float = lr, seed: int = seed) -> None:
                row = {
                    "link_mbit": f"{link:g}" if link else "",
                    "ranks": arguments.ranks,
                    "size": arguments.size,
                    "tokens_a_rank": tokens,
                    "cores_a_rank": _cores_a_rank(arguments.ranks),
                    "arm": arm,
                    "lr": lr,
                    "seed": seed,
                    "step": point["step"],
                    "val_loss": round(point["loss"], 4),
                    "train_s": round(point["seconds"], 2) if link else "",  # beside other work they say nothing
                }
                write_rows("compressed_allreduce_losses", [row], key=_LOSSES_KEY)
                CONSOLE.print(row)

            ranks.fit(fit, link, write)


# --- overhead ---------------------------------------------------------------------------------------------------------


_OVERHEAD_KEY = ("op", "size", "error_feedback", "device")


def overhead(arguments: argparse.Namespace) -> None:
    """What ARC-Top-K adds to a step when nothing is gained: its passes over the gradients, against a plain copy."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    copy = copy_bandwidth(device)
    rows = []
    for size in arguments.sizes:
        shapes = [shape for shape in KERNEL_SIZES[size].shapes() if len(shape) == 2]
        numel = sum(n * m for n, m in shapes)
        for error_feedback in (False, True):
            matrices = [torch.randn(shape, device=device) for shape in shapes]
            errors = [torch.randn(shape, device=device) for shape in shapes] if error_feedback else None
            for op, run, moved in _passes(matrices, errors):
                milli, low, high = milliseconds(run, device)
                rows.append(
                    {
                        "op": op,
                        "size": size,
                        "numel": numel,
                        "error_feedback": error_feedback,
                        "ratio": RATIO,
                        "rank": RANK,
                        "ms": round(milli, 2),
                        "ms_q20": round(low, 2),
                        "ms_q80": round(high, 2),
                        "bytes": moved,
                        "gb_per_s": round(moved / milli * 1e-6, 2),
                        "copy_gb_per_s": round(copy * 1e-9, 2),
                        "of_copy": round(moved / milli * 1e3 / copy, 3),
                    }
                )
                path = write_rows(
                    "compressed_allreduce_overhead", rows[-1:], key=("device", "op", "size", "error_feedback")
                )
            del matrices, errors
    show("ARC-Top-K's passes over the gradients", rows)
    CONSOLE.print(path)


def _passes(matrices: list[Tensor], errors: list[Tensor] | None) -> Iterator[tuple[str, Callable[[], Any], int]]:
    """Name, call and bytes that must be moved, of each pass."""
    rows = [len(matrix) for matrix in matrices]
    counts = [max(1, int(RATIO * n)) for n in rows]
    whole = 4 * sum(matrix.numel() for matrix in matrices)
    sent = 4 * sum(count * matrix.shape[1] for count, matrix in zip(counts, matrices, strict=True))
    sketch = row_sketch(matrices, RANK, seed=0, errors=errors)
    selected = select_rows(row_scores(sketch), rows, counts)
    buffer = pack_rows(matrices, selected, counts, 2.0, errors)
    memories = 1 if errors is None else 2
    yield "sketch", lambda: row_sketch(matrices, RANK, seed=0, errors=errors), memories * whole
    yield "select", lambda: select_rows(row_scores(sketch), rows, counts), sketch.nbytes
    yield "pack", lambda: pack_rows(matrices, selected, counts, 2.0, errors), (memories + 1) * sent
    # Read the buffer, and G and E of the rows that stay; write G, and E.
    moved = sent + memories * whole + (0 if errors is None else 2 * (whole - sent))
    yield "scatter", lambda: scatter_rows_(matrices, buffer, selected, counts, errors), moved


# --- memory -----------------------------------------------------------------------------------------------------------

_COMPRESSORS = {
    "BF16()": BF16(),
    "FP16()": FP16(),
    "Int8()": Int8(),
    'TopK(error_feedback="none")': TopK(error_feedback="none"),
    "TopK()": TopK(),
    "RandK()": RandK(),
    'RandK(error_feedback="ef14")': RandK(error_feedback="ef14"),
    'PowerSGD(error_feedback="none")': PowerSGD(error_feedback="none"),
    "PowerSGD()": PowerSGD(),
    "ArcTopK()": ArcTopK(),
    'ArcTopK(error_feedback="ef14")': ArcTopK(error_feedback="ef14"),
    'ArcTopK(error_feedback="ef21")': ArcTopK(error_feedback="ef21"),
    'ArcTopK(error_feedback="ef21m")': ArcTopK(error_feedback="ef21m"),
}


def memory(arguments: argparse.Namespace) -> None:
    """The peak of three steps in copies of the gradients, where all arrives at once and where nothing does."""
    buckets, size = 12, 256
    rows = [
        {
            "compressor": name,
            "ranks": 2,
            "buckets": buckets,
            "numel": buckets * size**2,
            "link_keeps_up": round(copies_of_the_gradients(each, at_once=True, steps=3, buckets=buckets, size=size), 2),
            "slow_link": round(copies_of_the_gradients(each, steps=3, buckets=buckets, size=size), 2),
        }
        for name, each in _COMPRESSORS.items()
    ]
    show("Peak of a step beside DDP's buckets, in copies of the gradients", rows)
    CONSOLE.print(write_rows("compressed_allreduce_memory", rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    step = parts.add_parser("steps")
    step.add_argument("--mbit", nargs="+", default=["200", "50"], help="Mbit/s, `free` (unshaped), or `loopback` alone")
    step.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    step.add_argument("--rounds", type=int, default=2)
    step.add_argument("--steps", type=int, default=5)
    step.add_argument("--limit", type=float, default=float("inf"), help="seconds: no fit is begun that would end later")
    loss = parts.add_parser("losses")
    loss.add_argument("--mbit", default="loopback", help="Mbit/s, `free` or `loopback`")
    loss.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    loss.add_argument("--seeds", nargs="+", type=int, default=[0])
    loss.add_argument("--lr", nargs="+", type=float, default=[1e-3])
    loss.add_argument("--steps", type=int, default=200)
    loss.add_argument("--val-every", type=int, default=10)
    loss.add_argument("--target", type=float)
    over = parts.add_parser("overhead")
    over.add_argument("--sizes", nargs="+", choices=["124m", "1300m"], default=["124m"])
    over.add_argument("--threads", type=int, default=1)
    parts.add_parser("memory")
    for each in (step, loss):
        each.add_argument("--ranks", type=int, default=2)
        each.add_argument("--size", choices=list(SIZES), default="5m")
        each.add_argument("--batch-size", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # what the ranks have, for the rows
    {"steps": steps, "losses": losses, "overhead": overhead, "memory": memory}[arguments.part](arguments)


if __name__ == "__main__":
    main()
