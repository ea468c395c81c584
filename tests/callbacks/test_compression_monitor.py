"""What the monitor logs, on two gloo processes, against what was really sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_eff.callbacks import CompressionMonitor, TensorBoardLayout
from lightning_eff.compression import predict
from lightning_eff.strategies import BF16, ArcTopK, CompressedDDPStrategy, Compressor
from tests.strategies.compressed_runs import ARC, train
from tests.suite.models import Net


def _logged(folder: Path, compressor: Compressor, relative_error: bool) -> dict[str, list[tuple[int, float]]]:
    callbacks = [CompressionMonitor(relative_error=relative_error), TensorBoardLayout()]
    logger = TensorBoardLogger(folder, name="run", version="0")
    strategy = CompressedDDPStrategy(compressor=compressor)
    trainer, _ = train(folder, strategy, *callbacks, steps=6, logger=logger, limit_val_batches=0)
    if trainer.global_rank:
        return {}
    events = EventAccumulator(logger.log_dir).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("comm/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("scheme", ["none", "ef14", "ef21"])
def test_logs_bytes_and_what_was_left_out(pool, tmp_path, scheme):
    compressor = ArcTopK(**ARC, error_feedback=scheme)
    found, _ = pool.run(_logged, tmp_path, compressor, True)
    assert sorted(found) == ["comm/bytes_per_step", "comm/compression_ratio", "comm/relative_error"]
    prediction = predict(compressor, {name: tuple(p.shape) for name, p in Net().named_parameters()}, 2)
    sent = prediction.bytes_sent + 3 * 4  # and three numbers that tell whether all send the same rows
    assert found["comm/bytes_per_step"] == [(step, sent) for step in (1, 3, 5)]
    ratio = pytest.approx(prediction.dense_bytes / sent)
    assert found["comm/compression_ratio"] == [(step, ratio) for step in (1, 3, 5)]
    assert [step for step, _ in found["comm/relative_error"]] == [1, 3, 5]
    assert all(0.05 < error < 1.2 for _, error in found["comm/relative_error"])


def test_measures_nothing_where_it_is_not_asked(pool, tmp_path):
    found, _ = pool.run(_logged, tmp_path, ArcTopK(**ARC), False)
    assert sorted(found) == ["comm/bytes_per_step", "comm/compression_ratio"]


def test_16_bits_leave_out_little(pool, tmp_path):
    found, _ = pool.run(_logged, tmp_path, BF16(), True)
    assert all(1e-4 < error < 1e-2 for _, error in found["comm/relative_error"])
    assert {ratio for _, ratio in found["comm/compression_ratio"]} == {2.0}
