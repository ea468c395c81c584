import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from harness.operators import OperatorCounter
from harness.runs import fit
from lightning_eff.callbacks import ZClip
from lightning_eff.training.update_count import UpdateCount

STEPS = 6


class _Model(L.LightningModule):
    """Its loss is infinite on the batches in `overflow`."""

    def __init__(self, overflow=(), **adam):
        super().__init__()
        self.layer = torch.nn.Linear(4, 2)
        self.overflow, self.adam = overflow, adam

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean() * (float("inf") if batch_idx in self.overflow else 1.0)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1, **self.adam)


class _ManualModel(L.LightningModule):
    """Steps the first optimizer on every batch, the second on every third."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)])

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            if index == 0 or batch_idx % 3 == 2:
                optimizer.zero_grad()
                self.manual_backward(self.layers[index](batch).square().mean())
                optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in self.layers]


class _Counting(L.Callback):
    """What a method of the suite does with the count."""

    def __init__(self):
        self.updates = UpdateCount()

    def on_fit_start(self, trainer, pl_module):
        self.updates.attach(trainer.optimizers)

    def teardown(self, trainer, pl_module, stage):
        self.updates.detach()

    def state_dict(self):
        return self.updates.state_dict()

    def load_state_dict(self, state_dict):
        self.updates.load_state_dict(state_dict)


class _RemovesGradients(L.Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step in self.batches:
            for parameter in pl_module.parameters():
                parameter.grad = None


class _Watched(L.Callback):
    """Counts for itself: how often the parameters have moved."""

    def __init__(self):
        self.moves = 0

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.moves += any(not torch.equal(a, b) for a, b in zip(self.before, pl_module.parameters(), strict=True))


def _data():
    return DataLoader(torch.randn(60, 4), batch_size=2)


def _fit(model, *callbacks, **options):
    return fit(model, *callbacks, data=_data(), **{"max_steps": STEPS, **options})


def _scaler():
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_by_a_scaler_do_not_count(fused):
    counting, watched = _Counting(), _Watched()
    trainer = _fit(_Model(overflow=(1, 4), fused=fused), counting, watched, plugins=_scaler())

    assert trainer.global_step == STEPS
    assert counting.updates.exact() == watched.moves == STEPS - 2
    assert counting.updates.at_most() == (STEPS if fused else STEPS - 2)


def test_steps_that_zclip_skips_do_not_count():
    for fused in (False, True):
        counting, watched = _Counting(), _Watched()
        _fit(_Model(overflow=(2, 3, 5), fused=fused), counting, watched, ZClip(nonfinite="skip"))

        assert counting.updates.exact() == watched.moves == STEPS - 3


@pytest.mark.parametrize("plugins", [[], _scaler()])
def test_steps_without_gradients_do_not_count(plugins):
    counting, watched = _Counting(), _Watched()
    _fit(_Model(), counting, watched, _RemovesGradients((0, 3)), plugins=plugins)

    assert counting.updates.exact() == counting.updates.at_most() == watched.moves == STEPS - 2


def test_accumulated_batches_are_one_update():
    counting = _Counting()
    _fit(_Model(), counting, accumulate_grad_batches=3, max_steps=-1, limit_train_batches=8, max_epochs=1)

    assert counting.updates.exact() == 3  # the last one of two batches


def test_every_optimizer_has_its_own_count():
    counting = _Counting()
    trainer = _fit(_ManualModel(), counting, max_steps=-1, max_epochs=1, limit_train_batches=7)

    assert [counting.updates.exact(0), counting.updates.exact(1)] == [7, 2]
    assert counting.updates.total() == trainer.global_step == 9


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resumed_counts_go_on(tmp_path):
    path = tmp_path / "x.ckpt"
    _fit(_Model(overflow=(1,), fused=True), _Counting(), plugins=_scaler(), max_steps=3).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]["_Counting"]
    assert saved == {"updates": [2]}

    counting = _Counting()
    _fit(_Model(fused=True), counting, plugins=_scaler(), ckpt_path=path)
    assert counting.updates.exact() == STEPS - 1


def test_a_second_fit_goes_on_and_detaching_leaves_nothing():
    counting, model = _Counting(), _Model()
    trainer = _fit(model, counting)
    trainer.fit_loop.epoch_loop.max_steps = 2 * STEPS
    trainer.fit_loop.max_epochs = None
    optimizer = trainer.optimizers[0]
    assert not optimizer._optimizer_step_post_hooks
    trainer.fit(model, _data())

    assert counting.updates.exact() == 2 * STEPS
    counting.updates.attach(trainer.optimizers)
    counting.updates.attach(trainer.optimizers)  # replaces the first attachment
    assert len(trainer.optimizers[0]._optimizer_step_post_hooks) == 1
    counting.updates.detach()


def test_another_number_of_optimizers_starts_anew():
    updates = UpdateCount()
    assert (updates.exact(), updates.at_most(), updates.total()) == (0, 0, 0)
    updates.load_state_dict({"updates": [5, 6]})
    updates.attach([torch.optim.SGD([torch.zeros(1, requires_grad=True)])])

    assert updates.exact() == 0
    updates.detach()


def test_counting_never_waits_for_the_device():
    def waits(*callbacks):
        with OperatorCounter() as counter:
            _fit(_Model(overflow=(1,), fused=True), *callbacks, plugins=_scaler())
        return counter.host_syncs

    assert waits(_Counting()) == waits()


def test_an_attached_count_can_be_copied_and_pickled():
    updates = UpdateCount()
    updates.load_state_dict({"updates": [3]})
    updates.attach([torch.optim.SGD([torch.zeros(1, requires_grad=True)])])

    assert copy.deepcopy(updates).exact() == 3
    assert pickle.loads(pickle.dumps(updates)).exact() == 3
    updates.detach()
