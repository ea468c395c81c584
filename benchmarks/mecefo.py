"""What MeCeFO's cheap passes cost a neighbour, against the exact takeover, and what they do to the training.

    python -m benchmarks.mecefo cost     # the neighbour's step with two tasks: time side by side, peak memory; 50 M GPT
    python -m benchmarks.mecefo quality  # one of four shards taken over for the whole run, 1 M GPT: loss against exact
    python -m benchmarks.mecefo plot     # the curves of the last `quality`, as docs/images/mecefo_quality.png

Rows go to benchmarks/results/mecefo_<part>.csv.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpt import GPT_1M, mean_loss, parameters, text
from benchmarks.rows import CONSOLE, publish, read_rows, show, write_rows
from examples.gpt.model import GPT, GPTConfig
from harness.memory import GIVES_BACK, peak_resident, resident
from harness.plots import IMAGES, by_step, panels, save
from harness.processes import apart, spawned
from harness.timing import in_turn, over, seconds_of
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


def enter(mecefo: MeCeFO) -> None:
    """The first entry computes the singular vectors."""
    with mecefo.neighbour(0):
        pass


def cost(config: GPTConfig, batch_size: int, rounds: int) -> None:
    """Step times in turn in this process; the peak memory of each variant in a process of its own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(config).to(device)
    optimizer = optimizer_for(model)
    tasks = [torch.randint(0, 256, (batch_size, config.block_size + 1), device=device) for _ in range(2)]
    cheap = {rank: MeCeFO(model, rank=rank) for _, rank in COST.values() if rank}
    refresh = {rank: seconds_of(lambda mecefo=mecefo: enter(mecefo)) for rank, mecefo in cheap.items()}

    def timed(number: int, rank: float | None) -> float:
        return seconds_of(lambda: step(model, optimizer, tasks[:number], cheap[rank] if rank else None))

    variants: dict[str, Callable[[], float]] = {name: lambda v=variant: timed(*v) for name, variant in COST.items()}
    for run in variants.values():
        run()
    figures = in_turn(variants, rounds)
    rows = []
    for name, (number, rank) in COST.items():
        row: dict[str, Any] = {
            "variant": name,
            "parameters": parameters(model),
            "tokens_per_task": batch_size * config.block_size,
            "rounds": rounds,
            "step_s": round(statistics.median(figures[name]), 3),
        }
        for other in ("healthy, one task", "takeover, two tasks"):
            row |= over(figures, name, other, f"over_{other.split(',')[0]}", digits=3)
        row["peak_mb_above_parameters"] = round(peak_memory(config, batch_size, number, rank) / 1e6)
        row["refresh_s"] = round(refresh[rank], 3) if rank else ""
        rows.append(row)
        CONSOLE.print(row)
    brief = ("variant", "step_s", "over_healthy", "over_takeover", "peak_mb_above_parameters", "refresh_s")
    publish("A neighbour's step", "mecefo_cost", rows, brief)


def peak_memory(config: GPTConfig, batch_size: int, tasks: int, rank: float | None) -> float:
    """Bytes that a step needs at most beside the model, its gradients and the optimizer's state."""
    os.environ.update(GIVES_BACK)
    return apart(_peak_memory, config, batch_size, tasks, rank)


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
        enter(mecefo)
    batches = [torch.randint(0, 256, (batch_size, config.block_size + 1), device=device) for _ in range(tasks)]
    small = [tokens[:1, :9] for tokens in batches]
    step(model, optimizer, small, mecefo)  # what is allocated once: threads, buffers of the libraries
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, optimizer, batches, mecefo)
        return torch.cuda.max_memory_allocated() - before
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    step(model, optimizer, batches, mecefo)
    return max(peak_resident(), before) - before


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
    model = GPT(GPT_1M)
    rank = QUALITY[variant]
    mecefo = MeCeFO(model, rank=rank, every_n_steps=100) if rank else None
    optimizer = optimizer_for(model, 2e-3)
    data = text(GPT_1M, 4, crops_per_epoch=steps * 4 * SHARDS, val_windows=512, seed=seed)
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
    row = {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "sequences_per_step": 4 * SHARDS,
        "val_loss": round(mean_loss(model, data), 4),
        "train_loss_last_50": round(statistics.fmean(losses[-50:]), 4),
    }
    return row, losses


def quality(steps: int, seeds: int, workers: int) -> None:
    """One of four shards taken over for good: exactly, cheaply, or its share of the batch dropped."""
    runs = [(variant, seed, steps) for seed in range(seeds) for variant in QUALITY]
    rows, curves = [], []
    with spawned(workers) as pool:
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
    rows = read_rows("mecefo_quality_curves")
    figure, axis = panels(1, 7, 4.2)
    for variant in QUALITY:
        losses = by_step((row["step"], row["train_loss"]) for row in rows if row["variant"] == variant)
        if not losses:
            continue
        mean = [statistics.fmean(values) for values in losses.values()]
        smooth = [statistics.fmean(mean[max(0, s - window + 1) : s + 1]) for s in range(len(mean))]
        axis.plot(smooth, label=f"{variant} ({len(losses[0])} seeds)", linewidth=1.3)
    axis.set(xlabel="step", ylabel=f"training loss, nats a byte, mean of {window} steps", ylim=(1.2, 3.2))
    axis.set_title("One of four shards taken over for the whole run (1 M GPT)")
    axis.grid(alpha=0.3)
    axis.legend()
    CONSOLE.print(save(figure, IMAGES / "mecefo_quality.png"))


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
