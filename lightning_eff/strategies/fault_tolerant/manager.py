"""torchft's manager, as the fault-tolerant strategy uses it: every listener on one address."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import torch
import torchft.manager
from torch._C._distributed_c10d import AllreduceOptions
from torch.distributed import ReduceOp
from torchft.coordination import ManagerClient
from torchft.manager import REPLICA_ID_KEY, Manager

from lightning_eff.strategies.fault_tolerant.process_group import Gloo, store_on
from lightning_eff.strategies.fault_tolerant.transport import PeerState


def _only_when_asked(record: logging.LogRecord) -> bool:
    """torchft writes a traceback of each error that is handled here, and a warning at each quorum."""
    return logging.getLogger(record.name).isEnabledFor(logging.INFO)


logging.getLogger(torchft.manager.__name__).addFilter(_only_when_asked)


class QuorumManager(Manager):
    """torchft's manager with every listener on one address, and a state that is never unpickled.

    Quorums are synchronous: a replica that lags behind has the peer's state when `start_quorum` returns.

    Args:
        name: of this replica; ends with its index.
        host: where its store, its manager and its state listen, and under which the peers reach them.
        lighthouse: ``http://host:port``.
        connect_timeout: to connect to the lighthouse and to peers.
        timeout: of operations, see `Gloo`.
        quorum_timeout: how long to wait for the others at the start of a step.
        quorum_retries: how often a lighthouse that is gone is asked again within that time.
        state: called when a peer needs the state of this replica.
        load: called with a peer's state.
    """

    def __init__(
        self,
        name: str,
        host: str,
        lighthouse: str,
        connect_timeout: timedelta,
        timeout: timedelta,
        quorum_timeout: timedelta,
        quorum_retries: int,
        state: Callable[[], dict[str, Any]],
        load: Callable[[dict[str, Any]], None],
    ) -> None:
        self.group = Gloo(host, connect_timeout, timeout)
        self.peer_state = PeerState(host, timeout.total_seconds() / 2)
        self._host_store = store_on(host)
        try:
            with _manager_servers_on(host):
                super().__init__(
                    pg=self.group,
                    load_state_dict=load,
                    state_dict=state,
                    min_replica_size=1,
                    use_async_quorum=False,
                    timeout=timeout,
                    quorum_timeout=quorum_timeout,
                    connect_timeout=connect_timeout,
                    rank=0,
                    world_size=1,
                    store_addr=host,
                    store_port=self._host_store.port,
                    lighthouse_addr=lighthouse,
                    replica_id=name,
                    hostname=host,
                    checkpoint_transport=self.peer_state,
                    quorum_retries=quorum_retries,
                )
        except BaseException:
            self.peer_state.shutdown()
            raise
        self._numbers = _Client(self._client)
        self._client: Any = self._numbers
        self._executor: Any = _Background()  # torchft's own keeps the process from ending while a quorum is asked for
        self._broken_off = False

    @property
    def _server(self) -> Any:
        """torchft's own, which the first process of each of its replicas has: here, every one."""
        return self._manager

    def fail(self, error: Exception) -> None:
        """Give up the step in flight; peers that wait for this replica notice at once."""
        self.report_error(error)
        self.group.abort()
        self.should_commit()

    def ask_for_quorum(self, newcomers: bool, timeout: float) -> None:
        """Wait for the others; afterwards the group connects those who came.

        Args:
            newcomers: whether replicas that were no members before may come in.
            timeout: seconds.

        Raises:
            TimeoutError, RuntimeError: no quorum, or no lighthouse.
        """
        try:
            self.start_quorum(shrink_only=not newcomers, timeout=timedelta(seconds=timeout))
        except BaseException:
            self._quorum_future = None  # else the next call raises the same again
            raise

    def wait_quorum(self) -> None:
        """As torchft has it, until `break_off`: where the lighthouse takes this replica for lost, it never answers."""
        answer = cast("Future[Any]", self._quorum_future)
        while not wait([answer], 0.2).done:
            if self._broken_off:
                raise ConnectionAbortedError("this replica asks for no quorum any more")
        answer.result()

    def withdraw_state(self) -> None:
        """All who had to catch up have this replica's state, which may change from now on."""
        self.peer_state.disallow_checkpoint()

    def ask_for_new_connections(self) -> None:
        """Let the next quorum make new connections, though nothing has failed: all have a rendezvous then."""
        self._commit_failures = 1

    def fall_silent(self) -> None:
        """Send no heartbeats and ask for no quorum any more; the connections that there are serve on."""
        self._numbers.fall_silent()
        self._server.shutdown()

    def break_off(self) -> None:
        """End a quorum that another thread waits for, and with it this replica's part in the run."""
        self._broken_off = True
        self._server.shutdown()

    def report_error(self, e: Exception) -> None:
        """The step is lost. The traceback is left out: its frames would keep the connections open."""
        super().report_error(e.with_traceback(None))

    def all_reduce(self, tensor: torch.Tensor) -> Any:
        """Start a sum over the replicas, in place; to be awaited by `finish`. Errors are reported, not raised.

        torchft's own `allreduce` gives its futures to a thread with timers, which keep a group's connections open
        after it was given up, so that the peers would notice only by their timeout.
        """
        if self.errored() is not None:
            return None
        options = AllreduceOptions()
        options.reduceOp = cast(Any, ReduceOp.SUM)
        try:
            return self.group.allreduce([tensor], options)
        except Exception as error:
            self.report_error(error)
            return None

    def finish(self, works: list[Any]) -> None:
        """Wait for what `all_reduce` has started."""
        try:
            while works:
                work = works.pop(0)
                if work is not None:
                    work.wait()
        except Exception as error:
            works.clear()
            self.report_error(error)

    def set_step(self, step: int) -> None:
        """The number of committed steps, after a checkpoint has been loaded."""
        self.load_state_dict({"step": step, "batches_committed": 0})

    def reset_failures(self) -> None:
        """The group works again: without this, the next quorum would make a new one once more."""
        self._commit_failures = 0
        self._numbers.count_anew()

    @property
    def name(self) -> str:
        """Under which the lighthouse knows this replica: as given, with what torchft adds."""
        return str(self._store.get(REPLICA_ID_KEY).decode())

    @property
    def quorum_names(self) -> list[str]:
        """The names of all in the last quorum that this replica was in."""
        return self._numbers.names

    @property
    def missed_quorums(self) -> int | None:
        """How many were formed without this replica since `reset_failures`, as the lighthouse counts.

        None where it was started again in between, and nobody knows.
        """
        return self._numbers.missed

    @property
    def quorum_id(self) -> int:
        """Of the last quorum that this replica was in."""
        return int(self._quorum_id)

    @property
    def address(self) -> str:
        """Of this replica's manager."""
        return str(self._server.address())


