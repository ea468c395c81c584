"""The processes of one replica. Each has a device; the first alone speaks with the other replicas."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ReduceOp
from typing_extensions import override

from lightning_eff.strategies.fault_tolerant.membership import Membership
from lightning_eff.strategies.fault_tolerant.operations import (
    gather_objects,
    gather_tensors,
    pack,
    send_bytes,
    spread,
    summed,
    unpack,
)
from lightning_eff.strategies.fault_tolerant.state_parts import StateParts, bytes_of

if TYPE_CHECKING:  # torchft is an extra
    from lightning_eff.strategies.fault_tolerant.manager import QuorumManager
    from lightning_eff.strategies.fault_tolerant.process_group import Gloo

T = TypeVar("T")

_HOST = "127.0.0.1"  # the processes of a replica are on one machine
_START = timedelta(minutes=5)  # in which all of them must have come up
_FOREVER = timedelta(days=365)


class ReplicaGroup:
    """What the processes of this replica do among themselves.

    A process that is lost takes the replica with it: the others get an error in their next operation, and the elastic
    agent, or Lightning's launcher, ends them all. So nothing here is repeated.

    Args:
        rank: of this process in its replica.
        size: of the replica. With 1 there is nobody else, and every operation gives back what it gets.
        port: on loopback, of their rendezvous.
        patience: seconds for which the first process waits for another one. The others wait for the first without
            end: it may be waiting for other replicas.
    """

    def __init__(self, rank: int = 0, size: int = 1, port: int = 0, patience: float = 60.0) -> None:
        self.rank = rank
        self.size = size
        self._group: Gloo | None = None
        if size > 1:
            from lightning_eff.strategies.fault_tolerant.process_group import Gloo, store_on

            self._store = store_on(_HOST, port) if rank == 0 else None
            self._group = Gloo(_HOST, _START, timedelta(seconds=patience) if rank == 0 else _FOREVER)
            self._group.configure(f"{_HOST}:{port}/replica", "", rank, size)
            atexit.register(self._group.abort)  # gloo's threads do not outlive the interpreter

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks with other replicas."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """What the first process has: tensors and plain Python values, on the CPU."""
        if self._group is None:
            return value
        content = send_bytes(self._group, pack(value) if self.leads else None, 0)
        return value if self.leads else unpack(content)

    def share_state(self, parts: StateParts | None, header: bytes) -> Any:
        """A state of the first process, which has its parts; the header has been shared.

        Returns:
            In the other processes, the state.
        """
        if parts is None:
            return StateParts.read(header, self.spread_)
        for tensor in parts.tensors:
            self.spread_(bytes_of(tensor.cpu()))
        return None

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank."""
        return [value] if self._group is None else gather_objects(self._group, value)

    def stack(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape from each process, by rank, along a new first axis."""
        return tensor[None] if self._group is None else torch.stack(gather_tensors(self._group, tensor))

    def sum_(self, tensor: Tensor) -> None:
        """Sum a tensor over the processes, in place."""
        if self._group is not None:
            summed(self._group, tensor, ReduceOp.SUM)

    def spread_(self, tensor: Tensor) -> None:
        """Give the first process's values to all, in place."""
        if self._group is not None:
            spread(self._group, tensor, 0)


class GradientSums:
    """Sums of gradients over all processes of all replicas; failures of other replicas are noted, and not raised.

    Args:
        group: of this replica.
        manager: torchft's, in the process that leads.
    """

    def __init__(self, group: ReplicaGroup, manager: QuorumManager | None) -> None:
        self.group = group
        self.manager = manager
        self._tensors: list[Tensor] = []
        self._failed = False

    def begin(self) -> None:
        """A backward pass begins."""
        self._tensors = []
        self._failed = False

    def all_reduce(self, tensor: Tensor) -> Any:
        """Start a sum, in place; to be awaited by `finish`."""
        self.group.sum_(tensor)
        self._tensors.append(tensor)
        return None if self.manager is None else self.manager.all_reduce(tensor)

    def finish(self, works: list[Any]) -> None:
        """Wait for what `all_reduce` has started."""
        if self.manager is not None:
            self.manager.finish(works)
            if self.manager.errored() is not None:
                self.manager.group.abort()
        works.clear()
        if self.group.size > 1:
            flag = torch.tensor([self.manager is not None and self.failed])
            self.group.spread_(flag)
            self._failed = bool(flag)
            for tensor in () if self._failed else self._tensors:
                self.group.spread_(tensor)
        self._tensors = []

    @property
    def failed(self) -> bool:
        """Whether the step is lost, as far as this process knows."""
        return self._failed if self.manager is None else self.manager.errored() is not None


class GroupMembership(Membership):
    """The membership of a replica of several processes, in each of them.

    All of them call the same in the same order. The first does it, and tells the others what came of it: the result,
    who takes part, the state that was taken from a peer, or how it failed.

    Args:
        group: of this replica.
        first: what speaks with the other replicas, in the first process; None in the others.
        index: of this replica.
        count: the largest number of replicas.
        state: the state of this process, as a peer would get it.
        load: takes the state that the first process has got from a peer; not called in that process.
    """

    def __init__(
        self,
        group: ReplicaGroup,
        first: Membership | None,
        index: int,
        count: int,
        state: Callable[[], dict[str, Any]],
        load: Callable[[dict[str, Any]], None],
    ) -> None:
        super().__init__(index, count, 0)
        self.group = group
        self.first = first
        self.healed: dict[str, Any] | None = None
        """What the first process has taken from a peer in this call."""
        self._state = state
        self._load = load
        self._step = 0
        self._leaves = -1  # the exit status, once this process is to leave

    @property
    @override
    def step(self) -> int:
        return self._step

    @override
    def start_at(self, step: int) -> None:
        self._together(lambda first: first.start_at(step))

    @override
    def begin(self) -> bool:
        met_before = self.joined
        leaves = int(self.group.stack(torch.tensor(self._leaves)).max())  # a signal may reach any of them

        def begin(first: Membership) -> bool:
            if leaves >= 0:
                first.leave(leaves)
            begins = first.begin()
            if not met_before and self.healed is None:
                self.healed = self._state()  # the processes may have begun with different weights
            return begins

        return self._together(begin)

    @override
    def within(self, operation: Callable[[Gloo], T], instead: T) -> T:
        return self._together(lambda first: first.within(operation, instead))

    @override
    def last_part(self) -> None:
        self.joins_a_retry = False  # each process knows by itself when it is
        if self.first is not None:
            self.first.last_part()

    @override
    def commit(self) -> bool:
        return self._together(lambda first: first.commit())

    @override
    def again(self) -> bool:
        return self._together(lambda first: first.again())

    @override
    def settle(self, operation: Callable[[Gloo], T], alone: T) -> T:
        return self._together(lambda first: first.settle(operation, alone))

    @override
    def agree(self, operation: Callable[[Gloo], T], alone: T) -> T:
        return self._together(lambda first: first.agree(operation, alone))

    @override
    def has_healed(self, state: dict[str, Any]) -> None:
        self.healed = state

    @override
    def goes_on(self, more: bool) -> None:
        super().goes_on(more)
        if self.first is not None:
            self.first.goes_on(more)

    @override
    def leave(self, status: int = 0) -> None:
        self._leaves = status

    @override
    def depart(self) -> None:
        self._together(lambda first: first.depart())

    @override
    def close(self) -> None:
        if self.first is not None:
            self.first.close()

    def _together(self, call: Callable[[Membership], T]) -> T:
        if self.first is None:
            return self._take(self.group.share(None))  # type: ignore[no-any-return]
        self.healed = None
        self.first.finishing = self.finishing
        try:
            result = call(self.first)
        except BaseException as error:
            status = (error.code or 0) if isinstance(error, SystemExit) else None
            self.group.share({"exit": status, "error": f"{type(error).__name__}: {error}"})
            raise
        shown = self.first.shown()
        self.first.take_waited()
        parts = None if self.healed is None else StateParts.of(self.healed)
        header = None if parts is None else torch.frombuffer(bytearray(parts.header), dtype=torch.uint8)
        self.group.share({"result": result, "shown": shown, "state": header})
        if parts is not None:
            self.group.share_state(parts, parts.header)
        self._see(shown)
        return result

    def _take(self, answer: dict[str, Any]) -> Any:
        if "error" in answer:
            if answer["exit"] is not None:
                raise SystemExit(answer["exit"])
            raise RuntimeError(f"the first process of this replica has failed: {answer['error']}")
        self._see(answer["shown"])
        if answer["state"] is not None:
            self._load(self.group.share_state(None, answer["state"].numpy().tobytes()))
        return answer["result"]

    def _see(self, shown: dict[str, Any]) -> None:
        waited = shown["waited"] or self.waited  # until it is logged
        for name, value in shown.items():
            setattr(self, "_step" if name == "step" else name, value)
        self.waited = waited
