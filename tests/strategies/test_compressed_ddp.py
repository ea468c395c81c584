"""The strategy on two gloo processes: what DDP's hook really sends, keeps and restores."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from harness.faults import InjectedError, fail_at
from harness.pool import Pool
from lightning_eff.callbacks import ZClip
from lightning_eff.compression import all_compressors, predict
from lightning_eff.compression.comm_hook import CompressedReduction, hook
from lightning_eff.compression.in_process import InProcessRanks
from lightning_eff.strategies import BF16, FP16, ArcTopK, CompressedDDPStrategy, Compressor, Int8, PowerSGD, RandK, TopK
from lightning_eff.training.rank_state import KEY
from lightning_eff.training.trainable import set_trainable
from tests.strategies.compressed_runs import ARC, SMALL, train
from tests.suite.models import MODELS, Net
from tests.suite.runs import SaveAt, differences, expect, weights

COMPRESSORS: list[Compressor] = [
    FP16(),
    BF16(),
    Int8(block_size=64),
    TopK(ratio=0.2, **SMALL),
    RandK(ratio=0.2, **SMALL),
    RandK(ratio=0.2, error_feedback="ef14", **SMALL),
    PowerSGD(rank=1, **SMALL),
    ArcTopK(**ARC),
    *(ArcTopK(**ARC, error_feedback=scheme) for scheme in ("ef14", "ef21", "ef21m")),
]


def name_of(compressor: Compressor) -> str:
    return f"{type(compressor).__name__}-{compressor.error_feedback}"


def copied(memory: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {name: {key: tensor.clone() for key, tensor in entry.items()} for name, entry in memory.items()}


# --- the hook --------------------------------------------------------------------------------------------------------


class _Layers(nn.Sequential):
    """Several buckets, a convolution that is channels last, vectors, and a tied weight."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 64), nn.Tanh()]
        layers += [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)]
        super().__init__(*layers)
        self[6].weight = self[4].weight
        self.to(memory_format=torch.channels_last)


def _hook_against_one_process(compressor: Compressor, steps: int, **tolerance: float) -> list[str]:
    """DDP's averages, bit for bit, against all ranks inside this process."""
    rank, world_size, model, twin = dist.get_rank(), dist.get_world_size(), _Layers(), _Layers()
    step = [0]
    reduction = CompressedReduction(compressor, dict(model.named_parameters()), lambda: step[0])
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.005)
    ddp.register_comm_hook(reduction, hook)
    ranks = InProcessRanks(compressor, world_size)
    generator = torch.Generator().manual_seed(7)
    before = torch.get_rng_state()
    wrong: list[str] = []
    for step[0] in range(steps):
        inputs = torch.randn(world_size, 4, 3, 6, 6, generator=generator)
        own = []
        for part in inputs:
            twin.zero_grad()
            twin(part).square().mean().backward()
            # A channels-last convolution lies in memory with its channels as the last dimension.
            own.append({name: _as_it_lies(parameter.grad) for name, parameter in twin.named_parameters()})
        expected = ranks.average(own)[rank]
        ddp.zero_grad()
        ddp(inputs[rank]).square().mean().backward()
        found = {name: _as_it_lies(parameter.grad) for name, parameter in model.named_parameters()}
        wrong += differences(expected, found, f"step {step[0]}", **tolerance)
        memories = copied(ranks.memories[rank]), copied(reduction.memory)
        wrong += differences(*memories, f"memory, step {step[0]}", **tolerance)
    assert torch.equal(before, torch.get_rng_state()), "the user's random state has changed"
    assert len(reduction._plans) >= 4, f"{len(reduction._plans)} buckets only"
    if compressor.shows_nonfinite and not isinstance(compressor, ArcTopK):  # else numbers are sent with each bucket
        wrong += [] if reduction.traffic.bytes_sent == ranks.bytes_sent else ["bytes"]
    return wrong


