"""Mixture-of-Channels: a SwiGLU feed-forward network that keeps its K largest gates, and nothing of the others.

    g = x Wg^T;  (v, S) = topK(g) by value;  u = (x Wu^T)[S];  s = silu(v);  z = s u;  y = scatter(z) Wd^T

Training computes all channels, and the transient of one layer is as large as a dense one's. What stays for the
backward pass falls from 4 d_ff values a token (g, u, silu(g), their product) to 4 K and K indices, or with
``recompute`` 2 K and K indices; the input is kept in all cases. The selection is a constant: gates that were not
selected get no gradient.

Source: "Mixture-of-Channels: Exploiting Sparse FFNs for Efficient LLMs Pre-Training and Inference", arXiv 2511.09323.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_eff.arguments import check, check_choice, check_count, check_flag, check_instance
from lightning_eff.kernels import moc as kernels
from lightning_eff.kernels import moc_decode as decoding
from lightning_eff.kernels import tables
from lightning_eff.layers.autograd import Marked

Pattern = Literal["global", "2:8"]

SHORT = 32768
"""Channels up to which an index is kept in 16 bits."""

WIDEST = 2**24
"""More than any layer has: what is beyond is a mistake."""

_GROUP, _OF_GROUP = 8, 2


def selected_channels(d_ff: int, k: int, pattern: Pattern) -> int:
    """How many channels a token keeps: ``k``, or with "2:8" two of each eight neighbours and as many of the last."""
    if pattern == "global":
        return k
    return _OF_GROUP * (d_ff // _GROUP) + min(_OF_GROUP, d_ff % _GROUP)


def select_channels(gates: Tensor, k: int, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The largest gates of each token, by value.

    Args:
        gates: (tokens, d_ff).
        k: how many; of no matter with "2:8".
        pattern: "global", the ``k`` largest of all, or "2:8", the 2 largest of each 8 neighbours.

    Returns:
        Their values and their int64 indices, (tokens, K) each, in no order that means anything.
    """
    if pattern == "global":
        return _largest(gates, k)
    d_ff = gates.shape[1]
    whole = d_ff // _GROUP * _GROUP
    channels = _pairs(gates[:, :whole])
    if whole < d_ff:
        tail = gates[:, whole:].topk(min(_OF_GROUP, d_ff - whole), dim=-1).indices + whole
        channels = torch.cat([channels, tail], dim=-1)
    return gates.gather(-1, channels), channels


def _by_numpy(gates: Tensor) -> bool:
    """numpy's selection has vector instructions. Torch's has none on a CPU, and takes much of the step there."""
    return gates.dtype in (torch.float32, torch.float64) and tables.is_at_hand(gates)


def _pairs(gates: Tensor) -> Tensor:
    """Where the two largest of each eight neighbours are, in any order."""
    tokens, groups = len(gates), gates.shape[1] // _GROUP
    if _by_numpy(gates):
        values = gates.detach().numpy().reshape(tokens, groups, _GROUP)
        columns = np.ascontiguousarray(values.transpose(2, 0, 1))
        first, second = np.maximum(columns[0], columns[1]), np.minimum(columns[0], columns[1])
        for column in columns[2:]:
            second = np.maximum(second, np.minimum(column, first))
            first = np.maximum(first, column)
        if (found := _at_least(values, second[..., None], groups * _OF_GROUP)) is not None:
            return found
    local = gates.reshape(tokens, groups, _GROUP).topk(_OF_GROUP, dim=-1).indices
    channels: Tensor = local + torch.arange(0, gates.shape[1], _GROUP, device=gates.device)[:, None]
    return channels.view(tokens, groups * _OF_GROUP)


