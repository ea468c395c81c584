"""Quiet Trainers, short fits and what is written down of them."""

import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from harness.recorders import Alarms, Losses, Reduced
from harness.runs import begin, ddp, fit, quiet_trainer
from lightning_eff.training.alarms import Alarm, sound
from tests.harness.regression import Regression


def _data(count=64):
    return DataLoader(torch.randn(count, 2), batch_size=2)


def test_a_quiet_trainer_writes_nothing(tmp_path, capfd):
    trainer = quiet_trainer(accelerator="cpu", max_steps=3, default_root_dir=tmp_path)
    trainer.fit(Regression(), _data())

    assert trainer.global_step == 3
    assert not trainer.loggers
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""


def test_a_quiet_trainer_writes_what_it_is_told_to(tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=2)
    trainer = quiet_trainer(saver, accelerator="cpu", max_steps=2, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(Regression(), _data())

    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["epoch=0-step=2.ckpt"]
    assert [type(logger) for logger in trainer.loggers] == [CSVLogger]


class _Validates(Regression):
    validated = 0

    def validation_step(self, batch, batch_idx):
        self.validated += len(batch)


def test_a_fit_is_short_where_nobody_says_how_long():
    assert fit(Regression(), data=_data()).global_step == 8
    assert fit(Regression(), data=_data(10), max_epochs=2).global_step == 10
    assert fit(Regression(), data=_data(), max_steps=3).global_step == 3


def test_a_fit_takes_data_for_validation_too():
    model = _Validates()
    fit(model, data=(_data(10), _data(6)), max_epochs=1, num_sanity_val_steps=0)

    assert model.validated == 6


def test_a_fit_goes_on_from_a_checkpoint(tmp_path):
    fit(Regression(), data=_data(), max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    trainer = fit(Regression(), data=_data(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")

    assert (trainer.current_epoch, trainer.global_step) == (2, 64)


@pytest.fixture
def lightnings_level():
    import logging

    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("lightnings_level")
def test_a_run_begins_with_the_seed_one_thread_and_silence():
    with warnings.catch_warnings():
        begin(7, "the sea")
        first = torch.rand(2)
        warnings.warn("the sea is rough", stacklevel=1)
        with pytest.raises(UserWarning, match="the land"):
            warnings.warn("the land is dry", stacklevel=1)
    assert torch.get_num_threads() == 1
    torch.manual_seed(7)
    assert torch.equal(first, torch.rand(2))


def test_losses_are_those_of_the_steps():
    seen = []

    class Tells(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append(loss.item())
            return loss

    losses = Losses()
    fit(Tells(), losses, data=_data(), max_steps=5)

    assert len(seen) == 5
    assert losses.values == seen


def test_alarms_are_heard():
    one, other = Alarms(), Alarms()
    trainer = quiet_trainer(one, other, accelerator="cpu")
    alarms = [Alarm("loss", 4, "high"), Alarm("norm", 9, "higher")]
    for alarm in alarms:
        assert sound(trainer, alarm)

    assert one.alarms == other.alarms == alarms
    assert one.steps == [4, 9]


def _reduced():
    reduced = Reduced()
    fit(Regression(), reduced, data=_data(), devices=2, strategy=ddp(), max_steps=3)
    return reduced.elements, reduced.bytes, dist.get_world_size()


def test_what_ddp_reduces_is_counted(pool):
    assert pool.run(_reduced) == [([3, 3, 3], [12, 12, 12], 2)] * 2  # two weights and a bias, in float32
