"""ZClip in Lightning: what the contract suite (tests/suite) does not ask of every callback."""

import atexit
import logging
import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from harness.processes import free_port
from harness.runs import fit
from lightning_eff.callbacks import ZClip
from lightning_eff.training.trainable import set_trainable


class Model(L.LightningModule):
    """A linear model whose gradients can be multiplied, step by step, by `factors`, and are recorded."""

    def __init__(self, factors=(), optimizer=torch.optim.AdamW, **optimizer_arguments):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.factors = list(factors)
        self.optimizer, self.optimizer_arguments = optimizer, {"lr": 0.01, **optimizer_arguments}
        self.raw, self.clipped, self.weights = [], [], []

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().sum()

    def on_after_backward(self):
        step = len(self.raw)
        if step < len(self.factors):
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.factors[step])
        self.raw.append(self.grad_norm())

    def on_before_optimizer_step(self, optimizer):
        self.clipped.append(self.grad_norm())

    def on_train_batch_start(self, batch, batch_idx):
        self.weights.append(self.layer.weight.detach().clone())

    def on_train_end(self):
        self.weights.append(self.layer.weight.detach().clone())

    def grad_norm(self):
        return math.sqrt(sum(p.grad.double().square().sum().item() for p in self.parameters() if p.grad is not None))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), **self.optimizer_arguments)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        return DataLoader(torch.randn(64, 4, generator=generator), batch_size=2)


def test_an_outlier_is_clipped_and_the_rest_is_left_alone():
    model = Model(factors=[1.0] * 6 + [1000.0])
    zclip = ZClip(warmup_steps=4, max_grad_norm=None, z_thresh=10.0)
    trainer = fit(model, zclip)
    assert zclip.spikes == [1]
    for step in (0, 1, 2, 3, 4, 5, 7):
        assert model.clipped[step] == model.raw[step]
    assert model.clipped[6] < 0.01 * model.raw[6]
    assert trainer.callback_metrics["zclip/grad_norm"].item() == pytest.approx(model.raw[-1], rel=1e-6)


def test_metrics_of_a_clipped_step():
    model = Model(factors=[1.0] * 7 + [1000.0])
    metrics = fit(model, ZClip(warmup_steps=4, max_grad_norm=None, log_details=True)).callback_metrics
    assert metrics["zclip/grad_norm"].item() == pytest.approx(model.raw[-1], rel=1e-6)
    assert metrics["zclip/grad_norm_clipped"].item() == pytest.approx(model.clipped[-1], rel=1e-5)
    assert metrics["zclip/threshold"] < metrics["zclip/grad_norm"]
    assert metrics["zclip/z_score"] > 2.5
    assert (metrics["zclip/clipped"], metrics["zclip/skipped"], metrics["zclip/spikes"]) == (1, 0, 1)
    assert metrics["zclip/mean"] > 0 < metrics["zclip/std"]


