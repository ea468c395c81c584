"""All ranks inside one process: the same exchange without a network, for tests and studies of a compressor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_eff.arguments import check_count
from lightning_eff.compression.exchange import Memory, Slot, Step, exchange_bucket, finish
from lightning_eff.compression.interface import AllGather, AllReduce, Collective, Compressor
from lightning_eff.compression.plan import as_matrix, pays


class InProcessRanks:
    """Averages the gradients of several ranks as :class:`~lightning_eff.strategies.CompressedDDPStrategy` would.

    Args:
        compressor: with its settings.
        world_size: number of ranks, >= 1.

    Raises:
        ValueError: ``world_size`` is no integer of at least 1.

    Attributes:
        memories: of each rank, by parameter name.
        steps: done so far.
        bytes_sent: by each rank in all steps.
        left_out: of the last step, the norm of what the ranks did not send as a fraction of what they had to send.

    Example:
        >>> from lightning_eff.compression import BF16
        >>> ranks = InProcessRanks(BF16(), world_size=2)
        >>> ranks.average([{"weight": torch.full((2, 2), 1.0)}, {"weight": torch.full((2, 2), 3.0)}])[0]
        {'weight': tensor([[2., 2.],
                [2., 2.]])}
    """

    def __init__(self, compressor: Compressor, world_size: int) -> None:
        check_count("world_size", world_size)
        self.compressor = compressor
        self.world_size = world_size
        self.memories: list[Memory] = [{} for _ in range(world_size)]
        self.steps = 0
        self.bytes_sent = 0.0
        self.left_out = 0.0

    @torch.no_grad()
    def average(
        self, gradients: Sequence[Mapping[str, Tensor]], scale: float | None = None, measure: bool = False
    ) -> list[dict[str, Tensor]]:
        """One step: each rank's gradients by name in, each rank's averages out.

        Args:
            gradients: for each rank a tensor of the same shape and dtype under each name.
            scale: what a GradScaler has multiplied the loss with.
            measure: also measure ``left_out``.
        """
        shapes = {name: gradient.shape for name, gradient in gradients[0].items()}
        slots: list[Slot] = []
        for name, shape in shapes.items():
            slots.append(Slot(name, sum(slot.numel for slot in slots), *as_matrix(shape)))
        itemsize = next(iter(gradients[0].values())).element_size()
        chosen = [pays(self.compressor, shapes[slot.name], itemsize, self.world_size) for slot in slots]
        compressed = [slot for slot, chose in zip(slots, chosen, strict=True) if chose]
        dense = [slot for slot, chose in zip(slots, chosen, strict=True) if not chose]
        if self.compressor.whole_buckets:
            compressed, dense = [Slot(slots[0].name, 0, 1, sum(slot.numel for slot in slots))], []

        buffers = [torch.cat([gradient.flatten() for gradient in own.values()]) for own in gradients]
        steps = [
            Step(self.steps, rank, self.world_size, None if scale is None else torch.tensor(scale), measure)
            for rank in range(self.world_size)
        ]
        exchanges = [
            exchange_bucket(self.compressor, buffer, compressed, dense, memory, step)
            for buffer, memory, step in zip(buffers, self.memories, steps, strict=True)
        ]
        stages = [next(exchange) for exchange in exchanges]
        finite = torch.tensor(True)
        while True:
            self.bytes_sent += sum(request.bytes_sent(self.world_size) for request in stages[0].requests)
            results = [
                _exchange(list(requests)) for requests in zip(*(stage.requests for stage in stages), strict=True)
            ]
            finite = finite & all(bool(result[0].sum(dtype=torch.float32).isfinite()) for result in results)
            if stages[0].last:
                break
            stages = [exchange.send([r[i] for r in results]) for i, exchange in enumerate(exchanges)]
        for rank, (exchange, step) in enumerate(zip(exchanges, steps, strict=True)):
            step.accepted = finite if self.compressor.judges_steps else None
            finish(exchange, [result[rank] for result in results], "an exchange goes on behind its last stage")
        self.steps += 1
        if measure:
            squares = torch.stack([torch.stack(pair) for step in steps for pair in step.squares] or [torch.zeros(2)])
            had, unsent = squares.sum(0).tolist()
            self.left_out = (unsent / had) ** 0.5 if had else 0.0
        return [
            {slot.name: buffer[slot.offset : slot.offset + slot.numel].view(shapes[slot.name]) for slot in slots}
            for buffer in buffers
        ]


def _exchange(requests: list[Collective]) -> list[Tensor]:
    """What each rank gets."""
    tensors = [request.tensor for request in requests]
    if isinstance(requests[0], AllReduce):
        total = torch.stack(tensors).sum(0)
        return [tensor.copy_(total) for tensor in tensors]
    if isinstance(requests[0], AllGather):
        return [torch.stack([tensor.flatten() for tensor in tensors]) for _ in requests]
    return [torch.stack([tensor[rank] for tensor in tensors]) for rank in range(len(requests))]
