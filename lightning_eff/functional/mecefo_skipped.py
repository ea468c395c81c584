"""Which parameters get no gradient when attentions take no part in the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_eff.structure.parts import BlockParts


class SkippedParameters:
    """The attentions' parameters, and those of modules that work for an attention alone (the norm before it).

    The latter are found in the graph of autograd, in a forward pass with gradients through each block: what leads to
    the attention's input and not to the block's output in any other way.

    Args:
        parts: the blocks.
    """

    def __init__(self, parts: Iterable[BlockParts]) -> None:
        self.parameters: set[nn.Parameter] = set()
        self._unseen = [block for block in parts if block.attention]
        for block in self._unseen:
            for module in block.attention.values():
                self.parameters.update(module.parameters())

    @property
    def complete(self) -> bool:
        """Whether every block has been looked at."""
        return not self._unseen

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look at the forward passes within, which must not be compiled; nothing once all blocks have been seen."""
        looks = [_Look(block, self.parameters) for block in self._unseen]
        try:
            yield
        finally:
            for look in looks:
                for handle in look.handles:
                    handle.remove()
            self._unseen = [look.parts for look in looks if not look.seen]


class _Look:
    """A look at one block: its first forward pass with gradients tells."""

    def __init__(self, parts: BlockParts, found: set[nn.Parameter]) -> None:
        self.parts = parts
        self.found = found
        self.seen = False
        self.entry: set[Any] = set()
        self.before: set[nn.Parameter] = set()
        self.attended: set[Any] = set()
        self.handles = [
            parts.block.register_forward_pre_hook(self._enter, with_kwargs=True),
            parts.block.register_forward_hook(self._leave),
        ]
        for module in parts.attention.values():
            self.handles += [
                module.register_forward_pre_hook(self._enter_attention, with_kwargs=True),
                module.register_forward_hook(self._leave_attention),
            ]

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.entry, self.before, self.attended = set(_nodes((args, kwargs))), set(), set()

    def _enter_attention(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        leaves, _ = _reach(_nodes((args, kwargs)), self.entry | self.attended)
        self.before |= leaves

    def _leave_attention(self, module: nn.Module, args: Any, output: Any) -> None:
        self.attended |= set(_nodes(output))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.seen or not torch.is_grad_enabled():
            return
        self.seen = True
        leaves, reached = _reach(_nodes(output), self.attended, self.entry)
        if self.entry and not reached:
            names = ", ".join(self.parts.attention)
            raise ValueError(
                f"{names} holds the residual connection of {self.parts.name} as well: without a backward pass through"
                " it no gradient reaches the blocks before. Name the inner module with attention='*.name'"
            )
        self.found |= self.before - leaves
        self.entry, self.before, self.attended = set(), set(), set()


def _nodes(values: Any) -> Iterator[Any]:
    """The nodes of autograd that have made the tensors of a nested structure."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            yield leaf.grad_fn


def _reach(nodes: Iterable[Any], stops: set[Any], targets: Iterable[Any] = ()) -> tuple[set[nn.Parameter], bool]:
    """Leaves that lie behind nodes, not looking behind ``stops`` and ``targets``; whether a target was met."""
    stack, seen, leaves = list(nodes), set(stops), set()
    targets, met = set(targets), False
    while stack:
        node = stack.pop()
        if node in targets:
            met = True
        elif node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                leaves.add(node.variable)
            stack += [following for following, _ in node.next_functions if following is not None]
    return leaves, met
