"""Mixture-of-Channels for one token or a few: of the up and down weights only the selected channels' rows are read.

Byte count, for a token with K of d_ff channels, width d and w bytes a value, beside the d_ff d w of the gate's weights:
the kernels read K d w of the up weights, where torch's indexing makes a copy first and reads it, 3 K d w, and K d w of
the down weights, as torch's `embedding_bag` does; but of one token that is a single bag, which a thread walks through
for each column, and here the rows are shared among 256 programs. With 2:8 one launch reads the gate's rows and the up
rows of the two largest of each eight, and no gate is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.kernels.dispatch import choose
from lightning_eff.kernels.moc_decode import reference
from lightning_eff.kernels.tables import DTYPE_CODES

__all__ = ["pairs_up", "selected_down", "selected_up"]

_OP = "moc_decode"


def selected_up(x: Tensor, up: Tensor, values: Tensor, channels: Tensor) -> Tensor:
    """silu(v) times the product of the selected rows with the token.

    Args:
        x: float32, bfloat16 or float16 (tokens, d); another dtype takes the reference, here and below.
        up: (d_ff, d), a row a channel.
        values: (tokens, K), the selected gates v.
        channels: int64 (tokens, K), which they are, each in [0, d_ff).

    Returns:
        z, (tokens, K).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    obstacle = _obstacle(x.shape[-1:], x, [x, up], [values], channels)
    if channels.numel() and choose(_OP, x.device, obstacle).implementation == "triton":
        from lightning_eff.kernels.moc_decode import kernel

        return kernel.selected_up(x, up, values, channels)
    return reference.selected_up(x, up, values, channels)


def selected_down(z: Tensor, channels: Tensor, down: Tensor) -> Tensor:
    """The sum of the selected rows, each times its z.

    Args:
        z: (tokens, K).
        channels: int64 (tokens, K).
        down: (d_ff, d), a row a channel: the down projection's weight transposed.

    Returns:
        (tokens, d); the same bits every time.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    obstacle = _obstacle(down.shape[-1:], z, [down], [z], channels)
    if channels.numel() and choose(_OP, z.device, obstacle).implementation == "triton":
        from lightning_eff.kernels.moc_decode import kernel

        return kernel.selected_down(z, channels, down)
    return reference.selected_down(z, channels, down)


def pairs_up(x: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """z and channels of the two largest gates of each eight neighbours, gates included.

    Args:
        x: (tokens, d).
        gate: (d_ff, d), of a multiple of 8 channels.
        up: (d_ff, d).

    Returns:
        z and channels (int64), (tokens, d_ff / 4) each.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    obstacle = _obstacle(x.shape[-1:], x, [x, gate, up], [], None)
    if len(gate) % reference.GROUP or gate.shape != up.shape:
        raise ValueError(f"{_OP}: {tuple(gate.shape)} and {tuple(up.shape)} are not (d_ff, d) twice, d_ff in eights")
    if x.numel() and gate.numel() and choose(_OP, x.device, obstacle).implementation == "triton":
        from lightning_eff.kernels.moc_decode import kernel

        return kernel.pairs_up(x, gate, up)
    return reference.pairs_up(x, gate, up)


def _obstacle(
    width: torch.Size, x: Tensor, matrices: list[Tensor], chosen: list[Tensor], channels: Tensor | None
) -> str | None:
    """Why the kernel cannot take these tensors, ``x`` first of the tokens; refuses those that nobody could.

    Matrices have rows of the ``width``; the others have as many as there are channels of a token.
    """
    tensors = [*matrices, *chosen]
    if any(tensor.ndim != 2 for tensor in tensors):
        raise ValueError(f"{_OP}: {[tuple(tensor.shape) for tensor in tensors]} are not all of two dimensions")
    for matrix in matrices:
        if matrix.shape[1:] != width:
            raise ValueError(f"{_OP}: {tuple(matrix.shape)} is not (d_ff, {width[0]})")
    if any(tensor.dtype != x.dtype for tensor in tensors):
        raise ValueError(f"{_OP}: {[tensor.dtype for tensor in tensors]}: all values must have one dtype")
    if channels is not None:
        if any(tensor.shape != channels.shape or len(tensor) != len(x) for tensor in chosen):
            raise ValueError(f"{_OP}: {tuple(channels.shape)} is not (tokens, K) for {len(x)} tokens")
        if channels.dtype.is_floating_point or channels.dtype.is_complex:
            raise ValueError(f"{_OP}: channels of {channels.dtype} must be integers")
        tensors = [*tensors, channels]
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(f"{_OP}: tensors on different devices: {sorted({str(tensor.device) for tensor in tensors})}")
    if x.dtype not in DTYPE_CODES:
        return f"values have dtype {x.dtype}; kernels take float32, bfloat16 and float16"
    if not all(tensor.is_contiguous() for tensor in tensors):
        return "a tensor is not contiguous"
    return None
