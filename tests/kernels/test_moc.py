"""The selected channels' kernels against plain torch, and a whole network through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_eff.kernels.moc import activate, activate_backward, reference
from lightning_eff.layers import moc_feed_forward
from tests.kernels.memory import Poisoned, random_like

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 63, 5), (5, 64, 16), (3, 2056, 1031)]
CLOSE: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-6},  # one bit, where an exponential rounds otherwise
    torch.float16: {"rtol": 2e-3, "atol": 1e-6},
}


def selected(tokens: int, d_ff: int, k: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, Any]:
    up = random_like((tokens, d_ff), dtype, device, 1)
    values, channels = (3 * random_like((tokens, d_ff), torch.float32, device, 2)).topk(k, sorted=False)
    return up, values.to(dtype), channels


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shift", [0, 1])
def test_forward_is_the_reference(
    shift: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    up, values, channels = selected(*shape, dtype, device)
    given = [Poisoned(tensor, shift) for tensor in (up, values)]
    got = activate(given[0].tensor, given[1].tensor, channels)
    right = reference.activate(up, values, channels)
    assert torch.equal(got[0], right[0])
    for ours, plain in zip(got, right, strict=True):
        torch.testing.assert_close(ours, plain, **CLOSE[dtype])
    assert torch.equal(got[3] != 0, right[3] != 0)
    for each in given:
        each.check()


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_is_the_reference(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    index = {torch.float32: torch.int16, torch.bfloat16: torch.int32, torch.float16: torch.int64}[dtype]
    up, values, channels = selected(*shape, dtype, device)
    grad = random_like(tuple(up.shape), dtype, device, 3)
    u, s, _, hidden = reference.activate(up, values, channels)
    got = activate_backward(grad, values, channels.to(index), u, s)
    right = reference.activate_backward(grad, values, channels, u, s)
    for ours, plain in zip(got, right, strict=True):
        torch.testing.assert_close(ours, plain, **CLOSE[dtype])
    for function, wanted in ((activate_backward, got), (reference.activate_backward, right)):
        into = hidden.clone()
        again = function(grad, values, channels, u, s, into)
        assert again[0] is into
        assert torch.equal(again[0], wanted[0])
        assert torch.equal(again[1], wanted[1])


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pattern", ["global", "2:8"])
def test_a_network_goes_through_the_kernels(
    pattern: Any, recompute: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_eff.kernels.moc import kernel

    called = []
    for name in ("activate", "activate_backward"):
        launch = getattr(kernel, name)
        monkeypatch.setattr(kernel, name, lambda *a, n=name, f=launch: (called.append(n), f(*a))[1])
    shapes = ((6, 16), (41, 16), (41, 16), (16, 41))
    tensors = [random_like(shape, torch.float32, device, seed).requires_grad_() for seed, shape in enumerate(shapes)]
    got = torch.autograd.grad(moc_feed_forward(*tensors, 7, pattern, recompute).square().sum(), tensors)
    assert called == ["activate", "activate_backward"]
    monkeypatch.setenv("LIGHTNING_EFF_KERNELS", "reference")
    plain = torch.autograd.grad(moc_feed_forward(*tensors, 7, pattern, recompute).square().sum(), tensors)
    for ours, right in zip(got, plain, strict=True):
        # Sums of squares of sums: on a GPU the two differ by 3e-5 of one element.
        torch.testing.assert_close(ours, right, rtol=1e-4 if device.type == "cuda" else 1e-5, atol=1e-4)


def test_bad_input_is_named(device: torch.device) -> None:
    up, values, channels = selected(3, 8, 2, torch.float32, device)
    for arguments, words in (
        ((up[0], values, channels), r"\(8,\) is not \(tokens, d_ff\)"),
        ((up, values[:2], channels), r"\(2, 2\) is not \(tokens, K\)"),
        ((up, values.half(), channels), "torch.float16 beside torch.float32"),
        ((up, values, channels.float()), "channels of torch.float32 must be integers"),
        ((up, values, channels.to("meta")), "different devices"),
    ):
        with pytest.raises(ValueError, match=words):
            activate(*arguments)


def test_a_buffer_that_does_not_fit_is_refused(device: torch.device) -> None:
    up, values, channels = selected(3, 8, 2, torch.float32, device)
    for wrong in (up[:, :7], up.double()):
        with pytest.raises(ValueError, match=r"moc: into, .* is not as grad"):
            activate_backward(up, values, channels, values, values, wrong)


def test_what_a_kernel_cannot_take_goes_through_the_reference(device: torch.device) -> None:
    up, values, channels = selected(3, 8, 2, torch.float64, device)
    assert activate(up, values, channels)[3].count_nonzero() == 6
    wide = activate(up.T.contiguous().T, values, channels)[3]
    assert torch.equal(wide, reference.activate(up, values, channels)[3])


@pytest.mark.usefixtures("triton_kernels")
def test_a_forced_kernel_says_why_it_cannot(device: torch.device) -> None:
    up, values, channels = selected(3, 8, 2, torch.float32, device)
    with pytest.raises(RuntimeError, match="moc cannot run its kernel: a tensor is not contiguous"):
        activate(up.T.contiguous().T, values, channels)
