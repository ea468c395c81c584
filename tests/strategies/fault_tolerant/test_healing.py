"""A peer's state, taken within one process: what goes over, and that it can be sent."""

from __future__ import annotations

import io
from typing import Any

import lightning as L
import pytest
import torch

from lightning_eff.callbacks import EMA, MISA, CheckpointAveraging, GradES, TrainingGuard, ZClip
from lightning_eff.strategies.fault_tolerant.healing import live_state, load_live_state
from lightning_eff.training.hooks import Order
from tests.suite.models import MODELS, Net
from tests.suite.runs import differences, fit, full


class Remembers(Net):
    """Adds something of its own to checkpoints."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen = 0
        self.found: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen += 1
        return super().training_step(batch, batch_idx)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.found.append((checkpoint["seen"], checkpoint["state_dict"]["head.weight"].clone()))


class Foreign(L.Callback):
    """A callback that knows nothing of the suite: what it has loaded it uses from on_train_start on."""

    def __init__(self) -> None:
        self.count = self.started_with = 0

    def on_train_start(self, *_: Any) -> None:
        self.started_with = self.count

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


class Gives(L.Callback):
    """Sends the state of the run behind a step, as a file that is loaded safely."""

    order = Order.LAST

    def __init__(self, step: int) -> None:
        self.step = step
        self.sent = io.BytesIO()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            torch.save(live_state(trainer), self.sent)

    @property
    def state(self) -> dict[str, Any]:
        return torch.load(io.BytesIO(self.sent.getvalue()), map_location="cpu", weights_only=True)


class Takes(L.Callback):
    """Takes a state behind its own first step, and keeps what it was told before."""

    order = Order.LAST

    def __init__(self, state: dict[str, Any]) -> None:
        self.state: dict[str, Any] | None = state
        self.told: list[torch.Tensor] = []

    def before_weights_change(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.told.append(pl_module.head.weight.detach().clone())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.state is not None:
            self.before = pl_module.head.weight.detach().clone()
            state, self.state = self.state, None
            load_live_state(trainer, state, within_step=False)


def _others() -> list[L.Callback]:
    return [
        ZClip(warmup_steps=2, z_thresh=1.5, alpha=0.9, max_grad_norm=1e3),
        CheckpointAveraging(window=3, every_n_steps=1, save="none", validate_with="current"),
        EMA(decay=0.9, save="none", validate_with="current"),
        TrainingGuard("warn", every_n_steps=2),
        Foreign(),
    ]


def _states(run: Any, callbacks: list[L.Callback]) -> dict[str, Any]:
    return {
        "run": run.outcome(),
        "callbacks": [full(callback.state_dict()) for callback in callbacks],
        "window": full(callbacks[1].window.state_dict()),
        "ema": full(callbacks[2].average.state()),
        "step": run.trainer.global_step,
        "epoch": run.trainer.current_epoch,
    }


@pytest.fixture(autouse=True)
def _model(monkeypatch):
    monkeypatch.setitem(MODELS, "remembers", Remembers)


def _healed(folder: Any, others: Any, step: int = 8, steps: int = 11) -> tuple[Any, Any, Takes, dict[str, Any], Any]:
    """A run that gives its state behind a step of its second epoch, and one that takes it and goes on with it."""
    gives, callbacks = Gives(step), others()
    arguments: dict[str, Any] = {"model": "remembers", "steps": steps, "limit_val_batches": 0}
    whole = fit(None, folder, around=[*callbacks, gives], model_arguments={"dropout": 0.5}, **arguments)
    expected = _states(whole, callbacks) if len(callbacks) > 1 else {**whole.outcome(), "it": callbacks[0].state_dict()}
    takes, callbacks = Takes(gives.state), others()
    run = fit(None, folder, around=[*callbacks, takes], model_arguments={"dropout": 0.5}, **arguments)
    found = _states(run, callbacks) if len(callbacks) > 1 else {**run.outcome(), "it": callbacks[0].state_dict()}
    return expected, found, takes, gives.state, run


def test_it_goes_on_as_the_peer_does(tmp_path):
    expected, found, _, _, _ = _healed(tmp_path, _others)
    assert not differences(expected, found)


@pytest.mark.parametrize(
    "build",
    [
        lambda: [GradES(tau=5.0, tau_mode="relative", alpha=0.2, every_n_steps=1, patience=1, stop_when_frozen=False)],
        lambda: [MISA(budget=0.3, eta=3.0)],
    ],
    ids=["GradES", "MISA"],
)
def test_with_a_method_that_freezes(tmp_path, build):
    expected, found, *_ = _healed(tmp_path, build)
    assert not differences(expected, found)


def test_who_reads_weights_later_is_told_before(tmp_path):
    _, _, takes, _, _ = _healed(tmp_path, _others)
    assert len(takes.told) == 1
    assert torch.equal(takes.told[0], takes.before)


def test_an_average_is_sent_once(tmp_path):
    _, _, _, state, run = _healed(tmp_path, _others)
    weight = run.model.blocks[0].qkv.weight

    def count(tree: Any) -> int:
        if isinstance(tree, dict | list | tuple):
            return sum(map(count, tree.values() if isinstance(tree, dict) else tree))
        return int(isinstance(tree, torch.Tensor) and tree.shape == weight.shape)

    # In each of two blocks: the weight, two of AdamW, three snapshots and the moving average.
    assert count(state) == 2 * (1 + 2 + 3 + 1)


def test_hooks_of_checkpoints_are_asked_and_shown(tmp_path):
    _, _, _, state, run = _healed(tmp_path, _others)
    assert state["added"] == {"seen": 8}
    ((seen, weight),) = run.model.found
    assert seen == 8
    assert torch.equal(weight, state["model"]["head.weight"])


def test_a_foreign_callback_begins_with_its_state(tmp_path):
    foreign: list[Foreign] = []

    def others() -> list[L.Callback]:
        callbacks = _others()
        foreign.append(callbacks[-1])  # type: ignore[arg-type]
        return callbacks

    _healed(tmp_path, others)
    assert [callback.started_with for callback in foreign] == [0, 8]