class _Client:
    """torchft's client, with quorums numbered so that a number comes once in a run.

    The lighthouse counts from 1, and a lighthouse that was started again does so again. torchft would take the new
    quorum for the old one of that number, or its members would find each other's old addresses in the store. (A replica
    that was in no quorum between two of the same number and members still takes one for the other: its peers do not
    reach it then within `connect_timeout`, and the next quorum has another number.)

    Args:
        client: of this replica's manager.
    """

    def __init__(self, client: Any) -> None:
        self._client = client
        self._last: tuple[int, list[str]] = (0, [])
        self._number = -1
        self.missed: int | None = 0
        self.silent = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def fall_silent(self) -> None:
        """The manager is about to be shut down."""
        self.silent = True

    def count_anew(self) -> None:
        """Quorums that are missed."""
        self.missed = 0

    @property
    def names(self) -> list[str]:
        """Of all in the last quorum."""
        return self._last[1]

    def should_commit(self, group_rank: int, step: int, should_commit: bool, timeout: timedelta) -> bool:
        if self.silent:  # the manager is gone; it only asks those of this replica, and there is one
            return should_commit
        return bool(self._client.should_commit(group_rank, step, should_commit, timeout=timeout))

    def _quorum(self, **arguments: Any) -> Any:
        answer = self._client._quorum(**arguments)
        found = {name: getattr(answer, name) for name in dir(answer) if not name.startswith("_")}
        quorum = (answer.quorum_id, list(answer.replica_ids))
        if quorum != self._last:
            # Each quorum with other members than the one before has the next number.
            skipped = answer.quorum_id - self._last[0] - 1
            if self._number < 0:
                self.missed = 0
            elif skipped < 0:
                self.missed = None
            elif self.missed is not None:
                self.missed += skipped
            self._last, self._number = quorum, (answer.max_step << 24) + answer.quorum_id
        return SimpleNamespace(**{**found, "quorum_id": self._number})


class _Background:
    """Runs each call in a thread of its own, which ends with the process at the latest."""

    def submit(self, function: Callable[..., Any], **arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(function(**arguments))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True, name="quorum").start()
        return future

    def shutdown(self, wait: bool = True) -> None:
        """There is nothing to end."""


def note_of(address: str, timeout: float) -> str | None:
    """What the replica with this manager says of itself (`PeerState.note`); None if it does not answer."""
    limit = timedelta(seconds=timeout)
    try:
        return PeerState.said(ManagerClient(address, connect_timeout=limit)._checkpoint_metadata(0, timeout=limit))
    except Exception:
        return None


@contextmanager
def _manager_servers_on(host: str) -> Iterator[None]:
    """torchft's manager would listen on every interface, and has no argument for it."""
    server = torchft.manager.ManagerServer

    def bound(**kwargs: Any) -> Any:
        at = f"[{host}]" if ":" in host else host
        kwargs["bind"] = f"{at}:{kwargs['bind'].rpartition(':')[2]}"
        return server(**kwargs)

    torchft.manager.ManagerServer = bound
    try:
        yield
    finally:
        torchft.manager.ManagerServer = server