def _as_it_lies(gradient: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.permute(0, 2, 3, 1).contiguous() if gradient.ndim == 4 else gradient.clone()


# Those that take whole buckets have other blocks, or are linear: `test_trains` has them.
@pytest.mark.parametrize("compressor", [c for c in COMPRESSORS if not c.whole_buckets], ids=name_of)
def test_ddp_averages_as_one_process_does(pool, compressor):
    for wrong in pool.run(_hook_against_one_process, compressor, 4):
        assert not wrong, wrong


@pytest.fixture(scope="module")
def three() -> Iterator[Pool]:
    """Three workers: sums in another order, shares that do not divide evenly, all-gathers of more than one other."""
    with Pool(3) as pool:
        yield pool


def _on_three_ranks(compressors: list[Compressor], folder: Path) -> tuple[list[str], list[Any]]:
    wrong: list[str] = []
    for compressor in compressors:
        if not compressor.whole_buckets:  # in a ring of three the order of a sum depends on the place in the bucket
            found = _hook_against_one_process(compressor, 3, rtol=1e-4, atol=1e-6)
            wrong += [f"{name_of(compressor)}: {each}" for each in found]
    return wrong, [_trained(folder / name_of(compressor), compressor)["weights"] for compressor in compressors]


@pytest.mark.slow
def test_on_three_ranks(three, tmp_path):
    (wrong, one), *others = three.run(_on_three_ranks, COMPRESSORS, tmp_path)
    assert not wrong
    for found, weights_there in others:
        assert not found
        assert not differences(one, weights_there)
    assert all(weight.isfinite().all() for each in one for weight in each.values())


# --- training --------------------------------------------------------------------------------------------------------


def _trained(folder: Path, compressor: Compressor) -> dict[str, Any]:
    trainer, module = train(folder, CompressedDDPStrategy(compressor=compressor))
    return {"weights": weights(module), "traffic": trainer.strategy.traffic}


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=name_of)
def test_trains_equally_on_both_ranks_and_counts_bytes(pool, tmp_path, compressor):
    one, other = pool.run(_trained, tmp_path, compressor)
    assert not differences(one["weights"], other["weights"])
    assert all(weight.isfinite().all() for weight in one["weights"].values())
    traffic = one["traffic"]
    prediction = predict(compressor, {name: tuple(p.shape) for name, p in Net().named_parameters()}, world_size=2)
    assert traffic.steps == 4
    assert traffic.dense_bytes == 4 * prediction.dense_bytes
    assert traffic.bytes_sent < traffic.dense_bytes
    expected = 4 * prediction.bytes_sent
    if isinstance(compressor, RandK):
        assert traffic.bytes_sent == expected + 4 * 4  # a number that tells whether all is finite
    elif compressor.error_feedback in ("ef21", "ef21m"):  # the first step is dense
        assert traffic.bytes_sent == 3 * (prediction.bytes_sent + 3 * 4) + prediction.dense_bytes
    elif isinstance(compressor, ArcTopK):
        assert traffic.bytes_sent == expected + 4 * 3 * 4  # three numbers that tell whether all send the same rows
    else:
        assert traffic.bytes_sent == expected


def _ways(folder: Path) -> list[str]:
    """Accumulation, static graph, compilation: each against the plain run."""
    wrong: list[str] = []
    compressor = ArcTopK(**ARC, error_feedback="ef14")
    trainer, module = train(folder, CompressedDDPStrategy(compressor=compressor))
    plain = weights(module)
    halves, module = train(
        folder,
        CompressedDDPStrategy(compressor=compressor),
        module=Net(optimizer="sgd", micro_batches=2),
        accumulate_grad_batches=2,
        val_check_interval=6,
    )
    # Half of a batch on each rank, in two halves: summed in another order, and the same rows are selected.
    wrong += differences(plain, weights(module), "accumulation", rtol=1e-3, atol=1e-5)
    assert halves.strategy.traffic == trainer.strategy.traffic, "compressed for each micro-batch"
    _, module = train(folder, CompressedDDPStrategy(compressor=compressor, static_graph=True))
    wrong += differences(plain, weights(module), "static graph")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
        _, module = train(
            folder, CompressedDDPStrategy(compressor=compressor), module=Net(optimizer="sgd", compiled=True)
        )
    wrong += differences(plain, weights(module), "compiled", rtol=1e-3, atol=1e-5)
    _, module = train(folder, CompressedDDPStrategy(compressor=compressor, gradient_as_bucket_view=True))
    wrong += differences(plain, weights(module), "gradient_as_bucket_view")
    none: dict[str, Any] = {"error_feedback": "none", **SMALL}
    for without in (ArcTopK(**ARC), PowerSGD(rank=1, **none), RandK(**none), TopK(**none)):
        _, module = train(folder, CompressedDDPStrategy(without, find_unused_parameters=True), module=MODELS["gan"]())
        assert all(weight.isfinite().all() for weight in weights(module).values()), without
    return wrong


