"""Run a command that cannot outlive its parent: `python tether.py [--unless FILE] COMMAND [ARGUMENTS ...]`.

The kernel kills it as soon as the process that started it has ended, by kill -9 too. It becomes the command, so there
is no process between the two. Started by its path, without the package, since it runs before every worker.
"""

import ctypes
import os
import signal
import sys

PARENT = "LIGHTNING_EFF_PARENT"
"""The process that a tethered one belongs to: told by it, since it may be gone before one can ask."""

_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Become the command; exit status 0 without it if the file of ``--unless`` exists, 1 if the parent has gone."""
    parent = int(os.environ.get(PARENT) or os.getppid())
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:  # it went before the kernel knew
            return 1
    if argv[0] == "--unless":
        _, finished, *argv = argv
        if os.path.exists(finished):
            print("the run is over: not started again", file=sys.stderr)
            return 0
    if "LIGHTNING_EFF_RESTARTS" in os.environ and "TORCHELASTIC_RESTART_COUNT" in os.environ:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = os.environ["LIGHTNING_EFF_RESTARTS"]  # which torch does not count
    os.environ[PARENT] = str(os.getpid())  # of those that this one tethers
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
