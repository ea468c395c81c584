"""Runs of several replicas that are killed on purpose: what they did, and whether anything was left behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from harness import REPOSITORY, json_lines
from harness.processes import environment, free_port

MOST_LIVES = 4  # restarts of one replica; more is an error in the test or in what is tested


class Server:
    """The process that forks replicas; one for a session."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.strategies.fault_tolerant.replica_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(RUST_LOG="error"),
            cwd=REPOSITORY,
            start_new_session=True,
        )
        self.events: Queue[dict[str, Any]] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.events.get(timeout=150) == {"ready": True}

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.put(json.loads(line))

    def ask(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        if self.process.stdout is not None:
            self.process.stdout.close()


class Lighthouse:
    """A lighthouse in a process of its own, on a port that stays."""

    def __init__(self, min_replicas: int, heartbeat_timeout: float) -> None:
        self.port = free_port()
        self.command = self.command_for("127.0.0.1", self.port, min_replicas, heartbeat_timeout)
        self.start()

    @staticmethod
    def command_for(host: str, port: int, min_replicas: int, heartbeat_timeout: float) -> list[str]:
        command = [sys.executable, "-m", "lightning_eff", "lighthouse", "--bind", f"{host}:{port}"]
        return [*command, "--min-replicas", str(min_replicas), "--heartbeat-timeout", str(heartbeat_timeout)]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, env=environment())
        assert self.process.stdout is not None
        self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Fault:
    """What ends a replica: see `replica_main.Faults`."""

    replica: int
    step: int | None
    """Committed steps when it happens; None for any."""
    phase: str
    life: int = 0
    signal: int = signal.SIGKILL
    process: int = 0
    """Of the replica's."""

    def row(self) -> list[Any]:
        return [self.replica, self.step, self.phase, self.life, int(self.signal), self.process]


@dataclass
class Outcome:
    """What the replicas of one run have written down."""

    folder: Path
    steps: dict[int, list[dict[str, Any]]]
    finals: dict[int, dict[str, Any]]
    exits: list[tuple[int, int, int]]
    sessions: set[int]
    seconds: float
    lives: dict[int, int] = field(default_factory=dict)
    others: list[dict[str, Any]] = field(default_factory=list)
    """What the further processes of the replicas have written down."""

    def losses(self) -> dict[int, float]:
        """Of each step, as whoever committed it has seen it."""
        return {line["step"]: line["loss"] for lines in self.steps.values() for line in lines}

    def logs(self) -> str:
        return _logs(self.folder)


