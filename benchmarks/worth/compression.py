"""What compressed gradients cost at the end of a decay, beside what they cost before it.

    python -m benchmarks.worth compression [variant ...]

A byte GPT of 0.13 M on two ranks that live in one process (InProcessRanks: the very code of the strategy), 400 steps
of 2 x 8 x 16 bytes: after a warm-up the rate stays to the half of the run and falls to 0 until its end (`WSD`, linear).
The held-out loss at either place, three seeds; no time is measured. Rows: benchmarks/results/worth_compression.csv.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.compression_quality import average
from benchmarks.gpt import parameters
from benchmarks.rows import show, write_rows
from benchmarks.worth.stacks import Batches
from benchmarks.worth.workloads import WORKLOADS
from examples.gpt.model import GPT, GPTConfig
from lightning_eff.compression import BF16, ArcTopK, Compressor, Int8, PowerSGD, predict
from lightning_eff.compression.in_process import InProcessRanks
from lightning_eff.functional.wsd import WSD

STEPS, WARM_UP, RATE, RANKS, SEEDS = 400, 20, 3e-3, 2, (0, 1, 2)
CONFIG = GPTConfig(block_size=32, n_layer=2, n_head=4, n_embd=64)
VARIANTS: dict[str, Compressor | None] = {
    "dense": None,
    "bf16": BF16(),
    "int8": Int8(),
    "PowerSGD rank 4": PowerSGD(),
    "ARC-Top-K 0.2": ArcTopK(),
}


def train(compressor: Compressor | None, seed: int) -> tuple[float, float]:
    """Held-out losses before the decay and at its end."""
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    own = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
    schedule = WSD(optimizer, ends=STEPS, warmup_steps=WARM_UP, decay_steps=STEPS // 2, curve="linear")
    ranks = InProcessRanks(compressor, RANKS) if compressor is not None else None
    workload = WORKLOADS["byte GPT"]
    data, held_out = workload.data()
    streams = [Batches(workload, data, RANKS * seed + rank) for rank in range(RANKS)]
    losses = []
    for step in range(STEPS):
        gradients = []
        for stream in streams:
            loss = _loss(model, *stream(step))
            gradients.append(dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True)))
        for name, gradient in average(ranks, gradients, measure=False).items():
            own[name].grad = gradient
        optimizer.step()
        schedule.step()
        if step + 1 in (STEPS // 2, STEPS):
            with torch.no_grad():
                losses.append(_loss(model, *held_out).item())
    return losses[0], losses[1]


def _loss(model: GPT, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def compare(names: list[str]) -> None:
    """All variants, each on all seeds; without names dense first, which the others are held against."""
    shapes = {name: tuple(p.shape) for name, p in GPT(CONFIG).named_parameters()}
    rows, dense = [], [train(None, seed) for seed in SEEDS]
    for name, compressor in VARIANTS.items():
        if names and name not in names:
            continue
        found = [train(compressor, seed) for seed in SEEDS] if compressor is not None else dense
        against = [[loss - least for loss, least in zip(a, b, strict=True)] for a, b in zip(found, dense, strict=True)]
        before, after = (statistics.fmean(column) for column in zip(*found, strict=True))
        over_before, over_after = (statistics.fmean(column) for column in zip(*against, strict=True))
        rows.append(
            {
                "variant": name,
                "ratio_of_bytes": round(predict(compressor, shapes, RANKS).ratio, 2) if compressor else 1.0,
                "val_loss_before": round(before, 4),
                "over_dense_before": round(over_before, 4),
                "val_loss_at_end": round(after, 4),
                "over_dense_at_end": round(over_after, 4),
                "over_dense_at_end_by_seed": " ".join(f"{each[1]:+.4f}" for each in against),
                "steps": STEPS,
                "parameters": parameters(GPT(CONFIG)),
            }
        )
        print(rows[-1], flush=True)
        write_rows("worth_compression", rows, key=("variant",))
    show("Compression at the end of a decay", rows)
