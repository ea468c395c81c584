"""The largest attention logit of a forward pass, by structure: whatever module it is that attends."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_eff.training.dtensor import local
from lightning_eff.training.uncompiled import Uncompiled

MOST_LOGITS = 2**22  # that are computed once more for one attention: of longer ones some rows of queries are taken


class AttentionWatch:
    """Sees the logits of every attention that is called between ``begin`` and ``end``, in this thread.

    What counts as one, whoever calls it: ``F.scaled_dot_product_attention``, whose logits are computed once more, of
    long sequences for some queries spread over them; ``nn.MultiheadAttention``, likewise; and a softmax over the last
    dimension of four, or of three where the last two are equal, as attention that is written out has it. Masked
    places do not count. Not seen: kernels of other packages, FlexAttention, queries and keys of different numbers of
    dimensions, and what a backward pass computes again.

    Nothing waits for the device. A compiled module runs uncompiled in between.

    Example:
        >>> watch, x = AttentionWatch(), torch.eye(4).reshape(1, 1, 4, 4)
        >>> watch.begin()
        >>> _ = torch.nn.functional.scaled_dot_product_attention(6 * x, x, x)
        >>> watch.end()
        >>> watch.take()
        tensor(3.)
    """

    def __init__(self) -> None:
        self._largest: Tensor | None = None
        self._open: ExitStack | None = None
        self._uncompiled = Uncompiled()

    def begin(self) -> None:
        """Look from now on."""
        if self._open is None:
            self._open = ExitStack()
            self._uncompiled.begin()
            self._open.callback(self._uncompiled.end)
            self._open.enter_context(_Mode(self))

    def end(self) -> None:
        """Look no longer."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def note(self, logits: Tensor) -> None:
        """These logits are some of those that are looked at."""
        largest = logits.detach().max().float()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def take(self) -> Tensor | None:
        """The largest logit since the last call, 0-d; None: there was no attention."""
        largest, self._largest = self._largest, None
        return largest

    def __getstate__(self) -> dict[str, Any]:
        return {"_largest": None, "_open": None, "_uncompiled": Uncompiled()}


class _Mode(TorchFunctionMode):
    def __init__(self, watch: AttentionWatch) -> None:
        super().__init__()
        self.watch = watch

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        look = _LOOKS.get(func)
        if look is not None:
            with torch.no_grad():
                look(self.watch, *args, **kwargs)
        return func(*args, **kwargs)


def _of_softmax(watch: AttentionWatch, input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> None:
    scores = local(input)
    last = dim in (-1, scores.ndim - 1)
    if last and scores.numel() and (scores.ndim == 4 or (scores.ndim == 3 and scores.shape[-1] == scores.shape[-2])):
        watch.note(scores)


def _of_sdpa(
    watch: AttentionWatch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> None:
    if not query.is_nested and query.ndim == key.ndim:  # else neither heads nor queries are where they are looked for
        mask = None if attn_mask is None else local(attn_mask)
        _note_products(watch, local(query), local(key), mask, is_causal, scale)


def _of_mha(watch: AttentionWatch, *args: Any, **kwargs: Any) -> None:
    """The projections once more, as `F.multi_head_attention_forward` makes them from the same arguments."""
    given = _MHA.bind(*args, **kwargs).arguments
    query, key, heads = given["query"], given["key"], given["num_heads"]
    width = query.shape[-1]
    if given.get("use_separate_proj_weight"):
        weights = [given["q_proj_weight"], given["k_proj_weight"]]
    else:
        weights = list(given["in_proj_weight"].chunk(3))[:2]
    bias = given.get("in_proj_bias")
    biases = [None, None] if bias is None else list(bias.chunk(3))[:2]
    # Autocast would keep casts of weights that are made here, without a gradient, for the model's own product.
    with torch.autocast(query.device.type, enabled=False):
        q, k = (
            F.linear(x.to(weight.dtype), weight, b).reshape(x.shape[0], -1, heads, width // heads).permute(1, 2, 0, 3)
            for x, weight, b in zip((query, key), weights, biases, strict=True)
        )  # (batch, heads, length, width of a head)
    mask = _added(given.get("attn_mask"), q)
    if mask is not None and mask.ndim == 3:  # (batch * heads, queries, keys)
        mask = mask.reshape(-1, heads, *mask.shape[1:])
    padding = _added(given.get("key_padding_mask"), q)
    if padding is not None:
        padding = padding.reshape(q.shape[0], 1, 1, -1)
        mask = padding if mask is None else mask + padding
    _note_products(watch, q, k, mask, False, None)


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask of `nn.MultiheadAttention`, whose True is a place that is left out, as what is added to the logits."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -inf)


def _note_products(
    watch: AttentionWatch, q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> None:
    length, width, keys = q.shape[-2], q.shape[-1], k.shape[-2]
    heads_of_batch = q.numel() // max(1, length * width)
    if not (heads_of_batch and length and keys):
        return
    count = min(length, max(1, MOST_LOGITS // (heads_of_batch * keys)))
    # The last of each of so many parts of the sequence: under a causal mask they see the most keys.
    rows = (torch.arange(1, count + 1, device=q.device) * length) // count - 1
    q = q if count == length else q.index_select(-2, rows)
    with torch.autocast(q.device.type, enabled=False):
        if q.ndim > 3 and q.shape[-3] != k.shape[-3]:  # several heads of queries to one of keys
            groups = q.reshape(*k.shape[:-2], -1, width)
            logits = (groups @ k.to(q.dtype).transpose(-1, -2)).reshape(*q.shape[:-1], keys)
        else:
            logits = q @ k.to(q.dtype).transpose(-1, -2)
    logits = logits * (width**-0.5 if scale is None else scale)
    if is_causal:
        logits.masked_fill_(torch.arange(keys, device=q.device) > rows[:, None], -inf)
    if mask is not None:
        whole = mask.expand(*mask.shape[:-2], length, keys) if mask.shape[-2] != length else mask
        whole = whole if count == length else whole.index_select(-2, rows)
        logits = logits.masked_fill(~whole, -inf) if whole.dtype == torch.bool else logits + whole
    watch.note(logits)


_MHA = inspect.signature(F.multi_head_attention_forward)

_LOOKS: dict[Any, Any] = {
    F.scaled_dot_product_attention: _of_sdpa,
    F.multi_head_attention_forward: _of_mha,
    F.softmax: _of_softmax,
    torch.softmax: _of_softmax,
    Tensor.softmax: _of_softmax,
}
