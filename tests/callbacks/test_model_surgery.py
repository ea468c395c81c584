"""Where in a run the layers are replaced, and what is said where weights do not fit."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors.torch import load_file, save_file

from benchmarks.layers_quality import SwiGLU
from examples.gpt import GPT, GPTConfig, GPTModule
from harness.runs import fit
from lightning_eff.callbacks import MISA, GradES, ModelSurgery
from lightning_eff.cli.training import main
from lightning_eff.layers import CR, CRLinear, MoC, MoCFeedForward, SkipV1, replace_layers
from lightning_eff.layers.replace import connections
from lightning_eff.structure import find_blocks
from tests.suite.runs import weights

TINY = GPTConfig(block_size=8, n_layer=3, n_head=2, n_embd=16)


def data() -> torch.utils.data.DataLoader:
    tokens = torch.randint(0, 256, (12, 9), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return torch.utils.data.DataLoader(tokens, batch_size=2)


def module() -> GPTModule:
    torch.manual_seed(0)
    return GPTModule(TINY, schedule="constant", warmup_steps=1)


class Saves(L.Callback):
    def __init__(self, path) -> None:
        self.path = path

    def on_train_end(self, trainer, pl_module) -> None:
        trainer.save_checkpoint(self.path)


class Late(GPTModule):
    """Its model is built in one of Lightning's hooks."""

    where = "configure_model"

    def build(self) -> None:
        if not hasattr(self, "model"):
            torch.manual_seed(0)
            self.model = GPT(TINY)

    def __init__(self) -> None:
        super().__init__(TINY, schedule="constant", warmup_steps=1)
        del self.model


class InConfigureModel(Late):
    def configure_model(self) -> None:
        self.build()


class InSetup(Late):
    def setup(self, stage: str) -> None:
        self.build()


@pytest.mark.parametrize("make", [module, InConfigureModel, InSetup])
def test_wherever_the_model_is_built_its_layers_are_replaced_before_the_optimizer_is_made(make):
    model, callback = make(), ModelSurgery(feed_forward=MoC(new_weights=True), attention=SkipV1())
    before = set(vars(model))
    trainer = fit(model, callback, data=data(), max_steps=2)
    assert all(isinstance(block.mlp, MoCFeedForward) for block in model.model.blocks)
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters()}
    assert len(callback.plan["replaced"]) == 6
    assert set(vars(model)) - before <= {"model"}  # what it has wrapped is as it was
    assert not model._load_state_dict_post_hooks
    plan = callback.plan
    fit(model, callback, data=data(), max_steps=2)  # a second time there is nothing to do
    assert callback.plan == plan


@pytest.mark.parametrize("linear", [CR(rank=2), CR(rank=2, recompute=True)])
def test_the_plan_and_what_is_kept_are_in_the_checkpoint(tmp_path, linear):
    model = module()
    fit(model, ModelSurgery(linear=linear), Saves(tmp_path / "last.ckpt"), data=data(), max_steps=6)  # an epoch
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state = saved["callbacks"]["ModelSurgery"]
    other = module()
    assert replace_layers(other, state["plan"]) == state["plan"]
    other.load_state_dict(saved["state_dict"])
    (connection,) = connections(model)
    assert state["connections"] == [connection.state()]
    assert connection.passes == (6 if linear.recompute else 0)
    resumed, callback = module(), ModelSurgery(linear=linear)
    fit(resumed, callback, data=data(), max_steps=8, ckpt_path=tmp_path / "last.ckpt")
    (connection,) = connections(resumed)
    assert connection.passes == (8 if linear.recompute else 0)
    assert isinstance(resumed.model.blocks[1].attn.query, CRLinear)


class Gated(GPTModule):
    """Its networks have the names that a MoCFeedForward's weights have."""

    def __init__(self) -> None:
        super().__init__(TINY, schedule="constant", warmup_steps=1)
        for block in self.model.blocks:
            block.mlp = SwiGLU(16, 40)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (module, {"attention": SkipV1()}),
        (module, {"linear": CR(rank=4)}),
        (Gated, {"feed_forward": MoC()}),  # whose weights a model as it was would take, and be dense again
    ],
    ids=["skipv1", "cr", "moc"],
)
def test_a_checkpoint_says_to_a_plain_script_what_its_model_lacks(tmp_path, make, settings):
    path = tmp_path / "last.ckpt"
    fit(make(), ModelSurgery(**settings), Saves(path), data=data(), max_steps=1)
    saved = torch.load(path, weights_only=True)
    plan, state = saved["callbacks"]["ModelSurgery"]["plan"], saved["state_dict"]
    for load in (
        lambda: fit(make(), data=data(), ckpt_path=path),
        lambda: make().load_state_dict(state),
    ):
        with pytest.raises(RuntimeError, match=r"Unexpected key.*replace_layers\(model, plan\)"):
            load()
    (marked,) = (name for name in state if "replace_layers" in name)

    other = make()
    replace_layers(other, plan)
    assert other.state_dict().keys() == state.keys() - {marked}  # a model's own state dict is as it was
    save_file(state, tmp_path / "last.safetensors")
    other.load_state_dict(load_file(tmp_path / "last.safetensors"))
    inner = make().model
    replace_layers(inner, {**plan, "replaced": {n.removeprefix("model."): w for n, w in plan["replaced"].items()}})
    inner.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    for name, weight in inner.state_dict().items():
        assert torch.equal(weight, state[f"model.{name}"])
        assert torch.equal(weight, other.state_dict()[f"model.{name}"])


