"""Mixture-of-Channels against float64 written out, and what it keeps to the byte."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness.memory import kept_bytes
from lightning_eff.layers import MoCFeedForward, SelectedChannels, moc, moc_feed_forward
from lightning_eff.layers.moc import SHORT, select_channels
from lightning_eff.structure import find_blocks


def weights(d_model: int, d_ff: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((d_ff, d_model), (d_ff, d_model), (d_model, d_ff))
    return [torch.randn(shape, dtype=dtype).mul_(0.5).requires_grad_() for shape in shapes]


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def mask_of(gates: Tensor, k: int, pattern: str) -> Tensor:
    """Which gates are kept, one token after the other, by sorting."""
    mask = torch.zeros_like(gates, dtype=torch.bool)
    for row, chosen in zip(gates, mask, strict=True):
        groups = (
            [range(len(row))]
            if pattern == "global"
            else [range(i, min(i + 8, len(row))) for i in range(0, len(row), 8)]
        )
        for group in groups:
            best = sorted(group, key=lambda i: -row[i].item())[: k if pattern == "global" else 2]
            chosen[best] = True
    return mask


def reference(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, k: int, pattern: str) -> Tensor:
    """Plain autograd over a constant mask."""
    g = x @ gate.T
    mask = mask_of(g.detach().reshape(-1, g.shape[-1]), k, pattern).view(g.shape)
    return (F.silu(g) * (x @ up.T) * mask) @ down.T


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("pattern", "d_ff"), [("global", 24), ("2:8", 24), ("2:8", 21), ("2:8", 17), ("2:8", 3)])
def test_value_and_gradients_are_those_of_a_constant_mask(pattern, d_ff, recompute):
    x, W = inputs(3, 5, 8), weights(8, d_ff)
    target = torch.randn(3, 5, 8, dtype=torch.float64)
    expected = reference(x, *W, 3, pattern)
    wanted = torch.autograd.grad((expected * target).sum(), (x, *W))
    y = moc_feed_forward(x, *W, 3, pattern, recompute)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, right in zip(torch.autograd.grad((y * target).sum(), (x, *W)), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pattern", ["global", "2:8"])
def test_gradcheck(pattern, recompute):
    x, W = inputs(4, 6), weights(6, 12)
    assert torch.autograd.gradcheck(lambda *a: moc_feed_forward(*a, 5, pattern, recompute), (x, *W))


def test_all_channels_are_the_dense_network():
    x, (gate, up, down) = inputs(7, 8), weights(8, 24)
    dense = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    torch.testing.assert_close(moc_feed_forward(x, gate, up, down, 24), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient_and_the_others_theirs(frozen):
    tensors = [inputs(5, 8), *weights(8, 24)]
    everything = torch.autograd.grad(moc_feed_forward(*tensors, 4).sum(), tensors)
    tensors[frozen].requires_grad_(False)
    moc_feed_forward(*tensors, 4).sum().backward()
    for index, tensor in enumerate(tensors):
        assert tensor.grad is None if index == frozen else torch.equal(tensor.grad, everything[index])


@pytest.mark.parametrize(
    ("pattern", "recompute", "values"), [("global", False, 4), ("global", True, 2), ("2:8", False, 4), ("2:8", True, 2)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_keeps_what_the_formulas_say_to_the_byte(dtype, pattern, recompute, values):
    tokens, d_model, d_ff = 12, 16, 43
    layer = MoCFeedForward(d_model, d_ff, pattern=pattern, recompute=recompute).to(dtype)
    assert layer.k == (8 if pattern == "global" else 12)  # d/2; 2 * floor(43 / 8) and min(2, 3) of the rest
    x = torch.randn(tokens, d_model, dtype=dtype, requires_grad=True)
    kept = kept_bytes(lambda: layer(x), without=layer.parameters())
    width = dtype.itemsize
    assert kept == tokens * (d_model * width + layer.k * (values * width + 2))
    if dtype is torch.bfloat16:  # 10 K, or 6 K, bytes a token beside the input
        assert kept - tokens * d_model * 2 == tokens * layer.k * (6 if recompute else 10)


def test_a_dense_network_keeps_four_times_its_channels():
    gate, up, down = (nn.Linear(a, b, bias=False, dtype=torch.bfloat16) for a, b in ((16, 43), (16, 43), (43, 16)))
    x = torch.randn(12, 16, dtype=torch.bfloat16, requires_grad=True)
    parameters = [layer.weight for layer in (gate, up, down)]
    kept = kept_bytes(lambda: down(F.silu(gate(x)) * up(x)), without=parameters)
    assert kept == 12 * (16 * 2 + 8 * 43)


def test_indices_of_many_channels_have_32_bits():
    for d_ff, bits in ((SHORT, 2), (SHORT + 8, 4)):
        x, W = inputs(2, 2, dtype=torch.float32), weights(2, d_ff, torch.float32)
        kept = kept_bytes(lambda W=W, x=x: moc_feed_forward(x, *W, 4), without=W)
        assert kept == x.nbytes + 2 * 4 * (4 * 4 + bits)
    with torch.no_grad():  # the last channel is the largest gate of both tokens, and has an index beyond int16
        W[0].zero_()[-1] = x.sum(0)
        x[1] = x[0]
    (grad,) = torch.autograd.grad(moc_feed_forward(x, *W, 1).sum(), W[0])
    assert grad.abs().sum(1).nonzero().flatten().tolist() == [SHORT + 7]


def test_under_autocast_all_is_in_bfloat16_and_gradients_are_as_the_weights():
    x, W = inputs(6, 8, dtype=torch.float32), weights(8, 24, torch.float32)
    seen = []

    def pack(tensor):
        seen.append(tensor.dtype)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = moc_feed_forward(x, *W, 4)
    assert y.dtype is torch.bfloat16
    assert set(seen) == {torch.bfloat16, torch.int16}
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, *W)]
    target = torch.randn(6, 8).bfloat16()
    wanted = torch.autograd.grad(moc_feed_forward(*narrow, 4), narrow, target)
    for got, right in zip(torch.autograd.grad(y, (x, *W), target), wanted, strict=True):
        assert got.dtype is torch.float32
        assert torch.equal(got, right.float())


def test_a_second_derivative_is_refused():
    x, W = inputs(4, 8), weights(8, 24)
    (grad,) = torch.autograd.grad(moc_feed_forward(x, *W, 4).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_strides_do_not_matter():
    x, W = inputs(3, 5, 8), weights(8, 24)
    strange = [tensor.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for tensor in (x, *W)]
    assert not any(tensor.is_contiguous() for tensor in strange)
    target = torch.randn(5, 8, 3, dtype=torch.float64).permute(2, 0, 1)
    wanted = torch.autograd.grad(moc_feed_forward(x, *W, 4), (x, *W), target.contiguous())
    for got, right in zip(torch.autograd.grad(moc_feed_forward(*strange, 4), strange, target), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


def test_no_tokens_are_no_trouble():
    x, W = inputs(0, 8), weights(8, 24)
    y = moc_feed_forward(x, *W, 4)
    y.sum().backward()
    assert y.shape == (0, 8)
    assert W[0].grad.abs().sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_and_under_checkpointing_the_gradients_are_the_same(recompute):
    layer = MoCFeedForward(8, 24, recompute=recompute)
    x = torch.randn(4, 8)
    layer(x).square().sum().backward()
    wanted = [parameter.grad for parameter in layer.parameters()]
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for run in (compiled, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        run(x).square().sum().backward()
        owner = compiled if run is compiled else layer
        for parameter, right in zip(owner.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, right)


def test_its_matrices_have_the_role_of_a_feed_forward_network():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.mlp = MoCFeedForward(8, 24)

    blocks = find_blocks(nn.ModuleList(Block() for _ in range(2)))
    roles = {matrix.name: matrix.role for matrix in blocks[0].matrices}
    assert {name: role for name, role in roles.items() if ".mlp." in name} == {
        f"0.mlp.{name}.weight": "ffn" for name in ("gate", "up", "down")
    }


def test_bad_arguments_are_named():
    for arguments, words in (
        ({"d_model": 0}, "d_model=0"),
        ({"k": 25}, "k=25 is not allowed: it must be an integer from 1 to 24"),
        ({"k": 4, "pattern": "2:8"}, 'k=4 is not allowed: it must be None with pattern="2:8"'),
        ({"pattern": "2:4"}, "pattern='2:4'"),
        ({"recompute": 1}, "recompute=1"),
    ):
        with pytest.raises(ValueError, match=words):
            MoCFeedForward(**{"d_model": 8, "d_ff": 24, **arguments})
    with pytest.raises(ValueError, match=r"x=\(4, 7\) is not allowed: it must be a tensor \(\.\.\., 8\)"):
        MoCFeedForward(8, 24)(torch.ones(4, 7))


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize(("pattern", "d_ff"), [("global", 24), ("2:8", 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_with_the_selected_rows_is_the_layer(dtype, pattern, d_ff, tokens):
    torch.manual_seed(0)
    layer = MoCFeedForward(16, d_ff, pattern=pattern).to(dtype)
    x = torch.randn(tokens, 1, 16, dtype=dtype)
    close = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(SelectedChannels(layer)(x), layer(x).detach(), **close)


@pytest.mark.parametrize(("pattern", "d_ff"), [("global", 24), ("2:8", 24), ("2:8", 21)])
def test_decoding_reads_the_selected_rows_only(pattern, d_ff):
    torch.manual_seed(0)
    layer, x = MoCFeedForward(16, d_ff, pattern=pattern), torch.randn(1, 1, 16)
    decoder, wanted = SelectedChannels(layer), layer(x).detach()
    channels = select_channels((x @ layer.gate.weight.T).view(1, d_ff), layer.k, pattern)[1]
    others = torch.ones(d_ff, dtype=torch.bool).index_fill(0, channels.flatten(), False)
    assert 0 < others.sum() == d_ff - layer.k
    for rows in (decoder.up, decoder.down):
        rows[others] = float("nan")
    torch.testing.assert_close(decoder(x), wanted)


def test_decoding_under_autocast_is_in_the_dtype_of_the_weights():
    torch.manual_seed(0)
    layer = MoCFeedForward(16, 24)
    x = torch.randn(1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = SelectedChannels(layer)(x.bfloat16())
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, layer(x.bfloat16().float()).detach().bfloat16())


@pytest.mark.parametrize("pattern", ["global", "2:8"])
def test_the_selection_on_a_cpu_is_topk_s_where_there_are_ties_too(pattern, monkeypatch):
    torch.manual_seed(0)
    plain, ties = torch.randn(40, 37), torch.randint(3, (40, 37)).float()
    mixed = torch.cat([plain, ties])
    mixed[3, 5], mixed[4, :8], mixed[60, 9:11] = float("nan"), float("-inf"), float("inf")
    # One group that has too many and one that has none: together as many as there should be.
    evened = torch.cat([torch.tensor([[1.0] * 4 + [0.0] * 4]), torch.full((1, 8), float("nan"))], dim=1)
    for gates in (plain, ties, mixed, evened):
        k = min(9, gates.shape[1] - 1)
        fast, where = select_channels(gates, k, pattern)
        with monkeypatch.context() as patch:
            patch.setattr(moc, "_by_numpy", lambda gates: False)
            slow, _ = select_channels(gates, k, pattern)
        torch.testing.assert_close(fast.sort().values, slow.sort().values, rtol=0, atol=0, equal_nan=True)
        if pattern == "2:8":
            pairs = (where[:, : where.shape[1] - (gates.shape[1] % 8 > 0) * 2] // 8).sort().values
            assert torch.equal(pairs, torch.arange(gates.shape[1] // 8).repeat_interleave(2).expand_as(pairs))
        assert all(len(set(row.tolist())) == len(row) for row in where)


def test_ties_and_values_that_are_no_numbers_select_as_many_as_any():
    gates = torch.tensor([[1.0] * 12, [float("nan")] * 3 + [0.0] * 9, [-float("inf")] * 12])
    for pattern, k in (("global", 5), ("2:8", 4)):
        values, channels = select_channels(gates, 5, pattern)
        assert values.shape == channels.shape == (3, k)
        assert all(len(set(row.tolist())) == k and row.max() < 12 for row in channels)
