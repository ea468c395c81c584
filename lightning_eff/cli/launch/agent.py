"""One replica's elastic agent, torch's own: starts the replica's processes and restarts them when one fails.

    python -m lightning_eff.cli.launch.agent REPLICA PROCESSES MAX_RESTARTS MAX_EXCEPTIONS FOLDER COMMAND [...]

It listens nowhere: a replica lies on one machine, so its processes meet at a file. torch's usual store for that accepts
connections from every network that the machine is on.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_eff import _launched
from lightning_eff._launched import Progress
from lightning_eff.cli.launch.stopped import StoppedWatch


@dataclass
class Budget:
    """How often a replica is started again.

    A process that was killed, or has lost the others, is nobody's fault: it comes back ``max_restarts`` times. An
    exception comes again if it is a bug in the script: ``max_exceptions`` times in a row without a step more than
    before.

    Example:
        >>> budget = Budget(max_restarts=10, max_exceptions=1)
        >>> [budget.allows(exception=True, step=step) for step in (7, 9, 9)]
        [True, True, False]
    """

    max_restarts: int
    max_exceptions: int
    restarts: int = 0
    exceptions: int = 0
    furthest: int = -2

    def allows(self, exception: bool, step: int) -> bool:
        """Whether the replica is started again after it has ended at this step."""
        if not exception:
            self.restarts += 1
            return self.restarts <= self.max_restarts
        self.exceptions = self.exceptions + 1 if step <= self.furthest else 1
        self.furthest = max(self.furthest, step)
        return self.exceptions <= self.max_exceptions


def main(argv: Sequence[str]) -> int:
    """Run a replica to its end and return its exit status."""
    replica, processes, max_restarts, max_exceptions, folder, *command = argv
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    budget = Budget(int(max_restarts), int(max_exceptions))
    progress = os.environ[_launched.PROGRESS]
    for life in range(sys.maxsize):  # a budget is finite
        os.environ[_launched.RESTARTS] = str(life)
        replace(Progress(), furthest=Progress.read(progress).furthest).write(progress)
        failure = _run(f"replica-{replica}", int(processes), folder, command)
        if failure is None:
            return 0
        if failure.received:
            return 128 + failure.received
        if os.path.exists(os.environ[_launched.FINISHED]):
            print("the run is over: not started again", file=sys.stderr)
            return 0
        ended = Progress.read(progress)
        if ended.left and not ended.over:
            return 0
        exception = not failure.signalled and not ended.anew
        allowed = budget.allows(exception, ended.step)
        of = f"{max_exceptions} after exceptions without a step in between" if exception else max_restarts
        if not allowed:
            print(f"ended with {failure.how}; no restart is left of {of}", file=sys.stderr)
            return 1
        number = budget.exceptions if exception else budget.restarts
        print(f"ended with {failure.how}: restart {number} of {of}", file=sys.stderr, flush=True)
    raise AssertionError("a budget is finite")


@dataclass(frozen=True)
class _Failure:
    how: str
    signalled: bool = False
    """Whether a process was killed by a signal."""
    received: int = 0
    """The signal that has ended this agent itself."""


def _run(name: str, processes: int, folder: str, command: Sequence[str]) -> _Failure | None:
    """One life of the replica."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    own_folder = tempfile.mkdtemp(prefix=f"{name}-", dir=folder)  # an agent that was killed leaves its store behind
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        max_restarts=0,  # they are counted here, by their cause
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=os.path.join(own_folder, "store"),
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=own_folder),
        monitor_interval=0.1,
    )
    try:
        with StoppedWatch():
            elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        # A process that was killed may take others with it, which end with exceptions of their own.
        codes = sorted(failure.exitcode for failure in error.failures.values())
        how = signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit status {codes[0]}"
        return _Failure(how, signalled=codes[0] < 0)
    except SignalException as received:
        return _Failure("a signal", received=int(received.sigval))
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
