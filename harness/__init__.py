"""What tests and benchmarks share: ranks, a slow network, counts, faults, quiet runs, recorders, times, plots.

It imports nothing of either, and is no part of the package that users install.
"""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
"""The folder in which all of this lies: where a command of its own is started, so that it finds `harness` too."""
