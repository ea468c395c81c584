"""A training state on its way to a replica that has to catch up."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")

from lightning_eff.strategies.fault_tolerant.process_group import Gloo
from lightning_eff.strategies.fault_tolerant.replica_group import ReplicaGroup
from lightning_eff.strategies.fault_tolerant.state_parts import SMALL, StateParts
from lightning_eff.strategies.fault_tolerant.transport import PeerState

SECONDS = timedelta(seconds=5)


def states() -> dict[str, Any]:
    """Tensors of all kinds, large and small ones, one of them twice."""
    weight = torch.randn(70, 50)
    return {
        "weight": weight,
        "tied": {"weight": weight, "other": [weight, (weight.t(), 3)]},
        "half": torch.randn(3000).bfloat16(),
        "turned": torch.randn(60, 80).t(),
        "whole": torch.arange(5000).view(5, 1000)[:, ::2],
        "complex": torch.randn(4000, dtype=torch.complex64).conj(),
        "flags": torch.rand(9000) > 0.5,
        "trained": torch.nn.Parameter(torch.randn(2000)),
        "small": [torch.tensor(3.0), torch.randn(7), torch.zeros(0, 9)],
        "plain": {"step": 7, 3: None, "words": ("a", 2.5, True)},
    }


def alike(left: Any, right: Any) -> bool:
    """Types, keys in their order, and contents to the bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left.detach().resolve_conj(), right.detach().resolve_conj())
    if isinstance(left, dict):
        return list(left) == list(right) and all(alike(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(alike, left, right))
    return bool(left == right)


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.putenv, ("EVIL", "1")


@pytest.fixture
def peer() -> Iterator[Any]:
    peer = PeerState("127.0.0.1", patience=0.1)
    yield peer
    peer.shutdown()


def test_a_peer_state_arrives_as_it_was(peer: Any) -> None:
    state = {"weights": torch.arange(5.0), "step": 7, "nested": [{"a": (1, 2.0, None)}]}
    peer.send_checkpoint([1], 7, state, SECONDS)
    got = peer.recv_checkpoint(0, peer.metadata(), 7, SECONDS)
    assert torch.equal(got["weights"], state["weights"])
    assert got["nested"] == state["nested"]


def test_a_peer_state_is_for_its_step_and_its_word(peer: Any) -> None:
    peer.send_checkpoint([1], 7, {"step": 7}, SECONDS)
    host, port, _, note = peer.metadata().split(" ", 3)
    for metadata, step in ((peer.metadata(), 8), (f"{host} {port} {'0' * 32} {note}", 7)):
        with pytest.raises(ConnectionError, match="no state for step"):
            peer.recv_checkpoint(0, metadata, step, SECONDS)
    peer.disallow_checkpoint()
    with pytest.raises(ConnectionError, match="no state for step 7"):
        peer.recv_checkpoint(0, peer.metadata(), 7, SECONDS)


def test_nothing_that_a_peer_sends_is_unpickled(peer: Any) -> None:
    peer.send_checkpoint([1], 7, {"step": Evil()}, SECONDS)
    with pytest.raises(pickle.UnpicklingError):
        peer.recv_checkpoint(0, peer.metadata(), 7, SECONDS)


def test_all_kinds_of_tensors_arrive_to_the_bit(peer: Any) -> None:
    state = states()
    peer.send_checkpoint([1], 7, state, SECONDS)
    got = peer.recv_checkpoint(0, peer.metadata(), 7, SECONDS)
    assert alike(got, state)
    assert got["weight"] is got["tied"]["weight"]


def test_nothing_large_is_copied_to_be_served() -> None:
    state = {"weight": torch.randn(1 << 20), "moments": [torch.randn(1 << 20), torch.randn(1 << 20)]}
    parts = StateParts.of({**state, "again": state["weight"]})
    sent = {tensor.data_ptr() for tensor in parts.tensors}
    assert sent == {state["weight"].data_ptr(), *(moment.data_ptr() for moment in state["moments"])}
    assert len(parts.tensors) == 3
    assert len(parts.header) < SMALL  # where the three have 4 MB each


def test_a_transfer_is_broken_off_before_the_state_changes(peer: Any) -> None:
    """One that asked and then slept, while the others went on, gets no state of half this step and half the next."""
    tensors = [torch.zeros(1 << 22) for _ in range(8)]  # 16 MB each, more than sockets hold
    peer.send_checkpoint([1], 7, tensors, SECONDS)
    host, port, word, _ = peer.metadata().split(" ", 3)
    with socket.create_connection((host, int(port)), 5.0) as sleeper:
        sleeper.sendall(f"{word} 7\n".encode())
        received = sleeper.recv(1 << 16, socket.MSG_WAITALL)  # the transfer has begun
        peer.disallow_checkpoint()
        for tensor in tensors:
            tensor.fill_(1.0)
        while data := sleeper.recv(1 << 20):
            received += data
    assert len(received) < 3 * (1 << 24)
    assert torch.ones(1).numpy().tobytes() not in received


def test_a_state_within_a_replica_goes_tensor_by_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """With real processes: test_fault_tolerance_processes.py."""
    state, wire = states(), []
    first, second = ReplicaGroup(), ReplicaGroup()
    monkeypatch.setattr(first, "spread_", lambda tensor: wire.append(tensor.clone()))
    monkeypatch.setattr(second, "spread_", lambda tensor: tensor.copy_(wire.pop(0)))
    parts = StateParts.of(state)
    first.share_state(parts, parts.header)
    assert len(wire) == 8  # the tied one once, and its transpose
    assert alike(second.share_state(None, parts.header), state)
    assert wire == []


@pytest.mark.parametrize(("world", "seconds"), [(2, 10.2), (100, 20.0)])
def test_more_replicas_have_more_time_to_connect(world: int, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Gloo("127.0.0.1", timedelta(seconds=10), SECONDS)
    given: list[float] = []
    monkeypatch.setattr(
        "torchft.process_group.create_store_client", lambda address, timeout: given.append(timeout.total_seconds())
    )
    monkeypatch.setattr(group, "_create_pg", lambda *_: None)
    group.configure("127.0.0.1:1/quorum", "0", 0, world)
    assert given == [pytest.approx(seconds)]
