"""What MISA saves, what it costs, and what it is worth.

    python -m benchmarks.misa memory       # bytes of a step by kind: full AdamW, LoRA, LISA, MISA; 10 M and 124 M
    python -m benchmarks.misa speed        # step times side by side, and what an interval's end costs, with DDP too
    python -m benchmarks.misa worth        # fine-tuning the 1 M GPT: losses of every arm, three seeds
    python -m benchmarks.misa report       # the table of the last `worth`, at equal steps and at equal time
    python -m benchmarks.misa variance     # how much of the gradient a sample by importance has, against a uniform one

Rows go to benchmarks/results/misa_<part>.csv. `worth` may run in several processes at once: each takes a run that none
has begun. Runs are kept under logs/benchmarks/misa.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.fine_tuning import EightBits, PartOfLibrary, add_lora, tuned_module
from benchmarks.gpt import GPT_1M, GPT_10M, constant, mean_loss, parameters, step_times, text, train
from benchmarks.rows import CONSOLE, publish, read_rows, write_rows
from examples.gpt.data import TextDataModule
from examples.gpt.model import GPT, GPTConfig
from examples.gpt.module import GPTModule
from harness.pool import Pool
from harness.runs import begin, quiet_lightning
from harness.timing import in_turn, ratio
from lightning_eff.callbacks import MISA
from lightning_eff.functional.misa import Sampler, SamplerConfig, debiased, probabilities
from lightning_eff.structure import select_matrices
from lightning_eff.training.optimizer_state import state_bytes

SIZES = {
    "10M": GPT_10M,
    "124M": GPTConfig(block_size=1024, n_layer=17, n_head=12, n_embd=768),
}
ENDS = ["*embed*", "*head*"]
UNSAID = ("MISA", ".*You have overridden")


def lisa(units: int = 1, interval: int = 14, **arguments: Any) -> MISA:
    """LISA: layers at random, embeddings and head always."""
    settings = dict(granularity="layer", sampling="uniform", always=ENDS, momentum_step=False)
    return MISA(units=units, every_n_steps=interval, **settings, **arguments)


def badam(interval: int = 14, **arguments: Any) -> MISA:
    """BAdam: one layer after the other."""
    settings = dict(granularity="layer", sampling="cyclic", momentum_step=False)
    return MISA(units=1, every_n_steps=interval, **settings, **arguments)


EIGHT_BITS, OF_THIS_MEMORY = "AdamW, 8 bits", "LoRA of MISA's memory"


def rank_of(arm: str) -> int:
    """Of the low-rank pairs: 8, or as high as the bytes of MISA at 25 % allow; 0 where all weights are trained."""
    if arm != OF_THIS_MEMORY:
        return 8 * (arm == "LoRA")
    with torch.device("meta"):
        total, pairs = parameters(GPT(GPT_1M)), GPT(GPT_1M)
        add_lora(pairs, 1)
    of_one = parameters(pairs) - total
    return int(12 * 0.25 * total / (16 * of_one))  # a pair is a weight too: 16 bytes; in a matrix of the model 12


def tuning(arm: str, lr: float, seed: int = 0) -> GPTModule:
    return tuned_module(rank_of(arm), lr, seed, schedule="constant", eight_bits=arm == EIGHT_BITS)


# --- memory ----------------------------------------------------------------------------------------------------------

MEMORY: dict[str, Callable[[int], MISA | None]] = {
    "full AdamW": lambda interval: None,
    "LoRA, rank 8": lambda interval: None,
    "LISA, 2 layers": lambda interval: lisa(2, interval),
    "MISA, 25 %": lambda interval: MISA(budget=0.25, every_n_steps=interval, eta=0.0),
    "MISA, 3 %": lambda interval: MISA(budget=0.03, every_n_steps=interval, eta=0.0),
}


class Bytes(L.Callback):
    """The most bytes of each kind over the steps, counted from the tensors."""

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self.expected = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.saved: dict[int, int] = {}
        self.parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    def on_before_backward(self, *_: Any) -> None:
        self.hooks.__exit__()
        self._most("activations", sum(self.saved.values()))

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self._most("gradients", sum(p.grad.nbytes for p in module.parameters() if p.grad is not None))
        trained = [p for p in module.parameters() if p.requires_grad]
        # 4 bytes a parameter, and for each in training 4 of gradient and 8 of moments; a count for each tensor.
        expected = 4 * parameters(module) + 12 * sum(p.numel() for p in trained) + 4 * len(trained)
        self.expected = max(self.expected, expected)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self._most("parameters", sum(p.nbytes for p in module.parameters()))
        self._most("optimizer", self.held)

    def _most(self, name: str, value: int) -> None:
        self.peak[name] = max(self.peak.get(name, 0), value)


class Held(L.Callback):
    """The optimizer's bytes before MISA releases them: stands before it."""

    def __init__(self, counter: Bytes) -> None:
        self.counter = counter

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.counter.held = state_bytes(trainer.optimizers)


