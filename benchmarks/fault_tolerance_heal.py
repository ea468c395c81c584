"""What it takes to hand a training state to a replica that comes back: two processes on loopback."""

from __future__ import annotations

import multiprocessing
import resource
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import publish

TENSORS, NUMBERS = 20, 5_000_000  # 400 MB
LIMIT = timedelta(seconds=60)


def heal() -> None:
    """Memory beside the state, bytes that were written to files, and CPU time, of each side."""
    context = multiprocessing.get_context("spawn")
    channels = context.Queue(), context.Queue(), context.Queue()
    processes = [context.Process(target=side, args=channels) for side in (_sends, _receives)]
    for process in processes:
        process.start()
    rows = [channels[2].get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    megabytes = TENSORS * NUMBERS * 4 // 10**6
    publish("A state handed over", "fault_tolerance_heal", [{"state_megabytes": megabytes, **row} for row in rows])


def _sends(address: Any, over: Any, rows: Any) -> None:
    from lightning_eff.strategies.fault_tolerant.transport import PeerState

    state = {str(number): torch.full((NUMBERS,), float(number)) for number in range(TENSORS)}
    peer, usage = PeerState("127.0.0.1"), _Usage()
    peer.send_checkpoint([1], 1, state, LIMIT)
    address.put(peer.metadata())
    over.get()
    rows.put({"side": "sender", **usage.since()})
    peer.shutdown()


def _receives(address: Any, over: Any, rows: Any) -> None:
    from lightning_eff.strategies.fault_tolerant.transport import PeerState

    peer = PeerState("127.0.0.1")
    metadata = address.get()
    usage = _Usage()
    state = peer.recv_checkpoint(0, metadata, 1, LIMIT)
    row = {"side": "receiver, the state included", **usage.since()}
    assert all(bool((tensor == float(name)).all()) for name, tensor in state.items()), "another state arrived"
    rows.put(row)
    over.put(True)
    peer.shutdown()


class _Usage:
    """Of this process since this was made."""

    def __init__(self) -> None:
        self.before = self._now()

    def since(self) -> dict[str, Any]:
        peak, seconds, written = (now - before for before, now in zip(self.before, self._now(), strict=True))
        return {"peak_megabytes": round(peak), "cpu_seconds": round(seconds, 2), "file_megabytes": round(written)}

    @staticmethod
    def _now() -> tuple[float, float, float]:
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        return peak, time.process_time(), int(counts["wchar"]) / 1e6  # written to files: what is sent is not in it
