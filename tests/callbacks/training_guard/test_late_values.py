"""Numbers that are read late."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torch.distributed as dist

from harness.operators import OperatorCounter
from lightning_eff.callbacks.training_guard.late_values import LateValues

CPU = torch.device("cpu")


def _rows(values: LateValues, steps: range) -> list[Any]:
    return [row for step in steps for row in values.record(step, [torch.tensor(step / 4), None, 1.0], CPU)]


def test_each_number_comes_once_in_order_and_at_most_a_block_late():
    values = LateValues(columns=3, every=3)
    lags = []
    rows = []
    for step in range(1, 12):
        new = values.record(step, [torch.tensor(step / 4), None, 1.0], CPU)
        lags += [step - row[0] for row in new]
        rows += new
    assert max(lags) == 3
    assert min(lags) == 1
    assert rows + values.flush() == [(step, [step / 4, None, 1.0]) for step in range(1, 12)]
    assert values.flush() == []


def test_no_step_waits_but_the_one_that_reads():
    values = LateValues(columns=3, every=4)
    with OperatorCounter() as counter:
        _rows(values, range(1, 5))
    assert counter.host_syncs == 0
    with OperatorCounter() as counter:
        _rows(values, range(5, 6))
    assert counter.host_syncs == 1


def test_it_goes_on_from_its_state():
    for cut in range(1, 9):
        values, other = LateValues(3, 3), LateValues(3, 3)
        before = _rows(values, range(1, cut + 1))
        other.load_state_dict(values.state_dict())
        copied = pickle.loads(pickle.dumps(values))
        rest = [_rows(v, range(cut + 1, 12)) + v.flush() for v in (values, other, copied)]
        assert rest[0] == rest[1] == rest[2]
        assert [step for step, _ in before + rest[0]] == list(range(1, 12))


def test_a_state_of_other_columns_is_forgotten():
    values, other = LateValues(3, 3), LateValues(2, 3)
    _rows(values, range(1, 6))
    other.load_state_dict(values.state_dict())
    assert other.flush() == []


def test_the_mean_is_over_the_ranks_that_have_a_number(pool):
    for rows in pool.run(_over_ranks):
        assert rows == [(1, [2.0, 5.0, None]), (2, [3.0, 5.0, None])]


def _over_ranks() -> list[Any]:
    values, rank = LateValues(columns=3, every=2), dist.get_rank()
    rows = []
    for step in (1, 2):
        rows += values.record(step, [torch.tensor(1.0 + step - 1 + 2 * rank), 5.0 if rank else None, None], CPU)
    return rows + values.flush()
