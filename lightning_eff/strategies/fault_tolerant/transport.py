"""How a replica gets the training state of a living peer: over TCP, never unpickled, on one address."""

from __future__ import annotations

import io
import secrets
import socket
import socketserver
import struct
import tempfile
import threading
from datetime import timedelta
from typing import Any

import torch
from torchft.checkpointing import CheckpointTransport

_LENGTH = struct.Struct("!q")
_CHUNK = 1 << 20


class PeerState(CheckpointTransport[Any]):
    """Serves this replica's state to those that have to catch up, and fetches a peer's.

    What a peer sends is read by ``torch.load(weights_only=True)``, so it can give wrong weights but run no code here.
    A state is served only to who knows the random word of this process, which the peers learn through torchft, and
    only for the step for which it was asked. That keeps strangers from reading weights by chance; it is no
    encryption. The state is a copy in memory, so training goes on while it is sent.

    Args:
        host: the address to listen on, and under which the peers reach it.
        patience: seconds for which a peer that asks too early is kept waiting.
    """

    def __init__(self, host: str, patience: float = 10.0) -> None:
        self.host = host
        self.patience = patience
        self.note = ""
        """Some words about this replica, which peers can read without a transfer; see `said`."""
        self._word = secrets.token_hex(16)
        self._changed = threading.Condition()
        self._step: int | None = None
        self._bytes: memoryview | None = None
        self._server = _Server((host, 0), self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True, name="peer-state")
        self._thread.start()

    def metadata(self) -> str:
        """What a peer has to know to fetch from here; torchft hands it out."""
        return f"{self.host} {self._server.server_address[1]} {self._word} {self.note}"

    @staticmethod
    def said(metadata: str) -> str:
        """The `note` of the replica with this metadata."""
        return metadata.split(" ", 3)[3]

    def send_checkpoint(self, dst_ranks: list[int], step: int, state_dict: Any, timeout: timedelta) -> None:
        """Make a state available until `disallow_checkpoint`."""
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        with self._changed:
            self._step, self._bytes = step, buffer.getbuffer()
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """Forget the state that is served; a transfer that has begun is finished."""
        with self._changed:
            self._step, self._bytes = None, None

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Fetch a peer's state.

        Raises:
            OSError: the peer is not there, has nothing for this step, or went away.
            pickle.UnpicklingError: it holds something other than tensors and plain Python values.
        """
        host, port, word, _ = metadata.split(" ", 3)
        # Not in memory: the state is big, and it is read into tensors of its own.
        with (
            socket.create_connection((host, int(port)), timeout.total_seconds()) as peer,
            tempfile.TemporaryFile() as f,
        ):
            peer.sendall(f"{word} {step}\n".encode())
            (length,) = _LENGTH.unpack(_receive(peer, _LENGTH.size))
            if length < 0:
                raise ConnectionError(f"the peer {host}:{port} has no state for step {step}")
            while length > 0:
                chunk = peer.recv(min(length, _CHUNK))
                if not chunk:
                    raise ConnectionError(f"the peer {host}:{port} went away while it sent its state")
                f.write(chunk)
                length -= len(chunk)
            f.seek(0)
            return torch.load(f, map_location="cpu", weights_only=True)

    def shutdown(self, wait: bool = True) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0 if wait else 0.0)

    def _for(self, request: str) -> memoryview | None:
        word, _, step = request.strip().partition(" ")
        if not secrets.compare_digest(word.encode(), self._word.encode()):
            return None
        with self._changed:
            # Both learn of it in the same quorum, and the one that asks may be the quicker one.
            ready = self._changed.wait_for(lambda: step == str(self._step), self.patience)
            return self._bytes if ready else None


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], state: PeerState) -> None:
        self.state = state
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that goes away in the middle is no news here: it notices itself."""


class _Request(socketserver.StreamRequestHandler):
    timeout = 60.0
    server: _Server

    def handle(self) -> None:
        state = self.server.state._for(self.rfile.readline(256).decode("utf-8", "replace"))
        self.wfile.write(_LENGTH.pack(-1 if state is None else len(state)))
        if state is not None:
            self.wfile.write(state)


def _receive(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = peer.recv(count - len(data))
        if not part:
            raise ConnectionError("the peer closed the connection")
        data += part
    return data
