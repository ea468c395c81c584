"""Replicas that train in step, through losses and returns: who is there, who writes, and what all agree on."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, BroadcastOptions
from torch.distributed import ReduceOp

from lightning_eff.training.quorum import Gloo, QuorumManager, summed

T = TypeVar("T")

# Where a replica stands when it meets the others.
_RETRY = 0  # within an optimizer step that failed
_AGREEING = 1  # between steps, in an operation that all take part in
_START = 2  # before a step


class LeftBehindError(RuntimeError):
    """The others went on without this replica, and it cannot catch up where it stands: it has to start anew."""


@dataclass(frozen=True)
class Place:
    """What one replica tells the others after each change of membership."""

    index: int
    step: int
    agreed: int
    where: int
    veteran: bool
    writer: bool
    waits: bool
    seed: int

    def row(self) -> list[int]:
        """As integers."""
        return [int(value) for value in vars(self).values()]

    @staticmethod
    def of(row: list[int]) -> Place:
        """From integers."""
        index, step, agreed, where, veteran, writer, waits, seed = row
        return Place(index, step, agreed, where, bool(veteran), bool(writer), bool(waits), seed)


class Replicas:
    """This replica among the others.

    A step is: `begin`, then collectives by `reduce_start` and `within`, then `commit`; after the update `settle`, or
    if it was not committed `again`, and so on. Whatever else all replicas do together goes through `agree`.

    Why it is safe. The lighthouse alone says who is a member, so all members of a quorum know the same. A replica
    leaves a step only after `settle`, in which every member takes part, and which no member reaches before it has
    committed: so whoever failed to commit finds the others still within that step, takes their result and stands where
    they stand. Newcomers are let in before a step alone, when everybody's state is whole. Between steps an operation
    that fails is repeated among those who live; one that was completed by some is told to the others, and because
    each of them needs all members, nobody is ever further ahead than by one.

    Args:
        index: of this replica, the same after a restart.
        count: the largest number of replicas.
        manager: torchft's.
        min_replicas: fewer than these do not train.
        start_grace: seconds for which the first step waits for all ``count``.
        max_aborts: how often one step may fail in a row.
        seed: of the run; the writer's holds for all.
    """

    def __init__(
        self,
        index: int,
        count: int,
        manager: QuorumManager,
        min_replicas: int,
        start_grace: float,
        max_aborts: int,
        seed: int,
    ) -> None:
        self.index = index
        self.count = count
        self.manager = manager
        self.min_replicas = min_replicas
        self.start_grace = start_grace
        self.max_aborts = max_aborts
        self.seed = seed
        self.members: list[int] = []
        """Indices of those who take part, in the order of their ranks; empty before the first step."""
        self.writer: int | None = None
        """Index of the member that writes checkpoints and logs."""
        self.aborts = 0
        """Attempts that failed since the run began."""
        self.waited = 0.0
        """Seconds that the last change of membership or failure cost this replica."""
        self.in_attempt = False
        self._agreed = 0
        self._last: Any = None
        self._generation: int | None = None
        self._veteran = False
        self._created = time.monotonic()
        self._failed_at: float | None = None
        self._aborts_in_a_row = 0

    @property
    def group(self) -> Gloo:
        """What connects the members."""
        return self.manager.group

    @property
    def joined(self) -> bool:
        """Whether this replica is one of the members."""
        return bool(self.members)

    @property
    def step(self) -> int:
        """Committed steps."""
        return int(self.manager.current_step())

    @property
    def is_writer(self) -> bool:
        """Whether this replica writes checkpoints and logs."""
        return self.writer == self.index

    # The step.

    def begin(self) -> None:
        """Meet the others before a step; whoever lags behind has their state afterwards."""
        while True:
            places = self._meet(_START, newcomers=True)
            if places is None:
                continue
            if any(place.where != _START for place in places):
                if not self._veteran:
                    raise LeftBehindError(
                        "this replica came in while the others were within a step; it has to start anew"
                    )
                continue  # they finish what they do, and come here
            if all(place.waits for place in places) and len(places) < self.count:
                time.sleep(0.1)
                continue
            if len(places) < self.min_replicas:
                time.sleep(0.5)
                continue
            break
        self._veteran = True
        self.in_attempt = True

    def within(self, operation: Callable[[Gloo], T], instead: T) -> T:
        """An operation of all members within a step; if it fails the step fails, and the result is ``instead``."""
        if self.manager.errored() is not None:
            return instead
        try:
            return operation(self.group)
        except Exception as error:
            self.manager.report_error(error)
            self.group.abort()
            return instead

    def commit(self) -> bool:
        """Whether the step is good on this replica. If it is, apply it and `settle`; if not, go on with `again`."""
        error = self.manager.errored()
        if error is None and self.manager.should_commit():
            self._aborts_in_a_row = 0
            self._agreed, self._last = 0, None
            return True
        self.aborts += 1
        self._aborts_in_a_row += 1
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        if self._aborts_in_a_row > self.max_aborts:
            raise RuntimeError(
                f"step {self.step} has failed {self._aborts_in_a_row} times in a row"
                + (f", the last time by: {error.original_exception}" if error else "")
                + ". Is `collective_timeout` shorter than a step takes?"
            )
        if error is not None:
            self.manager.fail(error.original_exception)
        return False

    def again(self) -> bool:
        """Meet the others after a step that failed here.

        Returns:
            True if a peer had committed it: this replica has its result now, as if it had committed it itself.
        """
        before = self.step
        while True:
            places = self._meet(_RETRY, newcomers=False)
            if places is None:
                continue
            if self.step > before:
                self._aborts_in_a_row = 0
                return True
            return False

    def settle(self) -> None:
        """Leave the step, when all have committed it."""
        self.in_attempt = False
        self.agree(_nothing)
        if self._failed_at is not None:
            self.waited, self._failed_at = time.monotonic() - self._failed_at, None

    # Between steps.

    def agree(self, operation: Callable[[Gloo], T]) -> T:
        """An operation of all members between steps, which gives the same result to each of them.

        Args:
            operation: collective; of this replica's values, with a result that ``torch.load(weights_only=True)`` can
                read. Repeated when a member is lost on the way.
        """
        while True:
            try:
                result = operation(self.group)
                break
            except Exception as error:
                if self._failed_at is None:
                    self._failed_at = time.monotonic()
                self.manager.fail(error)
                told, result = self._catch_up()
                if told:
                    break
        self._agreed += 1
        self._last = result
        return result

    def _catch_up(self) -> tuple[bool, Any]:
        """After a failure: the result of the operation, if some have completed it."""
        while True:
            places = self._meet(_AGREEING, newcomers=False)
            if places is None:
                continue
            ahead = max(place.agreed for place in places)
            if ahead > self._agreed + 1:
                raise LeftBehindError(f"the others are {ahead - self._agreed} operations ahead; start anew")
            if any(place.agreed < ahead for place in places):
                teller = next(rank for rank, place in enumerate(places) if place.agreed == ahead)
                try:
                    result = send_object(self.group, self._last, teller)
                except Exception as error:
                    self.manager.fail(error)
                    continue
                if self._agreed < ahead:
                    return True, result
            return False, None

    # Meeting.

    def _meet(self, where: int, newcomers: bool) -> list[Place] | None:
        """One quorum. None if it came to nothing and has to be repeated."""
        before = self.step
        began = time.monotonic()
        try:
            self.manager.start_quorum(shrink_only=not newcomers)
        except Exception as error:
            waited = time.monotonic() - began
            raise RuntimeError(
                f"no quorum within {waited:.0f} s, at step {self.step} of replica {self.index}: too few replicas "
                f"(at least {self.min_replicas} are needed), or the lighthouse is gone ({error})"
            ) from error
        failure = self.manager.errored()
        if failure is not None:
            self.manager.fail(failure.original_exception)
            return None
        if where != _START and self.step > before + (where == _RETRY):
            raise LeftBehindError(f"the others are at step {self.step}, this replica was at {before}; start anew")
        if where == _RETRY and self.step > before:
            where, self._agreed, self._last = _AGREEING, 0, None
        changed = self.group.generation != self._generation
        if not changed and self._veteran:
            return [Place(index, self.step, self._agreed, where, True, False, False, 0) for index in self.group.members]
        mine = Place(
            self.index,
            self.step,
            self._agreed,
            where,
            self._veteran,
            self.is_writer,
            not self._veteran and time.monotonic() - self._created < self.start_grace,
            self.seed,
        )
        try:
            places = [Place.of(row) for row in gather_rows(self.group, mine.row())]
        except Exception as error:
            self.manager.fail(error)
            return None
        self._settle_roles(places)
        self._generation = self.group.generation
        self.manager.reset_failures()
        return places

    def _settle_roles(self, places: list[Place]) -> None:
        indices = [place.index for place in places]
        if len(set(indices)) < len(indices):
            raise RuntimeError(f"several replicas have the same index: {indices}. Is REPLICA_GROUP_ID set for each?")
        if max(indices) >= self.count:
            raise RuntimeError(f"replicas {indices} are too many for max_replicas={self.count}")
        # Whoever writes goes on as long as it lives: files change hands as rarely as possible.
        first = next((p for p in places if p.writer), None) or next((p for p in places if p.veteran), places[0])
        self.members, self.writer, self.seed = indices, first.index, first.seed

    def leave(self) -> None:
        """End the connections."""
        self.group.abort()
        self.manager.shutdown(wait=False)


def gather_rows(group: Gloo, row: list[int]) -> list[list[int]]:
    """The integers of every member, by rank."""
    mine = torch.tensor(row)
    rows = [torch.empty_like(mine) for _ in range(group.world)]
    group.allgather([rows], [mine], AllgatherOptions()).wait()
    return [each.tolist() for each in rows]


def gather_tensors(group: Gloo, tensor: Tensor) -> list[Tensor]:
    """A tensor of the same shape from every member, by rank."""
    mine = tensor.detach().contiguous()
    parts = [torch.empty_like(mine) for _ in range(group.world)]
    group.allgather([parts], [mine], AllgatherOptions()).wait()
    return parts


def send_object(group: Gloo, value: Any, source: int) -> Any:
    """What the member with rank ``source`` holds, for all; tensors and plain Python values, nothing is unpickled."""
    options = BroadcastOptions()
    options.rootRank = source
    data = b""
    if group.rank == source:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        data = buffer.getvalue()
    length = torch.tensor([len(data)])
    group.broadcast([length], options).wait()
    content = torch.empty(int(length), dtype=torch.uint8)
    if group.rank == source:
        content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    group.broadcast([content], options).wait()
    return torch.load(io.BytesIO(content.numpy().tobytes()), weights_only=True)


def _nothing(group: Gloo) -> None:
    summed(group, torch.zeros(1), ReduceOp.SUM)
