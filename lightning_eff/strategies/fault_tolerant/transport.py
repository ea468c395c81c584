"""How a replica gets the training state of a living peer: over TCP, never unpickled, on one address."""

from __future__ import annotations

import secrets
import socket
import socketserver
import struct
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

from torch import Tensor
from torchft.checkpointing import CheckpointTransport

from lightning_eff.strategies.fault_tolerant.state_parts import StateParts, bytes_of

_LENGTH = struct.Struct("!q")
_CHUNK = 1 << 20  # a timeout is for one of these, however long the whole takes


class PeerState(CheckpointTransport[Any]):
    """Serves this replica's state to those that have to catch up, and fetches a peer's.

    What a peer sends is read by ``torch.load(weights_only=True)``, so it can give wrong weights but run no code here.
    A state is served only to who knows the random word of this process, which the peers learn through torchft, and
    only for the step for which it was asked. That keeps strangers from reading weights by chance; it is no
    encryption.

    The state is sent tensor by tensor from where it is, and there is no copy of it: nobody makes a step before all have
    what they asked for. Where one does not get on, and the others go on without it, the transfer is broken off before
    they change anything (`disallow_checkpoint`). No time is set for a whole transfer, but for each wait for more of it.

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
        self._parts: StateParts | None = None
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
        """Make a state available until `disallow_checkpoint`; it must not change until then."""
        parts = StateParts.of(state_dict)
        with self._changed:
            self._step, self._parts = step, parts
            self._changed.notify_all()

    def disallow_checkpoint(self) -> None:
        """Forget the state that is served, which may change as soon as this returns; break a transfer of it off."""
        with self._changed:
            self._step, self._parts = None, None

    def recv_checkpoint(self, src_rank: int, metadata: str, step: int, timeout: timedelta) -> Any:
        """Fetch a peer's state.

        Args:
            src_rank: of the peer.
            metadata: of the peer.
            step: for which it is asked.
            timeout: to connect, and for each further piece to come.

        Raises:
            OSError: the peer is not there, has nothing for this step, or went away.
            pickle.UnpicklingError: it holds something other than tensors and plain Python values.
        """
        host, port, word, _ = metadata.split(" ", 3)
        with socket.create_connection((host, int(port)), timeout.total_seconds()) as peer:
            peer.sendall(f"{word} {step}\n".encode())
            length = bytearray(_LENGTH.size)
            _fill(peer, memoryview(length))
            (count,) = _LENGTH.unpack(length)
            if count < 0:
                raise ConnectionError(f"the peer {host}:{port} has no state for step {step}")
            header = bytearray(count)
            _fill(peer, memoryview(header))

            def fill(content: Tensor) -> None:
                _fill(peer, memoryview(cast(Any, content.numpy())))

            return StateParts.read(bytes(header), fill)

    def shutdown(self, wait: bool = True) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5.0 if wait else 0.0)

    def pieces(self, request: str) -> Iterator[bytes | memoryview]:
        """What is sent in answer to a request."""
        parts = self._for(request)
        if parts is None:
            yield _LENGTH.pack(-1)
            return
        yield _LENGTH.pack(len(parts.header))
        yield parts.header
        for tensor in parts.tensors:
            content: Tensor | None = None
            for start in range(0, tensor.nbytes, _CHUNK):
                with self._changed:
                    if self._parts is not parts:
                        return
                    content = bytes_of(tensor.cpu()) if content is None else content
                    piece = content[start : start + _CHUNK].clone()
                yield memoryview(cast(Any, piece.numpy()))

    def _for(self, request: str) -> StateParts | None:
        word, _, step = request.strip().partition(" ")
        if not secrets.compare_digest(word.encode(), self._word.encode()):
            return None
        with self._changed:
            # Both learn of it in the same quorum, and the one that asks may be the quicker one.
            ready = self._changed.wait_for(lambda: step == str(self._step), self.patience)
            return self._parts if ready else None


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
        for piece in self.server.state.pieces(self.rfile.readline(256).decode("utf-8", "replace")):
            self.wfile.write(piece)


def _fill(peer: socket.socket, content: memoryview) -> None:
    while content:
        count = peer.recv_into(content)
        if not count:
            raise ConnectionError("the peer went away while it sent its state")
        content = content[count:]
