"""Lightning goes by two names: under `pytorch_lightning` a callback does what it does under `lightning.pytorch`."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from harness.faults import InjectedError, fail_at
from tests.suite.rules.registry import rule
from tests.suite.runs import Place, SaveAt, differences, expect, fit
from tests.suite.table import ARC_TOPK, DDP, FSDP2, SINGLE, Row, Strategy


@rule(SINGLE, slow=(DDP, FSDP2, ARC_TOPK))
def does_the_same_under_pytorch_lightning(row: Row, place: Place) -> None:
    """The Trainer, the module and the strategy of the other name, with a crash and a resume: every bit is the same."""
    for rank, (usual, other) in enumerate(place.run(_under_both, row, place.strategy, place.folder)):
        wrong = differences(usual, other)
        assert not wrong, f"rank {rank}: {wrong}"


def _under_both(row: Row, strategy: Strategy, folder: Path) -> tuple[Any, Any]:
    usual = fit(row, folder, strategy=strategy).outcome()
    build = {ARC_TOPK.name: _arc_topk}.get(strategy.name, strategy.build)  # others are strings
    strategy = replace(strategy, package="pytorch_lightning", build=build)
    path, step = folder / "other.ckpt", row.crash_steps[-1]
    with expect(InjectedError, f"the run did not get to step {step}"):
        around = [SaveAt(step, path), fail_at(step=step)]
        fit(row, folder, strategy=strategy, around=around, enable_checkpointing=False)  # no Checkpoint of that name
    return usual, fit(row, folder, strategy=strategy, resume=path).outcome()


def _arc_topk(optimizers: int) -> Any:
    usual = ARC_TOPK.build(optimizers)
    return import_module("lightning_eff.pytorch_lightning.strategies").CompressedDDPStrategy(usual.compressor)
