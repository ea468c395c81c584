"""Counting what a run asks of torch: operator calls, and moments when the host waits for the device."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self

from lightning_eff.kernels import tables

# Operators that return a value, or a size that depends on values, to the host: `.item()`, `float(t)`, `bool(t)`,
# `torch.equal`, boolean indexing. On a GPU each one waits for everything queued before it.
_WAITING_OPERATORS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::unique_dim",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_consecutive",
}
# These copy to the host without an operator when the tensor is on the CPU already.
_WAITING_METHODS = {
    torch.Tensor.tolist: "tolist",
    torch.Tensor.numpy: "numpy",
    torch.Tensor.cpu: "cpu",
    torch.Tensor.__array__: "__array__",
}


class OperatorCounter:
    """A context manager that counts operator calls and host syncs on the CPU, where a sync costs nothing.

    `operators` maps an operator's name to its calls; `host_syncs` is how often the host would have waited. A copy to
    the CPU by `.to("cpu")` is not an operator here and is not seen. Copies between the CPU and another device count
    where they block; the meta device stands for a GPU.

    The CPU stands for a GPU too: what the suite does on a CPU alone, where a value is at hand, it does not do here.
    """

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._modes = (mock.patch.object(tables, "value_at_hand", return_value=None), _Dispatched(self), _Called(self))

    @property
    def host_syncs(self) -> int:
        """How often the host would have waited."""
        return self.waits.total()

    @property
    def calls(self) -> int:
        """Of all operators."""
        return self.operators.total()

    @property
    def collectives(self) -> int:
        """Calls that speak to other ranks."""
        return sum(n for name, n in self.operators.items() if name.startswith(("c10d::", "_c10d_functional::")))

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*exception)


class _Dispatched(TorchDispatchMode):
    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        self.counter.operators[name] += 1
        masked = name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in _WAITING_OPERATORS or masked or _blocking_copy(name, args, kwargs or {}):
            self.counter.waits[name] += 1
        return func(*args, **(kwargs or {}))


def _blocking_copy(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a tensor is copied between the CPU and another device while the host waits."""
    if name == "aten::_to_copy":
        devices = {args[0].device.type, torch.device(kwargs.get("device") or args[0].device).type}
        blocks = not kwargs.get("non_blocking")
    elif name == "aten::copy_":
        devices = {args[0].device.type, args[1].device.type}
        blocks = not (kwargs.get("non_blocking") or args[2:3] == (True,))
    else:
        return False
    return blocks and len(devices) == 2 and "cpu" in devices


class _Called(TorchFunctionMode):
    def __init__(self, counter: OperatorCounter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITING_METHODS:
            self.counter.waits[_WAITING_METHODS[func]] += 1
        if (
            func in (torch.tensor, torch.as_tensor)
            and torch.device((kwargs or {}).get("device") or "cpu").type != "cpu"
        ):
            self.counter.waits[func.__name__] += 1  # from memory that is not pinned
        return func(*args, **(kwargs or {}))
