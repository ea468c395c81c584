"""Packages that are built on Lightning, by their own doors, with each callback: do they train and resume?

python -m benchmarks.packages                            # those that this environment has
python -m benchmarks.packages --environments FOLDER      # makes one for each in FOLDER first, by pip, and runs there

A run is 40 steps on made-up data; a checkpoint is taken at step 20, and a second run resumes from it. Periods are
shorter than the defaults, which are those of long runs; all other arguments are the defaults.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch

import lightning_eff  # noqa: F401  (registers the strategy strings)
from benchmarks.rows import show, write_rows
from harness.runs import QUIET, begin
from lightning_eff import callbacks as ours
from lightning_eff.structure import coverage, select_matrices

ROOT = Path(__file__).parent.parent
STEPS, SAVED_AT = 40, 20


# --- the packages ---------------------------------------------------------------------------------------------------


def scvi(arguments: dict[str, Any]) -> None:
    """SCVI, a variational autoencoder of counts of genes."""
    package = import_module("scvi")
    data = package.data.synthetic_iid(batch_size=160, n_genes=60)
    package.model.SCVI.setup_anndata(data, batch_key="batch")
    package.model.SCVI(data, n_hidden=32, n_layers=2).train(max_epochs=100, batch_size=32, **arguments)


def chemprop(arguments: dict[str, Any]) -> None:
    """Message passing on molecules."""
    package = import_module("chemprop")
    molecules = ["C" * n + "O" for n in range(1, 33)] + ["c1ccccc1" + "C" * n for n in range(32)]
    points = [package.data.MoleculeDatapoint.from_smi(each, [float(len(each))]) for each in molecules]
    loader = package.data.build_dataloader(package.data.MoleculeDataset(points), batch_size=8, num_workers=0)
    nn = package.nn
    model = package.models.MPNN(nn.BondMessagePassing(d_h=32), nn.MeanAggregation(), nn.RegressionFFN(input_dim=32))
    L.Trainer(**arguments).fit(model, loader)


def pytorch_forecasting(arguments: dict[str, Any]) -> None:
    """The temporal fusion transformer."""
    package, pandas = import_module("pytorch_forecasting"), import_module("pandas")
    steps = list(range(40)) * 8
    frame = pandas.DataFrame(
        {"time": steps, "group": [str(i // 40) for i in range(320)], "value": [float(s % 7) for s in steps]}
    )
    data = package.TimeSeriesDataSet(
        frame, time_idx="time", target="value", group_ids=["group"], max_encoder_length=8, max_prediction_length=4,
        time_varying_unknown_reals=["value"],
    )  # fmt: skip
    model = package.TemporalFusionTransformer.from_dataset(data, hidden_size=16)
    L.Trainer(**arguments).fit(model, data.to_dataloader(batch_size=16, num_workers=0))


def neuralforecast(arguments: dict[str, Any]) -> None:
    """NHITS, blocks of multilayer perceptrons; a package of `pytorch_lightning`."""
    package, pandas = import_module("neuralforecast"), import_module("pandas")
    frame = pandas.DataFrame(
        {
            "unique_id": [str(i // 60) for i in range(240)],
            "ds": list(range(60)) * 4,
            "y": [float(i % 7) for i in range(240)],
        }
    )
    model = package.models.NHITS(h=4, input_size=8, mlp_units=[[32, 32]] * 3, **arguments)
    package.NeuralForecast([model], freq=1).fit(frame)


@dataclass(frozen=True)
class Package:
    """One that imports one name of Lightning."""

    requirement: str
    train: Callable[[dict[str, Any]], None]
    lightning: str = "lightning.pytorch"
    strategy: str = "ddp_bf16"


PACKAGES = {
    # Some of its layers go without a gradient.
    "scvi-tools": Package("scvi-tools==1.4.2", scvi, strategy="ddp_bf16_find_unused_parameters_true"),
    "chemprop": Package("chemprop==2.3.1", chemprop, strategy="ddp_bf16_find_unused_parameters_true"),
    "pytorch-forecasting": Package(
        "pytorch-forecasting==1.8.0", pytorch_forecasting, strategy="ddp_bf16_find_unused_parameters_true"
    ),
    "neuralforecast": Package("neuralforecast==3.3.0", neuralforecast, "pytorch_lightning"),
}


# --- the callbacks --------------------------------------------------------------------------------------------------


def _grades(callback: Any) -> str:
    return f"{len(callback.frozen)} frozen"


def _misa(callback: Any) -> str:
    return f"{sum(value > 0 for value in callback.importance.values())} of {len(callback.importance)} have had a turn"


def _monitor(callback: Any) -> str:
    return f"{sum(value == value for value in callback.majority.values())} of {len(callback.layers)} layers seen"


CALLBACKS: dict[str, tuple[Callable[[], L.Callback], Callable[[Any], str]]] = {
    "ZClip": (lambda: ours.ZClip(warmup_steps=10), lambda callback: f"{int(callback.spike_count())} spikes"),
    "GradES": (lambda: ours.GradES(every_n_steps=2, alpha=0.3), _grades),
    "MISA": (lambda: ours.MISA(every_n_steps=4), _misa),
    "EMA": (lambda: ours.EMA(), lambda callback: f"{callback.collected} collected"),
    "CheckpointAveraging": (
        lambda: ours.CheckpointAveraging(every_n_steps=5),
        lambda callback: f"{callback.collected} collected",
    ),
    "SpectralAlignmentMonitor": (lambda: ours.SpectralAlignmentMonitor(every_n_steps=4), _monitor),
    "TrainingGuard": (
        lambda: ours.TrainingGuard(every_n_steps=5, margin=4, read_every_n_steps=5),
        lambda callback: "no alarm",
    ),
    "Preemption": (lambda: ours.Preemption(), lambda callback: "no notice"),
    "ExactResume": (lambda: ours.ExactResume(), lambda callback: ""),
    "AsyncCheckpoint": (lambda: ours.AsyncCheckpoint(), lambda callback: ""),
    "RunHealth": (lambda: ours.RunHealth(), lambda callback: ""),
    "GradientStats": (lambda: ours.GradientStats(), lambda callback: ""),
    "CompressionMonitor": (lambda: ours.CompressionMonitor(), lambda callback: ""),
    "TensorBoardLayout": (lambda: ours.TensorBoardLayout(), lambda callback: ""),
}


@dataclass
class Seen:
    """What a run has shown; some packages train with copies of the callbacks that they are given."""

    steps: int = 0
    share: float = 0.0
    acts: str = ""


SEEN = Seen()


class Watch(L.Callback):
    """How far the run came, what the callback did, and what of the module is selected by default."""

    def __init__(self, path: Path | None, acts: Callable[[Any], str] | None) -> None:
        self.path, self.acts, self.saved = path, acts, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainable = {name: p.requires_grad for name, p in pl_module.named_parameters()}
        pl_module.requires_grad_(True)  # whatever a callback has frozen by now
        SEEN.share = coverage(pl_module, select_matrices(pl_module))[0]
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_(trainable[name])

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        SEEN.steps = trainer.global_step
        if self.path is not None and SEEN.steps >= SAVED_AT and not self.saved:
            self.saved = True
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.acts is not None:
            (callback,) = (each for each in trainer.callbacks if type(each).__name__ in CALLBACKS)
            SEEN.acts = self.acts(callback)


@contextmanager
def resuming(package: str, path: Path) -> Iterator[None]:
    """Whoever calls ``fit`` resumes: not every package has an argument for it."""
    trainer = import_module(package).Trainer
    fit = trainer.fit

    def resumed(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Their checkpoints hold classes of their own.
        return fit(self, *args, **{**kwargs, "ckpt_path": str(path), "weights_only": False})

    with mock.patch.object(trainer, "fit", resumed):
        yield


def run(package: Package, make: Any, acts: Any, folder: Path, more: dict[str, Any]) -> dict[str, Any]:
    """Train, and resume in a second run; what came of both."""
    global SEEN
    row: dict[str, Any] = {"selected": "", "trains": False, "resumes": False, "acts": "", "says": ""}
    path = folder / "middle.ckpt"
    for what in ("trains", "resumes"):
        SEEN = Seen()
        begin(0)
        watch = Watch(path if what == "trains" else None, acts)
        arguments: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_steps": STEPS, "log_every_n_steps": 5}
        arguments |= {**QUIET, "default_root_dir": folder, "callbacks": [*([make()] if make else []), watch], **more}
        try:
            with resuming(package.lightning, path) if what == "resumes" else nullcontext():
                package.train(arguments)
        except Exception as error:
            row["says"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            break
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        row[what] = SEEN.steps == STEPS
        row |= {"selected": f"{SEEN.share:.2f}", "acts": SEEN.acts} if what == "trains" else {}
    return row


def measure(name: str, only: str | None) -> Iterator[dict[str, Any]]:
    """The rows of one package that this environment has; ``only`` those whose name has this in it."""
    package = PACKAGES[name]
    version = importlib.metadata.version(name)
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {"none": (None, None, {})}
    cases |= {title: (make, acts, {}) for title, (make, acts) in CALLBACKS.items()}
    cases[f"strategy {package.strategy}"] = (None, None, {"strategy": package.strategy})
    for title, (make, acts, more) in cases.items():
        if only is not None and only not in title:
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = run(package, make, acts, Path(folder), more)
        yield {"package": name, "version": version, "imports": package.lightning, "with": title, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="a folder in which to make an environment for each package")
    parser.add_argument("--only", help="rows whose name has this in it, such as MISA or strategy")
    parser.add_argument("packages", nargs="*", default=list(PACKAGES), help="some of them")
    args = parser.parse_args()
    for name in args.packages:
        if args.environments is not None:
            python = args.environments / name / "bin" / "python"
            if not python.exists():
                subprocess.run([sys.executable, "-m", "venv", args.environments / name], check=True)
                wanted = [PACKAGES[name].requirement, f"lightning=={L.__version__}", f"{ROOT}[tensorboard]", "rich"]
                subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
            command = [python, "-m", "benchmarks.packages", name, *(["--only", args.only] if args.only else [])]
            subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
            continue
        rows = []
        for row in measure(name, args.only):  # each at once: who stops here has those before
            rows.append(row)
            write_rows("packages", [row], key=("package", "with"))
        show(f"{name}: {STEPS} steps with each, and resumed at {SAVED_AT}", rows, [*list(rows[0])[3:]])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
