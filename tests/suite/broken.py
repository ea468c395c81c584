"""Callbacks that break the contract, one rule each. They prove that the rules can fail."""

from __future__ import annotations

import collections
import random
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tests.suite.probe import Probe


def _gradients(module: L.LightningModule) -> list[torch.Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


class SavesNothing(Probe):
    def state_dict(self):
        return {}


class SavesADefaultdict(Probe):
    def state_dict(self):
        return {**super().state_dict(), "seen": collections.defaultdict(int)}


class LoadsHalf(Probe):
    def load_state_dict(self, state_dict):
        self.steps = [step.clone() for step in state_dict["steps"]]
        self.norms = [torch.zeros(()) for _ in self.steps]


class KnowsNoVersion(Probe):
    def state_dict(self):
        return {key: value for key, value in super().state_dict().items() if key != "version"}


class LoadsAnyVersion(Probe):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "version": 1})


class ActsOnMicroBatches(Probe):
    def on_after_backward(self, trainer, pl_module):
        torch._foreach_mul_(_gradients(pl_module), 0.9)


class DecidesByRank(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        torch._foreach_mul_(_gradients(pl_module), 1.0 / (1 + trainer.global_rank))


class SumsOverRanks(Probe):
    """The ranks agree, on what one device would not do."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        torch._foreach_mul_(_gradients(pl_module), float(trainer.world_size))


class LeavesBfloat16(Probe):
    def on_train_end(self, trainer, pl_module):
        pl_module.bfloat16()


class CountsDroppedSteps(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps[0] += 1
        torch._foreach_mul_(_gradients(pl_module), 1 / self.steps[0])


class SkipsCompiledModules(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if all(module._compiled_call_impl is None for module in pl_module.modules()):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)


class KnowsOneOptimizer(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for other in trainer.optimizers[1:]:
            other.zero_grad()


class CountsValidations(Probe):
    validations = 0

    def on_validation_start(self, trainer, pl_module):
        self.validations += 1

    def state_dict(self):
        return {**super().state_dict(), "validations": self.validations}


class NeedsALength(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        torch._foreach_mul_(_gradients(pl_module), 1 - 1 / trainer.num_training_batches)


class LogsWhatALoaderHasLogged(Probe):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("probe/val_loss/dataloader_idx_0", 0.0)


class ReadsUnwrittenMemory(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        memory = torch.empty((), dtype=torch.int64)
        torch._foreach_mul_(_gradients(pl_module), 0.5 if memory == torch.iinfo(torch.int64).max else 1.0)


class WorksOnce(Probe):
    used = False

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.used:
            optimizer.zero_grad()

    def on_fit_end(self, trainer, pl_module):
        self.used = True


class TakesALoadForAResume(Probe):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.slope *= 2


class WaitsEveryStep(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.last = _gradients(pl_module)[0].sum().item()


class WaitsWhenItLogs(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer._logger_connector.should_update_logs:
            self.last = [gradient.sum().item() for gradient in _gradients(pl_module)]


class DrawsFromTorch(Probe):
    def on_train_batch_start(self, *_: Any):
        torch.rand(1)


class DrawsFromRandom(Probe):
    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        random.random()


class DrawsFromItsOwn(Probe):
    """Draws from a generator that it does not save."""

    def setup(self, trainer, pl_module, stage):
        super().setup(trainer, pl_module, stage)
        self.generator = torch.Generator().manual_seed(0)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for gradient in _gradients(pl_module):
            gradient.add_(torch.randn(gradient.shape, generator=self.generator))


class SeedsEachStep(Probe):
    def on_train_batch_start(self, trainer: L.Trainer, *_: Any):
        torch.manual_seed(trainer.global_step)


class WaitsForItsState(Probe):
    def run_state(self):
        return {"steps": [step.item() for step in self.steps]}

    def load_run_state(self, trainer, pl_module, state, *, within_step):
        self.steps = [torch.tensor(step) for step in state["steps"]]


class CopiesItsState(Probe):
    """What its state is in a checkpoint, on the host."""

    def run_state(self):
        return self.state_dict()

    def load_run_state(self, trainer, pl_module, state, *, within_step):
        self.load_state_dict(state)


class Idle(L.Callback):
    """Changes nothing."""


class LeavesAHook(Probe):
    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        self.handle = pl_module.head.register_forward_hook(lambda *_: None)

    def on_train_end(self, trainer, pl_module):
        self.handle.remove()


class LeavesAnOptimizerHook(Probe):
    def on_train_start(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)
        trainer.optimizers[0].register_step_post_hook(lambda *_: None)


class SwapsWeights(Probe):
    def on_validation_start(self, trainer, pl_module):
        self.live = [parameter.detach().clone() for parameter in pl_module.parameters()]
        for parameter in pl_module.parameters():
            parameter.data.zero_()

    def on_validation_end(self, trainer, pl_module):
        for parameter, live in zip(pl_module.parameters(), self.live, strict=True):
            parameter.data.copy_(live)


class ForgetsItsArguments(Probe):
    def __getstate__(self):
        return {**vars(self), "slope": 0.0}


class ForgetsItsState(Probe):
    def __getstate__(self):
        return {**vars(self), "steps": []}


class WritesAFile(Probe):
    def on_train_end(self, trainer, pl_module):
        (Path(trainer.default_root_dir) / "probe.txt").write_text("")


class LogsMore(Probe):
    def on_train_batch_end(self, trainer, pl_module, *_: Any):
        pl_module.log("probe/more", 1.0)


class LogsNothing(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass


class KnowsOneName(Probe):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if isinstance(trainer.strategy, L.pytorch.strategies.Strategy):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)


class HidesTheValue(Probe):
    def __init__(self, slope: float = 0.01) -> None:
        if slope < 0:
            raise ValueError("slope must not be negative")
        super().__init__(slope)


class SaysLittle(Probe):
    """Shrinks the gradients.

    Runs in: ``on_before_optimizer_step``.
    """


class HasUntypedArguments(Probe):
    def __init__(self, slope=0.01) -> None:
        super().__init__(slope)


class HasNoPlainDefault(Probe):
    def __init__(self, slope: float = 0.01, where: Path = Path()) -> None:
        super().__init__(slope)


class IsUnknownToTheParser(Probe):
    def __init__(self, **anything: Any) -> None:
        super().__init__(0.1)
