"""verify-resume: scripts that go on exactly, and scripts that do not, killed by `kill -9` on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from harness.processes import environment
from lightning_eff import _witness
from lightning_eff.cli.verify_resume.run import main
from lightning_eff.cli.verify_resume.witness import _digest, _numpy_state
from tests.suite.table import ROWS

ROOT = Path(__file__).parents[2]
EXACT = "exact: 4 batches behind the break are the same to the bit on 1 rank(s)"


def _environment(folder: Path) -> dict[str, str]:
    """With the entry points, where the package was installed before it had them."""
    variables = environment(GLOO_SOCKET_IFNAME="lo")
    if not entry_points(group="lightning.pytorch.callbacks_factory", name="lightning_eff_witness"):
        metadata = folder / "entry" / "lightning_eff_entry-0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-eff-entry\nVersion: 0\n")
        functions = {"lightning.pytorch": "of_lightning", "pytorch_lightning": "of_pytorch_lightning"}
        lines = [
            f"[{package}.callbacks_factory]\nlightning_eff_witness = lightning_eff._witness:{function}\n"
            for package, function in functions.items()
        ]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        variables["PYTHONPATH"] += f"{os.pathsep}{metadata.parent}"
    return variables


def _verify(folder: Path, *command: str, save_at: int = 3) -> tuple[int, str]:
    line = [sys.executable, "-m", "lightning_eff", "verify-resume", "--batches", "7", "--save-at", str(save_at)]
    done = subprocess.run(
        [*line, "--folder", str(folder / "runs"), "--", *command],
        cwd=ROOT,
        env=_environment(folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    return done.returncode, done.stdout + done.stderr


def _script(folder: Path, how: str) -> list[str]:
    return ["-m", "tests.callbacks.exact_resume.script", str(folder / "own"), how]


@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("exact", 0, EXACT),
        ("plain", 1, "the resumed run differs first in batch 4, rank 0: sample"),
    ],
)
@pytest.mark.slow
def test_it_says_whether_a_script_goes_on_exactly(tmp_path, how, status, words):
    found, output = _verify(tmp_path, sys.executable, *_script(tmp_path, how))
    assert (found, words in output) == (status, True), output
    assert "fit resumes from" in output
    assert not (tmp_path / "own").exists()  # what the script writes is redirected


@pytest.mark.timeout(420)
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.id, marks=() if row.id == "EMA" else pytest.mark.slow) for row in ROWS],
)
def test_beside_every_callback_the_killed_run_goes_on_exactly(tmp_path, row):
    found, output = _verify(tmp_path, sys.executable, *_script(tmp_path, row.id))
    assert (found, EXACT in output) == (0, True), output
    assert "fit resumes from" in output
    assert not (tmp_path / "own").exists()  # what the script writes is redirected


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.parametrize("save_at", [3, 4])
def test_under_torchrun_every_rank_is_killed_and_compared(tmp_path, save_at):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found, output = _verify(tmp_path, *torchrun, *_script(tmp_path, "exact"), save_at=save_at)
    assert found == 0, output
    assert "on 2 rank(s)" in output


def test_a_command_that_never_trains_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lightning_eff.cli.verify_resume.run.entry_points", lambda **_: ("there",))
    assert main(["--folder", str(tmp_path), "--", sys.executable, "-c", "print('hello')"]) == 2
    assert f"never came to Trainer.fit (exit status 0): see {tmp_path}/whole.log" in capsys.readouterr().out
    assert (tmp_path / "whole.log").read_text() == "hello\n"


def test_the_first_difference_is_the_cause(tmp_path, capsys):
    from lightning_eff.cli.verify_resume.run import _report

    seen = {"sample 0": "a", "random stream torch": "b", "parameter weight": "c"}
    for role, third in (
        ("whole", seen),
        ("broken", seen),
        ("resumed", {**seen, "sample 0": "x", "parameter weight": "y"}),
    ):
        lines = [{"changed": ["nothing"]}, *({"batch": n, "seen": third if n == 3 else seen} for n in (1, 2, 3))]
        (tmp_path / f"{role}.rank0.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert _report(tmp_path, 2) == 1
    assert "differs first in batch 3, rank 0: sample 0" in capsys.readouterr().out


def test_one_draw_of_numpys_is_seen():
    before = np.random.get_state()
    try:
        np.random.seed(0)
        seen = [_digest(repr(_numpy_state()))]
        for draw in (np.random.random, np.random.standard_normal):
            draw()
            seen.append(_digest(repr(_numpy_state())))
    finally:
        np.random.set_state(before)
    assert len(set(seen)) == 3


def test_without_orders_there_is_no_witness_and_nothing_is_imported(monkeypatch):
    monkeypatch.delenv(_witness.ORDERS, raising=False)
    assert _witness.of_lightning() == _witness.of_pytorch_lightning() == []
    code = "import sys, lightning_eff._witness as w; w.of_lightning(); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
