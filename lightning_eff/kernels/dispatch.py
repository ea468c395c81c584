"""Which implementation of an op runs: the Triton kernel or the plain-torch reference.

A list of CUDA (or HIP) tensors takes the kernel where Triton can be imported, everything else the reference. The
environment variable ``LIGHTNING_EFF_KERNELS`` forces one of the two.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any, Literal, NamedTuple

import torch

Implementation = Literal["triton", "reference"]

ENVIRONMENT_VARIABLE = "LIGHTNING_EFF_KERNELS"
OPS = ("grad_norm", "zclip", "tensor_stats", "row_sketch", "row_pack", "alignment", "moc", "moc_decode")


class Choice(NamedTuple):
    """What runs, and why."""

    implementation: Implementation
    reason: str


class OpStatus(NamedTuple):
    """One line of :func:`status`: the op's folder name, what would run, and why."""

    op: str
    implementation: Implementation
    reason: str


@functools.cache
def _triton() -> tuple[str | None, bool, str]:
    """Triton's version (None without it), whether kernels are interpreted, and why it cannot be imported."""
    try:
        device: Any = importlib.import_module("lightning_eff.kernels.device")
    except ImportError as error:
        return None, False, str(error)
    return device.TRITON_VERSION, device.INTERPRETED, ""


def forced() -> Implementation | None:
    """The implementation that ``LIGHTNING_EFF_KERNELS`` asks for; None where it is unset or empty.

    Raises:
        ValueError: it holds anything else than ``triton`` or ``reference``.
    """
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if value == "":
        return None
    if value == "triton":
        return "triton"
    if value == "reference":
        return "reference"
    raise ValueError(
        f"{ENVIRONMENT_VARIABLE}={value!r} is not allowed: it must be 'triton' or 'reference', or unset to choose "
        "by device"
    )


def choose(op: str, device: torch.device, obstacle: str | None = None) -> Choice:
    """Choose the implementation of ``op`` for tensors on ``device``.

    Args:
        op: name of the op, for the error message.
        device: where the tensors are.
        obstacle: why the kernel cannot take these tensors whatever the device (a dtype, say), None if it can.

    Raises:
        ValueError: ``LIGHTNING_EFF_KERNELS`` holds a value that is not allowed.
        RuntimeError: it asks for ``triton`` and the kernel cannot take these tensors here.

    Example:
        >>> choose("grad_norm", torch.device("cpu")).implementation
        'reference'
    """
    wanted = forced()
    if wanted == "reference":
        return Choice("reference", f"{ENVIRONMENT_VARIABLE}=reference")
    version, interpreted, import_error = _triton()
    if version is None:
        obstacle = f"Triton cannot be imported ({import_error})"
    elif interpreted and device.type == "cuda":
        # The interpreter copies a kernel's tensor arguments to the host, but not what a table of addresses points to.
        obstacle = "TRITON_INTERPRET is set and the interpreter cannot follow addresses on a GPU"
    elif device.type not in ("cuda", "cpu") or (device.type == "cpu" and not interpreted):
        obstacle = f"the tensors are on {device.type}, and kernels need a CUDA or HIP device"
    if wanted == "triton":
        if obstacle is not None:
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE}=triton, but {op} cannot run its kernel: {obstacle}")
        return Choice("triton", f"{ENVIRONMENT_VARIABLE}=triton" + (", interpreted" if interpreted else ""))
    if obstacle is not None:
        return Choice("reference", obstacle)
    if interpreted:
        return Choice("reference", "the tensors are on cpu; the interpreter is for tests and runs only when forced")
    return Choice("triton", f"Triton {version}")


def status(device: torch.device | str | None = None) -> list[OpStatus]:
    """Each op with the implementation that would run for tensors on ``device``, and why.

    Args:
        device: a device; None for the GPU where there is one, else the CPU.

    Raises:
        ValueError: ``LIGHTNING_EFF_KERNELS`` holds a value that is not allowed.

    Example:
        >>> for row in status("cpu")[:1]:
        ...     print(row.op, row.implementation)
        grad_norm reference
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for op in OPS:
        try:
            choice = choose(op, torch.device(device))
        except RuntimeError as error:
            # What would run is an error; a listing still has to list.
            choice = Choice("triton", f"error: {error}")
        rows.append(OpStatus(op, *choice))
    return rows
