"""The scripts, each with a small limit; those of other packages are skipped where these are not installed."""

import csv
import importlib
import importlib.util
import logging
import os
import sqlite3
import subprocess
import sys

import pytest

import examples.digits  # noqa: F401  (scikit-learn sets environment variables as it is imported)
from harness import REPOSITORY

pytestmark = [
    pytest.mark.filterwarnings('ignore:.fit\\(ckpt_path="last"\\) is set'),
    pytest.mark.filterwarnings("ignore:Trainer was signaled to stop"),
]


def script(name: str):
    return importlib.import_module(f"examples.scripts.{name}")


def packages(*names: str):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


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


@pytest.fixture
def text(tmp_path):
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text("".join(f"line {n * i % 7} of file {n}\n" for i in range(100)))
    return tmp_path


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


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_logger_without_its_package_is_named(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(script("loggers"), "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"{kind} cannot be found. It comes with: pip install {kind}"):
        script("loggers").main(kind, 20, str(tmp_path))


def _log_to(kind, folder):
    """In a process of its own: W&B leaves a server running until the process ends."""
    code = f"from examples.scripts.loggers import main; main({kind!r}, 20, {str(folder)!r})"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=170, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


@packages("mlflow", "sqlalchemy")  # mlflow-skinny has no database
@pytest.mark.slow
def test_scalars_come_into_mlflow(tmp_path):
    _log_to("mlflow", tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        keys = {key for (key,) in database.execute("select distinct key from metrics")}
    assert "zclip/grad_norm" in keys


@packages("wandb")
@pytest.mark.slow
def test_scalars_come_into_wandb_offline(tmp_path):
    _log_to("wandb", tmp_path)
    assert list(tmp_path.rglob("*.wandb"))


@packages("transformers", "peft")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
@pytest.mark.parametrize("how", ["lora", "misa"])
def test_a_llama_is_tuned(how, text):
    trainer = script("huggingface").main(how, 40, str(text))
    metrics = trainer.callback_metrics
    assert metrics["val_loss"] < 5.54  # of a uniform guess: log(256), 5.545
    assert {"val_loss", "average/val_loss"} <= set(metrics)
    assert ("misa/trainable" in metrics) == (how == "misa")
    if how == "lora":
        trained = {name for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)


@packages("timm")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_network_of_timm_is_averaged():
    metrics = script("timm_digits").main("resnet10t", 46).callback_metrics
    assert {"val_acc", "ema/val_acc"} <= set(metrics)
    assert metrics["train_loss"] < 1.5  # log(10) is a uniform guess; BatchNorm's statistics are not there so early


def test_without_timm_its_script_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "examples.scripts.timm_digits", raising=False)
    with pytest.raises(ImportError, match=r"timm cannot be found\. It comes with: pip install timm"):
        script("timm_digits")


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_a_missing_package_is_named(package, monkeypatch):
    for name in ("transformers", "peft"):
        if name == package or importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "examples.scripts.huggingface", raising=False)
    with pytest.raises(ImportError, match=r"cannot be found\. It comes with: pip install transformers peft"):
        script("huggingface")


_TWICE = """
from examples.scripts.fsdp2 import main
import sys, torch
torch.set_num_threads(1)
trainer = main(2, sys.argv[1], sys.argv[2])
trainer.print(f"at step {trainer.global_step}")
"""


@pytest.mark.slow
def test_fsdp2_goes_on_from_its_shards(text, tmp_path):
    (tmp_path / "run.py").write_text(_TWICE)
    folder = tmp_path / "saved"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    for step in (2, 4):
        line = [sys.executable, str(tmp_path / "run.py"), str(folder), str(text)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=REPOSITORY, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"at step {step}\n" in done.stdout
        assert (folder / f"{step}.ckpt" / ".metadata").exists()
