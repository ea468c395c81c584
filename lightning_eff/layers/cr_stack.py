"""A stack of CR-Net's blocks: outputs on their way up, and recomputation from the block above."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_eff.arguments import check, check_count, check_flag, check_instance, check_number
from lightning_eff.layers.autograd import in_backward
from lightning_eff.layers.cr_net import LEAST, CRFirst, CRLinear


def kept_layers(coefficients: Sequence[float], max_growth: float) -> list[int]:
    """The layers whose Y is kept, so that no other one is found again with too large an error.

    From the last layer down the error, in units of the rounding of a float, is at most ``E <- (E + 1) / |c|``, and 0 in
    a layer that is kept; the last one always is.

    Args:
        coefficients: c of layers 1 to L - 1, counted from 0; what stands for the first layer is not among them.
        max_growth: the largest error that is allowed, > 0.

    Example:
        >>> kept_layers([1.0] * 8, 32), kept_layers([0.5] * 8, 32), kept_layers([0.5, 0.01, 0.5], 32)
        ([8], [3, 8], [1, 3])
    """
    error, kept = 0.0, [len(coefficients)]
    for below in reversed(range(len(coefficients))):
        error = (error + 1) / max(abs(coefficients[below]), LEAST)
        if error > max_growth:
            error = 0.0
            kept.append(below)
    return kept[::-1]


class _Pass:
    """One forward pass: outputs on their way up, and what its backward pass begins with."""

    def __init__(self) -> None:
        self.outputs: dict[tuple[int, str], Tensor] = {}
        self.lows: dict[tuple[int, str], Tensor] = {}
        self.kept: dict[tuple[int, str], Tensor] = {}
        self.found: dict[tuple[int, str], Tensor] = {}
        self.scalars: dict[tuple[int, str], Tensor] = {}
        self.follows: dict[tuple[int, str], bool] = {}  # whether autograd follows an output: not behind frozen blocks


class Link:
    """What a projection asks while its block runs: which block it is of, in which pass, and whether once more."""

    def __init__(self, current: _Pass, layer: int, names: dict[nn.Module, str], stores: bool, again: bool) -> None:
        self.current = current
        self.layer = layer
        self.names = names
        self.stores = stores
        self.again = again

    def take(self, linear: CRLinear) -> Tensor:
        """The layer below's output."""
        name = self.names[linear]
        below = (self.layer - 1, name)
        if not self.again:
            return self.current.outputs[below]
        y = self.current.kept.get(below)
        if y is None:
            here = (self.layer, name)
            above = self.current.found.pop(here, None)
            above = self.current.kept.get(here) if above is None else above
            if above is None:
                raise RuntimeError(
                    f"block {self.layer} is recomputed before the one above it: with recompute=True the loss must"
                    " depend on the last block's output"
                )
            y = self.current.found[below] = linear.inverse(above, self.current.lows[here])
        return y.detach().requires_grad_(self.current.follows[below])  # autograd saves what it saved in the first pass

    def give(self, linear: nn.Module, y: Tensor, low: Tensor | None) -> None:
        """This layer's output, to the layer above."""
        if self.again:
            return
        key = (self.layer, self.names[linear])
        self.current.outputs[key] = y
        self.current.follows[key] = y.requires_grad
        if self.stores and low is not None:
            assert isinstance(linear, CRLinear)
            self.current.lows[key] = low.detach()
            self.current.scalars[key] = linear.c.detach()


