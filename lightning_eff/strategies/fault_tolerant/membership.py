"""Who takes part in a fault-tolerant run, and what they do together, as each process of a replica sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # torchft is an extra
    from lightning_eff.strategies.fault_tolerant.process_group import Gloo

T = TypeVar("T")


class Membership(ABC):
    """This replica among the others.

    A step is: `begin`, then collectives by `within`, then `commit`; after the update `settle`, or if it was not
    committed `again`, and so on. Whatever else all replicas do together goes through `agree`.

    Args:
        index: of this replica, the same after a restart.
        count: the largest number of replicas.
        seed: of the run; the writer's holds for all.
    """

    def __init__(self, index: int, count: int, seed: int) -> None:
        self.index = index
        self.count = count
        self.seed = seed
        self.members: list[int] = []
        """Indices of those who take part, in the order of their ranks; empty before the first step."""
        self.writer: int | None = None
        """Index of the member that writes checkpoints and logs."""
        self.aborts = 0
        """Attempts that failed since the run began."""
        self.waited = 0.0
        """Seconds that the last change of membership or failure cost this replica."""
        self.in_attempt = False
        """Whether a step has begun that is not settled."""
        self.joins_a_retry = False
        """Whether the others repeat a step that this replica has not begun: what they did before they do not repeat."""
        self.finishing = False
        """Whether the run is over, so that nobody waits for long any more."""
        self.all_leave = False
        """After `begin`: whether all have said that they leave, so that nobody would be left who knows the run."""

    def take_waited(self) -> float:
        """`waited`, once for each change or failure."""
        waited, self.waited = self.waited, 0.0
        return waited

    @property
    def joined(self) -> bool:
        """Whether this replica is one of the members."""
        return bool(self.members)

    @property
    def is_writer(self) -> bool:
        """Whether this replica writes checkpoints and logs."""
        return self.writer == self.index

    @property
    @abstractmethod
    def step(self) -> int:
        """Committed steps."""

    @abstractmethod
    def start_at(self, step: int) -> None:
        """The number of committed steps before the run begins, after a checkpoint has been loaded."""

    @abstractmethod
    def begin(self) -> bool:
        """Meet the others before a step; whoever lags behind has their state afterwards.

        Returns:
            Whether the run begins: nobody here has made a step in it. So also if those who have made one died when they
            had handed over their state.
        """

    @abstractmethod
    def within(self, operation: Callable[[Gloo], T], instead: T) -> T:
        """An operation of all members within a step; if it fails the step fails, and the result is ``instead``."""

    @abstractmethod
    def last_part(self) -> None:
        """The last micro-batch begins, which is all that those who repeat a step do together."""

    @abstractmethod
    def commit(self) -> bool:
        """Whether the step is good on this replica. If it is, apply it and `settle`; if not, go on with `again`."""

    @abstractmethod
    def again(self) -> bool:
        """Meet the others after a step that failed here.

        Returns:
            True if a peer had committed it: this replica has its result now, as if it had committed it itself.
        """

    @abstractmethod
    def settle(self, operation: Callable[[Gloo], T], alone: T) -> T:
        """Leave the step, when all have committed it; in an operation as `agree` has it."""

    @abstractmethod
    def agree(self, operation: Callable[[Gloo], T], alone: T) -> T:
        """An operation of all members between steps, which gives the same result to each of them.

        Args:
            operation: collective; of this replica's values, with a result that ``torch.load(weights_only=True)`` can
                read. Repeated when a member is lost on the way.
            alone: the result if the run is over and nobody else is there any more.
        """

    def finish(self) -> None:
        """The run is over; nobody waits for long any more."""
        self.finishing = True

    def has_healed(self, state: dict[str, Any]) -> None:  # noqa: B027
        """This process has taken a peer's state, in a call that is not over."""

    def goes_on(self, more: bool) -> None:
        """After `settle`: whether the step has another part, or is over."""
        self.in_attempt = more

    @abstractmethod
    def leave(self, status: int = 0) -> None:
        """Take leave between two steps: after some more steps with the others this process ends.

        For a machine that is about to be taken away. The others go on without a pause, where after a death they would
        wait for the heartbeat timeout: it passes while this replica still takes part, and no heartbeat of it comes.
        The steps last for about `Limits.heartbeat_timeout`. Where all leave there are no such steps: see `all_leave`.

        Args:
            status: the exit status of this process.
        """

    @abstractmethod
    def depart(self) -> None:
        """End this process as `leave` has said, at once.

        Raises:
            SystemExit: always.
        """

    @abstractmethod
    def close(self) -> None:
        """End the connections."""

    def shown(self) -> dict[str, Any]:
        """What the other processes of this replica have to know."""
        return {
            "members": self.members,
            "writer": self.writer,
            "seed": self.seed,
            "aborts": self.aborts,
            "waited": self.waited,
            "in_attempt": self.in_attempt,
            "joins_a_retry": self.joins_a_retry,
            "all_leave": self.all_leave,
            "step": self.step,
        }
