"""FSDP2 by its name on two processes, with checkpoints in shards; the second run goes on from the first one's.

python -m examples.scripts.fsdp2                       # two gloo ranks on the CPU
torchrun --nproc-per-node 8 -m examples.scripts.fsdp2  # as many as there are
"""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_eff  # noqa: F401  (registers the strategy)
from examples.gpt import GPTConfig, GPTModule, TextDataModule


def main(steps: int = 20, folder: str = "logs/fsdp2", data: str | None = None) -> L.Trainer:
    """Train `steps` further on this Python's sources, or a folder's text files, and save behind the last of them."""
    L.seed_everything(0, verbose=False)
    shape = GPTConfig(block_size=64, n_layer=2, n_head=4, n_embd=64)
    own = {} if data is None else {"pattern": "*.txt", "val_fraction": 0.3}
    text = TextDataModule(data, block_size=64, batch_size=4, **own)
    last = max((int(path.stem) for path in Path(folder).glob("*.ckpt")), default=0)
    saver = ModelCheckpoint(folder, filename="{step}", auto_insert_metric_name=False, every_n_train_steps=steps)
    trainer = L.Trainer(
        strategy="fsdp2",
        accelerator="auto",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 2)),
        max_steps=last + steps,
        callbacks=[saver],
        logger=False,
        limit_val_batches=0,
    )
    resume = f"{folder}/{last}.ckpt" if last else None
    trainer.fit(GPTModule(shape, schedule="constant"), datamodule=text, ckpt_path=resume)
    return trainer


if __name__ == "__main__":
    trainer = main()
    trainer.print(f"{trainer.global_step} steps, the checkpoint is in {trainer.checkpoint_callback.best_model_path}")
