"""What compression costs in quality: the loss after equal steps, for each compressor and scheme of error feedback.

    python -m benchmarks.compression_quality          # a GPT of 0.25 M on two ranks, three seeds
    python -m benchmarks.compression_quality --steps 20 --seeds 1 --no-write

The two ranks live in one process (InProcessRanks), which runs the very code of the strategy: each step takes the
gradients of two halves of a batch and averages them through the compressor. No time is measured. Rows go to
benchmarks/results/compression_quality.csv, as they come.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.gpt import mean_loss
from benchmarks.rows import CONSOLE, show, write_rows
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPT, GPTConfig
from lightning_eff.compression import (
    BF16,
    FP16,
    ArcTopK,
    Compressor,
    Int8,
    PowerSGD,
    RandK,
    TopK,
    predict,
)
from lightning_eff.compression.in_process import InProcessRanks

CONFIG = GPTConfig(block_size=96, n_layer=2, n_head=4, n_embd=96)
RANKS, BATCH = 2, 8  # sequences of a rank
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)  # the dense run's loss with seed 0 chooses one for all

VARIANTS: dict[str, Compressor | None] = {
    "dense": None,
    "bf16": BF16(),
    "fp16": FP16(),
    "int8": Int8(),
    "PowerSGD rank 4, none": PowerSGD(error_feedback="none"),
    "PowerSGD rank 4, ef14": PowerSGD(),
    "ARC-Top-K 0.2, none": ArcTopK(),
    "ARC-Top-K 0.2, ef14": ArcTopK(error_feedback="ef14"),
    "ARC-Top-K 0.2, ef21": ArcTopK(error_feedback="ef21"),
    "ARC-Top-K 0.2, ef21m 0.1": ArcTopK(error_feedback="ef21m", eta=0.1),
    "ARC-Top-K 0.2, none, dense to step 50": ArcTopK(start_step=50),
    "ARC-Top-K 0.2, ef14, dense to step 50": ArcTopK(error_feedback="ef14", start_step=50),
    "ARC-Top-K 0.2, ef21, dense to step 50": ArcTopK(error_feedback="ef21", start_step=50),
    "ARC-Top-K 0.05, none": ArcTopK(ratio=0.05),
    "ARC-Top-K 0.05, ef14": ArcTopK(ratio=0.05, error_feedback="ef14"),
    "Top-K 0.1, none": TopK(error_feedback="none"),
    "Top-K 0.1, ef14": TopK(),
    "Rand-K 0.1, none": RandK(),
    "Rand-K 0.1, ef14": RandK(error_feedback="ef14"),
}


def train(compressor: Compressor | None, seed: int, steps: int, lr: float, data: TextDataModule) -> dict[str, float]:
    """One run; losses in nats a byte."""
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), fused=True)
    ranks = InProcessRanks(compressor, RANKS) if compressor is not None else None
    crops = data.train_data
    assert crops is not None
    losses, errors = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (0.1 if step > 0.9 * steps else 1.0)
        first = (seed * 1_000_003 + step) * RANKS * BATCH
        own, loss = [], 0.0
        for rank in range(RANKS):
            batch = torch.stack([crops[first + rank * BATCH + n] for n in range(BATCH)])
            optimizer.zero_grad()
            part = model.loss(batch)
            part.backward()
            loss += part.item() / RANKS
            own.append({name: _gradient(parameter) for name, parameter in parameters.items()})
        for name, gradient in average(ranks, own, measure=step % 25 == 24).items():
            parameters[name].grad = gradient
        if ranks is not None and step % 25 == 24:
            errors.append(ranks.left_out)
        optimizer.step()
        losses.append(loss)
    return {
        "val_loss": mean_loss(model, data),
        "train_loss": statistics.fmean(losses[-20:]),
        "relative_error": statistics.median(errors) if errors else 0.0,
    }


def _gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


def average(ranks: InProcessRanks | None, own: list[dict[str, Tensor]], measure: bool) -> Mapping[str, Tensor]:
    """Over the ranks."""
    if ranks is None:
        return {name: torch.stack([part[name] for part in own]).mean(0) for name in own[0]}
    return ranks.average(own, measure=measure)[0]


def best_rate(steps: int, data: TextDataModule) -> float:
    """Of the dense run, on seed 0."""
    losses = {lr: train(None, 0, steps, lr, data)["val_loss"] for lr in RATES}
    CONSOLE.print("dense, seed 0, by learning rate:", losses)
    return min(losses, key=losses.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, help="by default the best of the dense run")
    parser.add_argument("--only", nargs="*", help="names of variants")
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = TextDataModule(block_size=CONFIG.block_size, batch_size=BATCH, val_windows=128)
    data.setup()
    lr = args.lr or best_rate(args.steps, data)
    shapes = {name: tuple(p.shape) for name, p in GPT(CONFIG).named_parameters()}
    found: dict[str, list[dict[str, float]]] = {}
    rows: list[dict[str, object]] = []
    # All variants of one seed, then the next: a run that is cut off has complete seeds.
    for seed in range(args.seeds):
        for name, compressor in VARIANTS.items():
            if args.only and name not in args.only:
                continue
            found.setdefault(name, []).append(train(compressor, seed, args.steps, lr, data))
            CONSOLE.print(seed, name, found[name][-1])
            rows = [_row(name, runs, found, shapes, args.steps, lr) for name, runs in found.items()]
            if not args.no_write:
                write_rows("compression_quality", rows, key=("variant",))
    show("Loss after equal steps", rows)


def _row(name: str, runs: list, found: dict, shapes: dict, steps: int, lr: float) -> dict[str, object]:
    compressor = VARIANTS[name]
    losses = [run["val_loss"] for run in runs]
    against = [run["val_loss"] - dense["val_loss"] for run, dense in zip(runs, found.get("dense", []), strict=False)]
    return {
        "variant": name,
        "ratio_of_bytes": round(predict(compressor, shapes, RANKS).ratio, 2) if compressor else 1.0,
        "val_loss": round(statistics.fmean(losses), 4),
        "val_loss_by_seed": " ".join(f"{loss:.4f}" for loss in losses),
        "against_dense": f"{statistics.fmean(against):+.4f}" if against else "",
        "train_loss": round(statistics.fmean(run["train_loss"] for run in runs), 4),
        "relative_error": round(statistics.fmean(run["relative_error"] for run in runs), 3),
        "steps": steps,
        "lr": lr,
        "parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
    }


if __name__ == "__main__":
    main()
