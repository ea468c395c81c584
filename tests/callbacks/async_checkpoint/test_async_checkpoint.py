"""One device: what is saved is the state of that moment, in order, and all of it is there at the end."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO as LightningsAsyncCheckpointIO
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file

from harness.faults import InjectedError, fail_at
from harness.runs import fit
from lightning_eff.callbacks import EMA, Alarm, AsyncCheckpoint, CheckpointAveraging, Preemption, TrainingGuard, sound
from lightning_eff.callbacks.async_checkpoint import AsyncCheckpoint as Same
from lightning_eff.plugins import AsyncCheckpointIO
from lightning_eff.plugins.async_checkpoint import copies
from lightning_eff.plugins.async_checkpoint.checkpoint_file import damage
from lightning_eff.training import hooks
from tests.callbacks.async_checkpoint.runs import LatestCopy, Model, SaveInHook, WritesWeights, copy_late
from tests.plugins.async_checkpoint.gate import Gate
from tests.suite.runs import differences

HOOKS = ("on_train_batch_end", "on_train_epoch_end", "on_validation_end", "on_train_end")


def _fit(folder, *callbacks, model=None, **arguments):
    L.seed_everything(1, verbose=False)
    arguments = {"max_epochs": 2, "val_check_interval": 3, "default_root_dir": folder, **arguments}
    return fit(model or Model(), *callbacks, **arguments)


def _load(path):
    return torch.load(path, weights_only=True)


class AlarmOnce(L.Callback):
    sounded = False

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 7 and not self.sounded:
            self.sounded = True
            sound(trainer, Alarm("test", trainer.global_step, "on purpose"))


@pytest.mark.parametrize("manual", [False, True, "raw"])  # raw: past Lightning, which calls no hook then
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("late", [False, True])
def test_a_save_in_any_hook_holds_the_state_of_that_moment(tmp_path, monkeypatch, hook, manual, late):
    if late:
        copy_late(monkeypatch)
    saver = SaveInHook(tmp_path, hook)
    ema = EMA(decay=0.5, validate_with="average", save="none")
    _fit(tmp_path, saver, ema, AsyncCheckpoint(), model=Model(manual))
    assert len(saver.expected) == {"on_train_batch_end": 12, "on_train_epoch_end": 2, "on_train_end": 1}.get(hook, 4)
    for name, expected in saver.expected.items():
        found = _load(tmp_path / name)
        found.pop("lightning_eff_rank_state", None)
        assert differences(found, expected) == []
    # All but the first save of a kind, which is looked at, and those behind which anybody may write.
    assert LatestCopy.made == ({"on_train_batch_end": 9, "on_validation_end": 2}.get(hook, 0) if late else 0)


@pytest.mark.parametrize("hook", HOOKS)
def test_a_rollback_waits_for_what_is_still_copied(tmp_path, monkeypatch, hook):
    copy_late(monkeypatch)
    saver = SaveInHook(tmp_path, hook)
    guard = TrainingGuard(rules=[], every_n_steps=1, keep=5, margin=2, read_every_n_steps=1)
    ema = EMA(decay=0.5, validate_with="average", save="none")
    _fit(tmp_path, saver, ema, AlarmOnce(), guard, AsyncCheckpoint())
    assert guard.rollbacks == 1
    assert len(saver.expected) > 0
    for name, expected in saver.expected.items():
        found = _load(tmp_path / name)
        assert differences(found["state_dict"], expected["state_dict"]) == []
        assert differences(found["optimizer_states"], expected["optimizer_states"]) == []


def _saved_and_expected(saver):
    for name, expected in saver.expected.items():
        if (saver.folder / name).exists():
            yield name, *(saved["state_dict"]["net.0.weight"] for saved in (_load(saver.folder / name), expected))


@pytest.mark.parametrize("data", [False, True])
def test_what_others_write_behind_the_first_save_is_copied_at_once(tmp_path, monkeypatch, data):
    copy_late(monkeypatch)
    saver = SaveInHook(tmp_path, "on_train_batch_end")
    _fit(tmp_path, saver, WritesWeights(0, data), AsyncCheckpoint())
    assert LatestCopy.made == 9  # of the rest
    assert all(torch.equal(saved, expected) for _, saved, expected in _saved_and_expected(saver))


def test_a_copy_that_somebody_wrote_into_is_no_checkpoint(tmp_path, monkeypatch):
    copy_late(monkeypatch)
    saver = SaveInHook(tmp_path, "on_train_batch_end")
    with pytest.warns(match="3.ckpt could not be written: RuntimeError: 1 tensors .* before_weights_change"):
        _fit(tmp_path, saver, WritesWeights(3, data=False), AsyncCheckpoint(on_error="warn"))
    found = list(_saved_and_expected(saver))
    assert [name for name in saver.expected if name not in {name for name, *_ in found}] == ["3.ckpt"]
    assert all(torch.equal(saved, expected) for _, saved, expected in found)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_rare_write_past_torchs_count_asks_for_copies_at_once(tmp_path, monkeypatch, overlap):
    """And so these tests see whoever does not say that he writes."""
    copy_late(monkeypatch)
    saver = SaveInHook(tmp_path, "on_train_batch_end")
    _fit(tmp_path, saver, WritesWeights(3, data=True), AsyncCheckpoint(overlap=overlap))
    assert all(torch.equal(saved, expected) for _, saved, expected in _saved_and_expected(saver)) != overlap


class Large(Model):
    """Weights of 9 MB and more, which are copied in pieces by a thread."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 1500), torch.nn.Linear(1500, 1500), torch.nn.Linear(1500, 1))


