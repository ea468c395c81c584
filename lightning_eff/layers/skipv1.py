"""SkipV1Former: from the second layer on, half of the value heads are those of the first layer.

Layers 2 to L project half of the value heads; the other half is the second half of layer 1's value heads at the same
positions. Queries, keys and the output projection are as they were, the layer's own heads come first. A cache holds
L K and (L + 1) / 2 V values in place of L K and L V: a quarter less, times (L - 1) / L.

The values of layer 1 travel to all later layers: as an argument (`SkipV1Attention`), or beside the model's own code
(`FirstValue`, `SkippedValue`, which `replace_layers` puts where value projections were).

Source: "SkipV1Former: Value-Skipping Transformers", arXiv 2510.16807.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_eff.arguments import check, check_count, check_flag, check_instance, check_number
from lightning_eff.layers.autograd import Marked, in_backward, take_weights
from lightning_eff.layers.moc import WIDEST


def check_heads(name: str, value: int) -> None:
    """A number of value heads of which half can be skipped."""
    check(name, value, value % 2 == 0, "even: half of the value heads come from the first layer")


class LayerCache(NamedTuple):
    """One layer's part of a :class:`SkipV1Cache`.

    Attributes:
        keys: (batch, kv heads, max_length, head_dim).
        own: (batch, kv heads / 2, max_length, head_dim), the layer's own values; of layer 1 the first half.
        shared: the same shape, layer 1's second half: one buffer for all layers.
        length: positions that are filled.
    """

    keys: Tensor
    own: Tensor
    shared: Tensor
    length: int


class SkipV1Cache:
    """Keys and values of the positions so far: own values of every layer, and one buffer with layer 1's second half.

    Args:
        n_layer: layers, >= 1.
        batch_size: sequences, >= 1.
        max_length: positions that there is room for, >= 1.
        n_kv_head: key and value heads, even.
        head_dim: channels of a head.
        like: a tensor whose dtype and device the buffers get; None: float32 on the CPU.

    Raises:
        ValueError: an argument that is not allowed.

    Example:
        >>> cache = SkipV1Cache(n_layer=3, batch_size=1, max_length=10, n_kv_head=2, head_dim=4)
        >>> cache.nbytes  # 4 bytes, 10 positions, 3 layers of 8 keys and (3 + 1) / 2 of 8 values
        1600
    """

    def __init__(
        self,
        n_layer: int,
        batch_size: int,
        max_length: int,
        n_kv_head: int,
        head_dim: int,
        like: Tensor | None = None,
    ) -> None:
        for name, value in (("n_layer", n_layer), ("batch_size", batch_size), ("max_length", max_length)):
            check_count(name, value, most=WIDEST)
        check_count("n_kv_head", n_kv_head, most=WIDEST)
        check_heads("n_kv_head", n_kv_head)
        check_count("head_dim", head_dim, most=WIDEST)
        check_instance("like", like, Tensor, "a tensor", optional=True)
        like = torch.empty(0) if like is None else like
        shape = (batch_size, n_kv_head // 2, max_length, head_dim)
        self.keys = like.new_zeros((n_layer, batch_size, n_kv_head, max_length, head_dim))
        self.own = like.new_zeros((n_layer, *shape))
        self.shared = like.new_zeros(shape)
        self.length = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.keys.nbytes + self.own.nbytes + self.shared.nbytes

    def layer(self, index: int) -> LayerCache:
        """What the attention of a layer takes."""
        return LayerCache(self.keys[index], self.own[index], self.shared, self.length)

    def advance(self, positions: int) -> None:
        """Count positions that all layers have written."""
        self.length += positions


class SkipV1Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions, half of whose values come from the first layer.

    ``forward(x, v1)`` gives the output and what the next layer takes as ``v1``. It is an ordinary argument, so that
    activation checkpointing, FSDP2 and a pipeline see it; in a pipeline it adds half of a hidden state (times
    ``n_kv_head / n_head``) to what is sent.

    Args:
        d_model: width of the model.
        n_head: query heads; divides ``d_model`` into heads of an even number of channels.
        n_kv_head: key and value heads, even, a divisor of ``n_head``. None: ``n_head``.
        first: whether it is the first layer, which has all value heads of its own.
        theta: base of the rotary positions, > 0; None for none.

    Raises:
        ValueError: an argument that is not allowed: odd numbers of value heads above all.

    Example:
        >>> layers = [SkipV1Attention(16, 4, first=index == 0) for index in range(3)]
        >>> x, v1 = torch.randn(2, 5, 16), None
        >>> for layer in layers:
        ...     y, v1 = layer(x, v1)
        ...     x = x + y
        >>> v1.shape  # the second half of the first layer's value heads
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_kv_head: int | None = None,
        first: bool = False,
        theta: float | None = 10000.0,
    ) -> None:
        super().__init__()
        check_count("d_model", d_model, most=WIDEST)
        check_count("n_head", n_head, most=d_model)
        check("n_head", n_head, d_model % (2 * n_head) == 0, f"half of a divisor of d_model={d_model}")
        check_count("n_kv_head", n_kv_head, most=n_head, optional=True)
        heads = n_head if n_kv_head is None else n_kv_head
        check_heads("n_head" if n_kv_head is None else "n_kv_head", heads)
        check("n_kv_head", heads, n_head % heads == 0, f"a divisor of n_head={n_head}")
        check_flag("first", first)
        check_number("theta", theta, above=0, optional=True)
        self.n_head = n_head
        self.n_kv_head = heads
        self.head_dim = d_model // n_head
        self.first = first
        self.theta = theta
        width = heads * self.head_dim
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, width, bias=False)
        self.value = nn.Linear(d_model, width if first else width // 2, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, v1: Tensor | None = None, cache: LayerCache | None = None) -> tuple[Tensor, Tensor]:
        """Attend to the positions so far.

        Args:
            x: (batch, time, d_model).
            v1: (batch, time, n_kv_head / 2 * head_dim), what the layer before gave; None in the first layer.
            cache: of this layer, to be gone on with: ``x`` are the positions that follow, and are written into it.

        Returns:
            The output, (batch, time, d_model), and ``v1`` for the next layer.

        Raises:
            ValueError: ``v1`` is missing, is not wanted or has another shape; the cache is too short.
        """
        batch, time, _ = x.shape
        q = self._heads(self.query(x), self.n_head)
        k = self._heads(self.key(x), self.n_kv_head)
        value = self.value(x)
        half = self.n_kv_head * self.head_dim // 2
        if self.first:
            if v1 is not None:
                raise ValueError(f"v1 of shape {tuple(v1.shape)} is not allowed: it must be None in the first layer")
            value, v1 = value.split(half, dim=-1)
            v1 = v1.contiguous()  # a pipeline sends nothing else
        expected = (batch, time, half)
        if v1 is None or v1.shape != expected:
            shape = None if v1 is None else tuple(v1.shape)
            raise ValueError(f"v1={shape} is not allowed: it must be the first layer's, of shape {expected}")
        own, shared = self._heads(value, self.n_kv_head // 2), self._heads(v1, self.n_kv_head // 2)
        start = 0 if cache is None else cache.length
        if self.theta is not None:
            cos, sin = self._angles(start, time, x)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if cache is not None:
            k, own, shared = self._through(cache, k, own, shared)
        # Each half of the heads by itself: the first layer's values are read where they are, and not copied.
        (q_own, q_shared), (k_own, k_shared) = q.chunk(2, dim=1), k.chunk(2, dim=1)
        y = torch.cat([self._attend(q_own, k_own, own, start), self._attend(q_shared, k_shared, shared, start)], dim=1)
        return self.out(y.transpose(1, 2).reshape(batch, time, -1)), v1

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.view(*x.shape[:2], count, self.head_dim).transpose(1, 2)

    def _angles(self, start: int, time: int, x: Tensor) -> tuple[Tensor, Tensor]:
        # In float32 whatever the dtype: bfloat16 cannot tell position 257 from 256.
        assert self.theta is not None
        channel = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=x.device)
        position = torch.arange(start, start + time, dtype=torch.float32, device=x.device)
        angles = torch.outer(position, self.theta ** (-channel / self.head_dim))
        return angles.cos(), angles.sin()

    def _through(self, cache: LayerCache, *new: Tensor) -> list[Tensor]:
        """Write the new positions behind those that are there; give all of them."""
        end = cache.length + new[0].shape[2]
        room = cache.keys.shape[2]
        check("cache", f"{room} positions", end <= room, f"long enough for {end} positions")
        for buffer, values in zip((cache.keys, cache.own, cache.shared), new, strict=True):
            buffer[:, :, cache.length : end] = values
        return [buffer[:, :, :end] for buffer in (cache.keys, cache.own, cache.shared)]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        time, mask = q.shape[2], None
        if start and time > 1:  # several positions behind a prefix: the mask that `is_causal` would make is another
            mask = torch.ones(time, start + time, dtype=torch.bool, device=q.device).tril(start)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=start == 0 and time > 1, enable_gqa=grouped
        )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


# --- beside a model's own code ---------------------------------------------------------------------------------------


class _Waiting:
    """A forward pass whose backward pass has not come through layer 1's values; its node of autograd holds it."""

    done = False


