import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import Strategy

import lightning_eff.callbacks
from harness.leaks import REPOSITORY
from lightning_eff import __version__
from lightning_eff._registration import ENTRIES, OTHERS
from lightning_eff.cli import COMMANDS, TRAINING, main
from lightning_eff.compression import Compressor
from tests.cli import run_without

MODEL = "--model=lightning.pytorch.demos.boring_classes.BoringModel"
SHORT = [
    "--seed_everything=1",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=2",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run one command line in this process, in an empty directory."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["lightning-eff", *args])
        monkeypatch.setattr(sys, "path", list(sys.path))
        return main()

    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_names_every_command(run, capsys, args):
    assert run(*args) == 0
    out = capsys.readouterr().out
    assert [name for name in (*TRAINING, *COMMANDS) if not re.search(rf"^  {name} +\w", out, re.MULTILINE)] == []
    assert max(map(len, out.splitlines())) <= 80


def test_list_has_a_line_for_everything_that_is_exported(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run("list") == 0
    out = capsys.readouterr().out
    rooms = (lightning_eff.callbacks, lightning_eff.strategies)
    bases = (Callback, Strategy, Compressor)
    exported = [getattr(room, name) for room in rooms for name in room.__all__]
    classes = [each for each in exported if isinstance(each, type) and issubclass(each, bases) and each not in bases]
    names = [cls.__name__ for cls in classes] + [f"ddp_{entry.name}" for entry in ENTRIES] + list(OTHERS)
    assert len(names) > 20
    assert [name for name in names if not re.search(rf"^{name} +\w.{{15,}}", out, re.MULTILINE)] == []


_COMPLETE = """
eval "$SCRIPT"
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_lightning_eff
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.needs("jsonargparse")
def test_a_shell_completes_commands_options_and_names(run, capsys, tmp_path):
    assert run("completion", "zsh") == 0
    assert capsys.readouterr().out.startswith("autoload -U +X bashcompinit && bashcompinit\n_lightning_eff() {\n")
    assert run("completion", "bash") == 0
    script = capsys.readouterr().out

    def complete(*words):
        program = _COMPLETE.format(words=" ".join(f"'{word}'" for word in ("lightning-eff", *words)))
        environment = {**os.environ, "SCRIPT": script}
        done = subprocess.run(["bash", "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("do") == ["doctor"]
    assert complete("fit", "--trainer.max_s") == ["--trainer.max_steps"]
    assert complete("merge", "--sch") == ["--scheme"]
    # bash cuts the line at "=", and at nothing where COMP_WORDBREAKS has none.
    assert complete("fit", "--trainer.callbacks+", "=", "ZC") == ["ZClip"]
    found = complete("fit", "--trainer.strategy", "=", "ddp_arc")
    assert sorted(found) == ["ddp_arc_topk", "ddp_arc_topk_find_unused_parameters_true"]
    assert complete("fit", "--trainer.strategy", "Compr") == ["CompressedDDPStrategy"]
    assert set(complete("fit", "--trainer.strategy.compressor", "=")) >= {"ArcTopK", "Int8", "PowerSGD"}


def test_version(run, capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"lightning-eff {__version__}\n"


def test_an_unknown_command_is_refused_with_a_guess(run, capsys):
    assert run("docter") == 2
    assert "no command `docter`. Did you mean `doctor`?" in capsys.readouterr().err


def test_the_installed_script_and_the_module_are_the_same():
    script = Path(sys.executable).with_name("lightning-eff")
    for command in [[str(script)], [sys.executable, "-m", "lightning_eff"]]:
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=150, check=True)
        assert done.stdout == f"lightning-eff {__version__}\n"


@pytest.mark.needs("jsonargparse")
def test_fit_with_callbacks_by_short_name(run, tmp_path):
    charts = "--trainer.callbacks.charts={'mine': {'loss': ['Multiline', ['loss']]}}"
    callbacks = ["--trainer.callbacks+=TensorBoardLayout", charts, "--trainer.callbacks+=LearningRateMonitor"]
    assert run("fit", MODEL, *SHORT, *callbacks, "--trainer.callbacks.logging_interval=step") == 0
    config = yaml.safe_load((tmp_path / "lightning_logs/version_0/config.yaml").read_text())
    ours, theirs = config["trainer"]["callbacks"]
    assert ours["class_path"] == "lightning_eff.callbacks.TensorBoardLayout"
    assert ours["init_args"] == {"charts": {"mine": {"loss": ["Multiline", ["loss"]]}}}
    assert theirs["init_args"]["logging_interval"] == "step"


@pytest.mark.needs("jsonargparse")
def test_fit_from_yaml_with_short_names(run, tmp_path):
    (tmp_path / "run.yaml").write_text("""
model: lightning.pytorch.demos.boring_classes.BoringModel
data: lightning.pytorch.demos.boring_classes.BoringDataModule
trainer:
  callbacks:
    - class_path: TensorBoardLayout
      init_args:
        charts:
          norms:
            both: [Margin, [norm, low, high]]
""")
    assert run("fit", "--config=run.yaml", *SHORT) == 0
    (events,) = (tmp_path / "lightning_logs/version_0").glob("events.out.tfevents*")
    assert b"custom_scalars__config__" in events.read_bytes()


@pytest.mark.needs("jsonargparse")
@pytest.mark.parametrize("name", ["CompressedDDPStrategy", "FSDP2Strategy", "FaultTolerantDDPStrategy"])
def test_a_strategy_goes_by_its_class_alone_on_the_command_line_and_in_the_config_it_prints(
    monkeypatch, run, tmp_path, capsys, name
):
    from lightning_eff.cli.training import _TrainingCLI

    monkeypatch.setenv("NUM_REPLICA_GROUPS", "2")  # what `lightning-eff launch` tells
    monkeypatch.setenv("REPLICA_GROUP_ID", "0")
    monkeypatch.setattr(_TrainingCLI, "_run_subcommand", lambda cli, subcommand: built.append(cli.trainer.strategy))
    built: list[Strategy] = []
    line = [MODEL, *SHORT, f"--trainer.strategy={name}"]
    assert run("fit", *line) == 0
    with pytest.raises(SystemExit, match="0"):
        run("fit", *line, "--print_config")
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert run("fit", "--config=run.yaml") == 0
    assert [type(strategy).__name__ for strategy in built] == [name, name]


@pytest.mark.needs("jsonargparse")
def test_options_may_come_before_the_command(run, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("fit:\n  trainer:\n    max_steps: 7\n")
    with pytest.raises(SystemExit) as exit:
        run("--config=run.yaml", "fit", MODEL, "--print_config")
    assert exit.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 7


@pytest.mark.needs("jsonargparse")
def test_validate_test_and_predict_run(run):
    for command in ("validate", "test", "predict"):
        assert run(command, MODEL, "--seed_everything=1", "--trainer.accelerator=cpu", "--trainer.fast_dev_run=1") == 0


@pytest.mark.needs("jsonargparse")
def test_a_run_starts_again_in_its_own_log_directory(run, tmp_path):
    again = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.version=7"]
    assert run("fit", MODEL, *SHORT, *again) == 0
    (checkpoint,) = (tmp_path / "logs").rglob("*.ckpt")
    assert run("fit", MODEL, *SHORT, *again, "--trainer.max_steps=4", f"--ckpt_path={checkpoint}") == 0
    steps = {torch.load(path, weights_only=True)["global_step"] for path in (tmp_path / "logs").rglob("*.ckpt")}
    assert 4 in steps


@pytest.mark.needs("jsonargparse")
def test_a_model_in_the_current_directory_can_be_named(tmp_path):
    (tmp_path / "my_models.py").write_text(
        "from lightning.pytorch.demos.boring_classes import BoringModel\nclass Mine(BoringModel):\n    pass\n"
    )
    script = Path(sys.executable).with_name("lightning-eff")
    command = [str(script), "fit", "--model=my_models.Mine", "--print_config"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=True)
    assert yaml.safe_load(done.stdout)["model"]["class_path"] == "my_models.Mine"


def _subclasses(cls):
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


@pytest.mark.parametrize("base", [Callback, Strategy])
def test_no_short_name_of_ours_is_one_of_lightnings(base):
    # jsonargparse refuses a short name that two classes have: a clash would take Lightning's name away as well.
    import lightning.pytorch.cli  # noqa: F401  (imports what LightningCLI imports)

    found = set(_subclasses(base))
    ours = [cls.__name__ for cls in found if cls.__module__.startswith("lightning_eff.")]
    theirs = {cls.__name__ for cls in found if cls.__module__.startswith("lightning.")}
    assert len(theirs) > 5
    assert sorted(set(ours) & theirs) == []
    assert len(set(ours)) == len(ours)


def test_every_exported_callback_is_a_class_of_its_own_name():
    for name in lightning_eff.callbacks.__all__:
        assert getattr(lightning_eff.callbacks, name).__name__ == name


@pytest.mark.needs("jsonargparse")
@pytest.mark.parametrize("module", ["jsonargparse", "docstring_parser"])
def test_without_the_cli_extra_training_names_it(tmp_path, module):
    code = "from lightning_eff.cli import main; sys.exit(main(['fit']))"
    status, out, err = run_without([module], code, tmp_path)
    assert status == 1
    assert out == ""
    assert f"lightning-eff fit: {module} cannot be found" in err
    assert "pip install 'lightning-eff[cli]'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("module", "code", "said"),
    [
        (
            "sklearn",
            "import examples.digits",
            "scikit-learn cannot be found. It comes with: pip install",
        ),
        pytest.param(
            "rich",
            "import examples.gpt.demo",
            "rich cannot be found. It comes with: pip install",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "tensorboard",
            "import examples.gpt.demo",
            "tensorboard cannot be found. It comes with: pip install 'lightning-eff[examples]'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "tensorboard",
            f"""
from lightning_eff.cli import main
sys.argv = ["lightning-eff", "fit", "{MODEL}", "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=."]
sys.exit(main())
""",
            "It comes with: pip install 'lightning-eff[tensorboard]'",
            marks=pytest.mark.needs("jsonargparse"),
        ),
    ],
)
def test_without_an_extra_what_needs_it_names_it(tmp_path, module, code, said):
    place = f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
    _, out, err = run_without([module], place + code, tmp_path)
    assert said in out + err


def test_without_any_extra_all_imports_doctor_reports_and_a_layout_says_what_it_needs(tmp_path):
    """One process for the three: what takes its time is to import Lightning."""
    extras = ["triton", "torchft", "tensorboard", "matplotlib", "jsonargparse", "docstring_parser", "rich", "sklearn"]
    code = """
import lightning_eff, lightning_eff.callbacks, lightning_eff.kernels, lightning_eff.strategies
from lightning_eff.cli import main
assert main(["--help"]) == 0
print("<>")
assert main(["doctor"]) == 0
print("<>", file=sys.stderr)
import lightning as L
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_eff.callbacks import TensorBoardLayout
layout = TensorBoardLayout()
L.Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, callbacks=[layout]).fit(BoringModel())
"""
    status, out, err = run_without(extras, code, tmp_path)
    assert status == 0, err
    before, _, told = err.partition("<>\n")
    assert before == ""
    assert "no TensorBoardLogger, which needs: pip install 'lightning-eff[tensorboard]'" in told
    helped, _, report = out.partition("<>\n")
    assert "doctor" in helped
    report = report.partition("Everything that is required is there.\n")
    assert report[1]
    assert report[0].isascii()
    (rich,) = [line.split() for line in report[0].splitlines() if line.startswith("rich ")]
    assert rich[:4] == ["rich", "-", ">=13", "missing"]
    assert "To get jsonargparse, rich: pip install 'lightning-eff[cli]'" in report[0]
