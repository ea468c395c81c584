"""benchmarks/gpu.sh in its small CPU mode: whole, and each part with a fault planted for it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import kernels
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.faults import FAULTS
from lightning_eff.kernels import alignment, dispatch, grad_norm, moc, moc_decode, row_pack, row_sketch, tensor_stats

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
ORDER = re.findall(r"^  (?:python|tests) (\w+) \d+|^  (sanitizer)$", SCRIPT.read_text(), re.MULTILINE)
NAMES = [name or other for name, other in ORDER]

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="it is a script for bash")


def _run(out: Path, *parts: str, fault: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "LIGHTNING_EFF"))}
    variables |= {"PYTHON": sys.executable, "GPU_OUT": str(out), "GPU_FAULT": fault, "SCALE": "6", **environment}
    return subprocess.run(["bash", str(SCRIPT), *parts], env=variables, capture_output=True, text=True, timeout=1500)


def test_every_part_has_a_fault():
    assert set(NAMES) == set(FAULTS)
    assert set(PARTS) - {"tiny"} < set(NAMES)


# What each check of the smoke part calls. ZClip's decision is in the norm's check of its own part.
CALLS = {
    "sum_of_squares": (grad_norm, "sum_of_squares"),
    "scale_": (grad_norm, "scale_"),
    "tensor_stats": (tensor_stats, "tensor_stats"),
    "row_sketch": (row_sketch, "row_sketch"),
    "row_pack": (row_pack, "pack_rows"),
    "alignment": (alignment, "alignment_stats"),
    "moc": (moc, "activate"),
    "moc_decode": (moc_decode, "selected_down"),
}


def test_every_op_has_a_check():
    modules = {module.__name__.rpartition(".")[2] for module, _ in CALLS.values()}
    assert modules == set(dispatch.OPS) - {"zclip"}
    assert set(kernels.CHECKS) == set(CALLS)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_check_sees_what_is_wrong(op, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
    module, name = CALLS[op]
    right = getattr(module, name)

    def wrong(*args, **kwargs):
        if name == "scale_":
            return right(args[0], args[1] * 1.1)
        result = right(*args, **kwargs)
        return result * 1.1 if isinstance(result, torch.Tensor) else tuple(r if r is None else r * 1.1 for r in result)

    error, allowed = kernels.CHECKS[op](dtype, 1)
    assert error <= allowed
    monkeypatch.setattr(module, name, wrong)
    error, allowed = kernels.CHECKS[op](dtype, 1)
    assert error > allowed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_what_runs(tmp_path):
    run = _run(tmp_path)
    assert (run.returncode, run.stderr) == (2, "torch finds no GPU here; --small runs every part on the CPU\n")


def test_a_part_that_takes_too_long_is_ended_and_fails(tmp_path):
    sleeper = tmp_path / "python"
    # What the script asks of Python first is answered at once.
    sleeper.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nexec sleep 60\n')
    sleeper.chmod(0o755)
    run = _run(tmp_path / "out", "--small", "smoke", "big", SCALE="1", LIMIT="9", PYTHON=str(sleeper))
    assert run.returncode == 1
    assert "--- smoke: out of time" in run.stdout
    assert "=== big: left out, the time is up" in run.stdout
    assert run.stdout.endswith("not right: smoke big\n")


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_all_parts_are_right(tmp_path):
    run = _run(tmp_path, "--small")
    assert run.returncode == 0, run.stdout[-4000:]
    assert re.findall(r"^--- (\w+): right", run.stdout, re.MULTILINE) == NAMES
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == set(PARTS)
    assert all(row["right"] and row["torch"] == torch.__version__ for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", NAMES)
def test_each_part_sees_its_planted_fault(part, tmp_path):
    run = _run(tmp_path, "--small", part, fault=part)
    assert run.returncode == 1, run.stdout[-4000:]
    assert f"--- {part}: WRONG" in run.stdout
    assert "WRONG  " in run.stdout or "FAILED " in run.stdout, "it ended for another reason"
