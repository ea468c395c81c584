"""What runs on each of two ranks whose shards are saved later."""

from __future__ import annotations

import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning as pl
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.fsdp import fully_shard

from harness.runs import fit, fsdp2, quiet_trainer, seed_everything
from lightning_eff.callbacks import EMA, AsyncCheckpoint
from lightning_eff.strategies import FSDP2Strategy
from lightning_eff.training.dtensor import local
from tests.callbacks.async_checkpoint.ranks import Memory, incomplete
from tests.callbacks.async_checkpoint.runs import LatestCopy, Model, WritesWeights, copied, copy_late
from tests.suite.runs import differences

OPTIONS: dict[str, Any] = {"devices": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0, "accelerator": "cpu"}
STRATEGIES = {
    "by hand": fsdp2,
    "fsdp2": FSDP2Strategy,
    "fsdp2, at once": lambda: FSDP2Strategy(async_save=False),
}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def steps_of(package: Any) -> type:
    """A module of either name of Lightning, which shards itself as ``ModelParallelStrategy`` asks for."""

    class Sharded(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net().net
            self.losses: list[torch.Tensor] = []

        def configure_model(self) -> None:
            if self.device_mesh is not None:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.net(batch).square().mean()
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.linspace(-1, 1, 48).view(-1, 4), batch_size=2)

    return Sharded


Sharded = steps_of(L)


class Flush(L.Callback):
    """What was saved after a step has been written, or has failed, when the next one begins."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.strategy.sharded_saves.flush()


class Hold(L.Callback):
    """Nothing is written before the last step but one; what lies there by then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.gate, self.seen = folder, threading.Event(), []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            self.seen = [name for name in os.listdir(self.folder) if name.endswith(".ckpt")]
            trainer.strategy.barrier()
            self.gate.set()