def test_clipped_is_the_fraction_since_the_last_log():
    seen = []

    class Read(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (batch_idx + 1) % 4 == 0:
                seen.append(trainer.callback_metrics["zclip/clipped"].item())

    model = Model(factors=[1.0, 1.0, 1.0, 1.0, 1.0, 1000.0, 1.0, 1.0])
    fit(model, ZClip(warmup_steps=4, max_grad_norm=None, z_thresh=10.0), Read(), max_steps=12, log_every_n_steps=4)
    assert seen == [0.0, 0.25, 0.0]


def test_monitors_of_gradients_come_first():
    class Monitor(L.Callback):
        norms = ()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.norms = [*self.norms, pl_module.grad_norm()]

    class Other(L.Callback):
        pass

    model, zclip, monitor, other, last = Model(), ZClip(max_grad_norm=0.5), Monitor(), Other(), Other()
    trainer = fit(model, zclip, other, monitor, last, max_steps=2)
    assert [callback for callback in trainer.callbacks if callback in (zclip, other, monitor, last)] == [
        other,
        monitor,
        last,
        zclip,
    ]
    assert monitor.norms == model.raw
    assert max(model.clipped) < 0.51


class Unfreezes(L.Callback):
    """Freezes the weight at the start and unfreezes it again, with gradients that are much larger than the bias's."""

    def __init__(self, at):
        self.at = at

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step < self.at:
            set_trainable(trainer, {"layer.weight": False})
        else:  # as a resumed run that restores what was trained
            set_trainable(trainer, {"layer.weight": True})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            set_trainable(trainer, {"layer.weight": True})


@pytest.mark.parametrize("reacts", [True, False])
def test_unfreezing_parameters_is_no_spike(reacts, monkeypatch):
    if not reacts:
        monkeypatch.setattr(ZClip, "on_trainable_change", lambda *_: None)
    model = Model(factors=[1.0] * 6 + [1000.0] * 4, optimizer=torch.optim.SGD, lr=1e-4)
    zclip = ZClip(warmup_steps=4, max_grad_norm=None, z_thresh=50.0)
    fit(model, zclip, Unfreezes(at=6), max_steps=10)
    assert zclip.spikes == [0 if reacts else 4]
    assert (model.clipped[6:] == model.raw[6:]) == reacts


def test_freezing_parameters_and_restoring_a_set_are_no_change_of_level():
    model, zclip = Model(), ZClip(warmup_steps=4)
    fit(model, zclip, Unfreezes(at=99), max_steps=4)
    assert zclip._states[0].since is None
    model.layer.weight.requires_grad_(False)  # as in a module that froze it when it was built
    fit(model, zclip, Unfreezes(at=0), max_steps=4)
    assert model.layer.weight.requires_grad
    assert zclip._states[0].since is None


BAD = {"nan": math.nan, "inf": math.inf}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("fused", [False, True])
def test_nonfinite_zero(bad, fused):
    model = Model(factors=[1.0, 1.0, BAD[bad]], optimizer=torch.optim.SGD, momentum=0.9, fused=fused)
    zclip = ZClip(max_grad_norm=None)
    trainer = fit(model, zclip, max_steps=4)
    assert model.clipped[2] == 0
    velocity = model.weights[2] - model.weights[1]
    torch.testing.assert_close(model.weights[3] - model.weights[2], 0.9 * velocity, atol=1e-7, rtol=1e-5)
    assert trainer.callback_metrics["zclip/skipped"] == 1


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("fused", [False, True])
def test_nonfinite_skip_is_exact(bad, fused):
    model = Model(factors=[1.0, 1.0, BAD[bad]], weight_decay=0.1, fused=fused)
    zclip = ZClip(max_grad_norm=None, nonfinite="skip")
    trainer = fit(model, zclip, max_steps=4)
    assert torch.equal(model.weights[3], model.weights[2])
    assert not torch.equal(model.weights[4], model.weights[3])
    assert trainer.callback_metrics["zclip/skipped"] == 1
    (optimizer,) = trainer.optimizers
    assert optimizer.state[model.layer.weight]["step"].item() == 3  # Adam's bias correction did not count it
    assert not optimizer._optimizer_step_post_hooks
    assert not hasattr(optimizer, "found_inf")
    assert not hasattr(optimizer, "grad_scale")


def test_nonfinite_raise():
    model = Model(factors=[1.0, math.nan])
    with pytest.raises(FloatingPointError, match="optimizer 0 is nan at global step 1"):
        fit(model, ZClip(nonfinite="raise"), max_steps=4)


def test_nonfinite_ignore():
    model = Model(factors=[1.0, math.nan])
    fit(model, ZClip(nonfinite="ignore"), max_steps=2)
    assert math.isnan(model.clipped[1])
    assert model.layer.weight.isnan().all()


def test_the_clip_folded_into_a_fused_step_is_the_same_clip():
    weights = {}
    for nonfinite in ("zero", "skip"):
        torch.manual_seed(0)
        model = Model(factors=[1.0, 2.0, 4.0], fused=True)
        fit(model, ZClip(nonfinite=nonfinite, max_grad_norm=0.3), max_steps=6)
        weights[nonfinite] = model.layer.weight
    assert model.clipped == model.raw  # folded: nothing was scaled before the step
    torch.testing.assert_close(weights["skip"], weights["zero"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("nonfinite", ["zero", "skip"])
@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler(fused, nonfinite):
    """Statistics are of unscaled gradients, and an overflow is left to the scaler."""
    torch.manual_seed(0)
    plain, zclip_plain = Model(), ZClip(max_grad_norm=None, warmup_steps=2)
    fit(plain, zclip_plain)
    torch.manual_seed(0)
    model, zclip = Model(fused=fused), ZClip(max_grad_norm=None, warmup_steps=2, nonfinite=nonfinite)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    class Overflow(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 5:
                pl_module.layer.weight.grad[0, 0] = math.inf

    def run():
        return fit(model, Overflow(), zclip, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])

    if nonfinite == "skip":
        with pytest.warns(UserWarning, match="no effect with a GradScaler"):
            trainer = run()
    else:
        trainer = run()
    assert torch.equal(model.weights[6], model.weights[5])
    assert model.layer.weight.isfinite().all()
    assert scaler.get_scale() == 1024 * 2 / 2  # grown after three good steps, halved by the overflow
    assert trainer.callback_metrics["zclip/skipped"] == 1
    ratio = zclip._states[0].norms.max() / zclip_plain._states[0].norms.max()
    assert 0.5 < ratio < 2  # not 1024


def test_each_optimizer_has_statistics_of_its_own_parameters():
    class Two(Model):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(4, 2)

        def training_step(self, batch, batch_idx):
            for scale, layer, optimizer in zip((1.0, 100.0), (self.layer, self.other), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(scale * layer(batch).square().sum())
                optimizer.step()

        def on_after_backward(self):
            pass

        def configure_optimizers(self):
            return [torch.optim.SGD(layer.parameters(), lr=1e-4) for layer in (self.layer, self.other)]

    zclip = ZClip(max_grad_norm=None, warmup_steps=2)
    metrics = fit(Two(), zclip, max_steps=8).callback_metrics
    assert {key for key in metrics if key.startswith("zclip/")} == {
        f"zclip/{index}/{name}"
        for index in (0, 1)
        for name in ("grad_norm", "grad_norm_clipped", "threshold", "z_score", "clipped", "skipped")
    }
    assert metrics["zclip/1/grad_norm"] > 20 * metrics["zclip/0/grad_norm"]
    assert [state["steps"].item() for state in zclip._states] == [4, 4]


@pytest.mark.filterwarnings("ignore:.*`training_step` returned `None`")
def test_a_training_step_without_a_loss_is_not_a_norm_of_zero():
    class Sometimes(Model):
        def training_step(self, batch, batch_idx):
            return None if batch_idx in (1, 5) else super().training_step(batch, batch_idx)

    zclip = ZClip(max_grad_norm=None, warmup_steps=3)
    fit(Sometimes(), zclip, max_steps=8)
    (state,) = zclip._states
    assert state["count"].item() == 6
    assert state.norms.min() > 0


def test_a_cap_below_the_healthy_norms_is_reported_once():
    with pytest.warns(UserWarning, match=r"mean gradient norm is .* above ZClip\(max_grad_norm=0.001\)") as warned:
        fit(Model(), ZClip(max_grad_norm=0.001, warmup_steps=2, alpha=0.1))
    assert len([w for w in warned if "mean gradient norm" in str(w.message)]) == 1


def test_a_cap_below_the_norms_of_the_first_steps_is_not_reported():
    fit(Model(), ZClip(max_grad_norm=0.001, warmup_steps=2))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"z_thresh": 1e3, "warmup_steps": 2}, "no norm of 8 was an outlier. Lower z_thresh=1000 to clip more"),
        ({}, "the run ended within warmup_steps=25. Make it longer, or these fewer"),
        ({"max_grad_norm": 1e-3}, None),
    ],
)
def test_a_run_in_which_nothing_was_clipped_says_why(arguments, why, caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    fit(Model(), ZClip(**arguments))
    told = [record.message for record in caplog.records if record.message.startswith("ZClip")]
    assert told == ([] if why is None else [f"ZClip clipped nothing: {why}"])


def test_gradient_clip_val_is_refused():
    with pytest.raises(MisconfigurationException, match=r"gradient_clip_val=1\.0\) would both clip"):
        fit(Model(), ZClip(), gradient_clip_val=1.0)


def test_two_clippers_are_refused():
    class Mine(ZClip):  # two of one class are refused by Lightning, because of their state
        pass

    with pytest.raises(MisconfigurationException, match="Two ZClip callbacks"):
        fit(Model(), ZClip(), Mine())


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_the_gradients_are_refused(strategy):
    zclip = ZClip()
    # A real one needs a GPU and, for DeepSpeed, its package.
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy), gradient_clip_val=None, callbacks=[zclip])
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__}.*ModelParallelStrategy"):
        zclip.setup(trainer, None, "fit")


