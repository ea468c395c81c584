"""One replica's elastic agent, torch's own: starts the replica's processes and restarts them when one fails.

    python -m lightning_eff.cli.launch.agent REPLICA PROCESSES MAX_RESTARTS FOLDER COMMAND [ARGUMENTS ...]

It listens nowhere: a replica lies on one machine, so its processes meet at a file. torch's usual store for that accepts
connections from every network that the machine is on.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run a replica to its end and return its exit status."""
    replica, processes, max_restarts, folder, *command = argv
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    name = f"replica-{replica}"
    own_folder = tempfile.mkdtemp(prefix=f"{name}-", dir=folder)  # an agent that was killed leaves its store behind
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(processes),
        max_restarts=int(max_restarts),
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint=os.path.join(own_folder, "store"),
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=own_folder),
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        how = signal.Signals(-failure.exitcode).name if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        print(f"ended with {how}; no restart is left of {max_restarts}", file=sys.stderr)
        return 1
    except SignalException as received:
        return 128 + int(received.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
