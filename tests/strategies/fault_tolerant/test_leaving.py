"""A replica that is told to leave, under `lightning-eff launch`: the others go on without a pause."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import REPOSITORY, json_lines
from harness.processes import environment, eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft has wheels for Linux x86-64 only"),
]

TIMEOUT = 6.0  # seconds of silence that a death costs the others here
STEPS = 300
SCRIPT = """
import json, os, signal, sys, time
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset
from lightning_eff.callbacks import Preemption
from lightning_eff.strategies import FaultTolerantDDPStrategy

folder, timeout, steps = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
me = f"{os.environ['REPLICA_GROUP_ID']}.{os.environ['LOCAL_RANK']}"
chosen = os.environ.get("PHASE", "")  # in which the last replica, or the one that saves, is told to leave
is_last = int(os.environ["REPLICA_GROUP_ID"]) == int(os.environ["NUM_REPLICA_GROUPS"]) - 1


def now(phase, step):
    if phase == chosen and step >= 10 * (phase not in ("sanity check", "compile")) and (is_last or phase == "saving"):
        try:
            os.close(os.open(f"{folder}/told", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGTERM)


class Data(Dataset):
    def __len__(self):
        return 480

    def __getitem__(self, index):
        now("data loading", model.global_step)
        return torch.full((4,), index / 480)


class Net(torch.nn.Linear):
    def forward(self, inputs):  # torch does not compile those of its own modules
        return super().forward(inputs)


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net(4, 1)
        if chosen == "compile":
            self.net.compile(backend=lambda graph, inputs: (now("compile", 0), graph.forward)[1])

    def validation_step(self, batch, batch_idx):
        now("sanity check" if self.trainer.sanity_checking else "validation", self.global_step)
        self.net(batch)

    def on_save_checkpoint(self, checkpoint):
        now("saving", self.global_step)

    def training_step(self, batch, batch_idx):
        time.sleep(0.05)
        return self.net(batch).square().mean()

    def on_train_batch_end(self, *_):
        line = {"time": time.time(), "pid": os.getpid(), "step": self.trainer.global_step}
        line |= {"members": self.trainer.strategy.replicas.members, "weights": self.net.weight.tolist()}
        with open(f"{folder}/steps-{me}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\\n")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


L.seed_everything(3, verbose=False)
model = Model()
L.Trainer(
    strategy=FaultTolerantDDPStrategy(heartbeat_timeout=timeout), devices=int(os.environ["LOCAL_WORLD_SIZE"]),
    accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False,
    enable_progress_bar=False, enable_model_summary=False,
    num_sanity_val_steps=2 if chosen == "sanity check" else 0, val_check_interval=20,
    limit_val_batches=3 if chosen else 0,
    callbacks=[Preemption(exit_code=7), ModelCheckpoint(folder, every_n_train_steps=15 if chosen else 10 * steps)],
).fit(model, DataLoader(Data(), 4), DataLoader(torch.randn(480, 4), 4))
"""


class Launch:
    """Replicas under the launcher, each of which writes a line for each step."""

    def __init__(self, folder: Path, replicas: int, processes: int, phase: str, steps: int) -> None:
        self.folder = folder
        (folder / "train.py").write_text(SCRIPT)
        command = [sys.executable, "-m", "lightning_eff", "launch", "--replicas", str(replicas)]
        command += ["--nproc-per-node", str(processes), "--heartbeat-timeout", str(TIMEOUT), "--grace", "60"]
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [*command, str(folder / "train.py"), str(folder), str(TIMEOUT), str(steps)],
            cwd=REPOSITORY,
            env=environment(PHASE=phase),
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    @property
    def text(self) -> str:
        return (self.folder / "log").read_text()

    def steps(self, process: str) -> list[dict[str, Any]]:
        return json_lines.read(self.folder / f"steps-{process}.jsonl")

    def come_to(self, step: int, *processes: str) -> None:
        def there() -> bool:
            assert self.process.poll() is None, self.text
            return all(any(line["step"] >= step for line in self.steps(process)) for process in processes)

        eventually(there, 120.0, self.text)

    def terminate(self, process: str) -> None:
        os.kill(self.steps(process)[-1]["pid"], signal.SIGTERM)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(70)
        self.log.close()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Any]:
    started: list[Launch] = []

    def start(replicas: int, processes: int = 1, phase: str = "", steps: int = STEPS) -> Launch:
        started.append(Launch(tmp_path, replicas, processes, phase, steps))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.mark.parametrize(
    ("replicas", "processes", "told"), [(3, 1, "1.0"), (2, 2, "1.1")], ids=["one process", "the second of two"]
)
def test_sigterm_to_one_replica(replicas: int, processes: int, told: str, launch: Any) -> None:
    run = launch(replicas, processes)
    everybody = [f"{replica}.{process}" for replica in range(replicas) for process in range(processes)]
    run.come_to(30, *everybody)
    run.terminate(told)
    assert run.process.wait(200) == 0, run.text

    left = run.steps(told)[-1]["step"]
    assert f"[launch] replica 1 has left the run after {left} steps, as it was told to" in run.text
    assert "restart" not in run.text
    assert "Traceback" not in run.text
    lines = run.steps("0.0")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    everyone = list(range(replicas))
    assert [line["members"] for line in lines] == [everyone] * left + [[i for i in everyone if i != 1]] * (STEPS - left)
    # Nothing of the timeout that a death costs: about as long as any other step, on a machine that is busy too.
    gaps = [after["time"] - before["time"] for before, after in pairwise(lines[29:])]
    assert max(gaps) < TIMEOUT / 2
    for other in everybody:
        if not other.startswith("1."):
            assert run.steps(other)[-1]["weights"] == lines[-1]["weights"]


@pytest.mark.parametrize("phase", ["sanity check", "compile", "data loading", "saving", "validation"])
@pytest.mark.parametrize("replicas", [1, 3])
def test_sigterm_at_any_time(replicas: int, phase: str, launch: Any) -> None:
    steps = 200  # told by the 20th, a replica stays for `TIMEOUT` more, which is 120 of at least 0.05 s
    run = launch(replicas, phase=phase, steps=steps)
    status = run.process.wait(200)
    assert (run.folder / "told").exists(), run.text
    assert "Traceback" not in run.text
    assert "restart" not in run.text
    assert run.text.count("has left the run after") == 1, run.text
    if replicas == 1:
        assert status == 1, run.text
        last = run.steps("0.0")[-1]
        assert last["step"] < steps
        saved = torch.load(run.folder / "last-preemption.ckpt", weights_only=True)
        assert saved["global_step"] == last["step"]
        assert saved["state_dict"]["net.weight"].tolist() == last["weights"]
    else:
        assert status == 0, run.text
        ends = [run.steps(f"{replica}.0")[-1] for replica in range(replicas)]
        assert sorted(end["step"] == steps for end in ends) == [False, True, True]
        assert len({str(end["weights"]) for end in ends if end["step"] == steps}) == 1


@pytest.mark.parametrize("to", ["each", "the launcher"])
def test_sigterm_to_all_replicas_saves(to: str, launch: Any) -> None:
    run = launch(3)
    run.come_to(20, "0.0", "1.0", "2.0")
    if to == "each":
        for process in ("0.0", "1.0", "2.0"):
            run.terminate(process)
        assert run.process.wait(100) == 1, run.text
        assert "0 replicas are left here, after the others were told to leave: the run is not over" in run.text
    else:
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(100) == 128 + signal.SIGTERM, run.text
    assert "Traceback" not in run.text
    last = max((run.steps(process)[-1] for process in ("0.0", "1.0", "2.0")), key=lambda line: line["step"])
    assert last["step"] < STEPS
    saved = torch.load(run.folder / "last-preemption.ckpt", weights_only=True)
    assert saved["global_step"] == last["step"]
    assert saved["state_dict"]["net.weight"].tolist() == last["weights"]
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] % 40 == last["step"] % 40
