"""One bucket's way through a step: dense tensors beside the compressed ones, and error feedback around them.

All schemes of error feedback run on one memory E for each matrix, added to the gradient before the compressor C. With
R = (G + E) - C(G + E) what is not sent, and v the running average v <- v + eta (G - v):

    EF14 (Seide et al. 2014, Karimireddy et al., arXiv 1901.09847): E <- R, the optimizer gets mean C(G + E).
    EF21-SGDM (Fatkhullin et al., arXiv 2305.15155): E <- R - v, and the optimizer gets h <- h + eta mean C(G + E).
    EF21 (Richtarik et al., arXiv 2106.05203) is that with eta = 1, where v is G and need not be kept.

Written with E, EF21's local estimate is h_i = (1 - eta) v_i - eta E_i: it moves by eta C(G + E), as in the papers,
which send C(v - h_i), and h is its mean over the ranks. So a compressor needs to know of none of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_eff.compression.interface import AllReduce, Bucket, Collective, Compressor, choose

Memory = dict[str, dict[str, Tensor]]
"""By parameter name: ``error`` (E), ``momentum`` (v, EF21-SGDM), ``estimate`` (h), and what the compressor keeps."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a bucket's flat memory, and as which matrix."""

    name: str
    offset: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.rows * self.columns

    @property
    def stream(self) -> int:
        """A number in [0, 2^32) made from the name: the same in every run, on every rank, in every bucket."""
        return zlib.crc32(self.name.encode())


@dataclass
class Step:
    """What the buckets of one step have in common.

    Attributes:
        number: optimizer steps done so far.
        reduction: which reduction since the last optimizer step, from 0: manual optimization may have several.
        rank: of this process.
        world_size: number of ranks.
        scale: 0-d tensor, what a GradScaler has multiplied the loss with; None for 1.
        measure: also measure what is left out.
        accepted: see :class:`Bucket`; set by the caller before a bucket's last resume.
        squares: of what was to be sent and of what was not, summed over matrices; filled when measuring.
    """

    number: int
    rank: int
    world_size: int
    scale: Tensor | None = None
    measure: bool = False
    reduction: int = 0
    accepted: Tensor | None = None
    squares: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def seed(self, compressor: Compressor) -> int:
        """Of this reduction's random numbers, in [0, 2^64); equal on all ranks, and after a resume."""
        return ((compressor.seed << 32 | self.number & 0xFFFFFFFF) + self.reduction * _ODD) % 2**64


_ODD = 0x9E3779B97F4A7C15  # of the golden ratio: its multiples lie far apart in 64 bits


class Stage(NamedTuple):
    """Collectives to be launched together; nothing is overwritten before the last stage's results are sent."""

    requests: list[Collective]
    last: bool


BucketExchange = Generator[Stage, list[Tensor], None]


@torch.no_grad()
def exchange_bucket(
    compressor: Compressor,
    buffer: Tensor,
    compressed: Sequence[Slot],
    dense: Sequence[Slot],
    memory: Memory,
    step: Step,
) -> BucketExchange:
    """Average a bucket over the ranks, in place.

    A generator that yields stages and is sent the results of their collectives. ``step.accepted`` must be known when
    it is resumed from the last one.

    Args:
        compressor: with its settings.
        buffer: flat, this rank's gradients.
        compressed: the tensors that are compressed, if the step is not one of the dense ones.
        dense: the others.
        memory: of all parameters; new ones are added.
        step: what is the same for all buckets.
    """
    scheme, world_size = compressor.error_feedback, step.world_size
    unscale = step.scale is not None and compressor.keeps_memory
    if unscale:
        assert step.scale is not None
        _in_float32_(buffer, Tensor.div_, step.scale)  # the memory outlives a change of scale, so it is kept unscaled
    starting: list[Slot] = []
    if step.number < compressor.start_step:
        compressed, dense = [], [*dense, *compressed]
    elif scheme in ("ef21", "ef21m"):
        # An estimate begins with a gradient that all ranks know.
        starting = [slot for slot in compressed if "estimate" not in memory.get(slot.name, {})]
        compressed = [slot for slot in compressed if slot not in starting]
        dense = [*dense, *starting]

    if not compressed and not starting:
        yield Stage([AllReduce(buffer.div_(world_size))], last=True)
    else:
        if compressed:
            mean = yield from _exchange_matrices(
                compressor, buffer, compressed, _pack(buffer, dense, world_size), memory, step
            )
        else:
            (mean,) = yield Stage([AllReduce(_pack(buffer, dense, world_size))], last=True)
        for slot in starting:
            memory[slot.name] = _begin(_matrix(buffer, slot), scheme, step.accepted)
        if len(mean):
            parts = torch.split(mean, [slot.numel for slot in dense])
            torch._foreach_copy_([_flat(buffer, slot) for slot in dense], list(parts))
            for slot, part in zip(
                dense[len(dense) - len(starting) :], parts[len(dense) - len(starting) :], strict=True
            ):
                estimate = part.to(torch.float32).view(slot.rows, slot.columns).clone()
                memory[slot.name]["estimate"] = choose(step.accepted, estimate, torch.zeros_like(estimate))
    # A step that is not finite stays so for a GradScaler and for callbacks, also where a compressor has not sent it.
    if unscale or (step.accepted is not None and not compressor.shows_nonfinite):
        scale = step.scale if unscale and step.scale is not None else torch.ones((), device=buffer.device)
        nan = torch.full_like(scale, torch.nan)
        factor = scale if step.accepted is None else torch.where(step.accepted, scale, nan)
        _in_float32_(buffer, Tensor.mul_, factor)


