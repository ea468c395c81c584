"""MISA in Lightning: what the contract suite (tests/suite) does not ask of every callback."""

import copy
import logging
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import nn

from harness import runs
from harness.faults import InjectedError, fail_at
from harness.operators import OperatorCounter
from harness.recorders import Reduced
from lightning_eff.callbacks import MISA, CheckpointAveraging, ZClip
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.optimizer_state import state_bytes
from tests.suite.models import WIDTH, Gan, Net
from tests.suite.runs import SaveAt, build_trainer, differences, fit
from tests.suite.table import DDP, FSDP2, SINGLE

MATRICES = [f"blocks.{b}.{name}.weight" for b in (0, 2) for name in ("qkv", "proj", "mlp.0", "mlp.2")]
TOTAL = 1209  # parameters of the suite's net
SHARP = 1000.0  # an eta that lets the importance of this little model decide


class Watch(L.Callback):
    """What is trained, what has a gradient, how many bytes the optimizer holds, and squared gradients: at each step."""

    def __init__(self):
        self.active, self.trained, self.bytes, self.squares, self.weights = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        misa = next(callback for callback in trainer.callbacks if isinstance(callback, MISA))
        self.active.append(list(misa.active))
        self.trained.append([n for n, p in clean_named_parameters(pl_module).items() if p.requires_grad])
        self.weights.append({n: p.detach().clone() for n, p in clean_named_parameters(pl_module).items()})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = clean_named_parameters(pl_module)
        self.squares.append({n: p.grad.double().square().sum() for n, p in parameters.items() if p.grad is not None})

    def on_train_batch_end(self, trainer, *_):
        self.bytes.append(state_bytes(trainer.optimizers))


def train(folder, steps=10, *others, model_arguments=None, **arguments):
    """Returns the run, the callback and what was seen."""
    misa, watch = MISA(**{"budget": 0.3, "every_n_steps": 3, "eta": SHARP, **arguments}), Watch()
    run = fit(None, folder, callback=misa, around=[watch, *others], steps=steps, model_arguments=model_arguments)
    return run, misa, watch


def size(names):
    net = dict(Net().named_parameters())
    return sum(net[name].numel() for name in names)


# --- what is trained ------------------------------------------------------------------------------------------------


def test_a_sample_within_the_budget_is_trained_and_nothing_else(tmp_path):
    run, _, watch = train(tmp_path)

    for step in range(10):
        active = watch.active[step]
        assert watch.trained[step] == active == watch.active[step // 3 * 3]
        assert 0 < size(active) <= 0.3 * TOTAL
        assert list(watch.squares[step]) == active
        after = watch.weights[step + 1] if step < 9 else run.parameters()
        moved = [n for n, value in watch.weights[step].items() if not torch.equal(value, after[n])]
        # At an interval's end the momentum step moves the same ones.
        assert moved == active
    turns = [watch.active[step] for step in (0, 3, 6, 9)]
    assert set(turns[0]).isdisjoint(turns[1])  # never used first
    assert set().union(*turns) == set(MATRICES)
    assert all(parameter.requires_grad for parameter in run.model.parameters())  # as before the fit


def test_only_what_is_trained_has_optimizer_state(tmp_path):
    _, _, watch = train(tmp_path)
    for step, held in enumerate(watch.bytes[:-1]):
        active = watch.active[step]
        # Two moments and a count each; at an interval's end the next sample has none yet.
        assert held == (0 if step % 3 == 2 else 8 * size(active) + 4 * len(active))


def test_always_and_never(tmp_path):
    run, _, watch = train(tmp_path, always=["head*", "*norm1*"], exclude=["blocks.2.*"])
    always = ["head.weight", "head.bias", *(f"blocks.{b}.norm1.{kind}" for b in (0, 2) for kind in ("weight", "bias"))]
    for step in range(10):
        assert set(watch.trained[step]) == {*always, *watch.active[step]}
        assert set(watch.active[step]) <= set(MATRICES[:4])
    state = run.trainer.optimizers[0].state
    for name, parameter in run.model.named_parameters():
        if name in always:
            assert state[parameter]["step"].item() == 10  # its state is kept over intervals


def test_what_the_user_froze_stays_frozen(tmp_path):
    class Frozen(L.Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.blocks[0].requires_grad_(False)

    run, misa, watch = train(tmp_path, 10, Frozen())
    assert set(misa.importance) == set(MATRICES[4:])
    assert not any(name.startswith("blocks.0") for trained in watch.trained for name in trained)
    assert not any(parameter.requires_grad for parameter in run.model.blocks[0].parameters())


def test_what_the_module_freezes_as_the_fit_starts_stays_frozen(tmp_path):
    class Freezes(Net):
        def on_fit_start(self):
            self.blocks[0].requires_grad_(False)

    misa, watch = MISA(budget=0.3, every_n_steps=3, eta=SHARP), Watch()
    runs.fit(Freezes(), misa, watch, limit_val_batches=0)
    assert set(misa.importance) == set(MATRICES[4:])
    assert not any(name.startswith("blocks.0") for trained in watch.trained for name in trained)


@pytest.mark.parametrize("whole", [True, False])
def test_optimizers_that_are_made_anew_are_counted_on(whole):
    class Anew(Net):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:  # step 6
                self.trainer.strategy.setup_optimizers(self.trainer)

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if whole or p.requires_grad], lr=1e-2)

    misa, watch = MISA(budget=0.3, every_n_steps=3, eta=SHARP, sampling="cyclic", first_every_n_steps=3), Watch()
    if not whole:
        with pytest.raises(MisconfigurationException, match="made anew within the fit, and do not have all matrices"):
            runs.fit(Anew(), misa, limit_val_batches=0)
        return
    runs.fit(Anew(), misa, watch, max_steps=12, limit_val_batches=0)
    assert [n for n in range(1, 12) if watch.active[n] != watch.active[n - 1]] == [3, 6, 9]


