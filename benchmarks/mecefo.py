"""What MeCeFO's cheap passes cost a neighbour, against the exact takeover, and what they do to the training.

    python -m benchmarks.mecefo cost     # the neighbour's step with two tasks: time side by side, peak memory; 50 M GPT
    python -m benchmarks.mecefo quality  # one of four shards taken over for the whole run, 1 M GPT: loss against exact
    python -m benchmarks.mecefo plot     # the curves of the last `quality`, as docs/images/mecefo_quality.png

Rows go to benchmarks/results/mecefo_<part>.csv.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import CONSOLE, RESULTS, in_turn, ratio, show, write_rows
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPT, GPTConfig
from lightning_eff.functional.mecefo import MeCeFO, divisors
from lightning_eff.strategies.fault_tolerant.sharded_loader import ShardedLoader

# --- cost ------------------------------------------------------------------------------------------------------------

# Variant: how many micro-batches the step has, and the rank of the cheap passes.
COST: dict[str, tuple[int, float | None]] = {
    "healthy, one task": (1, None),
    "takeover, two tasks": (2, None),
    "mecefo, two tasks, rank 1/4": (2, 0.25),
}


def optimizer_for(model: GPT, lr: float = 1e-3) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def step(model: GPT, optimizer: torch.optim.Optimizer, tasks: list[torch.Tensor], mecefo: MeCeFO | None) -> None:
    """A neighbour's optimizer step over its tasks, one after the other."""
    optimizer.zero_grad()
    for tokens in tasks:
        with mecefo.neighbour(0) if mecefo else nullcontext():
            model.loss(tokens).backward()
    optimizer.step()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cost(config: GPTConfig, batch_size: int, rounds: int) -> None:
    """Step times in turn in this process; the peak memory of each variant in a process of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(config).to(device)
    optimizer = optimizer_for(model)
    tasks = [torch.randint(0, 256, (batch_size, config.block_size + 1), device=device) for _ in range(2)]
    cheap = {rank: MeCeFO(model, rank=rank) for _, rank in COST.values() if rank}
    refresh = {}
    for rank, mecefo in cheap.items():
        synchronize()
        began = time.perf_counter()
        with mecefo.neighbour(0):  # the first entry computes the singular vectors
            synchronize()
        refresh[rank] = time.perf_counter() - began

    def timed(number: int, rank: float | None) -> float:
        synchronize()
        began = time.perf_counter()
        step(model, optimizer, tasks[:number], cheap[rank] if rank else None)
        synchronize()
        return time.perf_counter() - began

    variants: dict[str, Callable[[], float]] = {name: lambda v=variant: timed(*v) for name, variant in COST.items()}
    for run in variants.values():
        run()
    figures = in_turn(variants, rounds)
    rows = []
    for name, (number, rank) in COST.items():
        row: dict[str, Any] = {
            "variant": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens_per_task": batch_size * config.block_size,
            "rounds": rounds,
            "step_s": round(statistics.median(figures[name]), 3),
        }
        for other in ("healthy, one task", "takeover, two tasks"):
            middle, low, high = ratio(figures, name, other)
            key = other.split(",")[0]
            row |= {f"over_{key}": round(middle, 3), f"over_{key}_q1": round(low, 3), f"over_{key}_q3": round(high, 3)}
        row["peak_mb_above_parameters"] = round(peak_memory(config, batch_size, number, rank) / 1e6)
        row["refresh_s"] = round(refresh[rank], 3) if rank else ""
        rows.append(row)
        CONSOLE.print(row)
    brief = ("variant", "step_s", "over_healthy", "over_takeover", "peak_mb_above_parameters", "refresh_s")
    show("A neighbour's step", [{name: row[name] for name in brief} for row in rows])
    CONSOLE.print(write_rows("mecefo_cost", rows))


def peak_memory(config: GPTConfig, batch_size: int, tasks: int, rank: float | None) -> float:
    """Bytes that a step needs at most beside the model, its gradients and the optimizer's state."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # freed memory is given back, so that the peak is one of tensors
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory, config, batch_size, tasks, rank).result()


def _peak_memory(config: GPTConfig, batch_size: int, tasks: int, rank: float | None) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(config).to(device)
    optimizer = optimizer_for(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad = lambda: None  # type: ignore[assignment]  # the gradients are part of what is there before
    mecefo = MeCeFO(model, rank=rank) if rank else None
    if mecefo:
        with mecefo.neighbour(0):
            pass
    batches = [torch.randint(0, 256, (batch_size, config.block_size + 1), device=device) for _ in range(tasks)]
    small = [tokens[:1, :9] for tokens in batches]
    step(model, optimizer, small, mecefo)  # what is allocated once: threads, buffers of the libraries
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, optimizer, batches, mecefo)
        return torch.cuda.max_memory_allocated() - before
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step(model, optimizer, batches, mecefo)
    return max(_peak_resident(), before) - before


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return float(line.split()[1]) * 1024


def _resident() -> float:
    return _status("VmRSS")


def _peak_resident() -> float:
    try:
        return _status("VmHWM")
    except StopIteration:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


# --- quality ---------------------------------------------------------------------------------------------------------

