"""What layers that keep less do to the loss: the parts `quality` and `uptrain` of `python -m benchmarks.layers`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpt import GPT_1M, mean_loss, parameters, text
from benchmarks.rows import CONSOLE, write_rows
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPT, GPTConfig, rotate
from lightning_eff.layers import CR, CRLinear, MoC, SkipV1, replace_layers, uptrain
from lightning_eff.layers.replace import connections

WARM_UP, LR, BATCH = 20, 2e-3, 16

SIZES = {"1m": GPT_1M, "4m": replace(GPT_1M, n_embd=256)}
SMALLER = {"1m": replace(GPT_1M, n_embd=96), "4m": replace(GPT_1M, n_embd=184)}
"""As many weights as CR-Net's; each is multiplied once a token, so that the products are as many, too."""


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


class GroupedAttention(nn.Module):
    """The example GPT's attention with a key and a value head for each two query heads."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        width = attention.query.in_features
        self.n_head, self.n_kv_head = attention.n_head, attention.n_head // 2
        self.query, self.out = attention.query, attention.out
        self.key, self.value = (nn.Linear(width, width // 2, bias=False) for _ in range(2))
        for linear in (self.key, self.value):
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            layer(x).view(batch, time, heads, -1).transpose(1, 2)
            for layer, heads in ((self.query, self.n_head), (self.key, self.n_kv_head), (self.value, self.n_kv_head))
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


@dataclass(frozen=True)
class Arm:
    """What becomes of the dense model."""

    settings: dict[str, Any] = field(default_factory=dict)
    grouped: bool = False
    smaller: bool = False


ARMS = {
    "dense": Arm(),
    "moc, K = d/2": Arm({"feed_forward": MoC()}),
    "moc 2:8": Arm({"feed_forward": MoC(pattern="2:8")}),
    "skipv1": Arm({"attention": SkipV1()}),
    "gqa": Arm(grouped=True),
    "skipv1, gqa": Arm({"attention": SkipV1()}, grouped=True),
    "cr-net, r = h/4": Arm({"linear": CR(rank=0.25)}),
    "smaller dense": Arm(smaller=True),
}


def swiglu_gpt(config: GPTConfig, seed: int, grouped: bool = False) -> GPT:
    """The example GPT with SwiGLU networks of as many weights."""
    torch.manual_seed(seed)
    model = GPT(config)
    for block in model.blocks:
        block.mlp = SwiGLU(config.n_embd, round(config.n_embd / 3) * 8, config.n_layer)
    for block in model.blocks if grouped else []:
        block.attn = GroupedAttention(block.attn)
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


def quality(size: str, steps: int, seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Every arm of a seed sees the same text from the same initial weights, where it has them.

    A row is written as soon as it is there, so that two processes can share seeds or arms among them.
    """
    torch.set_num_threads(1)
    for seed in seeds:
        for name in arms:
            arm = ARMS[name]
            model = swiglu_gpt((SMALLER if arm.smaller else SIZES)[size], seed, arm.grouped)
            if arm.settings:
                replace_layers(model, **arm.settings, seed=seed)
            data = corpus(seed, steps)
            loss = optimize(model, data, steps, LR)[steps]
            row = {"size": size, "arm": name, "seed": seed, "steps": steps}
            row |= {"tokens": steps * BATCH * GPT_1M.block_size, "parameters": parameters(model)}
            row |= {"val_loss": round(loss, 4), "c_least": "", "c_most": "", "recomputed_error": ""}
            row |= _scalars(model, data) if "linear" in arm.settings else {}
            CONSOLE.print(row)
            write_rows("layers_quality", [row], key=("size", "arm", "seed"))


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


def uptraining(steps: int, seeds: Sequence[int]) -> None:
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
