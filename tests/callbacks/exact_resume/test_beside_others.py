"""Beside every other callback, on two ranks, under DDP, FSDP2 and compressed gradients."""

from __future__ import annotations

import pytest

from tests.strategies.fault_tolerant.replica_runs import Server, run
from tests.suite.rules.resume import check_data_and_randomness
from tests.suite.runs import Place
from tests.suite.table import ARC_TOPK, DDP, FSDP2, ROWS

_STRATEGIES = (DDP, FSDP2, ARC_TOPK)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", _STRATEGIES, ids=lambda strategy: strategy.name)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_data_and_randomness_resume_exactly(row, strategy, tmp_path, pool):
    if strategy.name in row.refused_strategies:
        pytest.skip("the row refuses the strategy")
    check_data_and_randomness(row, Place(strategy, tmp_path, pool), steps=(2, 5, 7))


@pytest.mark.slow
def test_under_ddp_ft_a_run_of_which_nothing_is_left_goes_on_exactly(tmp_path):
    """Two replicas with dropout and noise in the data begin anew at a checkpoint of the second epoch."""
    pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")
    how = {"replicas": 2, "steps": 24, "samples": 80, "checkpoint_every": 4, "callbacks": {"ExactResume": {}}}
    server = Server()
    try:
        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        whole.mkdir()
        resumed.mkdir()
        unbroken = run(server, whole, **how)
        (path,) = (whole / "checkpoints").glob("*step=16*.ckpt")
        again = run(server, resumed, resume=str(path), **how)
    finally:
        server.close()
    assert min(again.losses()) == 17
    assert again.losses() == {step: loss for step, loss in unbroken.losses().items() if step > 16}
    for replica in (0, 1):
        assert again.finals[replica]["values"] == unbroken.finals[replica]["values"]
