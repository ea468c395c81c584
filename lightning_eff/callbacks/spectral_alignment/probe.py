"""Looks at what goes into the layers of a model, and counts on which side of their singular vectors it falls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.hooks import RemovableHandle

from lightning_eff.functional.gradients import is_dtensor, statistics_dtype
from lightning_eff.functional.spectral_alignment import leading_singular_pair
from lightning_eff.kernels.alignment import AlignmentStats, alignment_stats
from lightning_eff.structure import clean_named_modules, select_matrices
from lightning_eff.structure.select import listed, select
from lightning_eff.structure.weights import is_transposed

FIRST_ITERATIONS = 16
"""Power iterations from a random vector; later ones begin with the last vector."""


class AlignmentProbe:
    """Hooks that project the inputs of layers on their weights' leading singular vectors, between attach and detach.

    The projection is made on the spot: no activation is kept. A layer that is called several times before ``read``
    (micro-batches, shared layers) is counted each time, with one vector; what activation checkpointing computes again
    in the backward pass is not.

    Args:
        layers: by name, linear layers and convolutions that :func:`obstacle` has nothing against.
        bins: of the histogram.
        max_tokens: of each call, spread evenly over the input; None for all.
        iterations: of the power iteration, each time.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, bins: int, max_tokens: int | None, iterations: int) -> None:
        self.layers = dict(layers)
        self.bins = bins
        self.max_tokens = max_tokens
        self.iterations = iterations
        self.vectors: dict[str, Tensor] = {}
        """By layer: the singular vector of its last observation, float32 (in,)."""
        self._residuals: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def seen(self) -> set[str]:
        """Layers that were called since the last ``read``, on this rank."""
        return set(self._counts)

    def attach(self) -> None:
        """Look at the inputs from now on."""
        self.detach()
        for index, (name, layer) in enumerate(self.layers.items()):
            hook = partial(self._observe, index, name)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Leave the layers as they were; the counts stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def forget(self) -> None:
        """Drop what was counted since the last ``read``."""
        self._counts, self._residuals = {}, {}

    def counted(self) -> dict[str, Any]:
        """What `read` would give now, and the vectors, which this rank has moved on already; for `take`."""
        mine = {name: self.vectors[name] for name in self._residuals}
        return {"counts": dict(self._counts), "residuals": dict(self._residuals), "vectors": mine}

    def take(self, counted: dict[str, Any]) -> None:
        """Go on counting from there, with those of the layers that there still are."""
        for name in self.layers.keys() & counted["counts"].keys():
            device = self.layers[name].weight.device
            self._counts[name] = counted["counts"][name].to(device)  # type: ignore[arg-type]
            self._residuals[name] = counted["residuals"][name].to(device)  # type: ignore[arg-type]
            self.vectors[name] = counted["vectors"][name].to(device)  # type: ignore[arg-type]

    def read(self, device: torch.device) -> Tensor:
        """Counts since the last time, and begin anew.

        Returns:
            (layers, bins + 6), float64 (float32 on MPS): histogram; positive, negative, zero and non-finite tokens;
            1 where the layer was called; the residual of its vector. To be summed over the ranks.
        """
        dtype = statistics_dtype(device)
        rows = []
        for name in self.layers:
            if name in self._counts:
                counts, residual = self._counts[name].to(device, dtype), self._residuals[name].to(device, dtype)
                rows.append(torch.cat([counts, torch.ones_like(residual)[None], residual[None]]))
            else:
                rows.append(torch.zeros(self.bins + 6, dtype=dtype, device=device))
        self.forget()
        return torch.stack(rows)

    @torch.no_grad()
    def _observe(self, index: int, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() != -1:
            return  # within a backward pass: activation checkpointing computes again what was seen in the forward pass
        x: Tensor = args[0] if args else kwargs["input"]
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if is_dtensor(weight) or is_dtensor(x):
            raise NotImplementedError(
                f"the weight or the input of layer {name!r} is sharded within its forward pass (tensor parallelism), "
                "and its alignment would need a collective there: leave such layers out with `include`"
            )
        x, weight = x.detach(), _out_in(layer, weight.detach())
        with torch.autocast(x.device.type, enabled=False):
            if name not in self._residuals:
                v, iterations = self._start(index, name, weight), self.iterations
                if name not in self.vectors:
                    iterations = max(iterations, FIRST_ITERATIONS)
                pair = leading_singular_pair(weight, v, iterations)
                self.vectors[name], self._residuals[name] = pair.v, pair.residual
            counts = _flat(self._count(layer, x, self.vectors[name]))
        self._counts[name] = self._counts[name] + counts if name in self._counts else counts

    def _start(self, index: int, name: str, weight: Tensor) -> Tensor:
        size = weight.shape[1]
        v = self.vectors.get(name)
        if v is None or len(v) != size:
            # The same on every rank, which keeps the vector's sign the same, and no draw from the user's generator.
            v = torch.randn(size, generator=torch.Generator().manual_seed(index))
            self.vectors.pop(name, None)
        return v.to(weight.device)

    def _count(self, layer: nn.Module, x: Tensor, v: Tensor) -> AlignmentStats:
        if isinstance(layer, _ConvNd):
            return alignment_stats(
                _along_and_across(layer, x, v, self.max_tokens), v.new_tensor([1.0, 0.0]), bins=self.bins
            )
        rows = x.reshape(-1, x.shape[-1])
        if self.max_tokens is not None and len(rows) > self.max_tokens:
            rows = rows[:: _stride(len(rows), self.max_tokens)]
        return alignment_stats(rows, v, bins=self.bins)


def watched_layers(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """Layers by clean name, in the order of the model: those that patterns select, or those of its matrices.

    Args:
        model: any module; wrappers are looked through.
        include: shell-style globs on names of modules; None selects the layers whose weights ``select_matrices``
            selects: the linear ones among them or, where there is none, the convolutions.
        exclude: globs of what to leave out again.

    Raises:
        ValueError: nothing is selected, a pattern matches nothing, or one names a layer that cannot be watched alone.
    """
    layers: dict[str, nn.Module] = {n: m for n, m in clean_named_modules(model).items() if _is_layer(m)}
    if include is None:
        selected = {matrix.name.rpartition(".")[0] for matrix in select_matrices(model)}
        usable = [name for name in layers if name in selected and obstacle(layers[name]) is None]
        names = [name for name in usable if not isinstance(layers[name], _ConvNd)] or usable
        if not names:
            raise ValueError(
                "no layer was found that can be watched (bare parameters and nn.MultiheadAttention are used without a "
                f"layer's call): name layers with include. There are: {listed(list(layers))}"
            )
    else:
        names = select(list(layers), include, "include", "linear layer or convolution")
        for name in names:
            if (reason := obstacle(layers[name])) is not None:
                raise ValueError(f"include={list(include)} selects {name!r}, which cannot be watched: {reason}")
    left_out = set(select(list(layers), exclude, "exclude", "linear layer or convolution")) if exclude else set()
    found = {name: layers[name] for name in names if name not in left_out}
    if not found:
        raise ValueError("exclude leaves no layer to watch")
    return found


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot be observed, None if it can."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention uses its weight without calling it"
    if isinstance(layer, _ConvTransposeNd) or not _is_layer(layer):
        return f"{type(layer).__name__} is neither nn.Linear nor a convolution"
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "its weight is not of a floating dtype (a quantised one?)"
    if isinstance(layer, nn.Linear) and weight.shape != (layer.out_features, layer.in_features):
        return f"its weight of shape {tuple(weight.shape)} is not (out, in) (a packed or flattened one?)"
    if isinstance(layer, _ConvNd) and layer.groups != 1:
        return f"it has {layer.groups} groups, each with a matrix of its own"
    return None


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | _ConvNd) or is_transposed(module)


def _out_in(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weight as (out, in)."""
    return weight.T if is_transposed(layer) else weight.flatten(1)


def _flat(stats: AlignmentStats) -> Tensor:
    return torch.cat([stats.histogram, torch.stack([stats.positive, stats.negative, stats.zero, stats.nonfinite])])


def _stride(rows: int, most: int) -> int:
    """A step that leaves at most so many rows, and that no length of a sequence divides: else the same few positions
    of all sequences would be looked at.
    """
    stride = math.ceil(rows / most)
    while math.gcd(stride, rows) > 1:
        stride += 1
    return stride


def _along_and_across(layer: _ConvNd, x: Tensor, v: Tensor, max_tokens: int | None) -> Tensor:
    """Each patch under the kernel, seen in two axes: along v and across it. (patches, 2), float32.

    A patch is a token, and what its projection and its length are is again a convolution; no patch is copied.
    """
    batched = x if x.ndim == layer.weight.ndim else x[None]
    kernel = v.float().reshape(1, *layer.weight.shape[1:])
    if max_tokens is not None:
        with torch.device("meta"):
            one = layer._conv_forward(torch.empty(1, *batched.shape[1:]), torch.empty(kernel.shape), None)
        batched = batched[: max(1, max_tokens // one.numel())]
    values = batched.float()
    along = layer._conv_forward(values, kernel, None).flatten()
    squares = layer._conv_forward(values.square(), torch.ones_like(kernel), None).flatten()
    return torch.stack([along, (squares - along.square()).clamp(min=0).sqrt()], dim=1)
