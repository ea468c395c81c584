"""What a user writes to train and to save by FSDP2: by hand, and with this suite; each of it runs."""

from __future__ import annotations

import importlib
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from examples.gpt.model import GPT, GPTConfig
from harness.runs import quiet_trainer, seed_everything

PACKAGES = ("lightning.pytorch", "pytorch_lightning")

# --- by hand; the lines that count are those of these functions' bodies -----------------------------------------------


def sharded_by_hand(package: Any, module: type) -> dict[str, Any]:
    class Sharded(module):  # type: ignore[misc]
        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    strategy = package.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"module": Sharded, "strategy": strategy}


def sharded_by_name(package: Any, module: type) -> dict[str, Any]:
    return {"module": module, "strategy": "fsdp2"}


def saved_later_by_hand(package: Any, module: type) -> dict[str, Any]:
    class SavesLater(package.strategies.ModelParallelStrategy):  # type: ignore[misc]
        pending: Any = None
        group: Any = None

        def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
            self.wait()
            self.group = self.group or dist.new_group(backend="gloo")
            path = Path(self.broadcast(filepath))
            path.mkdir(parents=True, exist_ok=True)
            state = {"state_dict": checkpoint.pop("state_dict")}
            for index, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
                state[f"optimizer_{index}"] = optimizer
            self.pending = async_save(state, checkpoint_id=path, process_group=self.group)
            if self.global_rank == 0:
                torch.save(checkpoint, path / "meta.pt")

        def wait(self) -> None:
            pending, self.pending = self.pending, None
            if pending is not None:
                pending.result()

        def remove_checkpoint(self, filepath: Any) -> None:
            self.wait()
            super().remove_checkpoint(filepath)

        def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            self.wait()
            return super().load_checkpoint(*args, **kwargs)

        def teardown(self) -> None:
            self.wait()
            super().teardown()

    strategy = SavesLater(data_parallel_size=2, tensor_parallel_size=1)
    return {**sharded_by_hand(package, module), "strategy": strategy}


def saved_later_by_us(package: Any, module: type) -> dict[str, Any]:
    from lightning_eff.callbacks import AsyncCheckpoint

    return {**sharded_by_hand(package, module), "callbacks": [AsyncCheckpoint()]}


WAYS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[..., dict[str, Any]], str]] = {
    "train by FSDP2": (sharded_by_hand, sharded_by_name, "the module must not be tied across blocks, nor read weights"),
    "save shards later": (saved_later_by_hand, saved_later_by_us, "a folder is half written until it is done"),
}


def lines(function: Callable[..., Any]) -> int:
    """Of its body, without blank ones and comments."""
    source = inspect.getsource(function).splitlines()[1:]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in source)


# --- and they run ---------------------------------------------------------------------------------------------------


def module_of(package: Any) -> type:
    """A small GPT."""

    class Module(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT(GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=16))
            self.losses: list[torch.Tensor] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            logits = self.model(batch[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def train_dataloader(self) -> Any:
            return DataLoader(torch.randint(0, 256, (64, 17)), batch_size=2)

    return Module


def losses(package: Any, way: Callable[..., dict[str, Any]], folder: Path) -> torch.Tensor:
    """Of a run that saves, and of one that resumes from its checkpoint."""
    found = []
    for steps, path in ((3, None), (6, folder / "last.ckpt")):
        seed_everything(1)
        made = way(package, module_of(package))
        saver = package.callbacks.ModelCheckpoint(folder, every_n_train_steps=3, save_last=True)
        module = made["module"]()
        trainer = quiet_trainer(
            *made.get("callbacks", []), saver, trainer=package.Trainer, strategy=made["strategy"], devices=2,
            accelerator="cpu", max_steps=steps, log_every_n_steps=1, enable_checkpointing=True, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, ckpt_path=path)
        found += module.losses
        dist.barrier()
    return torch.stack(found)


def rows(place: Path) -> list[dict[str, Any]]:
    """On each of two ranks."""
    found = []
    for name in PACKAGES:
        package = importlib.import_module(name)
        for what, (before, after, but) in WAYS.items():
            folders = [Path(tempfile.mkdtemp(dir=place)) if dist.get_rank() == 0 else place for _ in range(2)]
            dist.broadcast_object_list(folders, src=0)
            runs = [losses(package, way, folder) for way, folder in zip((before, after), folders, strict=True)]
            found.append(
                {
                    "to": what, "under": name, "lines_by_hand": lines(before), "lines": lines(after),
                    "steps": len(runs[0]), "largest_difference_of_a_loss": (runs[0] - runs[1]).abs().max().item(),
                    "and_by_hand": but,
                }
            )  # fmt: skip
    return found
