"""torchft's reconfigurable gloo on one address, whose connections end when they should."""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from weakref import WeakSet

import torch
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed import ProcessGroup, ProcessGroupGloo
from torchft.process_group import ProcessGroupDummy
from torchft.process_group import ProcessGroupGloo as ReconfigurableGloo

_CONNECT_EACH = timedelta(seconds=0.1)  # all connect to all, over one store


class Gloo(ReconfigurableGloo):
    """torchft's reconfigurable gloo, on one address, with a timeout for operations and a shorter one to connect.

    Args:
        host: address of the device that carries the traffic.
        connect_timeout: for peers to connect after each change of membership, and a tenth of a second for each of them
            beside it. One that died on the way costs this.
        timeout: for one operation: how long a peer may be silent within a step.
    """

    def __init__(self, host: str, connect_timeout: timedelta, timeout: timedelta) -> None:
        super().__init__(timeout=connect_timeout)
        self._connect_timeout = connect_timeout
        self.host = host
        self.members: list[int] = []
        """Replica index of each rank."""
        self.rank, self.world = 0, 0
        self.generation: int | None = None
        self._operation_timeout = timeout
        self._device = ProcessGroupGloo.create_device(hostname=host)  # one for all quorums: it has a thread
        self._connections: dict[int, str] = {}  # descriptors, and what they are: a number may soon be another file's
        _GROUPS.add(self)

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
        self._timeout = self._connect_timeout + _CONNECT_EACH * world_size
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
        self._connections = dict(_sockets().items() - before.items())
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
        for descriptor in self._take_connections():
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
        group: Any = self._pg  # type: ignore[has-type]
        self._pg = self.generation = None
        if group is not None:
            group.abort()

    def _take_connections(self) -> list[int]:
        """Those that are still what they were."""
        present = _sockets() if self._connections else {}
        taken = [descriptor for descriptor, name in self._connections.items() if present.get(descriptor) == name]
        self._connections = {}
        return taken


class Nobody(ProcessGroupDummy):
    """A group of one, for DDP, whose gradients go another way."""

    def __init__(self) -> None:
        super().__init__(0, 1)
        # torchft's keeps every result for the life of the process: with unused parameters to be found, one a step.
        self._work: Any = deque(maxlen=16)


_GROUPS: WeakSet[Gloo] = WeakSet()


def _close_in_child() -> None:
    """A data worker outlives a replica that is killed, and would keep its connections open for seconds."""
    for group in _GROUPS:
        for descriptor in group._take_connections():
            with suppress(OSError):
                os.close(descriptor)


os.register_at_fork(after_in_child=_close_in_child)


def _sockets() -> dict[int, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            name = os.readlink(f"/proc/self/fd/{entry}")
            if name.startswith("socket:"):
                found[int(entry)] = name
    return found


def store_on(host: str, port: int = 0) -> TCPStore:
    """A store that listens on one address; by its own choice it would on every interface.

    Args:
        host: the address.
        port: 0 for one that is free.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen()
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
