"""Memory against quality for MISA and its rivals, and the largest model that a memory trains. Nothing is trained.

    python -m benchmarks.worth misa

Bytes are those of weights, gradients and AdamW's state in float32, 4 N + 12 n for N parameters of which n are in
training, which `benchmarks.misa memory` has found to be exact; activations are not in them. Qualities are those that
`benchmarks.misa worth` has measured by fine-tuning the 1 M GPT. AdamW with a state of 8 bits is of bitsandbytes; its
state was measured there; here it is counted as 2 bytes a parameter and 8 for each block of 256.

The largest model: the example GPT with a width of 2,048 and as many blocks as fit, on the meta device.

Rows go to benchmarks/results/worth_misa_quality.csv and worth_misa_largest.csv.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.fine_tuning import add_lora
from benchmarks.gpt import GPT_1M, parameters
from benchmarks.misa import EIGHT_BITS, OF_THIS_MEMORY, rank_of
from benchmarks.rows import publish, read_rows
from examples.gpt.model import GPT, GPTConfig
from lightning_eff.structure import select_matrices

WIDTH = 2048
GIGABYTES = (8, 16, 24, 80)

Count = Callable[[nn.Module], int]


def _budget(fraction: float) -> Count:
    return lambda model: round(fraction * parameters(model))


def _default(model: nn.Module) -> int:
    """3 %, or as much as the largest matrix."""
    named = dict(model.named_parameters())
    largest = max(sum(named[name].numel() for name in each.parameters) for each in select_matrices(model, None, None))
    return max(round(0.03 * parameters(model)), largest)


def _layers(number: int, ends: bool) -> Count:
    def count(model: nn.Module) -> int:
        rest = parameters(model.embed) + parameters(model.head) if ends else 0  # type: ignore[arg-type]
        return number * parameters(model.blocks[0]) + rest  # type: ignore[index, arg-type]

    return count


COUNTS: dict[str, Count] = {
    "full AdamW": parameters,
    "LISA, one layer and both ends": _layers(1, ends=True),
    "BAdam, one layer": _layers(1, ends=False),
    "MISA, 25 %": _budget(0.25),
    "MISA()": _default,
}
QUALITIES = {  # arm of misa_worth -> whose bytes it takes
    "full AdamW": "full AdamW",
    EIGHT_BITS: EIGHT_BITS,
    "LoRA": "LoRA, rank 8",
    OF_THIS_MEMORY: OF_THIS_MEMORY,
    "LISA": "LISA, one layer and both ends",
    "BAdam": "BAdam, one layer",
    "MISA": "MISA, 25 %",
    "MISA without momentum step": "MISA, 25 %",
    "uniform without momentum step": "MISA, 25 %",
}


def sizes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """Of each arm: parameters of the model, and bytes without activations."""
    with torch.device("meta"):
        model = GPT(config)
        total = parameters(model)
        found = {arm: 4 * total + 12 * count(model) for arm, count in COUNTS.items()}
        found[EIGHT_BITS] = round((4 + 4 + 2 + 8 / 256) * total)
        add_lora(model, 1)
        pairs = sum(p.numel() for p in model.parameters() if p.requires_grad)
        for arm, rank in (("LoRA, rank 8", 8), (OF_THIS_MEMORY, rank_of(OF_THIS_MEMORY))):
            found[arm] = 4 * total + 16 * rank * pairs
    return {arm: (total, size) for arm, size in found.items()}


def compare() -> None:
    """Both tables."""
    quality()
    publish("The largest model that a memory trains", "worth_misa_largest", largest())


def quality() -> None:
    """Bytes of each arm on the 1 M GPT, and the loss that it came to at its best rate."""
    held, runs, rows = sizes(GPT_1M), read_rows("misa_worth"), []
    for arm, size in QUALITIES.items():
        by_rate: dict[str, list[float]] = {}
        for run in runs:
            if run["arm"] == arm:
                by_rate.setdefault(run["lr"], []).append(float(run["val_loss"]))
        losses = max(by_rate.values(), key=len)  # the rate that all seeds have
        total, size_of = held[size]
        if arm == EIGHT_BITS:  # vectors have 32, and each tensor has tables
            size_of = 8 * total + max(int(run["state_bytes"]) for run in runs if run["arm"] == arm)
        rows.append(
            {
                "arm": arm,
                "parameters": total,
                "megabytes": round(size_of / 1e6, 2),
                "of_full": round(size_of / held["full AdamW"][1], 3),
                "val_loss": round(statistics.fmean(losses), 4),
                "lowest": min(losses),
                "highest": max(losses),
                "seeds": len(losses),
            }
        )
    publish("Memory against quality", "worth_misa_quality", rows)


def largest() -> list[dict[str, Any]]:
    """Rows: for each arm and memory the deepest GPT that fits."""
    one, two = (sizes(GPTConfig(block_size=2048, n_layer=n, n_head=16, n_embd=WIDTH)) for n in (100, 200))
    rows = []
    for arm in (name for name in one if name != OF_THIS_MEMORY):  # whose rank is that of the small model
        # Bytes are linear in the number of blocks.
        slope = (two[arm][1] - one[arm][1]) / 100
        base = one[arm][1] - 100 * slope
        of_block = (two[arm][0] - one[arm][0]) / 100
        row: dict[str, Any] = {"arm": arm}
        for gigabytes in GIGABYTES:
            blocks = max(0, int((gigabytes * 1e9 - base) / slope))
            count = one[arm][0] + (blocks - 100) * of_block
            row[f"billions_in_{gigabytes}_gb"] = round(count / 1e9, 2)
        rows.append({**row, "bytes_a_parameter": round(two[arm][1] / two[arm][0], 2)})
    return rows
