"""Notices in a thread of its own that a run does not go on, and says with the other ranks' threads who holds it up."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lightning_eff.callbacks.run_health import stacks
from lightning_eff.callbacks.run_health.connections import Connections
from lightning_eff.callbacks.run_health.last_place import LastPlace
from lightning_eff.callbacks.run_health.limits import Kind, Limits
from lightning_eff.callbacks.run_health.phases import Phases
from lightning_eff.callbacks.run_health.verdict import Standing, Verdict, judge

_LOOK = 0.5  # seconds between two looks at the main thread: waking up is most of what this thread costs
_LOOKS_A_LIMIT = 12  # at least
_LOOK_AGAIN = 0.1  # while it is judged who hangs
_BEAT = 1.0  # seconds between two messages to the others; longer with very many
_BEATS_A_LIMIT = 4  # at least: one that was heard of in half of it lives
_BEATS_A_SECOND = 100  # that one rank sends, and receives, at most
_ANSWERS = 0.7  # seconds that the others have to say where they stand
_ASKS = 4  # times that those who live are asked: on a busy machine an answer may take its time
_TO_WRITE = 2.0  # seconds that the stacks have to reach the disk before the process ends
_TO_SPEAK = 2.0  # seconds that the one who speaks for all has, before another one does and ends
_ASLEEP = 1.5  # a look that comes so late: this process was stopped itself


class Watchdog:
    """A thread that looks at the main thread of its rank, and talks to those of the other ranks.

    Args:
        phases: the clock of the main thread.
        connections: to the others; closed at the end.
        limits: how long there may be no sign of life.
        folder: for the stacks.
        abort: exit status with which the process is ended when a run hangs; None only says so.
        replicas: whether the strategy has a limit of its own for waiting for the others (``ddp_ft``): then this process
            is not ended while it waits, only where it hangs itself, and so leaves the quorum.
    """

    def __init__(
        self,
        phases: Phases,
        connections: Connections,
        limits: Limits,
        folder: Path,
        abort: int | None,
        replicas: bool = False,
    ) -> None:
        self.phases = phases
        self.connections = connections
        self.limits = limits
        self.folder = folder
        self.abort = abort
        self.replicas = replicas
        self.step = 0
        """The ``global_step``, set by the main thread."""
        self.kind: Kind = "start"
        """What the loops are at, set by the main thread; validation and saving it sees for itself."""
        self.verdicts: list[Verdict] = []
        self._place = LastPlace(phases)
        self._heard: dict[int, tuple[float, dict[str, Any]]] = {}  # rank -> when, and its last message
        self._answers: dict[int, dict[str, Any]] = {}
        self._left: dict[int, str] = {}  # ranks that have ended their run, and why
        self._judge_at: float | None = None
        self._told = False  # whether the report of this judgement has been given, by whichever rank
        self._asks = 0  # how often the others have been asked
        self._asking = False  # whether it is this rank that has found the hang
        self._asked_at = 0.0  # the main thread's last sign of life then
        self._held: tuple[float, Kind] | None = None  # the main thread's last sign of life in a hang that was judged
        self._awake = self._looked = time.perf_counter()
        self._writer: threading.Thread | None = None
        self._over = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="run-health-watchdog")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def end(self, why: str, failed: bool = False) -> None:
        """No more; the others are told that this rank has left the run, and why.

        After a failure a judgement that is under way is given first: with ``abort`` one of the others may have given
        its own and ended, which is an error in the collective that this rank stood in.
        """
        if not self._over.is_set():
            self._failed = failed
            self._over.set()
            self._thread.join()
            self.connections.send({"kind": "left", "why": why})
            self.connections.close()
            self._place.close()

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        ranks = len(self.connections.peers)
        look = min(_LOOK, self.limits.seconds / _LOOKS_A_LIMIT)
        every = max(min(_BEAT, self.limits.seconds / _BEATS_A_LIMIT), ranks / _BEATS_A_SECOND)
        beat_at = 0.0
        while not self._over.is_set():
            pause = look if self._judge_at is None else min(look, _LOOK_AGAIN)
            message = self.connections.receive(pause)
            if ranks == 1:
                self._over.wait(pause)
            now = time.perf_counter()
            if message is not None:
                self._hear(message, now)
            if now >= beat_at:
                self.connections.send(self._beat())
                beat_at = now + every
            if message is None or now - self._looked > pause:
                self._look(now)
        if self._failed and self._judge_at is not None:
            self._judge_with_what_is_there()

    def _hear(self, message: dict[str, Any], now: float) -> None:
        rank, kind = message["from"], message["kind"]
        if kind == "left":
            self._left[rank] = message["why"]
            return
        if kind == "told":
            self._told = True
            return
        if kind == "over":
            if not self._asking:
                self._judge_at = None
            return
        # On one machine the ranks have one clock: what lay in the queue for long was not said just now.
        self._heard[rank] = message["at"] if self._is_here(rank) else now, message
        if kind == "ask" and self._judge_at is None:
            self._stand(now, "answer")
        elif kind == "ask":
            self._say_again(now, "answer")
        if kind in ("ask", "answer") and self._judge_at is not None:
            self._answers[rank] = {**message, "heard": now}

    def _look(self, now: float) -> None:
        if now - self._looked > _ASLEEP:
            self._awake = now
        self._looked = now
        last, kind = self.phases.since, self._kind()
        if self._held is not None and last != self._held[0]:
            self._goes_on(now)
        if self._judge_at is not None:
            if self._asking and self._asked_at != last:
                self.connections.send({"kind": "over"})
                self._judge_at, self._asking = None, False
            elif self._knows_all(now) or (now >= self._judge_at and not self._waits_longer(now)):
                self._decide(now)
        elif self._held is None and self._hangs(now - max(last, self._awake), kind):
            self._asking, self._asked_at = True, last
            self._stand(now, "ask")

    def _hangs(self, stalled: float, kind: Kind) -> bool:
        if stalled <= self.limits.seconds or stalled <= self.limits.of(kind):  # to know the second takes longer
            return False
        stack = stacks.main_stack()
        if self.replicas and stacks.waits_for_replicas(stack):
            return False  # for another replica, which looks after itself
        patient = stacks.is_compiling(stack) or stacks.waits_for_a_disk(stack)
        return stalled > self.limits.first_seconds or not patient

    def _kind(self) -> Kind:
        if self.phases.saving:
            return "save"
        if self.phases.validating:
            return "validation"
        return self.kind

    def _beat(self) -> dict[str, Any]:
        return {
            "kind": "beat",
            "at": time.perf_counter(),
            "step": self.step,
            "phase": self.phases.place,
            "names": self.phases.names,
            "cell": self._place.descriptor,
        }

    def _stand(self, now: float, kind: str) -> None:
        """Say where this rank stands, to the others and in a file."""
        stack = stacks.main_stack()
        message = self._beat() | {
            "kind": kind,
            "since": max(self.phases.since, self._awake),
            "stalled": now - max(self.phases.since, self._awake),
            "passed": self.phases.passed,
            "groups": _collectives(),
            "collective": stacks.collective_in(stack) or _reduction(self.phases),
            "stack": stacks.innermost(stack),
        }
        self.connections.send(message)
        self._answers = {self.connections.rank: {**message, "heard": now}}
        self._asks, self._told = 1, False
        self._judge_at = now + _ANSWERS + (0.0 if kind == "ask" else 0.1)
        head = f"rank {self.connections.rank}, step {self.step}, phase {self.phases.place!r}, {time.ctime()}"
        # A disk that hangs may be what the run hangs in: it must not hold up the report.
        what = (self.folder, self.connections.rank, head)
        self._writer = threading.Thread(target=stacks.write_stacks, args=what, daemon=True, name="run-health-stacks")
        self._writer.start()

    def _say_again(self, now: float, kind: str) -> None:
        mine = self._answers[self.connections.rank]
        self.connections.send({**mine, "kind": kind, "at": now, "stalled": now - mine["since"]})

    def _knows_all(self, now: float) -> bool:
        """Whether nobody is left who could still answer."""
        missing = [rank for rank in range(len(self.connections.peers)) if rank not in self._answers]
        limit = self.limits.of(self._kind())
        return all(
            rank in self._left
            or (self._is_here(rank) and self._state(rank) != stacks.LIVES and self._silence(rank, now, limit))
            for rank in missing
        )

    def _waits_longer(self, now: float) -> bool:
        """Ask again, if one that was heard of lately has not answered."""
        limit = self.limits.of(self._kind())
        late = [rank for rank in self._heard if rank not in self._answers and not self._silence(rank, now, limit)]
        if not late or self._asks == _ASKS:
            return False
        self._asks += 1
        self._judge_at = now + _ANSWERS
        self._say_again(now, "ask")
        return True

    def _judge_with_what_is_there(self) -> None:
        while (message := self.connections.receive(0.0)) is not None:
            self._hear(message, time.perf_counter())
        if self._judge_at is not None:
            self._decide(time.perf_counter())

    def _decide(self, now: float) -> None:
        limit = self.limits.of(self._kind())
        verdict = judge([self._standing(rank, now, limit) for rank in range(len(self.connections.peers))], limit)
        speaker = min(self._answers)
        if now - self.phases.since > limit / 2:
            self._held = (self.phases.since, self._kind())
        self._judge_at, self._asking, self._answers = None, False, {}
        self.verdicts.append(verdict)
        waits = self.replicas and stacks.waits_for_replicas(stacks.main_stack())
        status = None if waits else self.abort
        # Whoever ends before the report is out may take the one with him who was to give it: an error in a collective.
        if self.connections.rank == speaker or (status is not None and not self._is_told()):
            where = f"  the stacks of all ranks that answer are in {self.folder}"
            _say(f"{verdict.text}\n{where}")
        if status is not None:
            self.connections.send({"kind": "told"})
            _say(f"RunHealth: rank {self.connections.rank} ends with exit status {status}\n\n{stacks.all_stacks()}")
            if self._writer is not None:
                self._writer.join(_TO_WRITE)
            os._exit(status)

    def _is_told(self) -> bool:
        """Wait for the one who speaks."""
        end = time.perf_counter() + _TO_SPEAK
        while not self._told and time.perf_counter() < end:
            message = self.connections.receive(_LOOK_AGAIN)
            if message is not None and message["kind"] == "told":
                self._told = True
        return self._told

    def _standing(self, rank: int, now: float, limit: float) -> Standing:
        name = self.connections.peers[rank].name
        answer = self._answers.get(rank)
        if answer is None:
            return Standing(rank, name, *self._last(rank), 0.0, silent=self._silence(rank, now, limit))
        # On one machine the ranks have one clock: an answer that came late on a busy one does not blur who has
        # stood there longest.
        stalled = now - answer["since"] if self._is_here(rank) else answer["stalled"] + now - answer["heard"]
        where = (answer["groups"], answer["collective"], answer["stack"])
        return Standing(rank, name, answer["step"], answer["phase"], stalled, *where, passed=answer["passed"])

    def _silence(self, rank: int, now: float, limit: float) -> str | None:
        """Why a rank does not answer, in words; None for one that may yet, or of which nothing is known."""
        if rank in self._left:
            return f"has left the run: {self._left[rank]}"
        state = self._state(rank)
        if rank not in self._heard:  # it may be behind a firewall
            return state if self._is_here(rank) and state != stacks.LIVES else None
        quiet = now - self._heard[rank][0]
        return None if quiet < limit / 2 else f"has been silent for {quiet:.1f} s: {state}"

    def _is_here(self, rank: int) -> bool:
        """Whether a rank is on this machine."""
        peers = self.connections.peers
        return peers[rank].machine == peers[self.connections.rank].machine

    def _state(self, rank: int) -> str:
        here = self._is_here(rank)
        return stacks.state_of(self.connections.peers[rank].pid) if here else "nothing is known of its process"

    def _last(self, rank: int) -> tuple[int, str]:
        """Step and phase in which a rank that does not answer was last."""
        if rank not in self._heard:
            return 0, "unknown"
        message = self._heard[rank][1]
        if self._is_here(rank):
            seen = LastPlace.of(self.connections.peers[rank].pid, message["cell"])
            if seen is not None:
                step, phase = seen
                return step, message["names"][phase] if phase < len(message["names"]) else "callbacks"
        return message["step"], message["phase"]

    def _goes_on(self, now: float) -> None:
        assert self._held is not None
        (last, kind), self._held = self._held, None
        self.limits.was_wrong(kind, now - last)
        _say(f"RunHealth: rank {self.connections.rank} goes on, after {now - last:.1f} s in one place")


def _reduction(phases: Phases) -> str | None:
    return "the reduction of gradients" if phases.place == "waiting" else None


def _collectives() -> dict[str, int]:
    """Name of each process group of this rank -> how many collectives it has entered there."""
    found: dict[str, int] = {}
    if dist.is_available() and dist.is_initialized():
        for group, name in list(dist.distributed_c10d._world.pg_names.items()):
            with suppress(RuntimeError, AttributeError):  # a backend that does not count
                found[name] = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return found


def _say(text: str) -> None:
    """By the thread that is not stuck."""
    print(text, file=sys.stderr, flush=True)
