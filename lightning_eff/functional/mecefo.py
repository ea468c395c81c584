"""MeCeFO: a replica that does a dead neighbour's work beside its own, with a backward pass made cheap for both.

Within the neighbour's passes only, and exactly as without it outside of them:

1. The attention branch of every block takes part in the forward pass and not in the backward pass: its parameters get
   no gradient, and the residual connection carries all of the gradient past it.
2. Feed-forward networks keep their input only and compute the rest again in the backward pass.
3. Weight gradients of their linear layers, ``y = x W^T``, are low-rank: ``gW = (gy^T (x V1)) V1^T`` with the leading
   right singular vectors ``V1`` of ``W``, which is the exact gradient times ``V1 V1^T``. Gradients of inputs and biases
   are exact.

Source: Hu et al., "MeCeFO: Enhancing LLM Training Robustness via Fault-Tolerant Optimization", arXiv 2510.16415,
Algorithms 1 to 3. The rank, the interval and what is done with norms, embeddings and heads are not known from the
paper: here norms that feed only an attention count with it, and everything else keeps its exact gradient.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lightning_eff.arguments import check_count, check_counts, check_globs, check_instance, check_rank
from lightning_eff.functional.mecefo_skipped import SkippedParameters
from lightning_eff.structure.parts import BlockParts, find_block_parts


class Divisors(NamedTuple):
    """What sums of gradients over all shards are divided by.

    Attributes:
        skipped: for parameters that neighbours skip: the number of shards whose owner runs nothing else. 0: nobody has
            a gradient, and the parameter is not to be updated.
        others: for all others: the number of shards.
    """

    skipped: int
    others: int


def divisors(owners: Sequence[int]) -> Divisors:
    """Divisors for a step.

    Args:
        owners: which replica runs each shard. Who runs more than one is a neighbour, for all of its shards.

    Example:
        >>> divisors([0, 1, 2, 2])  # replica 3 is dead, 2 is its neighbour
        Divisors(skipped=2, others=4)
    """
    check_counts("owners", owners, least=0)
    shards = Counter(owners)
    return Divisors(sum(shards[owner] == 1 for owner in owners), len(owners))


def leading_right_singular_vectors(weight: Tensor, rank: int) -> Tensor:
    """The first right singular vectors of a matrix, from the Gram matrix of its shorter side.

    Args:
        weight: (out, in), any floating dtype; computed in float32, or float64 for a float64 matrix.
        rank: how many, in [1, min(out, in)].

    Returns:
        (in, rank), orthonormal columns, in the dtype of the weight.

    Raises:
        ValueError: ``rank`` is out of its range.

    Example:
        >>> leading_right_singular_vectors(torch.diag(torch.tensor([1.0, 3.0])), rank=1).abs()
        tensor([[0.],
                [1.]])
    """
    check_count("rank", rank, most=min(weight.shape))
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    rows, columns = matrix.shape
    if columns <= rows:
        vectors = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
    else:
        left = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]
        # The columns of W^T U are orthogonal up to rounding; QR also completes the null space of a singular matrix.
        vectors = torch.linalg.qr(matrix.T @ left).Q
    leading: Tensor = vectors.to(weight.dtype).contiguous()
    return leading


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, vectors: Tensor) -> Tensor:
    """``F.linear`` whose weight gradient is the exact one times ``vectors @ vectors.T``.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        vectors: (in, rank), orthonormal columns.

    Example:
        >>> weight = torch.diag(torch.tensor([1.0, 3.0])).requires_grad_()
        >>> vectors = leading_right_singular_vectors(weight, rank=1)
        >>> low_rank_linear(torch.ones(1, 2), weight, None, vectors).sum().backward()
        >>> weight.grad  # exact: ones
        tensor([[0., 1.],
                [0., 1.]])
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):  # what autocast does for `F.linear`, and cannot do inside of a Function
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    y: Tensor = _LowRankLinear.apply(x, weight, bias, vectors.to(x.dtype))  # type: ignore[no-untyped-call]
    return y


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, vectors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, vectors)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, vectors = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
        if ctx.needs_input_grad[1]:
            # 2 b r (in + out) + 2 r in out operations for b tokens, in place of 2 b in out.
            grad_weight = (rows.T @ (x.reshape(-1, x.shape[-1]) @ vectors)) @ vectors.T
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, None


