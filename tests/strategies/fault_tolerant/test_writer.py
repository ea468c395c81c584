from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from harness.runs import quiet_trainer
from lightning_eff.strategies.fault_tolerant.writer import adopt_places, begin_to_write, places


def test_another_writer_carries_a_csv_file_on(tmp_path: Path) -> None:
    """By itself a CSVLogger deletes what it finds."""
    first = CSVLogger(tmp_path, name="run")
    first.log_metrics({"loss": 1.0}, step=0)
    first.save()
    file = Path(first.log_dir) / "metrics.csv"
    file.write_text(file.read_text() + "0.5")  # killed in the midst of a line
    second = CSVLogger(tmp_path, name="run")
    trainer = quiet_trainer(accelerator="cpu", logger=second)
    trainer.strategy.connect(BoringModel())
    adopt_places(trainer, {"versions": [first.version], "folders": [], "saved": []})
    begin_to_write(trainer)
    second.log_metrics({"loss": 0.5, "accuracy": 0.1}, step=1)
    second.save()
    assert places(trainer)["versions"] == [0]
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["step"], row["loss"], row["accuracy"]) for row in rows] == [("0", "1.0", ""), ("1", "0.5", "0.1")]