@pytest.mark.parametrize("slow", [False, True])
def test_a_step_waits_for_the_thread_that_copies(tmp_path, monkeypatch, slow):
    copyto, by = np.copyto, []

    def copy(target, source):
        by.append(threading.current_thread().name)
        if slow:
            time.sleep(0.05)
        copyto(target, source)

    monkeypatch.setattr(copies, "_PIECE", 2**20)
    monkeypatch.setattr(copies.numpy, "copyto", copy)
    saver = SaveInHook(tmp_path, "on_train_batch_end")
    _fit(tmp_path, saver, AsyncCheckpoint(), model=Large(), limit_val_batches=0, max_epochs=1)
    for name, expected in saver.expected.items():
        assert differences(_load(tmp_path / name)["state_dict"], expected["state_dict"]) == []
        assert differences(_load(tmp_path / name)["optimizer_states"], expected["optimizer_states"]) == []
    assert "checkpoint-copy" in by
    assert not slow or "MainThread" in by[by.index("checkpoint-copy") :]  # it helps


def test_an_interrupt_within_a_late_copy_leaves_no_checkpoint(tmp_path, monkeypatch):
    pieces = iter([KeyboardInterrupt])
    copyto, gate = np.copyto, threading.Event()

    def copy(target, source):
        if threading.current_thread().name == "checkpoint-copy":
            gate.wait(10)
        elif threading.current_thread() is threading.main_thread() and started and (error := next(pieces, None)):
            gate.set()
            raise error
        copyto(target, source)

    started = []
    monkeypatch.setattr(copies.numpy, "copyto", copy)
    monkeypatch.setattr(copies, "_PIECE", 2**20)

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
            if trainer.global_step == 2:
                started.append(True)

    warnings.simplefilter("ignore")  # pytest puts the filters back
    callback = AsyncCheckpoint(on_error="warn")
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        _fit(tmp_path, Save(), callback, model=Large(), limit_val_batches=0, max_epochs=1)
    assert (tmp_path / "1.ckpt").exists()
    assert not (tmp_path / "2.ckpt").exists()


def _files(folder):
    return {
        name: os.readlink(folder / name) if (folder / name).is_symlink() else _load(folder / name)["global_step"]
        for name in sorted(os.listdir(folder))
        if name.endswith(".ckpt")
    }


