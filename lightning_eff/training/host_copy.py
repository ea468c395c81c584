"""Values on their way from the device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor that is queued behind the work so far, and waited for where it is read.

    Reading it one step later does not block, as the device has long come that far.

    Attributes:
        source: the tensor on the device, for whoever keeps state: it is to be written no more.

    Example:
        >>> values = torch.tensor([1.0, 2.0])
        >>> copy = HostCopy(values)
        >>> _ = values.zero_()
        >>> copy.read()
        tensor([1., 2.])
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self.source = tensor
        self._event: Any = None
        if tensor.is_cuda:
            self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()
        else:
            self._copy = tensor.to("cpu", copy=True)

    def read(self) -> Tensor:
        """The values; waits for the work that was queued when the copy was made, and for nothing after it."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._copy
