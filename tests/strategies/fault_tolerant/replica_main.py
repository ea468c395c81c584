"""A replica of the kill tests: trains a small model with ddp_ft, dies where it is told to, writes all down."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MeanMetric

import lightning_eff.callbacks
import lightning_eff.callbacks.averaging.beside_checkpoints
import lightning_eff.strategies.fault_tolerant.manager
import lightning_eff.strategies.fault_tolerant.replicas
from examples.gpt.model import GPT, GPTConfig
from harness import json_lines
from harness.runs import quiet_trainer
from lightning_eff.strategies import FaultTolerantDDPStrategy


class Noisy(Dataset[Any]):
    """Samples with random augmentation, which an orphan's batch must have as well."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 8, generator=generator)
        self.y = self.x.sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.01 * torch.randn(8), self.y[index], index


class Model(L.LightningModule):
    def __init__(self, settings: dict[str, Any], faults: Faults) -> None:
        super().__init__()
        width = settings.get("width", 32)
        # Different on every replica: the first step must make them equal.
        torch.manual_seed(faults.replica + 10 * faults.life + 100 * faults.process)
        self.net = nn.Sequential(
            nn.Linear(8, width), nn.ReLU(), nn.Dropout(settings.get("dropout", 0.2)), nn.Linear(width, width), nn.ReLU()
        )
        if settings.get("batch_norm"):
            self.net.append(nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 1)
        if settings.get("of_the_batch"):
            self.register_buffer("mean", torch.zeros(8))
            self.register_buffer("large", torch.zeros((), dtype=torch.int64))
        self.metric = MeanMetric()
        self.settings, self.faults = settings, faults

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.net(x)
        if hidden.requires_grad:
            hidden.register_hook(self._in_backward)
        return self.head(hidden)

    def _in_backward(self, gradient: Tensor) -> None:
        if not self.trainer.strategy._fit.steps.aside:
            self.faults.at("backward")

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        hurries = "until" in self.settings and Path(self.settings["until"]).exists()
        time.sleep(0.0 if hurries else self.settings.get("sleep", 0.0))
        if self.settings.get("of_the_batch"):
            self.follow(batch[0])
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, sync_dist=True)
        if self.settings.get("gather"):
            gathered = self.all_gather(loss.detach(), sync_grads=True)  # of a tensor that has no gradient
            self.log("spread", cast(Tensor, gathered).std(correction=0))
        if self.settings.get("gather") == "with gradients":
            self.all_gather(loss, sync_grads=True)
        self.faults.note(batch[2].tolist())
        if not self.trainer.strategy._fit.steps.aside:
            self.faults.at("forward")
        return loss

    def follow(self, x: Tensor) -> None:
        """A buffer that is replaced and then written to, and one that is written to for some batches alone."""
        self.mean = 0.9 * self.mean
        self.mean += 0.1 * x.mean(0)
        if x.mean() > 0:
            self.large += 1

    def validation_step(self, batch: Any, batch_index: int) -> None:
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.metric.update(loss)
        self.log("val_loss", loss, sync_dist=True)
        self.log("val_metric", self.metric)
        self.faults.at("validation")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Language(Model):
    """A GPT, in which MeCeFO finds attention and feed-forward networks."""

    def __init__(self, settings: dict[str, Any], faults: Faults) -> None:
        super().__init__(settings, faults)
        torch.manual_seed(faults.replica + 10 * faults.life)
        del self.head
        self.net = GPT(GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=16))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        time.sleep(self.settings.get("sleep", 0.0))
        tokens = (batch[0] * 50 + 128).clamp(0, 255).long()
        loss: Tensor = self.net.loss(tokens)
        loss.register_hook(self._in_backward)
        self.log("loss", loss, sync_dist=True)
        if not self.trainer.strategy._fit.steps.aside:
            self.faults.at("forward")
        return loss


