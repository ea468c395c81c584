"""The example GPT: its model, its data, its configurations and its command line."""

import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.nn.parallel import DistributedDataParallel

from examples.gpt import GPT, GPTConfig, GPTModule, TextDataModule
from examples.gpt.data import is_validation
from harness import REPOSITORY
from harness.recorders import Losses
from harness.runs import fit, quiet_trainer

CONFIGS = REPOSITORY / "examples" / "gpt" / "configs"
TINY = GPTConfig(block_size=32, n_layer=2, n_head=2, n_embd=32)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of text that a tiny model learns quickly."""
    root = tmp_path / "text"
    root.mkdir()
    for n in range(20):
        (root / f"{n}.txt").write_text("".join(f"line {n * i % 7} of file {n}\n" for i in range(100)))
    return root


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide pytest's own arguments, which Lightning would warn about."""
    monkeypatch.setattr(sys, "argv", ["train"])


def data(root: Path, **kwargs) -> TextDataModule:
    arguments = {"pattern": "*.txt", "block_size": 32, "batch_size": 4, "val_fraction": 0.3, "val_windows": 8}
    return TextDataModule(root, **(arguments | kwargs))


def trained(
    root: Path, steps: int, *callbacks: L.Callback, ckpt_path: Path | None = None, seed: int = 0, **kwargs
) -> tuple[GPTModule, list[float]]:
    """Train the tiny model; returns the module and the loss of each step."""
    L.seed_everything(seed, verbose=False)
    module = GPTModule(TINY, lr=1e-2, warmup_steps=2, schedule="constant", fused=True)
    losses = Losses()
    options = {"max_steps": steps, "num_sanity_val_steps": 0, "limit_val_batches": 1, **kwargs}
    fit(module, losses, *callbacks, data=data(root, crops_per_epoch=40), ckpt_path=ckpt_path, **options)
    return module, losses.values


@pytest.mark.needs("jsonargparse")
@pytest.mark.usefixtures("command_line")
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("1m", 1),
        ("10m", 10),
        ("50m", 50),
        ("124m", 124),
        ("wsm", 1),
        ("grades", 1),
        ("moc", 1),
        ("cr_net", 1),
        ("skipv1", 1),
        ("watched", 1),
        ("fsdp2", 1),
        ("run_health", 1),
        ("misa", 10),
        ("arc_topk", 10),
        ("fault_tolerant", 1),
    ],
)
def test_config_instantiates_with_the_size_of_its_name(name, millions, monkeypatch):
    if name == "fault_tolerant":
        pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")
    monkeypatch.setenv("NUM_REPLICA_GROUPS", "3")  # of the launcher
    monkeypatch.setenv("REPLICA_GROUP_ID", "0")
    with torch.device("meta"):  # shapes without memory
        cli = LightningCLI(
            args=["--config", str(CONFIGS / f"{name}.yaml"), "--trainer.accelerator", "cpu"],
            run=False,
        )
    parameters = sum(parameter.numel() for parameter in cli.model.parameters())
    assert parameters == pytest.approx(millions * 1e6, rel=0.06)
    assert cli.datamodule.block_size == cli.model.model.config.block_size
    if name == "fault_tolerant":  # the command line gives DDP every argument that it has
        assert isinstance(cli.trainer.strategy._setup_model(torch.nn.Linear(1, 1)), DistributedDataParallel)


def test_every_config_is_tested():
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == [
        "10m",
        "124m",
        "1m",
        "50m",
        "arc_topk",
        "cr_net",
        "fault_tolerant",
        "fsdp2",
        "grades",
        "misa",
        "moc",
        "run_health",
        "skipv1",
        "watched",
        "wsm",
    ]


def test_a_byte_does_not_change_earlier_logits():
    torch.manual_seed(0)
    model = GPT(TINY)
    tokens = torch.randint(256, (2, 32))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(dim=-1).all()


def test_loss_before_training_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    loss = GPT(TINY).loss(torch.randint(256, (8, 33)))
    assert loss.item() == pytest.approx(5.545, abs=0.05)  # log(256)


def test_decay_is_on_matrices_only():
    module = GPTModule(TINY, schedule="constant")
    matrices, vectors = module.configure_optimizers()["optimizer"].param_groups
    assert {p.ndim for p in matrices["params"]} == {2}
    assert matrices["weight_decay"] == 0.1
    assert {p.ndim for p in vectors["params"]} == {1}
    assert vectors["weight_decay"] == 0


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedule(schedule):
    module = GPTModule(TINY, lr=1.0, schedule=schedule, warmup_steps=4, min_lr_ratio=0.1)
    module.trainer = quiet_trainer(accelerator="cpu", max_steps=12)
    optimized = module.configure_optimizers()
    factor = optimized["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [factor(step) for step in (4, 8, 12)] == pytest.approx([1, 0.55, 0.1] if schedule == "cosine" else [1, 1, 1])


def test_default_files_are_disjoint_and_no_tests():
    module = TextDataModule()
    train_files, val_files = module.split_files()
    assert set(train_files).isdisjoint(val_files)
    assert 0.02 < len(val_files) / len(train_files) < 0.1
    folders = {part for path in train_files + val_files for part in path.relative_to(module.root).parts[:-1]}
    assert "asyncio" in folders
    assert folders.isdisjoint({"site-packages", "test", "tests"})


def test_split_hangs_on_the_name_alone():
    # sha256 of the name, its first 8 bytes as a fraction: 0.0629. A split that moved would spoil comparisons.
    assert is_validation("enum.py", 0.0630)
    assert not is_validation("enum.py", 0.0629)


def test_windows_cover_the_text_once(text):
    module = data(text, val_windows=None)
    module.setup()
    windows = [module.val_data[n] for n in range(len(module.val_data))]
    targets = torch.cat([window[1:] for window in windows])
    assert torch.equal(targets, module.val_data.data[1 : len(targets) + 1])
    assert len(module.val_data.data) - len(targets) <= 32


def test_crops_hang_on_seed_and_number(text):
    def epoch(module: TextDataModule, n: int) -> torch.Tensor:
        loader = module.train_dataloader()
        loader.sampler.set_epoch(n)
        return torch.stack(list(loader))

    modules = [data(text, crops_per_epoch=16, seed=seed) for seed in (0, 0, 1)]
    for module in modules:
        module.setup()
    first = epoch(modules[0], 0)
    assert first.shape == (4, 4, 33)
    assert first.dtype == torch.uint8
    assert torch.equal(first, epoch(modules[1], 0))
    assert not torch.equal(first, epoch(modules[2], 0))
    assert not torch.equal(first, epoch(modules[0], 1))


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"0 training files match '\*\.py'"):
        TextDataModule(tmp_path).setup()