class MeCeFO:
    """A model's cheap passes.

    Args:
        model: the model, without or within its wrappers. Its blocks must be recognised, see `find_block_parts`.
        rank: singular vectors of each feed-forward matrix: an integer of at least 1, or a fraction of its shorter
            side, above 0 and at most 1. A matrix whose input is not wider than that keeps its exact gradient.
        every_n_steps: steps (optimizer updates) between two computations of the vectors, at least 1.
        attention: globs on module names in place of the attentions that are found.
        ffn: globs on module names in place of the feed-forward networks that are found.

    Raises:
        ValueError: an argument is out of range, no attention or feed-forward network is recognised, or, from within
            the first pass, an attention module holds its block's residual connection as well.

    Example:
        >>> encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32), 2, enable_nested_tensor=False)
        >>> mecefo = MeCeFO(encoder, rank=2)
        >>> with mecefo.neighbour(step=0):
        ...     encoder(torch.randn(3, 4, 8))[..., 0].sum().backward()
        >>> encoder.layers[0].self_attn.out_proj.weight.grad is None
        True
        >>> torch.linalg.matrix_rank(encoder.layers[0].linear1.weight.grad).item()
        2
    """

    def __init__(
        self,
        model: nn.Module,
        rank: int | float = 0.25,
        every_n_steps: int = 100,
        attention: str | Sequence[str] | None = None,
        ffn: str | Sequence[str] | None = None,
    ) -> None:
        check_instance("model", model, nn.Module, "an nn.Module")
        check_rank("rank", rank)
        check_count("every_n_steps", every_n_steps, unit="steps")
        check_globs("attention", attention, or_one=True)
        check_globs("ffn", ffn, or_one=True)
        self.rank = rank
        self.every_n_steps = every_n_steps
        self.parts: list[BlockParts] = find_block_parts(model, attention, ffn)
        self._vectors: dict[nn.Linear, Tensor] = {}
        self._window: int | None = None
        self._skipped = SkippedParameters(self.parts)

    @property
    def skipped(self) -> set[nn.Parameter]:
        """Parameters that get no gradient from a neighbour: those of the attentions, and of norms that feed only them.

        Which norms these are is learnt in the first pass, cheap or exact, under `neighbour` or `watch`.
        """
        return self._skipped.parameters

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers whose weight gradients are low-rank, by clean name."""
        return {
            ".".join(part for part in (path, name) if part): layer
            for parts in self.parts
            for path, module in parts.ffn.items()
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and self._rank_of(layer) < layer.in_features
        }

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Around the exact passes of those who are no neighbours, so that all know what neighbours skip.

        Looks at the first forward pass, which runs as it was before compilation; changes nothing, ever.
        """
        if self._skipped.complete:
            yield
            return
        with _eager(), self._skipped.looking():
            yield

    @contextmanager
    def neighbour(self, step: int) -> Iterator[None]:
        """The cheap passes: around the forward and the backward pass of every micro-batch of a neighbour.

        Nested use is an error. Compiled modules run as they were before compilation.

        Args:
            step: optimizer updates done so far; the vectors are computed in the first pass of every ``every_n_steps``
                steps, and do not depend on anything but the weights at that time.
        """
        self._refresh(step)
        with ExitStack() as stack:
            stack.enter_context(_eager())
            stack.enter_context(self._skipped.looking())
            for parts in self.parts:
                for module in parts.attention.values():
                    stack.enter_context(_replaced_forward(module, _without_backward))
                for module in parts.ffn.values():
                    for layer in module.modules():
                        if layer in self._vectors:
                            stack.enter_context(_replaced_forward(layer, self._low_rank))
                    if not isinstance(module, nn.Linear):  # of which nothing but the input is kept anyway
                        stack.enter_context(_replaced_forward(module, _recomputed))
            yield

    def _low_rank(self, layer: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        vectors = self._vectors[layer]
        return lambda x: low_rank_linear(x, layer.weight, layer.bias, vectors)

    def _refresh(self, step: int) -> None:
        window = step // self.every_n_steps
        if window != self._window:
            self._vectors = {
                layer: leading_right_singular_vectors(layer.weight, self._rank_of(layer))
                for layer in self.linears.values()
            }
            self._window = window

    def _rank_of(self, layer: nn.Linear) -> int:
        shorter = min(layer.in_features, layer.out_features)
        return min(self.rank, shorter) if isinstance(self.rank, int) else max(1, round(self.rank * shorter))


def _eager() -> AbstractContextManager[Any]:
    """Compiled modules run as they were before; where nothing is compiled, Dynamo need not be loaded for it."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _replaced_forward(
    module: nn.Module, wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Another ``forward`` on one instance; hooks and wrappers around it stay."""
    own = module.__dict__.get("forward")
    module.forward = wrap(module, module.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def _without_backward(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(forward)


def _recomputed(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
