"""FSDP2 by name does what DDP does."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from harness.runs import fit, seed_everything
from lightning_eff.strategies import FSDP2Strategy
from tests.strategies.fsdp2.zoo import ZOO


def _trained(name, strategy, **options):
    seed_everything(torch.distributed.get_rank())  # ranks begin with other weights
    module = ZOO[name]()
    fit(module, strategy=strategy, devices=2, max_epochs=2, num_sanity_val_steps=0, **options)
    return torch.stack(module.losses), torch.stack(module.validation)


def _both(name):
    return _trained(name, "ddp_find_unused_parameters_true"), _trained(name, "fsdp2")


@pytest.mark.parametrize("name", ZOO)
def test_losses_are_those_of_ddp(name, pool):
    for rank, (ddp, sharded) in enumerate(pool.run(_both, name)):
        for theirs, ours in zip(ddp, sharded, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}, rank {rank}: {m}")
        assert ddp[0].unique().numel() > 4
