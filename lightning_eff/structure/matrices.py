"""Which matrices of a model a method works on: those of its blocks, those that patterns name, or all hidden ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from lightning_eff.arguments import check, check_globs, check_instance
from lightning_eff.structure.blocks import Matrix, find_blocks
from lightning_eff.structure.select import listed, select
from lightning_eff.structure.tree import clean_named_parameters, unwrap, walk
from lightning_eff.structure.weights import EMBEDDINGS, once, weights_of, with_adapters, without_tables

# Below it the blocks that repeat are a part of the model and not the model.
LEAST_SHARE = 0.5


def select_matrices(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> list[Matrix]:
    """The matrices that patterns select, in the order of definition, trainable or not.

    Args:
        model: any module; wrappers (``torch.compile``, DDP) are looked through.
        include: shell-style globs (``fnmatch``, case-sensitive, ``*`` also matches dots) on clean names, of any
            parameter with at least two dimensions: also embeddings and heads. None selects the matrices inside
            repeated blocks; where there are none, or where these hold less than half of the hidden weights that are
            trained, all hidden matrices: without embeddings, and without the last one, which is taken for the head.
        exclude: globs of what to leave out again. None leaves out nothing.

    Raises:
        ValueError: nothing is selected, or one of the patterns matches nothing; the message lists the candidates.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32), 2, enable_nested_tensor=False)
        >>> [matrix.name for matrix in select_matrices(encoder, exclude=["layers.0.*", "*linear1*"])]
        ['layers.1.self_attn.in_proj_weight', 'layers.1.self_attn.out_proj.weight', 'layers.1.linear2.weight']
        >>> [matrix.name for matrix in select_matrices(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))]
        ['0.weight']
    """
    check_instance("model", model, nn.Module, "an nn.Module")
    check_globs("include", include, or_one=True)
    check_globs("exclude", exclude, or_one=True)
    in_blocks = [matrix for block in find_blocks(model) for matrix in block.matrices]
    everything = _all_matrices(model, in_blocks)
    included = _by_default(model, in_blocks) if include is None else _matching(everything, include, "include")
    excluded = [] if exclude is None else _matching(everything, exclude, "exclude")
    selected = [matrix for matrix in included if matrix not in excluded]
    if not selected:
        why = "exclude leaves nothing" if included else "the model has none"
        names = listed([matrix.name for matrix in everything], 40)
        raise ValueError(f"no matrix is selected: {why}. Candidates: {names}")
    return selected


def describe_selection(model: nn.Module, matrices: Collection[Matrix]) -> str:
    """What was selected and what was not, in a line for the log.

    Args:
        model: whose trained weights are counted.
        matrices: of :func:`select_matrices`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> describe_selection(model, select_matrices(model))
        '1 matrix, 67 % of the trained weights; outside: 2.weight'
    """
    _check_selection(model, matrices)
    share, outside = coverage(model, matrices)
    count = f"{len(matrices)} matri{'x' if len(matrices) == 1 else 'ces'}"
    beside = f"; outside: {listed(outside, 5)}" if outside else ""
    return f"{count}, {100 * share:.0f} % of the trained weights{beside}"


def coverage(model: nn.Module, matrices: Collection[Matrix]) -> tuple[float, list[str]]:
    """The share of matrices in the trained weights of at least two dimensions, and the names of the others.

    Args:
        model: whose trained weights are counted.
        matrices: of :func:`select_matrices`.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> share, outside = coverage(model, select_matrices(model))
        >>> round(share, 3), outside
        (0.667, ['2.weight'])
    """
    _check_selection(model, matrices)
    chosen = {name for matrix in matrices for name in matrix.parameters}
    sizes = {n: p.numel() for n, p in clean_named_parameters(model).items() if p.requires_grad and p.ndim >= 2}
    total = sum(sizes.values())
    inside = sum(size for name, size in sizes.items() if name in chosen)
    return (inside / total if total else 0.0), [name for name in sizes if name not in chosen]


def _check_selection(model: Any, matrices: Any) -> None:
    check_instance("model", model, nn.Module, "an nn.Module")
    ok = isinstance(matrices, Collection) and all(isinstance(each, Matrix) for each in matrices)
    check("matrices", matrices, ok, "a list of Matrix, as from select_matrices")


def _by_default(model: nn.Module, in_blocks: list[Matrix]) -> list[Matrix]:
    hidden = _hidden_matrices(model, in_blocks)
    sizes = {name: p.numel() for name, p in clean_named_parameters(model).items() if p.requires_grad}

    def trained(matrices: list[Matrix]) -> int:
        return sum(sizes.get(name, 0) for matrix in matrices for name in matrix.parameters)

    return in_blocks if in_blocks and trained(in_blocks) >= LEAST_SHARE * trained(hidden) else hidden


def _hidden_matrices(model: nn.Module, in_blocks: list[Matrix]) -> list[Matrix]:
    """All but embeddings, what is tied to them, and the last one."""
    root = unwrap(model)
    seen = {id(p) for _, m in walk("", root) if isinstance(m, EMBEDDINGS) for p in m.parameters(recurse=False)}
    known = {matrix.name: matrix for matrix in in_blocks}
    weights = without_tables(with_adapters(once(weights_of("", root), seen)))
    found = [known.get(w.name) or Matrix(w.name, w.parameters, "other", "") for w in weights]
    return found[:-1] if len(found) > 1 else found  # also one of a chain of layers that are all alike


def _all_matrices(model: nn.Module, in_blocks: list[Matrix]) -> list[Matrix]:
    """Those in blocks and those beside them, embeddings too, in the order of definition."""
    known = {matrix.name: matrix for matrix in in_blocks}
    weights = with_adapters(once(weights_of("", unwrap(model), embeddings=True), set()))
    return [known.get(w.name) or Matrix(w.name, w.parameters, "other", "") for w in weights]


def _matching(candidates: list[Matrix], patterns: str | Sequence[str], argument: str) -> list[Matrix]:
    names = set(select({matrix.name: matrix.parameters for matrix in candidates}, patterns, argument, "matrix"))
    return [matrix for matrix in candidates if matrix.name in names]