def test_weights_of_other_layers_are_refused_in_words(tmp_path):
    fit(module(), Saves(tmp_path / "plain.ckpt"), data=data(), max_steps=1)
    with pytest.raises(
        RuntimeError, match=r"the weights are of a model with other layers .*replace_layers\(model, plan\)"
    ):
        fit(module(), ModelSurgery(linear=CR()), data=data(), ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.needs("jsonargparse")
def test_the_command_line_says_what_is_missing_where_a_checkpoint_has_a_plan(tmp_path, capsys, monkeypatch):
    path = tmp_path / "last.ckpt"
    fit(module(), ModelSurgery(linear=CR(rank=2)), Saves(path), data=data(), max_steps=1)
    saved = torch.load(path, weights_only=True)
    del saved["hyper_parameters"]  # of a class without a name, where it was not built on the command line
    torch.save(saved, path)
    monkeypatch.chdir(tmp_path)
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text("".join(f"line {n * i % 7} of file {n}\n" for i in range(100)))
    shape = {"block_size": 8, "n_layer": 3, "n_head": 2, "n_embd": 16}
    text = {"root": str(tmp_path), "pattern": "*.txt", "val_fraction": 0.3, "block_size": 8}
    config = {
        "seed_everything": False,
        "model": {"class_path": "examples.gpt.GPTModule", "init_args": {"config": shape}},
        "data": {"class_path": "examples.gpt.TextDataModule", "init_args": text},
        "trainer": {"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 2},
    }
    (tmp_path / "plain.yaml").write_text(json.dumps(config))
    line = ["fit", "--config", "plain.yaml", "--ckpt_path", str(path)]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-eff", *line])
    assert main() == 2
    said = capsys.readouterr().err
    assert "ModelSurgery replaced 18 layers: add ModelSurgery with that run's linear, or call" in said
    assert "replace_layers(model, plan)" in said
    assert "checkpoint['callbacks']['ModelSurgery']['plan']" in said


SETTINGS = [{"attention": SkipV1()}, {"feed_forward": MoC(new_weights=True)}, {"linear": CR(rank=4, recompute=True)}]
NAMES = ["skipv1", "moc", "cr"]


class Seen(L.Callback):
    """Which matrices changed at all, and what MISA trained."""

    def on_train_start(self, trainer, pl_module) -> None:
        self.before = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}
        self.sampled: set[str] = set()

    def on_train_batch_start(self, trainer, pl_module, *_) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, MISA):
                self.sampled |= set(callback.active)

    def on_train_end(self, trainer, pl_module) -> None:
        self.changed = {n for n, weight in pl_module.named_parameters() if not torch.equal(weight, self.before[n])}


@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_grades_and_misa_know_what_was_put_in_by_its_role_and_train_it(settings):
    model, seen = module(), Seen()
    # A threshold that every gradient is below: all are frozen, in their roles.
    often = {"every_n_steps": 1, "patience": 1, "max_events": None, "stop_when_frozen": False}
    grades = GradES(alpha=0.0, tau=1e9, tau_mode="absolute", **often)
    trainer = fit(model, ModelSurgery(**settings), grades, seen, data=data(), max_steps=4)
    blocks = find_blocks(model)
    roles = Counter(matrix.role for block in blocks for matrix in block.matrices)
    assert set(roles) == {"attention", "ffn"}
    logged = {name: trainer.callback_metrics[f"grades/frozen_{name}"].item() for name in roles}
    assert logged == roles
    inside = {matrix.name for block in blocks for matrix in block.matrices}
    assert inside <= seen.changed

    model, seen = module(), Seen()
    misa = MISA(budget=0.5, every_n_steps=1)
    fit(model, ModelSurgery(**settings), misa, seen, data=data(), max_steps=6)
    assert seen.sampled <= inside
    assert seen.sampled == seen.changed & inside
    assert len({name.split(".")[2] for name in seen.sampled}) > 1  # of more than one block


def test_what_cannot_be_replaced_is_said_with_the_mend():
    with pytest.raises(
        MisconfigurationException, match=r"ModelSurgery: feed_forward: nothing can be replaced: .*new_weights"
    ):
        fit(module(), ModelSurgery(feed_forward=MoC()), data=data())


def test_arguments():
    for arguments, words in (
        ({}, "feed_forward=None is not allowed"),
        ({"linear": CR(), "attention": SkipV1()}, "linear=.* it must be given alone"),
        ({"feed_forward": {"key": 1}}, "feed_forward=.* a dict of k, new_weights, pattern, recompute"),
        ({"feed_forward": {"k": 0}}, "k=0 is not allowed"),
    ):
        with pytest.raises(ValueError, match=words):
            ModelSurgery(**arguments)


def test_what_was_done_is_said(caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(module(), ModelSurgery(attention=SkipV1()), data=data(), max_steps=1)
    assert "ModelSurgery: replaced 3 layers: model.blocks.0.attn.value (FirstValue)" in caplog.text


def test_validation_of_a_trained_model_replaces_too(tmp_path):
    model, callback = module(), ModelSurgery(attention=SkipV1())
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[callback]).validate(
        model, data(), verbose=False
    )
    assert callback.plan is not None
    assert model.model.blocks[1].attn.value.weight.shape == (8, 16)


def _trained(settings: dict[str, Any], strategy: str) -> dict[str, torch.Tensor]:
    model = module()
    fit(model, ModelSurgery(**settings), data=data(), max_steps=3, strategy=strategy, devices=2)
    return weights(model)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=NAMES)
def test_sharded_it_learns_what_ddp_does(settings, pool):
    (wanted, _), (got, other) = (pool.run(_trained, settings, strategy) for strategy in ("ddp", "fsdp2"))
    assert wanted.keys() == got.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-5)
        assert torch.equal(got[name], other[name])
