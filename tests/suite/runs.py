"""Short trainings for the rules, and what came out of them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import numpy
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from harness.pool import Pool
from harness.runs import quiet_trainer
from lightning_eff.structure import clean_named_parameters
from tests.suite.device import accelerator, generator_state
from tests.suite.models import STEPS, Gan, Net, under
from tests.suite.table import SINGLE, Row, Strategy


@dataclass
class Place:
    """Where a rule is checked."""

    strategy: Strategy
    folder: Path
    pool: Pool

    def run(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call `fn` on each rank; the results in the order of the ranks."""
        if self.strategy.ranks == 1:
            return [fn(*args, **kwargs)]
        return self.pool.run(fn, *args, **kwargs)


@dataclass
class Run:
    """A training that has ended."""

    trainer: L.Trainer
    model: Net | Gan
    callback: L.Callback | None

    def parameters(self) -> dict[str, Tensor]:
        return full(dict(self.model.named_parameters()))

    def outcome(self) -> dict[str, Any]:
        """What must be equal between two trainings that should be the same; a collective under FSDP2."""
        return {
            "parameters": self.parameters(),
            "optimizers": [full(optimizer.state_dict()) for optimizer in self.trainer.optimizers],
            "callback": None if self.callback is None else full(self.callback.state_dict()),
        }


class SaveAt(Checkpoint):
    """Saves a checkpoint when `step` optimizer steps are done; Lightning moves it behind the other callbacks."""

    def __init__(self, step: int, path: Path) -> None:
        self.step = step
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(
    row: Row | None,
    folder: Path,
    *,
    strategy: Strategy = SINGLE,
    model: str = "net",
    steps: int = STEPS,
    callback: L.Callback | None = None,
    around: Sequence[L.Callback] = (),
    resume: Path | None = None,
    data: Any = None,
    model_arguments: dict[str, Any] | None = None,
    **trainer_arguments: Any,
) -> Run:
    """Train with the row's callback (or with `callback`, or without one) for `steps` batches that step."""
    if callback is None and row is not None:
        callback = row.build()
    module = under(strategy.package, model)(**(model_arguments or {}))
    trainer = build_trainer(folder, strategy, [callback] if callback else [], around, module, steps, trainer_arguments)
    trainer.fit(module, data, ckpt_path=resume)
    return Run(trainer, module, callback)


def build_trainer(
    folder: Path,
    strategy: Strategy,
    callbacks: Sequence[L.Callback],
    around: Sequence[L.Callback],
    module: Net | Gan,
    steps: int,
    arguments: dict[str, Any],
) -> L.Trainer:
    """A quiet Trainer. Validation runs every third batch, where the arguments do not say otherwise."""
    defaults = {
        "accelerator": accelerator(package=strategy.package),
        "strategy": strategy.build(module.optimizer_count),
        "devices": strategy.ranks,
        "max_steps": steps * module.optimizer_count,
        "val_check_interval": 3,
        "log_every_n_steps": 2,
        "default_root_dir": folder,
    }
    trainer = import_module(strategy.package).Trainer
    return quiet_trainer(*callbacks, *around, trainer=trainer, **(defaults | arguments))


def assert_equal(weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Bit for bit; what is not a number is equal to nothing."""
    assert weights.keys() == others.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, others[name])] == []


def differences(one: Any, other: Any, where: str = "", rtol: float = 0.0, atol: float = 0.0) -> list[str]:
    """Where two outcomes differ, in words; without tolerances every bit counts."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} against {type(other).__name__}"]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [f"{where}: keys {sorted(map(str, one))} against {sorted(map(str, other))}"]
        return [text for key in one for text in differences(one[key], other[key], f"{where}.{key}", rtol, atol)]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} against {len(other)} entries"]
        pairs = enumerate(zip(one, other, strict=True))
        return [text for i, (a, b) in pairs for text in differences(a, b, f"{where}[{i}]", rtol, atol)]
    if isinstance(one, float):
        one, other = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    if isinstance(one, Tensor):
        try:
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True, check_device=False)
        except AssertionError as error:
            return [f"{where}: {' '.join(str(error).split())}"]
        return []
    return [] if one == other else [f"{where}: {one!r} against {other!r}"]


def random_states() -> dict[str, Any]:
    """The user's random number generators."""
    kind, keys, *rest = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "dropout": generator_state(),
        "numpy": [kind, torch.tensor(keys.astype("int64")), *rest],
        "random": list(random.getstate()[1]),
    }


@dataclass
class Caught:
    """What `expect` has caught."""

    error: BaseException | None = None


@contextlib.contextmanager
def expect(kind: type[BaseException], reason: str) -> Iterator[Caught]:
    """Like `pytest.raises`, but says `reason` when nothing is raised."""
    caught = Caught()
    try:
        yield caught
    except kind as error:
        caught.error = error
        return
    raise AssertionError(reason)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters on the CPU, under names without wrappers, with sharded ones put together."""
    return full(clean_named_parameters(module))


def full(value: Any) -> Any:
    """Detached copies on the CPU, with sharded tensors put together."""
    if isinstance(value, dict):
        return {key: full(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(full(entry) for entry in value)
    if isinstance(value, Tensor):
        value = value.detach()
        return (value.full_tensor() if hasattr(value, "full_tensor") else value).to("cpu", copy=True)
    return value
