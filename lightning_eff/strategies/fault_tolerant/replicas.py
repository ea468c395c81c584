"""Replicas that train in step, through losses and returns: who is there, who writes, and what all agree on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from typing_extensions import override

from lightning_eff.strategies.fault_tolerant.limits import Limits
from lightning_eff.strategies.fault_tolerant.manager import QuorumManager, note_of
from lightning_eff.strategies.fault_tolerant.membership import Membership
from lightning_eff.strategies.fault_tolerant.operations import gather_rows, gather_texts, send_object
from lightning_eff.strategies.fault_tolerant.process_group import Gloo
from lightning_eff.strategies.fault_tolerant.rendezvous import (
    AGREEING,
    RETRY,
    START,
    LeftBehindError,
    NoQuorumError,
    Place,
)
from lightning_eff.strategies.fault_tolerant.start import host_and_port, leave_if_over, meet_lighthouse

T = TypeVar("T")

MOST_MEETINGS = 50  # that come to nothing, one after the other


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
    """

    def __init__(
        self,
        index: int,
        count: int,
        manager: QuorumManager,
        limits: Limits,
        seed: int,
        layout: Callable[[], int],
    ) -> None:
        super().__init__(index, count, seed)
        self.manager = manager
        self.limits = limits
        self.layout = layout
        self._told: tuple[Any] | None = None
        self._left_behind = False
        self._failure: Exception | None = None
        self._agreed = 0
        self._last: Any = None
        self._generation: int | None = None
        self._peers: list[str] = []
        self._veteran = False
        self._created = time.monotonic()
        self._failed_at: float | None = None
        self._aborts_in_a_row = 0

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
        while True:
            before = self.step
            places = self._meet(START, newcomers=True)
            if any(place.where == AGREEING for place in places) and self._veteran:
                continue  # they finish what they do, and come here
            self.joins_a_retry = any(place.where == RETRY for place in places)
            if any(place.where != START for place in places) and (not self._veteran or self.step > before):
                raise LeftBehindError("the others are within a step, where nobody can come in; start anew")
            if all(place.waits for place in places) and len(places) < self.count:
                leave_if_over()
                time.sleep(0.1)
                continue
            # A step that has begun is finished by those who are left, however few.
            if len(places) < self.limits.min_replicas and not self.joins_a_retry:
                time.sleep(0.5)
                continue
            break
        self._veteran = True
        self.in_attempt = True
        begins = not any(place.veteran for place in places)
        if begins:
            leave_if_over()
        return begins

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
        self._meet(RETRY, newcomers=False)
        caught_up = self.step > before
        if caught_up:
            self._aborts_in_a_row = 0
        return caught_up

    @override
    def settle(self, operation: Callable[[Gloo], T], alone: T) -> T:
        self.in_attempt = False
        result = self.agree(operation, alone)
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
                    self._meet(AGREEING, newcomers=False)
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

    # Meeting.

    def _meet(self, where: int, newcomers: bool) -> list[Place]:
        """Wait for a quorum, and learn where everybody stands."""
        for _ in range(MOST_MEETINGS):
            places = self._try_to_meet(where, newcomers)
            if places is not None:
                return places
        raise RuntimeError(
            f"{MOST_MEETINGS} quorums in a row came to nothing, the last time by: {self._failure}. Can the replicas "
            f"reach each other at their addresses (this one at {self.manager.group.host}), within `connect_timeout`?"
        )

    def _try_to_meet(self, where: int, newcomers: bool) -> list[Place] | None:
        """One quorum. None if it came to nothing."""
        before = self.step
        self._told = None
        self._wait_for_quorum(newcomers)
        failure = self.manager.errored()
        if failure is not None:
            self._in_vain(failure.original_exception)
            return None
        if where != START and self.step > before + (where == RETRY):
            raise LeftBehindError(f"the others are at step {self.step}, this replica was at {before}; start anew")
        if where == RETRY and self.step > before:
            where, self._agreed, self._last = AGREEING, 0, None
        if self.group.generation == self._generation and self._veteran:
            # Nothing has happened, so all are where this one is.
            return [Place(i, self.step, self._agreed, where, True, False, False, 0, 0) for i in self.group.members]
        mine = Place(
            self.index,
            self.step,
            self._agreed,
            where,
            self._veteran,
            self._veteran and self.is_writer,
            not self._veteran and time.monotonic() - self._created < self.limits.start_grace,
            self.seed,
            self.layout(),
        )
        try:
            with self.group.patient(self.limits.heal_timeout):  # of somebody else, perhaps
                places = [Place.of(row) for row in gather_rows(self.group, mine.row())]
            addresses = gather_texts(self.group, self.manager.address)
            self._tell(places, mine)
        except LeftBehindError:
            raise
        except RuntimeError as error:
            self._in_vain(error)
            return None
        self._settle_roles(places)
        self._peers = [address for place, address in zip(places, addresses, strict=True) if place.index != self.index]
        self._generation = self.group.generation
        self.manager.reset_failures()
        return places

    def _in_vain(self, error: Exception) -> None:
        self._failure = error
        self.manager.fail(error)

    def _wait_for_quorum(self, newcomers: bool) -> None:
        began = time.monotonic()
        limit = 2 * self.limits.patience if self.finishing else self.limits.quorum_timeout
        self.manager.peer_state.note = f"{self.manager.quorum_id} {','.join(map(str, self.members))}"
        with self._watching(not newcomers):
            while True:
                waited = time.monotonic() - began
                try:
                    self.manager.ask_for_quorum(newcomers, max(0.1, limit - waited))
                    return
                except Exception as error:
                    if self._left_behind:
                        raise LeftBehindError(
                            f"the others went on without replica {self.index} after step {self.step}; start anew"
                        ) from error
                    waited = time.monotonic() - began
                    if waited > limit - 1:
                        raise NoQuorumError(
                            f"no quorum within {waited:.0f} s, at step {self.step} of replica {self.index}: fewer than "
                            f"min_replicas={self.limits.min_replicas} are there, or the lighthouse is gone ({error})"
                        ) from error
                    time.sleep(0.1)

    @contextmanager
    def _watching(self, wanted: bool) -> Iterator[None]:
        """While a replica waits within a step or an operation, see to it that the others have not gone on."""
        if not wanted or not self._peers:
            yield
            return
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(over,), daemon=True, name="left-behind")
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(self.limits.patience):
            if self._was_left_behind():
                self._left_behind = True
                self.manager.break_off()
                return

    def _tell(self, places: list[Place], mine: Place) -> None:
        """Who has missed the end of an operation gets its result from one that has not; all take part."""
        ahead = max((place.agreed for place in places if place.veteran), default=0)
        if not any(place.where == AGREEING and place.agreed < ahead for place in places):
            return
        teller = next(rank for rank, place in enumerate(places) if place.veteran and place.agreed == ahead)
        result = send_object(self.group, self._last, teller)
        if mine.where == AGREEING and mine.agreed < ahead:
            if ahead > mine.agreed + 1:
                raise LeftBehindError(f"the others are {ahead - mine.agreed} operations ahead; start anew")
            self._told = (result,)

    def _was_left_behind(self) -> bool:
        """Whether a former member is in a later quorum, and this replica is not.

        Then it gets no quorum any more where it stands: no newcomers are let in there.
        """
        for address in self._peers:
            note = note_of(address, 2.0)
            if note is not None:
                quorum, _, members = note.partition(" ")
                if int(quorum) > self.manager.quorum_id and str(self.index) not in members.split(","):
                    return True
        return False

    def _settle_roles(self, places: list[Place]) -> None:
        indices = [place.index for place in places]
        if len(set(indices)) < len(indices):
            raise RuntimeError(f"several replicas have the same index: {indices}. Is REPLICA_GROUP_ID set for each?")
        if max(indices) >= self.count:
            raise RuntimeError(f"replicas {indices} are too many for max_replicas={self.count}")
        # Whoever writes goes on as long as it lives: files change hands as rarely as possible.
        first = next((p for p in places if p.writer), None) or next((p for p in places if p.veteran), places[0])
        mine = next(place for place in places if place.index == self.index)
        if not self._veteran and mine.layout != first.layout:
            raise RuntimeError(
                "this replica's model has other parameters in training, or of other shapes, than the run that it comes "
                "into, also after it has taken that run's state: is it the same script with the same arguments?"
            )
        self.members, self.writer, self.seed = indices, first.index, first.seed

    @override
    def leave(self) -> None:
        self.group.abort()
        self.manager.shutdown(wait=False)


def connected(
    index: int,
    count: int,
    limits: Limits,
    host: str,
    lighthouse: str,
    state: Callable[[], dict[str, Any]],
    load: Callable[[dict[str, Any]], None],
    layout: Callable[[], int],
) -> Replicas:
    """A replica that can meet the others.

    Args:
        index: of this replica.
        count: the largest number of replicas.
        limits: how long it waits, and how often it tries.
        host: where it listens, and under which the peers reach it.
        lighthouse: its address.
        state: called when a peer needs the state of this replica.
        load: called with a peer's state.
        layout: see `Replicas`.

    Raises:
        ConnectionError: the lighthouse cannot be reached.
    """
    address, port = host_and_port(lighthouse)
    meet_lighthouse(address, port, limits.connect_timeout)
    manager = QuorumManager(
        name=f"replica_{index:05d}",
        host=host,
        lighthouse=f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}",
        connect_timeout=timedelta(seconds=limits.connect_timeout),
        timeout=timedelta(seconds=limits.collective_timeout),
        quorum_timeout=timedelta(seconds=limits.quorum_timeout),
        quorum_retries=limits.quorum_retries,
        state=state,
        load=load,
    )
    seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) % 2**62
    return Replicas(index, count, manager, limits, seed, layout)
