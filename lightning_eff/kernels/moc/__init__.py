"""Mixture-of-Channels between its matrix products: the selected channels gathered, activated and put back in place.

Byte count, for K channels of a token and w bytes a value, beside the d_ff-wide buffer of zeros that both need: forward
the kernel reads v, u and an index of 8 bytes and writes u, s, z and z in place, 6 K w + 8 K; torch's gather, silu,
product and scatter read u, s, z and the index once more, 9 K w + 16 K. Backward the kernel reads an index of 2 bytes,
v, u, s and the gradient and writes two, 6 K w + 2 K; torch makes an index of 8 bytes first and writes and reads the
three products in between.
"""

from __future__ import annotations

from torch import Tensor

from lightning_eff.kernels.dispatch import choose
from lightning_eff.kernels.moc import reference
from lightning_eff.kernels.tables import DTYPE_CODES

__all__ = ["activate", "activate_backward"]


def activate(up: Tensor, values: Tensor, channels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The selected channels' u, s = silu(v) and z = s u, and z in place.

    Args:
        up: float32, bfloat16 or float16 (tokens, d_ff), all channels; another dtype takes the reference.
        values: the same dtype, (tokens, K), the selected gates v.
        channels: int64 (tokens, K), which they are; no two of a token alike, each in [0, d_ff).

    Returns:
        u, s and z, (tokens, K) each, and (tokens, d_ff) with z where it belongs and zeros elsewhere.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    obstacle = _obstacle("moc", up, [values], channels)
    if values.numel() and choose("moc", up.device, obstacle).implementation == "triton":
        from lightning_eff.kernels.moc import kernel

        return kernel.activate(up, values, channels)
    return reference.activate(up, values, channels)


def activate_backward(
    grad: Tensor, values: Tensor, channels: Tensor, u: Tensor, s: Tensor, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of the gates and of u in place, from that of z in place.

    Args:
        grad: (tokens, d_ff), as ``up`` of :func:`activate`.
        values: (tokens, K), the selected gates.
        channels: (tokens, K), any integer dtype.
        u: (tokens, K).
        s: (tokens, K).
        into: of ``grad``'s shape and dtype, zero where nothing was selected, such as z in place: becomes the gates'
            gradient, and saves another buffer of zeros. None: a new one.

    Returns:
        Two of ``grad``'s shape, zero where nothing was selected.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    obstacle = _obstacle("moc", grad, [values, u, s], channels)
    if into is not None and (into.shape, into.dtype, into.device) != (grad.shape, grad.dtype, grad.device):
        raise ValueError(f"moc: into, {tuple(into.shape)} of {into.dtype} on {into.device}, is not as grad")
    if into is not None and not into.is_contiguous():
        obstacle = "a tensor is not contiguous"
    if values.numel() and choose("moc", grad.device, obstacle).implementation == "triton":
        from lightning_eff.kernels.moc import kernel

        return kernel.activate_backward(grad, values, channels, u, s, into)
    return reference.activate_backward(grad, values, channels, u, s, into)


def _obstacle(op: str, dense: Tensor, chosen: list[Tensor], channels: Tensor) -> str | None:
    """Why the kernel cannot take these tensors; refuses those that nobody could."""
    if dense.ndim != 2:
        raise ValueError(f"{op}: {tuple(dense.shape)} is not (tokens, d_ff)")
    for tensor in (*chosen, channels):
        if tensor.shape != channels.shape or tensor.ndim != 2 or len(tensor) != len(dense):
            raise ValueError(
                f"{op}: {tuple(tensor.shape)} is not (tokens, K) for {len(dense)} tokens and {channels.shape}"
            )
        if tensor.device != dense.device:
            raise ValueError(f"{op}: tensors on different devices: {dense.device} and {tensor.device}")
    if any(tensor.dtype != dense.dtype for tensor in chosen):
        raise ValueError(f"{op}: {chosen[0].dtype} beside {dense.dtype}: all values must have one dtype")
    if channels.dtype.is_floating_point or channels.dtype.is_complex:
        raise ValueError(f"{op}: channels of {channels.dtype} must be integers")
    if dense.dtype not in DTYPE_CODES:
        return f"values have dtype {dense.dtype}; kernels take float32, bfloat16 and float16"
    if not all(tensor.is_contiguous() for tensor in (dense, *chosen, channels)):
        return "a tensor is not contiguous"
    return None
