"""Wrong command lines: exit status, what is said, and in how many lines."""

from __future__ import annotations

import shlex
import sys

import pytest
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_eff.cli import main

# Imported above, for a guess knows the classes that there are: with the test of `BoringModl` alone there was none.
MODEL = f"--seed_everything 1 --model {BoringModel.__module__}.BoringModel"
MOST_LINES = 3  # with Lightning's "Seed set to 0", where a constructor refuses

FILES = {
    "bad_key.yaml": "model: lightning.pytorch.demos.boring_classes.BoringModel\ntrainer:\n  max_step: 3\n",
    "bad_yaml.yaml": "model: [unclosed\n",
    "bad_class.yaml": "model: lightning.pytorch.demos.boring_classes.BoringModel\n"
    "trainer:\n  callbacks:\n    - class_path: ZClp\n",
    "bad_argument.yaml": "model: lightning.pytorch.demos.boring_classes.BoringModel\n"
    "trainer:\n  callbacks:\n    - class_path: ZClip\n      init_args: {z_tresh: 3}\n",
    "bad_value.yaml": "model: lightning.pytorch.demos.boring_classes.BoringModel\n"
    "trainer:\n  strategy:\n    class_path: CompressedDDPStrategy\n    init_args:\n"
    "      compressor: {class_path: ArcTopK, init_args: {ratio: 2}}\n",
    "no_class.yaml": "model:\n  lr: 3\n",
    "no_class_path.yaml": "model: lightning.pytorch.demos.boring_classes.BoringModel\n"
    "trainer:\n  callbacks:\n    - ZClip: {}\n",
    "faulty.py": """
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

class NoneHas(LightningModule):
    def __init__(self):
        None.x

class TooMany(LightningModule):
    def __init__(self):
        first, second = 1, 2, 3

class FromAnother(LightningModule):
    def __init__(self):
        try:
            {}["task"]
        except KeyError as error:
            raise ValueError("width=4 is not in the table") from error

class WithinAnother(LightningModule):
    def __init__(self):
        try:
            import no_such_module
        except ImportError:
            raise RuntimeError("set fast=False")

class InItsStep(BoringModel):
    def training_step(self, batch, batch_idx):
        raise MisconfigurationException("in a step")

class Unlinked(DDPStrategy):
    def __init__(self, link: int = 3):
        raise ValueError("there is no link")
""",
}