def test_lora_pairs_are_sampled_as_one(tmp_path):
    class LoRA(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base.requires_grad_(False)
            self.lora_a = nn.Linear(base.in_features, 2, bias=False)
            self.lora_b = nn.Linear(2, base.out_features, bias=False)

        def forward(self, x):
            return self.base(x) + self.lora_b(self.lora_a(x))

    class Adapted(Net):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.requires_grad_(False)
            for block in (self.blocks[0], self.blocks[2]):
                block.qkv, block.proj = LoRA(block.qkv), LoRA(block.proj)

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    misa, watch, model = MISA(units=1, every_n_steps=2, eta=SHARP), Watch(), Adapted()
    runs.fit(model, misa, watch, limit_val_batches=0)
    assert set(misa.importance) == {f"blocks.{b}.{name}.base.weight" for b in (0, 2) for name in ("qkv", "proj")}
    for active, trained in zip(watch.active, watch.trained, strict=True):
        stem = active[0].removesuffix("base.weight")
        assert trained == [f"{stem}lora_a.weight", f"{stem}lora_b.weight"]


@pytest.mark.parametrize("sampling", ["uniform", "cyclic"])
def test_lisa_and_badam_are_settings(tmp_path, sampling):
    _, misa, watch = train(
        tmp_path, granularity="layer", sampling=sampling, units=1, always=["head*"], momentum_step=False
    )
    assert list(misa.importance) == ["blocks.0", "blocks.2"]
    for active, trained in zip(watch.active, watch.trained, strict=True):
        (layer,) = active
        whole = [name for name, _ in Net().named_parameters() if name.startswith(f"{layer}.")]
        assert trained == [*whole, "head.weight", "head.bias"]  # with its norms and biases
    if sampling == "cyclic":
        assert [active[0] for active in watch.active[::3]] == ["blocks.0", "blocks.2", "blocks.0", "blocks.2"]


def test_embeddings_and_heads_by_name(tmp_path):
    _, misa, _ = train(tmp_path, include=["head.weight", "*qkv*"])
    assert list(misa.importance) == ["blocks.0.qkv.weight", "blocks.2.qkv.weight", "head.weight"]


# --- intervals, importance, momentum --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_importance_is_what_the_gradients_say(tmp_path, variant):
    _, misa, watch = train(tmp_path, variant=variant, first_every_n_steps=3, sampling="cyclic", momentum_step=False)
    expected, beta = {}, 0.8
    for k in range(1, 4):  # intervals that have ended
        for name in watch.active[3 * k - 3]:
            squares = [watch.squares[step][name].item() for step in range(3 * k - 3, 3 * k)]
            if variant == "paper":
                x = sum(squares) / 3 / size([name])
                expected[name] = beta * expected.get(name, 0) + (1 - beta) * x
            else:
                x = sum(square**0.5 for square in squares) / 3
                expected[name] = (beta * expected.get(name, 0) + (1 - beta) * x) / (1 - beta**k)
    seen = {name: value for name, value in misa.importance.items() if value}
    assert seen == pytest.approx(expected, rel=1e-5)


def test_an_interval_counts_optimizer_steps(tmp_path):
    misa, watch = MISA(budget=0.3, every_n_steps=3, eta=SHARP), Watch()
    fit(
        None, tmp_path, callback=misa, around=[watch], steps=5, accumulate_grad_batches=2, val_check_interval=6,
        model_arguments={"micro_batches": 2},
    )  # fmt: skip
    assert watch.active[0] == watch.active[5] != watch.active[6] == watch.active[9]


def test_first_interval_until_all_had_a_turn(tmp_path):
    _, _, watch = train(tmp_path, first_every_n_steps=1, every_n_steps=6, sampling="cyclic", momentum_step=False)
    changes = [step for step in range(1, 10) if watch.active[step] != watch.active[step - 1]]
    turns = [watch.active[step] for step in (0, *changes)]
    rounds = next(n for n in range(1, 9) if set().union(*turns[:n]) == set(MATRICES))
    assert changes == [*range(1, rounds), rounds - 1 + 6]


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_state_of_what_is_sampled_again(tmp_path, variant):
    """The paper clears it, the released code keeps it."""
    run, _, watch = train(tmp_path, 5, variant=variant, budget=1.0, first_every_n_steps=3)
    assert watch.active[0] == watch.active[4] == MATRICES
    (optimizer,) = run.trainer.optimizers
    steps = {optimizer.state[p]["step"].item() for n, p in run.model.named_parameters() if n in MATRICES}
    assert steps == {2 if variant == "paper" else 5}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_momentum_step(tmp_path, optimizer):
    arguments = {"model_arguments": {"optimizer": optimizer}, "sampling": "cyclic"}
    _, _, watch = train(tmp_path, 4, **arguments)
    _, _, without = train(tmp_path, 4, momentum_step=False, **arguments)
    before, after = without.weights[3], watch.weights[3]
    moments = {}

    class Moments(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):  # the third: two are in the state
            if trainer.global_step == 2:
                for name, parameter in pl_module.named_parameters():
                    if parameter.grad is not None:
                        state = {key: value.clone() for key, value in optimizer.state[parameter].items()}
                        moments[name] = (state, parameter.grad.clone())

    train(tmp_path, 3, Moments(), **arguments)
    for name, (state, grad) in moments.items():
        if optimizer == "sgd":
            tail = 1e-3 * 0.9 / 0.1 * (0.9 * state["momentum_buffer"] + grad)
        else:
            m = (0.9 * state["exp_avg"] + 0.1 * grad) / (1 - 0.9**3)
            v = (0.999 * state["exp_avg_sq"] + 0.001 * grad**2) / (1 - 0.999**3)
            tail = 1e-2 * 9 * m / (v.sqrt() + 1e-8)
        torch.testing.assert_close(before[name] - after[name], tail, rtol=1e-3, atol=1e-6)
    assert len(moments) == len(watch.active[0])


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_under_a_scaler_are_measured_unscaled(tmp_path, fused):
    class Fused(Net):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=fused)

    found = []
    for scale in (1.0, 1024.0):
        misa, model = MISA(budget=0.3, every_n_steps=3, eta=SHARP), Fused()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        runs.fit(model, misa, max_steps=4, limit_val_batches=0, plugins=plugins)
        assert scaler.get_scale() == scale
        found.append(misa.importance)
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert any(found[0].values())


