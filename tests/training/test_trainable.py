import weakref
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

from harness.operators import OperatorCounter
from harness.recorders import Reduced
from harness.runs import ddp, fit, fsdp2
from lightning_eff.strategies.fault_tolerant.strategy import FaultTolerantDDPStrategy
from lightning_eff.structure import clean_named_parameters
from lightning_eff.training.trainable import check_trainable_support, set_trainable
from tests.suite.runs import assert_equal, weights

STEPS = 6
FROZEN = ("layers.0.weight", "layers.0.bias")
ALL = 32 * 32 + 32 + 32 * 2 + 2  # elements of the model
LEFT = 32 * 2 + 2


class _Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 2))

    def training_step(self, batch, batch_idx):
        return self.layers(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.layers(batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class _ShardedModel(_Model):
    def configure_model(self):
        for module in (*self.layers, self.layers):
            torch.distributed.fsdp.fully_shard(module, mesh=self.device_mesh["data_parallel"])


class _ManualModel(_Model):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class _CompiledModel(_Model):
    def __init__(self):
        super().__init__()
        self.layers = torch.compile(self.layers, backend="aot_eager")


class _ClosedModel(_Model):
    """Its first layer is closed from the beginning."""

    def __init__(self):
        super().__init__()
        self.layers[0].requires_grad_(False)


class _ClosedCompiledModel(_ClosedModel):
    def __init__(self):
        super().__init__()
        self.layers = torch.compile(self.layers, backend="aot_eager")


class _Toggles(L.Callback):
    """Closes and opens at the end of given batches, and hears of it."""

    def __init__(self, schedule, during="on_train_batch_end"):
        self.schedule = schedule
        self.heard = []
        if during == "on_validation_end":
            self.on_validation_end = lambda trainer, module: self._toggle(trainer, trainer.global_step - 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if "on_validation_end" not in self.__dict__:
            self._toggle(trainer, batch_idx)

    def _toggle(self, trainer, batch_idx):
        if batch_idx in self.schedule:
            set_trainable(trainer, dict.fromkeys(FROZEN, self.schedule[batch_idx]))

    def on_trainable_change(self, trainer, pl_module, change):
        assert all(parameter.grad is None for parameter in change.frozen.values())
        self.heard.append((list(change.unfrozen), list(change.frozen)))


class _DropsGradients(_Toggles):
    """The same by other means: closed parameters keep ``requires_grad``, but the optimizer never sees a gradient."""

    closed = False

    def _toggle(self, trainer, batch_idx):
        self.closed = not self.schedule.get(batch_idx, not self.closed)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.closed:
            parameters = clean_named_parameters(pl_module)
            for name in FROZEN:
                parameters[name].grad = None


def _fit(*callbacks, model=_Model, **options):
    module = model()
    generator = torch.Generator().manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    data = DataLoader(torch.randn(60, 32, generator=generator), batch_size=2)
    defaults = {"max_epochs": 1, "limit_train_batches": STEPS, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    options = {**defaults, "use_distributed_sampler": False, **options}
    fit(module, *callbacks, data=(data, data), **options)
    return weights(module)


class _Wrapped(Reduced):
    """Looks at the wrapper too, whose hook the user has registered."""

    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.wrapper = weakref.ref(trainer.model)

    def on_train_end(self, trainer, pl_module):
        self.old_is_gone = self.wrapper() is None
        self.kwargs = (trainer.model.find_unused_parameters, trainer.model.gradient_as_bucket_view)
        assert trainer.model.training
        assert "init_sync" not in trainer.strategy._ddp_kwargs


# --- one device ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [{1: False}, {1: False, 3: True}, {0: False, 1: True, 2: False}])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"model": _ManualModel}])
def test_training_goes_on_with_what_is_open(schedule, options):
    toggles = _Toggles(schedule)
    assert_equal(_fit(toggles, **options), _fit(_DropsGradients(schedule), **options))

    assert toggles.heard == [(list(FROZEN), []) if open_ else ([], list(FROZEN)) for open_ in schedule.values()]


def test_what_was_closed_when_it_was_compiled_trains_once_it_is_open():
    schedule = {1: True, 3: False}
    compiled = _fit(_Toggles(schedule), model=_ClosedCompiledModel)
    plain = _fit(_Toggles(schedule), model=_ClosedModel)

    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
    assert not torch.equal(plain[FROZEN[0]], weights(_ClosedModel())[FROZEN[0]])


def test_an_event_that_changes_nothing_is_none():
    toggles = _Toggles({0: True, 2: True})
    assert_equal(_fit(toggles), _fit())

    assert toggles.heard == []


class _Calls(L.Callback):
    def __init__(self, call):
        self.call = call

    def on_train_start(self, trainer, pl_module):
        self.call(trainer)
        assert all(parameter.requires_grad for parameter in pl_module.parameters())


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ({"layers.0.wieght": False}, "no parameter 'layers.0.wieght'.*Did you mean: layers.0.weight"),
        ({"zzz": False}, "no parameter 'zzz'.*Did you mean: layers.0.weight; layers.0.bias"),
        (dict.fromkeys([*FROZEN, "layers.1.weight", "layers.1.bias"], False), "stop the training instead"),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(trainable, message):
    def call(trainer):
        with pytest.raises(ValueError, match=message):
            set_trainable(trainer, trainable)

    _fit(_Calls(call), max_steps=1)


def test_a_parameter_of_integers_cannot_be_opened():
    def call(trainer):
        trainer.lightning_module.table = torch.nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=r"'table' of dtype torch.int8 cannot have a gradient"):
            set_trainable(trainer, {"table": True})
        del trainer.lightning_module.table

    _fit(_Calls(call), max_steps=1)


def _fault_tolerant(on_failure):
    strategy = FaultTolerantDDPStrategy.__new__(FaultTolerantDDPStrategy)
    strategy.on_failure = on_failure
    return strategy


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DDPStrategy(static_graph=True), "remove static_graph"),
        (FSDPStrategy.__new__(FSDPStrategy), "FSDPStrategy does not support.*ModelParallelStrategy"),
        (DeepSpeedStrategy.__new__(DeepSpeedStrategy), "DeepSpeedStrategy does not support"),
        (_fault_tolerant("mecefo"), "FaultTolerantDDPStrategy does not support.*on_failure='takeover'"),
    ],
)
def test_an_unsupported_strategy_is_refused_with_the_mend(strategy, message):
    with pytest.raises(MisconfigurationException, match=message):
        check_trainable_support(SimpleNamespace(strategy=strategy))


