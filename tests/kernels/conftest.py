"""The kernels' tests run each kernel under Triton's interpreter on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy
import pytest
import torch
from packaging.version import Version

from harness.interpreter import mended_bfloat16
from lightning_eff.kernels.dispatch import ENVIRONMENT_VARIABLE

# Without Triton there is nothing to hold to the references, and what is left is that the package works without it.
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_[!d]*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """Force the kernels, with every allocation filled with NaN: nobody gets zeros by luck."""
    from lightning_eff.kernels.device import INTERPRETED

    if device.type == "cpu" and not INTERPRETED:
        pytest.fail("Triton was imported before TRITON_INTERPRET was set: conftest.py at the root must come first")
    if INTERPRETED and _is_too_new_for_the_interpreter():
        pytest.skip("the interpreter of Triton before 3.7 needs NumPy before 2.4")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    with mended_bfloat16() if INTERPRETED else nullcontext():
        yield


def _is_too_new_for_the_interpreter() -> bool:
    import triton

    return Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4")


def _poisoning(allocate: Any) -> Any:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.dtype.is_floating_point else -(2**30))

    return poisoned