def fingerprint(numbers: Tensor, dtype: torch.dtype, world_size: int) -> Tensor:
    """Numbers that are equal on two ranks if these hold the same integers, and hardly ever if not.

    Args:
        numbers: int64 (n,).
        dtype: floating, in which the result is to be summed over the ranks: exactly, in any order.
        world_size: number of ranks.

    Returns:
        (3,); empty where ``dtype`` has too few digits for so many ranks.

    Example:
        >>> fingerprint(torch.tensor([3, 5, 8]), torch.bfloat16, world_size=2).tolist()
        [16.0, 98.0, 37.0]
    """
    base = int(2 / torch.finfo(dtype).eps) // world_size  # all integers up to 2 / eps are numbers of the dtype
    if base < 2:
        return numbers.new_empty(0, dtype=dtype)
    places = torch.arange(1, len(numbers) + 1, device=numbers.device)
    sums = torch.stack([numbers.sum(), (numbers * numbers).sum(), (numbers * places).sum()])
    return sums.remainder_(base).to(dtype)


def finish(exchange: Generator[Any, Any, Any], results: Any, error: str) -> None:
    """Resume a generator that must end now."""
    try:
        exchange.send(results)
    except StopIteration:
        return
    raise RuntimeError(error)


def _exchange_matrices(
    compressor: Compressor,
    buffer: Tensor,
    slots: Sequence[Slot],
    packed: Tensor,
    memory: Memory,
    step: Step,
) -> Generator[Stage, list[Tensor], Tensor]:
    """The compressed part; the dense tensors, ``packed``, travel in one of its buffers where dtypes allow.

    No tensor is held here while a collective is under way: all buckets of a step may wait at once.

    Returns:
        The mean of the dense tensors.
    """
    gradients = [_matrix(buffer, slot) for slot in slots]
    kept = [memory.setdefault(slot.name, {}) if compressor.keeps_memory else {} for slot in slots]
    bucket = Bucket(
        names=[slot.name for slot in slots],
        gradients=gradients,
        errors=_errors(compressor, gradients, kept, step),
        memory=kept,
        streams=[slot.stream for slot in slots],
        seed=step.seed(compressor),
        step=step.number,
        rank=step.rank,
        world_size=step.world_size,
    )
    before = _square([bucket.input(index) for index in range(len(slots))]) if step.measure else None
    check = not compressor.shows_nonfinite
    if check:
        sums = torch.stack([gradient.sum(dtype=torch.float32) for gradient in gradients])
        packed = torch.cat([packed, sums.sum().mul_(0).to(buffer.dtype).view(1)])  # 0, or NaN
    exchange = compressor.exchange(bucket)
    mean = packed.new_empty(0)
    results: list[Any] = [None]
    for stage in range(1, compressor.collectives + 1):
        last = stage == compressor.collectives
        requests: list[Collective] = [exchange.send(results.pop(0))]
        if last and bucket.agreed is not None:
            agreed = fingerprint(bucket.agreed, buffer.dtype, step.world_size)
            packed = torch.cat([packed, agreed])
        shape, numel = requests[0].tensor.shape, requests[0].tensor.numel()
        joined = isinstance(requests[0], AllReduce) and requests[0].tensor.dtype == packed.dtype and len(packed) > 0
        if joined:
            requests[0] = AllReduce(torch.cat([requests[0].tensor.flatten(), packed]))
        elif last and len(packed):
            requests.append(AllReduce(packed))
        if joined or last:
            packed = packed.new_empty(0)
        results = yield Stage(requests, last)
        del requests
        if joined:
            mean = torch.cat([mean, results[0][numel:]])
            results[0] = results[0][:numel].view(shape)
        elif last and len(results) > 1:
            mean = torch.cat([mean, results.pop()])
    if bucket.agreed is not None:
        mean, found = mean[: len(mean) - len(agreed)], mean[len(mean) - len(agreed) :]
        if not torch.equal(found, agreed * step.world_size):
            raise RuntimeError(
                f"{type(compressor).__name__}: the ranks do not send the same rows of {', '.join(bucket.names)}, so "
                "their averages would be wrong. Unlike CPUs may round sums differently: train on equal machines"
            )
    bucket.accepted = step.accepted
    momenta = _momenta(compressor, bucket)
    finish(
        exchange,
        results.pop(0),
        f"{type(compressor).__name__}.exchange yields more than collectives={compressor.collectives}",
    )
    if before is not None and bucket.errors is not None:
        step.squares.append((before, _square(bucket.errors)))
    if momenta is not None:
        _follow(compressor, bucket, momenta)
    return mean[:-1] if check else mean


