"""Replicas as threads: torchft's lighthouse, manager and process groups by their rules alone, and faults by dice.

What a real run meets once in a thousand failures, an operation that ends well for one and not for another, is met here
on purpose in every combination. A collective in which members take part with different operations is an error at once:
gloo ends the process for it.
"""

from __future__ import annotations

import random
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from lightning_eff.strategies.fault_tolerant.limits import Limits

LIMIT = 20.0  # seconds after which something that waits is taken for a deadlock


class Dead(BaseException):
    """This replica was killed."""


class DeadlockError(AssertionError):
    """Somebody waited for too long."""


class World:
    """All that the replicas share, behind one lock."""

    def __init__(self, seed: int, deaths: float, glitches: float) -> None:
        self.dice = random.Random(seed)
        self.deaths, self.glitches = deaths, glitches
        self.changed = threading.Condition()
        self.alive: set[str] = set()
        self.silent: set[str] = set()
        """Those that live and send no heartbeats, so that the lighthouse has forgotten them."""
        self.waiting: dict[str, dict[str, Any]] = {}
        self.previous: list[str] = []
        self.quorum_id = 0
        self.quorums: dict[str, dict[str, Any]] = {}
        self.operations: dict[tuple[int, int], dict[str, Any]] = {}
        self.broken: dict[int, set[str]] = {}
        self.states: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.quiet = False
        self.finished = False

    def wait(self, condition: Any) -> None:
        if not self.changed.wait_for(lambda: self.error is not None or condition(), LIMIT):
            self.error = DeadlockError(f"waiting: {list(self.waiting)}, alive: {sorted(self.alive)}")
            self.changed.notify_all()
        if self.error is not None:
            raise self.error

    def chance(self, odds: float) -> bool:
        return not self.quiet and self.dice.random() < odds

    def form(self) -> None:
        """The lighthouse's rules: all former members, or all that live; no newcomers if anybody says so."""
        asking = [name for name in self.waiting if name in self.alive]
        if not asking:
            return
        candidates = sorted(asking)
        if any(self.waiting[name]["shrink"] for name in asking) and self.previous:
            candidates = [name for name in candidates if name in self.previous]
        known = [name for name in self.previous if name not in self.silent]
        complete = all(name in asking for name in known) if known else False
        if not complete and set(asking) != self.alive - self.silent:
            return
        if not candidates:
            return
        if candidates != self.previous or any(self.waiting[name]["failures"] for name in candidates):
            self.quorum_id += 1
        self.previous = candidates
        steps = {name: self.waiting[name]["step"] for name in candidates}
        ahead = max(steps.values())
        source = next(name for name in candidates if steps[name] == ahead)
        state = self.states[source]() if min(steps.values()) < ahead or ahead == 0 else None
        for name in candidates:
            del self.waiting[name]
            heals = steps[name] < ahead or (ahead == 0 and name != source)
            self.quorums[name] = {
                "id": self.quorum_id,
                "members": candidates,
                "step": ahead,
                "state": state if heals else None,
            }
        self.changed.notify_all()

    def kill(self, name: str) -> None:
        self.alive.discard(name)
        self.waiting.pop(name, None)
        self.form()
        self.changed.notify_all()


