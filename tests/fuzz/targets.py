"""What is fuzzed: all that the public rooms export, and the arguments of a call that works."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader

import lightning_eff
from examples.gpt import GPT, GPTConfig
from harness.runs import fit, quiet_trainer
from lightning_eff.callbacks import Alarm
from lightning_eff.functional.grades import GradESConfig, GradESState
from lightning_eff.functional.misa import SamplerConfig
from lightning_eff.functional.zclip import ZClipConfig, ZClipState
from lightning_eff.layers import CR, CRFirst, CRLinear, MoCFeedForward, SkipV1
from lightning_eff.merging import Merger, open_source
from lightning_eff.strategies import ArcTopK
from lightning_eff.training import HearsAlarms

NO_ROOMS = ("kernels",)
"""Whose exports are the house's own: no page of the reference has them."""


@dataclass(frozen=True)
class Target:
    """A constructor or a function."""

    name: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    """Name -> annotation."""

    required: tuple[str, ...]


def targets() -> Iterator[Target]:
    """Everything public, each once."""
    seen: set[Any] = set()
    for module, names in _exported():
        for name in names:
            found = getattr(module, name)
            if found in seen or not callable(found) or _is_no_door(found):
                continue
            seen.add(found)
            yield _target(name, found)


def _exported() -> Iterator[tuple[Any, list[str]]]:
    for found in pkgutil.iter_modules(lightning_eff.__path__):
        if found.ispkg and found.name not in NO_ROOMS:
            module = import_module(f"lightning_eff.{found.name}")
            yield module, list(getattr(module, "__all__", ()))
    # `functional` is public by its modules.
    folder = Path(lightning_eff.__file__).with_name("functional")
    for found in pkgutil.iter_modules([str(folder)]):
        module = import_module(f"lightning_eff.functional.{found.name}")
        own = [name for name, each in vars(module).items() if getattr(each, "__module__", None) == module.__name__]
        yield module, [name for name in own if not name.startswith("_")]


def _is_no_door(found: Any) -> bool:
    """Abstract classes, protocols, exceptions, aliases of types, and records that the suite fills by itself."""
    if not inspect.isclass(found):
        return not inspect.isfunction(found)
    if inspect.isabstract(found) or getattr(found, "_is_protocol", False):
        return True
    return issubclass(found, tuple | BaseException) or found.__name__ in RECORDS


