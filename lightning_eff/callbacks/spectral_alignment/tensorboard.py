"""What TensorBoard shows of the monitor: charts, and histograms that were counted already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_eff.training.trainer import logger_step, tensorboards


def write_histograms(trainer: Trainer, tags: Sequence[str], counts: Tensor, low: float, high: float) -> None:
    """Write counts of equal bins between ``low`` and ``high`` as histograms, at the loggers' step.

    Waits for the device, where there is anybody to write for.

    Args:
        trainer: rank zero alone writes, to each TensorBoard logger.
        tags: one for each histogram.
        counts: (tags, bins). A row without a count is left out.
        low: lower end of the first bin.
        high: upper end of the last one.
    """
    writers = list(tensorboards(trainer))
    if not writers:
        return
    edges = torch.linspace(low, high, counts.shape[1] + 1, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2
    for tag, row in zip(tags, counts.to("cpu", torch.float64), strict=True):
        if (number := float(row.sum())) == 0:
            continue
        for writer in writers:
            writer.add_histogram_raw(
                tag, min=low, max=high, num=number, sum=float(row @ middles), sum_squares=float(row @ middles.square()),
                bucket_limits=edges[1:].tolist(), bucket_counts=row.tolist(), global_step=logger_step(trainer),
            )  # fmt: skip


def charts(each: bool) -> dict[str, list[Any]]:
    """For ``TensorBoardLayout``; ``each``: of every layer too."""
    method = "spectral_alignment"
    found: dict[str, list[Any]] = {
        "worst layer: share of inputs on one side": ["Multiline", [f"{method}/worst_majority"]],
        "layers that are armed": ["Multiline", [f"{method}/armed_layers"]],
        "layers that have collapsed": ["Multiline", [f"{method}/collapsed_layers"]],
    }
    if each:
        found["share of inputs on one side, by layer"] = ["Multiline", [f"{method}/majority/.*"]]
    return found
