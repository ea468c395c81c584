"""Which attention is seen, and that the logit is the one that the softmax gets."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.operators import OperatorCounter
from lightning_eff.callbacks.training_guard import attention
from lightning_eff.callbacks.training_guard.attention import AttentionWatch


def _seen(call) -> float | None:
    watch = AttentionWatch()
    watch.begin()
    try:
        call()
    finally:
        watch.end()
    largest = watch.take()
    return None if largest is None else largest.item()


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 12, 8).unbind()
    return q, k, v


def _logits(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def test_sdpa(qkv):
    q, k, v = qkv
    assert _seen(lambda: F.scaled_dot_product_attention(q, k, v)) == pytest.approx(_logits(q, k).max().item())
    doubled = _seen(lambda: F.scaled_dot_product_attention(q, k, v, scale=2.0))
    assert doubled == pytest.approx(_logits(q, k).max().item() * 2 * math.sqrt(8))


def test_keys_of_fewer_dimensions_are_passed_by(qkv):
    q, k, v = qkv
    assert _seen(lambda: F.scaled_dot_product_attention(q, k[0, 0], v[0, 0])) is None


@pytest.mark.parametrize("kind", ["causal", "bool", "float", "one row for all"])
def test_what_the_mask_leaves_out_does_not_count(qkv, kind):
    q, k, v = qkv
    keep = torch.ones(12, 12, dtype=torch.bool).tril()
    k[:, :, -1] = 100 * q[:, :, 0]  # the last key would be the largest by far for the first query
    if kind == "one row for all":
        keep = (torch.arange(12) < 11)[None]
    largest = _logits(q, k).masked_fill(~keep, -math.inf).max().item()
    mask = {"bool": keep, "float": torch.zeros(12, 12).masked_fill(~keep, -math.inf)}.get(kind)
    if kind == "causal":
        seen = _seen(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    else:
        seen = _seen(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=keep if mask is None else mask))
    assert seen == pytest.approx(largest)
    assert largest < _logits(q, k).max().item()


def test_several_heads_of_queries_to_one_of_keys(qkv):
    q, k, v = qkv
    k, v = k[:, :2], v[:, :2]
    reference = _logits(q, k.repeat_interleave(2, 1)).max().item()
    assert _seen(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)) == pytest.approx(reference)


def test_of_long_sequences_some_queries_are_taken(qkv, monkeypatch):
    q, k, v = qkv
    monkeypatch.setattr(attention, "MOST_LOGITS", 2 * 4 * 12 * 3)  # three of the twelve
    keep = torch.ones(12, 12, dtype=torch.bool).tril()
    reference = _logits(q, k).masked_fill(~keep, -math.inf)[..., [3, 7, 11], :].max().item()
    assert _seen(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)) == pytest.approx(reference)
    assert _seen(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=keep)) == pytest.approx(reference)


@pytest.mark.parametrize("write", [torch.softmax, F.softmax, Tensor.softmax])
def test_attention_that_is_written_out(qkv, write):
    q, k, _ = qkv
    scores = _logits(q, k)
    assert _seen(lambda: write(scores, dim=-1)) == pytest.approx(scores.max().item())
    assert _seen(lambda: write(scores[0], dim=-1)) == pytest.approx(scores[0].max().item())


def test_other_softmaxes_are_none():
    assert _seen(lambda: torch.randn(8, 10).softmax(-1)) is None  # classes, or a router's experts
    assert _seen(lambda: torch.randn(2, 8, 4).softmax(-1)) is None
    assert _seen(lambda: torch.randn(2, 4, 8, 8).softmax(1)) is None


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 6}], ids=["one width", "others for keys"])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(need_weights, widths, masked):
    """Against its own weights: with the same mask, the logits' largest is where the softmax says."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
    nn.init.normal_(module.in_proj_bias)
    query, other = torch.randn(3, 5, 8), torch.randn(3, 7, widths.get("kdim", 8))
    masks = {}
    if masked:
        padding = torch.zeros(3, 7, dtype=torch.bool)
        padding[1, 4:] = True
        masks = {"key_padding_mask": padding, "attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(3)}
    weights = module.in_proj_weight.chunk(3) if not widths else (module.q_proj_weight, module.k_proj_weight)
    biases = module.in_proj_bias.chunk(3)
    q, k = (
        F.linear(x, weights[i], biases[i]).unflatten(-1, (2, 4)).transpose(1, 2) for i, x in enumerate((query, other))
    )
    logits = _logits(q, k)
    if masked:
        logits = logits.masked_fill(masks["attn_mask"], -math.inf).masked_fill(padding[:, None, None], -math.inf)
    seen = _seen(lambda: module(query, other, other, need_weights=need_weights, **masks))
    assert seen == pytest.approx(logits.max().item(), rel=1e-5)


def test_a_transformer_layer_of_torch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    assert _seen(lambda: layer(torch.randn(5, 3, 8))) is not None


def test_results_are_the_same_and_nothing_waits(qkv):
    plain = F.scaled_dot_product_attention(*qkv)
    watch = AttentionWatch()
    watch.begin()
    watch.begin()  # of a step whose batches are accumulated
    with OperatorCounter() as counter:
        seen = F.scaled_dot_product_attention(*qkv)
    watch.end()
    watch.end()
    assert torch.equal(plain, seen)
    assert counter.host_syncs == 0
    assert watch.take() is not None
    assert watch.take() is None


def test_autocast_keeps_nothing_of_it(qkv):
    """A weight that is cast within `no_grad` would stay cast without a gradient for the rest of the forward pass."""
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(3, 5, 8)
    watch = AttentionWatch()
    watch.begin()
    with torch.autocast("cpu", torch.bfloat16):
        module(x, x, x)[0].sum().backward()
    watch.end()
    assert watch.take() is not None
    assert module.in_proj_weight.grad is not None
    assert module.in_proj_weight.grad.abs().sum() > 0


def test_a_compiled_module_is_seen():
    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    module, x = torch.compile(Attends(), backend="eager"), torch.randn(1, 2, 4, 8)
    module(x)
    assert _seen(lambda: module(x)) == pytest.approx(_logits(x, x).max().item(), rel=1e-5)