def test_an_overflow_leaves_no_trace_in_the_importance(tmp_path):
    class Poison(L.Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                next(p for p in pl_module.parameters() if p.grad is not None).grad.fill_(torch.inf)

    _, misa, watch = train(tmp_path, 4, Poison(), ZClip(max_grad_norm=None))  # it makes zeros of such gradients
    name = watch.active[0][-1]
    mean = (watch.squares[0][name] + watch.squares[2][name]) / 2  # of the two steps that count
    assert misa.importance[name] == pytest.approx(0.2 * mean.item() / size([name]), rel=1e-5)


def test_nothing_waits_inside_an_interval():
    def syncs(steps, callback):
        with OperatorCounter() as counter:
            fit(
                None, None, callback=callback, steps=steps, model_arguments={"optimizer": "sgd"}, limit_val_batches=0,
                val_check_interval=None, log_every_n_steps=1000,
            )  # fmt: skip
        return counter.host_syncs

    def extra(steps):
        return syncs(steps, MISA(budget=0.3, every_n_steps=6, first_every_n_steps=6)) - syncs(steps, None)

    start, four, eight = extra(1), extra(4), extra(8)
    assert start == four  # three more steps
    assert 0 < eight - four <= 8  # the end of an interval


def test_a_checkpoint_that_is_only_validated_is_no_run_that_goes_on(tmp_path):
    """With the same callback the next run, another fold, begins as with a new one."""
    first, misa, _ = train(tmp_path, 8, SaveAt(4, tmp_path / "step=4.ckpt"))
    before = misa.state_dict()
    first.trainer.validate(first.model, ckpt_path=tmp_path / "step=4.ckpt", verbose=False)
    assert differences(misa.state_dict(), before) == []
    fit(None, tmp_path, callback=misa, steps=5)
    _, new, _ = train(tmp_path, 5)
    assert differences(misa.state_dict(), new.state_dict()) == []


# --- together with others -------------------------------------------------------------------------------------------


def _together(strategy, folder, model_arguments):
    """MISA, ZClip and an average of the weights: broken in the middle of an interval, and resumed."""

    def callbacks():
        misa = MISA(budget=0.3, every_n_steps=4, eta=SHARP, always=["*norm*"])
        zclip = ZClip(warmup_steps=2, z_thresh=1.5, alpha=0.8, max_grad_norm=None)
        return [zclip, misa, CheckpointAveraging(window=2, every_n_steps=2, validate_with="average", save="none")]

    def outcome(run, others):
        return {**run.outcome(), "others": [other.state_dict() for other in others], "window": _window(others[-1])}

    results = []
    shared = {"strategy": strategy, "model_arguments": model_arguments}
    for step in (None, 6, 8):
        path = folder / f"together-{step}.ckpt"
        if step is not None:
            first = callbacks()
            with pytest.raises(InjectedError):
                fit(None, folder, around=[*first, SaveAt(step, path), fail_at(step=step)], **shared)
        fresh = callbacks()
        run = fit(None, folder, around=fresh, resume=None if step is None else path, **shared)
        results.append(outcome(run, fresh))
    return results, fresh[0].spikes


def _window(averaging):
    return [{name: tensor.clone() for name, tensor in snapshot.items()} for snapshot in averaging.window.read()]


@pytest.mark.parametrize("strategy", [SINGLE, DDP, FSDP2], ids=lambda strategy: strategy.name)
def test_with_zclip_and_averaging_resume_is_exact(strategy, tmp_path, pool):
    call = (_together, strategy, tmp_path, {"optimizer": "sgd"})
    ranks = [call[0](*call[1:])] if strategy is SINGLE else pool.run(*call)
    for (unbroken, *resumed), _ in ranks:
        for other in resumed:
            assert differences(unbroken, other) == []


def test_an_intervals_change_is_no_spike_to_zclip(tmp_path):
    class Loud(Net):
        """Matrices whose gradients differ by a factor of a thousand."""

        def __init__(self, **arguments):
            super().__init__(**arguments)
            for number, name in enumerate(("qkv", "proj")):
                getattr(self.blocks[0], name).weight.register_hook(lambda grad, n=number: grad * 1000.0**n)

        def samples(self):
            return self.inputs[:8], self.targets[:8]  # the same every step: gradients hardly change

    spikes = {}
    for reacts in (True, False):
        zclip = ZClip(warmup_steps=3, max_grad_norm=None, z_thresh=100.0)
        misa = MISA(
            units=1, include=["blocks.0.qkv.weight", "blocks.0.proj.weight"], sampling="cyclic", every_n_steps=4
        )
        if not reacts:
            zclip.on_trainable_change = lambda *_: None
        runs.fit(Loud(optimizer="sgd"), zclip, misa, max_steps=16, limit_val_batches=0)
        spikes[reacts] = zclip.spikes[0]
    assert spikes[True] == 0 < spikes[False]


def test_lightnings_clip_sees_what_is_trained(tmp_path):
    norms = []

    class Norms(Net):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            norms.append((len(grads), torch.nn.utils.get_total_norm(grads).item()))

    misa = MISA(units=2, every_n_steps=3, eta=SHARP)
    runs.fit(Norms(), misa, limit_val_batches=0, gradient_clip_val=1e-3)
    assert all(count == 2 and norm <= 1.001e-3 for count, norm in norms)


class SavesEarly(L.Callback):
    """Stands before MISA, so that at an interval's last step it saves before the interval ends."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_checkpoint_between_the_last_step_and_the_end_of_an_interval(tmp_path):
    path = tmp_path / "early.ckpt"
    outcomes = []
    for resume in (None, path):
        misa = MISA(budget=0.3, every_n_steps=3, eta=SHARP)
        run = fit(None, tmp_path, around=[SavesEarly(6, path), misa], resume=resume)
        outcomes.append({**run.outcome(), "misa": misa.state_dict()})
    assert differences(*outcomes) == []


def test_rolled_back_in_the_middle_of_a_fit(tmp_path):
    """As TrainingGuard does it: weights and optimizer are its work, which matrices are trained is MISA's."""

    class Rolls(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                self.state, self.active = copy.deepcopy(misa.run_state()), misa.active
            if trainer.global_step == 8:
                assert misa.active != self.active
                misa.load_run_state(trainer, pl_module, self.state, within_step=False)
                assert misa.active == self.active
                assert [n for n, p in pl_module.named_parameters() if p.requires_grad] == self.active
                assert differences(misa.run_state(), self.state) == []

    misa = MISA(budget=0.3, every_n_steps=3, eta=SHARP)
    fit(None, tmp_path, callback=misa, around=[Rolls()])


def test_added_to_a_run_that_trained_everything(tmp_path):
    path = tmp_path / "full.ckpt"
    fit(None, tmp_path, around=[SaveAt(4, path)], steps=4)
    misa, watch = MISA(budget=0.3, every_n_steps=3, eta=SHARP), Watch()
    run = fit(None, tmp_path, callback=misa, around=[watch], resume=path, steps=6)
    state = run.trainer.optimizers[0].state
    held = [name for name, parameter in run.model.named_parameters() if parameter in state]
    assert held == watch.active[0]
    assert state[dict(run.model.named_parameters())[held[0]]]["step"].item() == 6  # what it had is kept


def test_an_exception_opens_everything_again(tmp_path):
    model = Net()
    with pytest.raises(InjectedError):
        runs.fit(model, MISA(units=1), fail_at(step=2), limit_val_batches=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- two ranks ------------------------------------------------------------------------------------------------------


def _under_ddp(folder):
    # MISA comes first, so that the counter registers its hook at the wrapper that MISA has made.
    misa, watch, counter = MISA(budget=0.3, every_n_steps=3, eta=SHARP), Watch(), Reduced()
    fit(None, folder, callback=misa, around=[watch, counter], strategy=DDP)
    return watch.active, counter.elements, misa.importance


def test_only_what_is_trained_is_reduced(pool, tmp_path):
    one, two = pool.run(_under_ddp, tmp_path)
    assert one == two
    active, elements, importance = one
    assert elements == [size(names) for names in active]
    assert any(importance.values())


# --- logs -----------------------------------------------------------------------------------------------------------


def test_logs_of_every_module_and_heat_maps(tmp_path):
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    misa = MISA(budget=0.3, every_n_steps=2, eta=SHARP, log_details=True, heat_map=True)
    fit(None, tmp_path, callback=misa, logger=logger, log_every_n_steps=1, limit_val_batches=0)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    tags = events.Tags()
    wanted = {f"misa/{kind}/{name}" for kind in ("importance", "probability") for name in MATRICES}
    assert wanted <= set(tags["scalars"])
    assert set(tags["images"]) == {"misa/importance_map", "misa/probability_map"}
    for kind in ("importance", "probability"):
        assert (tmp_path / "lightning_logs" / "version_0" / f"misa_{kind}_map.png").stat().st_size > 1000
    trainable = [event.value for event in events.Scalars("misa/trainable")]
    assert all(0 < fraction <= 0.3 for fraction in trainable)
    assert [event.value for event in events.Scalars("misa/used")][-1] == 1.0
    last = [events.Scalars(f"misa/probability/{name}")[-1].value for name in MATRICES]
    assert sum(last) == pytest.approx(1.0, abs=1e-5)
    curves = [[event.value for event in events.Scalars(f"misa/importance/{name}")] for name in MATRICES]
    assert all(min(curve) > 0 for curve in curves)  # none is drawn, as 0, before its matrix had its first turn
    assert len({len(curve) for curve in curves}) > 1


def test_charts_are_of_tags_that_are_logged():
    charts = MISA(log_details=True).tensorboard_charts(None)
    tags = {tag for _, tags in charts.values() for tag in tags}
    assert {"misa/importance/.*", "misa/probability/.*", "misa/optimizer_bytes"} <= tags


# --- bad input ------------------------------------------------------------------------------------------------------


def _start(misa, model=None):
    runs.fit(model or Net(), misa, max_steps=1, limit_val_batches=0)


class With(Net):
    def __init__(self, optimizer, **arguments):
        super().__init__()
        self.build = lambda parameters: optimizer(parameters, lr=0.01, **arguments)

    def configure_optimizers(self):
        return self.build(self.parameters())


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        ({"budget": 0.03}, None, r"budget=0.03 of 1,209 parameters.*has 64: it must be at least 0.0529"),
        ({"include": ["*query*"]}, None, r"include='\*query\*' matches no matrix. There are: blocks.0.qkv.weight"),
        ({"exclude": ["blocks*"]}, None, "no matrix is selected: exclude leaves nothing"),
        ({"units": 1, "always": ["*embed*"]}, None, r"always='\*embed\*' matches no trained parameter"),
        ({"units": 1, "always": ["blocks*"]}, None, "no selected matrix is left to sample"),
        ({"units": 1}, lambda: Net().requires_grad_(False), "no selected matrix is left to sample"),
        ({"units": 1, "include": ["*"]}, Gan, "belong to 2 optimizers, and it would be ambiguous"),
        ({"units": 1}, lambda: With(torch.optim.Adamax), "momentum step is known for Adam.*not for Adamax"),
        ({"units": 1}, lambda: With(torch.optim.Adagrad), "Adagrad makes its state when it is built"),
        ({"units": 1}, lambda: With(torch.optim.LBFGS), "LBFGS keeps one state for all"),
    ],
)
def test_what_cannot_work_is_refused_with_the_mend(arguments, model, message):
    with pytest.raises(MisconfigurationException, match=message):
        _start(MISA(**arguments), None if model is None else model())


def test_messages_name_the_callback():
    for arguments in ({"include": ["*query*"]}, {"units": 1, "always": ["blocks*"]}, {"budget": 0.03}):
        with pytest.raises(MisconfigurationException, match=r"^MISA: "):
            _start(MISA(**arguments))


def test_a_parameter_that_is_renamed_in_mid_run_is_followed(tmp_path):
    class Prunes(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 5:
                for block in (pl_module.blocks[0], pl_module.blocks[2]):
                    nn.utils.prune.l1_unstructured(block.qkv, "weight", 0.2)

    _, _, watch = train(tmp_path, 12, Prunes())
    renamed = {f"blocks.{block}.qkv.weight": f"blocks.{block}.qkv.weight_orig" for block in (0, 2)}
    for step, (active, trained) in enumerate(zip(watch.active, watch.trained, strict=True)):
        assert sorted(renamed.get(name, name) if step >= 5 else name for name in active) == sorted(trained)
    assert any(name in renamed for active in watch.active[6:] for name in active)


def test_one_optimizer_of_several_can_be_chosen():
    model = Gan()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    misa = MISA(units=1, include=["generator.0.weight"])
    runs.fit(model, misa, limit_val_batches=0)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    discriminator = {name for name in before if name.startswith("discriminator")}
    assert moved == {"generator.0.weight"} | discriminator  # the other optimizer is left as it is
    assert misa._updates.exact(0) == 4


@pytest.mark.parametrize("optimizer", [torch.optim.RMSprop, torch.optim.Adamax, torch.optim.Adafactor])
def test_other_optimizers_without_the_momentum_step(optimizer):
    _start(MISA(units=1, momentum_step=False), With(optimizer))


def test_another_that_changes_trainable_is_refused():
    class Freezes(L.Callback):
        changes_trainable = True

    for other in (Freezes(), BackboneFinetuning()):
        trainer = SimpleNamespace(strategy=L.Trainer(accelerator="cpu", logger=False).strategy, callbacks=[other])
        with pytest.raises(MisconfigurationException, match=f"MISA and {type(other).__name__} would both decide"):
            MISA().setup(trainer, None, "fit")


@pytest.mark.parametrize("strategy", [DDPStrategy(static_graph=True), FSDPStrategy.__new__(FSDPStrategy)])
def test_strategies_that_fix_what_is_trained_are_refused(strategy):
    with pytest.raises(MisconfigurationException, match=r"trained parameters never changes|does not support freezing"):
        MISA().setup(SimpleNamespace(strategy=strategy, callbacks=[]), None, "fit")


def test_a_matrix_that_no_budget_has_room_for_is_named(tmp_path):
    with pytest.warns(UserWarning, match=r"no room for 2 of 8, which are never trained: blocks.0.qkv.weight"):
        train(tmp_path, 3, budget=0.12)


def test_a_small_model_gets_a_budget_of_its_largest_matrix_by_default(tmp_path, caplog):
    """3 % of a plain network of four layers is less than any of its matrices."""
    model = Net()
    model.blocks = nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, WIDTH))
    misa, watch = MISA(every_n_steps=1, eta=0.0), Watch()
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    trainer = build_trainer(tmp_path, SINGLE, [misa, watch], [], model, 12, {})
    trainer.fit(model)
    matrices = {"blocks.0.weight": 96, "blocks.2.weight": 192, "blocks.4.weight": 128}
    assert {name for active in watch.active for name in active} == set(matrices)
    assert max(sum(matrices[name] for name in active) for active in watch.active) == 192
    (line,) = [record.message for record in caplog.records if record.message.startswith("MISA samples from")]
    # 416 of the 424 numbers in matrices, and 192 of all 461 at a time.
    assert "samples from 3 matrices, 98 % of the trained weights; outside: head.weight. 1 at first within 0.416" in line


