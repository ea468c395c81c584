"""What FSDP2 saves in the background is what it and others go on from."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.fsdp import fully_shard

from benchmarks.fsdp2_models import GPT, MLP, ZOO
from harness.runs import fit, fsdp2, seed_everything
from lightning_eff.plugins.sharded_saves import ShardedSaveError
from lightning_eff.strategies import FSDP2Strategy

OPTIONS: dict[str, Any] = {"devices": 2, "num_sanity_val_steps": 0, "max_steps": -1, "max_epochs": 2}


class _ByHand(MLP):
    """Shards itself, as Lightning asks for."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _losses(cls, seed, *callbacks, strategy="fsdp2", **options):
    seed_everything(seed)
    module = cls()
    fit(module, *callbacks, strategy=strategy, **OPTIONS | options)
    return torch.stack(module.losses)


class _Saves(Checkpoint):
    """At the end of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


def _resumed(folder, name):
    """The losses of the second epoch: unbroken, and of a run that begins there with other weights."""
    whole = _losses(ZOO[name], 1, _Saves(folder))
    resumed = _losses(ZOO[name], 2, ckpt_path=folder / "epoch=0.ckpt")
    return whole[len(whole) // 2 :], resumed, os.listdir(folder)


@pytest.mark.parametrize("name", ["GPT", "GAN", "LoRA", "CNN"])
def test_a_run_resumes_in_the_second_epoch(pool, tmp_path, name):
    for whole, resumed, left in pool.run(_resumed, tmp_path, name):
        torch.testing.assert_close(resumed, whole, rtol=1e-5, atol=0)
        assert sorted(left) == ["epoch=0.ckpt", "epoch=1.ckpt"]


def _by_others(folder):
    """Ours resumed by Lightning's own strategy, and Lightning's by ours; of a module that shards itself."""
    whole = _losses(_ByHand, 1, _Saves(folder / "ours"))
    theirs = _losses(_ByHand, 1, _Saves(folder / "theirs"), strategy=fsdp2())
    from_ours = _losses(_ByHand, 2, strategy=fsdp2(), ckpt_path=folder / "ours" / "epoch=0.ckpt")
    from_theirs = _losses(_ByHand, 2, ckpt_path=folder / "theirs" / "epoch=0.ckpt")
    if torch.distributed.get_rank() == 0:
        with pytest.warns(UserWarning, match="_ByHand has sharded itself: forward_methods and exclude"):
            fit(_ByHand(), strategy=FSDP2Strategy(exclude=["*"]), **OPTIONS | {"max_epochs": 1})
    else:
        fit(_ByHand(), strategy=FSDP2Strategy(exclude=["*"]), **OPTIONS | {"max_epochs": 1})
    return whole[len(whole) // 2 :], theirs[len(whole) // 2 :], from_ours, from_theirs


def test_the_folder_is_lightnings(pool, tmp_path):
    for whole, *others in pool.run(_by_others, tmp_path):
        for other in others:
            torch.testing.assert_close(other, whole, rtol=1e-5, atol=0)
    files = [sorted(os.listdir(tmp_path / name / "epoch=0.ckpt")) for name in ("ours", "theirs")]
    assert files[0] == files[1] == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]


def _gathered(folder):
    module = GPT()
    fit(module, _Saves(folder), strategy=FSDP2Strategy(save_distributed_checkpoint=False), **OPTIONS)
    return [p.full_tensor() for p in module.parameters()]


def test_one_file_is_loaded_anywhere(pool, tmp_path):
    weights, _ = pool.run(_gathered, tmp_path)
    module = GPT.load_from_checkpoint(tmp_path / "epoch=1.ckpt")
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), weights, strict=True))
    assert module.generate().shape == (1, 6)
    again = GPT()
    options = {"max_steps": -1, "max_epochs": 2, "num_sanity_val_steps": 0}
    trainer = fit(again, ckpt_path=tmp_path / "epoch=0.ckpt", **options)
    assert trainer.global_step == 4 + 8  # one device has all of the batches


class _Holds(L.Callback):
    """Nothing is written before the run is at its last batch; keeps what lies in the folder by then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.write = folder, [], FileSystemWriter.write_data

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        event, write = threading.Event(), self.write
        self.event = event

        def held(*args: Any) -> Any:
            event.wait(30)
            return write(*args)

        FileSystemWriter.write_data = held

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            self.seen = os.listdir(self.folder)
            trainer.strategy.barrier()
            self.event.set()

    def on_train_end(self, *_: Any) -> None:
        FileSystemWriter.write_data = self.write


def _best(folder):
    holds = _Holds(folder)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=1, every_n_train_steps=1)
    fit(MLP(), saver, holds, strategy="fsdp2", **OPTIONS | {"max_steps": 4, "limit_val_batches": 0})
    torch.distributed.barrier()
    return holds.seen, os.listdir(folder), saver.best_model_path


def test_what_modelcheckpoint_saves_and_removes_goes_in_order(pool, tmp_path):
    for seen, left, best in pool.run(_best, tmp_path):
        assert [name for name in seen if not name.endswith(".part")] == []  # training did not wait for it
        assert sorted(left) == ["step=4.ckpt"]
        assert best == str(tmp_path / "step=4.ckpt")


def _full_disk(folder):
    def write(*args):
        raise OSError(28, "No space left on device")

    before, FileSystemWriter.write_data = FileSystemWriter.write_data, write
    try:
        with pytest.raises(ShardedSaveError, match=r"epoch=0\.ckpt could not .*rank 0.*; rank 1.*No space"):
            fit(MLP(), _Saves(folder), strategy="fsdp2", **OPTIONS | {"max_epochs": 1})
    finally:
        FileSystemWriter.write_data = before
    return os.listdir(folder)


def test_a_full_disk_ends_the_fit_with_an_error(pool, tmp_path):
    assert pool.run(_full_disk, tmp_path) == [[], []]
