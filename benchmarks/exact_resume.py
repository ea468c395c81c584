"""ExactResume: is a killed run the unbroken one, what does a batch pay for it, and how soon is it in its place?

python -m benchmarks.exact_resume kills   # kill -9 of every rank at random batches, plain Lightning against ours
python -m benchmarks.exact_resume cost    # process CPU time a batch, and bytes beside a checkpoint
python -m benchmarks.exact_resume seek    # a shuffled DataLoader, to batch 100,000; asks for torchdata
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.rows import show, write_rows
from examples.gpt.model import GPT, GPTConfig
from harness.processes import environment, free_port
from harness.runs import begin, quiet_trainer
from harness.timing import in_turn, over
from lightning_eff._witness import ORDERS
from lightning_eff.callbacks import ExactResume
from lightning_eff.callbacks.exact_resume.loader import PlacedLoader
from lightning_eff.cli.verify_resume import run as verify

BATCHES = 24  # of three epochs


class Noisy(Dataset[Tensor]):
    """Samples with noise of all three generators."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([index, random.random(), float(np.random.rand()), float(torch.rand(()))])


class Net(L.LightningModule):
    """Dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.BatchNorm1d(32), nn.Dropout(0.3), nn.Linear(32, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layers(batch / batch.max()).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(exact: bool, folder: str, place: dict[str, str], orders: dict[str, Any]) -> None:
    """What is killed, on one rank: two workers, augmentations, dropout, accumulation, shuffled."""
    os.environ.update(environment(GLOO_SOCKET_IFNAME="lo", **place, **{ORDERS: json.dumps(orders)}))
    begin(int(place["RANK"]))
    ranks = int(place["WORLD_SIZE"])
    data = DataLoader(Noisy(BATCHES // 3 * 4 * ranks), batch_size=4, shuffle=True, num_workers=2)
    trainer = quiet_trainer(
        *([ExactResume()] if exact else []),
        ModelCheckpoint(save_top_k=0),
        accelerator="cpu",
        devices=ranks,
        strategy="ddp",
        max_epochs=3,
        accumulate_grad_batches=2,
        default_root_dir=folder,
    )
    trainer.fit(Net(), data)


def in_a_role(role: str, exact: bool, ranks: int, orders: dict[str, Any]) -> Any:
    """A run of all ranks, which are forked: what each has seen. The witness of ``verify-resume`` kills them."""
    folder = Path(orders["folder"])
    for old in folder.glob(f"{role}.rank*.jsonl"):
        old.unlink()
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "kills"}
        arguments = (exact, orders["folder"], place, {**orders, "role": role})
        processes.append(multiprocessing.get_context("fork").Process(target=train, args=arguments))
        processes[-1].start()
    for process in processes:
        process.join()
    wanted = -signal.SIGKILL if role == "broken" else 0
    if codes := [process.exitcode for process in processes if process.exitcode != wanted]:
        raise SystemExit(f"{role}: exit status {codes}")
    return verify._notes(folder, role)


def kills(number: int, ranks: int) -> None:
    rows = []
    for name in ("Lightning", "ExactResume"):
        exact = name == "ExactResume"
        with tempfile.TemporaryDirectory() as folder:
            orders: dict[str, Any] = {"folder": folder, "batches": BATCHES, "save_at": 0, "kill_at": 0}
            whole = in_a_role("whole", exact, ranks, orders)
            draw = random.Random(0)
            first = Counter[str]()
            for _ in range(number):
                save_at = draw.randint(1, BATCHES - 2)
                orders.update(save_at=save_at, kill_at=save_at + 1)
                in_a_role("broken", exact, ranks, orders)
                resumed = in_a_role("resumed", exact, ranks, orders)
                difference = verify._first_difference(whole, resumed)
                if not difference and list(resumed[0]) != list(range(save_at + 1, BATCHES + 1)):
                    difference = ": batches missing"
                if difference:
                    first[" ".join(difference.split(": ")[1].split()[:2])] += 1
        rows.append(
            {
                "run": name,
                "ranks": ranks,
                "workers": 2,
                "accumulate": 2,
                "kills": number,
                "equal_to_the_bit": number - first.total(),
                "first_difference": "; ".join(f"{what} {count}" for what, count in first.most_common()),
            }
        )
    show("Killed by kill -9 at random batches of three epochs, and resumed", rows)
    write_rows("exact_resume_kills", rows, ("run", "ranks"))


class Bytes(L.LightningModule):
    """A byte GPT of 0.85 M parameters on random bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.model = GPT(GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.model(batch[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Weight(L.LightningModule):
    """One number: nearly all that a batch takes is Lightning's, and what is added to it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        return self.weight * batch[0, 0]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class CpuTime(L.Callback):
    """Of this process in training batches, behind the first few."""

    def __init__(self) -> None:
        self.began = self.ended = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.ended = time.process_time()
        if trainer.global_step == 10:
            self.began = self.ended


_RUNS: dict[str, list[Any]] = {
    "Lightning": [],
    "Lightning, again": [],  # what differs here is noise
    "ExactResume": [{}],
    "ExactResume, seeded": [{"randomness": "seeded"}],
}


def cost(rounds: int, steps: int) -> None:
    sizes: dict[tuple[str, str, int], int] = {}

    def one(model: str, run: str, workers: int) -> float:
        begin(0)
        clock = CpuTime()
        batches = 10 + (steps if model == "0.85 M GPT" else 5 * steps)
        own = [ExactResume(**arguments) for arguments in _RUNS[run]]
        with tempfile.TemporaryDirectory() as folder:
            trainer = quiet_trainer(*own, clock, accelerator="cpu", max_steps=batches, default_root_dir=folder)
            module = Bytes() if model == "0.85 M GPT" else Weight()
            data = torch.randint(0, 256, (8 * batches, 65))
            trainer.fit(module, DataLoader(data, batch_size=8, shuffle=True, num_workers=workers))
            path = Path(folder) / "last.ckpt"
            trainer.save_checkpoint(path)
            beside = sum(file.stat().st_size for file in Path(f"{path}.ranks").glob("*"))
            sizes[model, run, workers] = path.stat().st_size + beside
        return (clock.ended - clock.began) / (batches - 10)

    for model, workers in itertools.product(("one number", "0.85 M GPT"), (0, 2)):
        rows = []
        figures = in_turn({run: partial(one, model, run, workers) for run in _RUNS}, rounds)
        for run, times in figures.items():
            added = [1000 * (mine - plain) for mine, plain in zip(times, figures["Lightning"], strict=True)]
            rows.append(
                {
                    "model": model,
                    "run": run,
                    "workers": workers,
                    "rounds": rounds,
                    "cpu_ms_a_batch": round(1000 * statistics.median(times), 3),
                    "added_cpu_ms": round(statistics.median(added), 3),
                    **over(figures, run, "Lightning", "cpu_ratio"),
                    "checkpoint_bytes": sizes[model, run, workers],
                }
            )
        show("An ordinary batch", rows)
        write_rows("exact_resume_cost", rows, ("model", "workers"))


class Numbers(Dataset[int]):
    """Nothing to load, and it is counted."""

    def __init__(self, samples: int) -> None:
        self.samples, self.loaded = samples, 0

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        self.loaded += 1
        return index


def seek(batches: int) -> None:
    try:
        from torchdata.stateful_dataloader import StatefulDataLoader
    except ImportError as error:
        raise SystemExit("seek measures torchdata's StatefulDataLoader too: pip install torchdata") from error

    def new(kind: Any = DataLoader, size: int = 8) -> Any:
        return kind(Numbers(8 * (batches + 10)), batch_size=size, shuffle=True)

    rows: list[dict[str, Any]] = []
    wanted = torch.empty(0)

    def row(
        run: str, make: Callable[[], Any], start: Callable[[Any], Any], exact: bool = True, rounds: int = 5
    ) -> Tensor:
        """From a new loader to its first batch, in the middle of some rounds; two batches."""
        times = []
        for _ in range(rounds):
            loader = make()
            began = time.process_time()
            iterator = start(loader)
            found = next(iterator)
            times.append(time.process_time() - began)
            if exact and len(wanted) and not torch.equal(found, wanted[: len(found)]):
                raise SystemExit(f"{run}: these are not the samples that come next")
        about = {"run": run, "batch": batches, "goes_on_with_the_right_samples": exact, "rounds": rounds}
        seconds = round(sorted(times)[rounds // 2], 4)
        rows.append({**about, "cpu_seconds": seconds, "samples_loaded": loader.dataset.loaded})
        return torch.cat([found, next(iterator)])

    def walk(loader: Any) -> Any:
        iterator = iter(loader)
        for _ in range(batches):
            next(iterator)
        return iterator

    begin(0)
    loader = new()
    before = PlacedLoader(loader, lambda: 0, lambda: False)
    place: dict[str, Any] = {}

    def walk_and_note(loader: Any) -> Any:
        iterator = walk(loader)
        place.update(before.place(1))
        return iterator

    wanted = row("loaded again and dropped", lambda: loader, walk_and_note, rounds=1)

    def resume(loader: Any) -> Any:
        after = PlacedLoader(loader, lambda: 0, lambda: False)
        return after.resume(after.fitting(place)[0], torch.device("cpu"))

    row("Lightning: the epoch anew", new, iter, exact=False)
    row("ExactResume", new, resume)
    row("ExactResume, dealt in batches of 16", partial(new, size=16), resume)

    for every in (1, 1000):
        begin(0)
        stateful = partial(new, partial(StatefulDataLoader, snapshot_every_n_steps=every))
        loader = stateful()
        iterator = walk(loader)
        state, wanted = loader.state_dict(), next(iterator)

        def resume_stateful(loader: Any, state: Any = state) -> Any:
            loader.load_state_dict(state)
            return iter(loader)

        row(f"StatefulDataLoader, snapshot every {every}", stateful, resume_stateful)
    show("From the start to a batch, 8 samples each, which are numbers", rows)
    write_rows("exact_resume_seek", rows, ("run", "batch"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kills", "cost", "seek"])
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=100_000)
    arguments = parser.parse_args(argv)
    if arguments.what == "kills":
        kills(arguments.number, arguments.ranks)
    elif arguments.what == "cost":
        cost(arguments.rounds, arguments.steps)
    else:
        seek(arguments.batch)


if __name__ == "__main__":
    main()
