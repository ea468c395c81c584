"""The demo, as `make demo` runs it."""

import re
import subprocess
import sys
from pathlib import Path

from examples.gpt.demo import tensorboard_command
from harness import REPOSITORY


def test_demo_prints_its_table(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "examples.gpt.demo", "--steps", "4", "--val-windows", "8", "--logdir", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert run.returncode == 0, run.stderr
    assert "FaultInjector: kill on rank 0\n" in run.stderr
    assert "Warning" not in run.stderr

    def value(row: str) -> float:
        found = re.search(rf"{row}[^│]*│ +(?:step )?([\d.,]+)", run.stdout)
        assert found, f"no {row!r} in:\n{run.stdout}"
        return float(found[1].replace(",", ""))

    assert abs(value("Training loss, first step") - 5.55) < 0.1  # log(256): a uniform guess
    assert abs(value("Validation, before training") - 8) < 0.2
    assert value("Validation, at the end") < 8
    assert value("Gradient spikes clipped") == 0  # ZClip is still warming up
    assert value("Alarms and rollbacks") == 0
    assert 0 < value("Optimizer's memory in 2 steps") < 0.841  # MB: a tenth of AdamW's two moments
    assert value("Sent by each of two ranks") < 1.5  # MB of 4.21
    assert 4 < value("Their training loss after 2 steps") < 5.6
    assert value("Killed by kill -9 behind step 1, gone on from") in (0, 1)  # its checkpoint may not be on disk
    assert re.search(r"beside a run left alone[^│]*│ +equal to the bit", run.stdout)
    assert value("Steps of the first run") == 4
    assert value("Tokens") > 0
    assert f"--logdir {tmp_path}" in run.stdout
    assert list(tmp_path.glob("version_0/events.out.tfevents.*"))


def test_tensorboard_of_this_environment_is_named(monkeypatch, tmp_path):
    program = tmp_path / ".venv" / "bin" / "tensorboard"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    monkeypatch.chdir(tmp_path)
    assert tensorboard_command(Path("logs/demo")) == ".venv/bin/tensorboard --logdir logs/demo"