class _Unused(Net):
    """Half of its blocks are there and not used."""

    def forward(self, inputs):
        return self.head(self.blocks[0](inputs).mean(1))


def test_matrices_that_the_model_does_not_use_cost_a_step_each_and_no_run(tmp_path):
    misa, watch, model = MISA(units=1, every_n_steps=4, seed=1), Watch(), _Unused()
    trainer = build_trainer(tmp_path, SINGLE, [misa, watch], [], model, 40, {})
    with pytest.warns(UserWarning, match=r"does not depend on what was sampled: blocks.2.*exclude=") as told:
        trainer.fit(model)
    assert len([each for each in told if "does not depend" in str(each.message)]) == 1
    assert trainer.global_step == 40
    sampled = [active for (active,) in watch.active]
    assert {name.split(".")[1] for name in sampled} == {"0", "2"}
    for step, name in enumerate(sampled[:-1]):
        if name.startswith("blocks.2"):
            assert all(torch.equal(watch.weights[step][each], watch.weights[step + 1][each]) for each in MATRICES)
    ends = [step for step in range(1, 40) if sampled[step] != sampled[step - 1]]
    assert len(ends) > 40 / 4  # intervals of four steps, and of one where nothing was used
    assert {name for name, value in misa.importance.items() if value > 0} == set(MATRICES[:4])


