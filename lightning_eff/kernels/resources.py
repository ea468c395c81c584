"""What the kernels cost on a target, compiled ahead of time: no GPU is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class CompiledKernel(NamedTuple):
    """One kernel compiled for one target.

    Attributes:
        op: the op's folder name.
        kernel: name of the kernel, with the constants that set this variant apart.
        target: ``cuda:90`` or ``hip:gfx942``, say.
        num_warps: warps of a program.
        registers: 32-bit registers of a thread (vector registers on HIP); None where the tool that tells is missing.
        shared: bytes of shared memory of a program.
        spills: bytes of stack of a thread (CUDA) or spilled registers (HIP), 0 without spills; None as above.
        wide_loads: load instructions of 16 bytes.
        wide_loads_expected: how many the main loops need if each of them is vectorised; 0 for a kernel without one.
    """

    op: str
    kernel: str
    target: str
    num_warps: int
    registers: int | None
    shared: int
    spills: int | None
    wide_loads: int
    wide_loads_expected: int

    @property
    def vectorised(self) -> bool | None:
        """Whether every main loop loads 16 bytes at a time; None for a kernel without a main loop."""
        return self.wide_loads >= self.wide_loads_expected if self.wide_loads_expected else None


def compile_report(target: str = "cuda:90") -> list[CompiledKernel]:
    """Compile every kernel for ``target`` and say what it takes. Slow: some ten seconds.

    Runs in a process of its own with a cache of its own: what Triton decided at import in this process
    (``TRITON_INTERPRET``) has no effect, and nothing is left behind.

    Args:
        target: ``cuda:<compute capability>`` (``cuda:80``, ``cuda:90``) or ``hip:<architecture>`` (``hip:gfx942``).

    Raises:
        ValueError: ``target`` is not of that form.
        RuntimeError: Triton cannot be imported or a kernel does not compile; the message ends with the reason.

    Example:
        >>> for kernel in compile_report("cuda:90"):  # doctest: +SKIP
        ...     print(kernel.op, kernel.kernel, kernel.registers, kernel.spills)
    """
    if re.fullmatch(r"cuda:\d+|hip:gfx\w+", target) is None:
        raise ValueError(f"target={target!r} is not allowed: it must be like 'cuda:90' or 'hip:gfx942'")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")}
    package = Path(__file__).resolve().parents[2]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), environment.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        command = [sys.executable, "-m", "lightning_eff.kernels.aot", target]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling the kernels for {target} failed:\n{done.stderr.strip()[-2000:]}")
    return [CompiledKernel(**row) for row in json.loads(done.stdout.splitlines()[-1])]
