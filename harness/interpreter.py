"""Triton's interpreter, mended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextmanager
def mended_bfloat16() -> Iterator[None]:
    """Two faults of the interpreter: it cuts bits off instead of rounding, and a product is that of bit patterns."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    truncate, multiply = builder.create_fp_trunc, builder.create_dot

    def create_fp_trunc(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return truncate(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16).view(torch.int16).numpy()
        return interpreter.TensorHandle(rounded.view(np.uint16), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = self.cast_impl(a, tl.float32), self.cast_impl(b, tl.float32)
        return multiply(self, a, b, *args)

    with (
        mock.patch.object(builder, "create_fp_trunc", create_fp_trunc),
        mock.patch.object(builder, "create_dot", create_dot),
        np.errstate(all="ignore"),  # numpy warns of inf - inf
    ):
        yield