def test_replicas_agree_between_two_steps_and_not_within_one():
    """Each replica of a fault-tolerant run is a world of its own, and reduces over the others that live."""
    asked = []

    def call(trainer):
        strategy = trainer.strategy
        strategy.replicas_are_equal = True
        strategy.reduce = lambda bounds, reduce_op: asked.append(reduce_op) or bounds + torch.tensor([0, 1])
        strategy.within_step = True
        with pytest.raises(RuntimeError, match="in the midst of one"):
            set_trainable(trainer, {FROZEN[0]: False})
        assert asked == []
        strategy.within_step = False
        with pytest.raises(RuntimeError, match="do not agree"):
            set_trainable(trainer, {FROZEN[0]: False})
        assert asked == ["max"]
        del strategy.replicas_are_equal, strategy.reduce, strategy.within_step

    _fit(_Calls(call), max_steps=1)


# --- two ranks -----------------------------------------------------------------------------------------------------


def _close_under_ddp(schedule, kwargs, options):
    counter, toggles = _Wrapped(), _Toggles(schedule)
    weights = _fit(counter, toggles, strategy=ddp(**kwargs), devices=2, **options)
    other = _fit(_DropsGradients(schedule), strategy=ddp(**kwargs), devices=2, **options)
    assert_equal(weights, other)
    return weights, counter.elements, counter.old_is_gone, counter.kwargs, len(toggles.heard)


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}],
    ids=["plain", "find-unused", "bucket-view"],
)
def test_closed_parameters_are_no_longer_reduced(pool, kwargs):
    one, two = pool.run(_close_under_ddp, {1: False, 3: True, 4: True}, kwargs, {})

    assert_equal(one[0], two[0])
    expected = (kwargs.get("find_unused_parameters", False), kwargs.get("gradient_as_bucket_view", False))
    for _, steps, old_is_gone, flags, events in (one, two):
        assert steps == [ALL, ALL, LEFT, LEFT, ALL, ALL]
        assert old_is_gone
        assert flags == expected
        assert events == 2


