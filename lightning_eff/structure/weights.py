"""The weights below a module that are matrices, an adapter's with the frozen weight that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_eff.structure.roles import Shape
from lightning_eff.structure.tree import children, join, walk

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, _NormBase)  # a layer norm over images has weights of three dimensions
_BASE = "base_layer"  # what PEFT calls the frozen layer that an adapter stands around


@dataclass(frozen=True)
class Weight:
    """A parameter of at least two dimensions; or an adapter's, under the name and shape of its base weight."""

    name: str
    parameters: tuple[str, ...]
    shape: Shape
    bare: bool = False  # not the weight of a layer, but a parameter by itself
    frozen: bool = False
    sizes: tuple[int, ...] = ()  # of the parameter


def weights_of(path: str, module: nn.Module, *, embeddings: bool = False) -> Iterator[tuple[nn.Parameter, Weight]]:
    """Every parameter of at least two dimensions below a module; tied ones as often as they occur."""
    left_out = _NORMS if embeddings else _NORMS + EMBEDDINGS
    for owner_path, owner in walk(path, module):
        if isinstance(owner, left_out):
            continue
        for attribute, parameter in owner._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                name = join(owner_path, attribute)
                shape = _shape(owner_path, owner, attribute, parameter)
                bare = "weight" not in attribute
                frozen = not parameter.requires_grad
                yield parameter, Weight(name, (name,), shape, bare, frozen, tuple(parameter.shape))


def _shape(path: str, owner: nn.Module, attribute: str, parameter: nn.Parameter) -> Shape:
    if isinstance(owner, nn.Linear) and attribute == "weight":
        # Not the parameter's own shape, which may be a packed, quantised one.
        return Shape(path, owner.in_features, owner.out_features)
    if isinstance(owner, _ConvNd):
        return Shape(path, parameter.shape[1:].numel(), parameter.shape[0], linear=False)
    return Shape(path, parameter.shape[-2], parameter.shape[-1], directed=False)


def is_transposed(module: nn.Module) -> bool:
    """The ``Conv1D`` of Hugging Face's GPT-2: a linear layer whose weight is (in, out)."""
    weight, bias, outputs = (getattr(module, name, None) for name in ("weight", "bias", "nf"))
    if not (isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and isinstance(outputs, int)):
        return False
    return weight.ndim == 2 and weight.shape[1] == outputs == len(bias)


def factored(path: str, module: nn.Module) -> dict[str, Shape]:
    """The modules that are one linear layer in two factors, by path, with the shape of the whole.

    They say so themselves: two ``nn.Linear`` in them lead from their own ``in_features`` to their ``out_features``,
    through no more features than either. The factors' role is that of the layer that they are.
    """
    found = {}
    for owner_path, owner in walk(path, module):
        inside = [child for _, child in children(owner)]
        if len(inside) != 2:
            continue
        first, last = inside
        if not (isinstance(first, nn.Linear) and isinstance(last, nn.Linear)):
            continue
        whole = (first.in_features, last.out_features)
        within = first.out_features == last.in_features <= min(whole)
        if within and whole == (getattr(owner, "in_features", None), getattr(owner, "out_features", None)):
            found[owner_path] = Shape(owner_path, *whole)
    return found


def once(weights: Iterable[tuple[nn.Parameter, Weight]], seen: set[int]) -> list[Weight]:
    """Without those that were seen before."""
    kept = []
    for parameter, weight in weights:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            kept.append(weight)
    return kept


def without_tables(weights: list[Weight]) -> list[Weight]:
    """Without bare parameters that no product of matrices takes: biases, tables of positions, states of a recurrence.

    A bare parameter is a matrix where it works on widths that the layers beside it have: on two of them, or, as a
    stack of experts or of heads, on one. Where all parameters are bare, all are.
    """
    known = {side for w in weights if not w.bare and w.shape.linear for side in (w.shape.inputs, w.shape.outputs)}
    if not known:
        return [weight for weight in weights if not (weight.bare and weight.name.endswith("bias"))]
    kept = []
    for weight in weights:
        shape = _of_bare(weight, known) if weight.bare else weight.shape
        if shape is not None:
            kept.append(replace(weight, shape=shape))
    return kept


def _of_bare(weight: Weight, known: set[int]) -> Shape | None:
    *stacked, rows, columns = weight.sizes
    if weight.name.endswith("bias") or min(rows, columns) == 1:
        return None
    if not stacked:
        return weight.shape if {rows, columns} <= known else None
    if {rows, columns} & known:
        return weight.shape
    if len(stacked) == 1 and stacked[0] in known:  # (width, heads, width of a head)
        return Shape(weight.shape.path, stacked[0], rows * columns, directed=False)
    return None


def with_adapters(weights: list[Weight]) -> list[Weight]:
    """Put the parameters of an adapter (LoRA and its kin) and the frozen base weight beside them into one.

    Below a module that has a frozen ``base_layer`` that is everything. Otherwise an adapter is A (r x in) and B
    (out x r), one pair or several, where a module holds just those and a frozen weight (out x in). Were that trained as
    well, the three could be layers one after the other.
    """
    modules: dict[str, list[Weight]] = {}
    for weight in weights:
        parts = weight.shape.path.split(".") if weight.shape.path else []
        for depth in range(len(parts) + 1):
            modules.setdefault(".".join(parts[:depth]), []).append(weight)
    merged: dict[str, Weight | None] = {}
    for path in sorted(modules, key=len, reverse=True):  # children first
        inside = modules[path]
        if len(inside) < 2 or any(weight.name in merged for weight in inside):
            continue
        named = [weight for weight in inside if weight.name == join(path, f"{_BASE}.weight")]
        base = named[0] if named else max(inside, key=lambda weight: weight.shape.inputs * weight.shape.outputs)
        factors = [weight for weight in inside if weight is not base]
        if base.frozen and (named or _are_factors(base.shape, [weight.shape for weight in factors])):
            names = tuple(name for weight in factors for name in weight.parameters)
            merged |= dict.fromkeys(names)
            merged[base.name] = replace(base, parameters=names)
    return [kept for weight in weights if (kept := merged.get(weight.name, weight)) is not None]


def _are_factors(base: Shape, factors: list[Shape]) -> bool:
    """Whether matrices are pairs (A, B) for one base, one pair or several adapters' of any ranks."""
    smaller = min(base.inputs, base.outputs)
    ranks: dict[int, list[int]] = {base.inputs: [], base.outputs: []}
    for factor in factors:
        rank, side = sorted((factor.inputs, factor.outputs))
        if side not in ranks or rank >= smaller:
            return False
        ranks[side].append(rank)
    if len(factors) < 2:
        return False
    if base.inputs == base.outputs:
        return all(count % 2 == 0 for count in Counter(ranks[base.inputs]).values())
    return sorted(ranks[base.inputs]) == sorted(ranks[base.outputs])
