"""The device mode of the contract suite, as far as it can be seen without a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from harness import REPOSITORY
from harness.runs import quiet_trainer
from tests.suite.device import OneCard, accelerator
from tests.suite.models import Net


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_the_option_says_so(pytestconfig):
    plugin = pytestconfig.pluginmanager.get_plugin(str(REPOSITORY / "conftest.py"))
    with pytest.raises(pytest.UsageError, match="--device cuda: torch finds no CUDA or HIP device here"):
        plugin.pytest_configure(SimpleNamespace(getoption={"--device": "cuda"}.get))


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_ranks_are_on_the_first_card(ranks, monkeypatch):
    monkeypatch.setattr(OneCard, "is_available", staticmethod(lambda: True))
    trainer = quiet_trainer(accelerator=accelerator("cuda"), devices=ranks, strategy="auto" if ranks == 1 else "ddp")
    assert trainer.num_devices == ranks
    assert trainer.strategy.root_device == torch.device("cuda", 0)
    for rank in range(ranks):
        trainer.strategy._local_rank = rank
        assert trainer.strategy.root_device == torch.device("cuda", 0)


def test_samples_come_to_the_weights():
    module = Net().to("meta")
    assert {tensor.device.type for tensor in module.placed(torch.arange(3))} == {"meta"}
