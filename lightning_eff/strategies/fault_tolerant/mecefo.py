"""MeCeFO in the steps of a replica that stands in for a dead one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from lightning_eff.arguments import check_count, check_globs, check_rank
from lightning_eff.functional.mecefo import MeCeFO, divisors
from lightning_eff.strategies.fault_tolerant.step_in_hand import Assignment
from lightning_eff.training.namespaces import MisconfigurationException


@dataclass(frozen=True)
class MeCeFOSettings:
    """The arguments ``mecefo_*`` of the strategy; see `MeCeFO`.

    Raises:
        ValueError: one of them is out of its range.
    """

    rank: int | float
    every_n_steps: int
    attention: list[str] | None
    ffn: list[str] | None

    def __post_init__(self) -> None:
        check_rank("mecefo_rank", self.rank)
        check_count("mecefo_every_n_steps", self.every_n_steps)
        check_globs("mecefo_attention", self.attention)
        check_globs("mecefo_ffn", self.ffn)

    def of(self, module: nn.Module) -> MeCeFO:
        """For this model.

        Raises:
            MisconfigurationException: it has no attention or feed-forward modules that can be recognised.
        """
        try:
            return MeCeFO(module, **vars(self))
        except ValueError as error:
            raise MisconfigurationException(f"on_failure='mecefo' does not fit this model: {error}") from error


def approximated(mecefo: MeCeFO, assignment: Assignment, share: dict[int, list[int]], step: int) -> Assignment:
    """An assignment with a neighbour's passes, its own as well, and what the sums of gradients are then divided by.

    Args:
        mecefo: of the module.
        assignment: of this replica.
        share: the shards that each living replica computes besides its own. All is exact if there are none.
        step: committed steps.
    """
    owner_of = {shard: member for member, shards in share.items() for shard in (member, *shards)}
    by = divisors([owner_of[shard] for shard in range(len(owner_of))])
    if assignment.orphans:
        assignment = replace(assignment, around=partial(mecefo.neighbour, step))
    else:
        assignment = replace(assignment, watching=mecefo.watch)
    if by.skipped < by.others:

        def divisor(parameter: Tensor) -> float:
            # Where `skipped` is 0 nobody has a gradient, and the parameter stays as it is.
            return float(max(1, by.skipped) if parameter in mecefo.skipped else by.others)

        assignment = replace(assignment, divisor=divisor)
    return assignment