def test_an_eta_without_effect_says_so(tmp_path):
    with pytest.warns(UserWarning, match=r"MISA\(eta=1e-07\) samples as good as uniformly.*or set eta='auto'"):
        train(tmp_path, 10, eta=1e-7)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="MISA")
        train(tmp_path, 10, eta=SHARP)
        train(tmp_path, 10, eta=0.0)  # uniform on purpose


def test_a_state_of_other_matrices_starts_anew(tmp_path):
    _, saved, _ = train(tmp_path, 4)
    misa = MISA(budget=0.3, every_n_steps=3, exclude=["blocks.0.*"], eta=SHARP)
    misa.load_state_dict(saved.state_dict())
    with pytest.warns(UserWarning, match="of other matrices"):
        fit(None, tmp_path, callback=misa, steps=3)
    assert set(misa.importance) == set(MATRICES[4:])


def test_the_models_size_is_what_the_budgets_here_count_on():
    assert sum(parameter.numel() for parameter in Net().parameters()) == TOTAL


def _told(caplog, **arguments):
    caplog.clear()
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    steps = arguments.pop("steps", 12)
    misa = MISA(**{"units": 1, "every_n_steps": 1, **arguments})
    runs.fit(Net(), misa, max_steps=steps, limit_val_batches=0)
    words = "MISA: importance has decided nothing in this run: "
    return misa, [r.message.removeprefix(words) for r in caplog.records if r.message.startswith(words)]