@pytest.mark.parametrize("last", [True, "link"])
@pytest.mark.parametrize("slow", [False, True])
def test_the_same_files_as_without(tmp_path, monkeypatch, last, slow):
    if slow:
        gate = Gate(monkeypatch)
        monkeypatch.setattr(gate.open, "wait", lambda _: not threading.Event().wait(0.03))
    found = []
    for name, callbacks in (("plain", ()), ("ours", (AsyncCheckpoint(),))):
        folder = tmp_path / name
        every = {"every_n_train_steps": 2}
        savers = [
            ModelCheckpoint(folder, monitor="loss", save_top_k=2, save_last=last, **every),
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=1, every_n_train_steps=4),  # its names come again
            ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_weights_only=True, every_n_train_steps=3),
        ]
        trainer = _fit(folder, *callbacks, CheckpointAveraging(window=2, every_n_steps=2), *savers)
        found.append(_files(folder))
        beside = sorted(name.replace(".ranks", "") for name in os.listdir(folder) if name.endswith(".ranks"))
        assert beside == [name for name in _files(folder) if not _is_light(folder / name)]
        assert type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
        assert "save_checkpoint" not in vars(trainer)
    assert found[0] == found[1]


def _is_light(path):
    return path.is_symlink() or "optimizer_states" not in _load(path)


def test_a_resume_in_the_same_process_and_the_best_in_on_train_end(tmp_path):
    class Best(L.Callback):
        def on_train_end(self, trainer, *_):
            self.best = _load(trainer.checkpoint_callback.best_model_path)

    best, asynchronous = Best(), AsyncCheckpoint()
    _fit(tmp_path, best, asynchronous, ModelCheckpoint(tmp_path, monitor="loss", save_last=True), max_epochs=1)
    assert best.best["global_step"] == 6
    L.seed_everything(1, verbose=False)
    resumed = fit(
        Model(), asynchronous, ModelCheckpoint(tmp_path, monitor="loss", save_last=True), max_epochs=2,
        ckpt_path="last", default_root_dir=tmp_path, val_check_interval=3,
    )  # fmt: skip
    whole = _fit(tmp_path / "whole")
    assert differences(dict(resumed.model.state_dict()), dict(whole.model.state_dict())) == []


def test_a_damaged_checkpoint_is_not_resumed_from(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="some")
    _fit(tmp_path, AsyncCheckpoint(), saver, max_epochs=1)
    content = bytearray((tmp_path / "some.ckpt").read_bytes())
    weight = _load(tmp_path / "some.ckpt")["state_dict"]["net.0.weight"].numpy().tobytes()
    content[content.find(weight) + 5] ^= 4
    (tmp_path / "some.ckpt").write_bytes(content)
    with pytest.raises(RuntimeError, match=r"some\.ckpt is damaged: the checksum of its record"):
        _fit(tmp_path, AsyncCheckpoint(), saver, ckpt_path=tmp_path / "some.ckpt")
    _fit(tmp_path, AsyncCheckpoint(check_loads=False), saver, ckpt_path=tmp_path / "some.ckpt")


def test_skip_leaves_a_save_out_and_removes_nothing_for_it(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)

    class Close(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            trainer.strategy.checkpoint_io.flush() if gate.open.is_set() else None
            if trainer.global_step == 2:
                gate.open.clear()
            if trainer.global_step == 8:
                assert "step=2.ckpt" in os.listdir(tmp_path)  # the newest one that is there
                gate.open.set()
                trainer.strategy.checkpoint_io.flush()

    callback = AsyncCheckpoint(when_busy="skip")
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=1)
    _fit(tmp_path, Close(), callback, saver)
    assert callback.skipped == 4
    assert gate.wrote == [f"step={step}.ckpt" for step in (1, 2, 3, 4, 9, 10, 11, 12)]
    assert os.listdir(tmp_path) == ["step=12.ckpt"]