class _Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v1: Tensor, waiting: _Waiting) -> Tensor:
        ctx.waiting = waiting
        return v1.view_as(v1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.waiting.done = True
        return grad, None


class Relay:
    """Layer 1's values on their way to the later layers, from one forward pass to the next.

    A copy of the model has one of its own, and what lies in it is neither copied nor pickled.
    """

    def __init__(self) -> None:
        self._v1: Tensor | None = None
        self._waiting: weakref.WeakSet[_Waiting] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Relay:
        memo[id(self)] = other = Relay()
        return other

    def __reduce__(self) -> Any:
        return Relay, ()

    def give(self, v1: Tensor) -> None:
        """From the first layer."""
        if v1.requires_grad and not torch.compiler.is_compiling():
            waiting = _Waiting()
            v1 = _Mark.apply(v1, waiting)  # type: ignore[no-untyped-call]
            if not in_backward():
                self._waiting.add(waiting)
        self._v1 = v1

    def take(self, x: Tensor) -> Tensor:
        """To a later layer."""
        if self._v1 is None or self._v1.shape[:-1] != x.shape[:-1]:
            found = "there are none" if self._v1 is None else f"those there are have shape {tuple(self._v1.shape)}"
            raise RuntimeError(
                f"the first layer's values for an input of shape {tuple(x.shape)} are wanted, and {found}: the layers"
                " must run in their order, on the same positions"
            )
        if not torch.compiler.is_compiling() and in_backward():
            several = sum(not waiting.done for waiting in self._waiting) > 1
            if several:
                raise RuntimeError(
                    "activation checkpointing runs a layer once more while several forward passes wait for their"
                    " backward pass, and it is not known whose values the layer would take: run each backward pass"
                    " before the next forward pass, or write the model with SkipV1Attention, which takes v1"
                )
        return self._v1


class FirstValue(Marked, nn.Linear):
    """The value projection of the first layer, which hands its second half on. Weights and names are ``nn.Linear``'s.

    Args:
        linear: the value projection whose weights it takes.
        relay: shared with the :class:`SkippedValue` of the later layers.
        width: how many of its last outputs are values, where queries and keys come before them; None: all.

    Raises:
        ValueError: an argument that is not allowed.
    """

    def __init__(self, linear: nn.Linear, relay: Relay, width: int | None = None) -> None:
        check_instance("linear", linear, nn.Linear, "an nn.Linear")
        check_instance("relay", relay, Relay, "a Relay")
        check_count("width", width, most=linear.out_features, optional=True)
        take_weights(self, linear)
        self.relay = relay
        self.width = width or self.out_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        value = F.linear(x, self.weight, self.bias)
        self.relay.give(value[..., self.out_features - self.width // 2 :])
        return value


class SkippedValue(Marked, nn.Linear):
    """The value projection of a later layer: its own half of the heads, then the first layer's second half.

    ``weight`` (and ``bias``) have half of the values' rows that they had; the output is as wide as it was.

    Args:
        linear: the value projection that it takes the place of.
        relay: that of the :class:`FirstValue`.
        heads: value heads, even.
        mean: own heads begin as the mean of each two consecutive heads, for a model that has been trained; else as
            the first half of the heads, which are as they were initialised.
        width: how many of its last outputs are values, where queries and keys come before them; None: all.

    Raises:
        ValueError: an argument that is not allowed.
    """

    def __init__(
        self, linear: nn.Linear, relay: Relay, heads: int, mean: bool = False, width: int | None = None
    ) -> None:
        check_instance("linear", linear, nn.Linear, "an nn.Linear")
        check_instance("relay", relay, Relay, "a Relay")
        check_count("width", width, most=linear.out_features, optional=True)
        width = width or linear.out_features
        check_count("heads", heads, most=width)
        check_heads("heads", heads)
        check("heads", heads, width % heads == 0, f"a divisor of the width, {width}")
        check_flag("mean", mean)
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.relay = relay
        self.weight = _halved(linear.weight, heads, mean, width)
        self.bias = None if linear.bias is None else _halved(linear.bias, heads, mean, width)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        own = F.linear(x, self.weight, self.bias)
        return torch.cat([own, self.relay.take(x).to(own.dtype)], dim=-1)


def _halved(parameter: Tensor, heads: int, mean: bool, width: int) -> nn.Parameter:
    """With half of the heads in the last rows, the values'."""
    others, values = parameter.detach()[:-width], parameter.detach()[-width:]
    rows = values.reshape(heads // 2, 2, -1, *parameter.shape[1:])
    own = rows.mean(1) if mean else rows.flatten(0, 1)[: heads // 2]
    return nn.Parameter(torch.cat([others, own.flatten(0, 1)]), requires_grad=parameter.requires_grad)
