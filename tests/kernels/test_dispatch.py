from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lightning_eff.kernels import choose, dispatch, status

CPU = torch.device("cpu")


def test_the_cpu_takes_the_reference_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    choice = choose("op", CPU)
    assert choice.implementation == "reference"
    assert "on cpu" in choice.reason


def test_the_variable_forces_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert choose("op", CPU) == ("reference", "LIGHTNING_EFF_KERNELS=reference")


def test_an_invalid_value_is_refused_with_the_allowed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"LIGHTNING_EFF_KERNELS='cuda' is not allowed.*'triton' or 'reference'"):
        choose("op", CPU)


@pytest.mark.parametrize(
    ("device", "loaded", "reason"),
    [
        ("cuda", ("3.6.0", False, ""), None),
        ("cuda", ("3.6.0", True, ""), "TRITON_INTERPRET is set"),
        ("cuda", (None, False, "No module named 'triton'"), "Triton cannot be imported .No module named 'triton'"),
        ("cpu", ("3.6.0", False, ""), "the tensors are on cpu"),
        ("meta", ("3.6.0", True, ""), "the tensors are on meta"),
    ],
)
def test_where_the_kernel_cannot_run_forcing_it_is_an_error(
    monkeypatch: pytest.MonkeyPatch, device: str, loaded: tuple[str | None, bool, str], reason: str | None
) -> None:
    monkeypatch.setattr(dispatch, "_triton", lambda: loaded)
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    assert choose("op", torch.device(device)).implementation == ("triton" if reason is None else "reference")
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    if reason is None:
        assert choose("op", torch.device(device)).implementation == "triton"
    else:
        with pytest.raises(RuntimeError, match=f"LIGHTNING_EFF_KERNELS=triton, but op cannot run its kernel: {reason}"):
            choose("op", torch.device(device))


def test_an_obstacle_of_the_tensors_sends_them_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_triton", lambda: ("3.6.0", False, ""))
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    assert choose("op", torch.device("cuda"), "tensor 0 has dtype torch.float64").implementation == "reference"


def test_status_lists_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    assert [(row.op, row.implementation) for row in status("cpu")] == [(op, "reference") for op in dispatch.OPS]
    monkeypatch.setattr(dispatch, "_triton", lambda: (None, False, "no"))
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "triton")
    assert all("error: LIGHTNING_EFF_KERNELS=triton" in row.reason for row in status("cpu"))


def test_the_package_and_its_ops_work_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch
from lightning_eff.kernels import grad_norm, status
assert grad_norm.sum_of_squares([torch.tensor([3.0, 4.0])]).item() == 25
assert all(row.implementation == "reference" for row in status("cpu"))
"""
    subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], check=True)
