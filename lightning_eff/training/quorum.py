"""torchft's manager and process group, as the fault-tolerant strategy uses them: every listener on one address."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, cast

import torch
import torchft.manager
from torch._C._distributed_c10d import AllreduceOptions, Store, TCPStore
from torch.distributed import ProcessGroup, ProcessGroupGloo, ReduceOp
from torchft.coordination import ManagerClient
from torchft.manager import Manager
from torchft.process_group import ProcessGroupGloo as ReconfigurableGloo

from lightning_eff.training.peer_state import PeerState

_CONNECTIONS: dict[int, str] = {}
"""Descriptors of the present group's connections, and what they are: a number may soon be another file's."""


def _sockets() -> dict[int, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{entry}")
            if name.startswith("socket:"):
                found[int(entry)] = name
    return found


def _take_connections() -> list[int]:
    """Those that are still what they were."""
    present = _sockets() if _CONNECTIONS else {}
    taken = [descriptor for descriptor, name in _CONNECTIONS.items() if present.get(descriptor) == name]
    _CONNECTIONS.clear()
    return taken


def _close_in_child() -> None:
    """A data worker outlives a replica that is killed, and would keep its connections open for seconds."""
    for descriptor in _take_connections():
        with suppress(OSError):
            os.close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)


class Gloo(ReconfigurableGloo):
    """torchft's reconfigurable gloo, on one address, with a timeout for operations and a shorter one to connect.

    Args:
        host: address of the device that carries the traffic.
        connect_timeout: for peers to meet after each change of membership. One that died on the way costs this.
        timeout: for one operation: how long a peer may be silent within a step.
    """

    def __init__(self, host: str, connect_timeout: timedelta, timeout: timedelta) -> None:
        super().__init__(timeout=connect_timeout)
        self.host = host
        self.members: list[int] = []
        """Replica index of each rank."""
        self.rank, self.world = 0, 0
        self.generation: int | None = None
        self._operation_timeout = timeout
        self._device = ProcessGroupGloo.create_device(hostname=host)  # one for all quorums: it has a thread

    def configure(
        self,
        store_addr: str,
        replica_id: str,
        rank: int,
        world_size: int,
        quorum_id: int | None = None,
        group_rank: int | None = None,
        group_world_size: int | None = None,
        global_ranks: list[int] | None = None,
    ) -> None:
        """Connect to the members of a new quorum."""
        self.rank, self.world, self.members = rank, world_size, list(global_ranks or [])
        self.generation = None
        super().configure(
            store_addr, replica_id, rank, world_size, quorum_id, group_rank, group_world_size, global_ranks
        )
        self.generation = quorum_id

    def _create_pg(self, store: Store, rank: int, world_size: int) -> ProcessGroup:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [self._device]
        options._timeout = self._timeout
        options._threads = 2
        group = ProcessGroup(store, rank, world_size)
        group._set_default_backend(ProcessGroup.BackendType.GLOO)
        before = _sockets()
        backend = ProcessGroupGloo(store, rank, world_size, options)
        _CONNECTIONS.clear()
        _CONNECTIONS.update(_sockets().items() - before.items())
        backend._set_sequence_number_for_group()
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        for device in devices:
            group._register_backend(torch.device(device), ProcessGroup.BackendType.GLOO, backend)
        return group

    def _opts_hook(self, opts: Any) -> Any:
        if hasattr(opts, "timeout"):
            opts.timeout = self._operation_timeout
        return opts

    @contextmanager
    def patient(self, seconds: float) -> Iterator[None]:
        """Operations within may take this long."""
        usual, self._operation_timeout = self._operation_timeout, timedelta(seconds=seconds)
        try:
            yield
        finally:
            self._operation_timeout = usual

    def abort(self, errored: bool = True) -> None:
        """Close the connections, so that peers which wait for this replica notice at once.

        gloo closes them when nothing refers to the group any more, and not before.
        """
        # Data workers are forked with copies of the connections, which closing alone would leave open.
        for descriptor in _take_connections():
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        group: Any = self._pg  # type: ignore[has-type]
        self._pg = self.generation = None
        if group is not None:
            group.abort()


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
        self._host_store = _store(host)
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
        self._executor: Any = _Background()  # torchft's own keeps the process from ending while a quorum is asked for
        self._broken_off = False

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
        assert self._quorum_future is not None
        while not wait([self._quorum_future], 0.2).done:
            if self._broken_off:
                raise ConnectionAbortedError("this replica asks for no quorum any more")
        self._quorum_future.result()

    def break_off(self) -> None:
        """End a quorum that another thread waits for, and with it this replica's part in the run."""
        assert self._manager is not None
        self._broken_off = True
        self._manager.shutdown()

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

    @property
    def quorum_id(self) -> int:
        """Of the last quorum that this replica was in."""
        return int(self._quorum_id)

    @property
    def address(self) -> str:
        """Of this replica's manager."""
        assert self._manager is not None
        return str(self._manager.address())


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


def _store(host: str) -> TCPStore:
    # By its own choice the store would listen on every interface.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen()
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


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
