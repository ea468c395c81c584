"""The numbers that GradientStats logs, against the gradients themselves."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from harness.operators import OperatorCounter
from harness.runs import fit
from lightning_eff.callbacks import GradientStats
from lightning_eff.structure import clean_named_parameters
from tests.suite.models import Net

ROLES = {"attention": ("qkv.weight", "proj.weight"), "ffn": ("mlp.0.weight", "mlp.2.weight")}


class Keep(L.Callback):
    """The gradients of every step, and what is logged with each."""

    def __init__(self) -> None:
        self.gradients, self.logged = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        named = clean_named_parameters(module).items()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer, *args):
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        self.logged.append({name: value for name, value in logged.items() if name.startswith("gradients")})


def _expected(gradients):
    flat = torch.cat([gradient.flatten().double() for gradient in gradients])
    zeros, nonfinite = (flat == 0).double().mean(), (~flat.isfinite()).double().mean()
    return {"norm": flat.norm(), "max_abs": flat.abs().max(), "zeros": zeros, "nonfinite": nonfinite}


def _check(logged, prefix, gradients):
    for name, value in _expected(gradients).items():
        assert logged[f"{prefix}/{name}"] == pytest.approx(float(value), rel=1e-5), (prefix, name)


def _run(stats, model=None, **arguments):
    keep = Keep()
    fit(model or Net(), stats, keep, max_steps=6, limit_val_batches=0, log_every_n_steps=1, **arguments)
    return keep


def test_total_roles_and_layers_are_those_of_the_gradients():
    keep = _run(GradientStats(every_n_steps=1, log_details=True))
    for gradients, logged in zip(keep.gradients, keep.logged, strict=True):
        _check(logged, "gradients", gradients.values())
        for role, words in {
            "attention": ("qkv.weight", "proj.weight"),
            "ffn": ("mlp.0.weight", "mlp.2.weight"),
        }.items():
            _check(logged, f"gradients/{role}", [g for name, g in gradients.items() if name.endswith(words)])
        for block in ("blocks.0", "blocks.2"):
            _check(logged, f"gradients/{block}", [g for name, g in gradients.items() if name.startswith(f"{block}.")])
        _check(logged, "gradients/outside", [g for name, g in gradients.items() if name.startswith("head.")])


def test_it_measures_every_n_steps_and_what_is_selected():
    keep = _run(GradientStats(every_n_steps=3, include=["blocks.*"], exclude=["*bias"]))
    assert [bool(logged) for logged in keep.logged] == [False, False, True, True, True, True]
    chosen = [g for name, g in keep.gradients[2].items() if name.startswith("blocks") and not name.endswith("bias")]
    for logged in keep.logged[2:5]:
        _check(logged, "gradients", chosen)


class Holes(Net):
    """Gradients with zeros, and in one parameter with what is not a number."""

    def on_after_backward(self):
        self.head.weight.grad[0, 0] = torch.inf
        self.head.weight.grad[0, 1] = torch.nan
        self.blocks[0].qkv.weight.grad[:6] = 0


def test_what_is_not_finite_stays_in_its_own_group():
    keep = _run(GradientStats(every_n_steps=1), Holes())
    logged, gradients = keep.logged[0], keep.gradients[0]
    total = sum(gradient.numel() for gradient in gradients.values())
    assert logged["gradients/nonfinite"] == pytest.approx(2 / total, rel=1e-5)
    assert logged["gradients/attention/nonfinite"] == 0
    _check(logged, "gradients/attention", [g for n, g in gradients.items() if n.endswith(ROLES["attention"])])
    assert logged["gradients/attention/zeros"] > 0.05


class Complex(Net):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.tensor([1 + 1j, 2 - 1j]))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + (self.turn * (3 + 4j)).real.sum()


def test_a_complex_gradient_is_pairs_of_numbers():
    keep = _run(GradientStats(every_n_steps=1, include=["turn"]), Complex())
    _check(keep.logged[0], "gradients", [torch.view_as_real(keep.gradients[0]["turn"])])
    assert keep.logged[0]["gradients/norm"] == pytest.approx(50**0.5)


def test_what_is_measured_and_not_yet_logged_is_logged_by_the_resumed_run(tmp_path):
    runs = []
    for path in (None, tmp_path / "step=3.ckpt"):
        keep, saver = Keep(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        fit(Net(), GradientStats(every_n_steps=3), keep, saver, max_steps=4, limit_val_batches=0,
            log_every_n_steps=2, ckpt_path=path)  # fmt: skip
        runs.append(keep)
    whole, resumed = runs
    assert whole.logged[3]["gradients/norm"] > 0
    assert whole.logged[3] == resumed.logged[0]


def test_a_pattern_without_a_parameter_is_named():
    with pytest.raises(ValueError, match=r"include='encoder\.\*' matches no parameter"):
        _run(GradientStats(include=["encoder.*"]))


def _sharded(folder):
    keep = Keep()
    fit(Net(), GradientStats(every_n_steps=1), keep, max_steps=2, limit_val_batches=0, log_every_n_steps=1,
        devices=2, strategy="fsdp2", default_root_dir=folder)  # fmt: skip
    whole = [{name: gradient.full_tensor() for name, gradient in step.items()} for step in keep.gradients]
    return keep.logged, whole


def test_shards_add_up_to_the_whole(pool, tmp_path):
    for logged, gradients in pool.run(_sharded, tmp_path):
        _check(logged[0], "gradients", gradients[0].values())
        _check(
            logged[0],
            "gradients/ffn",
            [g for n, g in gradients[0].items() if n.endswith(("mlp.0.weight", "mlp.2.weight"))],
        )


def test_the_calls_of_a_step_that_is_not_measured_do_not_grow_with_the_parameters():
    def calls(parameters):
        module = nn.ParameterList([torch.ones(2) for _ in range(parameters)])
        optimizer = torch.optim.SGD(module, lr=0.1)
        stats = GradientStats(every_n_steps=100)
        stats._counts = [0]
        with OperatorCounter() as counter:
            stats.on_before_optimizer_step(type("T", (), {"optimizers": [optimizer]}), None, optimizer)
        return counter.calls

    assert calls(1000) == calls(1) == 0
