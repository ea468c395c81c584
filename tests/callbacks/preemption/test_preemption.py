"""A run that is ended and resumed equals the one that was not; in one process, the exit caught as `SystemExit`."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_eff.callbacks import Preemption
from lightning_eff.callbacks.preemption.callback import FILE
from lightning_eff.training import HearsOfTheEnd, tell
from tests.callbacks.preemption.runs import Act, Model, send, trainer


def _unbroken(folder, **options):
    L.seed_everything(1, verbose=False)
    model = Model()
    run = trainer(folder, **options)
    run.fit(model)
    return model, run


def _broken(folder, *acts, preemption=None, **options):
    """End a run, resume it as a user would, and give both models."""
    L.seed_everything(1, verbose=False)
    first, callback = Model(), preemption or Preemption()
    run = trainer(folder, *acts, callback, **options)
    with pytest.raises(SystemExit) as ended:
        run.fit(first)
    assert ended.value.code == 143
    L.seed_everything(2, verbose=False)
    second = Model()
    again = trainer(folder, Preemption(), **options)
    again.fit(second, ckpt_path="last")
    return first, second, again, callback


def _same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("hook", "at"),
    [
        ("on_train_batch_start", 1),
        ("on_train_batch_end", 2),
        ("on_before_backward", 4),  # validation is due behind this batch
        ("on_before_optimizer_step", 7),
        ("on_train_batch_end", 12),  # the last batch of an epoch, with a validation
        ("on_validation_start", 1),
        ("on_validation_batch_end", 2),
        ("on_validation_batch_end", 12),  # the last of the epoch's last validation
        ("on_validation_end", 2),
        ("on_train_epoch_end", 1),
        ("on_train_batch_end", 20),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_equals_unbroken(tmp_path, hook, at, accumulate):
    whole, run = _unbroken(tmp_path / "whole", accumulate_grad_batches=accumulate)
    first, second, again, _ = _broken(tmp_path, Act(hook, at, send), accumulate_grad_batches=accumulate)
    assert _same(whole, second)
    assert first.seen + second.seen == whole.seen  # no batch is lost, none comes twice
    assert first.hooks + second.hooks == whole.hooks
    assert first.validated + second.validated == whole.validated
    assert again.global_step == run.global_step
    loops = [r.fit_loop.epoch_loop for r in (run, again)]
    assert loops[0]._batches_that_stepped == loops[1]._batches_that_stepped
    schedulers = [r.lr_scheduler_configs[0].scheduler.last_epoch for r in (run, again)]
    assert schedulers[0] == schedulers[1]


def test_behind_an_epochs_last_batch_the_run_ends_in_the_next_one(tmp_path):
    """Lightning resumes from there with a batch more than the epoch has."""
    whole, _ = _unbroken(tmp_path / "whole", val_check_interval=5)
    first, second, _, _ = _broken(tmp_path, Act("on_train_batch_end", 12, send), val_check_interval=5)
    assert first.seen == [*range(12), 0]
    assert first.seen + second.seen == whole.seen
    assert _same(whole, second)


def test_a_signal_in_the_sanity_check_ends_the_run_with_nothing_saved(tmp_path):
    run = trainer(tmp_path, Act("on_sanity_check_start", 1, send), _OnLate(), Preemption(), num_sanity_val_steps=2)
    model = Model()
    with pytest.raises(SystemExit):
        run.fit(model)
    assert model.seen == []
    assert not (tmp_path / FILE).exists()


class _OnLate(L.Callback):
    """Sends the signal when the handlers are in place."""

    def on_validation_batch_start(self, trainer, *args):
        if trainer.sanity_checking:
            send()


def test_the_checkpoint_loads_without_this_package_and_the_handlers_are_as_before(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2)
    preemption = Preemption(signals=["SIGTERM", "SIGUSR2"])
    run = trainer(tmp_path, Act("on_train_batch_end", 3, lambda: send("SIGUSR2")), preemption)
    with pytest.raises(SystemExit):
        run.fit(Model())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR2)) == before
    assert preemption.saved == str(tmp_path / FILE)
    checkpoint = torch.load(preemption.saved, weights_only=True)
    assert checkpoint["global_step"] == 3
    assert vars(run.fit_loop.epoch_loop).keys() & {"on_advance_end", "_broadcast_sigterm_tensor"} == set()


def test_a_second_signal_ends_at_once(tmp_path):
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            acts = [Act("on_train_batch_start", 1, send), Act("on_train_batch_start", 1, lambda: time.sleep(1.2))]
            run = trainer(tmp_path, *acts, Act("on_train_batch_start", 1, send), Preemption(every_n_steps=1))
            run.fit(Model())
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
    assert not (tmp_path / FILE).exists()


def test_two_signals_within_a_second_are_one(tmp_path):
    *_, callback = _broken(tmp_path, Act("on_train_batch_end", 3, lambda: (send(), send())))
    assert callback.saved is not None


def test_a_file_ends_the_run(tmp_path):
    stop = tmp_path / "stop"
    preemption = Preemption(file=str(stop), poll_seconds=0.01)

    def touch():
        stop.touch()
        _wait_for(lambda: preemption._notices.reason is not None)

    run = trainer(tmp_path, Act("on_train_batch_end", 5, touch), preemption)
    with pytest.raises(SystemExit):
        run.fit(Model())
    assert run.global_step == 5


def test_a_notice_ends_the_run_and_one_that_fails_does_not(tmp_path):
    answers = iter([None, OSError("unreachable"), None, "maintenance at noon"])
    told = threading.Event()

    def ask():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        if answer:
            told.set()
        return answer

    preemption = Preemption(notice=ask, poll_seconds=0.01)
    run = trainer(tmp_path, Act("on_train_batch_end", 2, lambda: (told.wait(10), time.sleep(0.2))), preemption)
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match=r"could not be asked: OSError\('unreachable'\)"):
        run.fit(Model())
    assert run.global_step == 2
    assert preemption._reason == "maintenance at noon"


def test_the_clock_ends_the_run(tmp_path):
    preemption = Preemption(max_time="00:00:00:01")
    run = trainer(tmp_path, Act("on_train_batch_end", 6, lambda: time.sleep(1.1)), preemption)
    with pytest.raises(SystemExit):
        run.fit(Model())
    assert run.global_step == 6


@pytest.mark.parametrize(
    ("hook", "at", "step"),
    [
        ("on_train_batch_end", 5, 5),
        ("on_train_batch_end", 8, 8),  # a validation is due
        ("on_validation_batch_end", 2, 4),  # one is in progress
        ("on_train_batch_end", 12, 12),
    ],
)
def test_without_an_exit_code_the_state_is_saved_and_fit_returns(tmp_path, hook, at, step):
    whole, _ = _unbroken(tmp_path / "whole")
    preemption = Preemption(exit_code=None)
    L.seed_everything(1, verbose=False)
    run, first = trainer(tmp_path, Act(hook, at, send), preemption), Model()
    run.fit(first)
    assert run.global_step == step
    assert run.state.finished
    assert preemption.saved == str(tmp_path / FILE)
    assert torch.load(preemption.saved, weights_only=True)["global_step"] == step
    second = Model()
    trainer(tmp_path, Preemption()).fit(second, ckpt_path="last")
    assert _same(whole, second)
    assert first.seen + second.seen == whole.seen
    due = step % 4 == 0  # the fit that returns validates too, and the one that resumes does so anew
    assert first.validated[: len(first.validated) - due] + second.validated == whole.validated


def test_without_an_exit_code_nothing_of_a_sanity_check_is_saved(tmp_path):
    run = trainer(tmp_path, _OnLate(), Preemption(exit_code=None), num_sanity_val_steps=2)
    model = Model()
    run.fit(model)
    assert model.seen == []
    assert not (tmp_path / FILE).exists()


def test_slurm_is_asked_to_requeue_and_finds_its_checkpoint(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(scontrol.parent), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    preemption = Preemption()
    run = trainer(tmp_path, Act("on_train_batch_end", 3, send), preemption)
    with pytest.raises(SystemExit):
        run.fit(Model())
    assert calls.read_text() == "requeue 16_3\n"
    assert preemption.saved == str(tmp_path / "hpc_ckpt_1.ckpt")
    again = trainer(tmp_path, Preemption(), max_steps=3, max_epochs=-1)
    again.fit(Model(), ckpt_path="hpc")
    assert again.global_step == 3


def test_a_scontrol_that_fails_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run = trainer(tmp_path, Act("on_train_batch_end", 3, send), Preemption())
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match="could not requeue job 17"):
        run.fit(Model())


# --- emergencies


def _fails():
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(("hook", "steps", "end"), [("on_before_backward", 5, 23), ("on_train_batch_end", 6, 24)])
def test_an_exception_saves_the_state_before_the_step(tmp_path, hook, steps, end):
    whole, _ = _unbroken(tmp_path / "whole", max_epochs=-1, max_steps=steps)
    callback = Preemption(emergency=True)
    L.seed_everything(1, verbose=False)
    checkpoint = ModelCheckpoint(tmp_path, save_top_k=0, save_on_exception=True)
    run = trainer(tmp_path, Act(hook, 6, _fails), callback, checkpoint)
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="the state before this step is saved"):
        run.fit(Model())
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["last-emergency.ckpt"]
    assert "on_exception" not in vars(checkpoint)
    saved = torch.load(callback.saved, weights_only=True)
    assert saved["global_step"] == steps
    assert all(torch.equal(tensor, saved["state_dict"][name]) for name, tensor in whole.state_dict().items())
    again = trainer(tmp_path, Preemption())
    again.fit(Model(), ckpt_path=callback.saved)
    assert again.global_step == end  # the loader had given the batch in flight


def test_within_an_update_nothing_is_saved(tmp_path):
    class Breaks(torch.optim.SGD):
        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            raise ZeroDivisionError("half of the weights are new")

    class Broken(Model):
        def configure_optimizers(self):
            return Breaks(self.parameters(), lr=0.1)

    run = trainer(tmp_path, Preemption(emergency=True))
    with pytest.raises(ZeroDivisionError), pytest.warns(UserWarning, match="in the midst of an update"):
        run.fit(Broken())
    assert list(tmp_path.glob("*.ckpt")) == []


# --- doors


@pytest.mark.parametrize(
    "arguments",
    [
        {"signals": "SIGTERM"},
        {"signals": ["SIGKILL"]},
        {"signals": ["TERM"]},
        {"signals": [15]},
        {"file": ""},
        {"notice": "now"},
        {"max_time": "1 hour"},
        {"max_time": "00:00:00:00"},
        {"max_time": 60},
        {"every_n_steps": 0},
        {"exit_code": 256},
        {"exit_code": True},
        {"requeue": "always"},
        {"emergency": "yes"},
        {"poll_seconds": 0},
        {"timeout": float("nan")},
    ],
)
def test_bad_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"^{name}=.* is not allowed: it must be "):
        Preemption(**arguments)


def test_two_of_them_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="keep one"):
        trainer(tmp_path, Preemption(), Preemption()).fit(Model())


def _wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class _EqualReplicas(SingleDeviceStrategy):
    """What a callback sees of ``ddp_ft``; the real one is in tests/strategies/fault_tolerant/test_leaving.py."""

    replicas_are_equal = True

    def __init__(self):
        super().__init__(device="cpu")
        self.left = []

    def leave(self, status):
        self.left.append((status, self.lightning_module.global_step))


@pytest.mark.parametrize(("hook", "at", "step"), [("on_train_batch_end", 3, 3), ("on_validation_batch_end", 2, 4)])
def test_a_replica_takes_leave_once_and_takes_part_until_the_strategy_ends_it(tmp_path, hook, at, step):
    strategy, preemption = _EqualReplicas(), Preemption(exit_code=9)
    run = trainer(tmp_path, Act(hook, at, send), preemption, strategy=strategy)
    model = Model()
    run.fit(model)
    assert strategy.left == [(9, step)]
    assert model.hooks == run.num_training_batches * run.max_epochs
    assert preemption.saved is None
    assert not (tmp_path / FILE).exists()


def test_when_all_replicas_leave_the_run_is_saved(tmp_path):
    preemption = Preemption()
    told = Act("on_train_batch_end", 5, lambda: tell(run, HearsOfTheEnd))
    run = trainer(tmp_path, told, preemption, strategy=_EqualReplicas())
    run.fit(Model())
    assert preemption.saved == str(tmp_path / FILE)
    assert torch.load(preemption.saved, weights_only=True)["global_step"] == 5


def test_a_replica_cannot_leave_by_returning_from_fit(tmp_path):
    run = trainer(tmp_path, Preemption(exit_code=None), strategy=_EqualReplicas())
    with pytest.raises(MisconfigurationException, match=r"exit_code=None.*the other replicas would wait"):
        run.fit(Model())
