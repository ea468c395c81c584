"""Compile every kernel for a target and print a JSON list: `python -m lightning_eff.kernels.aot cuda:90`.

The process behind :func:`lightning_eff.kernels.compile_report`, which says what the columns mean.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lightning_eff.kernels.device import OPTIONS, CompileCase
from lightning_eff.kernels.dispatch import OPS


def parse_target(target: str) -> GPUTarget:
    """``cuda:90`` or ``hip:gfx942`` as Triton's target."""
    backend, architecture = target.split(":")
    return GPUTarget("cuda", int(architecture), 32) if backend == "cuda" else GPUTarget("hip", architecture, 64)


def compile_case(op: str, case: CompileCase, target: str) -> dict[str, Any]:
    """Compile one kernel and read its resources from what the compiler wrote."""
    signature = {name: case.arguments.get(name, "constexpr") for name in case.kernel.arg_names}
    # As at a launch: torch's own allocations are aligned, so Triton specialises pointers to multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in case.multiples
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=aligned)
    compiled = triton.compile(source, target=parse_target(target), options={"num_warps": case.num_warps, **OPTIONS})
    if "ptx" in compiled.asm:
        registers, spills = _cuda_resources(compiled.asm["cubin"])
        wide = re.findall(r"ld\.global\S*\.v(?:4\.[bf]32|2\.[bf]64|8\.b16)", compiled.asm["ptx"])
    else:
        assembly = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s*(\d+)", assembly)[0])
        spills = sum(int(count) for count in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly))
        wide = re.findall(r"(?:global|buffer|flat)_load_dwordx4", assembly)
    return {
        "op": op,
        "kernel": case.name,
        "target": target,
        "num_warps": case.num_warps,
        "registers": registers,
        "shared": compiled.metadata.shared,
        "spills": spills,
        "wide_loads": len(wide),
        # HIP's warps have 64 threads: the same tile takes half the loads of each.
        "wide_loads_expected": case.wide_loads * 32 // parse_target(target).warp_size,
    }


def _cuda_resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers and bytes of stack of a thread, as `cuobjdump` reads them; None, None where there is no such tool."""
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def main(target: str) -> None:
    """Print the report for ``target``."""
    rows = []
    for op in OPS:
        kernel = importlib.import_module(f"lightning_eff.kernels.{op}.kernel")
        rows += [compile_case(op, case, target) for case in kernel.compile_cases()]
    print(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1])
