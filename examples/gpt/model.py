"""A GPT over bytes in plain torch: pre-norm blocks, rotary positions, a GELU MLP four times as wide.

One token is one byte, so there is no tokenizer, the vocabulary is 256 on any text, and a loss in bits is bits per byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB_SIZE = 256


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT.

    Args:
        block_size: Longest context, in bytes.
        n_layer: Number of blocks.
        n_head: Attention heads per block; divides `n_embd`.
        n_embd: Width of the residual stream.
    """

    block_size: int = 256
    n_layer: int = 5
    n_head: int = 4
    n_embd: int = 128

    def __post_init__(self) -> None:
        for name in ("block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % (2 * self.n_head):  # twice, since rotary positions turn pairs of channels
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of 2 * n_head ({2 * self.n_head})")


def rotary_angles(time: int, head_dim: int, device: torch.device) -> Tensor:
    """Angle of each pair of channels at each position, shape `(time, head_dim / 2)`.

    In float32 whatever the default dtype: bfloat16 cannot tell position 257 from 256.
    """
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    position = torch.arange(time, dtype=torch.float32, device=device)
    return torch.outer(position, 10000.0 ** (-channel / head_dim))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs `(i, i + head_dim / 2)` of `(..., time, head_dim)` by angles of `(time, head_dim / 2)`.

    Dot products of queries and keys that were turned so depend on the distance of their positions only.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention.

    Query, key and value are three layers and not one of triple width: methods that watch or freeze single weight
    matrices then see the matrices that papers speak of.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.key = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.value = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = (
            layer(x).view(batch, time, self.n_head, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attn = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm_attn(x), cos, sin)
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """Bytes of shape `(batch, time)`, any integer dtype, to logits of shape `(batch, time, 256)`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(VOCAB_SIZE, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, VOCAB_SIZE, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as GPT-2 does: normal with standard deviation 0.02, smaller where a block adds to the stream.

        2 * n_layer branches add to the residual stream; the factor keeps its variance independent of the depth.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                std = residual_std if name.endswith(("attn.out", "mlp.down")) else 0.02
                nn.init.normal_(module.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        if time > self.config.block_size:
            raise ValueError(f"{time} bytes of context, but block_size is {self.config.block_size}")
        # Computed, not kept in a buffer: nothing to save, to shard, or to fill after a start on the meta device.
        angles = rotary_angles(time, self.config.n_embd // self.config.n_head, tokens.device)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed(tokens.long())
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.head(self.norm(x))

    def loss(self, sequences: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per byte, of each byte of `(batch, time + 1)` given those before it."""
        sequences = sequences.long()
        logits = self(sequences[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten())
