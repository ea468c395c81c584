"""Short runs with compressed gradients on the ranks of a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from tests.suite.models import Net
from tests.suite.runs import build_trainer
from tests.suite.table import Strategy

# The models of the contract suite are so small that with the defaults everything would go dense.
SMALL: dict[str, Any] = {"min_numel": 64}
ARC: dict[str, Any] = {"ratio": 0.5, "rank": 1, **SMALL}


def train(
    folder: Path,
    strategy: Any,
    *callbacks: L.Callback,
    steps: int = 4,
    resume: Path | None = None,
    module: Any = None,
    **arguments: Any,
) -> tuple[L.Trainer, Any]:
    module = module or Net(optimizer="sgd")
    ranks = dist.get_world_size() if dist.is_initialized() else 2
    trainer = build_trainer(folder, Strategy("", ranks, lambda _: strategy), [], callbacks, module, steps, arguments)
    trainer.fit(module, ckpt_path=resume)
    return trainer, module
