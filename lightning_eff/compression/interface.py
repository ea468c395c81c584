"""What a compressor is: a generator that yields collectives, and what it says of itself.

A compressor never calls ``torch.distributed``. It yields what is to be exchanged and is sent the result, so that the
same code runs behind DDP's hook, where the exchanges of several buckets overlap with the backward pass, and over any
number of ranks inside one process, in a test or a simulation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_eff.arguments import check_choice, check_count, check_number

ErrorFeedback = Literal["none", "ef14", "ef21", "ef21m"]


def kept_count(number: int, ratio: float) -> int:
    """How many of so many rows or elements a ratio keeps: rounded down, and at least one."""
    return max(1, int(number * ratio))


def all_reduce_bytes(payload: float, world_size: int) -> float:
    """What one rank sends in a ring all-reduce of ``payload`` bytes.

    Args:
        payload: bytes of the tensor, on each rank.
        world_size: number of ranks.

    Example:
        >>> all_reduce_bytes(1000, world_size=4)
        1500.0
    """
    _check_sent(payload, world_size)
    return 2 * (world_size - 1) / world_size * payload


def all_gather_bytes(payload: float, world_size: int) -> float:
    """What one rank sends in a ring all-gather of ``payload`` bytes from each rank.

    Args:
        payload: bytes from each rank.
        world_size: number of ranks.

    Example:
        >>> all_gather_bytes(1000, world_size=4)
        3000
    """
    _check_sent(payload, world_size)
    return (world_size - 1) * payload


def all_to_all_bytes(payload: float, world_size: int) -> float:
    """What one rank sends of its ``payload`` bytes in an all-to-all: all but its own part.

    Args:
        payload: bytes of a rank, its own part included.
        world_size: number of ranks.

    Example:
        >>> all_to_all_bytes(1000, world_size=4)
        750.0
    """
    _check_sent(payload, world_size)
    return (world_size - 1) / world_size * payload


def _check_sent(payload: float, world_size: int) -> None:
    check_number("payload", payload, least=0, unit="bytes")
    check_count("world_size", world_size)


@dataclass(frozen=True)
class AllReduce:
    """Sum a tensor over the ranks, in place: the result is the same tensor."""

    tensor: Tensor

    def bytes_sent(self, world_size: int) -> float:
        """Bytes that one rank sends."""
        return all_reduce_bytes(self.tensor.nbytes, world_size)


@dataclass(frozen=True)
class AllGather:
    """Collect a flat tensor of k elements, equally long on all ranks: the result is (world size, k)."""

    tensor: Tensor

    def bytes_sent(self, world_size: int) -> float:
        """Bytes that one rank sends."""
        return all_gather_bytes(self.tensor.nbytes, world_size)


@dataclass(frozen=True)
class AllToAll:
    """Send row r of a (world size, k) tensor to rank r: row r of the result came from rank r."""

    tensor: Tensor

    def bytes_sent(self, world_size: int) -> float:
        """Bytes that one rank sends."""
        return all_to_all_bytes(self.tensor.nbytes, world_size)


Collective: TypeAlias = AllReduce | AllGather | AllToAll
Exchange: TypeAlias = Generator[Collective, Tensor, None]


@dataclass
class Bucket:
    """The gradients of one DDP bucket that a compressor is to average over the ranks in one step.

    Attributes:
        names: of the parameters, clean.
        gradients: (n, m) each, this rank's, views into DDP's memory. They stay as they are until the last collective
            is done; then the compressor overwrites them with the mean over the ranks of what these sent.
        errors: float32 (n, m) each, to be added to the gradients before they are compressed; None for none. The
            compressor replaces them by what it has not sent, where ``accepted``.
        memory: for each matrix a dict for what the compressor itself keeps from step to step. It is saved with
            checkpoints; tensors only.
        streams: for each matrix a number in [0, 2^32), made from its name.
        seed: of this step, in [0, 2^64); equal on all ranks.
        step: the optimizer steps done so far.
        rank: of this process.
        world_size: number of ranks.
        accepted: 0-d bool, equal on all ranks, there once the last collective is done: whether everything that was
            exchanged in this step is finite. Only then may ``errors`` and ``memory`` change.
        agreed: int64 (n,), numbers that follow from what was exchanged and have to be equal on all ranks, for the
            compressor to set before its last request: a fingerprint travels along, and where one differs, training
            ends with a RuntimeError. On the CPU only, since a GPU would be waited for.
    """

    names: list[str]
    gradients: list[Tensor]
    errors: list[Tensor] | None
    memory: list[dict[str, Tensor]]
    streams: list[int]
    seed: int
    step: int
    rank: int
    world_size: int
    accepted: Tensor | None = None
    agreed: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the gradients are."""
        return self.gradients[0].device

    def input(self, index: int) -> Tensor:
        """What is to be compressed of one matrix, in float32: gradient plus error in new memory, or the gradient.

        Made anew in every call: what an exchange holds while it waits adds up over all buckets of a step.
        """
        gradient = self.gradients[index].to(torch.float32)
        return gradient if self.errors is None else gradient + self.errors[index]

    def keep(self, index: int, unsent: Tensor) -> None:
        """Make ``unsent``, float32 (n, m) in memory of its own, the error of one matrix, where accepted."""
        if self.errors is not None:
            self.errors[index].copy_(self.if_accepted(unsent, self.errors[index]))

    def if_accepted(self, new: Tensor, old: Tensor) -> Tensor:
        """One of two tensors; a GPU is not waited for."""
        return choose(self.accepted, new, old)


