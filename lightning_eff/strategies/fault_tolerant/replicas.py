"""Replicas that train in step, through losses and returns: who is there, who writes, and what all agree on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from typing_extensions import override

from lightning_eff import _launched
from lightning_eff.strategies.fault_tolerant.departure import Departure
from lightning_eff.strategies.fault_tolerant.handover import Handover
from lightning_eff.strategies.fault_tolerant.left_behind import LeftBehind
from lightning_eff.strategies.fault_tolerant.limits import Limits
from lightning_eff.strategies.fault_tolerant.manager import QuorumManager
from lightning_eff.strategies.fault_tolerant.membership import Membership
from lightning_eff.strategies.fault_tolerant.operations import gather_rows, gather_texts, send_object
from lightning_eff.strategies.fault_tolerant.process_group import Gloo
from lightning_eff.strategies.fault_tolerant.rendezvous import (
    AGREEING,
    RETRY,
    START,
    LeftBehindError,
    NoQuorumError,
    Position,
    StrangerError,
    strangers,
    writer_of,
)
from lightning_eff.strategies.fault_tolerant.start import leave_if_over
from lightning_eff.training.random_state import seed_of

T = TypeVar("T")

MOST_RENDEZVOUS = 50  # that come to nothing, one after the other


class Replicas(Membership):
    """This replica among the others, for the process that speaks with them.

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
        limits: how long it waits, and how often it tries.
        seed: of the run; the writer's holds for all.
        layout: a number that is equal where the gradients have the same buckets.
        handover: what the manager gives to peers and takes from them.
        size: bytes of the state, about.
    """

    def __init__(
        self,
        index: int,
        count: int,
        manager: QuorumManager,
        limits: Limits,
        seed: int,
        layout: Callable[[], int],
        handover: Handover,
        size: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(index, count, seed)
        self.manager = manager
        self.limits = limits
        self.layout = layout
        self.size = size
        self.handover = handover
        self._left_behind = LeftBehind(manager, index, limits.patience)
        self._run = seed_of(handover.run)
        self._told: tuple[Any] | None = None
        self._failure: Exception | None = None
        self._agreed = 0
        self._last: Any = None
        self._generation: int | None = None
        self._turns_away = False  # strangers, who are not to come in again
        self._departure = Departure(limits.heartbeat_timeout)
        self._created = time.monotonic()
        self._failed_at: float | None = None
        self._aborts_in_a_row = 0

    @property
    def _veteran(self) -> bool:
        return self.handover.veteran

    @property
    def group(self) -> Gloo:
        """What connects the members."""
        return self.manager.group

    @property
    @override
    def step(self) -> int:
        return int(self.manager.current_step())

    @override
    def start_at(self, step: int) -> None:
        self.manager.set_step(step)

    # The step.

    @override
    def begin(self) -> bool:
        if self._departure.under_way(self.step):
            self.in_attempt = True
            return False
        self._departure.end()
        if self._departure.wanted:
            self.manager.ask_for_new_connections()
        while True:
            before = self.step
            positions = self._rendezvous(START, newcomers=True)
            if any(position.where == AGREEING for position in positions) and self._veteran:
                continue  # they finish what they do, and come here
            self.joins_a_retry = any(position.where == RETRY for position in positions)
            if any(position.where != START for position in positions) and (not self._veteran or self.step > before):
                raise LeftBehindError("the others are within a step, where nobody can come in; start anew")
            if all(position.waits for position in positions) and len(positions) < self.count:
                leave_if_over()
                time.sleep(0.1)
                continue
            # A step that has begun is finished by those who are left, however few.
            if len(positions) < self.limits.min_replicas and not self.joins_a_retry and not self.all_leave:
                time.sleep(0.5)
                continue
            break
        self.handover.veteran = True
        self.in_attempt = True
        begins = not any(position.veteran for position in positions)
        if begins:
            leave_if_over()
            self._warn_if_all_was_lost()
        return begins

    def _warn_if_all_was_lost(self) -> None:
        furthest = _launched.furthest_step()
        if self.is_writer and furthest > self.step:
            warnings.warn(
                f"the run had come to step {furthest}, and nobody is left who knows it: it begins again at step "
                f"{self.step}. With ModelCheckpoint(save_last=True) and Trainer.fit(ckpt_path='last') it begins at the "
                "last checkpoint",
                RuntimeWarning,
                stacklevel=2,
            )

    @override
    def within(self, operation: Callable[[Gloo], T], instead: T) -> T:
        if self.manager.errored() is not None or self.joins_a_retry:
            return instead
        try:
            return operation(self.group)
        except Exception as error:
            self.manager.report_error(error)
            self.group.abort()
            return instead

    @override
    def commit(self) -> bool:
        error = self.manager.errored()
        if error is None and self.manager.should_commit():
            self._aborts_in_a_row = 0
            self._agreed, self._last = 0, None
            return True
        self.aborts += 1
        self._aborts_in_a_row += 1
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        if self._aborts_in_a_row > self.limits.max_aborts:
            raise RuntimeError(
                f"step {self.step} has failed {self._aborts_in_a_row} times in a row"
                + (f", the last time by: {error.original_exception}" if error else "")
                + ". Is `collective_timeout` shorter than a step takes?"
            )
        if error is not None:
            self.manager.fail(error.original_exception)
        return False

    @override
    def last_part(self) -> None:
        self.joins_a_retry = False

    @override
    def again(self) -> bool:
        before = self.step
        self._rendezvous(RETRY, newcomers=False)
        caught_up = self.step > before
        if caught_up:
            self._aborts_in_a_row = 0
        return caught_up

    @override
    def settle(self, operation: Callable[[Gloo], T], alone: T) -> T:
        self.in_attempt = False
        result = self.agree(operation, alone)
        _launched.note_progress(step=self.step)
        self._departure.note_step()
        if self._failed_at is not None:
            self.waited, self._failed_at = time.monotonic() - self._failed_at, None
        return result

    # Between steps.

    @override
    def agree(self, operation: Callable[[Gloo], T], alone: T) -> T:
        failures = 0
        while True:
            try:
                result = operation(self.group)
                break
            except Exception as error:
                failures += 1
                if failures > self.limits.max_aborts:
                    raise
                if self._failed_at is None:
                    self._failed_at = time.monotonic()
                self.manager.fail(error)
                try:
                    self._rendezvous(AGREEING, newcomers=False)
                except NoQuorumError:
                    if self.finishing:
                        return alone
                    raise
                if self._told is not None:
                    (result,) = self._told
                    break
        self._agreed += 1
        self._last = result
        return result

    # Rendezvous.

    def _rendezvous(self, where: int, newcomers: bool) -> list[Position]:
        """Wait for a quorum, and learn where everybody stands."""
        self._departure.end()
        for _ in range(MOST_RENDEZVOUS):
            positions = self._try(where, newcomers)
            if positions is not None:
                return positions
        raise RuntimeError(
            f"{MOST_RENDEZVOUS} quorums in a row came to nothing, the last time by: {self._failure}. Can the replicas "
            f"reach each other at their addresses (this one at {self.manager.group.host}), within `connect_timeout`?"
        )

    def _try(self, where: int, newcomers: bool) -> list[Position] | None:
        """One quorum. None if it came to nothing."""
        before = self.step
        self._told = None
        self._wait_for_quorum(newcomers and not self._turns_away)
        self._turns_away = False
        refused, self.handover.refused = self.handover.refused, False
        if refused:  # a stranger's state; the rendezvous tells it so
            self.manager.set_step(before)
        failure = self.manager.errored()
        if failure is not None:
            self._in_vain(failure.original_exception)
            return None
        if where != START and self.step > before + (where == RETRY):
            raise LeftBehindError(f"the others are at step {self.step}, this replica was at {before}; start anew")
        if self._veteran and not self.finishing and self._left_behind.is_alone(self.members, self.step):
            self._in_vain(RuntimeError("the lighthouse was started again, and no other replica has come to it yet"))
            time.sleep(0.2)
            return None
        caught_up = self.step > before
        if where == RETRY and caught_up:
            where, self._agreed, self._last = AGREEING, 0, None
        if self.group.generation == self._generation and self._veteran:
            # Nothing has happened, so all are where this one is.
            return [
                Position(i, self.step, self._agreed, where, True, False, False, 0, 0, self._run, 0)
                for i in self.group.members
            ]
        veteran = self._veteran and not (where == START and caught_up)  # else it slept, and comes in like a newcomer
        mine = Position(
            self.index,
            self.step,
            self._agreed,
            where,
            veteran,
            veteran and self.is_writer,
            not self._veteran and time.monotonic() - self._created < self.limits.start_grace,
            self.seed,
            self.layout(),
            self._run,
            self._departure.steps_to_stay() if where == START and veteran else 0,
        )
        try:
            with self.group.patient(self.limits.to_heal(self.size())):  # of somebody else, perhaps
                positions = [Position.of(row) for row in gather_rows(self.group, mine.row())]
            self.manager.withdraw_state()
            if self._has_strangers(positions):
                return None
            addresses = gather_texts(self.group, self.manager.address)
            self._tell(positions, mine)
        except (LeftBehindError, StrangerError):
            raise
        except RuntimeError as error:
            self._in_vain(error)
            return None
        writer = writer_of(positions)
        self.members = [position.index for position in positions]
        self.writer, self.seed = writer.index, writer.seed
        self._left_behind.remember(
            [a for position, a in zip(positions, addresses, strict=True) if position.index != self.index]
        )
        self._generation = self.group.generation
        self.manager.reset_failures()
        self.all_leave = all(position.stays != 0 for position in positions)
        self._departure.agree(self.step, 0 if self.all_leave else max(position.stays for position in positions))
        if self.all_leave:
            _launched.note_progress(left=True)
        elif self._departure.wanted and self._departure.agreed:
            _launched.note_progress(name="", left=True)
            self.manager.fall_silent()
        return positions

    def _has_strangers(self, positions: list[Position]) -> bool:
        """Whether some have to leave, after which those who stay have another rendezvous."""
        found = strangers(positions, self.count)
        if self.group.rank in found:
            raise StrangerError(f"replica {self.index} cannot take part: {found[self.group.rank]}")
        if found:
            self._turns_away = True
            whom = "; ".join(f"replica {positions[rank].index}: {why}" for rank, why in found.items())
            warnings.warn(f"turned away: {whom}", RuntimeWarning, stacklevel=2)
            self._in_vain(RuntimeError(f"turned away: {whom}"))
        return bool(found)

    def _in_vain(self, error: Exception) -> None:
        self._failure = error
        self.manager.fail(error)

    def _wait_for_quorum(self, newcomers: bool) -> None:
        began = time.monotonic()
        limit = 2 * self.limits.patience if self.finishing else self.limits.quorum_timeout
        self.manager.peer_state.note = f"{self.manager.quorum_id} {','.join(map(str, self.members))}"
        with self._left_behind.watching(not newcomers):
            while True:
                waited = time.monotonic() - began
                try:
                    self.manager.ask_for_quorum(newcomers, max(0.1, limit - waited))
                    return
                except StrangerError:
                    raise
                except Exception as error:
                    if self._left_behind.found:
                        raise LeftBehindError(
                            f"the others went on without replica {self.index} after step {self.step}, or have all "
                            "ended; start anew"
                        ) from error
                    waited = time.monotonic() - began
                    if waited > limit - 1:
                        raise NoQuorumError(
                            f"no quorum within {waited:.0f} s, at step {self.step} of replica {self.index}: fewer than "
                            f"min_replicas={self.limits.min_replicas} are there, or the lighthouse is gone ({error})"
                        ) from error
                    time.sleep(0.1)

    def _tell(self, positions: list[Position], mine: Position) -> None:
        """Who has missed the end of an operation gets its result from one that has not; all take part."""
        ahead = max((position.agreed for position in positions if position.veteran), default=0)
        if not any(position.where == AGREEING and position.agreed < ahead for position in positions):
            return
        teller = next(rank for rank, position in enumerate(positions) if position.veteran and position.agreed == ahead)
        result = send_object(self.group, self._last, teller)
        if mine.where == AGREEING and mine.agreed < ahead:
            if ahead > mine.agreed + 1:
                raise LeftBehindError(f"the others are {ahead - mine.agreed} operations ahead; start anew")
            self._told = (result,)

    @override
    def leave(self, status: int = 0) -> None:
        self._departure.wanted, self._departure.status = True, status

    @override
    def depart(self) -> None:
        raise SystemExit(self._departure.status)

    @override
    def close(self) -> None:
        _launched.note_progress(name="")
        self.group.abort()
        self.manager.shutdown(wait=False)
