"""Tiny models of the namings that are met in the wild, and a run that freezes when it is told to."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

from harness import runs
from lightning_eff.callbacks import GradES
from tests.suite.models import Indices

WIDTH, TOKENS, STEPS = 8, 11, 12


class Block(nn.Module):
    """One residual block; `names` are those of its six matrices, as paths."""

    def __init__(self, names):
        super().__init__()
        self.names = names
        self.norm = nn.LayerNorm(WIDTH)
        sizes = [(WIDTH, WIDTH)] * 4 + [(WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)]
        for name, (inputs, outputs) in zip(names, sizes, strict=True):
            *path, last = name.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.add_module(last, nn.Linear(inputs, outputs, bias=False))

    def forward(self, x):
        query, key, value, out, up, down = (self.get_submodule(name) for name in self.names)
        y = self.norm(x)
        scores = (query(y) @ key(y).transpose(-1, -2)).softmax(-1)
        x = x + out(scores @ value(y))
        return x + down(F.gelu(up(x)))


NAMINGS = {
    "gpt": (
        "transformer.h",
        "transformer.wte",
        ["attn.q", "attn.k", "attn.v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    ),
    "llama": (
        "model.layers",
        "model.embed_tokens",
        [f"self_attn.{n}_proj" for n in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"],
    ),
    "vit": (
        "vit.encoder.layer",
        "vit.embeddings",
        [f"attention.attention.{n}" for n in ("query", "key", "value")]
        + ["attention.output.dense", "intermediate.dense", "output.dense"],
    ),
    "bert": (
        "bert.encoder.layer",
        "bert.embeddings.word_embeddings",
        [f"attention.self.{n}" for n in ("query", "key", "value")]
        + ["attention.output.dense", "intermediate.dense", "output.dense"],
    ),
}


class Model(L.LightningModule):
    """Embedding, two blocks, norm, head; `naming` is one of NAMINGS."""

    def __init__(self, naming="gpt", optimizer="sgd", tied=False, compiled=None, lora=False):
        super().__init__()
        torch.manual_seed(3)
        self.blocks_at, self.embedding_at, names = NAMINGS[naming]
        self.optimizer_name, self.compiled = optimizer, compiled
        self._add(self.embedding_at, nn.Embedding(TOKENS, WIDTH))
        self._add(self.blocks_at, nn.ModuleList(Block(names) for _ in range(2)))
        self.final_norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.get_submodule(self.embedding_at).weight
        if lora:
            self.requires_grad_(False)
            for block in self.get_submodule(self.blocks_at):
                block.attn.q = LoRA(block.attn.q)
                block.mlp.c_fc = LoRA(block.mlp.c_fc)
        if compiled == "blocks":
            blocks = self.get_submodule(self.blocks_at)
            for index, block in enumerate(blocks):
                blocks[index] = torch.compile(block, backend="aot_eager")

    def _add(self, path, module):
        *parents, last = path.split(".")
        owner = self
        for part in parents:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        owner.add_module(last, module)

    def forward(self, tokens):
        x = self.get_submodule(self.embedding_at)(tokens)
        for block in self.get_submodule(self.blocks_at):
            x = block(x)
        return self.head(self.final_norm(x))

    def training_step(self, batch, batch_idx):
        tokens = _stream(batch_idx + self.trainer.current_epoch * len(self.trainer.train_dataloader), self.global_rank)
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self):
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


def _stream(batch, rank):
    """Which tokens come next follows from Lightning's count of batches alone, also after a resume."""
    generator = torch.Generator().manual_seed(1000 * batch + rank)
    return torch.randint(TOKENS, (2, 6), generator=generator)


class Told(GradES):
    """Freezes what it is told to, at the end of given steps: ``{step: fraction of the threshold or factors by name}``.

    The metric is really measured and then replaced: a unit's number is 0.5 (below the threshold of 1) from its step on.
    """

    def __init__(self, schedule, **arguments):
        defaults = dict(metric="grad_change", tau=1.0, tau_mode="absolute", alpha=0.0, every_n_steps=1, patience=1)
        super().__init__(**{**defaults, "max_events": None, "heat_map": False, **arguments})
        self.schedule = schedule

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        measure, told = self._fit.watch._metric.measure, self.schedule
        names, step = self._fit.watch.units.names, trainer.global_step + 1

        def replaced(members=None, rates=None):
            real = measure(members, rates)
            low = [any(step >= since and key in name for since, key in told) for name in names]
            return torch.where(real.isfinite(), torch.where(torch.tensor(low), 0.5, 2.0).to(real), real)

        self._fit.watch._metric.measure = replaced
        try:
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
        finally:
            self._fit.watch._metric.measure = measure


def fit(*callbacks, model=None, data=None, resume=None, **options):
    module = Model() if model is None else model
    defaults = {"max_steps": STEPS, "log_every_n_steps": 50, "use_distributed_sampler": False, "limit_val_batches": 0}
    data = data or Indices(200)
    return runs.fit(module, *callbacks, data=data, ckpt_path=resume, **{**defaults, **options}), module
