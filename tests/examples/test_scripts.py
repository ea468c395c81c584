"""The scripts, each with a small limit."""

import csv
import importlib
import logging

import pytest

import examples.digits  # noqa: F401  (scikit-learn sets environment variables as it is imported)
from harness import REPOSITORY

pytestmark = [
    pytest.mark.filterwarnings('ignore:.fit\\(ckpt_path="last"\\) is set'),
    pytest.mark.filterwarnings("ignore:Trainer was signaled to stop"),
]


def script(name: str):
    return importlib.import_module(f"examples.scripts.{name}")


@pytest.fixture(autouse=True)
def _one_cpu(monkeypatch):
    """On the CPU and quietly, whatever the script asks for; and no seeds are left in the environment."""
    import lightning as L

    made = L.Trainer.__init__

    def quietly(self, **arguments):
        made(self, **{**arguments, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False})

    monkeypatch.setattr(L.Trainer, "__init__", quietly)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


def test_plain_has_thirty_lines_and_goes_on_where_it_was(tmp_path, caplog):
    assert len((REPOSITORY / "examples/scripts/plain.py").read_text().splitlines()) <= 35
    first = script("plain").main(46, str(tmp_path))
    assert first.callback_metrics["ema/val_acc"] > 0.5
    assert (tmp_path / "last.ckpt").exists()
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        second = script("plain").main(69, str(tmp_path))
    assert second.global_step == 69
    assert f"Restoring states from the checkpoint path at {tmp_path}" in caplog.text
    assert second.callback_metrics["ema/val_acc"] >= 0.5


def test_the_gan_has_statistics_for_each_optimizer(tmp_path):
    trainer = script("gan").main(92, str(tmp_path))
    metrics = trainer.callback_metrics
    assert trainer.global_step == 92
    assert {"zclip/0/grad_norm", "zclip/1/grad_norm", "d_loss", "g_loss", "ema/val_mean_gap"} <= set(metrics)
    assert 0 < metrics["val_mean_gap"] < 0.5


def test_scalars_come_into_csv(tmp_path):
    script("loggers").main("csv", 20, str(tmp_path))
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        header = next(csv.reader(lines))
    assert {"train_loss", "zclip/grad_norm", "zclip/clipped"} <= set(header)
