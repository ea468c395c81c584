"""The strategy on two gloo processes, against plain DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

from lightning_eff.functional.compression import predict
from lightning_eff.strategies import BF16, FP16, ArcTopK, CompressedDDPStrategy, Compressor
from tests.suite.models import Net
from tests.suite.runs import build_trainer
from tests.suite.table import Strategy

# The model of the contract suite is so small that everything would go dense.
ARC = {"ratio": 0.5, "rank": 1, "min_numel": 64}


def train(folder: Path, strategy: Any, steps: int = 4, **arguments: Any) -> tuple[L.Trainer, Net]:
    module = Net(optimizer="sgd")
    trainer = build_trainer(folder, Strategy("", 2, lambda _: strategy), [], [], module, steps, arguments)
    trainer.fit(module)
    return trainer, module


def _weights(folder: Path, compressor: Compressor | None) -> dict[str, Any]:
    strategy = "ddp" if compressor is None else CompressedDDPStrategy(compressor=compressor)
    trainer, module = train(folder, strategy)
    found: dict[str, Any] = {name: p.detach().clone() for name, p in module.named_parameters()}
    if compressor is not None:
        found["traffic"] = trainer.strategy.traffic
    return found


@pytest.mark.parametrize("compressor", [FP16(), BF16(), ArcTopK(**ARC)], ids=lambda c: type(c).__name__)
def test_trains_equally_on_both_ranks(pool, tmp_path, compressor):
    one, other = pool.run(_weights, tmp_path, compressor)
    traffic = one.pop("traffic")
    other.pop("traffic")
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
        assert weight.isfinite().all()
    shapes = {name: tuple(p.shape) for name, p in Net().named_parameters()}
    prediction = predict(compressor, shapes, world_size=2)
    assert traffic.steps == 4
    assert traffic.bytes_sent == 4 * prediction.bytes_sent
    assert traffic.dense_bytes == 4 * prediction.dense_bytes
    assert traffic.bytes_sent < traffic.dense_bytes


@pytest.mark.parametrize(
    ("prefix", "start_method"),
    [("ddp", "popen"), ("ddp_spawn", "spawn"), ("ddp_fork", "fork"), ("ddp_notebook", "fork")],
)
def test_strings_are_registered(prefix, start_method):
    strategy = StrategyRegistry.get(f"{prefix}_arc_topk")
    assert isinstance(strategy, CompressedDDPStrategy)
    assert isinstance(strategy.compressor, ArcTopK)
    assert strategy._start_method == start_method
