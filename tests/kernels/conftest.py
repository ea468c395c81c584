"""The kernels' tests run each kernel under Triton's interpreter on the CPU, or compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

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
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "triton")
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    if INTERPRETED:
        _mend_bfloat16(monkeypatch)
    with np.errstate(all="ignore"):  # numpy, under the interpreter, warns of inf - inf
        yield


def _mend_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two faults of the interpreter: it cuts bits off instead of rounding, and a product is that of bit patterns."""
    import triton.language as tl
    from triton.runtime import interpreter

    truncate = interpreter.InterpreterBuilder.create_fp_trunc

    def create_fp_trunc(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return multiply(self, a, b, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", create_fp_trunc)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _poisoning(allocate: Any) -> Any:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.dtype.is_floating_point else -(2**30))

    return poisoned