def test_lbfgs_is_refused():
    with pytest.raises(MisconfigurationException, match="LBFGS"):
        fit(Model(optimizer=torch.optim.LBFGS), ZClip())


class Sparse(Model):
    def __init__(self, trained=True):
        super().__init__(optimizer=torch.optim.SGD)
        self.table = nn.Embedding(5, 4, sparse=True).requires_grad_(trained)

    def training_step(self, batch, batch_idx):
        return self.layer(batch + self.table(torch.tensor([1, 2]))).square().sum()


def test_sparse_gradients_are_refused_before_the_first_step():
    model = Sparse()
    with pytest.raises(MisconfigurationException, match=r"table\.weight has sparse ones.*sparse=False"):
        fit(model, ZClip())
    assert model.raw == []
    fit(Sparse(trained=False), ZClip(), max_steps=1)


def test_another_number_of_optimizers_learns_anew():
    zclip = ZClip()
    saved = ZClip()
    fit(Model(), saved, max_steps=2)
    zclip.load_state_dict({"optimizers": saved.state_dict()["optimizers"] * 2})
    with pytest.warns(UserWarning, match="statistics of 2 optimizers and there are 1 now"):
        fit(Model(), zclip, max_steps=2)
    assert zclip._states[0]["steps"].item() == 2