@pytest.mark.parametrize(
    "options",
    [{"model": _ManualModel}, {"accumulate_grad_batches": 2}, {"model": _CompiledModel}],
    ids=["manual", "accumulate", "compiled"],
)
def test_other_ways_to_train_under_ddp(pool, options):
    # With accumulation the event falls into the middle of a window.
    one, two = pool.run(_close_under_ddp, {2: False}, {}, options)

    assert_equal(one[0], two[0])
    assert one[1][-1] == two[1][-1] == LEFT


class _HookStrategy(DDPStrategy):
    registered = 0

    def _register_ddp_hooks(self):
        self.registered += 1
        self.model.register_comm_hook(None, allreduce_hook)


def _with_a_strategy_of_its_own_hook():
    strategy = _HookStrategy(process_group_backend="gloo")
    strategy.heard = []
    strategy.on_trainable_change = lambda trainer, module, change: strategy.heard.append(len(change.frozen))
    weights = _fit(_Toggles({1: False}), strategy=strategy, devices=2)
    return weights, strategy.registered, strategy.heard


def test_a_strategy_registers_its_hook_again_and_hears_of_the_event(pool):
    one, two = pool.run(_with_a_strategy_of_its_own_hook)

    assert_equal(one[0], two[0])
    assert one[1:] == two[1:] == (2, [2])


def _disagree():
    def call(trainer):
        with pytest.raises(RuntimeError, match="the ranks do not agree"):
            set_trainable(trainer, {FROZEN[trainer.global_rank]: False})

    _fit(_Calls(call), strategy=ddp(), devices=2, max_steps=2)


def test_ranks_that_do_not_agree_are_told_so(pool):
    pool.run(_disagree)


def _what_an_event_costs():
    def call(trainer):
        with OperatorCounter() as counter:
            set_trainable(trainer, dict.fromkeys(FROZEN, True))
        assert (counter.collectives, counter.host_syncs) == (1, 1)
        with OperatorCounter() as counter:
            set_trainable(trainer, dict.fromkeys(FROZEN, False))
        counts.append((counter.collectives, counter.host_syncs))
        set_trainable(trainer, dict.fromkeys(FROZEN, True))

    counts = []
    _fit(_Calls(call), strategy=ddp(), devices=2, max_steps=1)
    return counts


def test_an_event_is_one_small_reduction(pool):
    assert pool.run(_what_an_event_costs) == [[(1, 1)], [(1, 1)]]


def _close_under_fsdp(schedule, during, options):
    options = {"strategy": fsdp2(), "devices": 2, "model": _ShardedModel, **options}
    weights = _fit(_Toggles(schedule, during), **options)
    other = _fit(_DropsGradients(schedule, during), **{**options, "strategy": fsdp2()})
    assert_equal(weights, other)
    return weights


@pytest.mark.parametrize(
    ("during", "options"),
    [("on_train_batch_end", {}), ("on_validation_end", {"val_check_interval": 1, "limit_val_batches": 1})],
)
def test_fsdp2_follows(pool, during, options):
    one, two = pool.run(_close_under_fsdp, {1: False, 3: True}, during, options)

    assert_equal(one, two)