@pytest.mark.parametrize("how", ["skip", "warn"])
def test_the_best_stays_when_its_successor_was_never_written_and_others_are(tmp_path, monkeypatch, how):
    gate = Gate(monkeypatch)

    class Metric(Model):
        def training_step(self, batch, batch_idx):
            self.log("metric", 1.0 if self.global_step == 3 else 5.0 + self.global_step)
            return super().training_step(batch, batch_idx)

    class Disk(L.Callback):  # step 4's checkpoint does not come to be
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step in (3, 4, 5):
                gate.open.set()
                trainer.strategy.checkpoint_io.flush()
            if trainer.global_step == 3:
                gate.open.clear() if how == "skip" else gate.failures.append(OSError(28, "No space left on device"))
                for name in "ab" if how == "skip" else "":
                    trainer.save_checkpoint(tmp_path / name)

    best = ModelCheckpoint(tmp_path, "best-{step}", monitor="metric", save_top_k=1, every_n_train_steps=1)
    regular = ModelCheckpoint(tmp_path, "regular-{step}", every_n_train_steps=5, save_top_k=-1)
    asynchronous = AsyncCheckpoint(when_busy="skip" if how == "skip" else "wait", on_error="warn", retries=0)
    warnings.simplefilter("ignore")  # pytest puts the filters back
    _fit(tmp_path, Disk(), asynchronous, best, regular, model=Metric(), max_steps=6, max_epochs=1)
    assert {"best-step=1.ckpt", "regular-step=5.ckpt"} == {*os.listdir(tmp_path)} - {"a", "b"}


def _full(gate, times=3):
    gate.failures = times * [OSError(28, "No space left on device")]


def test_an_error_is_raised_inside_the_next_save(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    _full(gate)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)

    class Flush(L.Callback):  # so that it is known by then
        def on_train_batch_end(self, trainer, *_):
            trainer.strategy.checkpoint_io.flush()

    with pytest.raises(RuntimeError, match=r"step=3\.ckpt could not be written in 3 attempts.*No space left") as raised:
        _fit(tmp_path, Flush(), AsyncCheckpoint(retry_seconds=0.0), saver)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert saver._last_global_step_saved == 3
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_last_save_is_raised_at_the_end_of_the_fit(tmp_path, monkeypatch):
    _full(Gate(monkeypatch))
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=11)
    with pytest.raises(RuntimeError, match="No space left"):
        _fit(tmp_path, AsyncCheckpoint(retry_seconds=0.0), saver)


def test_on_request_an_error_is_a_warning_and_the_older_checkpoint_stays(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=1)

    class Full(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.strategy.checkpoint_io.flush()
                _full(gate, 6)

    with pytest.warns(UserWarning, match=r"\.ckpt could not be written in 3 attempts"):
        _fit(tmp_path, Full(), AsyncCheckpoint(on_error="warn", retry_seconds=0.0), saver)
    assert os.listdir(tmp_path) == ["step=4.ckpt"]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_validation_batch_end"])
def test_an_exception_flushes_and_what_is_saved_because_of_it_is_there(tmp_path, monkeypatch, hook):
    gate = Gate(monkeypatch)
    monkeypatch.setattr(gate.open, "wait", lambda _: not threading.Event().wait(0.05))
    savers = [
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="loss"),
        ModelCheckpoint(tmp_path, filename="emergency", save_on_exception=True, every_n_train_steps=100),
    ]
    with pytest.raises(InjectedError):
        _fit(tmp_path, AsyncCheckpoint(), fail_at(step=5).in_hook(hook), *savers)
    files = _files(tmp_path)
    assert "emergency.ckpt" in files
    assert sorted(os.listdir(tmp_path)) == sorted(
        {*(os.path.basename(p) for p in savers[0].best_k_models), "emergency.ckpt"}
    )
    assert [thread.name for thread in threading.enumerate() if "checkpoint" in thread.name] == []