class Group:
    """A process group whose operations need all members, each with the same operation."""

    host = "nowhere"

    def __init__(self, world: World, name: str) -> None:
        self.of, self.name = world, name
        self.generation: int | None = None
        self.names: list[str] = []
        self.count = 0

    @property
    def world(self) -> int:
        return len(self.names)

    @property
    def rank(self) -> int:
        return self.names.index(self.name)

    @property
    def members(self) -> list[int]:
        return [int(name.split(":")[0]) for name in self.names]

    @contextmanager
    def patient(self, seconds: float) -> Any:
        yield

    def abort(self) -> None:
        with self.of.changed:
            if self.generation is not None:
                self.of.broken.setdefault(self.generation, set()).add(self.name)
                self.of.changed.notify_all()
            self.generation = None

    def _exchange(self, kind: str, value: torch.Tensor) -> list[torch.Tensor]:
        world = self.of
        with world.changed:
            if self.generation is None:
                raise RuntimeError("closed")
            if world.chance(world.deaths):
                raise Dead
            broken = world.broken.setdefault(self.generation, set())
            operation = world.operations.setdefault((self.generation, self.count), {"kind": kind, "values": {}})
            self.count += 1
            if operation["kind"] != kind:
                world.error = AssertionError(f"{self.name} does {kind}, others do {operation['kind']}")
                world.changed.notify_all()
                raise world.error

            def gone() -> bool:
                return bool(broken) or any(name not in world.alive for name in self.names)

            if gone():
                raise RuntimeError("a peer has gone")
            operation["values"][self.name] = value.clone()
            world.changed.notify_all()
            world.wait(lambda: len(operation["values"]) == len(self.names) or gone())
            if len(operation["values"]) < len(self.names):
                raise RuntimeError("a peer has gone")
            values = [operation["values"][name] for name in self.names]
            if world.chance(world.glitches):
                raise RuntimeError("a glitch")
            return values

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> Any:
        values = self._exchange(f"sum of {tuple(tensors[0].shape)}", tensors[0])
        tensors[0].copy_(torch.stack(values).sum(0))
        return SimpleNamespace(wait=lambda: None)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], options: Any) -> Any:
        for output, value in zip(
            outputs[0], self._exchange(f"gather {tuple(inputs[0].shape)}", inputs[0]), strict=True
        ):
            output.copy_(value)
        return SimpleNamespace(wait=lambda: None)

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> Any:
        values = self._exchange(f"broadcast {tensors[0].dtype}", tensors[0])
        tensors[0].copy_(values[options.rootRank])
        return SimpleNamespace(wait=lambda: None)


class Manager:
    """As much of `QuorumManager` as `Replicas` uses."""

    def __init__(self, world: World, name: str, state: Any, load: Any) -> None:
        self.world, self.name, self.load = world, name, load
        self.group = Group(world, name)
        self.peer_state = SimpleNamespace(note="")
        self.address = name
        self.quorum_id = -1
        self.quorum_names: list[str] = []
        self.missed_quorums = 0
        self.step = self.failures = 0
        self.failure: Exception | None = None
        with world.changed:
            world.alive.add(name)
            world.states[name] = state
            world.changed.notify_all()

    def current_step(self) -> int:
        return self.step

    def ask_for_quorum(self, newcomers: bool, timeout: float) -> None:
        world = self.world
        with world.changed:
            if world.chance(world.deaths):
                raise Dead
            self.failure = None
            world.waiting[self.name] = {"shrink": not newcomers, "step": self.step, "failures": self.failures}
            world.form()
            world.wait(lambda: self.name in world.quorums)
            quorum = world.quorums.pop(self.name)
        if self.quorum_id >= 0:
            self.missed_quorums += max(0, quorum["id"] - self.quorum_id - 1)
        self.quorum_names = quorum["members"]
        if quorum["id"] != self.quorum_id or self.group.generation is None:
            self.quorum_id = quorum["id"]
            self.group.generation, self.group.names, self.group.count = quorum["id"], quorum["members"], 0
        if quorum["state"] is not None:
            if world.chance(world.glitches):
                self.failure = RuntimeError("healing failed")
                return
            self.load(quorum["state"])
            self.step = quorum["step"]

    def errored(self) -> Any:
        return None if self.failure is None else SimpleNamespace(original_exception=self.failure)

    def report_error(self, error: Exception) -> None:
        self.failure = error

    def should_commit(self) -> bool:
        if self.failure is None:
            self.step += 1
            self.failures = 0
            return True
        self.failures += 1
        return False

    def fail(self, error: Exception) -> None:
        self.report_error(error)
        self.group.abort()
        self.should_commit()

    def reset_failures(self) -> None:
        self.failures = self.missed_quorums = 0

    def withdraw_state(self) -> None:
        """It was copied."""

    def set_step(self, step: int) -> None:
        self.step = step

    def ask_for_new_connections(self) -> None:
        self.failures = 1

    def fall_silent(self) -> None:
        with self.world.changed:
            self.world.silent.add(self.name)

    def break_off(self) -> None:
        raise AssertionError("nobody is left behind here")


LIMITS = Limits(
    heartbeat_timeout=60.0, quorum_timeout=60.0, heal_timeout=60.0, start_grace=0.05, max_aborts=1000, min_replicas=1
)


def total(group: Any, value: float, size: int) -> float:
    """The sum over the replicas, by an operation that is told from others by its size."""
    tensor = torch.full((size,), value)
    group.allreduce([tensor], None).wait()
    return float(tensor[0])
