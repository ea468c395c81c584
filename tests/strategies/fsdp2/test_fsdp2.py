"""FSDP2 by name does what DDP does."""

from __future__ import annotations

import re
import warnings
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchmetrics import MeanMetric

import lightning_eff  # noqa: F401  (registers the string)
from benchmarks.fsdp2_models import BATCHES, GPT, MLP, ZOO, Base, ViT
from harness.runs import fit, quiet_trainer, seed_everything
from lightning_eff.strategies import FSDP2Strategy, ShardedWeightsError
from lightning_eff.training.optimizer_state import state_bytes

OPTIONS: dict[str, Any] = {"devices": 2, "num_sanity_val_steps": 0, "max_steps": -1, "max_epochs": 1}


def _trained(name, strategy, **options):
    seed_everything(torch.distributed.get_rank())  # ranks begin with other weights
    module = ZOO[name]()
    fit(module, strategy=strategy, **OPTIONS | options)
    return torch.stack(module.losses), torch.stack(module.validation)


def _both(names, **options):
    strategies = ("ddp_find_unused_parameters_true", "fsdp2")
    return {name: [_trained(name, strategy, **options) for strategy in strategies] for name in names}


def _assert_close(found, rtol=1e-4, atol=1e-5):
    for name, (ddp, sharded) in found.items():
        assert ddp[0].unique().numel() >= BATCHES
        for theirs, ours in zip(ddp, sharded, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("names", [list(ZOO)[i : i + 4] for i in (0, 4, 8)], ids=" ".join)
def test_losses_are_those_of_ddp(names, pool):
    for found in pool.run(_both, names):
        _assert_close(found)


def test_in_mixed_precision_and_with_accumulation(pool):
    for found in pool.run(_both, ["GPT"], precision="bf16-mixed", accumulate_grad_batches=2):
        _assert_close(found, rtol=2e-2, atol=2e-2)


def _in_half(strategy):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(MisconfigurationException, match=r"'16-mixed'.*'32-true', 'bf16-mixed', 'bf16-true'"):
        fit(MLP(), strategy=strategy, plugins=[plugin], **OPTIONS)


def test_a_scaler_is_refused_as_lightning_does(pool):
    with pytest.raises(ValueError, match=r"does not support `Fabric\(..., precision=.64-true"):
        L.Trainer(accelerator="cpu", devices=2, strategy=FSDP2Strategy(), precision="64-true")
    pool.run(_in_half, "fsdp2")


class _Tested(ViT):
    """Has every step."""

    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def test_dataloader(self):
        return self.val_dataloader()


def test_one_module_is_validated_trained_and_tested(pool):
    for first, losses, is_a, name in pool.run(_validated_first, _Tested):
        assert len(first) == len(losses) == BATCHES
        assert losses[-1] < losses[0]
        assert is_a
        assert name == "FSDP_Tested"


def _validated_first(cls):
    """Evaluation runs in inference mode, and what it gathers must not get into a training."""
    warnings.filterwarnings("ignore", message=".*DistributedSampler.*")
    seed_everything(1)
    module = cls()
    trainer = quiet_trainer(accelerator="cpu", strategy="fsdp2", **OPTIONS)
    trainer.validate(module)
    first = torch.stack(module.validation)
    trainer.fit(module)
    trainer.test(module)
    return first, torch.stack(module.losses), isinstance(module, cls), type(module).__name__


# --- what a rank holds ----------------------------------------------------------------------------------------------


class _Memory(L.Callback):
    """Bytes of weights on this rank: at rest, and at most in a forward pass."""

    def on_fit_start(self, trainer, pl_module):
        self.module, self.most = pl_module, 0
        self.handles = [block.self_attn.register_forward_pre_hook(self.note) for block in pl_module.blocks.layers]

    def note(self, *_):
        whole = sum(p.numel() * 4 for p in self.module.parameters() if not isinstance(p, DTensor))
        self.most = max(self.most, whole)

    def on_train_end(self, trainer, pl_module):
        self.rest = sum(p.to_local().numel() * 4 for p in pl_module.parameters())
        self.state = state_bytes(trainer.optimizers)
        for handle in self.handles:
            handle.remove()


def _memory():
    memory, module = _Memory(), GPT()
    block = sum(p.numel() * 4 for p in module.blocks.layers[0].parameters())
    root = sum(p.numel() * 4 for p in module.parameters()) - 2 * block
    parts = [-(-p.shape[0] // 2) * p.numel() // p.shape[0] * 4 for p in module.parameters()]
    fit(module, memory, strategy="fsdp2", limit_val_batches=0, **OPTIONS)
    return memory.rest, sum(parts), memory.state, len(parts), memory.most, root + block


def test_memory_is_that_of_the_formula(pool):
    """A rank holds its part of weights and moments, and while it computes the rest and one block besides."""
    rest, parts, state, tensors, most, gathered = pool.run(_memory)[0]  # the first rank's parts are the larger ones
    assert rest == parts
    assert state == 2 * parts + 4 * tensors  # AdamW's two moments, and its count of steps for each tensor
    assert most == gathered


# --- who meets a shard ----------------------------------------------------------------------------------------------


class _Generates(GPT):
    """Reads weights in a hook, by a method that is no step."""

    words = 2

    def generate(self):
        return F.linear(self.embedding(torch.zeros(1, self.words, dtype=torch.long)), self.embedding.weight)

    def on_train_batch_end(self, *_):
        assert self.generate().shape == (1, self.words, 13)


class _GeneratesOne(_Generates):
    """One number meets a shard: torch's error is another one, from within its own code."""

    words = 1


class _ReadsABlock(GPT):
    def training_step(self, batch, batch_idx):
        weight = self.blocks.layers[0].linear1.weight
        return super().training_step(batch, batch_idx) + 0 * (torch.ones(1, weight.shape[0]) @ weight).sum()


def _meets(cls, **arguments):
    try:
        fit(cls(), strategy=FSDP2Strategy(**arguments), limit_val_batches=0, **OPTIONS)
    except ShardedWeightsError as error:
        return str(error)
    return "nothing"


def _all_meetings():
    return (
        _meets(_Generates),
        _meets(_GeneratesOne),
        _meets(_Generates, forward_methods=["generate"]),
        _meets(_ReadsABlock),
        _meets(_ReadsABlock, exclude=["blocks.layers.0"]),
    )


def test_a_shard_where_a_weight_is_expected_is_an_error_that_says_so(pool):
    for unnamed, one, named, block, left_out in pool.run(_all_meetings):
        assert (
            unnamed
            == one
            == (
                "generate meets a weight of which each rank holds a part; it is none of the steps: name it in "
                "FSDP2Strategy(forward_methods=['generate'])"
            )
        )
        assert "training_step meets a weight" in block
        assert "FSDP2Strategy(exclude=[...])" in block
        assert named == left_out == "nothing"


# --- other modules --------------------------------------------------------------------------------------------------


class _Configured(MLP):
    """Builds itself in `configure_model`, and leaves the sharding to the strategy."""

    def __init__(self):
        Base.__init__(self)
        self.net = None

    def configure_model(self):
        if self.net is None:
            self.net = MLP().net


class _Scalar(MLP):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class _TwoTypes(GPT):
    """The embedding and the block, each beside parameters in float32."""

    def __init__(self, part):
        super().__init__()
        self.get_submodule(part).bfloat16()


class _HoldsAMetric(MLP):
    """On the class, and not on the module."""

    metric = MeanMetric(sync_on_compute=False)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.metric.update(loss.detach())
        return loss

    def on_train_epoch_end(self):
        self.mean = self.metric.compute()
        self.metric.reset()


def _others():
    module = _Configured()
    trainer = fit(module, strategy="fsdp2", **OPTIONS)
    assert isinstance(module, FSDPModule)
    assert isinstance(trainer.strategy, FSDP2Strategy)
    assert len(module.losses) == BATCHES
    with pytest.raises(MisconfigurationException, match=r"scale has none: give it the shape \(1,\)"):
        fit(_Scalar(), strategy="fsdp2", **OPTIONS)
    with pytest.raises(MisconfigurationException, match=r"that lies in no block as one.*embedding.weight is torch.bfl"):
        fit(_TwoTypes("embedding"), strategy="fsdp2", **OPTIONS)
    with pytest.raises(MisconfigurationException, match=r"shards blocks.layers.0 as one.*linear1.weight is torch.bfl"):
        fit(_TwoTypes("blocks.layers.0.linear1"), strategy="fsdp2", **OPTIONS)
    module = _HoldsAMetric()
    fit(module, strategy="fsdp2", **OPTIONS)
    torch.testing.assert_close(module.mean, torch.stack(module.losses).mean())
    with pytest.raises(ValueError, match=r"exclude='blocks\.9' matches no block.*There are: blocks\.layers\.0"):
        fit(GPT(), strategy=FSDP2Strategy(exclude=["blocks.9"]), **OPTIONS)
    with pytest.raises(ValueError, match=r"forward_methods=.*GPT, which has no beam"):
        fit(GPT(), strategy=FSDP2Strategy(forward_methods=["beam"]), **OPTIONS)
    module = MLP()
    fit(module, strategy="fsdp2", **OPTIONS)
    assert "configure_model" not in vars(module)
    return True


def test_modules_that_build_themselves_and_modules_that_are_refused(pool):
    assert pool.run(_others) == [True, True]


@pytest.mark.parametrize(
    "arguments",
    [
        {"forward_methods": "generate"},
        {"forward_methods": ["two words"]},
        {"exclude": "blocks.0"},
        {"exclude": []},
        {"reshard_after_forward": 2},
        {"save_distributed_checkpoint": "yes"},
        {"async_save": None},
        {"process_group_backend": 3},
        {"timeout": 60},
        {"timeout": timedelta(0)},
    ],
    ids=str,
)
def test_arguments_are_checked(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not allowed: it must be ")):
        FSDP2Strategy(**arguments)
