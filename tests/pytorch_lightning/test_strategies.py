"""Strategies under Lightning's other name; what they do is a rule of the contract, tests/suite/rules/namespaces.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
import pytorch_lightning as pl
from lightning.pytorch.strategies import Strategy, StrategyRegistry

import lightning_eff.strategies
from harness import REPOSITORY
from harness.processes import environment
from lightning_eff.pytorch_lightning import strategies


def test_both_names_know_the_same_strings() -> None:
    other = pl.strategies.StrategyRegistry
    assert set(StrategyRegistry.available_strategies()) == set(other.available_strategies())
    strategy = other.get("ddp_arc_topk")
    assert type(strategy) is strategies.CompressedDDPStrategy
    assert isinstance(strategy, pl.strategies.DDPStrategy)
    assert not isinstance(strategy, lightning_eff.strategies.CompressedDDPStrategy)


def test_every_strategy_of_the_suite_is_there_under_the_other_name() -> None:
    exported = [getattr(lightning_eff.strategies, name) for name in lightning_eff.strategies.__all__]
    ours = {each for each in exported if isinstance(each, type) and issubclass(each, Strategy)}
    assert {each.__name__ for each in ours} == set(strategies.__all__)


@pytest.mark.parametrize(
    "order",
    ["lightning_eff, pytorch_lightning", pytest.param("pytorch_lightning, lightning_eff", marks=pytest.mark.slow)],
)
def test_strings_are_there_whatever_is_imported_first(order: str) -> None:
    """And with no import of the name that the user does not know."""
    script = (
        f"import sys, {order}\n"
        "assert 'lightning.pytorch' not in sys.modules\n"
        "strategy = pytorch_lightning.strategies.StrategyRegistry.get('ddp_fp16_find_unused_parameters_true')\n"
        "assert isinstance(strategy, pytorch_lightning.strategies.DDPStrategy)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=environment(), cwd=REPOSITORY)