# Command line -> what is said.
TRAINING = {
    "--verson": "there is no argument --verson.",
    "fit": "what is missing is --model, a class such as --model=my_module.MyModel, or a config",
    "fit --model nowhere.Model": "nowhere.Model cannot be imported: No module named 'nowhere'",
    "fit --model BoringModl": "--model: there is no class BoringModl. Did you mean `BoringModel`?",
    f"fit {MODEL} --model.lr 3": "there is no argument --model.lr.",
    f"fit {MODEL} --trainer.max_stepz 3": "no argument --trainer.max_stepz. Did you mean `--trainer.max_steps`?",
    f"fit {MODEL} --trainer.max_steps many": "--trainer.max_steps=many is not allowed: it must be an integer.",
    f"fit {MODEL} --trainer.callbacks+=ZClp": "there is no class ZClp. Did you mean `ZClip`?",
    f"fit {MODEL} --trainer.callbacks+=ZClip --trainer.callbacks.z_tresh=3": "Did you mean `z_thresh`?",
    f"fit {MODEL} --trainer.callbacks+=ZClip --trainer.callbacks.z_thresh=-1": "z_thresh=-1.0 is not allowed",
    f"fit {MODEL} --trainer.callbacks+=ZClip --trainer.callbacks.z_thresh=high": "z_thresh=high is not allowed",
    f"fit {MODEL} --trainer.callbacks+=SpectralAlignmentMonitor --trainer.callbacks.action=roll": (
        "--trainer.callbacks.action=roll is not allowed: it must be one of log, warn, stop, rollback"
    ),
    f"fit {MODEL} --trainer.strategy=ddp_arctopk": "no strategy 'ddp_arctopk'. Did you mean `ddp_arc_topk`?",
    f"fit {MODEL} --trainer.strategy=CompressedDDPStrategy --trainer.strategy.compressor=ArcTopKK": (
        "--trainer.strategy.compressor: there is no class ArcTopKK. Did you mean `ArcTopK`?"
    ),
    f"fit {MODEL} --trainer.strategy=CompressedDDPStrategy --trainer.strategy.bucket_cap_mb=-1": (
        "fit: bucket_cap_mb=-1.0 is not allowed: it must be a number of MiB above 0, or None"
    ),
    f"fit {MODEL} --trainer.strategy=FSDP2Strategy --trainer.strategy.exclude=[]": "fit: exclude=[] is not allowed",
    f"fit {MODEL} --trainer.strategy=faulty.Unlinked --trainer.strategy.link=4": "fit: there is no link\n",
    f"fit {MODEL} --trainer.accelerator=gpuu": "invalid accelerator name: `accelerator='gpuu'`. Available names are",
    f"fit {MODEL} --trainer.precision=17": "--trainer.precision=17 is not allowed: it must be one of 64, 32, 16",
    f"fit {MODEL} --trainer.logger=TensorBoardLoger": "Did you mean `TensorBoardLogger`?",
    f"fit {MODEL} --trainer.devices=0 --trainer.accelerator=cpu": "`Trainer(devices='0')` value is not a valid input",
    "fit --config nowhere.yaml": "--config: File does not exist",
    "fit --config bad_yaml.yaml": "Problems parsing config",
    "fit --config bad_key.yaml": "there is no argument trainer.max_step. Did you mean `--trainer.max_steps`?",
    "fit --config bad_class.yaml": "there is no class ZClp. Did you mean `ZClip`?",
    "fit --config bad_argument.yaml": "there is no argument z_tresh. Did you mean `z_thresh`?",
    "fit --seed_everything 1 --config bad_value.yaml": (
        "fit: ratio=2.0 is not allowed: it must be a number above 0 and at most 1"
    ),
    "fit --seed_everything 1 --config no_class_path.yaml": (
        "the arguments of a Callback are given, and not its class: name it by class_path"
    ),
    "fit --config no_class.yaml": "the arguments of a LightningModule are given, and not its class",
    f"validate {MODEL} --ckpt_pth=x": "there is no argument --ckpt_pth. Did you mean `--ckpt_path`?",
}
TOOLS = {
    "docter": "no command `docter`. Did you mean `doctor`?",
    "fitt": "no command `fitt`. Did you mean `fit`?",
    "advise link --bad 3": "unrecognized arguments: --bad 3.",
    "advise link --link=50 --ranks=1": "--ranks=1 is not allowed: a link has at least 2 ranks",
    "advise link --link=50 --model=nonsense.Foo": "the model cannot be built: No module named 'nonsense'",
    "advise --link=50": "what was `lightning-eff advise` is `lightning-eff advise link --link=50`. See `lightning-eff",
    "advise": "what was `lightning-eff advise` is `lightning-eff advise link`",
    "advise modle": "argument link|model: modle is not one of link, model. Did you mean `model`?",
    "branch-decay a.ckpt --config a.yaml -o b.ckpt --steps 0": "--steps is 0: a decay takes at least 1",
    "branch-decay a.ckpt --config a.yaml -o b.ckpt --steps 9 --curve cosin": "Did you mean `cosine`?",
    "completion fish": "argument shell: fish is not one of bash, zsh",
    "doctor --compiler cuda:90": "unrecognized arguments: --compiler cuda:90. Did you mean `--compile`?",
    "doctor --compile cuda:99": "cuda:99 is no target. Did you mean `cuda:90`? There are cuda:75, cuda:80",
    "launch": "the following arguments are required: --replicas, SCRIPT",
    "launch --replicas two train.py": "argument --replicas: invalid int value: 'two'",
    "lighthouse --bind nowhere": "--bind='nowhere' is not allowed: it must be HOST:PORT",
    "list --all": "unrecognized arguments: --all",
    "merge": "the following arguments are required: CHECKPOINT, -o/--output",
    "merge a b -o out.ckpt --scheme unifrm": "step, posthoc. Did you mean `uniform`?",
    "verify": "the following arguments are required: PATH",
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run one command line in this process, in a folder with the files above: exit status, and what was printed."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "faulty", raising=False)

    def run(line):
        monkeypatch.setattr(sys, "argv", ["lightning-eff", *shlex.split(line)])
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=pytest.mark.needs("jsonargparse")) if line in TRAINING or "--model" in line else line
        for line in (*TRAINING, *TOOLS)
    ],
)
def test_a_wrong_command_line_ends_with_status_2_and_few_lines(run, line):
    status, out, err = run(line)
    assert status == 2
    assert (TRAINING | TOOLS)[line] in err
    assert len((out + err).splitlines()) <= MOST_LINES
    assert "lightning-eff" in err.splitlines()[-1]


@pytest.mark.needs("jsonargparse")
@pytest.mark.parametrize(
    ("model", "error", "said", "raised_from"),
    [
        ("NoneHas", AttributeError, "'NoneType' object has no attribute 'x'", type(None)),
        ("TooMany", ValueError, "too many values to unpack", type(None)),
        ("FromAnother", ValueError, "width=4 is not in the table", KeyError),
        ("WithinAnother", RuntimeError, "set fast=False", ImportError),
        ("InItsStep", MisconfigurationException, "in a step", type(None)),
    ],
)
def test_a_fault_of_the_model_itself_keeps_its_traceback(run, model, error, said, raised_from):
    with pytest.raises(error, match=said) as found:
        run(f"fit --seed_everything 1 --trainer.fast_dev_run 1 --trainer.accelerator cpu --model faulty.{model}")
    assert isinstance(found.value.__cause__ or found.value.__context__, raised_from)
    assert "faulty.py" in str(found.traceback[-1].path)


@pytest.mark.needs("jsonargparse")
def test_where_it_happened_is_shown_on_request(run, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(Exception, match=r"z_thresh=-1\.0 is not allowed"):
        run(f"fit {MODEL} --trainer.callbacks+=ZClip --trainer.callbacks.z_thresh=-1")
