"""`lightning-eff advise model`: every number to the byte, by hand, by rows that were measured, or by a run."""

import csv
import json
import resource
import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("rich")

import examples.digits  # noqa: F401  (scikit-learn sets environment variables as it is imported)
from benchmarks.fsdp2 import Module as BenchmarkGPT
from benchmarks.gpt import constant
from benchmarks.misa import SIZES
from harness import REPOSITORY
from harness.runs import fit, seed_everything
from lightning_eff.callbacks import MISA
from lightning_eff.cli import main
from lightning_eff.cli.advise.memory import count
from lightning_eff.layers import MoC, replace_layers
from lightning_eff.training.optimizer_state import state_bytes

GPT = "examples.gpt.module.GPTModule"


def rows(name):
    with open(REPOSITORY / "benchmarks" / "results" / f"{name}.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def advise(capsys, monkeypatch):
    """Run it in this process: exit status, and what it printed."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def advise(*args):
        status = main(["advise", "model", *args])
        captured = capsys.readouterr()
        assert "--json" in args or max(map(len, captured.out.splitlines()), default=0) <= 100
        out = captured.out if "--json" in args else captured.out.replace("\n  ", " ")
        return status, out, captured.err

    return advise


def test_a_small_gpt_by_hand(advise):
    status, out, err = advise(f"--model={GPT}", "--model.config.n_embd=64", "--model.config.n_layer=2", "--json")
    report = json.loads(out)
    p, tensors = 131_712, 24  # as test_advise_link has it: 14 matrices and 10 vectors

    assert (status, err) == (0, "")
    assert (report["parameters"], report["trained"], report["tensors"], report["blocks"]) == (p, p, tensors, 2)
    dense = report["dense"]
    assert (dense["weights"], dense["gradients"], dense["buffers"]) == (4 * p, 4 * p, 0)
    assert dense["states"] == 8 * p + 4 * tensors
    assert dense["total"] == 16 * p + 4 * tensors
    assert dense["optimizers"] == "its own AdamW"
    assert report["ema"] == 4 * p
    assert report["window"] == 6 * 4 * p
    assert [each["ranks"] for each in report["sharded"]] == [2, 4, 8]
    assert report["sharded"][1]["total"] == 4 * p + 4 * tensors  # every first dimension here is a multiple of 8


class Configured(BoringModel):
    """An odd matrix, a frozen one, a buffer, and any optimizer."""

    def __init__(self, make):
        super().__init__()
        self.make = make
        self.layer = nn.Linear(33, 7)
        self.frozen = nn.Linear(5, 3, bias=False).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(11))

    def configure_optimizers(self):
        return self.make([p for p in self.parameters() if p.requires_grad])


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p),
    "fused": lambda p: {"optimizer": torch.optim.AdamW(p, fused=True)},
    "amsgrad": lambda p: [torch.optim.Adam(p, amsgrad=True)],
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "RMSprop": lambda p: ([torch.optim.RMSprop(p, centered=True)], []),
    "two": lambda p: [torch.optim.AdamW(p[:1]), torch.optim.SGD(p[1:], lr=0.1, momentum=0.9)],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_those_of_a_real_step(name):
    module = Configured(OPTIMIZERS[name])
    made = module.configure_optimizers()
    found = made if isinstance(made, list) else made[0] if isinstance(made, tuple) else [made]
    optimizers = [each["optimizer"] if isinstance(each, dict) else each for each in found]
    module.layer(torch.ones(2, 33)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    expected = state_bytes(optimizers)

    counts = count(Configured(OPTIMIZERS[name]), "32-true", (2,), cuda=False)
    assert counts.dense.states == expected
    assert counts.dense.optimizers.startswith("its own")
    assert (counts.dense.weights, counts.dense.gradients) == (4 * (33 * 7 + 7 + 15), 4 * (33 * 7 + 7))
    assert counts.dense.buffers == 44
    # Seven rows on two ranks: the first has four of them; of three frozen ones it has two.
    assert counts.sharded[0].weights == 4 * (4 * 33 + 4 + 2 * 5)


def test_half_precision_is_half(advise):
    reports = []
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        _, out, _ = advise(f"--model={GPT}", "--model.config.n_embd=64", f"--precision={precision}", "--json")
        reports.append(json.loads(out))
    whole, mixed, half = (report["dense"] for report in reports)
    assert mixed == whole
    assert half["weights"] * 2 == whole["weights"]
    assert half["gradients"] * 2 == whole["gradients"]
    assert reports[2]["ema"] == reports[0]["ema"]  # averages are float32
    counts = 4 * reports[0]["tensors"]
    assert 2 * (half["states"] - counts) == whole["states"] - counts


def test_fsdp2_is_what_was_measured():
    for row in rows("fsdp2_memory"):
        module = BenchmarkGPT(int(row["layers"]), int(row["width"]))
        (sharded,) = count(module, "32-true", (int(row["ranks"]),), cuda=False).sharded
        measured = tuple(int(row[name]) for name in ("weights", "gradients", "moments", "gathered"))
        assert (sharded.weights, sharded.gradients, sharded.states, sharded.gathered) == measured


def test_misa_is_what_was_measured():
    arms = {row["arm"]: row for row in rows("misa_memory") if row["model"] == "124M"}
    full, misa = arms["full AdamW"], arms["MISA, 3 %"]
    with torch.device("meta"):
        module = constant(SIZES["124M"], fused=False)
    counts = count(module, "32-true", (), cuda=False)
    assert f"{counts.dense.weights / 1e6:.2f}" == full["parameters_mb"]
    assert f"{counts.dense.gradients / 1e6:.2f}" == full["gradients_mb"]
    assert f"{counts.dense.states / 1e6:.2f}" == full["optimizer_mb"]
    # The row is the most of three samples, and one of them was the fullest that there is.
    assert f"{counts.misa.gradients / 1e6:.2f}" == misa["gradients_mb"]
    assert f"{counts.misa.states / 1e6:.2f}" == misa["optimizer_mb"]


class Stack(BoringModel):
    """Twenty equal matrices in blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh()) for _ in range(20)))

    def training_step(self, batch, batch_idx):
        return self.blocks(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(torch.ones(64, 8), batch_size=4)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.blocks.parameters())


