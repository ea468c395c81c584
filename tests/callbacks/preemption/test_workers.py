"""A signal to every process of a job, as Slurm, systemd and a terminal send it; real ones, with workers that load."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from harness.processes import eventually
from lightning_eff.callbacks import Preemption
from lightning_eff.callbacks.preemption.workers import Workers
from tests.callbacks.preemption.runs import Act, Model, trainer

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="nothing tells who has sent a signal")


def _ended(folder, end, send=None, context="fork", callbacks=("Preemption",)):
    """Start a run in a session of its own, send its processes a signal in the midst: status, output, what is left."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.preemption.workers", str(folder), end, context]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *callbacks], cwd=ROOT, env=environment, stdout=-1, stderr=-2, text=True, start_new_session=True
    ) as process:
        try:
            if send is not None:
                steps = folder / "steps"
                assert eventually(lambda: steps.exists() and int(steps.read_text() or 0) >= 5, 60)
                os.killpg(process.pid, send)
            said, _ = process.communicate(timeout=60)
            left = not eventually(lambda: not _is_there(process.pid))
        finally:
            if _is_there(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said, left


def _is_there(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "context", "callbacks"),
    [
        ("SIGTERM", "fork", ("Preemption", "ExactResume")),
        pytest.param("SIGUSR1", "fork", ("ExactResume", "Preemption"), marks=pytest.mark.slow),
        pytest.param("SIGTERM", "spawn", ("Preemption",), marks=pytest.mark.slow),
        pytest.param("SIGTERM", "forkserver", ("Preemption",), marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_whole_job_lets_the_workers_live_until_the_run_has_ended(tmp_path, name, context, callbacks):
    status, said, left = _ended(tmp_path, "signal", getattr(signal, name), context, callbacks)
    assert (status, left) == (143, False), said
    steps = torch.load(tmp_path / "last-preemption.ckpt", weights_only=True)["global_step"]
    assert steps == int((tmp_path / "steps").read_text())
    assert {path.name for path in tmp_path.glob("worker*")} == {"worker0", "worker1"}  # their own function is called


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "send", "status"), [("stop", None, 0), ("fail", None, 1), ("signal", signal.SIGINT, 1)]
)
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_whatever_ends_a_run_leaves_no_worker(tmp_path, end, send, status, context):
    ended, said, left = _ended(tmp_path, end, send, context)
    assert (ended, left) == (status, False), said


class _Tells:
    """A dataset that says who has loaded a batch."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return os.getpid()


def test_a_worker_ends_when_its_rank_terminates_it_and_not_before():
    loader = DataLoader(_Tells(), num_workers=1, batch_size=1)
    workers = Workers([signal.SIGTERM, signal.SIGUSR1])
    workers.follow(CombinedLoader(loader))
    batches = iter(loader)
    pid = int(next(batches))
    for name in ("SIGTERM", "SIGUSR1"):  # from a stranger
        subprocess.run([sys.executable, "-c", f"import os, signal; os.kill({pid}, signal.{name})"], check=True)
    assert int(next(batches)) == pid
    (process,) = batches._workers
    torch.utils.data._utils.signal_handling._remove_worker_pids(id(batches))  # torch takes its end for an error
    batches._worker_pids_set = False
    process.terminate()
    process.join(10)
    assert process.exitcode == 0
    workers.detach()
    assert loader.worker_init_fn is None
    assert "_get_iterator" not in vars(loader)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    del batches


def test_a_callback_that_follows_loaders_can_be_copied(tmp_path):
    preemption = Preemption()
    copies = Act("on_train_batch_end", 2, lambda: (copy.deepcopy(preemption), pickle.dumps(preemption)))
    trainer(tmp_path, copies, preemption).fit(Model())
    assert preemption._loops == []


@pytest.mark.parametrize("noticed", [True, False])
def test_an_error_that_is_quicker_than_the_end_names_the_notice(tmp_path, recwarn, noticed):
    def fail():
        if noticed:
            os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    run = trainer(tmp_path, Act("on_before_backward", 3, fail), Preemption())
    with pytest.raises(RuntimeError, match="is killed by signal"):
        run.fit(Model())
    said = [str(warning.message) for warning in recwarn if "Preemption" in str(warning.message)]
    assert len(said) == noticed
    assert all("RuntimeError came before the step at which this run was to end because of SIGTERM" in w for w in said)
