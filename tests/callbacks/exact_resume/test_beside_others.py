"""Beside every other callback, on two ranks, under DDP, FSDP2 and compressed gradients."""

from __future__ import annotations

import pytest

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
