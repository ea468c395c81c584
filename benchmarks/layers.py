"""What the layers that keep less keep, what they cost, and what they do to the loss.

    python -m benchmarks.layers bytes     # a feed-forward network: bytes kept for the backward pass, time of its step
    python -m benchmarks.layers cache     # attention: bytes of the cache and time of a token, MHA, GQA, SkipV1, both
    python -m benchmarks.layers decode    # a feed-forward network's time for one token: dense and selected channels
    python -m benchmarks.layers quality   # 1 M GPT with SwiGLU at equal tokens: dense, MoC, 2:8, SkipV1, CR-Net
    python -m benchmarks.layers uptrain   # a trained 1 M GPT goes on as a SkipV1Former, or as it was

Rows go to benchmarks/results/layers_<part>.csv. `bytes`, `cache` and `decode` want the machine for themselves.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.gpt import GPT_1M, mean_loss, parameters, text
from benchmarks.rows import CONSOLE, publish, write_rows
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPT, GPTConfig
from harness.memory import kept_bytes
from harness.timing import in_turn, over, seconds_of
from lightning_eff.layers import (
    CR,
    CRLinear,
    MoC,
    MoCFeedForward,
    SelectedChannels,
    SkipV1,
    SkipV1Attention,
    SkipV1Cache,
    replace_layers,
    uptrain,
)
from lightning_eff.layers.replace import connections
from lightning_eff.layers.skipv1 import LayerCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class SwiGLU(nn.Module):
    """The dense network, whose weights are drawn as the example GPT's are."""

    def __init__(self, width: int, channels: int, layers: int = 1) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, channels, bias=False) for _ in range(2))
        self.down = nn.Linear(channels, width, bias=False)
        for linear in (self.gate, self.up):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.normal_(self.down.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


# --- a feed-forward network ------------------------------------------------------------------------------------------


def feed_forward(width: int, channels: int, tokens: int, rounds: int) -> None:
    """Bytes beside the input, against the formulas, and the time of forward and backward pass over the dense one's."""
    torch.manual_seed(0)
    dense = SwiGLU(width, channels).to(DEVICE)
    made = {
        "dense": dense,
        "dense, checkpointed": dense,
        "moc": MoCFeedForward(width, channels),
        "moc, recompute": MoCFeedForward(width, channels, recompute=True),
        "moc 2:8": MoCFeedForward(width, channels, pattern="2:8"),
        "moc 2:8, recompute": MoCFeedForward(width, channels, pattern="2:8", recompute=True),
    }
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, layer in made.items():
        if layer is not dense:
            layer.to(DEVICE).load_state_dict(dense.state_dict())
        checkpointed = name == "dense, checkpointed"
        calls[name] = (lambda x: checkpoint(dense, x, use_reentrant=False)) if checkpointed else layer
    x = torch.randn(tokens, width, device=DEVICE, requires_grad=True)
    gradient = torch.randn(tokens, width, device=DEVICE)

    def step(call: Callable[[Tensor], Tensor]) -> float:
        return seconds_of(lambda: call(x).backward(gradient))

    for call in calls.values():
        step(call)
    figures = in_turn({name: lambda call=call: step(call) for name, call in calls.items()}, rounds)
    rows = []
    for name, layer in made.items():
        k = layer.k if isinstance(layer, MoCFeedForward) else channels
        values = 0 if "checkpointed" in name else 4 if "recompute" not in name else 2
        index = 2 * k if isinstance(layer, MoCFeedForward) else 0
        row = {"variant": name, "d_model": width, "d_ff": channels, "k": k, "tokens": tokens}
        for dtype in (torch.float32, torch.bfloat16):
            kept = _kept(layer, tokens, width, dtype)
            kept = 0 if "checkpointed" in name else kept
            formula = tokens * (values * k * dtype.itemsize + index)
            assert kept == formula, (name, kept, formula)
            row[f"kept_bytes_{str(dtype).removeprefix('torch.')}"] = kept
        row |= {"rounds": rounds, "step_ms": round(1000 * statistics.median(figures[name]), 2)}
        row |= over(figures, name, "dense", "over_dense", digits=3)
        rows.append(row)
    publish("A feed-forward network's step", "layers_bytes", rows)


def _kept(layer: nn.Module, tokens: int, width: int, dtype: torch.dtype) -> int:
    """Beside the input and the weights."""
    x = torch.randn(tokens, width, device=DEVICE, dtype=dtype, requires_grad=True)
    layer = layer.to(dtype)
    kept = kept_bytes(lambda: layer(x), without=[x, *layer.parameters()])
    layer.to(torch.float32)
    return kept


def decode(width: int, channels: int, rounds: int) -> None:
    """One token through the network, without a gradient."""
    torch.manual_seed(0)
    dense = SwiGLU(width, channels).to(DEVICE)
    made: dict[str, nn.Module] = {"dense": dense}
    for pattern in ("global", "2:8"):
        layer = MoCFeedForward(width, channels, pattern=pattern).to(DEVICE)
        layer.load_state_dict(dense.state_dict())
        made[f"selected, {pattern}"] = SelectedChannels(layer)
    x = torch.randn(1, 1, width, device=DEVICE)

    @torch.no_grad()
    def timed(layer: nn.Module) -> float:
        return seconds_of(lambda: [layer(x) for _ in range(50)]) / 50

    for layer in made.values():
        timed(layer)
    figures = in_turn({name: lambda layer=layer: timed(layer) for name, layer in made.items()}, rounds)
    rows = [
        {
            **{"variant": name, "d_model": width, "d_ff": channels, "rounds": rounds},
            "token_us": round(1e6 * statistics.median(figures[name]), 1),
            **over(figures, "dense", name, "times_as_fast", digits=3),
        }
        for name in made
    ]
    publish("A feed-forward network's token", "layers_decode", rows)


# --- a cache ---------------------------------------------------------------------------------------------------------


def cache(width: int, heads: int, layers: int, context: int, batch: int, rounds: int) -> None:
    """Attentions alone, behind a full context. MHA and GQA run the same code with values of their own."""
    torch.manual_seed(0)
    rows, variants, sizes = [], {}, {}
    for name, kv, skips in (
        ("mha", heads, False),
        ("gqa", heads // 2, False),
        ("skipv1", heads, True),
        ("skipv1, gqa", heads // 2, True),
    ):
        stack = [SkipV1Attention(width, heads, kv, first=not (skips and n)).to(DEVICE) for n in range(layers)]
        like = torch.empty(0, device=DEVICE)
        caches = [SkipV1Cache(layers if skips else 1, batch, context + 1, kv, width // heads, like)]
        caches += [
            SkipV1Cache(1, batch, context + 1, kv, width // heads, like) for _ in range(0 if skips else layers - 1)
        ]
        for each in caches:
            for buffer in (each.keys, each.own, each.shared):
                buffer.normal_()
            each.length = context
        views = [caches[0].layer(n) if skips else caches[n].layer(0) for n in range(layers)]
        sizes[name] = sum(each.nbytes for each in caches)
        variants[name] = lambda stack=stack, views=views: _token(stack, views, batch, width)
    for run in variants.values():
        run()
    figures = in_turn(variants, rounds)
    for name in variants:
        row = {"variant": name, "d_model": width, "heads": heads, "layers": layers, "context": context, "batch": batch}
        row |= {"cache_bytes": sizes[name], "bytes_over_mha": round(sizes[name] / sizes["mha"], 4), "rounds": rounds}
        row |= {"token_ms": round(1000 * statistics.median(figures[name]), 3)}
        rows.append(row | over(figures, name, "mha", "time_over_mha", digits=3))
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


# --- quality ---------------------------------------------------------------------------------------------------------

WARM_UP, LR, BATCH = 30, 2e-3, 16
SMALL = GPTConfig(block_size=128, n_embd=96)  # as many parameters, and products, as CR-Net's
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moc, K = d/2": {"feed_forward": MoC()},
    "moc 2:8": {"feed_forward": MoC(pattern="2:8")},
    "skipv1": {"attention": SkipV1()},
    "cr-net, r = h/4": {"linear": CR(rank=0.25)},
    "smaller dense": {},
}


def swiglu_gpt(config: GPTConfig, seed: int) -> GPT:
    """The example GPT with SwiGLU networks of as many weights."""
    torch.manual_seed(seed)
    model = GPT(config)
    for block in model.blocks:
        block.mlp = SwiGLU(config.n_embd, round(config.n_embd / 3) * 8, config.n_layer)
    return model


def optimize(model: GPT, data: TextDataModule, steps: int, lr: float, marks: tuple[int, ...] = ()) -> dict[int, float]:
    """AdamW with warm-up and a cosine to a tenth; the validation loss at the marks and at the end."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
    losses = {}
    for done, batch in zip(range(steps), data.train_dataloader(), strict=False):
        if done in marks:
            losses[done] = mean_loss(model, data)
        progress = max(0.0, (done - WARM_UP) / max(1, steps - WARM_UP))
        rate = lr * min(1.0, (done + 1) / WARM_UP) * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        model.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    losses[steps] = mean_loss(model, data)
    return losses


def corpus(seed: int, steps: int) -> TextDataModule:
    data = text(GPT_1M, BATCH, crops_per_epoch=steps * BATCH, val_windows=256, seed=seed)
    data.setup()
    return data


def quality(steps: int, seeds: range, arms: list[str]) -> None:
    """Every arm of a seed sees the same text from the same initial weights, where it has them."""
    torch.set_num_threads(1)
    for seed in seeds:
        for arm in arms:
            settings = ARMS[arm]
            model = swiglu_gpt(SMALL if arm == "smaller dense" else GPT_1M, seed)
            if settings:
                replace_layers(model, **settings, seed=seed)
            data = corpus(seed, steps)
            loss = optimize(model, data, steps, LR)[steps]
            row = {"arm": arm, "seed": seed, "steps": steps, "tokens": steps * BATCH * GPT_1M.block_size}
            row |= {"parameters": parameters(model), "val_loss": round(loss, 4)}
            row |= {"c_least": "", "c_most": "", "recomputed_error": ""} | (
                _scalars(model, data) if "cr" in arm else {}
            )
            CONSOLE.print(row)
            write_rows("layers_quality", [row], key=("arm", "seed"))


def _scalars(model: GPT, data: TextDataModule) -> dict[str, float]:
    """Which scalars training has reached, and how far off the recomputed gradient is with them."""
    scalars = torch.cat([layer.c.detach().abs() for layer in model.modules() if isinstance(layer, CRLinear)])
    batch = next(iter(data.val_dataloader()))
    (connection,) = connections(model)
    found = []
    for recompute, passes in ((False, 1), (True, 2)):  # the first pass that recomputes keeps everything
        connection.recompute = recompute
        for _ in range(passes):
            model.zero_grad()
            model.loss(batch).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    plain, again = ({n: g for n, g in grads.items() if not n.endswith("beta")} for grads in found)
    worst = max(((again[name] - plain[name]).norm() / plain[name].norm()).item() for name in plain)
    betas = [torch.cat([g for n, g in grads.items() if n.endswith("beta")]) for grads in found]
    worst = max(worst, ((betas[1] - betas[0]).norm() / betas[0].norm()).item())
    least, most = (round(value.item(), 3) for value in (scalars.min(), scalars.max()))
    return {"c_least": least, "c_most": most, "recomputed_error": float(f"{worst:.1e}")}


def uptraining(steps: int, seeds: range) -> None:
    """A dense run, then a quarter of its steps more: as a SkipV1Former, and as it was."""
    torch.set_num_threads(1)
    more = steps // 4
    marks = (0, steps // 10)
    for seed in seeds:
        trained = swiglu_gpt(GPT_1M, seed)
        before = optimize(trained, corpus(seed, steps), steps, LR)[steps]
        state = trained.state_dict()
        for arm in ("uptrained skipv1", "dense goes on"):
            model = swiglu_gpt(GPT_1M, seed)
            model.load_state_dict(state)
            if arm != "dense goes on":
                uptrain(model)
            losses = optimize(model, corpus(seed + 1000, more), more, 0.3 * LR, marks)
            rows = [
                {
                    **{"arm": arm, "seed": seed, "steps_before": steps, "val_loss_before": round(before, 4)},
                    **{"steps": done, "share_of_compute": round(done / steps, 3), "val_loss": round(loss, 4)},
                }
                for done, loss in losses.items()
            ]
            CONSOLE.print(rows)
            write_rows("layers_uptrain", rows, key=("arm", "seed"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["bytes", "cache", "decode", "quality", "uptrain"])
    parser.add_argument("--rounds", type=int, default=15, help="for bytes, cache and decode")
    parser.add_argument("--d-model", type=int, default=512, help="for bytes, cache and decode")
    parser.add_argument("--d-ff", type=int, default=1376, help="for bytes and decode")
    parser.add_argument("--tokens", type=int, default=1024, help="for bytes")
    parser.add_argument("--context", type=int, default=1024, help="for cache")
    parser.add_argument("--steps", type=int, default=200, help="of quality and uptrain")
    parser.add_argument("--first-seed", type=int, default=0, help="for quality and uptrain")
    parser.add_argument("--seeds", type=int, default=3, help="for quality and uptrain")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), help="for quality; all by default")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    if args.part == "bytes":
        feed_forward(args.d_model, args.d_ff, args.tokens, args.rounds)
    elif args.part == "decode":
        decode(args.d_model, args.d_ff, args.rounds)
    elif args.part == "cache":
        cache(args.d_model, 8, 8, args.context, 4, args.rounds)
    elif args.part == "quality":
        quality(args.steps, seeds, args.arms or list(ARMS))
    else:
        uptraining(args.steps, seeds)


if __name__ == "__main__":
    main()