def test_preemption_ends_the_process_when_its_checkpoint_is_on_disk(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    monkeypatch.setattr(gate.open, "wait", lambda _: not threading.Event().wait(0.2))
    there = []
    preemption = Preemption()

    def agreed(trainer):
        preemption._reason = "the test"
        return trainer.global_step >= 4

    monkeypatch.setattr(preemption, "_agreed", agreed)
    monkeypatch.setattr(preemption, "_end", lambda trainer, what: there.append(os.listdir(tmp_path)) or _exit())
    with pytest.raises(SystemExit):
        _fit(tmp_path, AsyncCheckpoint(), preemption, ModelCheckpoint(tmp_path, every_n_train_steps=100))
    assert there == [["last-preemption.ckpt"]]
    assert _load(tmp_path / "last-preemption.ckpt")["global_step"] == 4


def _exit():
    raise SystemExit(143)


class _Slow(L.Callback):
    """A disk that from step 2 on takes a while."""

    def __init__(self, monkeypatch):
        self.gate = Gate(monkeypatch)

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2 and self.gate.open.is_set():
            self.gate.open.clear()
            self.timer = threading.Timer(0.5, self.gate.open.set)
            self.timer.start()

    def teardown(self, *_, **__):
        self.timer.join()

    on_exception = teardown


def test_what_preemption_saves_is_not_left_out(tmp_path, monkeypatch):
    """Although the writer is busy, and what comes every few steps is."""
    preemption, asynchronous = Preemption(), AsyncCheckpoint(when_busy="skip")
    monkeypatch.setattr(preemption, "_agreed", lambda trainer: trainer.global_step >= 6)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(SystemExit):
        _fit(tmp_path, _Slow(monkeypatch), asynchronous, preemption, saver)
    assert asynchronous.skipped > 0
    assert _load(tmp_path / "last-preemption.ckpt")["global_step"] == 6


def test_a_save_that_failed_before_does_not_keep_preemption_from_saving(tmp_path, monkeypatch):
    _full(Gate(monkeypatch), 1)

    class Signal(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4)
    with pytest.raises(RuntimeError, match=r"step=4\.ckpt could not be written"):
        _fit(tmp_path, AsyncCheckpoint(retries=0), Signal(), Preemption(), saver)
    assert os.listdir(tmp_path) == ["last-preemption.ckpt"]
    assert _load(tmp_path / "last-preemption.ckpt")["global_step"] == 5


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_what_the_guard_saves_is_not_left_out(tmp_path, monkeypatch, action):
    asynchronous = AsyncCheckpoint(when_busy="skip")
    guard = TrainingGuard(action, rules=[], every_n_steps=1, keep=5, margin=2, read_every_n_steps=1)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last="link")

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if guard.rollbacks == 1 and trainer.global_step == 5:
                asynchronous._io.flush()
                found.append(_load(tmp_path / "last.ckpt")["global_step"])

    found = []
    _fit(tmp_path, _Slow(monkeypatch), asynchronous, AlarmOnce(), Look(), guard, saver, max_steps=9)
    assert asynchronous.skipped > 0
    if action == "stop":
        assert _load(tmp_path / "training_guard-step=8.ckpt")["global_step"] == 8
    else:
        assert found == [5]