def test_loss_falls_and_the_seed_decides_it(text):
    _, losses = trained(text, 40)
    assert sum(losses[-5:]) / 5 < 0.6 * losses[0]
    assert trained(text, 5)[1] == losses[:5]
    assert trained(text, 5, seed=1)[1] != losses[:5]


@pytest.mark.parametrize("step", [6, 10, 13])  # in the middle of an epoch of 10 steps, at its end, in the second
def test_resume_sees_the_same_text(text, tmp_path, step):
    unbroken, losses = trained(text, 16)

    def saving(steps, ckpt_path=None):
        checkpoints = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=step, save_top_k=-1)
        return trained(text, steps, checkpoints, ckpt_path=ckpt_path)

    saving(step)
    resumed, losses_after = saving(16, tmp_path / f"step={step}.ckpt")
    assert losses_after == losses[step:]
    for name, parameter in unbroken.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


def test_checkpoint_is_plain_data_and_makes_the_module_again(text, tmp_path):
    module, _ = trained(text, 2, ModelCheckpoint(tmp_path, save_last=True))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["config"]["n_embd"] == 32
    again = GPTModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert again.model.config == TINY
    assert torch.equal(again.model.head.weight, module.model.head.weight)


def command(config: Path, text: Path, folder: Path, overrides: str) -> LightningCLI:
    """`fit` of a configuration with a tiny model, and with these arguments."""
    tiny = f"""
        --trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false
        --trainer.logger.save_dir {folder}
        --model.config.block_size 32 --model.config.n_layer 1 --model.config.n_head 2 --model.config.n_embd 16
        --data.block_size 32 --data.root {text} --data.pattern *.txt
        --data.val_fraction 0.3 --data.val_windows 4 --data.batch_size 2
    """
    return LightningCLI(args=["fit", "--config", str(config), *tiny.split(), *overrides.split()])


@pytest.mark.needs("jsonargparse")
@pytest.mark.usefixtures("command_line")
def test_command_line(text, tmp_path):
    overrides = "--trainer.max_steps 4 --trainer.val_check_interval 2 --trainer.log_every_n_steps 1"
    cli = command(CONFIGS / "1m.yaml", text, tmp_path, overrides)
    metrics = cli.trainer.callback_metrics
    assert cli.trainer.global_step == 4
    assert {"train_loss", "val_loss", "val_bpb", "zclip/grad_norm"} <= set(metrics)
    assert metrics["val_bpb"].item() == pytest.approx(metrics["val_loss"].item() / 0.693147, rel=1e-5)


@pytest.mark.needs("jsonargparse")
@pytest.mark.usefixtures("command_line")
def test_a_sample_of_matrices_at_a_time(text, tmp_path):
    config = tmp_path / "misa.yaml"
    config.write_text((CONFIGS / "misa.yaml").read_text().replace("every_n_steps: 50\n", "every_n_steps: 2\n"))
    overrides = "--trainer.max_steps 5 --trainer.val_check_interval 5 --trainer.log_every_n_steps 1"
    metrics = command(config, text, tmp_path, f"{overrides} --model.config.n_layer 2").trainer.callback_metrics
    assert 0 < metrics["misa/used"] <= 1
    assert metrics["misa/trainable"] < 0.95  # the ends of so small a model are most of it


@pytest.mark.needs("jsonargparse")
@pytest.mark.usefixtures("command_line")
def test_warm_up_stable_merge(text, tmp_path):
    config = tmp_path / "wsm.yaml"
    schedule = {"every_n_steps: 125": "every_n_steps: 2", "start_step: 250": "start_step: 4"}
    written = (CONFIGS / "wsm.yaml").read_text()
    for old, new in schedule.items():
        assert old in written
        written = written.replace(old, new)
    config.write_text(written)
    overrides = f"--trainer.max_steps 24 --trainer.val_check_interval 6 --trainer.default_root_dir {tmp_path}"
    cli = command(config, text, tmp_path, f"{overrides} --model.warmup_steps 2")
    metrics = {name: value.item() for name, value in cli.trainer.callback_metrics.items()}
    losses = [metrics[f"{prefix}val_loss"] for prefix in ("", "average/2/", "average/4/", "average/")]
    assert len(set(losses)) == 4
    assert max(losses) < 6
    (path,) = tmp_path.glob("**/average-step=*.ckpt")
    average = GPTModule.load_from_checkpoint(path)
    assert average.model.config.n_embd == 16
    rates = {group["lr"] for group in cli.trainer.optimizers[0].param_groups}
    assert rates == {3e-3}  # stable to the end
