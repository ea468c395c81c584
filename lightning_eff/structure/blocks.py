"""A model's repeated blocks and their matrices, attention and FFN told apart by shape rather than by name.

What repeats decides: the children of a ``ModuleList``, ``Sequential`` or ``ModuleDict`` that are of one class are
blocks (plain attributes where a model has no such container), and the matrices inside them are what a method works on.
Embeddings, heads and everything else that occurs once are left out; so are norms.

Names are clean: without the ``_orig_mod`` of ``torch.compile`` and the ``module`` of DDP, so that they stay the same
whichever way a model is wrapped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lightning_eff.structure.roles import Role, Shape, roles_of

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.GroupNorm, _NormBase)  # a layer norm over images has weights of three dimensions


@dataclass(frozen=True)
class Matrix:
    """One unit of work: a weight matrix, or a LoRA pair.

    Attributes:
        name: clean name of the weight; of a LoRA pair the name of the frozen base weight beside it.
        parameters: clean names of the parameters that belong together: the weight itself, or the pair (A, B). A LoRA
            pair's base weight is not among them.
        role: what it does in its block: ``"attention"``, ``"ffn"`` or ``"other"``.
        block: clean path of the block that it lies in; empty outside the blocks.
    """

    name: str
    parameters: tuple[str, ...]
    role: Role
    block: str


@dataclass(frozen=True)
class Block:
    """One of a model's repeated blocks.

    Attributes:
        name: clean path of the module, such as ``"transformer.h.0"``.
        matrices: its matrices in the order of definition.
    """

    name: str
    matrices: tuple[Matrix, ...]

    @property
    def family(self) -> str:
        """Path of the container, the same for blocks that repeat each other, such as ``"encoder.block"``."""
        return self.name.rpartition(".")[0]


def clean_named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by clean name, in the order of ``model.named_parameters()``, tied ones once, under their first name.

    Example:
        >>> import torch
        >>> model = nn.Sequential(torch.compile(nn.Linear(2, 2, bias=False)))
        >>> [name for name, _ in model.named_parameters()]
        ['0._orig_mod.weight']
        >>> list(clean_named_parameters(model))
        ['0.weight']
    """
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for path, module in _walk("", _unwrap(model)):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (_join(path, name), parameter))
    return dict(found.values())


