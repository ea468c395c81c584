"""Tests of the command line."""

import subprocess
import sys

# As if the packages had never been installed: neither their modules nor their metadata are there. (Lightning looks at
# the metadata to decide what to import.)
_WITHOUT = """
import importlib.metadata, sys
names = {names!r}
sys.modules.update(dict.fromkeys(names))
find = importlib.metadata.Distribution.from_name
def from_name(name):
    if name.lower().replace("-", "_") in names:
        raise importlib.metadata.PackageNotFoundError(name)
    return find(name)
importlib.metadata.Distribution.from_name = from_name
"""


def run_without(modules, code, cwd):
    """Run Python code in a process of its own that lacks these packages: its exit status, stdout and stderr."""
    program = _WITHOUT.format(names=list(modules)) + code
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True, timeout=150)
    # PyTorch 2.11 notes that it has found no Triton.
    err = "".join(line for line in done.stderr.splitlines(keepends=True) if "torch/utils/flop_counter.py" not in line)
    return done.returncode, done.stdout, err