class Held(L.Callback):
    """Stands before MISA, which releases states behind a batch."""

    most = 0

    def on_train_batch_end(self, trainer, *_):
        self.most = max(self.most, state_bytes(trainer.optimizers))


def test_misa_is_what_a_run_holds():
    seed_everything(0)
    counts = count(Stack(), "32-true", (), cuda=False)
    assert counts.misa.matrices == 20
    # The budget is one matrix here: 64 parameters, and the layer that BoringModel has belongs to the whole.
    assert (counts.misa.gradients, counts.misa.states) == (4 * 64, 8 * 64 + 4)
    held, module = Held(), Stack()
    trainer = fit(module, held, MISA(every_n_steps=2), max_steps=12, limit_val_batches=0)
    assert trainer.callback_metrics["misa/optimizer_bytes"] <= counts.misa.states
    assert held.most == counts.misa.states


class Gated(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, channels, bias=False) for _ in range(2))
        self.down = nn.Linear(channels, width, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, bias=False, batch_first=True)
        self.mlp = Gated(width, channels)


class Llama(BoringModel):
    def __init__(self, width: int = 512, channels: int = 1376, layers: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, channels) for _ in range(layers))


def test_moc_is_what_was_measured():
    for precision, dtype in (("32-true", "float32"), ("bf16-mixed", "bfloat16")):
        found = [row for row in rows("layers_bytes") if row["dtype"] == dtype and row["d_model"] == "512"]
        by = {(row["variant"], row["k"]): int(row["kept_bytes"]) // int(row["tokens"]) for row in found}
        moc = count(Llama(), precision, (), cuda=False).moc
        measured = [value for (variant, k), value in by.items() if k == "256"]
        assert moc.networks == 2
        assert moc.dense == 2 * by["dense", "1376"]
        assert sorted((moc.moc, moc.moc_recomputed)) == sorted(2 * value for value in measured)


def test_the_model_is_left_as_it_was_built():
    module = Llama(16, 48)
    count(module, "32-true", (2,), cuda=False)
    replace_layers(module, feed_forward=MoC(k=4))  # nothing was replaced in it


class Asks(BoringModel):
    def configure_optimizers(self):
        raise RuntimeError("where is\nmy data")


def test_where_the_optimizer_cannot_be_asked_adamw_is_assumed_and_said_to_be(advise):
    status, out, _ = advise(f"--model={__name__}.Asks")
    assert status == 0
    assert "AdamW, assumed, since configure_optimizers cannot be asked here (where is my data)" in out
    counts = count(Asks(), "32-true", (), cuda=False)
    assert counts.dense.states == 8 * 66 + 4 * 2


class Frozen(BoringModel):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


def test_the_page_says_what_fits(advise):
    small = [f"--model={GPT}", "--model.config.n_embd=64", "--model.config.n_layer=2"]
    status, out, err = advise(*small, "--memory=1", "--ranks=2")
    assert (status, err) == (0, "")
    assert "- 131,712 parameters in 24 tensors, all of them trained; 2 repeated blocks.\n" in out
    assert "Weights 527 kB, buffers 0 B, gradients 527 kB, states of its own AdamW 1.05 MB: 2.11 MB together." in out
    assert "That is 0.0021 of 1 GB (as given): memory is no reason for one of the next" in out
    assert 'strategy="fsdp2" on 2 ranks: a rank holds 1.05 MB' in out
    assert "on 4 ranks" not in out
    assert "MoC()) is not possible: nothing can be replaced: model.blocks.0.mlp (it has no gate" in out
    assert "EMA(): 527 kB" in out
    assert "- Not measured: there is one rank." in out

    out = advise(*small, "--memory=0.001", "--ranks=2")[1]
    assert "it does not fit without one of the next" in out
    assert "That does not fit either." in out
    assert "little is left for activations" in advise(*small, "--memory=0.003")[1]
    assert "fsdp2" not in advise(*small, "--ranks=1")[1]


def test_a_link_that_is_not_here(advise):
    status, out, err = advise("--config=examples/digits/config.yaml", "--link=50", "--ranks=4", "--compute=0.1")
    assert status == 0
    assert err.startswith("compressing random gradients of the model's shapes")
    assert "- 50 Mbit/s out of each of 4 ranks (as given, not measured).\n- Advice: " in out
    assert "its own SGD" in out


def _under_torchrun():
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        line = ["--budget=1", "--backend=gloo", f"--model={GPT}", "--model.config.n_embd=64"]
        status = main(["advise", "model", *line])
    return status, printed.getvalue()


@pytest.mark.slow
def test_torchruns_link_is_measured_and_the_first_rank_prints(pool):
    (status0, out0), (status1, out1) = pool.using(process_group=False).run(_under_torchrun)
    assert (status0, status1, out1) == (0, 0, "")
    assert "(measured between torchrun's ranks, gloo)" in out0
    assert 'strategy="fsdp2" on 2 ranks' in out0
    assert "on 4 ranks" not in out0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "which model? --model=my_module.MyModel, or --config=run.yaml"),
        (f"--model={GPT} --ranks=0", "--ranks=0 is not allowed: it must be at least 1"),
        (f"--model={GPT} --memory=0", "--memory=0.0 is not allowed: it must be above 0"),
        (f"--model={GPT} --latency=1", "--latency has an effect only with --link"),
        (f"--model={GPT} --precision=half", "half is not one of 32-true, bf16-mixed"),
        ("--model=nonsense.Foo", "the model cannot be built: No module named 'nonsense'"),
        (f"--model={GPT} --link=50 --ranks=1", "--ranks=1 is not allowed: a link has at least 2 ranks"),
    ],
)
def test_a_wrong_line_is_refused(advise, capsys, line, message):
    with pytest.raises(SystemExit) as exit:
        advise(*line.split())
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_a_model_without_anything_to_train_is_named(advise):
    status, out, err = advise(f"--model={__name__}.Frozen")
    assert (status, out, err) == (1, "", "lightning-eff advise model: the model has no trainable parameters\n")


def test_nothing_is_allocated():
    """A model that was built on the meta device stays there: 1.5 GB would show."""
    with torch.device("meta"):
        module = constant(SIZES["124M"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert count(module, "32-true", (2,), cuda=False).dense.total > 1.5e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
