"""Every kernel compiles ahead of time, loads 16 bytes at a time where it streams, and spills nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lightning_eff.kernels import compile_report, dispatch

NAIVE = """
import triton
import triton.language as tl
from lightning_eff.kernels.aot import compile_case
from lightning_eff.kernels.device import CompileCase

{source}
case = CompileCase(naive, "naive", {{"addresses": "*i64", "count": "i32", "out": "*fp32"}}, {{"BLOCK": 4096}}, 8, 4)
print(compile_case("test", case, "cuda:90")["wide_loads"])
"""
SOURCE = """
@triton.jit
def naive(addresses, count, out, BLOCK: tl.constexpr):
    pointer = tl.load(addresses + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    sums = tl.full([BLOCK], 0.0, tl.float32)
    for block in range(count // BLOCK):
        sums += tl.load(pointer + block * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(sums, axis=0))
"""


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:90", "hip:gfx942"])
def test_kernels_compile_without_spills_and_with_wide_loads(target: str) -> None:
    rows = compile_report(target)
    assert {row.op for row in rows} == set(dispatch.OPS)
    for row in rows:
        assert row.spills == 0, row
        assert row.vectorised is not False, row
    # ZClip's decision is some forty numbers in one program: there is nothing to stream.
    assert {row.op for row in rows if row.vectorised} == set(dispatch.OPS) - {"zclip"}


def test_the_measure_tells_a_naive_kernel_apart(tmp_path_factory: pytest.TempPathFactory) -> None:
    # A jitted function reads its source from a file.
    file = tmp_path_factory.mktemp("naive") / "naive.py"
    file.write_text(NAIVE.format(source=SOURCE))
    done = subprocess.run(
        [sys.executable, str(file)],
        env={"PYTHONPATH": ".", "TRITON_CACHE_DIR": str(file.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "0"


@pytest.mark.slow
def test_the_launchers_pass_what_the_kernels_take(tmp_path_factory: pytest.TempPathFactory) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("launched"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launch_path"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [
        "_activate",
        "_activate_backward",
        "_count",
        "_decide",
        "_finish",
        "_pack",
        "_pairs_up",
        "_partials",
        "_scale",
        "_scatter",
        "_selected_down",
        "_selected_up",
        "_sketch",
    ]


def test_a_target_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="target='sm_90' is not allowed"):
        compile_report("sm_90")