SHARDS, WARM_UP = 4, 30
OWNERS = [0, 1, 2, 2]  # replica 3 is dead from the first step to the last
QUALITY: dict[str, float | None] = {  # the rank of the cheap passes
    "exact": None,
    "shrink": None,
    "mecefo, rank 1/4": 0.25,
}


def factor(done: int, steps: int) -> float:
    """Warm-up, then a cosine to a tenth."""
    progress = max(0.0, (done - WARM_UP) / max(1, steps - WARM_UP))
    return min(1.0, (done + 1) / WARM_UP) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def averaged_gradients(
    model: GPT, batches: Iterable[torch.Tensor], variant: str, mecefo: MeCeFO | None, done: int
) -> float:
    """Leaves the step's gradients in the model, as the replicas together would have them; returns the mean loss."""
    shards = list(zip(OWNERS, batches, strict=True))
    if variant == "shrink":
        shards = shards[:3]
    losses = []
    for owner, tokens in shards:
        neighbour = mecefo is not None and OWNERS.count(owner) > 1
        with mecefo.neighbour(done) if neighbour else mecefo.watch() if mecefo else nullcontext():
            loss = model.loss(tokens)
            loss.backward()
        losses.append(loss.item())
    by = divisors(OWNERS)
    for parameter in model.parameters():
        skipped = mecefo is not None and parameter in mecefo.skipped
        parameter.grad /= by.skipped if skipped else len(shards)
    return statistics.fmean(losses)


def train(variant: str, seed: int, steps: int) -> tuple[dict[str, Any], list[float]]:
    """One run on one thread: its row and the loss of every step."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=128))
    rank = QUALITY[variant]
    mecefo = MeCeFO(model, rank=rank, every_n_steps=100) if rank else None
    optimizer = optimizer_for(model, 2e-3)
    data = TextDataModule(block_size=128, batch_size=4, crops_per_epoch=steps * 4 * SHARDS, val_windows=512, seed=seed)
    data.setup()
    loader = ShardedLoader(data.train_dataloader(), SHARDS)
    loader.own(range(SHARDS))
    losses = []
    for done in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * factor(done, steps)
        optimizer.zero_grad()
        batches = [loader.batch(shard, done) for shard in range(SHARDS)]
        losses.append(averaged_gradients(model, batches, variant, mecefo, done))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        windows = [model.loss(tokens).item() for tokens in data.val_dataloader()]
    row = {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "sequences_per_step": 4 * SHARDS,
        "val_loss": round(statistics.fmean(windows), 4),
        "train_loss_last_50": round(statistics.fmean(losses[-50:]), 4),
    }
    return row, losses


def quality(steps: int, seeds: int, workers: int) -> None:
    """One of four shards taken over for good: exactly, cheaply, or its share of the batch dropped."""
    runs = [(variant, seed, steps) for seed in range(seeds) for variant in QUALITY]
    rows, curves = [], []
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for row, losses in pool.map(train, *zip(*runs, strict=True)):
            rows.append(row)
            about = {name: row[name] for name in ("variant", "seed")}
            curves += [{**about, "step": s, "train_loss": round(losses[s], 4)} for s in range(steps)]
            CONSOLE.print(row)
            write_rows("mecefo_quality", rows)
            write_rows("mecefo_quality_curves", curves)
    show("One of four shards taken over from the first step to the last", rows)


def plot(window: int = 20) -> None:
    """Training loss, a running mean of each run; the mean over the seeds is thick."""
    import matplotlib.pyplot as plt

    with (RESULTS / "mecefo_quality_curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for variant in QUALITY:
        mine = [row for row in rows if row["variant"] == variant]
        by_seed = [
            [float(row["train_loss"]) for row in group]
            for _, group in itertools.groupby(mine, key=lambda row: row["seed"])
        ]
        if not by_seed:
            continue
        mean = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
        smooth = [statistics.fmean(mean[max(0, s - window + 1) : s + 1]) for s in range(len(mean))]
        axis.plot(smooth, label=f"{variant} ({len(by_seed)} seeds)", linewidth=1.3)
    axis.set(xlabel="step", ylabel=f"training loss, nats a byte, mean of {window} steps", ylim=(1.2, 3.2))
    axis.set_title("One of four shards taken over for the whole run (1 M GPT)")
    axis.grid(alpha=0.3)
    axis.legend()
    path = RESULTS.parent.parent / "docs" / "images" / "mecefo_quality.png"
    figure.savefig(path, dpi=110)
    CONSOLE.print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["cost", "quality", "plot"])
    parser.add_argument("--rounds", type=int, default=5, help="for cost")
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a task, for cost")
    parser.add_argument("--block-size", type=int, default=256, help="bytes of a sequence, for cost")
    parser.add_argument("--layers", type=int, default=10, help="for cost")
    parser.add_argument("--steps", type=int, default=500, help="for quality")
    parser.add_argument("--seeds", type=int, default=3, help="for quality")
    parser.add_argument("--workers", type=int, default=1, help="processes, for quality")
    args = parser.parse_args()
    if args.part == "cost":
        cost(GPTConfig(args.block_size, args.layers, 10, 640), args.batch_size, args.rounds)
    elif args.part == "quality":
        quality(args.steps, args.seeds, args.workers)
    else:
        plot()


if __name__ == "__main__":
    main()