@pytest.mark.parametrize("ours", [False, True])
def test_a_sigterm_leaves_all_of_it_on_disk(tmp_path, monkeypatch, ours):
    """A real one, with Preemption and as Lightning alone treats it: the run ends, and what it has saved is written."""
    gate = Gate(monkeypatch)
    monkeypatch.setattr(gate.open, "wait", lambda _: not threading.Event().wait(0.1))

    class Signal(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    memory = CheckpointAveraging(window=2, every_n_steps=1)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises((SystemExit, SIGTERMException)):
        _fit(tmp_path, AsyncCheckpoint(), *([Preemption()] if ours else []), Signal(), memory, saver)
    names = [name for name in os.listdir(tmp_path) if name.startswith("step=") and name.endswith(".ckpt")]
    assert {f"step={step}.ckpt" for step in (1, 2, 3, 4)} <= set(names)
    for name in [*names, *(["last-preemption.ckpt"] if ours else [])]:
        assert damage(tmp_path / name) is None
        assert len(os.listdir(tmp_path / f"{name}.ranks")) == 1
        assert (tmp_path / f"average-{name}").exists()
    assert not list(tmp_path.glob("*.part"))


def test_what_lies_beside_a_checkpoint_is_written_later_too(tmp_path, monkeypatch):
    """And is what it is without us: the window in the ranks' folder, and the average, with the link to it."""
    gate = Gate(monkeypatch)
    gate.open.clear()

    class Open(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 2:
                seen.extend(os.listdir(folder))
                gate.open.set()

    contents = []
    for callbacks in ((), (AsyncCheckpoint(), Open())):
        folder, seen = tmp_path / str(len(callbacks)), []
        average = CheckpointAveraging(window=2, every_n_steps=1, save="all", validate_with="current")
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last="link")
        _fit(folder, *callbacks, average, saver, max_epochs=1)
        assert sorted(os.listdir(folder)) == sorted(
            [f"{a}{b}" for a in ("average-last", "average-step=6") for b in (".ckpt", ".safetensors")]
            + ["last.ckpt", "step=6.ckpt", "step=6.ckpt.ranks"]
        )
        assert os.readlink(folder / "average-last.ckpt") == "average-step=6.ckpt"
        (window,) = (folder / "step=6.ckpt.ranks").iterdir()
        saved = [_load(window)["state"], _load(folder / "average-step=6.ckpt")["state_dict"]]
        contents.append([*saved, load_file(folder / "average-step=6.safetensors")])
    assert seen == ["step=1.ckpt.ranks"]  # what is written before the first checkpoint, which is held
    assert differences(contents[0], contents[1]) == []


@pytest.mark.filterwarnings("ignore:Preemption")
@pytest.mark.parametrize("plugin", [False, True])
def test_the_emergency_save_is_there_at_once(tmp_path, plugin):
    callbacks = [Preemption(emergency=True), fail_at(step=4), ModelCheckpoint(tmp_path)]
    arguments = {"plugins": [AsyncCheckpointIO()]} if plugin else {}
    with pytest.raises(InjectedError):
        _fit(tmp_path, *([] if plugin else [AsyncCheckpoint()]), *callbacks, **arguments)
    assert _load(tmp_path / "last-emergency.ckpt")["global_step"] == 4


def test_memory_is_stated_and_one_buffer_is_used_where_two_do_not_fit(tmp_path, monkeypatch):
    from lightning_eff.callbacks import async_checkpoint

    monkeypatch.setattr(async_checkpoint, "free_host_memory", lambda: 1000)
    callback, buffers = AsyncCheckpoint(), []

    class Look(L.Callback):
        def on_train_end(self, *_):
            buffers.extend(callback._io._stager.take_idle(2))

    with pytest.warns(UserWarning, match=r"1 kB of host memory are free, too little for two buffers"):
        _fit(tmp_path, callback, Look(), ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1))
    assert len(buffers) == 1
    assert len(os.listdir(tmp_path)) == 12


@pytest.mark.parametrize(
    ("callbacks", "arguments", "words"),
    [
        ([AsyncCheckpoint(), Same()], {}, "two AsyncCheckpoint callbacks"),
        ([AsyncCheckpoint()], {"plugins": [LightningsAsyncCheckpointIO()]}, "take AsyncCheckpointIO out"),
        ([AsyncCheckpoint()], {"plugins": [AsyncCheckpointIO()]}, "take AsyncCheckpointIO out"),
    ],
)
def test_conflicts_are_refused(tmp_path, callbacks, arguments, words):
    with pytest.raises(MisconfigurationException, match=words):
        _fit(tmp_path, *callbacks, **arguments)


def test_shards_that_are_not_fsdp2s_are_refused():
    strategy = FSDPStrategy(state_dict_type="sharded")
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer._accelerator_connector.strategy = strategy  # nothing of FSDP runs without a GPU
    with pytest.raises(MisconfigurationException, match=r"each rank writes its shard: .*train by strategy='fsdp2'"):
        AsyncCheckpoint().setup(trainer, Model(), "fit")


def test_the_hooks_are_answered():
    assert isinstance(AsyncCheckpoint(), hooks.ReadsWeights)
    assert isinstance(AsyncCheckpoint(), hooks.WritesLater)