class Manual(Model):
    """The same in manual optimization."""

    def __init__(self, settings: dict[str, Any], faults: Faults) -> None:
        super().__init__(settings, faults)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        loss = super().training_step(batch, batch_index)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        how = self.settings.get("how", "usual")
        if how == "in two":
            with optimizer.toggle_model(sync_grad=False):
                self.manual_backward(loss / 4, retain_graph=True)
            self.manual_backward(loss * 3 / 4)
        elif how == "direct":
            loss.backward()
        elif how == "by hand":
            parameters = list(self.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
        elif how != "closure":
            self.manual_backward(loss)
        if how == "clipped":  # by something that Lightning does not know
            nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        if how == "caught":
            optimizer = _Careless(optimizer)
        if how == "past Lightning":
            optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.step(closure=(lambda: self.manual_backward(loss)) if how == "closure" else None)
        schedule: Any = self.lr_schedulers()
        schedule.step()
        return loss


class _Careless:
    """Catches everything."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        try:
            self.optimizer.step(closure=closure)
        except BaseException:
            return


class Wandering(Manual):
    """Which of its optimizers steps depends on the batch."""

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        loss = Model.training_step(self, batch, batch_index)
        self.manual_backward(loss)
        optimizers: Any = self.optimizers()
        optimizers[int(batch[2].sum()) % 2].step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 1e-2) for part in (self.net, self.head)]


class Adversaries(Manual):
    """Two networks against each other, one of which accumulates for its second optimizer; each a part of the step."""

    def __init__(self, settings: dict[str, Any], faults: Faults) -> None:
        super().__init__(settings, faults)
        torch.manual_seed(
            0 if settings.get("equal_start") else faults.replica + 10 * faults.life + 100 * faults.process
        )
        width = settings.get("width", 32)
        del self.net, self.head
        self.maker = nn.Sequential(
            # No bias before the norm: its gradient would be rounding alone, which Adam makes large.
            nn.Linear(8, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(width, 8),
        )
        self.judge = nn.Sequential(
            nn.utils.parametrizations.spectral_norm(nn.Linear(8, width)), nn.Tanh(), nn.Linear(width, 1)
        )
        self.guess = nn.Linear(8, 1)
        self.average = nn.Linear(8, 1).requires_grad_(False)  # of `guess`; no optimizer has it
        self.average.load_state_dict(self.guess.state_dict())

    def parts(self, batch: Any, batch_index: int) -> Iterator[tuple[str, Any]]:
        """What is to be done, in order."""
        made = self.maker(batch[0])
        yield "toggle", 0
        judged = nn.functional.softplus(-self.judge(batch[0])).mean()
        judged = judged + nn.functional.softplus(self.judge(made.detach())).mean()
        yield "zero", 0
        yield "backward", judged
        yield "clip", 0
        yield "step", 0
        yield "untoggle", 0
        yield "log", ("judged", judged)
        yield "toggle", 1
        fooled = nn.functional.softplus(-self.judge(made)).mean() + (made - batch[0]).square().mean()
        yield "zero", 1
        yield "backward", fooled
        yield "step", 1
        yield "untoggle", 1
        yield "rates", None
        guessed = (self.guess(self.maker(batch[0]).detach()) - batch[1]).square().mean()
        yield "backward", guessed / 2
        if batch_index % 2:
            yield "step", 2
            yield "zero", 2
            with torch.no_grad():
                for mean, value in zip(self.average.parameters(), self.guess.parameters(), strict=True):
                    mean.lerp_(value, 0.1)
        yield "log", ("loss", judged + fooled + guessed)

    def training_step(self, batch: Any, batch_index: int) -> None:
        time.sleep(self.settings.get("sleep", 0.0))
        optimizers: Any = self.optimizers()
        schedules: Any = self.lr_schedulers()
        self.faults.note(batch[2].tolist())
        for what, value in self.parts(batch, batch_index):
            if what == "toggle":
                self.toggle_optimizer(optimizers[value])
                if not self.trainer.strategy._fit.steps.aside:
                    self.faults.at("forward")
            elif what == "untoggle":
                self.untoggle_optimizer(optimizers[value])
            elif what == "zero":
                optimizers[value].zero_grad()
            elif what == "clip":
                self.clip_gradients(optimizers[value], 0.1, "norm")
            elif what == "backward":
                value.register_hook(self._in_backward)
                self.manual_backward(value)
            elif what == "step":
                optimizers[value].step()
            elif what == "rates":
                for schedule in schedules:
                    schedule.step()
            else:
                self.log(*value, sync_dist=True)

    def configure_optimizers(self) -> Any:
        judge = torch.optim.AdamW(self.judge.parameters(), lr=1e-2)
        maker = torch.optim.AdamW(self.maker.parameters(), lr=1e-2)
        guess = torch.optim.SGD(self.guess.parameters(), lr=1e-2, momentum=0.9)
        schedules = [torch.optim.lr_scheduler.StepLR(judge, 10, 0.7), torch.optim.lr_scheduler.LinearLR(maker)]
        return [judge, maker, guess], schedules


class Faults:
    """Ends or stops this process at chosen points: ``[replica, step, phase, life, signal, process]``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.replica: int = settings["replica"]
        self.process: int = settings["process"]
        self.name: str = settings["name"]
        self.life: int = settings["life"]
        self.trainer: Any = None
        self.file = Path(settings["folder"]) / f"samples-{self.name}-{self.life}.jsonl"
        self.due = {
            (fault[2], fault[1]): fault[4]
            for fault in settings["faults"]
            if (fault[0], fault[3], fault[5]) == (self.replica, self.life, self.process)
        }

    def note(self, samples: list[int]) -> None:
        """What goes into the step to come; at once, since this replica may not see its end."""
        json_lines.append(self.file, [made(self.trainer) + 1, samples])

    def at(self, phase: str, step: int | None = None) -> None:
        if self.trainer is None:
            return  # the sanity check
        step = self.trainer.global_step if step is None else step
        number = self.due.pop((phase, step), None) or self.due.pop((phase, None), None)
        if number is not None:
            print(f"fault: {phase} of step {step}", flush=True)
            os.kill(os.getpid(), number)

    def install(self, trainer: L.Trainer) -> None:
        """Points inside the strategy, which no callback reaches."""
        self.trainer = trainer
        replicas = trainer.strategy.replicas
        if self.process > 0:
            return  # it speaks with no other replica
        if trainer.strategy._group.size > 1:
            replicas = replicas.first
        manager = replicas.manager
        self.install_glitches(replicas)
        self._before(manager, "start_quorum", "quorum")
        self._before(manager, "should_commit", "commit")
        self._before(replicas, "settle", "settle")
        self._after(manager, "all_reduce", "allreduce")
        self._before(manager.peer_state, "send_checkpoint", "sending")
        for key, load in list(manager._load_state_dict_fns.items()):
            manager._load_state_dict_fns[key] = self._wrapped(load, "healing", 0)
        self._before(lightning_eff.callbacks.averaging.beside_checkpoints, "write_averaged", "averaging")
        strategy = trainer.strategy
        write = strategy.checkpoint_io.save_checkpoint

        def save(checkpoint: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if ("saving", trainer.global_step) in self.due:
                Path(path).write_bytes(b"half a checkpoint")
            self.at("saving")
            write(checkpoint, path, *args, **kwargs)

        strategy.checkpoint_io.save_checkpoint = save

    def install_glitches(self, replicas: Any) -> None:
        """Failures that this replica alone notices, after the others have got through."""
        module = lightning_eff.strategies.fault_tolerant.replicas
        agree, gather_texts, commit = replicas.agree, module.gather_texts, replicas.commit

        def glitch(phase: str) -> None:
            step = self.trainer.global_step
            if self.due.pop((phase, step), None) or self.due.pop((phase, None), None):
                print(f"fault: {phase} of step {step}", flush=True)
                time.sleep(0.5)
                raise RuntimeError(f"a glitch in {phase}")

        def agree_with_glitch(operation: Any, alone: Any) -> Any:
            if replicas._agreed > 0:
                self.at("agree")

            def operation_with_glitch(group: Any) -> Any:
                result = operation(group)
                glitch("glitch in settle" if replicas._agreed == 0 else "glitch in agree")
                return result

            return agree(operation_with_glitch, alone)

        def gather_with_glitch(group: Any, text: str) -> Any:
            result = gather_texts(group, text)
            if replicas._veteran:
                glitch("glitch in retry" if replicas.in_attempt else "glitch in start")
            return result

        def commit_with_glitch() -> bool:
            try:
                glitch("glitch in allreduce")
            except RuntimeError as error:
                replicas.manager.report_error(error)
                replicas.group.abort()
            return commit()

        replicas.agree, module.gather_texts, replicas.commit = agree_with_glitch, gather_with_glitch, commit_with_glitch

    def _wrapped(self, function: Any, phase: str, step: int | None) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.at(phase, step)
            return function(*args, **kwargs)

        return wrapped

    def _before(self, owner: Any, name: str, phase: str, step: int | None = None) -> None:
        setattr(owner, name, self._wrapped(getattr(owner, name), phase, step))

    def _after(self, owner: Any, name: str, phase: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            self.at(phase)
            return result

        setattr(owner, name, wrapped)


class Diary(L.Callback):
    """One line for each committed step: how many, the loss, the weights, who is there."""

    def __init__(self, settings: dict[str, Any], faults: Faults) -> None:
        self.path = Path(settings["folder"]) / f"steps-{faults.name}-{faults.life}.jsonl"
        self.faults = faults
        self.patience = settings.get("patience", 0.5)
        self.leaves = settings.get("leaves") == faults.replica and settings["leaves_after"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.faults.trainer is None:
            self.faults.install(trainer)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.faults.at("update")

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, i: int
    ) -> None:
        strategy = trainer.strategy
        if strategy._fit.steps.window:
            return  # within a window of accumulation
        line = {
            "time": time.time(),
            "step": made(trainer),
            "ft_step": strategy.replicas.step,
            "optimizer_steps": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batch": i,
            "loss": float(trainer.callback_metrics["loss"]),
            "rate": trainer.optimizers[0].param_groups[0]["lr"],
            "weights": digest(module.state_dict()),
            "open": [name for name, p in module.named_parameters() if p.requires_grad],
            "members": strategy.replicas.members,
            "writer": trainer.is_global_zero,
        }
        json_lines.append(self.path, line)
        self.faults.at("end")
        if self.leaves and line["step"] == self.leaves:
            strategy.leave()
        if len(strategy.replicas.members) < strategy.max_replicas:
            time.sleep(self.patience)  # so that a replica which starts anew is back before the end

    def on_trainable_change(self, trainer: L.Trainer, module: L.LightningModule, change: Any) -> None:
        self.faults.at("event")


def made(trainer: Any) -> int:
    """Steps that are committed; in manual optimization, runs of training_step that are."""
    if trainer.lightning_module.automatic_optimization:
        return int(trainer.global_step)
    fitting = trainer.strategy._fitting
    within = fitting is not None and bool(fitting.steps.window)
    return int(trainer.fit_loop.epoch_loop.total_batch_idx) + (0 if within else 1)


def state_of(callback: Any) -> Any:
    """All that a callback would save, on this replica."""
    beside = "_copies" if isinstance(callback, lightning_eff.callbacks.GradES) else "_save_rank"
    return [callback.state_dict(), getattr(callback, beside)() if hasattr(callback, beside) else None]


def flat(value: Any) -> list[Any]:
    """Numbers and words in nested state, in order."""
    if isinstance(value, Tensor):
        return value.double().flatten().tolist()  # type: ignore[no-any-return]
    if isinstance(value, dict):
        return [word for pair in value.items() for word in flat(pair)]
    return [word for part in value for word in flat(part)] if isinstance(value, list | tuple) else [value]


def digest(state: dict[str, Tensor]) -> str:
    data = hashlib.sha256()
    for value in state.values():
        data.update(value.detach().cpu().numpy().tobytes())
    return data.hexdigest()[:16]


def main(settings: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    L.seed_everything(settings.get("seed", 1), verbose=False)
    faults = Faults(settings)
    kinds = {"automatic": Model, "manual": Manual, "wandering": Wandering, "adversaries": Adversaries}
    model = (Language if settings.get("language") else kinds[settings.get("kind", "automatic")])(settings, faults)
    data = Noisy(settings.get("samples", 240))
    workers = settings.get("workers", 0)
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=workers)
    folder = Path(settings["folder"])
    callbacks: list[L.Callback] = [Diary(settings, faults)]
    for name, arguments in settings.get("callbacks", {}).items():
        callbacks.append(getattr(lightning_eff.callbacks, name)(**arguments))
    if "checkpoint_every" in settings:
        every = settings["checkpoint_every"]
        callbacks.append(
            ModelCheckpoint(folder / "checkpoints", every_n_train_steps=every, save_last=True, save_top_k=-1)
        )
    loggers = {"csv": CSVLogger, "tensorboard": TensorBoardLogger}
    logger = [loggers[name](folder / name) for name in settings.get("loggers", [])]
    trainer = quiet_trainer(
        *callbacks,
        accelerator="cpu",
        devices=settings["processes"],
        strategy=FaultTolerantDDPStrategy(**settings.get("strategy", {})),
        max_steps=settings.get("optimizer_steps", settings["steps"]),
        max_epochs=-1,
        accumulate_grad_batches=settings.get("accumulate", 1),
        precision=settings.get("precision", "32-true"),
        logger=logger or False,
        log_every_n_steps=1,
        check_val_every_n_epoch=settings.get("validate_every", 1),
        num_sanity_val_steps=settings.get("sanity", 0),
        limit_val_batches=1.0 if "validate_every" in settings else 0,
    )
    validation = DataLoader(Noisy(24), batch_size=4) if "validate_every" in settings else None
    trainer.fit(model, loader, validation, ckpt_path=settings.get("resume"))
    state = {
        "weights": digest(model.state_dict()),
        "values": flat(list(model.parameters())),
        "buffers": flat(list(model.buffers())),
        "step": made(trainer),
        "optimizer": digest(
            {
                f"{n}.{i}.{k}": v
                for n, optimizer in enumerate(trainer.optimizers)
                for i, s in optimizer.state_dict()["state"].items()
                for k, v in s.items()
            }
        ),
        "optimizers": [flat([list(s.values()) for s in o.state_dict()["state"].values()]) for o in trainer.optimizers],
        "callbacks": {
            type(c).__name__: flat(state_of(c)) for c in callbacks if type(c).__name__ in settings.get("callbacks", {})
        },
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
    }
    (folder / f"final-{faults.name}.json").write_text(json.dumps(state))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
