"""The monitor in Lightning: what the contract suite (tests/suite) does not ask of every callback."""

from __future__ import annotations

import logging
import math
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from harness.operators import OperatorCounter
from harness.recorders import Alarms
from harness.runs import fit
from lightning_eff.callbacks import SpectralAlignmentMonitor, TrainingGuard
from lightning_eff.callbacks.spectral_alignment.probe import AlignmentProbe, watched_layers

TOKENS = 51  # odd, so that no majority is exactly a half

FAST = dict(every_n_steps=1, look_back=1, patience=2, threshold=0.9, hysteresis=0.2, max_residual=10.0)


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x):
        return x + 1e-3 * self.down(self.up(x))


class Model(L.LightningModule):
    """Two blocks. From step `shift_at` on all inputs have a large common part: they fall on one side."""

    def __init__(self, shift_at=10**9, checkpointing=None, micro=1, extra=None):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 1)
        self.extra = extra
        self.shift_at, self.checkpointing, self.micro = shift_at, checkpointing, micro
        self.tokens = 0

    def training_step(self, batch, batch_idx):
        # Along the weight's own singular vector, so that it is certain on which side the tokens are.
        v = torch.linalg.svd(self.blocks[0].up.weight.detach().float()).Vh[0].to(batch.dtype)
        x = batch.flatten(0, 1) + (50.0 * v if batch_idx // self.micro >= self.shift_at else 0.0)
        self.tokens += len(x)
        for block in self.blocks:
            if self.checkpointing is not None:
                x = checkpoint(block, x.requires_grad_(), use_reentrant=self.checkpointing)
            else:
                x = block(x)
        return self.head(x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        return DataLoader(torch.randn(64, TOKENS, 8, generator=generator), batch_size=1)


ONE = ["blocks.0.up"]


def test_the_layers_of_the_blocks_are_found():
    monitor = SpectralAlignmentMonitor(**FAST)
    fit(Model(), monitor, max_steps=1)
    assert monitor.layers == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]


def test_majority_is_that_of_the_svd():
    class Exact(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            layer = pl_module.blocks[0].up
            v = torch.linalg.svd(layer.weight.detach().double()).Vh[0]
            p = (batch.flatten(0, 1).double() @ v > 0).double().mean().item()
            self.majority = max(p, 1 - p)

    monitor, exact = SpectralAlignmentMonitor(**FAST | dict(power_iterations=200)), Exact()
    fit(Model(), monitor, exact, max_steps=3)
    assert monitor.majority["blocks.0.up"] == pytest.approx(exact.majority)


def test_an_alarm_is_heard_once_when_a_layer_has_collapsed():
    monitor, listener = SpectralAlignmentMonitor(include=ONE, severity=1.0, action="warn", **FAST), Alarms()
    fit(Model(shift_at=4), monitor, listener, max_steps=10)
    (alarm,) = listener.alarms
    assert (alarm.source, alarm.step, alarm.severity) == ("spectral_alignment", 6, 1.0)  # the second in a row
    assert "1 of 1 layers" in alarm.message
    assert "blocks.0.up" in alarm.message
    assert monitor.collapsed == monitor.armed == ONE


def test_a_monitor_that_only_logs_does_not_end_runs():
    monitor, listener = SpectralAlignmentMonitor(include=ONE, severity=1.0, **FAST), Alarms()
    guard = TrainingGuard(every_n_steps=2, keep=5, margin=3, read_every_n_steps=1, rules=[])
    trainer = fit(Model(shift_at=4), monitor, listener, guard, max_steps=10)
    assert monitor.collapsed == ONE
    assert listener.alarms == []
    assert (guard.alarms, guard.rollbacks, trainer.global_step) == (0, 0, 10)


def test_severity_is_the_share_of_watched_layers():
    quiet, loud = (Alarms() for _ in range(2))
    two = dict(include=["blocks.0.*"], action="warn")  # only one collapses: the other one gets products of the shift
    monitor = SpectralAlignmentMonitor(severity=1.0, **two, **FAST)
    fit(Model(shift_at=4), monitor, quiet, max_steps=10)
    collapsed, armed = monitor.collapsed, monitor.armed
    assert len(armed) == 2
    monitor = SpectralAlignmentMonitor(severity=len(collapsed) / 2, **two, **FAST)
    fit(Model(shift_at=4), monitor, loud, max_steps=10)
    assert [alarm.severity for alarm in loud.alarms] == [len(collapsed) / 2]
    assert bool(quiet.alarms) == (len(collapsed) == 2)


def test_a_healthy_run_is_silent():
    listener = Alarms()
    fit(Model(), SpectralAlignmentMonitor(**FAST), listener, max_steps=10)
    assert listener.alarms == []


def test_action_warn():
    with pytest.warns(UserWarning, match=r"at global step 6: 1 of 1 layers .* blocks\.0\.up") as seen:
        trainer = fit(Model(shift_at=4), SpectralAlignmentMonitor(include=ONE, action="warn", **FAST), max_steps=10)
    assert len([w for w in seen if "SpectralAlignmentMonitor" in str(w.message)]) == 1
    assert trainer.global_step == 10


def test_action_warn_leaves_it_to_a_listener():
    listener = Alarms()  # warnings are errors in tests
    fit(Model(shift_at=4), SpectralAlignmentMonitor(include=ONE, action="warn", **FAST), listener, max_steps=10)
    assert len(listener.alarms) == 1


def test_action_stop():
    with pytest.warns(UserWarning, match="Training stops"):
        trainer = fit(Model(shift_at=4), SpectralAlignmentMonitor(include=ONE, action="stop", **FAST), max_steps=10)
    assert trainer.global_step == 6


def test_action_rollback_needs_a_guard():
    with pytest.raises(MisconfigurationException, match=r"needs a TrainingGuard\(action='rollback'\)"):
        fit(Model(), SpectralAlignmentMonitor(action="rollback"))


def test_action_rollback_needs_a_guard_that_rolls_back():
    with pytest.raises(MisconfigurationException, match=r"needs a TrainingGuard\(action='rollback'\)"):
        fit(Model(), SpectralAlignmentMonitor(action="rollback"), TrainingGuard(action="warn"))


def test_action_rollback(caplog):
    class Once(Model):
        """The shift is in the batches 6 to 9 alone; the guard skips what follows the snapshot."""

        def training_step(self, batch, batch_idx):
            self.shift_at = 6 if batch_idx < 10 else 10**9
            return super().training_step(batch, batch_idx)

    guard = TrainingGuard(every_n_steps=2, keep=5, margin=3, read_every_n_steps=1, rules=[], lr_factor=1.0)
    monitor = SpectralAlignmentMonitor(include=ONE, action="rollback", **FAST)
    trainer = fit(Once(), monitor, guard, max_steps=14)
    assert guard.rollbacks == 1
    assert "1 of 1 layers" in caplog.text
    assert trainer.global_step == 14
    # It learned again what it knew at the snapshot, and was not told of the rest.
    assert monitor._steps == 14
    assert monitor.collapsed == []
    assert monitor.armed == ONE


def test_logged_values():
    monitor = SpectralAlignmentMonitor(include=["blocks.0.*"], log_details=True, **FAST)
    metrics = fit(Model(shift_at=4), monitor, max_steps=10).callback_metrics
    majority = monitor.majority
    worst = max(majority, key=majority.get)
    assert metrics["spectral_alignment/worst_majority"].item() == pytest.approx(majority[worst])
    assert metrics["spectral_alignment/worst_layer"] == monitor.layers.index(worst)
    assert metrics["spectral_alignment/collapsed_layers"] == len(monitor.collapsed)
    assert metrics["spectral_alignment/armed_layers"] == 2
    for name, value in majority.items():
        assert metrics[f"spectral_alignment/majority/{name}"].item() == pytest.approx(value)


def test_charts_are_of_tags_that_are_logged():
    monitor = SpectralAlignmentMonitor(**FAST)
    trainer = fit(Model(), monitor, max_steps=2)
    tags = [tag for _, tags in monitor.tensorboard_charts(trainer).values() for tag in tags]
    assert set(tags) <= {key for key in trainer.callback_metrics if key.startswith("spectral_alignment/")}


def test_histograms_and_the_heat_map_in_tensorboard(tmp_path):
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    monitor = SpectralAlignmentMonitor(log_histograms=True, heat_map=True, **FAST)
    fit(Model(), monitor, logger=logger, log_every_n_steps=2, max_steps=6)
    events = EventAccumulator(logger.log_dir, size_guidance={"histograms": 0}).Reload()
    histograms = events.Histograms("spectral_alignment/alignment/blocks.0.up")
    assert [event.step for event in histograms] == [1, 3, 5]
    values = histograms[0].histogram_value
    assert (values.num, values.min, values.max) == (TOKENS, -1, 1)
    assert sum(values.bucket) == TOKENS
    assert events.Tags()["images"] == ["spectral_alignment/heat_map"]
    assert (tmp_path / "lightning_logs" / "version_0" / "spectral_alignment_heat_map.png").exists()


def _tokens(monitor):
    """Counted in the latest observation, by layer."""
    return monitor._histograms.sum(1).tolist()


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_what_checkpointing_computes_again_is_not_counted(reentrant):
    monitor = SpectralAlignmentMonitor(**FAST)
    fit(Model(checkpointing=reentrant), monitor, max_steps=2)
    assert _tokens(monitor) == [TOKENS] * 4


def test_accumulated_batches_are_one_observation():
    monitor = SpectralAlignmentMonitor(**FAST | dict(every_n_steps=2))
    model = Model(micro=3)
    fit(model, monitor, max_steps=5, accumulate_grad_batches=3)
    assert _tokens(monitor) == [3 * TOKENS] * 4
    assert monitor._steps == 5
    assert monitor._observations == 3  # steps 0, 2 and 4


def test_hooks_are_there_only_on_steps_that_observe():
    class Count(L.Callback):
        hooks = ()

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            layers = [m for m in pl_module.modules() if isinstance(m, nn.Linear)]
            self.hooks = (*self.hooks, sum(len(m._forward_pre_hooks) for m in layers))

    count = Count()
    fit(Model(), SpectralAlignmentMonitor(**FAST | dict(every_n_steps=3)), count, max_steps=7)
    assert count.hooks == (4, 0, 0, 4, 0, 0, 4)


def test_max_tokens_are_spread_over_all_positions():
    class Positions(Model):
        """Position p of each sequence is on one side if it is even: any even stride would see one side only."""

        def training_step(self, batch, batch_idx):
            v = torch.linalg.svd(self.blocks[0].up.weight.detach().float()).Vh[0].to(batch.dtype)
            sign = 1.0 - 2.0 * (torch.arange(batch.shape[1]) % 2)
            return self.head(self.blocks[0](sign[None, :, None] * v + 0 * batch)).square().mean()

        def train_dataloader(self):
            return DataLoader(torch.randn(64, 24, 8), batch_size=4)

    monitor = SpectralAlignmentMonitor(include=ONE, **FAST | dict(max_tokens=24))
    fit(Positions(), monitor, max_steps=2)
    assert _tokens(monitor)[0] <= 24
    assert monitor.majority["blocks.0.up"] < 0.6


def test_an_observation_that_is_only_logged_waits_for_nothing():
    def syncs(*callbacks):
        with OperatorCounter() as counter:
            fit(Model(), *callbacks, log_every_n_steps=1000, max_steps=10)
        return counter.host_syncs

    plain = syncs()
    # One read, at the end, for the words on layers that were never armed.
    assert syncs(SpectralAlignmentMonitor(**FAST)) - plain == 1
    assert syncs(SpectralAlignmentMonitor(**FAST), Alarms()) - plain == 1
    assert syncs(SpectralAlignmentMonitor(action="warn", **FAST)) - plain == 1 + 10


CONV = {
    1: lambda: nn.Conv1d(2, 4, 3, padding=1, stride=2),
    2: lambda: nn.Conv2d(2, 4, (3, 2), padding=1, dilation=2, padding_mode="circular"),
    3: lambda: nn.Conv3d(2, 4, 2),
}


@pytest.mark.parametrize("dims", CONV)
def test_convolutions_are_matrices_of_their_patches(dims):
    class Convolutional(Model):
        def training_step(self, batch, batch_idx):
            torch.manual_seed(batch_idx)
            self.input = torch.randn(3, 2, *[6] * dims)
            return self.extra(self.input).square().mean()

    torch.manual_seed(1)
    model = Convolutional(extra=CONV[dims]())
    monitor = SpectralAlignmentMonitor(include=["extra"], **FAST | dict(power_iterations=200))
    fit(model, monitor, max_steps=1)
    layer = CONV[dims]()
    torch.manual_seed(1)
    layer = CONV[dims]()  # the weight before the step
    v = torch.linalg.svd(layer.weight.detach().flatten(1)).Vh[0]
    with torch.no_grad():  # each column of the identity is one element of a patch
        unit = torch.eye(v.numel()).reshape(-1, *layer.weight.shape[1:])
        patches = layer._conv_forward(model.input, unit, None).flatten(2).transpose(1, 2).flatten(0, 1)
    p = (patches @ v > 0).float().mean().item()
    assert monitor.majority["extra"] == pytest.approx(max(p, 1 - p))
    alignments = patches @ v / patches.norm(dim=1)
    histogram = torch.histc(alignments, 32, -1, 1)
    differences = [(monitor._histograms[0] - h).abs().sum() for h in (histogram, histogram.flip(0))]
    assert min(differences) <= 2  # up to the sign of the vector, and to numbers at the edge of a bin


def test_without_blocks_the_hidden_layers_are_watched():
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert list(watched_layers(mlp)) == ["0", "2"]
    convolutions = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    assert list(watched_layers(convolutions)) == ["0", "2"]
    with pytest.raises(ValueError, match="used without a layer's call"):
        watched_layers(nn.MultiheadAttention(8, 2))


class Conv1D(nn.Module):
    """Hugging Face's linear layer of GPT-2: its weight is (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_a_transposed_weight_is_that_of_the_linear_layer():
    torch.manual_seed(2)
    transposed, x = Conv1D(6, 3), torch.randn(50, 6)
    linear = nn.Linear(6, 3)
    with torch.no_grad():
        linear.weight.copy_(transposed.weight.T)
    counts = []
    for layer in (transposed, linear):
        assert list(watched_layers(nn.Sequential(layer, nn.Linear(3, 3)))) == ["0"]
        probe = AlignmentProbe({"one": layer}, bins=8, max_tokens=None, iterations=50)
        probe.attach()
        layer(x)
        probe.detach()
        assert probe.vectors["one"].shape == (6,)
        counts.append(probe.read(torch.device("cpu")))
    torch.testing.assert_close(*counts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            dict(include=["attention*"]),
            r"include='attention\*' matches no linear layer or convolution. There are: blocks",
        ),
        (dict(exclude=["*.gate"]), r"exclude='\*.gate' matches no linear layer or convolution"),
        (dict(exclude=["blocks*"]), "exclude leaves no layer"),
        (dict(include=["extra"]), "include='extra' matches no linear layer or convolution"),  # an embedding
    ],
)
def test_patterns_without_a_layer(arguments, words):
    with pytest.raises(MisconfigurationException, match=words):
        fit(Model(extra=nn.Embedding(2, 2)), SpectralAlignmentMonitor(**arguments))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Conv1d(4, 4, 3, groups=2), "2 groups"),
        (nn.ConvTranspose1d(4, 4, 3), "neither nn.Linear nor a convolution"),
        (nn.MultiheadAttention(8, 2).out_proj, "nn.MultiheadAttention uses its weight"),
    ],
)
def test_layers_that_cannot_be_watched(layer, words):
    with pytest.raises(MisconfigurationException, match=words):
        fit(Model(extra=layer), SpectralAlignmentMonitor(include=["extra"]))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_strategies_that_hide_the_weights_are_refused(strategy):
    # A real one needs a GPU and, for DeepSpeed, its package.
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy), callbacks=[])
    with pytest.raises(MisconfigurationException, match=f"{strategy.__name__}.*ModelParallelStrategy"):
        SpectralAlignmentMonitor().setup(trainer, Model(), "fit")


def test_tensor_parallelism_is_refused():
    trainer = SimpleNamespace(strategy=ModelParallelStrategy(1, 2), callbacks=[])
    with pytest.raises(MisconfigurationException, match="tensor_parallel_size=2"):
        SpectralAlignmentMonitor().setup(trainer, Model(), "fit")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (dict(threshold=0.501, hysteresis=0.0005), "the most diverse one had a median of 0.5.* arms a layer"),
        (dict(max_residual=1e-9), "no singular vector had converged to max_residual=1e-09"),
        (dict(include=["extra"]), "none of their forward passes was called"),
    ],
)
def test_that_no_layer_was_armed_is_said_once(arguments, reason):
    monitor = SpectralAlignmentMonitor(**{**FAST, **arguments})
    with pytest.warns(UserWarning, match=f"was ever armed, so no alarm: {reason}") as seen:
        fit(Model(extra=nn.Linear(3, 3)), monitor, max_steps=4)
    assert len([w for w in seen if "ever armed" in str(w.message)]) == 1


@pytest.mark.parametrize(("action", "said"), [("log", 0), ("warn", 1)])
def test_a_run_too_short_for_an_alarm_is_no_reason_to_warn(action, said, caplog):
    """By default a layer can be armed after 320 steps. Who asked for alarms is told, without a warning."""
    caplog.set_level(logging.INFO, logger="lightning.pytorch")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SpectralAlignmentMonitor")
        fit(Model(), SpectralAlignmentMonitor(action=action), max_steps=60)
    lines = [record.message for record in caplog.records if "was ever armed" in record.message]
    assert len(lines) == said
    assert all("there were 3 observations, fewer than look_back=16" in line for line in lines)


def test_autocast_and_low_precision_weights():
    majorities = {}
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        monitor = SpectralAlignmentMonitor(include=ONE, **FAST | dict(power_iterations=100))
        fit(Model(), monitor, max_steps=2, precision=precision)
        majorities[precision] = monitor.majority["blocks.0.up"]
        assert monitor._vectors["blocks.0.up"].dtype == torch.float32
    assert majorities["bf16-mixed"] == pytest.approx(majorities["32-true"], abs=0.021)  # one token
    assert majorities["bf16-true"] == pytest.approx(majorities["32-true"], abs=0.061)


def test_compiled_modules_are_seen_and_stay_compiled():
    calls = []

    def backend(graph, inputs):
        def compiled(*args):
            calls.append(1)
            return graph.forward(*args)

        return compiled

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        seen = {}
        for compiled in (False, True):
            monitor, model = SpectralAlignmentMonitor(**FAST | dict(every_n_steps=3)), Model()
            if compiled:
                for block in model.blocks:
                    block.compile(backend=backend)
            fit(model, monitor, max_steps=7)
            seen[compiled] = monitor.majority
            assert _tokens(monitor) == [TOKENS] * 4
    assert seen[True] == seen[False]
    assert len(calls) == 2 * 4  # two blocks in the steps 1, 2, 4 and 5; 0, 3 and 6 observe
    torch._dynamo.reset()


def test_an_epoch_that_a_hook_has_ended_leaves_compilation_alone():
    class Skips(Model):
        """Ends every epoch at its second batch, in a step that observes."""

        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    class Stances(L.Callback):
        def __init__(self):
            self.seen = []

        def on_train_epoch_start(self, trainer, pl_module):
            self.seen.append(stance())

    def stance():
        return torch._dynamo.eval_frame._stance.stance

    stances = Stances()
    fit(Skips(), stances, SpectralAlignmentMonitor(**FAST), max_epochs=3, max_steps=-1)
    assert stances.seen == ["default"] * 3
    assert stance() == "default"


def test_layers_that_changed_since_the_checkpoint_are_learned_anew():
    first = SpectralAlignmentMonitor(include=["blocks.0.*"], **FAST)
    fit(Model(), first, max_steps=4)
    monitor = SpectralAlignmentMonitor(include=["blocks.*.up"], **FAST)
    monitor.load_state_dict(first.state_dict())
    with pytest.warns(UserWarning, match="watches 2 layers, and 1 of them are among the 2"):
        fit(Model(), monitor, max_steps=1)
    assert monitor.layers == ["blocks.0.up", "blocks.1.up"]
    assert monitor._state.observations.tolist() == [5, 1]


def test_going_back_in_the_middle_of_a_fit():
    """A guard restores states while the fit runs: what was counted since does not count."""

    class Back(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                self.state = monitor.state_dict()
            if batch_idx == 5:
                monitor.load_state_dict(self.state)

    monitor = SpectralAlignmentMonitor(**FAST)
    fit(Model(), monitor, Back(), max_steps=8)
    assert monitor._steps == 5
    assert monitor._observations == 5
    assert monitor._state.observations.tolist() == [5] * 4


def test_nan_inputs_are_no_majority():
    class Broken(Model):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch * math.nan if batch_idx == 2 else batch, batch_idx)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    monitor = SpectralAlignmentMonitor(include=ONE, **FAST)
    fit(Broken(), monitor, max_steps=3)
    assert math.isnan(monitor.majority["blocks.0.up"])
    assert monitor._state.observations.tolist() == [2]
