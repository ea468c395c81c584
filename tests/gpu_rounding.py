"""What a GPU does to a 0-d tensor, on the CPU: it is rounded to the 16 bits of the tensor that it meets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_OPERATORS = {"aten::mul", "aten::mul_", "aten::div", "aten::div_", "aten::_foreach_mul", "aten::_foreach_mul_"}


class GpuRounding(TorchDispatchMode):
    """Within it products and quotients of 16-bit tensors with a 0-d tensor of more bits are as on CUDA.

    There the operands of an elementwise operator are first brought to the result's dtype, which a 0-d tensor has no say
    in; the CPU computes with the 0-d tensor as it is.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _OPERATORS:
            first = args[0][0] if isinstance(args[0], list) else args[0]
            if first.ndim > 0 and first.dtype in (torch.bfloat16, torch.float16):
                args = tree_map_only(Tensor, lambda t: t.to(first.dtype) if t.ndim == 0 else t, args)
        return func(*args, **(kwargs or {}))