def memory(steps: int) -> None:
    """Peak bytes by kind over `steps` steps with as many samples, one sequence a step."""
    rows = []
    for name, config in SIZES.items():
        base = 0
        for arm, build in MEMORY.items():
            module = constant(config, fused=False)
            if arm.startswith("LoRA"):
                add_lora(module.model)
            misa, counter = build(1), Bytes()
            callbacks = [Held(counter), counter, *([misa] if misa else [])]
            data = TextDataModule(block_size=256, batch_size=1)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            # One step shows all of an arm whose set of trained parameters stays the same.
            train(module, data, *callbacks, max_steps=steps if misa else 1)
            states = sum(counter.peak[kind] for kind in ("parameters", "gradients", "optimizer"))
            base = base or states
            row = {"model": name, "arm": arm, "tokens": 256, "samples": steps if misa else 1}
            row |= {f"{kind}_mb": round(size / 1e6, 2) for kind, size in sorted(counter.peak.items())}
            row |= {"without_activations_mb": round(states / 1e6, 2), "of_full": round(states / base, 4)}
            row |= {"formula_mb": round(counter.expected / 1e6, 2)}
            if torch.cuda.is_available():
                row["max_memory_allocated_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 2)
            rows.append(row)
            CONSOLE.print(row)
    publish("Memory of a step", "misa_memory", rows)


# --- speed -----------------------------------------------------------------------------------------------------------

SPEED: dict[str, Callable[[], MISA | None]] = {
    "full AdamW": lambda: None,
    EIGHT_BITS: lambda: None,
    "LoRA": lambda: None,
    OF_THIS_MEMORY: lambda: None,
    "LISA": lambda: lisa(1, 1000),
    "BAdam": lambda: badam(1000),
    "MISA, 25 %": lambda: MISA(budget=0.25, every_n_steps=1000, eta=0.0),
    "MISA, 3 %": lambda: MISA(budget=0.03, every_n_steps=1000, eta=0.0),
}


class Seeds:
    """Another sample in every measurement, so that what a step costs is a mean over samples."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, misa: MISA | None) -> MISA | None:
        if misa is not None:
            self.next += 1
            config = dict(vars(misa.config), seed=self.next)
            misa.config = SamplerConfig(**config)
            if config["sampling"] == "cyclic":  # one layer after the other over the measurements
                misa.config = SamplerConfig(**{**config, "sampling": "uniform"})
        return misa


def speed(steps: int, rounds: int) -> None:
    """Median step time of every arm, in turn (twice as many steps of the 1 M GPT), and the end of an interval."""
    rows, seeds = [], Seeds()
    for name, config, batch, length, arms in (
        ("1M", GPT_1M, 16, 2 * steps, tuple(arm for arm in SPEED if arm != "MISA, 3 %")),
        ("10M", GPT_10M, 4, steps, ("full AdamW", "LoRA", "LISA", "MISA, 25 %", "MISA, 3 %")),
    ):
        data = text(config, batch)

        def run(arm: str, config: GPTConfig = config, data: Any = data, length: int = length) -> float:
            module = EightBits(config, schedule="constant") if arm == EIGHT_BITS else constant(config)
            if rank_of(arm):
                add_lora(module.model, rank_of(arm))
            misa = seeds(SPEED[arm]())
            return step_times(module, data, length, *([misa] if misa else [])).median

        figures = in_turn({arm: lambda arm=arm, run=run: run(arm) for arm in arms}, rounds)
        for arm in arms:
            middle, low, high = ratio(figures, arm, "full AdamW")
            rows.append(
                {
                    "model": name,
                    "what": f"step, {arm}",
                    "ranks": 1,
                    "ms": round(statistics.median(figures[arm]) * 1e3, 2),
                    "over_full": round(middle, 3),
                    "q1": round(low, 3),
                    "q3": round(high, 3),
                }
            )
            CONSOLE.print(rows[-1])
    rows += [{"model": "10M", "what": "end of an interval", "ranks": 1, "ms": round(_change(1) * 1e3, 2)}]
    rows += [{"model": "10M", "what": "end of an interval", "ranks": 2, "ms": round(_changes_under_ddp() * 1e3, 2)}]
    columns = ("model", "what", "ranks", "ms", "over_full", "q1", "q3")
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    publish("Step time, and the end of an interval", "misa_speed", rows)


class Ends(L.Callback):
    """Seconds that MISA takes at the end of each interval, with the wrapping under DDP."""

    def __init__(self, misa: MISA) -> None:
        self.misa = misa
        self.times: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        fit = self.misa._fit
        assert fit is not None
        end = fit.end_interval

        def timed() -> None:
            start = time.perf_counter()
            end()
            self.times.append(time.perf_counter() - start)

        fit.end_interval = timed  # type: ignore[method-assign]


def _change(ranks: int) -> float:
    misa = MISA(budget=0.25, every_n_steps=1, eta=0.0)
    ends = Ends(misa)
    ddp = dict(accelerator="cpu", devices=ranks, strategy="ddp" if ranks > 1 else "auto", use_distributed_sampler=False)
    train(constant(GPT_10M), TextDataModule(block_size=32, batch_size=1), misa, ends, max_steps=10, **ddp)
    return statistics.median(ends.times[1:])


def _changes_under_ddp() -> float:
    with Pool() as pool:
        return max(pool.run(_change, 2))


# --- worth -----------------------------------------------------------------------------------------------------------

STEPS, EVERY, INTERVAL, ETA = 140, 14, 14, 1e6
WORTH: dict[str, tuple[Callable[[int], MISA | None], tuple[float, ...]]] = {
    "full AdamW": (lambda seed: None, (3e-4, 1e-3)),
    EIGHT_BITS: (lambda seed: None, (3e-4, 1e-3)),
    "LoRA": (lambda seed: None, (1e-3, 3e-3, 1e-2)),
    OF_THIS_MEMORY: (lambda seed: None, (1e-3, 3e-3, 1e-2)),
    "LISA": (lambda seed: lisa(1, INTERVAL, seed=seed), (1e-3, 3e-3)),
    "BAdam": (lambda seed: badam(INTERVAL), ()),
    "MISA without momentum step": (
        lambda seed: MISA(budget=0.25, every_n_steps=INTERVAL, eta=ETA, momentum_step=False, seed=seed),
        (1e-3, 3e-3),
    ),
    "MISA": (lambda seed: MISA(budget=0.25, every_n_steps=INTERVAL, eta=ETA, seed=seed), (3e-4, 1e-3, 3e-3)),
    "uniform without momentum step": (
        lambda seed: MISA(budget=0.25, every_n_steps=INTERVAL, sampling="uniform", momentum_step=False, seed=seed),
        (),
    ),
}
SAME_RATE = {"BAdam": "LISA", "uniform without momentum step": "MISA without momentum step"}
RUNS = Path("logs") / "benchmarks" / "misa"


class Validates(L.Callback):
    """The validation loss every `EVERY` steps, and the bytes of the optimizer's state."""

    def __init__(self, data: TextDataModule) -> None:
        self.data, self.losses, self.state = data, [], 0

    def on_train_batch_end(self, trainer: L.Trainer, module: GPTModule, outputs: Any, batch: Any, index: int) -> None:
        if trainer.global_step % EVERY == 0:
            self.losses.append(round(mean_loss(module.model, self.data), 4))
            self.state = state_bytes(trainer.optimizers)


def _path(arm: str, lr: float, seed: int, steps: int) -> Path:
    return RUNS / f"{arm.replace(' ', '_')}-{lr:g}-{seed}-{steps}.json"


def tune(arm: str, lr: float, seed: int, steps: int) -> None:
    """One fine-tuning on one thread, kept on disk; nothing where another process has begun it."""
    path = _path(arm, lr, seed, steps)
    try:
        path.with_suffix(".begun").touch(exist_ok=False)
    except FileExistsError:
        return
    begin(seed, *UNSAID)
    data = PartOfLibrary(graphical=True, seed=seed)
    data.setup("fit")
    module = tuning(arm, lr, seed)
    misa, validates = WORTH[arm][0](seed), Validates(data)
    train(module, data, *([misa] if misa else []), validates, max_steps=steps, gradient_clip_val=1.0)
    row = {"arm": arm, "lr": lr, "seed": seed, "steps": steps, "val_loss": validates.losses[-1]}
    row |= {"rank": rank_of(arm) or "", "state_bytes": validates.state}
    CONSOLE.print(row)
    if misa is not None:
        row |= {"importance": misa.importance}
    path.write_text(json.dumps(row | {"curve": validates.losses}))


def worth(steps: int, seeds: int) -> None:
    """Each arm at its rates with the first seed, then at the better one with the others."""
    RUNS.mkdir(parents=True, exist_ok=True)
    for arm, (_, rates) in WORTH.items():
        for lr in rates:
            tune(arm, lr, 0, steps)
    for seed in range(seeds):
        for arm, (_, rates) in WORTH.items():
            like = arm if rates else SAME_RATE[arm]
            paths = [_path(like, lr, 0, steps) for lr in WORTH[like][1]]
            while not all(path.exists() for path in paths):  # another process is at it
                time.sleep(1)
            best = min((json.loads(path.read_text()) for path in paths), key=lambda row: row["val_loss"])
            tune(arm, best["lr"], seed, steps)


def report(steps: int) -> None:
    """Rows of all runs there are; the loss at the time of 3/4 of full AdamW's steps, by the step times of `speed`."""
    speeds = [row for row in read_rows("misa_speed") if row["model"] == "1M"]
    times = {row["what"].removeprefix("step, "): float(row["over_full"]) for row in speeds}
    runs = [json.loads(path.read_text()) for path in sorted(RUNS.glob(f"*-{steps}.json"))]
    rows, curves = [], []
    for run in runs:
        factor = times.get(run["arm"], times["MISA, 25 %"])
        at = min(steps, int(0.75 * steps / factor) // EVERY * EVERY)
        row = {key: run[key] for key in ("arm", "rank", "state_bytes", "lr", "seed", "steps", "val_loss")}
        rows.append(row | {"steps_at_equal_time": at, "val_loss_at_equal_time": run["curve"][at // EVERY - 1]})
        about = {key: run[key] for key in ("arm", "lr", "seed")}
        curves += [{**about, "step": EVERY * (i + 1), "val_loss": loss} for i, loss in enumerate(run["curve"])]
    publish("Fine-tuning", "misa_worth", rows)
    CONSOLE.print(write_rows("misa_worth_curves", curves))


# --- variance --------------------------------------------------------------------------------------------------------


class FullGradients(L.Callback):
    """At each interval's end, once all matrices had a turn: the squared gradients of all of them on four batches."""

    def __init__(self, misa: MISA, names: list[str], data: L.LightningDataModule) -> None:
        self.misa, self.names, self.data = misa, names, data
        self.seen: list[tuple[Tensor, Tensor]] = []  # importance, squares

    def on_train_batch_end(self, trainer: L.Trainer, module: GPTModule, *_: Any) -> None:
        assert self.misa._fit is not None
        sampler = self.misa._fit.sampler
        if trainer.global_step % INTERVAL or not bool((sampler.turns > 0).all()):
            return
        matrices: list[nn.Parameter] = [module.get_parameter(name) for name in self.names]
        was = [matrix.requires_grad for matrix in matrices]
        for matrix in matrices:
            matrix.requires_grad_(True)
        batches = iter(self.data.train_dataloader())
        loss = sum(module.model.loss(next(batches)) for _ in range(4)) / 4
        grads = torch.autograd.grad(loss, matrices)
        for matrix, before in zip(matrices, was, strict=True):
            matrix.requires_grad_(before)
        squares = torch.stack([grad.double().square().sum() for grad in grads])
        self.seen.append((debiased(sampler.importance, sampler.turns, sampler.config.beta), squares))


def variance(steps: int) -> None:
    """With the importance of a run: what samples have of the whole gradient, and the variance of an unbiased estimate.

    Columns: `captured`, the mean over samples within the budget of their part of the squared norm of the gradient of
    all matrices; `variance_over_uniform`, the variance of the unbiased estimate g_b / p_b from one matrix b ~ p, over
    that of a uniform p.
    """
    begin(0, *UNSAID)
    data = PartOfLibrary(graphical=True)
    module = tuning("MISA", 1e-3)
    names = [matrix.name for matrix in select_matrices(module)]
    misa = MISA(budget=0.25, every_n_steps=INTERVAL, eta=ETA)
    watch = FullGradients(misa, names, PartOfLibrary(graphical=True, seed=99))
    watch.data.setup("fit")
    train(module, data, misa, watch, max_steps=steps, gradient_clip_val=1.0)
    sizes = [module.get_parameter(name).numel() for name in names]
    total = parameters(module)
    rows = []
    for eta in (0.0, 1.0, ETA / 10, ETA, 3 * ETA, 10 * ETA):
        captured, variances, effective = [], [], []
        for importance, squares in watch.seen:
            p = probabilities(importance, eta=eta, variant="paper")
            sampler = Sampler(sizes, SamplerConfig(budget=0.25, eta=eta, sample_last=0, debias=False), total)
            sampler.importance.copy_(importance)
            sampler.last = [0] * len(sizes)
            parts = [squares[sampler.select()].sum() for _ in range(300)]
            captured.append((torch.stack(parts).mean() / squares.sum()).item())
            uniform = len(sizes) * squares.sum() - squares.sum()
            variances.append((((squares / p).sum() - squares.sum()) / uniform).item())
            effective.append(torch.exp(-torch.xlogy(p, p).sum()).item())
        rows.append(
            {
                "eta": eta,
                "intervals": len(watch.seen),
                "effective_modules": round(statistics.fmean(effective), 2),
                "modules": len(sizes),
                "captured": round(statistics.fmean(captured), 4),
                "variance_over_uniform": round(statistics.fmean(variances), 4),
            }
        )
    largest = [round(importance.max().item(), 9) for importance, _ in watch.seen]
    CONSOLE.print(f"largest importance at each interval: {largest}")
    publish("Samples by importance against uniform ones", "misa_variance", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("memory", "speed", "worth", "report", "variance"))
    parser.add_argument("--steps", type=int, help=f"of a run (memory: 3, speed: 3, worth: {STEPS}, variance: 140)")
    parser.add_argument("--rounds", type=int, default=5, help="speed: how often each arm is measured")
    parser.add_argument("--seeds", type=int, default=3, help="worth: number of seeds")
    arguments = parser.parse_args()
    quiet_lightning(*UNSAID)
    if arguments.part == "memory":
        memory(arguments.steps or 3)
    elif arguments.part == "speed":
        speed(arguments.steps or 3, arguments.rounds)
    elif arguments.part == "worth":
        worth(arguments.steps or STEPS, arguments.seeds)
    elif arguments.part == "report":
        report(arguments.steps or STEPS)
    else:
        variance(arguments.steps or 140)


if __name__ == "__main__":
    main()
