"""The demo, as `make demo` runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")

from examples.gpt.demo import tensorboard_command
from harness import REPOSITORY


def demo(folder, steps, windows):
    """What it prints, and a reader of its table: the numbers behind a row's name."""
    options = ["--steps", str(steps), "--val-windows", str(windows), "--logdir", str(folder)]
    line = [sys.executable, "-m", "examples.gpt.demo", *options]
    run = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stderr
    assert "FaultInjector: kill on rank 0\n" in run.stderr
    assert "Warning" not in run.stderr

    def values(row: str) -> list[float]:
        found = re.search(rf"{row}[^│]*│ +([^│]+)│", run.stdout)
        assert found, f"no {row!r} in:\n{run.stdout}"
        return [float(number.replace(",", "")) for number in re.findall(r"\d[\d.,]*\d|\d", found[1])]

    return run.stdout, values


@pytest.mark.timeout(600)
def test_demo_prints_its_table(tmp_path):
    out, values = demo(tmp_path, steps=4, windows=8)
    assert abs(values("Training loss, nats a byte")[0] - 5.55) < 0.1  # log(256): a uniform guess
    before, after = values("Validation, bits a byte")
    assert abs(before - 8) < 0.2
    assert after < 8
    assert values("Gradient spikes clipped") == [0, 4]  # ZClip is still warming up
    assert values("Rollbacks") == [0]
    assert "A batch of noise" not in out  # there is no time for accidents
    (optimizer, states), (checkpoint, whole) = values("Optimizer's memory in 2 steps"), values("Its checkpoint")
    assert 0 < optimizer < 0.841 < 8.4 < states  # MB: a tenth of AdamW's two moments
    assert 4.2 < checkpoint < 5.2  # the weights and that
    assert 12.5 < whole < 13  # the weights and both moments
    assert values("Two ranks: sent by each")[0] < 1.5  # MB of 4.21
    assert 4 < values("Two ranks: training loss after 2 steps")[0] < 5.6
    assert values("A run killed by kill -9 behind step 1") in ([0], [1])  # its checkpoint may not be on disk
    assert re.search(r"beside a run left alone[^│]*│ +equal to the bit", out)
    assert values("Tokens")[0] > 0
    assert f"--logdir {tmp_path}" in out
    assert list(tmp_path.glob("version_0/events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_s_accidents_happen_and_are_survived(tmp_path):
    _, values = demo(tmp_path, steps=240, windows=8)
    norm, left = values("A batch of noise at step 69")
    assert left < norm
    assert values("Rollbacks") == [1]
    broken, undone = values("A bit flipped behind step 144")
    assert 2 <= broken <= 13  # until the guard has read the second of them
    assert broken < undone <= 40
    lost, of = values("The same bit in a run without a guard")
    assert lost >= of / 2 - 1  # to its end
    first, last = values("Training loss, nats a byte")
    assert last < 0.6 * first


def test_tensorboard_of_this_environment_is_named(monkeypatch, tmp_path):
    program = tmp_path / ".venv" / "bin" / "tensorboard"
    program.parent.mkdir(parents=True)
    program.touch()
    monkeypatch.setattr(sys, "executable", str(program.with_name("python")))
    monkeypatch.chdir(tmp_path)
    assert tensorboard_command(Path("logs/demo")) == ".venv/bin/tensorboard --logdir logs/demo"