def run(
    folder: Path, strategy: str, hold: bool = False, failures: int = 0, steps: int = 3, last: Any = True, **options: Any
) -> dict[str, Any]:
    """A fit that saves after each step; the first writes of rank one fail."""
    write, left = FileSystemWriter.write_data, [OSError(28, "No space left on device")] * failures
    holds, memory = Hold(folder), Memory()
    if not hold:
        holds.gate.set()

    def slow(*args: Any) -> Any:
        assert holds.gate.wait(60)
        time.sleep(0.02)
        if left and torch.distributed.get_rank() == 1:
            raise left.pop()
        return write(*args)

    seed_everything(1)
    module = Sharded()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, save_last=last)
    callback = AsyncCheckpoint(**{"retry_seconds": 0.01, **options})
    found: dict[str, Any] = {"error": None}
    FileSystemWriter.write_data = slow  # type: ignore[method-assign]
    warnings.filterwarnings("ignore", message=".*could not be written")
    try:
        trainer = fit(
            module, memory, holds, *([Flush()] if failures else []), callback, saver, strategy=STRATEGIES[strategy](),
            max_steps=steps, default_root_dir=folder, **OPTIONS,
        )  # fmt: skip
        found["own"] = sorted({"lightning_module_state_dict", "sharded_saves"} & vars(trainer.strategy).keys())
    except RuntimeError as error:
        found["error"] = str(error)
    finally:
        FileSystemWriter.write_data = write  # type: ignore[method-assign]
    torch.distributed.barrier()
    names = sorted(name for name in os.listdir(folder) if not name.endswith(".ranks"))
    links = {name: os.readlink(folder / name) for name in names if (folder / name).is_symlink()}
    torch.distributed.barrier()
    threads = [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint-writer")]
    return found | {
        "seen": holds.seen, "names": names, "links": links, "losses": module.losses, "threads": threads,
        "skipped": callback.skipped, "incomplete": incomplete(folder, "meta.pt"),
    }  # fmt: skip


def resumed(folder: Path, strategy: str, name: str = "last.ckpt") -> dict[str, Any]:
    """By Lightning alone, from what was saved."""
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    seed_everything(2)
    module, memory = Sharded(), Memory()
    fit(module, memory, strategy=STRATEGIES[strategy](), max_steps=6, ckpt_path=folder / name, **OPTIONS)
    return {"losses": module.losses, "loaded": memory.loaded}


class SaveAndKeep(L.Callback):
    """Saves in one hook, and keeps this rank's shards of that moment."""

    def __init__(self, folder: Path, hook: str) -> None:
        self.folder = folder
        self.expected: dict[str, Any] = {}
        setattr(self, hook, self._save)

    def _save(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        name = f"{len(self.expected)}.ckpt"
        weights = trainer.strategy.lightning_module_state_dict()  # buffers are those of rank zero by now
        optimizer = trainer.strategy.optimizer_state(trainer.optimizers[0])
        self.expected[name] = copied({"state_dict": weights, "optimizer_0": optimizer})
        trainer.save_checkpoint(self.folder / name)


def of_the_moment(folder: Path, ours: bool, hook: str, manual: Any = False, writes: int = 99) -> dict[str, Any]:
    """Which saves of a run do not hold its state of their moment, where all is copied as late as is allowed."""
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
    with pytest.MonkeyPatch.context() as patch:
        copy_late(patch)
        seed_everything(1)
        saver = SaveAndKeep(folder, hook)
        ema = EMA(decay=0.5, validate_with="average", save="none")
        callbacks = [WritesWeights(writes), saver, ema, *([AsyncCheckpoint()] if ours else [])]
        error = None
        try:
            fit(
                Model(manual), *callbacks, strategy=FSDP2Strategy(), max_epochs=2, max_steps=-1, val_check_interval=2,
                **{**OPTIONS, "limit_val_batches": 2},
            )  # fmt: skip
        except RuntimeError as raised:
            error = str(raised)
        late = LatestCopy.made
    wrong = []
    written = sorted(name for name in os.listdir(folder) if name in saver.expected)
    for name in written:
        found = copied(saver.expected[name])
        dcp.load(found, checkpoint_id=folder / name)
        wrong += [f"{name}: {where}" for where in differences(shards(found), shards(saver.expected[name]))]
    torch.distributed.barrier()
    saves = len(saver.expected), len(written)
    return {"error": error, "wrong": wrong, "saves": saves, "late": late}


def shards(value: Any) -> Any:
    """This rank's part of nested containers of DTensors."""
    if isinstance(value, dict):
        return {key: shards(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [shards(entry) for entry in value]
    return local(value) if isinstance(value, torch.Tensor) else value


def damaged(folder: Path) -> str:
    """What is said where a byte of rank zero's shards has changed."""
    run(folder, "by hand", last=None)
    (path,) = folder.glob("*.ckpt")
    if torch.distributed.get_rank() == 0:
        content = bytearray((path / "__0_0.distcp").read_bytes())
        content[len(content) // 3] ^= 255
        (path / "__0_0.distcp").write_bytes(content)
    torch.distributed.barrier()
    try:
        fit(Sharded(), AsyncCheckpoint(), strategy=fsdp2(), max_steps=4, ckpt_path=path, **OPTIONS)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def averaged(folder: Path, ours: bool) -> dict[str, Any]:
    """The averages that lie beside the checkpoints of a run."""
    seed_everything(1)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    callbacks = [EMA(0.5), *([AsyncCheckpoint()] if ours else []), saver]
    fit(Sharded(), *callbacks, strategy=fsdp2(), max_steps=3, default_root_dir=folder, **OPTIONS)
    torch.distributed.barrier()
    return {path.name: torch.load(path, weights_only=True)["state_dict"] for path in folder.glob("ema-*.ckpt")}


def under_the_other_name(folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str], list[str]]:
    """Under ``pytorch_lightning``: saved later, and resumed from without us."""
    warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
    found: list[list[torch.Tensor]] = []
    wrapped: list[str] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            wrapped.extend(name for name in ("sharded_saves", "save_checkpoint") if name in vars(trainer.strategy))

    for ckpt_path, callbacks in ((None, [AsyncCheckpoint(), Look()]), (folder / "last.ckpt", [])):
        seed_everything(1 if ckpt_path is None else 2)
        module = steps_of(pl)()
        saver = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_last="link")
        strategy = pl.strategies.ModelParallelStrategy(2, 1, process_group_backend="gloo")
        trainer = quiet_trainer(
            *callbacks, *([] if ckpt_path else [saver]), trainer=pl.Trainer, strategy=strategy,
            enable_checkpointing=ckpt_path is None, max_steps=6 if ckpt_path else 5, log_every_n_steps=1, **OPTIONS,
        )  # fmt: skip
        trainer.fit(module, ckpt_path=ckpt_path)
        found.append(module.losses)
        torch.distributed.barrier()
    return found[0], found[1], sorted(os.listdir(folder)), wrapped
