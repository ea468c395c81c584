"""What `lightning-eff launch` and the replicas that it starts tell each other. Nothing heavy is imported for it.

Slurm, Kubernetes or torchrun may set the same variables; what they do not set is not known.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"
"""Address of the lighthouse, ``http://HOST:PORT``."""
REPLICA = "REPLICA_GROUP_ID"
"""Index of this replica, from 0, the same after a restart."""
REPLICAS = "NUM_REPLICA_GROUPS"
"""The largest number of replicas."""
HOST = "FT_HOST"
"""Address on which this replica listens."""
RUN_ID = "LIGHTNING_EFF_RUN_ID"
"""The same text in all replicas of a run; replicas of another one are turned away."""
FINISHED = "LIGHTNING_EFF_FINISHED"
"""A file that exists once a replica has come to the run's end."""
PROGRESS = "LIGHTNING_EFF_PROGRESS"
"""A file in which a replica notes its progress; those of the other replicas of this machine lie beside it."""
RESTARTS = "LIGHTNING_EFF_RESTARTS"
"""How often this replica was started again."""


@dataclass(frozen=True)
class Progress:
    """How far a replica has come, in a file of one line that its supervisor reads."""

    name: str = ""
    """Under which the lighthouse knows this process; empty before it has met the lighthouse, and when it has left."""
    pid: int = 0
    step: int = -1
    """Committed steps of this process; -1 before it has begun."""
    furthest: int = -1
    """Most steps that a process of this replica has seen."""
    over: bool = False
    """Whether it has come to the end of the training."""
    left: bool = False
    """Whether it leaves the others on purpose, and is not to be started again here."""
    anew: bool = False
    """Whether it ends only to start anew, since it has lost the others."""

    @staticmethod
    def read(path: str | Path) -> Progress:
        """What was noted last; nothing where there is none."""
        try:
            return Progress(**json.loads(Path(path).read_text()))
        except (OSError, ValueError, TypeError):
            return Progress()

    def write(self, path: str | Path) -> None:
        """Note it; the time of the file is that of the last note."""
        part = Path(f"{path}.part")
        part.write_text(json.dumps(asdict(self)))
        part.replace(path)


def note_progress(**changes: str | int | bool) -> None:
    """Change what is noted of this replica, if anybody wants to know (see `PROGRESS`)."""
    path = os.environ.get(PROGRESS)
    if path is None:
        return
    new = replace(Progress.read(path), **changes)  # type: ignore[arg-type]
    replace(new, furthest=max(new.furthest, new.step)).write(path)


def furthest_step() -> int:
    """The most steps that any replica of this machine has seen, in this life or one before; -1 if nobody says."""
    path = os.environ.get(PROGRESS)
    if path is None:
        return -1
    return max((Progress.read(other).furthest for other in Path(path).parent.iterdir()), default=-1)
