"""Merge checkpoints tensor by tensor: about one model in memory, whatever the number of files."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_eff.arguments import check, check_flag, check_globs, check_instances, check_numbers, check_path
from lightning_eff.functional.averaging import weighted_average
from lightning_eff.merging.safe_files import check_dtypes, save_safetensors
from lightning_eff.merging.sources import Source, Spec
from lightning_eff.structure.select import listed, select

OUTPUTS = (".ckpt", ".safetensors")

# State of the training that a merged model does not have: an optimizer's moments are those of one trajectory's point.
_OF_THE_TRAINING = {
    "optimizer_states",
    "lr_schedulers",
    "callbacks",
    "loops",
    "native_amp_scaling_state",
    "MixedPrecision",
    "current_model_state",  # Lightning's WeightAveraging: its state_dict is the average
    "averaging_state",
    "lightning_eff_rank_state",
    "lightning_eff_average",
}


class Merger:
    """Checkpoints that fit together, and their averages.

    Floating-point tensors are averaged, in float64; integers and booleans are copied from the last checkpoint.

    Args:
        sources: open checkpoints, at least one; what cannot be averaged comes from the last.
        dtype: of the averaged tensors; None keeps theirs, and they must then be the same in all checkpoints.
        copy: shell-style patterns of floating-point tensors that are copied from the last as well, e.g.
            ``["*.running_mean", "*.running_var"]``.

    Attributes:
        specs: name -> dtype and shape of the result.
        tied: groups of names that are one tensor in every checkpoint, and so in the result.
        nonfinite: names of merged tensors with a NaN or infinite value, up to now.

    Raises:
        ValueError: keys, shapes or dtypes differ, or a pattern matches nothing.
    """

    def __init__(
        self, sources: Sequence[Source], dtype: torch.dtype | None = None, copy: Sequence[str] | None = None
    ) -> None:
        check_instances("sources", sources, Source, "open checkpoints, at least one")
        check("dtype", dtype, dtype is None or isinstance(dtype, torch.dtype), "a torch.dtype or None")
        check_globs("copy", copy)
        self.sources = list(sources)
        last = self.sources[-1]
        for source in self.sources[:-1]:
            _check_alike(str(source.path), source.specs, str(last.path), last.specs, any_dtype=dtype is not None)
        self.nonfinite: list[str] = []
        self._copied = set(select(list(last.specs), copy or (), "copy", "tensor"))
        self._copied |= {name for name, spec in last.specs.items() if not spec.averaged}
        self.specs = {
            name: spec if dtype is None or name in self._copied else Spec(dtype, spec.shape)
            for name, spec in last.specs.items()
        }
        groups = {frozenset(group) for group in last.tied}.intersection(
            *({frozenset(group) for group in source.tied} for source in self.sources)
        )
        self.tied = [tuple(name for name in self.specs if name in group) for group in groups]

    def check_weights(self, weights: Sequence[float]) -> None:
        """Raise the ValueError of weights that are not one finite number for each checkpoint, with the sum 1."""
        check_numbers("weights", weights)
        if len(weights) != len(self.sources):
            raise ValueError(f"weights: {len(weights)} weights for {len(self.sources)} checkpoints")
        if not abs(math.fsum(weights) - 1) <= 1e-6:
            raise ValueError(f"weights: they must sum to 1, and sum to {math.fsum(weights):.6g}")

    def tensor(self, name: str, weights: Sequence[float]) -> Tensor:
        """One merged tensor, in memory of its own."""
        if name in self._copied:
            copied = self.sources[-1].read(name).clone(memory_format=torch.contiguous_format)
            self.sources[-1].forget(name)
            return copied
        used = [(source, weight) for source, weight in zip(self.sources, weights, strict=True) if weight != 0]
        spec = self.specs[name]
        merged = weighted_average(_reading(used, name), [weight for _, weight in used], dtype=spec.dtype)
        # NaN of any element survives a sum, and a sum needs no second tensor; float8 has none.
        if spec.dtype.itemsize > 1 and name not in self.nonfinite:
            total = merged.sum(dtype=torch.promote_types(spec.dtype, torch.float32))  # float16 ends at 65504
            if not total.isfinite():
                self.nonfinite.append(name)
        return merged

    def size(self, weights: Sequence[float]) -> int:
        """Bytes that a merge with these weights reads."""
        return sum(self._read_for(name, weights) for name in self._once())

    def _read_for(self, name: str, weights: Sequence[float]) -> int:
        sources = self.sources[-1:]
        if name not in self._copied:
            sources = [source for source, weight in zip(self.sources, weights, strict=True) if weight != 0]
        return sum(math.prod(source.specs[name].shape) * source.specs[name].dtype.itemsize for source in sources)

    def _once(self) -> list[str]:
        """Every name, of tied ones only the first."""
        again = {name for group in self.tied for name in group[1:]}
        return [name for name in self.specs if name not in again]

    def state_dict(self, weights: Sequence[float], progress: Callable[[int], None] | None = None) -> dict[str, Any]:
        """All merged tensors, those that are tied as one, and what the last checkpoint holds beside tensors."""
        merged: dict[str, Tensor] = {}
        for name in self._once():
            merged[name] = self.tensor(name, weights)
            if progress is not None:
                progress(self._read_for(name, weights))
        first = {name: group[0] for group in self.tied for name in group}
        return {**{name: merged[first.get(name, name)] for name in self.specs}, **self.sources[-1].extra}

    def fill(self, module: torch.nn.Module, weights: Sequence[float]) -> None:
        """Copy the average into a module, without a second model in memory.

        Raises:
            ValueError: the module has other tensors than the checkpoints.
        """
        targets = module.state_dict()
        specs = {name: Spec(target.dtype, tuple(target.shape)) for name, target in targets.items()}
        _check_alike("the model", specs, str(self.sources[-1].path), self.specs, any_dtype=True)
        with torch.no_grad():
            for name in self.specs:
                targets[name].copy_(self.tensor(name, weights))


def write_merged(
    merger: Merger,
    weights: Sequence[float],
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Merge into a file, which appears under its name only once it is complete and on disk.

    Args:
        merger: the checkpoints.
        weights: one for each; they sum to 1.
        output: ``.safetensors`` (tied tensors are in it twice, as the format has no ties), or ``.ckpt``, which keeps
            hyperparameters and is what ``load_from_checkpoint`` and ``trainer.validate(ckpt_path=...)`` open. Optimizer
            states are left out. Either holds one model in memory; safetensors before 0.8 copies it to write it.
        overwrite: replace a file of that name.
        about: what the file says of its making, plain data; ``.ckpt`` in ``checkpoint["lightning_eff_merge"]``.
        progress: called with the bytes that were read since the last call.

    Raises:
        FileExistsError: the output exists, and ``overwrite`` is not set.
        FileNotFoundError: its folder does not exist.
        ValueError: its suffix is neither, the weights are too few or do not sum to 1, or safetensors lacks a dtype.

    Example:
        >>> import tempfile
        >>> from lightning_eff.merging import open_source
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for number in (1.0, 3.0):
        ...         torch.save({"weight": torch.tensor([number])}, f"{folder}/{number}.pt")
        ...     sources = [open_source(f"{folder}/{number}.pt") for number in (1.0, 3.0)]
        ...     merged = write_merged(Merger(sources), [0.5, 0.5], f"{folder}/merged.ckpt")
        ...     print(torch.load(merged, weights_only=True)["state_dict"])
        {'weight': tensor([2.])}
    """
    check("merger", merger, isinstance(merger, Merger), "a Merger")
    check_path("output", output)
    check_flag("overwrite", overwrite)
    check("about", about, about is None or isinstance(about, Mapping), "a dict or None")
    check("progress", progress, progress is None or callable(progress), "a function of a number of bytes, or None")
    output = Path(output)
    check_output(output, overwrite)
    merger.check_weights(weights)
    about = {"files": [source.path.name for source in merger.sources], "weights": list(weights), **(about or {})}
    if output.suffix == ".safetensors":
        check_dtypes({name: spec.dtype for name, spec in merger.specs.items()})
    with _part_of(output, overwrite) as part:
        state = merger.state_dict(weights, progress)
        if output.suffix == ".safetensors":
            save_safetensors(part, {name: state[name] for name in merger.specs}, _notes(merger, about))
        else:
            with part.open("wb") as file:  # by its name, the archive would have that inside
                torch.save(_checkpoint(merger, state, about), file)
            gc.collect()  # torch 2.8 leaves what it has saved in a cycle of references: a whole model
    return output