def test_every_way_to_train(pool, tmp_path):
    for wrong in pool.run(_ways, tmp_path):
        assert not wrong, wrong


class _Norms(L.Callback):
    """Norm of the gradients that the optimizer gets."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_zero_grad(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        if gradients:
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


def _clipped(folder: Path) -> tuple[list[float], list[float]]:
    found = []
    for callbacks, arguments in (([], {"gradient_clip_val": 0.01}), ([ZClip(max_grad_norm=0.02)], {})):
        norms = _Norms()
        compressor = ArcTopK(**ARC, error_feedback="ef21m")
        train(folder, CompressedDDPStrategy(compressor=compressor), norms, *callbacks, limit_val_batches=0, **arguments)
        found.append(norms.norms)
    return found[0], found[1]


def test_clipping_acts_on_the_reduced_gradient(pool, tmp_path):
    one, other = pool.run(_clipped, tmp_path)
    assert one == other
    for norms, cap in zip(one, (0.01, 0.02), strict=True):
        assert len(norms) == 3
        assert norms == pytest.approx([cap] * len(norms), rel=1e-3)


class _Blind(L.Callback):
    """Multiplies the loss of one rank and step, so that its gradients overflow."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.memories: list[Any] = []
        self.scales: list[float] = []

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1:
            loss.register_hook(lambda gradient: gradient * 1e38)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.memories.append(copied(trainer.strategy.memory))  # type: ignore[attr-defined]
        self.scales.append(trainer.precision_plugin.scaler.get_scale())  # type: ignore[attr-defined]