def run(
    server: Server,
    folder: Path,
    *,
    replicas: int = 3,
    processes: int = 1,
    steps: int = 40,
    faults: tuple[Fault, ...] = (),
    restart: bool = True,
    limit: float = 120.0,
    heartbeat_timeout: float = 3.0,
    min_replicas: int = 1,
    during: Any = None,
    variables: dict[str, str] | None = None,
    **settings: Any,
) -> Outcome:
    """Train, restarting what dies until one has finished, as the launcher does.

    Args:
        processes: of each replica; when one of them is lost, all are ended and begin anew, as the elastic agent does.
        during: called about every 50 ms with the `Lighthouse`, the pids by replica and the folder.
        variables: of the replicas' environment, besides what the launcher gives them.
    """
    began = time.monotonic()
    lighthouse = Lighthouse(min_replicas, heartbeat_timeout)
    strategy = {
        "collective_timeout": 30.0,
        "connect_timeout": 20.0,
        "quorum_timeout": 90.0,
        "start_grace": 60.0,
        "heartbeat_timeout": heartbeat_timeout,
        "min_replicas": min_replicas,
        **settings.pop("strategy", {}),
    }
    running: dict[int, tuple[int, int]] = {}  # replica and process of each pid
    sessions: set[int] = set()
    lives = dict.fromkeys(range(replicas), 0)
    exits: list[tuple[int, int, int]] = []
    finished = False

    def start(replica: int) -> None:
        port = free_port()
        for process in range(processes):
            waiting.add((replica, process))
            name = str(replica) if process == 0 else f"{replica}.{process}"
            several = {
                "TORCHELASTIC_RUN_ID": "tests",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "RANK": str(process),
                "LOCAL_RANK": str(process),
                "GROUP_RANK": "0",
            }
            server.ask(
                {
                    "key": [replica, process],
                    "start": {
                        **settings,
                        "strategy": strategy,
                        "steps": steps,
                        "replica": replica,
                        "process": process,
                        "processes": processes,
                        "name": name,
                        "life": lives[replica],
                        "folder": str(folder),
                        "log": str(folder / f"replica-{name}-{lives[replica]}.log"),
                        "faults": [fault.row() for fault in faults],
                        "environment": {
                            **(variables or {}),
                            "TORCHFT_LIGHTHOUSE": lighthouse.address,
                            "REPLICA_GROUP_ID": str(replica),
                            "NUM_REPLICA_GROUPS": str(replicas),
                            "TORCHELASTIC_RESTART_COUNT": str(lives[replica]),
                            **(several if processes > 1 else {}),
                        },
                    },
                }
            )

    waiting: set[tuple[int, int]] = set()  # asked for, not yet there
    failing: set[int] = set()  # replicas of which a process is lost, and others still run
    try:
        for replica in range(replicas):
            start(replica)
        while running or waiting:
            if time.monotonic() - began > limit:
                raise TimeoutError(f"the run is not over after {limit} s; exits: {exits}\n{_logs(folder)}")
            if during is not None:
                during(lighthouse, {where[0]: pid for pid, where in running.items() if where[1] == 0}, folder)
            try:
                event = server.events.get(timeout=0.05)
            except Empty:
                continue
            if "key" in event:
                replica, process = event["key"]
                running[event["pid"]] = (replica, process)
                waiting.discard((replica, process))
                sessions.add(event["pid"])
            elif event["pid"] in running:
                replica, _ = running.pop(event["pid"])
                mates = [pid for pid, where in running.items() if where[0] == replica]
                if event["exit"] != 0 and replica not in failing:
                    failing.add(replica)
                    exits.append((replica, lives[replica], event["exit"]))
                    for pid in mates:
                        server.ask({"stop": pid})
                if mates or any(where[0] == replica for where in waiting):
                    continue
                if replica not in failing:
                    exits.append((replica, lives[replica], 0))
                    finished = True
                elif restart and not finished:
                    if lives[replica] == MOST_LIVES:
                        raise RuntimeError(f"replica {replica} does not live:\n{_logs(folder)}")
                    lives[replica] += 1
                    start(replica)
                failing.discard(replica)
    finally:
        for pid in running:
            server.ask({"stop": pid})
        while running:
            event = server.events.get(timeout=30)
            if "exit" in event:
                running.pop(event["pid"], None)
        lighthouse.kill()
    lines = {replica: json_lines.read(*sorted(folder.glob(f"steps-{replica}-*.jsonl"))) for replica in range(replicas)}
    finals = {
        replica: json.loads((folder / f"final-{replica}.json").read_text())
        for replica in range(replicas)
        if (folder / f"final-{replica}.json").exists()
    }
    others = json_lines.read(*folder.glob("steps-*.*-*.jsonl"))
    return Outcome(folder, lines, finals, exits, sessions, time.monotonic() - began, lives, others)


def _logs(folder: Path) -> str:
    return "\n".join(f"--- {p.name}\n{p.read_text()[-30000:]}" for p in sorted(folder.glob("replica-*.log")))


def orphans(sessions: set[int], patience: float = 12.0) -> list[str]:
    """Processes of these sessions that are still there; data workers notice the end of their parent within seconds."""
    deadline = time.monotonic() + patience
    while True:
        left = [f"{pid}: {command}" for pid, session, command in _processes() if session in sessions]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _processes() -> Iterator[tuple[int, int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    yield int(entry.name), int(fields[3]), (entry / "cmdline").read_text().replace("\0", " ")