def _target(name: str, call: Callable[..., Any]) -> Target:
    function = call.__init__ if inspect.isclass(call) else call  # type: ignore[misc]
    hints = typing.get_type_hints(function, localns={"Trainer": L.Trainer})
    parameters = [
        each
        for each in inspect.signature(call).parameters.values()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    return Target(
        name,
        call,
        {each.name: hints.get(each.name, Any) for each in parameters},
        tuple(each.name for each in parameters if each.default is each.empty),
    )


# Made by the suite, read by users.
RECORDS = (
    *("AllGather", "AllReduce", "AllToAll", "Alarm", "Block", "BlockParts", "Bucket", "Divisors", "Exchange"),
    *("Order", "TrainableChange"),
    *("CollapseState", "GradESState", "Matrix", "Prediction", "SkippedParameters", "ZClipState"),
)


def _model() -> nn.Module:
    return GPT(GPTConfig(block_size=4, n_layer=2, n_head=1, n_embd=4))


def _cr_blocks() -> list[nn.Module]:
    return [nn.Sequential(CRFirst(nn.Linear(4, 4))), nn.Sequential(CRLinear(4, 4, 2))]


def _checkpoint(folder: Path) -> Path:
    path = folder / "one.ckpt"
    torch.save({"w": torch.ones(2)}, path)
    return path


def given(name: str, folder: Path) -> dict[str, Any]:
    """The required arguments, and others without which a call would fail, of a call that works."""
    made = _GIVEN.get(name, {})
    return {key: value(folder) if inspect.isfunction(value) else value for key, value in made.items()}


@functools.cache
def _trained() -> L.Trainer:
    return fit(BoringModel(), max_steps=1)


def _score(weights: Any) -> float:
    return float(sum(abs(weight) for weight in weights))


def _grades(folder: Path) -> GradESState:
    return GradESState(2, GradESConfig(tau=0.5))


_GIVEN: dict[str, dict[str, Any]] = {
    "CompressedReduction": {
        "compressor": lambda folder: ArcTopK(),
        "parameters": lambda folder: dict(_model().named_parameters()),
        "step": lambda folder: lambda: 0,
    },
    "CompressedDDPStrategy": {"compressor": lambda folder: ArcTopK()},
    "FaultInjector": {"fault": "raise", "step": 0},
    "FaultTolerantDDPStrategy": {"max_replicas": 2, "replica": 0, "lighthouse": "127.0.0.1:29510"},
    "GradESConfig": {"tau": 0.5},
    "MatrixMetric": {"units": [{"w": nn.Parameter(torch.ones(2, 2))}], "metric": "grad"},
    "MeCeFO": {"model": lambda folder: _model()},
    "MoCFeedForward": {"d_model": 4, "d_ff": 12},
    "SelectedChannels": {"layer": lambda folder: MoCFeedForward(4, 12)},
    "CRFirst": {"linear": nn.Linear(4, 4)},
    "CRLinear": {"in_features": 4, "out_features": 4, "rank": 2},
    "CRStack": {"blocks": lambda folder: _cr_blocks()},
    "SkipV1Attention": {"d_model": 8, "n_head": 2},
    "SkipV1Cache": {"n_layer": 2, "batch_size": 1, "max_length": 4, "n_kv_head": 2, "head_dim": 4},
    "Merger": {"sources": lambda folder: [open_source(_checkpoint(folder))]},
    "ModelSurgery": {"attention": SkipV1()},
    "Sampler": {"sizes": [4, 4, 8], "config": SamplerConfig(budget=0.5)},
    "Shadows": {"tensors": [torch.ones(2)]},
    "ShardedLoader": {"loader": lambda folder: DataLoader(range(8), batch_size=2), "shards": 2},  # type: ignore[arg-type]
    "coverage": {"model": lambda folder: _model(), "matrices": []},
    "describe_selection": {"model": lambda folder: _model(), "matrices": []},
    "sound": {"trainer": lambda folder: quiet_trainer(accelerator="cpu"), "alarm": Alarm("fuzz", 0, "none")},
    "sparse_gradients": {"module": lambda folder: _model()},
    "sum_over_ranks_": {"numbers": torch.ones(2), "sharding": None},
    "all_gather_bytes": {"payload": 8.0, "world_size": 2},
    "all_reduce_bytes": {"payload": 8.0, "world_size": 2},
    "all_to_all_bytes": {"payload": 8.0, "world_size": 2},
    "RankState": {"name": "fuzz", "save": dict, "load": print},
    "all_with": {"trainer": lambda folder: _trained(), "hook": HearsAlarms},
    "check_trainable_support": {"trainer": lambda folder: _trained()},
    "set_trainable": {"trainer": lambda folder: _trained(), "trainable": {"layer.bias": True}},
    "tell": {"trainer": lambda folder: _trained(), "hook": HearsAlarms},
    "WSD": {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0), "ends": 100},
    "alignment": {"x": torch.ones(3, 4), "v": torch.ones(4)},
    "backward_flops": {"model": lambda folder: _model()},
    "clean_named_modules": {"model": lambda folder: _model()},
    "clean_named_parameters": {"model": lambda folder: _model()},
    "debiased": {"values": torch.ones(3), "turns": torch.ones(3), "beta": 0.9},
    "decay_from_weights": {"weights": [0.5, 0.5]},
    "describe_plan": {"plan": {"replaced": {}, "left": {}}},
    "replace_layers": {"model": lambda folder: _model(), "linear": CR(rank=1)},
    "uptrain": {"model": lambda folder: GPT(GPTConfig(block_size=4, n_layer=2, n_head=2, n_embd=8))},
    "divisors": {"owners": [0, 1]},
    "ema_update_": {"shadows": [torch.ones(2)], "tensors": [torch.ones(2)], "decay": 0.9},
    "evolve": {"evaluate": lambda folder: _score, "start": [[1.0]]},
    "exponential_weights": {"steps": [1.0, 2.0]},
    "find_block_parts": {"model": lambda folder: _model()},
    "find_blocks": {"model": lambda folder: _model()},
    "float32_copies": {"tensors": [torch.ones(2)]},
    "grades_forecast": {"state": _grades, "done": 0.5, "since": 0.25},
    "grades_update": {"metric": torch.ones(2), "state": _grades, "armed": True},
    "greedy_soup": {"evaluate": lambda folder: _score, "count": 2},
    "half_life_decay": {"half_life": 10.0},
    "importance": {
        "previous": torch.ones(3),
        "measured": torch.ones(3),
        "beta": 0.9,
        "variant": "paper",
        "interval": 5,
    },
    "leading_right_singular_vectors": {"weight": torch.eye(4), "rank": 2},
    "leading_singular_pair": {"weight": torch.eye(4), "v": torch.ones(4)},
    "linear_weights": {"steps": [1.0, 2.0]},
    "loss_weights": {"losses": [1.0, 2.0]},
    "moc_feed_forward": {
        **{"x": torch.ones(3, 4), "gate": torch.ones(12, 4), "up": torch.ones(12, 4), "down": torch.ones(4, 12)},
        "k": 2,
    },
    "open_source": {"path": _checkpoint},
    "perplexity": {"p": torch.ones(3) / 3},
    "posthoc_error": {"steps": [100.0, 200.0], "sigma_rels": [0.1, 0.1], "sigma_rel": 0.1},
    "posthoc_weights": {"steps": [100.0, 200.0], "sigma_rels": [0.1, 0.1], "sigma_rel": 0.1},
    "power_decay": {"step": 5, "gamma": 7.0},
    "power_from_width": {"sigma_rel": 0.1},
    "predict": {"compressor": lambda folder: ArcTopK(), "shapes": {"w": (64, 64)}, "world_size": 2},
    "probabilities": {"values": torch.ones(3), "eta": 1.0, "variant": "paper"},
    "scale_": {"tensors": [torch.ones(2)], "coefficient": torch.tensor(0.5)},
    "scheme_weights": {"scheme": "uniform", "steps": [1.0, 2.0]},
    "select_matrices": {"model": lambda folder: _model()},
    "statistics_dtype": {"device": torch.device("cpu")},
    "step_weights": {"steps": [1.0, 2.0]},
    "uniform_weights": {"steps": [1.0, 2.0]},
    "warmup_decay": {"update": 3, "decay": 0.9},
    "weighted_average": {"tensors": [torch.ones(2), torch.ones(2)], "weights": [0.5, 0.5]},
    "weights_from_decay": {"factors": [1.0, 0.5]},
    "width_from_power": {"gamma": 7.0},
    "write_merged": {
        "merger": lambda folder: Merger([open_source(_checkpoint(folder))]),
        "weights": [1.0],
        "output": lambda folder: folder / "merged.ckpt",
        "overwrite": True,
    },
    "wsm_weights": {"steps": [1.0, 2.0]},
    "zclip_update": {"norm": torch.tensor(1.0), "state": lambda folder: ZClipState(ZClipConfig())},
}
