"""Every row of the table keeps every rule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest

import lightning_eff.callbacks
from tests.suite.device import DEVICE
from tests.suite.rules import RULES
from tests.suite.runs import Place
from tests.suite.table import ROWS


def _cases() -> Iterator[Any]:
    for row in ROWS:
        for name, rule in RULES.items():
            for strategy in (*rule.strategies, *rule.slow):
                if strategy.name in row.refused_strategies and name != "refuses_strategies":
                    continue
                reason = row.exceptions.get(f"{name}-{strategy.name}", row.exceptions.get(name))
                # What a row cannot keep on the CPU, where AdamW reads its steps, it may keep on a GPU.
                marks = [pytest.mark.xfail(reason=reason, strict=DEVICE == "cpu")] if reason else []
                marks += [pytest.mark.slow] if strategy in rule.slow or row.slow else []
                yield pytest.param(row, rule, strategy, id=f"{row.id}-{name}-{strategy.name}", marks=marks)


@pytest.mark.parametrize(("row", "rule", "strategy"), list(_cases()))
def test_contract(row, rule, strategy, tmp_path, pool):
    rule.check(row, Place(strategy, tmp_path, pool))


def test_every_exception_names_a_rule():
    for row in ROWS:
        for name in row.exceptions:
            assert name.split("-")[0] in RULES, f"{row.id}: {name}"


def test_every_callback_of_the_package_is_a_row():
    exported = [getattr(lightning_eff.callbacks, name) for name in lightning_eff.callbacks.__all__]
    callbacks = {each for each in exported if isinstance(each, type) and issubclass(each, L.Callback)}
    assert callbacks <= {row.callback for row in ROWS}


def test_rows_have_names_of_their_own():
    names = [row.id for row in ROWS]
    assert len(names) == len(set(names))