def _errors(
    compressor: Compressor, gradients: list[Tensor], kept: list[dict[str, Tensor]], step: Step
) -> list[Tensor] | None:
    if compressor.error_feedback != "none":
        for gradient, entry in zip(gradients, kept, strict=True):
            if "error" not in entry:
                entry["error"] = torch.zeros_like(gradient, dtype=torch.float32)
        return [entry["error"] for entry in kept]
    # What is left out is what an error memory would take up.
    return [torch.zeros_like(gradient, dtype=torch.float32) for gradient in gradients] if step.measure else None


def _begin(gradient: Tensor, scheme: str, accepted: Tensor | None) -> dict[str, Tensor]:
    """EF21's memory after a first dense step: h_i = v_i = G, so E = -G."""
    gradient = gradient.to(torch.float32)
    zeros = torch.zeros_like(gradient)
    memory = {"error": choose(accepted, -gradient, zeros)}
    if scheme == "ef21m":
        memory["momentum"] = choose(accepted, gradient.clone(), zeros)
    return memory


def _momenta(compressor: Compressor, bucket: Bucket) -> list[Tensor] | None:
    """EF21's v, moved on by this step's gradients, which are about to be overwritten."""
    if compressor.error_feedback not in ("ef21", "ef21m"):
        return None
    gradients = [gradient.to(torch.float32, copy=True) for gradient in bucket.gradients]
    if compressor.error_feedback == "ef21":
        return gradients
    old = [entry["momentum"] for entry in bucket.memory]
    return [
        bucket.if_accepted(*pair) for pair in zip(torch._foreach_lerp(old, gradients, compressor.eta), old, strict=True)
    ]


def _follow(compressor: Compressor, bucket: Bucket, momenta: list[Tensor]) -> None:
    """EF21 behind the compressor: the memory is moved on, and the gradients become the estimate."""
    eta = 1.0 if compressor.error_feedback == "ef21" else compressor.eta
    for gradient, entry, momentum in zip(bucket.gradients, bucket.memory, momenta, strict=True):
        entry["error"] = bucket.if_accepted(entry["error"] - momentum, entry["error"])
        if "momentum" in entry:
            entry["momentum"] = momentum
        estimate = torch.add(entry["estimate"], gradient, alpha=eta)
        entry["estimate"] = bucket.if_accepted(estimate, entry["estimate"])
        gradient.copy_(estimate)


def _pack(buffer: Tensor, slots: Sequence[Slot], world_size: int) -> Tensor:
    """This rank's part of the mean of some tensors, flat and beside each other."""
    return torch.cat([buffer.new_empty(0), *(_flat(buffer, slot) for slot in slots)]).div_(world_size)


def _in_float32_(buffer: Tensor, operation: Callable[..., Any], factor: Tensor) -> None:
    """Multiply or divide in place by a 0-d float32 tensor, which a GPU would round to a buffer's 16 bits first."""
    if buffer.element_size() >= 4:
        operation(buffer, factor)
    else:
        wide = buffer.to(torch.float32)
        operation(wide, factor)
        buffer.copy_(wide)


def _flat(buffer: Tensor, slot: Slot) -> Tensor:
    return buffer[slot.offset : slot.offset + slot.numel]


def _matrix(buffer: Tensor, slot: Slot) -> Tensor:
    return _flat(buffer, slot).view(slot.rows, slot.columns)


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(list(tensors))).square().sum()
