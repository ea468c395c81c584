"""Runs that `benchmarks.fault_tolerance` measures: launched, followed by what the replicas write, killed on purpose."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from harness import json_lines
from harness.processes import environment

WORKER = "benchmarks.fault_tolerance_worker"
CORES = len(os.sched_getaffinity(0))  # that all replicas share
TINY = {"block_size": 256, "n_layer": 1, "n_head": 2, "n_embd": 32}  # 0.03 M: what is left is the recovery itself
SMALL = {"block_size": 256, "n_layer": 4, "n_head": 4, "n_embd": 128}  # 0.85 M parameters
MIDDLE = {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}  # 10.8 M


class Run:
    """A launched run, and what its replicas have written so far."""

    def __init__(self, folder: Path, replicas: int, settings: dict[str, Any]) -> None:
        self.folder, self.replicas, self.settings = folder, replicas, settings
        if settings["strategy"] == "ddp_ft":
            command = [sys.executable, "-m", "lightning_eff", "launch", "--replicas", str(replicas)]
            command += ["--nproc-per-node", str(settings.get("processes", 1))]
            command += ["--max-restarts", "1000", "-m", WORKER]
        else:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(replicas)]
            command += ["--max-restarts", str(settings.get("max_restarts", 1000)), "--standalone", "-m", WORKER]
        self.log = (folder / "output.log").open("w")
        told = environment(FAULT_TOLERANCE_BENCHMARK=json.dumps({**settings, "folder": str(folder)}))
        self.process = subprocess.Popen(
            command, env=told, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def lines(self, replica: int | None = None) -> list[dict[str, Any]]:
        """Of one replica, or of all by time."""
        found = []
        for index in range(self.replicas) if replica is None else [replica]:
            lines = json_lines.read(self.folder / f"steps-{index}.jsonl")
            found += [{"replica": index, **line} for line in lines]
        return sorted(found, key=lambda line: line["time"])

    def steps(self, replica: int | None = None) -> list[dict[str, Any]]:
        return [line for line in self.lines(replica) if line["event"] == "step"]

    def wait_for(self, condition: Any, limit: float = 180.0) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run did not get there:\n{(self.folder / 'output.log').read_text()[-3000:]}")
            time.sleep(0.02)

    def kill(self, replica: int) -> float:
        """`kill -9` its present process; the time at which."""
        pid = [line["pid"] for line in self.lines(replica)][-1]
        now = time.time()
        os.kill(pid, signal.SIGKILL)
        return now

    def kill_in(self, phase: str, replica: int) -> float:
        """The same in a phase of one of its next steps, see `fault_tolerance_worker.PHASES`."""
        deaths = len(self._deaths(replica))
        (self.folder / f"die-{replica}").write_text(phase)
        self.wait_for(lambda: len(self._deaths(replica)) > deaths)
        return float(self._deaths(replica)[-1]["time"])

    def _deaths(self, replica: int) -> list[dict[str, Any]]:
        return [line for line in self.lines(replica) if line["event"] == "death"]

    def end(self) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self.log.close()


@contextmanager
def launched(replicas: int, **settings: Any) -> Iterator[Run]:
    with tempfile.TemporaryDirectory(prefix="fault-tolerance-") as folder:
        run = Run(Path(folder), replicas, {"model": SMALL, "batch_size": 4, "steps": 100, **settings})
        try:
            yield run
        finally:
            run.end()


def medians(values: list[float]) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), 4),
        "least": round(min(values), 4),
        "most": round(max(values), 4),
        "repeats": len(values),
    }