def _overflowing(folder: Path, scheme: str, grows: bool) -> tuple[list[Any], list[float], Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1 if grows else 1000)
    blind = _Blind(99 if grows else 2)
    strategy = CompressedDDPStrategy(compressor=ArcTopK(**ARC, error_feedback=scheme))
    _, module = train(folder, strategy, blind, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    return blind.memories, blind.scales, weights(module)


@pytest.mark.parametrize("scheme", ["ef14", "ef21m"])
def test_an_overflow_on_one_rank_leaves_every_memory_alone(pool, tmp_path, scheme):
    ranks = pool.run(_overflowing, tmp_path, scheme, False)
    for memories, scales, found in ranks:
        assert scales == [1024.0, 1024.0, 512.0, 512.0]
        assert memories[1], "nothing is kept"
        assert not differences(memories[1], memories[2])
        assert differences(memories[2], memories[3])
        assert all(weight.isfinite().all() for weight in found.values())
    assert not differences(ranks[0][2], ranks[1][2])


def test_the_memory_is_not_scaled(pool, tmp_path):
    """The scale doubles every step: what is kept is of the size of the gradients all the same."""
    for memories, scales, _ in pool.run(_overflowing, tmp_path, "ef14", True):
        assert scales == [2048.0, 4096.0, 8192.0, 16384.0]
        largest = max(float(entry["error"].abs().max()) for entry in memories[-1].values())
        assert 1e-3 < largest < 100


class _Freeze(L.Callback):
    """Closes a matrix in the middle of the run, as GradES does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent: list[float] = []
        self.kept: list[bool] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        strategy: Any = trainer.strategy
        self.sent.append(strategy.traffic.last_dense_bytes)
        self.kept.append(self.name in strategy.memory)
        if trainer.global_step == 2:
            set_trainable(trainer, {self.name: False})
            assert self.name not in strategy.memory
            assert strategy.memory


def _frozen(folder: Path) -> tuple[list[float], list[bool], Any]:
    freeze = _Freeze("blocks.0.qkv.weight")
    _, module = train(folder, CompressedDDPStrategy(ArcTopK(**ARC, error_feedback="ef14")), freeze)
    return freeze.sent, freeze.kept, weights(module)


def test_a_frozen_matrix_leaves_buckets_and_memory(pool, tmp_path):
    one, other = pool.run(_frozen, tmp_path)
    sent, kept, _ = one
    numel = Net().get_parameter("blocks.0.qkv.weight").numel()
    assert sent == [sent[0], sent[0], sent[0] - 4 * numel, sent[0] - 4 * numel]
    assert kept == [True, True, False, False]
    assert not differences(one[2], other[2])


# --- resume ----------------------------------------------------------------------------------------------------------


def _resumed(folder: Path, compressor: Compressor, unused: bool = False) -> list[str]:
    def strategy() -> CompressedDDPStrategy:
        return CompressedDDPStrategy(compressor=compressor, find_unused_parameters=unused)

    unbroken, module = train(folder, strategy(), steps=6)
    path = folder / "three.ckpt"
    with expect(InjectedError, "no crash"):
        train(folder, strategy(), SaveAt(3, path), fail_at(step=3), steps=6)
    resumed, other = train(folder, strategy(), steps=6, resume=path)
    wrong = differences(weights(module), weights(other), "weights")
    return wrong + differences(copied(unbroken.strategy.memory), copied(resumed.strategy.memory), "memory")


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=name_of)
def test_resumes_exactly(pool, tmp_path, compressor):
    # Int8 rounds by the bucket, and DDP keeps its first buckets if it is to find unused parameters.
    for wrong in pool.run(_resumed, tmp_path, compressor, isinstance(compressor, Int8)):
        assert not wrong, wrong


def _first_gradients(folder: Path) -> list[list[Tensor]]:
    """Int8's averages of the fourth step: of a run, of its repetition, and of one that is resumed behind the third."""
    path, found = folder / "three.ckpt", []
    for resume in (None, None, path):
        _, module = train(folder, CompressedDDPStrategy(Int8()), SaveAt(3, path), steps=4, resume=resume)
        found.append([parameter.grad for parameter in module.parameters()])
    return found


def test_int8_rounds_the_first_step_behind_a_resume_otherwise(pool, tmp_path):
    """DDP has its first buckets again there, in another order. Both ways round twice, by less than a step each."""
    for usual, again, resumed in pool.run(_first_gradients, tmp_path):
        assert all(map(torch.equal, usual, again))
        difference = max(float((one - other).abs().max()) for one, other in zip(usual, resumed, strict=True))
        assert 0 < difference <= 4 * max(float(gradient.abs().max()) for gradient in usual) / 127


def _from_three_ranks(folder: Path, scheme: str) -> tuple[list[str], bool]:
    """A checkpoint that three ranks have saved, on two."""
    path = folder / "three-ranks.ckpt"
    train(folder, CompressedDDPStrategy(ArcTopK(**ARC, error_feedback=scheme)), SaveAt(2, path), steps=2)
    if dist.get_rank() == 0:
        checkpoint = torch.load(path, weights_only=True)
        checkpoint[KEY]["world_size"] = 3
        torch.save(checkpoint, path)
    dist.barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, module = train(
            folder, CompressedDDPStrategy(ArcTopK(**ARC, error_feedback=scheme)), steps=4, resume=path
        )
    said = [str(warning.message) for warning in caught if "saved by 3 ranks" in str(warning.message)]
    finite = all(weight.isfinite().all() for weight in weights(module).values())
    return said, finite and bool(trainer.strategy.memory)


@pytest.mark.parametrize("scheme", ["ef14", "ef21"])
def test_another_number_of_ranks_starts_the_memory_anew_and_says_so(pool, tmp_path, scheme):
    (said, fine), (_, other_fine) = pool.run(_from_three_ranks, tmp_path, scheme)
    assert len(said) == 1
    assert "starts anew" in said[0]
    assert fine
    assert other_fine


def _other_scheme(folder: Path) -> list[str]:
    path = folder / "other.ckpt"
    train(folder, CompressedDDPStrategy(ArcTopK(**ARC, error_feedback="ef14")), SaveAt(2, path), steps=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(folder, CompressedDDPStrategy(ArcTopK(**ARC, error_feedback="ef21")), steps=3, resume=path)
    return [str(warning.message) for warning in caught if "error memory" in str(warning.message)]


def test_another_scheme_starts_the_memory_anew_and_says_so(pool, tmp_path):
    said, _ = pool.run(_other_scheme, tmp_path)
    assert len(said) == 1
    assert "ef14" in said[0]
    assert "ef21" in said[0]


# --- at the door -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", all_compressors())
@pytest.mark.parametrize(
    ("prefix", "start_method"),
    [("ddp", "popen"), ("ddp_spawn", "spawn"), ("ddp_fork", "fork"), ("ddp_notebook", "fork")],
)
def test_strings_are_registered(prefix, start_method, name):
    strategy = StrategyRegistry.get(f"{prefix}_{name}")
    assert isinstance(strategy, CompressedDDPStrategy)
    assert strategy.compressor.__dict__ == all_compressors()[name].__dict__
    assert type(strategy.compressor) is type(all_compressors()[name])
    assert strategy._start_method == start_method


@pytest.mark.parametrize("name", all_compressors())
@pytest.mark.parametrize("prefix", ["ddp", "ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strings_for_models_with_unused_parameters(prefix, name):
    strategy = StrategyRegistry.get(f"{prefix}_{name}_find_unused_parameters_true")
    assert type(strategy.compressor) is type(all_compressors()[name])
    assert strategy.compressor.error_feedback == "none"
    assert strategy._ddp_kwargs["find_unused_parameters"] is True


class _Unused(L.LightningModule):
    """Large enough to be compressed with the defaults; a layer is left out of every step."""

    optimizer_count = 1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(96, 96), nn.Linear(96, 96)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.used(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.randn(8, 96), batch_size=2)


def _unused(folder: Path, names: list[str]) -> dict[str, dict[str, Tensor]]:
    found = {}
    for name in names:
        module = _Unused()
        arguments: dict[str, Any] = {"limit_val_batches": 0, "val_check_interval": 1.0}
        trainer, _ = train(folder, f"ddp_{name}_find_unused_parameters_true", module=module, steps=3, **arguments)
        found[name] = weights(module) | {"saved": torch.tensor(trainer.strategy.traffic.bytes_sent)}
    return found


def test_trains_by_string_with_unused_parameters(pool, tmp_path):
    one, other = pool.run(_unused, tmp_path, list(all_compressors()))
    before = weights(_Unused())
    for name, found in one.items():
        assert not differences(found, other[name])
        assert torch.equal(found["unused.weight"], before["unused.weight"])
        assert found["used.weight"].isfinite().all()
        assert not torch.equal(found["used.weight"], before["used.weight"])
        assert 0 < found["saved"] < 3 * 4 * 2 * 97 * 96


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compressor": "arc"}, "compressor='arc'"),
        ({"bucket_cap_mb": 0}, "bucket_cap_mb=0"),
        ({"bucket_cap_mb": float("nan")}, "bucket_cap_mb=nan"),
        ({"ratio": 0.1}, "ratio=0.1 is not allowed: it must be left out"),  # of the compressor
        ({"find_unused_parameters": "true"}, "find_unused_parameters='true'"),
        ({"ddp_comm_hook": print}, "ddp_comm_hook"),
        ({"model_averaging_period": 2}, "model_averaging_period=2"),
        (
            {"compressor": ArcTopK(error_feedback="ef14"), "find_unused_parameters": True},
            "find_unused_parameters=True is not allowed with error_feedback='ef14'",
        ),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        CompressedDDPStrategy(**arguments)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=name_of)
def test_can_be_pickled(compressor):
    """`ddp_spawn` sends the strategy to its processes."""
    strategy = pickle.loads(pickle.dumps(CompressedDDPStrategy(compressor=compressor, start_method="spawn")))
    assert vars(strategy.compressor) == vars(compressor)


class _Sparse(Net):
    def __init__(self) -> None:
        super().__init__(optimizer="sgd")
        self.words = nn.Embedding(10, 8, sparse=True)


def _refusals(folder: Path) -> list[str]:
    with expect(MisconfigurationException, "sparse gradients were accepted") as caught:
        train(folder, CompressedDDPStrategy(), module=_Sparse())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(folder, "ddp_arc_topk", steps=1)  # the model is too small for the defaults
    return [str(caught.error), *(str(w.message) for w in warned if "compresses no parameter" in str(w.message))]


def test_says_what_it_cannot_do(pool, tmp_path):
    refused, useless = pool.run(_refusals, tmp_path)[0]
    assert "words has sparse gradients" in refused
    assert "sparse=False" in refused
    assert "at 2 ranks" in useless
