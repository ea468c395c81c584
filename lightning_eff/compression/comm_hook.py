"""DDP's communication hook: the exchanges of all buckets of a step, launched in one order on every rank.

The first collective of bucket b is launched, then the next ones of the buckets before it, whose earlier results have
travelled while the backward pass went on. Everything is launched from the hook itself: what a ``Future.then`` launches
comes in another order on every rank. In the last bucket's call the rest is drained. Where it has to be known whether
the step is finite, which is known when all of it has been exchanged, gradients and memories are written only then; else
a bucket is written as soon as a later bucket's call finds that it has arrived.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with classes, not with strings.

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_eff.arguments import check, check_instance
from lightning_eff.compression.exchange import (
    BucketExchange,
    Memory,
    Slot,
    Stage,
    Step,
    exchange_bucket,
    finish,
)
from lightning_eff.compression.interface import (
    AllGather,
    AllReduce,
    Collective,
    Compressor,
    all_reduce_bytes,
)
from lightning_eff.compression.plan import as_matrix, in_memory_order, pays


@dataclass
class Traffic:
    """What was sent since the start of the run.

    Attributes:
        steps: backward passes that were reduced.
        bytes_sent: by this rank, as the ring algorithms send the tensors that were exchanged.
        dense_bytes: what plain DDP would have sent.
        collectives: launched.
        last_bytes: of the last step.
        last_dense_bytes: of the last step.
    """

    steps: int = 0
    bytes_sent: float = 0.0
    dense_bytes: float = 0.0
    collectives: int = 0
    last_bytes: float = 0.0
    last_dense_bytes: float = 0.0


@dataclass
class _Running:
    """A bucket whose exchange is not done.

    What was launched is kept until it has been waited for: a collective may still read its input.
    """

    exchange: BucketExchange
    future: torch.futures.Future[Tensor]
    buffer: Tensor
    launched: list[tuple[dist.Work, Collective, Tensor]] = field(default_factory=list)
    last: bool = False

    def has_arrived(self) -> bool:
        """Whether nothing more has to be sent or waited for. It may differ from rank to rank."""
        return self.last and all(work.is_completed() for work, _, _ in self.launched)

    def wait(self) -> list[Tensor]:
        """The results of what was launched last."""
        launched, self.launched = self.launched, []
        for work, _, _ in launched:
            work.wait()
        return [tensor for _, _, tensor in launched]


class CompressedReduction:
    """Averages DDP's gradients with a compressor, in any loop; the strategies register it by themselves.

    Args:
        compressor: with its settings.
        parameters: the model's, by clean name. Memories are kept by these names, so they do not depend on how DDP
            makes its buckets.
        step: called once a backward pass: the number of optimizer steps done so far, the same on all ranks.
        scale: called once a backward pass: what a GradScaler has multiplied the loss with, a tensor of one element,
            or None.

    Attributes:
        memory: what is kept from step to step, by parameter name.
        traffic: counters.
        measure_next: set it to measure in the next step what is left out.
        left_out: of the last step that was measured: squared norms of what was to be sent and of what was not, a
            tensor of two numbers, this rank's.

    Raises:
        ValueError: an argument of a wrong type.

    Example, behind ``ddp = DistributedDataParallel(model)`` on each rank, ``steps`` being the loop's own count::

        reduction = CompressedReduction(ArcTopK(), dict(model.named_parameters()), lambda: steps)
        reduction.register(ddp)
    """

    def __init__(
        self,
        compressor: Compressor,
        parameters: Mapping[str, nn.Parameter],
        step: Callable[[], int],
        scale: Callable[[], Tensor | None] = lambda: None,
    ) -> None:
        check_instance("compressor", compressor, Compressor, "a Compressor, such as ArcTopK()")
        named = isinstance(parameters, Mapping) and all(isinstance(p, nn.Parameter) for p in parameters.values())
        check(
            "parameters", parameters, named, "a dictionary of names and parameters, as dict(model.named_parameters())"
        )
        check("step", step, callable(step), "a function without arguments")
        check("scale", scale, callable(scale), "a function without arguments")
        self.compressor = compressor
        self.memory: Memory = {}
        self.traffic = Traffic()
        self.measure_next = False
        self.left_out: Tensor | None = None
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._current_step = step
        self._scale = scale
        self._plans: dict[tuple[int, ...], tuple[list[Slot], list[Slot]]] = {}
        self._step: Step | None = None
        self._running: list[_Running] = []
        self._sums: list[Tensor] = []  # of all that came back in this step, where the step is judged
        self._reduced = -1, 0  # the optimizer step and which reduction in it

    def register(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        """Let a model wrapped by DDP reduce its gradients so."""
        ddp.register_comm_hook(self, hook)  # type: ignore[no-untyped-call]

    def reduce(self, bucket: dist.GradBucket, group: dist.ProcessGroup | None = None) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
        """Start a bucket's exchange, move on those before it, and finish all of them with the last bucket."""
        buffer = bucket.buffer()
        if bucket.index() == 0 or self._step is None:
            self._begin(group)
        assert self._step is not None
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=[buffer.device] if buffer.device.type == "cuda" else None
        )
        compressed, dense = self._plan(bucket, buffer, self._step.world_size)
        exchange = exchange_bucket(self.compressor, buffer, compressed, dense, self.memory, self._step)
        running = _Running(exchange, future, buffer)
        self._launch(running, next(exchange), group)
        for earlier in self._running:
            self._advance(earlier, group)
        if not self.compressor.judges_steps:
            self._write_arrived()
        self._running.append(running)
        self.traffic.last_dense_bytes += all_reduce_bytes(buffer.nbytes, self._step.world_size)
        if bucket.is_last():
            self._finish(group)
        return future

    def _begin(self, group: dist.ProcessGroup | None) -> None:
        self._running, self._sums = [], []  # of a backward pass that was broken off
        self.traffic.last_bytes = self.traffic.last_dense_bytes = 0.0
        number = self._current_step()
        self._reduced = number, self._reduced[1] + 1 if number == self._reduced[0] else 0
        self._step = Step(
            *(number, dist.get_rank(group), dist.get_world_size(group), self._scale()),
            measure=self.measure_next,
            reduction=self._reduced[1],
        )
        self.measure_next = False

    def _plan(self, bucket: dist.GradBucket, buffer: Tensor, world_size: int) -> tuple[list[Slot], list[Slot]]:  # type: ignore[name-defined]
        """Which tensors of a bucket are compressed: made anew where DDP has made the bucket anew."""
        parameters = bucket.parameters()
        key = tuple(map(id, parameters))
        if key not in self._plans:
            if buffer.layout != torch.strided:
                raise TypeError("sparse gradients are not supported: build embeddings with sparse=False")
            compressed: list[Slot] = []
            dense: list[Slot] = []
            for parameter, gradient in zip(parameters, bucket.gradients(), strict=True):
                shape = in_memory_order(gradient)
                rows, columns = as_matrix(shape)
                slot = Slot(self._names[id(parameter)], gradient.storage_offset(), rows, columns)
                fits = buffer.dtype.is_floating_point and not self.compressor.whole_buckets
                chosen = fits and pays(self.compressor, shape, buffer.element_size(), world_size)
                (compressed if chosen else dense).append(slot)
            whole = (1, buffer.numel())
            if self.compressor.whole_buckets and pays(self.compressor, whole, buffer.element_size(), world_size):
                compressed, dense = [Slot(dense[0].name, 0, *whole)], []
            self._plans[key] = compressed, dense
        return self._plans[key]

    def _launch(self, running: _Running, stage: Stage, group: dist.ProcessGroup | None) -> None:
        assert self._step is not None
        running.last = stage.last
        running.launched = [_launch(request, self._step.world_size, group) for request in stage.requests]
        self.traffic.collectives += len(stage.requests)
        self.traffic.last_bytes += sum(request.bytes_sent(self._step.world_size) for request in stage.requests)

    def _advance(self, running: _Running, group: dist.ProcessGroup | None) -> None:
        """Launch a bucket's next collectives, if it has more."""
        if not running.last:
            self._launch(running, running.exchange.send(self._wait(running)), group)

    def _wait(self, running: _Running) -> list[Tensor]:
        results = running.wait()
        if self.compressor.judges_steps:
            self._sums += [tensor.sum(dtype=torch.float32) for tensor in results]
        return results

    def _write_arrived(self) -> None:
        """Write the buckets that wait for nothing, not even for a judgement of the step, and give their memory back."""
        arrived = [running for running in self._running if running.has_arrived()]
        self._running = [running for running in self._running if running not in arrived]
        for running in arrived:
            self._write(running, running.wait())

    def _write(self, running: _Running, results: list[Tensor]) -> None:
        finish(running.exchange, results, "an exchange goes on behind its last stage")
        running.future.set_result(running.buffer)

    def _finish(self, group: dist.ProcessGroup | None) -> None:
        """Wait for everything, then let each bucket write its gradients and memories."""
        step, traffic = self._step, self.traffic
        assert step is not None
        while any(not running.last for running in self._running):
            for running in self._running:
                self._advance(running, group)
        results = [self._wait(running) for running in self._running]
        if self.compressor.judges_steps:
            # Equal on all ranks, as the bits of what came back are.
            step.accepted = torch.stack(self._sums).sum().isfinite()
        for running in self._running:
            self._write(running, results.pop(0))
        if step.squares:
            self.left_out = torch.stack([torch.stack(pair) for pair in step.squares]).sum(0)
        traffic.steps += 1
        traffic.bytes_sent += traffic.last_bytes
        traffic.dense_bytes += traffic.last_dense_bytes
        self._running, self._step = [], None


def hook(reduction: CompressedReduction, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """For ``DistributedDataParallel.register_comm_hook(reduction, hook)``."""
    return reduction.reduce(bucket)


def _launch(
    request: Collective, world_size: int, group: dist.ProcessGroup | None
) -> tuple[dist.Work, Collective, Tensor]:
    """The collective's handle, its request and the tensor that will hold its result."""
    tensor = request.tensor
    if isinstance(request, AllReduce):
        return dist.all_reduce(tensor, group=group, async_op=True), request, tensor
    if isinstance(request, AllGather):
        result = tensor.new_empty((world_size, tensor.numel()))
        return _all_gather(result.view(-1), tensor, group=group, async_op=True), request, result
    result = torch.empty_like(tensor)
    work = dist.all_to_all_single(result.view(-1), tensor.view(-1), group=group, async_op=True)
    return work, request, result


# The name that torch 2.13 deprecates is the only one that torch 2.8 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
