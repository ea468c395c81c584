"""Mixture-of-Channels, SkipV1Former and CR-Net on the device: against the dense formula, and against the CPU."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.report import DEVICE, DTYPES, SMALL, Report, difference
from examples.gpt.model import GPT, GPTConfig
from harness.timing import seconds_of
from lightning_eff.layers import CR, MoC, MoCFeedForward, SelectedChannels, SkipV1, replace_layers
from lightning_eff.layers.moc import Pattern

WIDTH, CHANNELS, TOKENS = (64, 176, 64) if SMALL else (768, 2048, 16384)
PATTERNS: tuple[Pattern, ...] = ("global", "2:8")


def _clear(layer: MoCFeedForward, x: Tensor) -> Tensor:
    """The tokens whose choice of channels does not hang on how a product is rounded."""
    gates = x @ layer.gate.weight.T
    groups, k = (gates[:, None], layer.k) if layer.pattern == "global" else (gates.unflatten(-1, (-1, 8)), 2)
    edge = groups.topk(k + 1).values[..., -2:]
    return x[((edge[..., 0] - edge[..., 1]) > 1e-5).all(dim=-1)]


def _mask(layer: MoCFeedForward, x: Tensor) -> Tensor:
    """Which channels of each token are among the largest, of the gates as the layer has them, rounded."""
    gates = x @ layer.gate.weight.T
    if layer.pattern == "global":
        return gates >= gates.topk(layer.k).values[..., -1:]
    groups = gates.unflatten(-1, (-1, 8))
    return (groups >= groups.topk(2).values[..., -1:]).flatten(-2)


def swiglu(layer: MoCFeedForward, x: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    y: Tensor = (F.silu(x @ layer.gate.weight.T) * (x @ layer.up.weight.T) * mask) @ layer.down.weight.T
    return y


def with_gradients(layer: MoCFeedForward, y: Tensor) -> list[Tensor]:
    weights = [layer.gate.weight, layer.up.weight, layer.down.weight]
    return [y.detach(), *torch.autograd.grad(y.square().mean(), weights)]


def _moc(report: Report) -> None:
    """Output and gradients against the dense network in float64, with zeros for the gates that are too small."""
    torch.manual_seed(0)
    for pattern, recompute in itertools.product(PATTERNS, (False, True)):
        name = f"MoC {pattern}{', recomputed' if recompute else ''}"
        with report.guarded(name):
            layer = MoCFeedForward(WIDTH, CHANNELS, pattern=pattern, recompute=recompute).to(DEVICE)
            exact = copy.deepcopy(layer).double()
            x = _clear(layer, torch.randn(1024, WIDTH, device=DEVICE))[:256]
            truth = with_gradients(exact, swiglu(exact, x.double(), _mask(layer, x)))
            error = max(map(difference, with_gradients(layer, layer(x)), truth))
            report.row(name, error < 1e-4, error=error)


def _decoded(report: Report) -> None:
    """One token with the selected rows, beside the dense network; right against what training computes, in float64."""
    torch.manual_seed(0)
    width, channels = (64, 176) if SMALL else (2048, 5464)  # the paper's of 1 B
    for pattern, (name, dtype) in itertools.product(PATTERNS, DTYPES.items()):
        with report.guarded(f"MoC decodes {pattern} {name}"):
            layer = MoCFeedForward(width, channels, pattern=pattern).to(DEVICE, dtype)
            x = torch.randn(1, width, device=DEVICE, dtype=dtype)
            exact = copy.deepcopy(layer).double()
            error = difference(SelectedChannels(layer)(x), swiglu(exact, x.double(), _mask(layer, x)).detach())
            # In 16 bits two gates may round to the same number, and either may be taken.
            right = error < (1e-4 if dtype == torch.float32 else 5e-2)
            decoder, times = SelectedChannels(layer), {}
            with torch.no_grad():
                for variant, call in {"dense": lambda f=layer, x=x: swiglu(f, x), "moc": partial(decoder, x)}.items():
                    call()
                    times[f"{variant}_us"] = 1e4 * min(
                        seconds_of(lambda c=call: [c() for _ in range(100)]) for _ in range(5)
                    )
            report.row(f"MoC decodes {pattern} {name}", right, error=error, **times)


def _times(report: Report) -> None:
    """A forward and a backward pass beside the same network without a selection, in turn."""
    for name, dtype in DTYPES.items():
        with report.guarded(f"MoC {name}"):
            x = torch.randn(TOKENS, WIDTH, device=DEVICE, dtype=dtype)
            sparse = MoCFeedForward(WIDTH, CHANNELS).to(DEVICE, dtype)
            figures = {}
            for variant, call in {
                "dense": lambda f=sparse, x=x: with_gradients(f, swiglu(f, x)),
                "moc": lambda f=sparse, x=x: with_gradients(f, f(x)),
            }.items():
                call()
                if not SMALL:
                    torch.cuda.reset_peak_memory_stats()
                figures[f"{variant}_ms"] = 1e3 * min(seconds_of(call) for _ in range(5))
                figures[f"{variant}_peak_gb"] = 0.0 if SMALL else torch.cuda.max_memory_allocated() / 1e9
            report.row(f"MoC {name}", all(bool(g.isfinite().all()) for g in call()), tokens=TOKENS, **figures)


def _replaced(report: Report) -> None:
    """The example GPT with other layers, in float64 here and on the CPU: one loss, and the same gradients."""
    config = GPTConfig(32, 4, 2, 32)
    tokens = torch.randint(256, (4, 33), generator=torch.Generator().manual_seed(1))
    settings = {
        "MoC": {"feed_forward": MoC(new_weights=True)},
        "SkipV1": {"attention": SkipV1()},
        "MoC and SkipV1": {"feed_forward": MoC(new_weights=True), "attention": SkipV1()},
        "CR": {"linear": CR()},
        "CR, recomputed": {"linear": CR(recompute=True)},
    }
    for name, setting in settings.items():
        with report.guarded(name):
            results = []
            for device in (torch.device("cpu"), DEVICE):
                torch.manual_seed(0)
                model = GPT(config)
                replace_layers(model, **setting)
                model = model.to(device, torch.float64)
                loss = model.loss(tokens.to(device))
                loss.backward()
                results.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
            error = max(map(difference, *results))  # the rotary angles are float32
            report.row(f"GPT with {name}", error < 1e-5, error=error, loss=float(results[0][0]))


def layers(report: Report) -> None:
    """Each layer is right on the device; what the selection of channels costs and saves there."""
    _moc(report)
    _decoded(report)
    _times(report)
    _replaced(report)
