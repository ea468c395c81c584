"""Real processes: a signal to one rank or to all, under torchrun and under Lightning's own launcher."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.callbacks.preemption.runs import main

ROOT = Path(__file__).parents[3]


def _start(folder, ranks, acts, preemption, launcher, **extra):
    """Run to its end: exit status, seconds, what each rank has written, output."""
    settings = _settings(folder, ranks, acts, preemption, **extra)
    command = [sys.executable]
    if launcher == "torchrun":
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"]
    command += ["-m", "tests.callbacks.preemption.runs", json.dumps(settings)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("TRITON_INTERPRET", None)
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)
    return done.returncode, time.monotonic() - began, _told(folder, ranks), done.stdout + done.stderr


def _in_pool(pool, folder, preemption, **extra):
    """A run of two ranks that nobody disturbs needs no processes of its own: what each rank has written."""
    pool.run(main, _settings(folder, 2, [], preemption, **extra))
    return _told(folder, 2)


def _settings(folder, ranks, acts, preemption, **extra):
    folder.mkdir(parents=True, exist_ok=True)
    trainer = {"devices": ranks, "strategy": "ddp" if ranks > 1 else "auto", **extra.pop("trainer", {})}
    return {"folder": str(folder), "acts": acts, "preemption": preemption, "trainer": trainer, **extra}


def _told(folder, ranks):
    files = [folder / f"rank{rank}.json" for rank in range(ranks)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


@pytest.mark.parametrize(
    ("launcher", "ranks", "acts"),
    [
        pytest.param("torchrun", 2, [("on_before_backward", 5, "signal", 1)], marks=pytest.mark.slow),
        pytest.param("torchrun", 2, [("on_train_batch_start", 5, "signal", 0)], marks=pytest.mark.slow),
        pytest.param("torchrun", 2, [("on_train_batch_end", 5, "signal", None)], marks=pytest.mark.slow),
        pytest.param("torchrun", 2, [("on_validation_batch_end", 1, "signal", 1)], marks=pytest.mark.slow),
        pytest.param("torchrun", 3, [("on_before_optimizer_step", 4, "signal", 2)], marks=pytest.mark.slow),
        ("python", 2, [("on_before_backward", 5, "signal", 1)]),
        pytest.param("python", 1, [("on_before_backward", 5, "signal", 0)], marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore:It is recommended to use `self.log")  # nobody looks at it
def test_a_signal_to_one_rank_ends_all_at_one_step(pool, tmp_path, launcher, ranks, acts):
    preemption = {"every_n_steps": 2}
    status, _, ended, output = _start(tmp_path, ranks, acts, preemption, launcher)
    assert status != 0, output
    assert all(ended), output
    steps = {rank["step"] for rank in ended}
    assert len(steps) == 1
    at = 6 if "validation" in acts[0][0] else acts[0][1]  # an epoch has six steps
    assert at <= steps.pop() <= at + 2 * 2
    assert {rank["saved"] for rank in ended} == {str(tmp_path / "last-preemption.ckpt")}
    if launcher == "python" and ranks == 2:
        resumed = _in_pool(pool, tmp_path, preemption, ckpt_path="last")
        whole = _in_pool(pool, tmp_path / "whole", preemption)
    else:
        _, _, resumed, output = _start(tmp_path, ranks, [], preemption, launcher, ckpt_path="last")
        _, _, whole, _ = _start(tmp_path / "whole", ranks, [], preemption, launcher)
    for first, second, unbroken in zip(ended, resumed, whole, strict=True):
        assert first["seen"] + second["seen"] == unbroken["seen"], output
        if ranks < 3:  # above, plain DDP sums in another order in the first step after a start
            assert second["state"] == unbroken["state"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 1), ("torchrun", 3), ("python", 1), ("python", 3)])
@pytest.mark.parametrize(
    ("hook", "at", "extra"),
    [
        ("sanity", 1, {"trainer": {"num_sanity_val_steps": 2}}),
        ("compile", 1, {}),
        ("data", 3, {}),
        ("on_save_checkpoint", 1, {"saves": 3}),
        ("on_validation_batch_start", 2, {}),
    ],
)
def test_it_may_come_at_any_time(tmp_path, hook, at, extra, launcher, ranks):
    """To one rank; the run of a single rank is under ``ddp`` as well, with a collective's handlers and all."""
    options = {**extra, "trainer": {"strategy": "ddp", "val_check_interval": 2, **extra.get("trainer", {})}}
    acts = [(hook, at, "signal", ranks - 1)]
    status, _, ended, output = _start(tmp_path, ranks, acts, {"every_n_steps": 2}, launcher, **options)
    assert status == (1 if launcher == "torchrun" else 143), output
    assert all(ended), output
    assert len({rank["step"] for rank in ended}) == 1
    step, path = ended[0]["step"], tmp_path / "last-preemption.ckpt"
    if hook == "sanity" and ranks == 1:
        assert (step, path.exists()) == (0, False)  # known at once, and nothing was trained
    else:
        assert torch.load(path, weights_only=True)["global_step"] == step < 12
        assert {rank["saved"] for rank in ended} == {str(path)}


def test_an_ordinary_step_has_no_collective_of_ours_but_one_in_n(pool, tmp_path):
    steps = 12 * 2 // 2  # two epochs, on two ranks
    options = {"trainer": {"limit_val_batches": 0}}
    counts = {}
    for name, preemption in (("plain", None), ("ours", {"every_n_steps": 4})):
        ranks = _in_pool(pool, tmp_path / name, preemption, **copy.deepcopy(options))
        counts[name] = [rank["collectives"] for rank in ranks]
    for plain, ours in zip(counts["plain"], counts["ours"], strict=True):
        assert plain["broadcast"] - ours.get("broadcast", 0) == steps  # Lightning's, one in each batch
        assert ours.get("all_reduce", 0) - plain.get("all_reduce", 0) == steps // 4


@pytest.mark.slow
def test_a_rank_that_fails_saves_while_the_other_stands_in_a_collective(tmp_path):
    acts = [("on_before_backward", 5, "fail", 1)]
    status, _, _, output = _start(tmp_path, 2, acts, {"emergency": True}, "torchrun")
    assert status != 0
    assert "the state before this step is saved" in output
    assert [path.name for path in tmp_path.glob("*.ckpt*")] == ["last-emergency.ckpt"]
    saved = torch.load(tmp_path / "last-emergency.ckpt", weights_only=True)
    _, _, whole, _ = _start(tmp_path / "whole", 2, [], {}, "torchrun", trainer={"max_steps": 4})
    assert saved["global_step"] == 4
    assert {name: tensor.tolist() for name, tensor in saved["state_dict"].items()} == whole[1]["state"]
    _, _, resumed, output = _start(tmp_path, 2, [], {}, "torchrun", ckpt_path="last")
    assert [rank["seen"] for rank in resumed] == [[4, *range(6)]] * 2, output  # the batch in flight was given out
