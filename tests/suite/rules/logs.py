"""What a logger gets."""

from __future__ import annotations

import csv
import math

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from tests.suite.models import STEPS
from tests.suite.rules.registry import rule
from tests.suite.runs import Place, fit
from tests.suite.table import Row


@rule()
def needs_no_logger(row: Row, place: Place) -> None:
    """`logger=False` is fine: every other rule runs so; here nothing is written at all."""
    fit(row, place.folder)
    assert not list(place.folder.iterdir()), f"written without a logger: {list(place.folder.iterdir())}"


@rule()
def logs_to_tensorboard(row: Row, place: Place) -> None:
    """TensorBoard has the row's tags, with a number at every step that Lightning logs, or from the row's first on."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for model, tags in (("net", row.tags), ("gan", row.tags_two_optimizers)):
        if model in row.refused_models or not tags:
            continue
        logger = TensorBoardLogger(place.folder, name=model)
        run = fit(row, place.folder, model=model, logger=logger, log_every_n_steps=2, limit_val_batches=0)
        events = EventAccumulator(logger.log_dir).Reload()
        found = set(events.Tags()["scalars"])
        missing = set(tags) - set(row.tags_later) - found
        assert not missing, f"{model}: {sorted(missing)} missing, there are {sorted(found)}"
        others = {tag for tag in found - set(tags) if "/" in tag and tag.split("/")[0] == tags[0].split("/")[0]}
        assert not others, f"{model}: {sorted(others)} are logged and not in the row"
        for tag in found & set(tags):
            values = events.Scalars(tag)
            steps = [value.step for value in values]
            first = steps[0] if tag in row.tags_later else row.logs_from
            assert steps == list(range(first, STEPS, 2)), f"{tag} at the steps {steps}"
            assert not any(math.isnan(value.value) for value in values), f"NaN in {tag}"
        assert run.trainer.global_step == STEPS * run.model.optimizer_count


@rule()
def logs_to_any_logger(row: Row, place: Place) -> None:
    """Another logger gets the scalars."""
    logger = CSVLogger(place.folder)
    fit(row, place.folder, logger=logger, log_every_n_steps=2, limit_val_batches=0)
    path = place.folder / "lightning_logs" / "version_0" / "metrics.csv"
    columns = set(next(csv.reader(path.read_text().splitlines()))) if path.exists() else set()
    missing = set(row.tags) - set(row.tags_later) - columns
    assert not missing, f"{sorted(missing)} missing"
