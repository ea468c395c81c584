"""MeCeFO in the steps of a replica that stands in for a dead one."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_eff.functional.mecefo import MeCeFO, divisors
from lightning_eff.strategies.fault_tolerant.comm_hook import ShardGradients
from lightning_eff.strategies.fault_tolerant.steps import ShardSteps


def find_mecefo(
    module: nn.Module, rank: int | float, every_n_steps: int, attention: list[str] | None, ffn: list[str] | None
) -> MeCeFO:
    """For this model; see `MeCeFO`.

    Raises:
        MisconfigurationException: it has no attention or feed-forward modules that can be recognised.
    """
    try:
        return MeCeFO(module, rank=rank, every_n_steps=every_n_steps, attention=attention, ffn=ffn)
    except ValueError as error:
        raise MisconfigurationException(f"on_failure='mecefo' does not fit this model: {error}") from error


def approximate(
    mecefo: MeCeFO, steps: ShardSteps, gradients: ShardGradients, taken: dict[int, list[int]], step: int
) -> None:
    """Set a neighbour's passes, its own as well, and what the sums of gradients are divided by.

    Args:
        mecefo: of the module.
        steps: of this replica.
        gradients: of its hook.
        taken: the shards that each living replica computes besides its own. All is exact if there are none.
        step: committed steps.
    """
    owner_of = {shard: member for member, shards in taken.items() for shard in (member, *shards)}
    by = divisors([owner_of[shard] for shard in range(len(owner_of))])
    steps.watching = nullcontext if steps.orphans else mecefo.watch
    steps.around = partial(mecefo.neighbour, step) if steps.orphans else nullcontext
    if by.skipped < by.others:
        # Where `skipped` is 0 nobody has a gradient, and the parameter stays as it is.
        gradients.divisor = lambda parameter: float(max(1, by.skipped) if parameter in mecefo.skipped else by.others)
