"""What ModelCheckpoint has on disk, when a run goes back behind some of it."""

from __future__ import annotations

import os
from math import inf

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_eff.training.hooks import WritesLater, tell
from lightning_eff.training.namespaces import is_a
from lightning_eff.training.trainer import callbacks_of, save_surely


def ranked_checkpoints(trainer: Trainer) -> list[list[str]]:
    """The checkpoints that each ModelCheckpoint ranks now."""
    return [list(callback.best_k_models) for callback in _callbacks(trainer)]


def forget_undone_checkpoints(trainer: Trainer, ranked: list[list[str]], step: int) -> list[str]:
    """After a rollback to ``step``: checkpoints of the steps that were undone are no longer the best or the last.

    They stay on disk, for whoever wants to see what went wrong, and are removed by nobody. Where one of them was the
    latest, which a run resumes from, the restored state is saved in its place, so that a run that is killed now does
    not resume what was undone.

    Collective, as saving is: on all ranks, when the run has been restored.

    Args:
        trainer: whose run has gone back.
        ranked: ``ranked_checkpoints`` of that step.
        step: the ``global_step`` that the run has now.

    Returns:
        The checkpoints of undone steps that stay.
    """
    undone: list[str] = []
    for callback, then in zip(_callbacks(trainer), ranked, strict=True):
        if callback._last_global_step_saved <= step:
            continue
        scores = dict(callback.best_k_models)
        kept = {path: score for path, score in scores.items() if path in then}
        undone += [path for path in scores if path not in kept]
        callback.best_k_models = kept
        best, worst = (min, max) if callback.mode == "min" else (max, min)
        callback.kth_best_model_path, callback.kth_value = "", torch.tensor(inf if callback.mode == "min" else -inf)
        if kept and len(kept) == callback.save_top_k:
            callback.kth_best_model_path = worst(kept, key=kept.__getitem__)
            callback.kth_value = kept[callback.kth_best_model_path]
        latest = callback.last_model_path
        if callback.monitor is not None:
            callback.best_model_path = best(kept, key=kept.__getitem__) if kept else ""
            callback.best_model_score = kept.get(callback.best_model_path)  # type: ignore[assignment]
        else:
            latest = latest or callback.best_model_path
        callback._last_global_step_saved = step
        if latest:
            tell(trainer, WritesLater)  # the link may still be to come
            if trainer.is_global_zero and os.path.islink(latest):
                os.unlink(latest)
            save_surely(trainer, latest, bool(callback.save_weights_only))
            undone = [path for path in undone if path != latest]
    return undone


def _callbacks(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in callbacks_of(trainer) if is_a(callback, ModelCheckpoint)]
