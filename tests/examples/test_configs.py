"""Every shipped config, by the command that stands in its head."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import examples.digits  # noqa: F401  (scikit-learn sets environment variables as it is imported)
from harness.leaks import REPOSITORY
from lightning_eff.cli import main

CONFIGS = sorted(path for path in (REPOSITORY / "examples").rglob("*.yaml") if path.parent.name != "clusters")

OF_THEIR_OWN = ("arc_topk", "fault_tolerant", "fsdp2")
"""Those whose run takes processes, which are started in `make test-all` alone."""

SHORT = """
    --trainer.accelerator cpu --trainer.devices 1 --trainer.max_steps 2 --trainer.log_every_n_steps 1
    --trainer.val_check_interval 2
    --trainer.limit_val_batches 1 --trainer.enable_progress_bar false --trainer.enable_model_summary false
"""
SMALL_GPT = """
    --model.config.block_size 32 --model.config.n_layer 2 --model.config.n_head 2 --model.config.n_embd 16
    --data.block_size 32 --data.pattern *.txt --data.val_fraction 0.3 --data.val_windows 4 --data.batch_size 2
"""


def command(config: Path) -> list[str]:
    """The command that the comment at its head prints, in one line."""
    head = config.read_text().split("\nseed_everything")[0].replace("\\\n#", "")
    (printed,) = re.findall(r"^#   lightning-eff (.+)$", head, re.MULTILINE)
    return printed.split()


def short(config: Path, folder: Path) -> list[str]:
    """Arguments that make a run of two steps on little text."""
    overrides = [*SHORT.split(), f"--trainer.default_root_dir={folder}", f"--trainer.logger.save_dir={folder}"]
    if config.parts[-3] != "gpt":
        return overrides
    for n in range(12):
        (folder / f"{n}.txt").write_text("".join(f"line {n * i % 7} of file {n}\n" for i in range(100)))
    return [*overrides, *SMALL_GPT.split(), f"--data.root={folder}"]


@pytest.mark.needs("jsonargparse")
@pytest.mark.parametrize(
    "config",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in OF_THEIR_OWN)) for path in CONFIGS],
)
@pytest.mark.timeout(240)
@pytest.mark.filterwarnings("ignore:SpectralAlignmentMonitor")  # two steps are too few for it, as it says
def test_the_printed_command_runs(config, tmp_path, monkeypatch):
    words = command(config)
    monkeypatch.chdir(REPOSITORY)
    assert words[words.index("--config") + 1] == str(config.relative_to(REPOSITORY))
    if config.stem == "fault_tolerant":
        pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")
        checkpoints = ["--trainer.callbacks.dirpath", str(tmp_path)]
        words[words.index("--replicas") + 1] = "1"
        line = [sys.executable, "-m", "lightning_eff", *words, *short(config, tmp_path), *checkpoints]
        done = subprocess.run(line, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    elif config.stem in OF_THEIR_OWN:  # which make a process group
        line = [sys.executable, "-m", "lightning_eff", *words, *short(config, tmp_path)]
        done = subprocess.run(line, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["lightning-eff", *words, *short(config, tmp_path)])
        assert main() == 0
    # A curve with a colour of its own is a folder of its own.
    assert any(b"train_loss" in events.read_bytes() for events in tmp_path.glob("**/events.out.tfevents.*"))


@pytest.mark.needs("jsonargparse")
@pytest.mark.parametrize("stem", OF_THEIR_OWN)
def test_one_that_takes_processes_is_read(stem, tmp_path, monkeypatch, capsys):
    """Every key of it, every class and every argument, as its command would read it."""
    if stem == "fault_tolerant":
        pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")
    (config,) = [path for path in CONFIGS if path.stem == stem]
    words = command(config)
    words = words[words.index("fit") :]  # behind `launch ... -m lightning_eff`
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-eff", *words, *short(config, tmp_path), "--print_config"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    read, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(config.read_text())
    found, wanted = read["trainer"]["strategy"], written["trainer"]["strategy"]
    assert found["class_path"].rpartition(".")[2] == wanted["class_path"].rpartition(".")[2]
    for name, value in wanted["init_args"].items():
        assert name == "compressor" or found["init_args"][name] == value