def choose(accepted: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """``new`` where ``accepted`` (or None), else ``old``: on the CPU the answer is at hand, a GPU is not waited for."""
    if accepted is None:
        return new
    if accepted.device.type == "cpu":
        return new if accepted else old
    return torch.where(accepted, new, old)


class Compressor(ABC):
    """Averages the matrices of a bucket over the ranks with fewer bytes than an all-reduce of them.

    A compressor of your own has ``bytes_sent`` and ``exchange``, and says how many collectives a bucket takes.

    Args:
        error_feedback: what becomes of the part of a gradient that is not sent. ``"none"``: it is lost. ``"ef14"``: it
            is added to the next gradient. ``"ef21"``: what is sent are differences to a running estimate of the
            gradient. ``"ef21m"``: the same of the gradients' running average (momentum).
        eta: weight of the newest gradient in that average, in (0, 1]; 1 is ``"ef21"``.
        start_step: steps at the beginning that are reduced dense.
        min_numel: smaller matrices go dense, as all vectors do.
        seed: of the random numbers; the same on all ranks.

    Raises:
        ValueError: an argument out of its range.
    """

    collectives: ClassVar[int] = 1
    """How many collectives ``exchange`` yields."""

    schemes: ClassVar[tuple[ErrorFeedback, ...]] = get_args(ErrorFeedback)
    """The values of ``error_feedback`` that make sense for this compressor."""

    shows_nonfinite: ClassVar[bool] = False
    """Whether a NaN or infinity anywhere in the inputs shows in what is exchanged. If not, one number that tells is
    sent along with each bucket, for one more pass over it, and the averages of such a step are NaN: a GradScaler and
    callbacks have to see what plain DDP would show them."""

    whole_buckets: ClassVar[bool] = False
    """Take a bucket as one matrix of one row, vectors included. Such a compressor has no error feedback."""

    def __init__(
        self,
        error_feedback: ErrorFeedback = "none",
        eta: float = 0.1,
        start_step: int = 0,
        min_numel: int = 4096,
        seed: int = 0,
    ) -> None:
        check_choice("error_feedback", error_feedback, self.schemes)
        check_number("eta", eta, above=0, most=1)
        check_count("start_step", start_step, least=0)
        check_count("min_numel", min_numel, least=0)
        check_count("seed", seed, least=0, most=2**32 - 1)
        self.error_feedback: ErrorFeedback = error_feedback
        self.eta = eta
        self.start_step = start_step
        self.min_numel = min_numel
        self.seed = seed

    @property
    def keeps_memory(self) -> bool:
        """Whether something is kept from step to step, and saved with checkpoints."""
        return self.error_feedback != "none"

    @property
    def judges_steps(self) -> bool:
        """Whether it has to be known if a step is finite: for what is kept, or as the averages would not show it."""
        return self.keeps_memory or not self.shows_nonfinite

    @abstractmethod
    def bytes_sent(self, rows: int, columns: int, itemsize: int, world_size: int) -> float:
        """Bytes that one rank sends for a matrix when it is compressed; it goes dense if that is hardly less.

        Args:
            rows: n.
            columns: m.
            itemsize: bytes of an element of the gradient.
            world_size: number of ranks.
        """

    @abstractmethod
    def exchange(self, bucket: Bucket) -> Exchange:
        """Average ``bucket.gradients`` over the ranks, in place; see :class:`Bucket` for what has to be kept.

        A generator that yields exactly ``collectives`` requests, the same on every rank, and is sent each one's
        result. It must not wait for the device, and hold no
        more than it needs while it waits for a result: all buckets of a step may wait at once.
        """

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"

    def _arguments(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