def test_bad_nonfinite():
    with pytest.raises(ValueError, match=r"nonfinite='nan' is not allowed: it must be one of 'zero', "):
        ZClip(nonfinite="nan")


class Curves(CSVLogger):
    """At which steps each number of ZClip was logged."""

    def __init__(self, folder):
        super().__init__(folder)
        self.steps = {}

    def log_metrics(self, metrics, step=None):
        for key in metrics:
            self.steps.setdefault(key.removeprefix("zclip/"), []).append(step)


@pytest.mark.parametrize(
    ("cap", "threshold_from"), [(None, 4), ("auto", 1), (1e3, 0)], ids=["no cap", "auto", "a number"]
)
def test_what_there_is_not_yet_has_no_curve(cap, threshold_from, tmp_path):
    """The z-score of a warm-up, which is 0, and a threshold that is infinite."""
    zclip, logger = ZClip(warmup_steps=4, max_grad_norm=cap), Curves(tmp_path)
    fit(Model(), zclip, logger=logger, log_every_n_steps=1, max_steps=8)
    assert logger.steps["z_score"] == [4, 5, 6, 7]
    assert logger.steps["threshold"] == list(range(threshold_from, 8))
    assert logger.steps["grad_norm"] == list(range(8))


def test_the_curves_of_a_run_that_is_gone_on_from_begin_where_its_warm_up_ends(tmp_path):
    saved, state = ZClip(warmup_steps=4), {}
    fit(Model(), saved, max_steps=3)
    for name, back in (("checkpoint", saved.state_dict()), ("rollback", saved.run_state())):
        zclip, logger = ZClip(warmup_steps=4), Curves(tmp_path)
        if name == "checkpoint":
            zclip.load_state_dict(back)
        else:
            zclip.load_run_state(None, None, back, within_step=False)
        fit(Model(), zclip, logger=logger, log_every_n_steps=1, max_steps=4)
        state[name] = logger.steps["z_score"]
    assert state == {"checkpoint": [1, 2, 3], "rollback": [1, 2, 3]}


def test_charts_are_of_tags_that_are_logged():
    zclip = ZClip(max_grad_norm=None, warmup_steps=1)
    trainer = fit(Model(), zclip, max_steps=2)
    tags = [tag for _, tags in zclip.tensorboard_charts(trainer).values() for tag in tags]
    assert set(tags) == {key for key in trainer.callback_metrics if key.startswith("zclip/")}


class AgreeOnSpikes(L.Callback):
    """The parent of a spawned run learns nothing of its callbacks, so the ranks check for themselves."""

    def __init__(self, zclip):
        self.zclip = zclip

    def on_train_end(self, trainer, pl_module):
        spikes = torch.tensor(self.zclip.spikes)
        assert trainer.world_size == 2
        assert trainer.strategy.reduce(spikes.float(), reduce_op="sum").item() == 2 * spikes.item() == 2
        # Lightning leaves gloo's group to the end of the process, which then aborts now and then: threads still run.
        atexit.register(torch.distributed.destroy_process_group)


@pytest.mark.slow
def test_spawned_ranks(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # Lightning would choose one and leave it set
    model = Model(factors=[1.0] * 6 + [1000.0])
    zclip = ZClip(warmup_steps=4, max_grad_norm=None, z_thresh=10.0)
    fit(model, zclip, AgreeOnSpikes(zclip), strategy="ddp_spawn", devices=2)
    assert zclip.spikes == []
