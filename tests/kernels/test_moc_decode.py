"""Mixture-of-Channels' decoding kernels against plain torch, and a whole network through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_eff.kernels.moc_decode import pairs_up, reference, selected_down, selected_up
from lightning_eff.layers import MoCFeedForward, SelectedChannels
from tests.kernels.memory import Poisoned, random_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 8, 1), (3, 63, 40, 9), (1, 300, 80, 67)]  # tokens, width, channels, K
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-1},  # a sum of hundreds of products, some of them cancelling
    torch.float16: {"rtol": 3e-3, "atol": 3e-2},
}


def given(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    tokens, width, d_ff, k = shape
    x, gate, up = (random_like((n, width), dtype, device, seed) for seed, n in enumerate((tokens, d_ff, d_ff)))
    values, channels = random_like((tokens, d_ff), dtype, device, 3).topk(k, sorted=False)
    return x, gate, up, values, channels


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_with_selected_rows_are_the_references(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, _, up, values, channels = given(shape, dtype, device)
    margins = [Poisoned(tensor, shift) for shift, tensor in enumerate((x, up, values))]
    z = selected_up(*(margin.tensor for margin in margins), channels)
    torch.testing.assert_close(z, reference.selected_up(x, up, values, channels), **CLOSE[dtype])
    y = selected_down(values, channels, margins[1].tensor)
    wide = reference.selected_down(values.double(), channels, up.double())
    torch.testing.assert_close(y, wide.to(dtype), **CLOSE[dtype])
    assert torch.equal(selected_down(values, channels, up), y)  # the same bits every time, at any alignment
    for margin in margins:
        margin.check()


def test_few_columns_share_the_rows_among_more_programs(triton_kernels: None, device: torch.device) -> None:
    from lightning_eff.kernels.moc_decode import kernel

    down = random_like((400, 8), torch.float32, device)
    z, channels = random_like((1, 400), torch.float32, device, 1).topk(333, sorted=False)
    assert -(-333 // kernel.DOWN_ROWS) == 11  # programs, the last of them with less than its share
    torch.testing.assert_close(selected_down(z, channels, down), z @ down[channels[0]], rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_two_largest_of_eight_and_their_products(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    x, gate, up, _, _ = given(shape, dtype, device)
    z, channels = pairs_up(x, gate, up)
    groups = channels.view(len(x), -1, 2) // 8
    assert torch.equal(groups, torch.arange(len(gate) // 8, device=device)[:, None].expand_as(groups))
    assert all(len(set(row.tolist())) == row.numel() for row in channels)
    gates = x.double() @ gate.double().T
    chosen = gates.gather(-1, channels)
    best = gates.view(len(x), -1, 8).topk(2, dim=-1).values
    torch.testing.assert_close(chosen.view_as(best).sum(-1), best.sum(-1), **CLOSE[dtype])
    torch.testing.assert_close(z, reference.selected_up(x, up, chosen.to(dtype), channels), **CLOSE[dtype])
    if dtype is torch.float32:
        assert torch.equal(channels.sort(-1).values, reference.pairs_up(x, gate, up)[1].sort(-1).values)


@pytest.mark.usefixtures("triton_kernels")
def test_what_is_no_number_is_the_largest_and_what_is_infinitely_small_is_not_taken_twice(device: torch.device) -> None:
    nan, inf = float("nan"), float("inf")
    gate = torch.tensor([[1.0, nan, 3, 2, 0, 0, 0, 0], [-inf] * 8, [-inf] * 7 + [0.0], [inf, 1, 2, inf, 0, 0, 0, 0]])
    x, gate = torch.ones(1, 1, device=device), gate.view(32, 1).to(device)
    z, channels = pairs_up(x, gate, torch.ones_like(gate))
    found = [set(pair) for pair in (channels.view(4, 2) % 8).tolist()]
    assert found[0] == {1, 2}
    assert [len(pair) for pair in found] == [2] * 4
    assert 7 in found[2]
    assert found[3] == {0, 3}
    assert z.view(4, 2)[0].isnan().sum() == 1


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize(
    ("pattern", "d_ff", "wanted"),
    [
        ("global", 41, ["selected_up", "selected_down"]),
        ("2:8", 48, ["pairs_up", "selected_down"]),
        ("2:8", 41, ["selected_up", "selected_down"]),
    ],
)
def test_a_network_decodes_through_the_kernels(
    pattern: Any, d_ff: int, wanted: list[str], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_eff.kernels.moc_decode import kernel

    called: list[str] = []
    for name in ("selected_up", "selected_down", "pairs_up"):
        launch = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, n=name, f=launch: (called.append(n), f(*a))[1])
    torch.manual_seed(0)
    layer = MoCFeedForward(16, d_ff, pattern=pattern).to(device)
    decoder, x = SelectedChannels(layer), random_like((2, 1, 16), torch.float32, device)
    y = decoder(x.transpose(0, 1))
    assert called == wanted
    monkeypatch.setenv("LIGHTNING_EFF_KERNELS", "reference")
    torch.testing.assert_close(y, layer(x.transpose(0, 1)).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["global", "2:8"])
def test_no_token_gives_none(pattern: Any) -> None:
    layer = MoCFeedForward(16, 24, pattern=pattern)
    assert SelectedChannels(layer)(torch.zeros(0, 16)).shape == (0, 16)


def test_bad_input_is_named(device: torch.device) -> None:
    x, gate, up, values, channels = given((3, 5, 16, 2), torch.float32, device)
    for call, words in (
        (lambda: selected_up(x[0], up, values, channels), "not all of two dimensions"),
        (lambda: selected_up(x, up[:, :4], values, channels), r"\(16, 4\) is not \(d_ff, 5\)"),
        (lambda: selected_up(x, up, values[:2], channels), r"\(3, 2\) is not \(tokens, K\) for 3 tokens"),
        (lambda: selected_up(x, up, values.half(), channels), "must have one dtype"),
        (lambda: selected_down(values, channels.float(), up), "channels of torch.float32 must be integers"),
        (lambda: selected_down(values, channels.to("meta"), up), "different devices"),
        (lambda: pairs_up(x, gate[:12], up[:12]), "d_ff in eights"),
        (lambda: pairs_up(x, gate, up[:8]), "d_ff in eights"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.usefixtures("triton_kernels")
def test_a_forced_kernel_says_why_it_cannot(device: torch.device) -> None:
    x, _, up, values, channels = given((3, 5, 16, 2), torch.float32, device)
    with pytest.raises(RuntimeError, match="moc_decode cannot run its kernel: a tensor is not contiguous"):
        selected_up(x, up.T.contiguous().T, values, channels)
    with pytest.raises(RuntimeError, match=r"values have dtype torch\.float64"):
        selected_up(x.double(), up.double(), values.double(), channels)
