"""A callback does its work and is not noticed otherwise: no waiting, no random numbers, nothing left behind."""

from __future__ import annotations

import pickle
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from harness.faults import InjectedError, fail_at
from harness.operators import OperatorCounter
from tests.suite.device import DEVICE
from tests.suite.models import STEPS, Net
from tests.suite.rules.registry import rule
from tests.suite.runs import Place, build_trainer, differences, expect, fit, random_states
from tests.suite.sinks import Discard
from tests.suite.table import Row

_HOOKS = [name for name in vars(torch.nn.Module()) if "hooks" in name]


@rule()
def waits_for_nothing(row: Row, place: Place) -> None:
    """No host sync in a step, as the difference to the run without the callback; a few on a step that is logged."""

    def extra(steps: int, **arguments: Any) -> int:
        counts = []
        for under_test in (row, None):
            with OperatorCounter() as counter:
                fit(under_test, place.folder, steps=steps, limit_val_batches=0, **arguments)
            counts.append(counter.host_syncs)
        return counts[0] - counts[1]

    quiet = {"log_every_n_steps": 1000, "val_check_interval": None}
    per_step = (extra(STEPS, **quiet) - extra(STEPS // 2, **quiet)) / (STEPS - STEPS // 2)
    fewer = DEVICE == "cuda" and per_step < 0  # a model whose layers were replaced asks less of a GPU
    assert per_step == 0 or fewer, f"{per_step:g} host syncs in a step"

    logging = {"log_every_n_steps": 2, "val_check_interval": None, "logger": Discard()}
    more = extra(STEPS, **logging) - extra(STEPS // 2 + 1, **logging)
    logs = (STEPS - STEPS // 2 - 1) // 2
    allowed = (len(row.tags) if row.syncs_per_log is None else row.syncs_per_log) * logs
    assert more <= allowed, f"{more} host syncs in {logs} steps that are logged; {allowed} are allowed"


@rule()
def draws_no_random_numbers(row: Row, place: Place) -> None:
    """The user's generators, shuffled batches and dropout are the same with the callback and without it."""
    seen = []
    for under_test in (row, None):
        L.seed_everything(7, verbose=False)
        witness = _Witness()
        loader = DataLoader(torch.arange(12), batch_size=2, shuffle=True)
        fit(under_test, place.folder, around=[witness], data=loader, model_arguments={"dropout": 0.5})
        seen.append({"batches": witness.batches, "states": random_states()})
    wrong = differences(seen[1], seen[0])
    assert not wrong, wrong


class _Witness(L.Callback):
    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.batches.append(batch)


@rule()
def monitors_without_touching(row: Row, place: Place) -> None:
    """A callback that says it only watches leaves the weights as they would have been; any other changes them."""
    with_it, without = fit(row, place.folder).parameters(), fit(None, place.folder).parameters()
    wrong = differences(without, with_it)
    if row.changes_training:
        assert wrong, "the row says that the method changes training, and nothing changed: no rule has tested it"
    else:
        assert not wrong, wrong


@rule()
def an_exception_leaves_nothing_behind(row: Row, place: Place) -> None:
    """After a crash in training or validation no hook, attribute or swapped weight of the callback is left."""
    hooks = ("on_train_batch_start", "on_before_optimizer_step", "on_validation_batch_start", "on_validation_batch_end")
    for hook in (*hooks, None):
        attached = []
        for callback in (row.build(), None):
            model, live = Net(), _LiveWeights()
            around = [live] if hook is None else [live, fail_at(step=6).in_hook(hook)]
            callbacks = [callback] if callback else []
            trainer = build_trainer(place.folder, place.strategy, callbacks, around, model, STEPS, {})
            if hook is not None:
                with expect(InjectedError, f"no crash in {hook}"):
                    trainer.fit(model)
                wrong = differences(live.weights, {n: p.detach() for n, p in model.named_parameters()})
                assert not wrong, f"crash in {hook}: the weights are not those that were trained: {wrong}"
            else:
                trainer.fit(model)
            attached.append(_attachments(trainer, model))
        wrong = differences(attached[1], attached[0])
        assert not wrong, f"crash in {hook}: {wrong}" if hook else f"after the fit: {wrong}"


class _LiveWeights(L.Callback):
    """Keeps the weights as training left them."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.weights = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _attachments(trainer: L.Trainer, model: Net) -> dict[str, Any]:
    """How many hooks there are, and which attributes."""
    from torch.nn.modules import module as globals_

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"module {name}"] = {hook: len(getattr(module, hook)) for hook in _HOOKS}
        found[f"attributes of {name}"] = sorted(vars(module))
    for name, parameter in model.named_parameters():
        names = ("_backward_hooks", "_post_accumulate_grad_hooks")
        found[f"parameter {name}"] = {hook: len(getattr(parameter, hook, None) or ()) for hook in names}
    for i, optimizer in enumerate(trainer.optimizers):
        found[f"optimizer {i}"] = {name: len(value) for name, value in vars(optimizer).items() if "hooks" in name}
        # Between two steps Lightning's profiler and torch's own wrapping are the same with and without a callback.
        found[f"attributes of optimizer {i}"] = sorted(vars(optimizer))
    found["global"] = {name: len(value) for name, value in vars(globals_).items() if name.endswith("_hooks")}
    return found


@rule()
def can_be_pickled(row: Row, place: Place) -> None:
    """`ddp_spawn` pickles a callback before the fit; after it the state comes through as well."""
    callback = row.build()
    fresh = pickle.loads(pickle.dumps(callback))
    one, other = fit(row, place.folder, callback=callback), fit(row, place.folder, callback=fresh)
    wrong = differences(one.outcome(), other.outcome())
    assert not wrong, f"a pickled callback trains differently: {wrong}"
    wrong = differences(callback.state_dict(), pickle.loads(pickle.dumps(callback)).state_dict())
    assert not wrong, f"pickled after a fit: {wrong}"