def test_by_default_importance_decides_and_shows_it():
    """Eight matrices one at a time: half of the samples after the first round are drawn, from as good as four."""
    misa = MISA(units=1, every_n_steps=10)  # one step each until all had a turn
    trainer = runs.fit(Net(), misa, max_steps=127, limit_val_batches=0)
    sampler = misa.state_dict()["sampler"]
    assert sampler["interval"] == 20  # the last of the first round is as long as those that follow
    assert sampler["drawn"] == 6  # the even ones from 8 to 18
    assert trainer.callback_metrics["misa/effective"].item() == pytest.approx(4, abs=0.01)
    old = MISA(units=1, every_n_steps=10, eta=1.0, first_every_n_steps=1)
    trainer = runs.fit(Net(), old, max_steps=127, limit_val_batches=0)
    assert old.state_dict()["sampler"]["drawn"] == 0  # those that have waited longest fill each sample
    assert trainer.callback_metrics["misa/effective"].item() > 7


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"steps": 3}, "4 of 8 have had a turn, and those without one come first. Make first_every_n_steps smaller"),
        ({"units": 8}, "each sample has room for all 8. Make the budget smaller, or sample more with include"),
        ({"sample_last": 1}, "sample_last=1 may fill each sample. Make it smaller, or the budget larger"),
        ({"steps": 7}, "the run ended with the first round. Make it longer, or first_every_n_steps smaller"),
        ({}, None),
        ({"eta": 0.0}, None),
        ({"sampling": "cyclic"}, None),
    ],
    ids=str,
)
def test_a_run_in_which_importance_decided_nothing_says_why(arguments, why, caplog):
    _, told = _told(caplog, **arguments)
    assert len(told) == (why is not None)
    assert why is None or told[0].startswith(why)


def test_short_first_intervals_make_no_momentum_step():
    """After one step it would be nine more in the same direction; a length that was asked for has it."""

    def moved(**arguments):
        model = Net()
        before = [p.detach().clone() for p in model.parameters()]
        runs.fit(model, MISA(units=1, every_n_steps=10, **arguments), max_steps=1, limit_val_batches=0)
        return max((p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True))

    rate = moved()
    assert moved(first_every_n_steps=1) == pytest.approx(10 * rate, rel=0.02)