def _at_least(values: Any, least: Any, count: int) -> Tensor | None:
    """Where the values of each token are at least so large, in order; None if these are not ``count`` of each."""
    chosen, tokens = np.flatnonzero(values >= least), len(values)
    # Of equal ones there are more, and what is no number is equal to nothing.
    if len(chosen) != tokens * count or np.isnan(least).any():
        return None
    rows = (values.size // max(tokens, 1)) * np.arange(tokens)[:, None]
    return torch.from_numpy(chosen.reshape(tokens, count) - rows)


def _largest(gates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest of each row and where they are, in any order."""
    if _by_numpy(gates):
        numbers = gates.detach().numpy()
        found = _at_least(numbers, np.partition(numbers, -k, axis=-1)[:, -k, None], k)
        if found is None:
            found = torch.from_numpy(np.argpartition(numbers, -k, axis=-1))[:, -k:].contiguous()
        return gates.gather(-1, found), found
    values, channels = gates.topk(k, dim=-1, sorted=False)
    return values, channels


def _kernels() -> Any:
    """The kernels or their references; while something compiles, plain torch, which it can see through and fuse."""
    return kernels.reference if torch.compiler.is_compiling() else kernels


def _decoding() -> Any:
    return decoding.reference if torch.compiler.is_compiling() else decoding


class _MoC(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, k: int, pattern: Pattern, recompute: bool
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        values, channels = select_channels(rows @ gate.T, k, pattern)
        u, s, z, hidden = _kernels().activate(rows @ up.T, values, channels)
        narrow = channels.to(torch.int16 if gate.shape[0] <= SHORT else torch.int32)
        ctx.save_for_backward(x, gate, up, down, values, narrow, u, *(() if recompute else (s, z)))
        y: Tensor = hidden @ down.T
        return y.view(*x.shape[:-1], down.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, down, values, narrow, u, *kept = ctx.saved_tensors
        s, z = kept or (F.silu(values), None)
        dy, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        needs_x, needs_gate, needs_up, needs_down = ctx.needs_input_grad[:4]
        dx = d_gate = d_up = d_down = hidden = None
        if needs_down:
            z = s * u if z is None else z
            hidden = z.new_zeros(len(rows), gate.shape[0]).scatter_(-1, narrow.to(torch.int64), z)
            d_down = dy.T @ hidden
        if needs_x or needs_gate or needs_up:
            dg, du = _kernels().activate_backward(dy @ down, values, narrow, u, s, hidden)
            d_gate = dg.T @ rows if needs_gate else None
            d_up = du.T @ rows if needs_up else None
            dx = torch.addmm(dg @ gate, du, up).view_as(x) if needs_x else None
        return dx, d_gate, d_up, d_down, None, None, None


def moc_feed_forward(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    k: int,
    pattern: Pattern = "global",
    recompute: bool = False,
) -> Tensor:
    """The network as a function of its weights; :class:`MoCFeedForward` is the layer.

    Under autocast everything, the backward pass too, is in autocast's dtype; weight gradients come in the weights'.

    Args:
        x: (..., d_model), any strides.
        gate: (d_ff, d_model).
        up: (d_ff, d_model).
        down: (d_model, d_ff).
        k: channels that a token keeps, from 1 to d_ff; of no matter with "2:8".
        pattern: "global", the ``k`` largest gates, or "2:8", the 2 largest of each 8 neighbours.
        recompute: keep neither silu(v) nor the product, and compute both again in the backward pass.

    Returns:
        (..., d_model).

    Raises:
        ValueError: an argument that is not allowed.
        RuntimeError: from autograd, where the gradient is differentiated once more.

    Example:
        >>> x, W = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> moc_feed_forward(x, W, W, W, k=1) == torch.tensor([[0.0, F.silu(x[0, 1]) * 2]])
        tensor([[True, True]])
    """
    for name, tensor in (("x", x), ("gate", gate), ("up", up), ("down", down)):
        check_instance(name, tensor, Tensor, "a tensor")
    check("gate", tuple(gate.shape), gate.ndim == 2, "a matrix (d_ff, d_model)")
    d_ff, d_model = gate.shape
    check("x", tuple(x.shape), x.ndim >= 1 and x.shape[-1] == d_model, f"a tensor (..., {d_model})")
    check("up", tuple(up.shape), up.shape == gate.shape, f"a matrix of gate's shape, {(d_ff, d_model)}")
    check("down", tuple(down.shape), down.ndim == 2 and down.shape[1] == d_ff, f"a matrix (d_model, {d_ff})")
    check_count("k", k, most=d_ff)
    check_choice("pattern", pattern, Pattern)
    check_flag("recompute", recompute)
    device = x.device.type
    if torch.is_autocast_enabled(device):  # what autocast does for `F.linear`, and cannot do inside of a Function
        dtype = torch.get_autocast_dtype(device)
        x, gate, up, down = (tensor.to(dtype) for tensor in (x, gate, up, down))
    y: Tensor = _MoC.apply(x, gate, up, down, k, pattern, recompute)  # type: ignore[no-untyped-call]
    return y


class MoCFeedForward(Marked):
    """A SwiGLU network without biases that keeps K of its d_ff channels for the backward pass.

    Its weights are ``gate.weight``, ``up.weight`` and ``down.weight``, those of a dense SwiGLU. They are read as
    tensors: hooks on the three linear layers do not run, and adapters that replace these layers have no effect.

    Args:
        d_model: width of input and output, from 1 to 2^24.
        d_ff: channels, from 1 to 2^24.
        k: channels that a token keeps, from 1 to ``d_ff``. None: half of ``d_model``, at most ``d_ff``, as in the
            paper. With "2:8" there is nothing to choose and it must be None.
        pattern: "global", the ``k`` largest gates of a token, or "2:8", the 2 largest of each 8 neighbours.
        recompute: keep 2 values and an index for each selected channel in place of 4 and an index.

    Raises:
        ValueError: an argument that is not allowed.

    Example:
        >>> layer = MoCFeedForward(8, 24)
        >>> layer.k, layer(torch.randn(2, 3, 8)).shape
        (4, torch.Size([2, 3, 8]))
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        k: int | None = None,
        pattern: Pattern = "global",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        check_count("d_model", d_model, most=WIDEST)
        check_count("d_ff", d_ff, most=WIDEST)
        check_choice("pattern", pattern, Pattern)
        check_count("k", k, most=d_ff, optional=True)
        check("k", k, pattern == "global" or k is None, 'None with pattern="2:8", which keeps 2 of each 8 channels')
        check_flag("recompute", recompute)
        self.k = selected_channels(d_ff, k or max(1, min(d_model // 2, d_ff)), pattern)
        self.pattern: Pattern = pattern
        self.recompute = recompute
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) to (..., d_model)."""
        weights = (self.gate.weight, self.up.weight, self.down.weight)
        return moc_feed_forward(x, *weights, self.k, self.pattern, self.recompute)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the weights."""
        return f"k={self.k}, pattern={self.pattern!r}, recompute={self.recompute}"


class SelectedChannels(nn.Module):
    """A trained :class:`MoCFeedForward` for decoding: of the up and down weights it reads the selected channels only.

    The weights are copied once, the down projection transposed, so that a channel is a row. For up to ``most_tokens``
    tokens at a time it reads (d_ff + 2 K) d_model weights a token; for more, where selected rows would be read again
    for each token, it computes all channels as training does. With "2:8" on a GPU one kernel reads gate rows and the up
    rows of the two largest of each eight. It has no gradient, and computes in the dtype of the weights, under autocast
    too: casting them would read all of them.

    Args:
        layer: what to decode with.
        most_tokens: tokens of a call up to which rows are selected, >= 0.

    Raises:
        ValueError: an argument that is not allowed.

    Example:
        >>> layer = MoCFeedForward(8, 24)
        >>> x = torch.randn(1, 1, 8)
        >>> torch.testing.assert_close(SelectedChannels(layer)(x), layer(x).detach())
    """

    gate: Tensor
    up: Tensor
    down: Tensor

    def __init__(self, layer: MoCFeedForward, most_tokens: int = 4) -> None:
        super().__init__()
        check_instance("layer", layer, MoCFeedForward, "a MoCFeedForward")
        check_count("most_tokens", most_tokens, least=0)
        self.k = layer.k
        self.pattern: Pattern = layer.pattern
        self.most_tokens = most_tokens
        self.register_buffer("gate", layer.gate.weight.detach().clone())
        self.register_buffer("up", layer.up.weight.detach().clone())
        self.register_buffer("down", layer.down.weight.detach().T.contiguous())

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(..., d_model) to (..., d_model)."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(self.gate.dtype).contiguous()
            return self._decode(rows).view(x.shape).to(x.dtype)

    def _decode(self, rows: Tensor) -> Tensor:
        few = len(rows) <= self.most_tokens
        if few and self.pattern == "2:8" and len(self.gate) % _GROUP == 0:
            z, channels = _decoding().pairs_up(rows, self.gate, self.up)
        else:
            values, channels = select_channels(rows @ self.gate.T, self.k, self.pattern)
            if not few:
                hidden: Tensor = _kernels().activate(rows @ self.up.T, values, channels)[3]
                return hidden @ self.down
            z = _decoding().selected_up(rows, self.up, values, channels)
        y: Tensor = _decoding().selected_down(z, channels, self.down)
        return y