class Connection:
    """What connects the blocks of a stack: who is above whom, and what is kept of a pass.

    Args:
        blocks: in their order; the first has :class:`CRFirst` where the others have :class:`CRLinear`.
        recompute: keep block inputs and low-rank activations in place of everything.
        max_growth: the largest growth of the rounding error of what is found again, see :func:`kept_layers`.
        every_n_passes: passes with gradients from one look at the scalars, which waits for the device, to the next.

    Raises:
        ValueError: an argument that is not allowed, or blocks that do not fit.
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        recompute: bool = False,
        max_growth: float = 32.0,
        every_n_passes: int = 16,
    ) -> None:
        check_flag("recompute", recompute)
        check_number("max_growth", max_growth, above=0)
        check_count("every_n_passes", every_n_passes)
        self.recompute = recompute
        self.max_growth = max_growth
        self.every_n_passes = every_n_passes
        self.passes = 0
        self.kept: list[tuple[int, str]] | None = None  # before the first look: all
        self.blocks = list(blocks)
        self.names = [_projections(block) for block in self.blocks]
        self._check()
        self._current: _Pass | None = None
        for index, block in enumerate(self.blocks):
            block.forward = _BlockForward(self, index, block.__dict__.get("forward"))  # type: ignore[method-assign]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_current": None}

    def _check(self) -> None:
        check("blocks", len(self.blocks), len(self.blocks) >= 2, "two at least")
        first = {name: module for module, name in self.names[0].items()}
        check("blocks", sorted(first), len(first) > 0, "blocks with projections, CRFirst in the first of them")
        for index, names in enumerate(self.names):
            kind = CRLinear if index else CRFirst
            wrong = [name for module, name in names.items() if not isinstance(module, kind)]
            check("blocks", wrong, not wrong, f"{kind.__name__} in block {index}")
            same = {n: m.out_features for m, n in names.items()} == {n: m.out_features for n, m in first.items()}  # type: ignore[misc]
            check("blocks", sorted(names.values()), same, f"the same projections in block {index} as in the first one")

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, to keep the same layers at the same step: plain data."""
        return {"passes": self.passes, "kept": None if self.kept is None else [list(key) for key in self.kept]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        kept = state["kept"]
        self.passes, self.kept = state["passes"], None if kept is None else [(layer, name) for layer, name in kept]

    def run(self, index: int, inner: Callable[..., Any] | None, args: Any, kwargs: Any) -> Any:
        """A block's forward pass."""
        block = self.blocks[index]
        forward = inner or type(block).forward.__get__(block)
        stores = self.recompute and torch.is_grad_enabled()
        current = self._begin(index)
        if stores:
            with set_checkpoint_early_stop(False):  # all of a block's projections find what is below them
                first = [True]

                def again(*args: Any, **kwargs: Any) -> Any:
                    once, first[0] = first[0], False
                    return self._linked(Link(current, index, self.names[index], True, not once), forward, args, kwargs)

                result = checkpoint(again, *args, use_reentrant=False, **kwargs)
        else:
            result = self._linked(Link(current, index, self.names[index], False, False), forward, args, kwargs)
        self._end(current, index, stores)
        return result

    run_eagerly = torch.compiler.disable(run)  # type: ignore[no-untyped-call]

    def _begin(self, index: int) -> _Pass:
        if not torch.compiler.is_compiling() and in_backward():
            raise RuntimeError(
                "the blocks of a CRStack are under activation checkpointing of another kind, which does not know what"
                " they take from the block below: turn it off, and set recompute=True"
            )
        if index == 0:
            self._current = _Pass()
        elif self._current is None or not any(layer == index - 1 for layer, _ in self._current.outputs):
            raise RuntimeError(f"block {index} of a CRStack must run right after block {index - 1}")
        assert self._current is not None
        return self._current

    def _linked(self, link: Link, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        for module in link.names:
            module.link = link  # type: ignore[assignment]
        try:
            return forward(*args, **kwargs)
        finally:
            for module in link.names:
                module.link = None  # type: ignore[assignment]

    def _end(self, current: _Pass, index: int, stores: bool) -> None:
        """Let go of what is below: autograd has what it needs of it, or it is found again."""
        last = index == len(self.blocks) - 1
        for key in [key for key in current.outputs if key[0] < index or last]:
            y = current.outputs.pop(key)
            if stores and (key[0] == len(self.blocks) - 1 or self.kept is None or key in self.kept):
                current.kept[key] = y.detach()
        if not last:
            return
        self._current = None
        if stores:
            self.passes += 1
            if (self.passes - 1) % self.every_n_passes == 0:
                self._look(current)
            current.scalars.clear()

    def _look(self, current: _Pass) -> None:
        """Decide from this pass's scalars what the following ones keep."""
        keys = list(current.scalars)
        values = torch.cat([current.scalars[key].flatten().double() for key in keys]).tolist()
        of = dict(zip(keys, values, strict=True))
        names = dict.fromkeys(name for _, name in keys)
        self.kept = []
        for name in names:
            coefficients = [of[layer, name] for layer in range(1, len(self.blocks))]
            self.kept += [(layer, name) for layer in kept_layers(coefficients, self.max_growth)]


class _BlockForward:
    """A block's ``forward`` as a stack runs it; copies and pickles with the block."""

    def __init__(self, connection: Connection, index: int, inner: Callable[..., Any] | None) -> None:
        self.connection = connection
        self.index = index
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.connection.run_eagerly if self.connection.recompute else self.connection.run
        return run(self.index, self.inner, args, kwargs)


def _projections(block: nn.Module) -> dict[nn.Module, str]:
    check_instance("blocks", block, nn.Module, "modules")
    return {module: name for name, module in block.named_modules() if isinstance(module, CRFirst | CRLinear)}


class CRStack(nn.ModuleList):
    """Blocks that run one after the other, each taking the projections of the one below.

    The blocks may be of any kind: their :class:`CRLinear` are called as ``nn.Linear`` are. A model that runs the blocks
    by itself, as ``for block in self.blocks``, may go on doing so.

    Args:
        blocks: as in :class:`Connection`.
        recompute: keep a block's input and the ``rank`` values ``a(x)`` of each projection, and compute the rest again
            in the backward pass, from the block above. The loss must depend on the last block's output.
        max_growth: largest growth of the rounding error of what is found again by division: 32 keeps gradients in
            float32 within 1e-5 of plain ones. Y is kept where it would be exceeded.
        every_n_passes: passes with gradients from one look at the scalars, which waits for the device, to the next.

    Raises:
        ValueError: an argument that is not allowed, or blocks that do not fit.
        RuntimeError: blocks run out of order, or under activation checkpointing of another kind.

    Example:
        >>> layers = [CRFirst(nn.Linear(8, 8)), CRLinear(8, 8, rank=2), CRLinear(8, 8, rank=2)]
        >>> CRStack([nn.Sequential(layer) for layer in layers], recompute=True)(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        blocks: Iterable[nn.Module],
        recompute: bool = False,
        max_growth: float = 32.0,
        every_n_passes: int = 16,
    ) -> None:
        ok = isinstance(blocks, Iterable) and not isinstance(blocks, str)
        check("blocks", blocks, ok, "a list of modules, two at least")
        blocks = list(blocks)
        connection = Connection(blocks, recompute, max_growth, every_n_passes)
        super().__init__(blocks)
        self.connection = connection

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Each block gets what the one below gave, and the other arguments."""
        for block in self:
            x = block(x, *args, **kwargs)
        return x
