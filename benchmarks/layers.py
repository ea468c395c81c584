"""What the layers that keep less keep, what they cost, and what they do to the loss.

    python -m benchmarks.layers bytes     # kept by a feed-forward network for the backward pass, and by a KV cache
    python -m benchmarks.layers steps     # a feed-forward network's forward and backward pass: time over dense
    python -m benchmarks.layers cache     # attention's time for one token: MHA, GQA, SkipV1, both
    python -m benchmarks.layers decode    # a feed-forward network's time for one token: dense and selected channels
    python -m benchmarks.layers quality   # GPTs with SwiGLU at equal tokens: dense, MoC, 2:8, SkipV1, GQA, CR-Net
    python -m benchmarks.layers uptrain   # a trained 1 M GPT goes on as a SkipV1Former, or as it was

Rows go to benchmarks/results/layers_<part>.csv. `steps`, `cache` and `decode` want the machine for themselves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.layers_quality import ARMS, SIZES, SwiGLU, quality, uptraining
from benchmarks.rows import publish
from harness.memory import kept_bytes
from harness.timing import in_turn, over, seconds_of
from lightning_eff.layers import MoCFeedForward, SelectedChannels, SkipV1Attention, SkipV1Cache
from lightning_eff.layers.skipv1 import LayerCache

PAPERS = (2048, 5464)  # the width and channels of the paper's network of 1 B, whose decoding it measures
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _warm_in_turn(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each once without a figure, then all in turn."""
    for run in variants.values():
        run()
    return in_turn(variants, rounds)


# --- a feed-forward network ------------------------------------------------------------------------------------------


def networks(width: int, channels: int) -> dict[str, nn.Module]:
    """The same weights in each; "dense" stands for itself and for its recomputation."""
    torch.manual_seed(0)
    dense = SwiGLU(width, channels)
    made: dict[str, nn.Module] = {"dense": dense, "dense, checkpointed": dense}
    for pattern, name in (("global", "moc"), ("2:8", "moc 2:8")):
        for recompute, ending in ((False, ""), (True, ", recompute")):
            made[f"{name}{ending}"] = MoCFeedForward(width, channels, pattern=pattern, recompute=recompute)
            made[f"{name}{ending}"].load_state_dict(dense.state_dict())
    return {name: layer.to(DEVICE) for name, layer in made.items()}


def kept(width: int, channels: int, tokens: int, context: int) -> None:
    """Bytes beside the input against the formulas, and those of a cache; nothing is timed."""
    rows = []
    for name, layer in networks(width, channels).items():
        moc, checkpointed = isinstance(layer, MoCFeedForward), name == "dense, checkpointed"
        k = layer.k if moc else channels
        values = 0 if checkpointed else 2 if name.endswith("recompute") else 4
        for dtype in (torch.float32, torch.bfloat16):
            found = 0 if checkpointed else _kept(layer, tokens, width, dtype)
            formula = tokens * k * (values * dtype.itemsize + 2 * moc)
            assert found == formula, (name, found, formula)
            row = {"variant": name, "d_model": width, "d_ff": channels, "k": k, "tokens": tokens}
            row |= {"dtype": str(dtype).removeprefix("torch."), "kept_bytes": found}
            rows.append(row | {"over_dense": round(found / (tokens * channels * 4 * dtype.itemsize), 4)})
    publish("Kept for the backward pass beside the input", "layers_bytes", rows)
    made = stacks(width, 8, 24, context, 1)
    sizes = {name: sum(each.nbytes for each in caches) for name, (_, caches, _) in made.items()}
    rows = [
        {
            **{"variant": name, "d_model": width, "heads": 8, "layers": 24, "context": context, "batch": 1},
            **{"cache_bytes": size, "over_mha": round(size / sizes["mha"], 4)},
        }
        for name, size in sizes.items()
    ]
    publish("A cache", "layers_cache_bytes", rows)


def steps(shapes: list[tuple[int, int, int]], rounds: int) -> None:
    """The time of forward and backward pass over the dense network's, and the processor's own time of them."""
    publish("A feed-forward network's step", "layers_steps", [row for shape in shapes for row in _step(*shape, rounds)])


def _step(width: int, channels: int, tokens: int, rounds: int) -> list[dict[str, Any]]:
    calls: dict[str, Callable[[Tensor], Tensor]] = dict(networks(width, channels))
    dense = calls["dense"]
    calls["dense, checkpointed"] = lambda x: checkpoint(dense, x, use_reentrant=False)
    x = torch.randn(tokens, width, device=DEVICE, requires_grad=True)
    gradient = torch.randn(tokens, width, device=DEVICE)

    processor: dict[str, list[float]] = {name: [] for name in calls}

    def step(name: str) -> float:
        begun = time.process_time()
        seconds = seconds_of(lambda: calls[name](x).backward(gradient))
        processor[name].append(time.process_time() - begun)
        return seconds

    figures = _warm_in_turn({name: lambda name=name: step(name) for name in calls}, rounds)
    processor = {name: seconds[1:] for name, seconds in processor.items()}
    return [
        {
            **{"variant": name, "d_model": width, "d_ff": channels, "tokens": tokens, "rounds": rounds},
            "step_ms": round(1000 * statistics.median(figures[name]), 2),
            **over(figures, name, "dense", "over_dense", digits=3),
            **over(processor, name, "dense", "cpu_over_dense", digits=3),
        }
        for name in calls
    ]


