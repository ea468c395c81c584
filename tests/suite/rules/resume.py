"""A crash costs nothing: what is saved is complete, and safe to load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from harness.faults import InjectedError, fail_at
from harness.runs import seed_everything
from lightning_eff.callbacks import ExactResume
from tests.suite.models import MODELS, STEPS
from tests.suite.rules.registry import rule
from tests.suite.runs import Place, SaveAt, differences, expect, fit, random_states
from tests.suite.table import ARC_TOPK, DDP, FSDP2, SINGLE, Row, Strategy

_SAFE = (Tensor, bool, int, float, str, list, tuple, dict, type(None))


@rule(SINGLE, DDP, slow=(FSDP2, ARC_TOPK))
def resumes_exactly(row: Row, place: Place) -> None:
    """Crash in the middle, resume from the checkpoint: every bit equals the unbroken run, on every rank."""
    for model in ("net", "gan"):  # tests of single callbacks add models of their own to MODELS
        if model in row.refused_models or (model == "gan" and place.strategy.lossy):
            continue  # with two losses there is no error feedback, and nothing to restore
        ranks = place.run(_crash_and_resume, row, place.strategy, model, place.folder)
        for rank, (unbroken, resumed) in enumerate(ranks):
            for step, outcome in resumed.items():
                wrong = differences(unbroken, outcome)
                assert not wrong, f"{model}, rank {rank}, crash after step {step}: {wrong}"


def _crash_and_resume(row: Row, strategy: Strategy, model: str, folder: Path) -> tuple[Any, dict[int, Any]]:
    unbroken = fit(row, folder, strategy=strategy, model=model).outcome()
    resumed = {}
    for step in row.crash_steps:
        path = folder / f"{model}-{step}.ckpt"
        counted = step * MODELS[model].optimizer_count  # as Lightning counts: each optimizer's steps
        with expect(InjectedError, f"the run did not get to step {step}"):
            around = [SaveAt(counted, path), fail_at(step=counted)]
            fit(row, folder, strategy=strategy, model=model, around=around)
        run = fit(row, folder, strategy=strategy, model=model, resume=path)
        assert run.trainer.global_step == STEPS * MODELS[model].optimizer_count
        resumed[step] = run.outcome()
    return unbroken, resumed


@rule()
def data_and_randomness_resume_exactly(row: Row, place: Place) -> None:
    """Beside ExactResume the run that was broken off in an epoch also sees the batches, and draws the numbers."""
    check_data_and_randomness(row, place, steps=(5,))


def check_data_and_randomness(row: Row, place: Place, steps: Sequence[int]) -> None:
    """The rule, at several steps."""
    for rank, (unbroken, resumed) in enumerate(place.run(_draw_and_resume, row, place.strategy, place.folder, steps)):
        for step, outcome in resumed.items():
            wrong = differences(unbroken, outcome)
            assert not wrong, f"rank {rank}, broken off after step {step}: {wrong}"


def _draw_and_resume(row: Row, strategy: Strategy, folder: Path, steps: Sequence[int]) -> tuple[Any, dict[int, Any]]:
    def draw(seed: int, *around: L.Callback, **arguments: Any) -> Any:
        seed_everything(seed)
        exact = [] if row.callback is ExactResume else [ExactResume()]
        return fit(row, folder, strategy=strategy, model="drawn", around=[*exact, *around], **arguments)

    paths = {step: folder / f"drawn-{step}.ckpt" for step in steps}
    run = draw(0, *(SaveAt(step, path) for step, path in paths.items()))
    unbroken = {**run.outcome(), "last": run.model.seen[-1], "random": random_states()}
    resumed = {}
    for step, path in paths.items():
        run = draw(1, resume=path)
        resumed[step] = {**run.outcome(), "last": run.model.seen[-1], "random": random_states()}
    return unbroken, resumed


@rule()
def saves_only_what_loads_safely(row: Row, place: Place) -> None:
    """`torch.load(weights_only=True)` takes the checkpoint; the state holds only tensors and plain Python."""
    path = place.folder / "safe.ckpt"
    run = fit(row, place.folder, around=[SaveAt(row.crash_steps[0], path)])
    assert run.callback is not None
    state = run.callback.state_dict()
    unsafe = _unsafe(state, "state")
    assert not unsafe, f"not loadable with weights_only: {unsafe}"
    saved = torch.load(path, weights_only=True)["callbacks"]
    assert not state or run.callback.state_key in saved, f"the checkpoint has {sorted(saved)}"


@rule()
def state_survives_a_round_trip(row: Row, place: Place) -> None:
    """A new callback that loads a state saves the same state."""
    run = fit(row, place.folder)
    assert run.callback is not None
    state = run.callback.state_dict()
    other = row.build()
    other.load_state_dict(state)
    wrong = differences(state, other.state_dict(), "state")
    assert not wrong, wrong


@rule()
def state_carries_a_version(row: Row, place: Place) -> None:
    """Whoever loads a state knows its format, and refuses one that is newer."""
    run = fit(row, place.folder, steps=2)
    assert run.callback is not None
    state = run.callback.state_dict()
    if not state:
        return
    version = state.get("version")
    assert type(version) is int, f"state['version'] is {version!r}"
    with expect(ValueError, "a state of a newer version was loaded") as caught:
        row.build().load_state_dict({**state, "version": version + 1})
    words = f"saved by a newer lightning_eff: state version {version + 1}, this one knows up to {version}"
    assert words in str(caught.error), f"the error does not say {words!r}: {caught.error}"


def _unsafe(value: Any, where: str) -> list[str]:
    if type(value) not in _SAFE:  # a subclass, such as a defaultdict or a NumPy scalar, is refused by torch.load
        return [f"{where}: {type(value).__name__}"]
    if isinstance(value, dict):
        keys = [f"{where}: key {key!r}" for key in value if type(key) not in (str, int)]
        return keys + [text for key, entry in value.items() for text in _unsafe(entry, f"{where}[{key!r}]")]
    if isinstance(value, list | tuple):
        return [text for i, entry in enumerate(value) for text in _unsafe(entry, f"{where}[{i}]")]
    return []