def clean_named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by clean name, parents first, shared ones once, without the wrappers around them.

    Example:
        >>> import torch
        >>> list(clean_named_modules(nn.Sequential(torch.compile(nn.Linear(2, 2)))))
        ['', '0']
    """
    return dict(_walk("", _unwrap(model)))


def find_blocks(model: nn.Module) -> list[Block]:
    """The repeated blocks of a model, outermost first, in the order of definition.

    Siblings of one class repeat each other, whatever their sizes; bare layers (an ``nn.Linear`` in a ``Sequential``)
    are no blocks. Of nested repetitions the outer one counts (a transformer block, not the experts within it), unless
    its members hold little else than the inner one (a stage of a hierarchical model). A block without a matrix is
    left out, and a tied weight belongs to the first block that holds it.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32), 2, enable_nested_tensor=False)
        >>> for matrix in find_blocks(encoder)[0].matrices:
        ...     print(matrix.name, matrix.role)
        layers.0.self_attn.in_proj_weight attention
        layers.0.self_attn.out_proj.weight attention
        layers.0.linear1.weight ffn
        layers.0.linear2.weight ffn
    """
    root = _unwrap(model)
    families = _families("", root, inside_containers=True) or _families("", root, inside_containers=False)
    seen: set[int] = set()
    blocks = [Block(path, tuple(_matrices_of_block(path, block, seen))) for path, block in families]
    return [block for block in blocks if block.matrices]


def select_matrices(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> list[Matrix]:
    """The matrices that patterns select, in the order of definition, trainable or not.

    Args:
        model: any module; wrappers (``torch.compile``, DDP) are looked through.
        include: shell-style globs (``fnmatch``, case-sensitive, ``*`` also matches dots) on clean names, of any
            parameter with at least two dimensions: also embeddings and heads. None selects the matrices inside
            repeated blocks.
        exclude: globs of what to leave out again. None leaves out nothing.

    Raises:
        ValueError: nothing is selected, or one of the patterns matches nothing; the message lists the candidates.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32), 2, enable_nested_tensor=False)
        >>> [matrix.name for matrix in select_matrices(encoder, exclude=["layers.0.*", "*linear1*"])]
        ['layers.1.self_attn.in_proj_weight', 'layers.1.self_attn.out_proj.weight', 'layers.1.linear2.weight']
    """
    in_blocks = [matrix for block in find_blocks(model) for matrix in block.matrices]
    everything = _all_matrices(model, in_blocks)
    included = in_blocks if include is None else _matching(everything, include, "include")
    excluded = [] if exclude is None else _matching(everything, exclude, "exclude")
    selected = [matrix for matrix in included if matrix not in excluded]
    if not selected:
        why = "exclude leaves nothing" if included else "no repeated blocks were found: name matrices with include"
        raise ValueError(f"no matrix is selected, {why}. Candidates: {_list(everything)}")
    return selected


def _matching(candidates: list[Matrix], patterns: str | Sequence[str], argument: str) -> list[Matrix]:
    patterns = [patterns] if isinstance(patterns, str) else patterns
    hits: set[Matrix] = set()
    for pattern in patterns:
        hit = {m for m in candidates if any(fnmatchcase(name, pattern) for name in (m.name, *m.parameters))}
        if not hit:
            raise ValueError(f"{argument}={pattern!r} matches no matrix. Candidates: {_list(candidates)}")
        hits |= hit
    return [matrix for matrix in candidates if matrix in hits]


def _list(matrices: Sequence[Matrix], limit: int = 40) -> str:
    names = [matrix.name for matrix in matrices[:limit]]
    more = f", and {len(matrices) - limit} more" if len(matrices) > limit else ""
    return (", ".join(names) or "none (no parameter has two dimensions)") + more


def _all_matrices(model: nn.Module, in_blocks: list[Matrix]) -> list[Matrix]:
    """Those in blocks and those beside them, embeddings too, in the order of definition."""
    known = {matrix.name: matrix for matrix in in_blocks}
    weights = _with_low_rank_pairs(_once(_weights("", _unwrap(model), embeddings=True), set()))
    return [known.get(w.name) or Matrix(w.name, w.parameters, "other", "") for w in weights]


# --- the tree without its wrappers ---------------------------------------------------------------------------------


def _unwrap(module: nn.Module) -> nn.Module:
    while True:
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(module, DistributedDataParallel | DataParallel):
            module = module.module
        else:
            return module


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, _unwrap(child)) for name, child in module._modules.items() if child is not None]


def _walk(path: str, module: nn.Module, seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The module and all below it, parents first, shared ones once."""
    seen = set() if seen is None else seen
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in _children(module):
        yield from _walk(_join(path, name), child, seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- what repeats --------------------------------------------------------------------------------------------------


def _kind(module: nn.Module) -> object:
    """Modules of one kind repeat each other. A container's class says nothing, so its children's classes do."""
    return tuple(type(child) for _, child in _children(module)) if isinstance(module, _CONTAINERS) else type(module)


def _families(path: str, module: nn.Module, *, inside_containers: bool) -> list[tuple[str, nn.Module]]:
    children = _children(module)
    blocks: dict[int, tuple[str, nn.Module]] = {}
    if isinstance(module, _CONTAINERS) == inside_containers:
        # A block is made of modules and has weights: a bare layer is none.
        composite = [(name, child) for name, child in children if _children(child) and _ids(child)]
        kinds = Counter(_kind(child) for _, child in composite)
        for name, child in composite:
            if kinds[_kind(child)] > 1:
                blocks.setdefault(id(child), (_join(path, name), child))
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, child in children:
        inner = _families(_join(path, name), child, inside_containers=inside_containers)
        if id(child) in blocks and not _is_stage(child, [block for _, block in inner]):
            found.setdefault(id(child), blocks[id(child)])
        else:
            for block_path, block in inner:
                found.setdefault(id(block), (block_path, block))
    return list(found.values())


def _is_stage(module: nn.Module, inner: list[nn.Module]) -> bool:
    """Whether a module is but a stack of blocks: each does all that it does, and it has little beside them.

    Little is fewer matrices than one of the blocks has. The experts and the sublayers of a block repeat as well, but
    each is only a feed-forward network or only an attention.
    """
    if not inner or any(_tasks(module) - _tasks(block) for block in inner):
        return False
    held = [_ids(block) for block in inner]
    return len(_ids(module).difference(*held)) < max(map(len, held))


def _tasks(module: nn.Module) -> set[Role]:
    return {matrix.role for matrix in _matrices_of_block("", module, set()) if matrix.role != "other"}


def _ids(module: nn.Module) -> set[int]:
    return {id(parameter) for parameter, _ in _weights("", module)}


# --- the matrices of a block ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weight:
    """A parameter of at least two dimensions, or a low-rank pair under the name and shape of its base weight."""

    name: str
    parameters: tuple[str, ...]
    shape: Shape
    bare: bool = False  # not the weight of a layer, but a parameter by itself
    frozen: bool = False


def _weights(path: str, module: nn.Module, *, embeddings: bool = False) -> Iterator[tuple[nn.Parameter, _Weight]]:
    """Every parameter of at least two dimensions below a module; tied ones as often as they occur."""
    left_out = _NORMS if embeddings else _NORMS + _EMBEDDINGS
    for owner_path, owner in _walk(path, module):
        if isinstance(owner, left_out):
            continue
        for attribute, parameter in owner._parameters.items():
            if parameter is not None and parameter.ndim >= 2:
                name = _join(owner_path, attribute)
                shape = _shape(owner_path, owner, attribute, parameter)
                bare = not attribute.endswith("weight")
                yield parameter, _Weight(name, (name,), shape, bare, frozen=not parameter.requires_grad)


def _once(weights: Iterable[tuple[nn.Parameter, _Weight]], seen: set[int]) -> list[_Weight]:
    """Without those that were seen before."""
    kept = []
    for parameter, weight in weights:
        if id(parameter) not in seen:
            seen.add(id(parameter))
            kept.append(weight)
    return kept


def _shape(path: str, owner: nn.Module, attribute: str, parameter: nn.Parameter) -> Shape:
    if isinstance(owner, nn.Linear) and attribute == "weight":
        # Not the parameter's own shape, which may be a packed, quantised one.
        return Shape(path, owner.in_features, owner.out_features)
    if isinstance(owner, _ConvNd):
        return Shape(path, parameter.shape[1:].numel(), parameter.shape[0], linear=False)
    return Shape(path, parameter.shape[-2], parameter.shape[-1], directed=False)


def _matrices_of_block(path: str, block: nn.Module, seen: set[int]) -> Iterator[Matrix]:
    weights = _with_low_rank_pairs(_once(_weights(path, block), seen))
    # A bare parameter is a matrix of the block if it works on the block's width: a table of positions does not.
    widths = Counter(side for w in weights if not w.bare for side in {w.shape.inputs, w.shape.outputs})
    width = max(widths, key=lambda side: (widths[side], -side), default=None)
    weights = [w for w in weights if not w.bare or width in (None, w.shape.inputs, w.shape.outputs)]
    chains = [name for name, module in _walk(path, block) if isinstance(module, nn.Sequential)]
    roles = roles_of([weight.shape for weight in weights], chains)
    for weight, role in zip(weights, roles, strict=True):
        yield Matrix(weight.name, weight.parameters, role, path)


def _with_low_rank_pairs(weights: list[_Weight]) -> list[_Weight]:
    """Put A (r x in), B (out x r) and a frozen base weight (out x in) into one, where a module holds just those.

    Were the base weight trained as well, the three could be layers one after the other.
    """
    modules: dict[str, list[_Weight]] = {}
    for weight in weights:
        parts = weight.shape.path.split(".") if weight.shape.path else []
        for depth in range(len(parts) + 1):
            modules.setdefault(".".join(parts[:depth]), []).append(weight)
    merged: dict[str, _Weight | None] = {}
    for path in sorted(modules, key=len, reverse=True):  # children first
        inside = modules[path]
        if len(inside) < 3 or len(inside) % 2 == 0 or any(weight.name in merged for weight in inside):
            continue
        base = max(inside, key=lambda weight: weight.shape.inputs * weight.shape.outputs)
        factors = [weight for weight in inside if weight is not base]
        if base.frozen and _are_factors(base.shape, [weight.shape for weight in factors]):
            names = tuple(name for weight in factors for name in weight.parameters)
            merged |= dict.fromkeys(names)
            merged[base.name] = _Weight(base.name, names, base.shape)
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
    if base.inputs == base.outputs:
        return all(count % 2 == 0 for count in Counter(ranks[base.inputs]).values())
    return sorted(ranks[base.inputs]) == sorted(ranks[base.outputs])