def _kept(layer: nn.Module, tokens: int, width: int, dtype: torch.dtype) -> int:
    """Beside the input and the weights, counted by autograd's hooks."""
    x = torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    layer = layer.to(dtype)
    kept = kept_bytes(lambda: layer(x), without=[x, *layer.parameters()])
    layer.to(torch.float32)
    return kept


def decode(shapes: list[tuple[int, int]], rounds: int) -> None:
    """One token through the network, without a gradient."""
    rows = [row for width, channels in shapes for row in _decoded(width, channels, rounds)]
    publish("A feed-forward network's token", "layers_decode", rows)


def _decoded(width: int, channels: int, rounds: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dense = SwiGLU(width, channels).to(DEVICE)
    made: dict[str, nn.Module] = {"dense": dense}
    for pattern in ("global", "2:8"):
        layer = MoCFeedForward(width, channels, pattern=pattern).to(DEVICE)
        layer.load_state_dict(dense.state_dict())
        made[f"all channels, {pattern}"], made[f"selected, {pattern}"] = layer, SelectedChannels(layer)
    x = torch.randn(1, 1, width, device=DEVICE)

    @torch.no_grad()
    def timed(layer: nn.Module) -> float:
        return seconds_of(lambda: [layer(x) for _ in range(50)]) / 50

    figures = _warm_in_turn({name: lambda layer=layer: timed(layer) for name, layer in made.items()}, rounds)
    return [
        {
            **{"variant": name, "d_model": width, "d_ff": channels, "rounds": rounds},
            "token_us": round(1e6 * statistics.median(figures[name]), 1),
            **over(figures, "dense", name, "times_as_fast", digits=3),
        }
        for name in made
    ]


# --- a cache ---------------------------------------------------------------------------------------------------------


Stack = tuple[list[SkipV1Attention], list[SkipV1Cache], list[LayerCache]]


def stacks(width: int, heads: int, layers: int, context: int, batch: int) -> dict[str, Stack]:
    """Attentions behind a full context, their caches, and what each layer sees of them.

    MHA and GQA run the same code with all value heads of their own in every layer.
    """
    torch.manual_seed(0)
    made = {}
    for name, kv, skips in (
        ("mha", heads, False),
        ("gqa", heads // 2, False),
        ("skipv1", heads, True),
        ("skipv1, gqa", heads // 2, True),
    ):
        stack = [SkipV1Attention(width, heads, kv, first=not (skips and n)).to(DEVICE) for n in range(layers)]
        shape = (batch, context + 1, kv, width // heads, torch.empty(0, device=DEVICE))
        caches = [SkipV1Cache(layers, *shape)] if skips else [SkipV1Cache(1, *shape) for _ in range(layers)]
        for each in caches:
            for buffer in (each.keys, each.own, each.shared):
                buffer.normal_()
            each.length = context
        views = [caches[0].layer(n) if skips else caches[n].layer(0) for n in range(layers)]
        made[name] = (stack, caches, views)
    return made


def cache(width: int, heads: int, layers: int, context: int, batch: int, rounds: int) -> None:
    """The attentions' time for one token behind a full context."""
    made = stacks(width, heads, layers, context, batch)
    variants = {name: lambda s=stack, v=views: _token(s, v, batch, width) for name, (stack, _, views) in made.items()}
    figures = _warm_in_turn(variants, rounds)
    rows = [
        {
            **{"variant": name, "d_model": width, "heads": heads, "layers": layers, "context": context, "batch": batch},
            **{"rounds": rounds, "token_ms": round(1000 * statistics.median(figures[name]), 3)},
            **over(figures, name, "mha", "over_mha", digits=3),
        }
        for name in made
    ]
    publish("A token behind a full context", "layers_cache", rows)


@torch.no_grad()
def _token(stack: list[SkipV1Attention], views: list[LayerCache], batch: int, width: int) -> float:
    x = torch.randn(batch, 1, width, device=DEVICE)

    def run() -> None:
        y, v1 = x, None
        for layer, view in zip(stack, views, strict=True):
            out, v1 = layer(y, None if layer.first else v1, view)
            y = y + out

    return seconds_of(lambda: [run() for _ in range(5)]) / 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["bytes", "steps", "cache", "decode", "quality", "uptrain"])
    parser.add_argument("--rounds", type=int, default=15, help="for steps, cache and decode")
    parser.add_argument("--d-model", type=int, default=512, help="for all but quality and uptrain")
    parser.add_argument("--d-ff", type=int, default=1376, help="for bytes, steps and decode")
    parser.add_argument("--tokens", type=int, default=1024, help="for bytes and steps")
    parser.add_argument("--context", type=int, default=1024, help="for bytes and cache")
    parser.add_argument("--steps", type=int, default=160, help="for quality and uptrain")
    parser.add_argument("--first-seed", type=int, default=0, help="for quality and uptrain")
    parser.add_argument("--seeds", type=int, default=3, help="for quality and uptrain")
    parser.add_argument("--size", choices=list(SIZES), default="1m", help="for quality")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), help="for quality; all by default")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.part == "bytes":
        kept(args.d_model, args.d_ff, args.tokens, args.context)
    elif args.part == "steps":
        steps([(args.d_model, args.d_ff, args.tokens), (*PAPERS, args.tokens // 4)], args.rounds)
    elif args.part == "decode":
        decode([(args.d_model, args.d_ff), PAPERS], args.rounds)
    elif args.part == "cache":
        cache(args.d_model, 8, 8, args.context, 4, args.rounds)
    elif args.part == "quality":
        quality(args.size, args.steps, seeds, args.arms or list(ARMS))
    else:
        uptraining(args.steps, seeds)


if __name__ == "__main__":
    main()