def check_output(output: Path, overwrite: bool) -> None:
    """Raise what :func:`write_merged` would raise about its output, before any work is done."""
    if output.suffix not in OUTPUTS:
        raise ValueError(f"output={str(output)!r} is not allowed: it must end in {' or '.join(OUTPUTS)}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"{output.parent}: no such folder to write {output.name} into")
    if output.is_dir():
        raise FileExistsError(f"{output} is a folder")
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; --overwrite (overwrite=True) replaces it")


def _notes(merger: Merger, about: Mapping[str, Any]) -> dict[str, str]:
    notes = {"format": "pt", "lightning_eff_merge": json.dumps(about)}
    if merger.sources[-1].step is not None:
        notes["global_step"] = str(merger.sources[-1].step)
    return notes


def _checkpoint(merger: Merger, state_dict: dict[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    rest = next((source.rest for source in reversed(merger.sources) if source.rest), {})
    checkpoint = {key: value for key, value in rest.items() if key not in _OF_THE_TRAINING}
    if "pytorch-lightning_version" not in checkpoint:  # Lightning takes a checkpoint without it for one of version 0
        checkpoint["pytorch-lightning_version"] = metadata.version("lightning")
    return {**checkpoint, "state_dict": state_dict, "lightning_eff_merge": dict(about)}


@contextmanager
def _part_of(output: Path, overwrite: bool) -> Iterator[Path]:
    """A path beside the output whose file takes its name at the end, and is removed if that is never reached."""
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    with _terminated_by_exception():
        try:
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            check_output(output, overwrite)  # somebody may have written it meanwhile
            os.replace(part, output)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _terminated_by_exception() -> Iterator[None]:
    """SIGTERM, a scheduler's end, cleans up as Ctrl-C does. (Only a main thread can have it so.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _reading(used: Sequence[tuple[Source, float]], name: str) -> Iterator[Tensor]:
    """The tensor in one checkpoint after the other; each is let go before the next is read."""
    for source, _ in used:
        yield source.read(name)
        source.forget(name)


def _check_alike(
    one: str, specs: Mapping[str, Spec], other: str, others: Mapping[str, Spec], *, any_dtype: bool
) -> None:
    missing = [name for name in others if name not in specs]
    more = [name for name in specs if name not in others]
    if missing or more:
        told = [f"only in {other}: {listed(missing)}"] if missing else []
        told += [f"only in {one}: {listed(more)}"] if more else []
        raise ValueError(f"{one} and {other} hold different tensors; {'; '.join(told)}")
    shapes = [name for name, spec in specs.items() if spec.shape != others[name].shape]
    dtypes = [name for name, spec in specs.items() if spec.dtype != others[name].dtype]
    mend = "; --dtype (dtype=) sets one for the result"
    if any_dtype:  # but a counter cannot become a weight
        dtypes, mend = [name for name in dtypes if specs[name].averaged != others[name].averaged], ""
    for what, differ, advice in (("shape", shapes, ""), ("dtype", dtypes, mend)):
        if differ:
            examples = listed([f"{name}: {specs[name]} and {others[name]}" for name in differ])
            raise ValueError(f"{one} and {other} differ in {what}: {examples}{advice}")
