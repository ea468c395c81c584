"""Device functions shared by the kernels. Importing this module needs Triton."""

# The arguments of a jitted function are Triton's own values, and torch.cuda.device_of carries no annotation.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

TRITON_VERSION: str = triton.__version__

# Sums are written with `tl.fma` where a product is to be fused; nothing else may be, so that a kernel rounds like its
# reference does, and like itself on another path. One stage: software pipelines would buy latency with shared memory
# and registers that many resident programs use better in kernels that only stream.
OPTIONS = {"enable_fp_fusion": False, "num_stages": 1}

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)


@triton.jit
def typed_pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An int64 address from a table as a pointer to DTYPE; ALIGNED promises a multiple of 16 bytes.

    Alignment that the compiler can see is what makes it load 16 bytes at once. It loses the hint on a plain cast of
    an integer, and keeps it on a pointer marked after the cast.
    """
    if ALIGNED:
        return tl.multiple_of(((address // 16) * 16).to(tl.pointer_type(DTYPE)), 16)
    else:
        return address.to(tl.pointer_type(DTYPE))


# Triton decides at import, by TRITON_INTERPRET, whether a kernel is compiled or run by its interpreter.
INTERPRETED: bool = not isinstance(typed_pointer, triton.JITFunction)


class CompileCase(NamedTuple):
    """A kernel and the types to compile it for ahead of time.

    Attributes:
        kernel: the jitted function.
        name: its name in reports.
        arguments: Triton type of each argument that is no compile-time constant (``*i64``, ``i32``).
        constants: value of each one that is.
        num_warps: warps of a program.
        wide_loads: 16-byte loads of one thread in its vectorised main loops with warps of 32 threads; 0 where there is
            no such loop.
        multiples: number arguments to be taken for multiples of 16, as a launch finds them to be.
    """

    kernel: Any
    name: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    num_warps: int
    wide_loads: int = 0
    multiples: tuple[str, ...] = ()


TABLE_ARGUMENTS = {"addresses": "*i64", "numels": "*i64", "codes": "*i32", "owners": "*i32", "positions": "*i32"}
