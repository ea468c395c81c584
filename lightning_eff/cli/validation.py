"""The score of a merge: a metric that the LightningModule logs on the validation set of a DataModule."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]
from lightning.pytorch.cli import LightningCLI

# LightningCLI knows a class by its short name once it is imported, and a strategy once it is registered.
import lightning_eff.callbacks  # noqa: F401
from lightning_eff.merging.merge import Merger

# Nothing is logged, saved or shown of the many validations, and one process is enough.
_QUIET: dict[str, Any] = {
    "logger": False,
    "callbacks": None,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
}
_PARTS = ("seed_everything", "trainer", "model", "data")  # of a config; a saved one also has those of its command
TRAINING_PARTS = ("optimizer", "lr_scheduler")  # in place of the module's `configure_optimizers`


class Validation:
    """Calls ``trainer.validate`` on merges of checkpoints.

    Args:
        merger: the checkpoints.
        config: a YAML file of LightningCLI, also the ``config.yaml`` that a run has saved: the model, the data and of
            the trainer what matters to a validation (precision, accelerator, ``limit_val_batches``).
        metric: what the validation logs, e.g. ``"val_loss"``.
        mode: whether a lower (``"min"``) or a higher value is better.
        model: class of the model, where the config has its arguments only.
        data: class of the data, likewise.
        limit_val_batches: validate on so many batches only; None for what the config says.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: the config is incomplete, the model does not have the checkpoints' tensors (at the first call), or
            the metric is not logged.
    """

    def __init__(
        self,
        merger: Merger,
        config: str | os.PathLike[str],
        metric: str,
        mode: Literal["min", "max"] = "min",
        *,
        model: str | None = None,
        data: str | None = None,
        limit_val_batches: int | None = None,
    ) -> None:
        self.merger = merger
        self.metric = metric
        self.sign = {"min": 1.0, "max": -1.0}[mode]
        trainer = {**_QUIET} if limit_val_batches is None else {**_QUIET, "limit_val_batches": limit_val_batches}
        cli = built(read_config(Path(config), {"model": model, "data": data}), trainer)
        self.module, self.datamodule, self.trainer = cli.model, cli.datamodule, cli.trainer
        self.module.configure_model()  # where a model is built; Lightning asks that it may be called again

    def __call__(self, weights: Sequence[float]) -> float:
        """The metric of the merge with these weights; negated where higher is better."""
        return self.sign * self.value(weights)

    def value(self, weights: Sequence[float]) -> float:
        """The metric of the merge with these weights."""
        self.merger.fill(self.module, weights)
        self.trainer.validate(self.module, datamodule=self.datamodule, verbose=False)
        logged = self.trainer.callback_metrics
        if self.metric not in logged:
            names = ", ".join(sorted(logged)) or "nothing"
            raise ValueError(f"metric={self.metric!r} is not logged by the validation; it logs {names}")
        return float(logged[self.metric])


def built(settings: dict[str, Any], trainer: dict[str, Any]) -> LightningCLI:
    """Model, data and Trainer of a config, with some of the Trainer's arguments replaced; nothing is run."""
    settings["trainer"] = {**(settings.get("trainer") or {}), **trainer}
    if os.getcwd() not in sys.path:  # a model in the current directory can be named, as with `lightning-eff fit`
        sys.path.insert(0, os.getcwd())
    with warnings.catch_warnings():
        # The process has a command line, but it is not LightningCLI's.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        return LightningCLI(run=False, save_config_callback=None, args=settings)


def read_config(config: Path, classes: Mapping[str, str | None], more: Sequence[str] = ()) -> dict[str, Any]:
    """What a config of LightningCLI, or one that a run has saved, says of the Trainer, the model, the data and more."""
    if not config.is_file():
        raise FileNotFoundError(f"{config}: no such config")
    try:
        found = yaml.safe_load(config.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{config} is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{config} is no config of LightningCLI: it holds no `model:`")
    settings = {part: found[part] for part in (*_PARTS, *more) if part in found}
    for part, name in classes.items():
        if name is not None:
            given = settings.get(part) or {}
            settings[part] = {"class_path": name, "init_args": given.get("init_args", given) if given else {}}
    given = settings.get("model")
    if not (isinstance(given, str) or (isinstance(given, dict) and "class_path" in given)):
        raise ValueError(f"{config} does not say the class of the model: name it with --model (model=)")
    return settings
