"""What a user meets at the door: arguments, conflicts, the command line, the docstring."""

from __future__ import annotations

import contextlib
import inspect
import sys
import typing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI

from tests.suite.models import Net
from tests.suite.rules.registry import rule
from tests.suite.runs import Place, expect, fit
from tests.suite.table import STRATEGIES, Row, Strategy

LABELS = ("Runs in:", "Reads:", "Changes:", "Collectives:", "Host syncs:", "Strategies:")


@rule()
def refuses_bad_arguments(row: Row, place: Place) -> None:
    """A wrong argument is a ValueError in the constructor, with the argument's name and its value."""
    for arguments in row.bad_arguments:
        ((name, value),) = arguments.items()
        with expect(ValueError, f"{name}={value!r} was accepted") as caught:
            row.build(**{name: value})
        message = str(caught.error)
        assert name in message, f"{name}={value!r}: the message does not name the argument: {message}"
        assert str(value) in message, f"{name}={value!r}: the message does not give the value: {message}"


@rule()
def refuses_conflicts(row: Row, place: Place) -> None:
    """What does not go together with the Trainer is a MisconfigurationException before the first step."""
    cases: list[tuple[dict[str, Any], str]] = [*row.conflicts]
    cases += [({"model": model}, words) for model, words in row.refused_models.items()]
    for arguments, words in cases:
        with expect(MisconfigurationException, f"{arguments} was accepted") as caught:
            fit(row, place.folder, **arguments)
        assert words in str(caught.error), f"{arguments}: the message does not say {words!r}: {caught.error}"


@rule(*STRATEGIES)
def refuses_strategies(row: Row, place: Place) -> None:
    """A strategy that the row calls refused is refused in `setup`, on every rank."""
    words = row.refused_strategies.get(place.strategy.name)
    if words is None:
        return  # the other rules train on it
    for message in place.run(_refusal, row, place.strategy, place.folder):
        assert words in message, f"the message does not say {words!r}: {message}"


def _refusal(row: Row, strategy: Strategy, folder: Path) -> str:
    with expect(MisconfigurationException, f"{strategy.name} was accepted") as caught:
        fit(row, folder, strategy=strategy)
    return str(caught.error)


@rule()
def says_what_it_touches(row: Row, place: Place) -> None:
    """The docstring has the fixed lines, in their order, with something said, and the arguments."""
    lines = [line.strip() for line in (inspect.getdoc(row.callback) or "").splitlines()]
    found = [label for line in lines for label in LABELS if line.startswith(label)]
    assert found == list(LABELS), f"the lines {LABELS} are expected, in this order; there are {found}"
    empty = [line for line in lines if line in LABELS]
    assert not empty, f"nothing said in {empty}"
    documented = {line.split(":")[0] for line in lines}
    missing = [name for name in _parameters(row) if name not in documented]
    assert not missing, f"arguments without a line: {missing}"


@rule()
def has_typed_arguments(row: Row, place: Place) -> None:
    """Every argument has a type and a default that YAML can hold."""
    hints = typing.get_type_hints(row.callback.__init__)
    for name, parameter in _parameters(row).items():
        assert name in hints, f"{name} has no type"
        plain = False
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        with contextlib.suppress(yaml.YAMLError):
            plain = yaml.safe_load(yaml.safe_dump(default)) == default
        assert plain, f"{name}: YAML cannot hold the default {default!r}"


@rule()
def works_from_the_command_line(row: Row, place: Place) -> None:
    """LightningCLI knows the callback by its short name, from YAML and from arguments; what it saves reads the same."""
    pytest.importorskip("jsonargparse")
    name = row.callback.__name__
    written = place.folder / "written.yaml"
    entry = {"class_path": name, "init_args": row.arguments}
    written.write_text(yaml.safe_dump({"trainer": {"logger": False, "callbacks": [entry]}}))
    from_yaml = _cli(["--config", str(written)])
    flags = [f"--trainer.callbacks.{key}={_flag(value)}" for key, value in row.arguments.items()]
    from_flags = _cli(["--trainer.logger=false", f"--trainer.callbacks+={name}", *flags])

    saved = place.folder / "saved.yaml"
    saved.write_text(from_yaml.parser.dump(from_yaml.config, skip_none=False))
    reloaded = _cli(["--config", str(saved)])
    wanted = _callback_config(from_yaml)
    assert wanted["init_args"].items() >= row.arguments.items(), wanted
    assert _callback_config(from_flags) == wanted, "arguments and YAML differ"
    assert _callback_config(reloaded) == wanted, "the saved config reads otherwise"
    for cli in (from_yaml, from_flags, reloaded):
        kinds = [type(callback) for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
        assert row.callback in kinds, kinds


def _cli(arguments: list[str]) -> LightningCLI:
    with mock.patch.object(sys, "argv", ["test"]):  # pytest's own arguments are not the CLI's
        try:
            return LightningCLI(
                Net, save_config_callback=None, seed_everything_default=False, run=False, args=arguments
            )
        except SystemExit as error:  # jsonargparse has printed why
            raise AssertionError(f"LightningCLI refuses {arguments}") from error


def _callback_config(cli: LightningCLI) -> dict[str, Any]:
    (entry,) = cli.config.trainer.callbacks
    return entry.as_dict()


def _flag(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def _parameters(row: Row) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(row.callback.__init__).parameters.items() if name != "self"}
