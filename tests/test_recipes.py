"""The recipes: what they make, that it trains, and that YAML says the same."""

import subprocess
import sys

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_eff
from examples.digits import DigitsDataModule, DigitsModule
from examples.gpt import GPTConfig, GPTModule, TextDataModule
from harness import REPOSITORY
from harness.runs import fit, seed_everything
from lightning_eff import recipe, recipe_yaml
from lightning_eff.callbacks import MISA, CheckpointAveraging, TrainingGuard
from lightning_eff.cli import main
from lightning_eff.recipes import SHORTEST, entries

CASES = [("pretrain", {}), ("finetune", {}), ("finetune", {"low_memory": True}), ("vision", {"resumable": False})]
IDS = ["pretrain", "finetune", "low_memory", "vision"]


def of(kind, callbacks):
    (found,) = [callback for callback in callbacks if isinstance(callback, kind)]
    return found


@pytest.mark.parametrize(("purpose", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("steps", [SHORTEST, 21, 300, 10_000, 10**7])
def test_settings_hang_together_at_every_length(purpose, options, steps):
    callbacks = recipe(purpose, steps, **options)  # each constructor checks what it is given
    names = [type(callback).__name__ for callback in callbacks]
    assert len(set(names)) == len(names)
    assert ("ExactResume" in names) == options.get("resumable", True)
    assert ("MISA" in names) == options.get("low_memory", False)
    if purpose == "finetune":
        average = of(CheckpointAveraging, callbacks)
        last = average.start_step + 4 * average.every_n_steps
        assert average.start_step >= steps // 2
        assert last <= steps


def test_the_guard_of_a_long_run_has_its_defaults():
    guard, default = of(TrainingGuard, recipe("pretrain", 10_000)), TrainingGuard()
    assert (guard.every_n_steps, guard.margin, guard.lr_steps) == (100, 50, 200)
    assert {name: getattr(default, name) for name in ("every_n_steps", "margin", "lr_steps")} == {
        name: getattr(guard, name) for name in ("every_n_steps", "margin", "lr_steps")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"purpose": "pretraining"}, "purpose='pretraining' is not allowed: it must be one of 'pretrain', 'finetune'"),
        ({"steps": 19}, "steps=19 is not allowed: it must be an integer of at least 20"),
        ({"steps": 1e4}, r"steps=10000.0 is not allowed"),
        ({"low_memory": 1}, "low_memory=1 is not allowed: it must be True or False"),
        ({"low_memory": True}, "low_memory=True is not allowed: it must be False with purpose='pretrain'"),
        ({"resumable": "no"}, "resumable='no' is not allowed"),
    ],
)
def test_bad_input_is_named(arguments, message):
    for function in (recipe, recipe_yaml):
        with pytest.raises(ValueError, match=message):
            function(**{"purpose": "pretrain", "steps": 1000, **arguments})


def test_a_gpt_is_trained_and_goes_on_exactly(tmp_path):
    """The whole recipe in one run; resumed from step 12 it ends with the weights of the unbroken one."""
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text("".join(f"line {n * i % 7} of file {n}\n" for i in range(100)))

    def run(steps, ckpt_path=None):
        seed_everything(0)
        config = GPTConfig(block_size=16, n_layer=2, n_head=2, n_embd=16)
        module = GPTModule(config, lr=1e-2, schedule="constant", warmup_steps=2)
        text = {"pattern": "*.txt", "block_size": 16, "batch_size": 2, "val_fraction": 0.3, "val_windows": 4}
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=12, save_top_k=-1)
        callbacks = [*recipe("pretrain", 40), saver]
        data = TextDataModule(tmp_path, **text)
        options = {"max_steps": steps, "num_sanity_val_steps": 0, "limit_val_batches": 1, "val_check_interval": 10}
        trainer = fit(module, *callbacks, data=data, ckpt_path=ckpt_path, **options)
        return module, trainer.callback_metrics

    unbroken, metrics = run(24)
    assert {"val_loss", "ema/val_loss", "zclip/grad_norm", "training_guard/alarms"} <= set(metrics)
    assert (tmp_path / "saved" / "ema-step=12.ckpt").exists()
    resumed, _ = run(24, tmp_path / "saved" / "step=12.ckpt")
    for name, parameter in unbroken.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_an_average_of_batch_norm_is_evaluated(tmp_path):
    seed_everything(0)
    callbacks = recipe("vision", 60, resumable=False)
    trainer = fit(DigitsModule(), *callbacks, data=DigitsDataModule(), max_epochs=2, num_sanity_val_steps=0)
    assert trainer.callback_metrics["val_acc"] > 0.9
    assert trainer.callback_metrics["ema/val_acc"] > 0.9


def test_low_memory_trains_a_few_matrices_at_a_time():
    seed_everything(0)
    callbacks = recipe("finetune", 40, low_memory=True, resumable=False)
    trainer = fit(DigitsModule(), *callbacks, data=DigitsDataModule(), max_steps=40, num_sanity_val_steps=0)
    metrics = trainer.callback_metrics
    assert of(MISA, callbacks).every_n_steps == 2
    assert 0 < metrics["misa/trainable"] < 1
    assert {"average/val_loss", "val_loss"} <= set(metrics)


@pytest.mark.parametrize(("purpose", "options"), CASES, ids=IDS)
def test_yaml_says_the_same(purpose, options):
    found = yaml.safe_load(recipe_yaml(purpose, 5000, **options))["trainer"]
    assert found["max_steps"] == 5000
    written = [(each["class_path"], each.get("init_args", {})) for each in found["callbacks"]]
    chosen = entries(purpose, 5000, **{"low_memory": False, "resumable": True, **options})
    assert written == [(entry.name, entry.arguments) for entry in chosen]


def test_the_page_shows_what_is_printed(capsys):
    page = (REPOSITORY / "docs" / "recipes.md").read_text()
    for line in ("pretrain --steps 10000", "finetune --steps 1000 --low-memory", "vision --steps 5000 --not-resumable"):
        assert main(["recipe", *line.split()]) == 0
        assert f"```yaml\n# lightning-eff recipe {line}\n{capsys.readouterr().out}```\n" in page


@pytest.mark.needs("jsonargparse")
def test_the_command_line_trains_with_it(tmp_path, capsys, monkeypatch):
    assert main(["recipe", "vision", "--steps", "20", "--not-resumable"]) == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    config = REPOSITORY / "examples" / "digits" / "config.yaml"
    line = ["fit", f"--config={config}", f"--config={tmp_path / 'recipe.yaml'}", "--trainer.accelerator=cpu"]
    line += ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    line += [f"--trainer.logger.save_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["lightning-eff", *line])
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main() == 0
    (saved,) = tmp_path.glob("digits/version_0/config.yaml")
    names = [
        each["class_path"].rpartition(".")[2] for each in yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    ]
    assert names == ["ZClip", "TrainingGuard", "EMA", "TensorBoardLayout"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pretrain", "the following arguments are required: --steps"),
        ("pretrian --steps 100", "pretrian is not one of pretrain, finetune, vision. Did you mean `pretrain`?"),
        ("pretrain --steps 10", "--steps=10 is not allowed: it must be an integer of at least 20"),
        ("vision --steps 100 --low-memory", "--low-memory=True is not allowed: it must be False with purpose='vision'"),
    ],
)
def test_a_wrong_line_is_refused(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["recipe", *line.split()])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_package_alone_imports_no_lightning():
    code = "import sys, lightning_eff; lightning_eff.recipe; sys.exit(bool({'lightning', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert lightning_eff.recipe is recipe
