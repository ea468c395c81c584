"""A way between the ranks that is neither the process group nor its store: datagrams, from a thread of each.

The main thread may hold the store's client inside a wait, and the store may live in a process that has stopped. So
every rank has a socket, whose addresses are exchanged at the start, and each sends to each. A datagram is JSON behind a
digest, whose key the ranks share: what strangers send is not read.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

_DIGEST = 16  # bytes
_MOST = 60_000  # bytes of a datagram


@dataclass(frozen=True)
class Peer:
    """Where a rank is."""

    host: str
    pid: int
    machine: str
    """The same for ranks whose processes this one could look up."""
    address: str
    port: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"host {self.host}, pid {self.pid}"


class Connections:
    """One socket of this rank, and the addresses of all.

    Args:
        rank: of this process.
        ranks: how many there are.
        group: a process group on the host, over which they exchange addresses; None with one rank. Collective.
    """

    def __init__(self, rank: int, ranks: int, group: dist.ProcessGroup | None) -> None:
        self.rank = rank
        self.peers: list[Peer] = []
        self._key = secrets.token_bytes(16)
        self._socket: socket.socket | None = None
        self._timeout = -1.0  # of the socket
        machines: list[Any] = [_machine()]
        if group is not None:
            machines = [None] * ranks
            dist.all_gather_object(machines, _machine(), group=group)
        here = _address() if len(set(machines)) > 1 else "127.0.0.1"
        if ranks > 1:
            family = socket.AF_INET6 if ":" in here else socket.AF_INET
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
            self._socket.bind((here, 0))
        port = 0 if self._socket is None else int(self._socket.getsockname()[1])
        mine = asdict(Peer(socket.gethostname(), os.getpid(), _machine(), here, port)), self._key.hex()
        told: list[Any] = [mine]
        if group is not None:
            told = [None] * ranks
            dist.all_gather_object(told, mine, group=group)
        self.peers = [Peer(**peer) for peer, _ in told]
        self._key = bytes.fromhex(told[0][1])

    def send(self, message: dict[str, Any]) -> None:
        """To all others. What cannot be sent is lost, as what is not received: nobody is waited for."""
        if self._socket is None:
            return
        body = json.dumps({**message, "from": self.rank}).encode()
        data = self._sign(body) + body
        for rank, peer in enumerate(self.peers):
            if rank != self.rank and len(data) <= _MOST:
                with suppress(OSError):
                    self._socket.sendto(data, (peer.address, peer.port))

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next message, or None after so many seconds; ``message["from"]`` is the sender's rank."""
        if self._socket is None:
            return None
        try:
            if seconds != self._timeout:
                self._timeout = seconds
                self._socket.settimeout(max(seconds, 1e-3))
            data, _ = self._socket.recvfrom(_MOST + _DIGEST)
        except OSError:
            return None
        digest, body = data[:_DIGEST], data[_DIGEST:]
        if not hmac.compare_digest(digest, self._sign(body)):
            return None
        message: dict[str, Any] = json.loads(body)
        return message

    def _sign(self, body: bytes) -> bytes:
        return hashlib.blake2s(body, key=self._key, digest_size=_DIGEST).digest()

    def close(self) -> None:
        """Nothing is sent or received any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _machine() -> str:
    """What processes that see each other in /proc have in common: the system's boot, and a namespace of processes."""
    boot = namespace = ""
    with suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespace = f"{os.stat('/proc/self/ns/pid').st_ino} {os.stat('/proc/self/ns/net').st_ino}"
    return f"{boot or socket.gethostname()} {namespace}"


def _address() -> str:
    """This machine's address as the other ranks see it: of the way to the master, or on the master its own."""
    master = os.environ.get("MASTER_ADDR", socket.gethostname())
    for name in (master, socket.gethostname()):
        with suppress(OSError):
            family, kind, _, _, address = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, kind) as probe:
                probe.connect(address)  # of a datagram's socket: nothing is sent
                found = str(probe.getsockname()[0])
            if not found.startswith("127.") and found != "::1":
                return found
    return "0.0.0.0"
