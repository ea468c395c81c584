"""DDP that outlives its replicas: ``strategy="ddp_ft"``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only as pytorch_rank_zero_only
from torch import Tensor, nn
from torch.distributed import ReduceOp
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer
from typing_extensions import override

from lightning_eff.functional.arguments import check, is_count
from lightning_eff.training.live_state import live_state, load_live_state
from lightning_eff.training.shard_steps import ShardSteps
from lightning_eff.training.shards import ShardedLoader

if TYPE_CHECKING:
    from lightning_eff.training.replicas import Replicas
    from lightning_eff.training.shard_gradients import ShardGradients

OnFailure = Literal["takeover", "mecefo", "shrink"]

# Lightning's barriers around data loaders, which a replica that comes in later has behind it already.
_NO_BARRIER = ("_dataloader()",)


class FaultTolerantDDPStrategy(DDPStrategy):
    """Data parallel training that goes on when replicas die, and takes them back."""

    supports_trainable_change = False  # a replica that comes back would not know what is closed

    rollback_refused = "its replicas would not go back together, and heal each other"  # see training/run_state.py

    def __init__(
        self,
        min_replicas: int = 1,
        max_replicas: int | None = None,
        lighthouse: str | None = None,
        on_failure: OnFailure = "takeover",
        heartbeat_timeout: float = 5.0,
        replica: int | None = None,
        host: str | None = None,
        collective_timeout: float = 60.0,
        connect_timeout: float = 10.0,
        quorum_timeout: float = 600.0,
        quorum_retries: int = 20,
        start_grace: float = 60.0,
        max_aborts: int = 10,
        **kwargs: Any,
    ) -> None:
        _check_torchft()
        check("on_failure", on_failure, on_failure in get_args(OnFailure), f"one of {get_args(OnFailure)}")
        check("min_replicas", min_replicas, is_count(min_replicas), "an integer, at least 1")
        if max_replicas is None:
            max_replicas = _environment_count("NUM_REPLICA_GROUPS", "max_replicas")
        if replica is None:
            replica = _environment_count("REPLICA_GROUP_ID", "replica")
        check("max_replicas", max_replicas, is_count(max_replicas), "an integer, at least 1")
        check("min_replicas", min_replicas, min_replicas <= max_replicas, f"at most max_replicas, {max_replicas}")
        check("replica", replica, 0 <= replica < max_replicas, f"at least 0 and below max_replicas, {max_replicas}")
        for argument, value in (
            ("heartbeat_timeout", heartbeat_timeout),
            ("collective_timeout", collective_timeout),
            ("connect_timeout", connect_timeout),
            ("quorum_timeout", quorum_timeout),
        ):
            check(argument, value, value > 0, "seconds, above 0")
        check("start_grace", start_grace, start_grace >= 0, "seconds, at least 0")
        for refused in ("gradient_as_bucket_view", "static_graph", "ddp_comm_hook"):
            check(
                refused, kwargs.get(refused), not kwargs.get(refused), "left out: ddp_ft has its own hook and buckets"
            )
        self._wants_unused = bool(kwargs.pop("find_unused_parameters", False))
        super().__init__(process_group_backend="gloo", find_unused_parameters=True, **kwargs)
        self.min_replicas = min_replicas
        self.max_replicas = max_replicas
        self.lighthouse = lighthouse or os.environ.get("TORCHFT_LIGHTHOUSE")
        self.on_failure: OnFailure = on_failure
        self.heartbeat_timeout = heartbeat_timeout
        self.replica = replica
        self.host = host or os.environ.get("FT_HOST", "127.0.0.1")
        self.collective_timeout = collective_timeout
        self.connect_timeout = connect_timeout
        self.quorum_timeout = quorum_timeout
        self.quorum_retries = quorum_retries
        self.start_grace = start_grace
        self.max_aborts = max_aborts

        self.replicas: Replicas | None = None
        """The others, while it fits."""
        self._gradients: ShardGradients | None = None
        self._trainer: Trainer | None = None
        self._fitting: _Fit | None = None

    # Where this replica stands.

    @property
    def _joined(self) -> bool:
        return self.replicas is not None and self.replicas.joined

    @property
    def _fit(self) -> _Fit:
        assert self._fitting is not None
        return self._fitting

    @property
    @override
    def global_rank(self) -> int:
        """0 on the replica that writes checkpoints and logs, which may change with every step."""
        if not self._joined:
            first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
            return self.replica if first_start else max(1, self.replica)
        assert self.replicas is not None
        members, writer = self.replicas.members, self.replicas.writer
        if self.replica == writer:
            return 0
        rank = members.index(self.replica)
        return rank if rank > 0 else members.index(writer) if writer in members else 1

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": 1, "rank": 0}

    @override
    def set_world_ranks(self) -> None:
        for each in (rank_zero_only, pytorch_rank_zero_only):
            cast(Any, each).rank = self.global_rank

    # Setting up.

    @override
    def setup_distributed(self) -> None:
        """No process group of torch's: torchft's is made anew with every change of membership."""
        assert self.cluster_environment is not None
        if self.num_nodes * self.num_processes > 1 or self.cluster_environment.world_size() > 1:
            raise MisconfigurationException(
                "ddp_ft has one process and one device per replica: set Trainer(devices=1, num_nodes=1) and start a "
                "replica for each device, with `lightning-eff launch --replicas N`"
            )
        self.set_world_ranks()

    @override
    def setup(self, trainer: Trainer) -> None:
        self._trainer = trainer
        fitting = trainer.state.fn == TrainerFn.FITTING
        assert self.model is not None
        if fitting:
            self._check(trainer)
            self._connect()
        self.accelerator.setup(trainer)  # type: ignore[union-attr]
        self.precision_plugin.convert_module(self.model)
        self.model_to_device()
        if fitting:
            self.configure_ddp()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting and any(isinstance(optimizer, LBFGS) for optimizer in self.optimizers):
            raise MisconfigurationException(
                "ddp_ft evaluates the loss once a step, and all decide together whether it counts; LBFGS evaluates it "
                "several times. Use an optimizer that steps once per gradient"
            )

    def _check(self, trainer: Trainer) -> None:
        module = trainer.lightning_module
        if not module.automatic_optimization:
            raise MisconfigurationException(
                "ddp_ft repeats a step that failed, which it cannot do with steps that training_step makes itself: set "
                "`automatic_optimization = True`"
            )
        if trainer.precision == "16-mixed":
            raise MisconfigurationException(
                "ddp_ft does not agree on the scale of a GradScaler: use precision='bf16-mixed' in place of '16-mixed'"
            )
        if getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
            raise MisconfigurationException("ddp_ft does not support reload_dataloaders_every_n_epochs: set it to 0")

    def _connect(self) -> None:
        from lightning_eff.training.quorum import QuorumManager
        from lightning_eff.training.replicas import Replicas
        from lightning_eff.training.shard_gradients import ShardGradients

        if self.lighthouse is None:
            raise MisconfigurationException(
                "ddp_ft needs a lighthouse: start with `lightning-eff launch --replicas N script.py`, or give "
                "`lighthouse='http://HOST:PORT'` of one that `lightning-eff lighthouse` runs"
            )
        manager = QuorumManager(
            name=f"replica_{self.replica:05d}",
            host=self.host,
            lighthouse=self.lighthouse if "://" in self.lighthouse else f"http://{self.lighthouse}",
            min_replicas=self.min_replicas,
            connect_timeout=timedelta(seconds=self.connect_timeout),
            timeout=timedelta(seconds=self.collective_timeout),
            quorum_timeout=timedelta(seconds=self.quorum_timeout),
            quorum_retries=self.quorum_retries,
            state=self._state,
            load=self._load,
        )
        seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))
        self.replicas = Replicas(
            self.replica,
            self.max_replicas,
            manager,
            self.min_replicas,
            self.start_grace,
            self.max_aborts,
            seed % 2**62,
        )
        self._gradients = ShardGradients(manager)

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        from torchft.process_group import ProcessGroupDummy

        # The buckets must be the same on a replica that comes later. DDP never rebuilds them if it is to find unused
        # parameters.
        return DistributedDataParallel(
            model,
            device_ids=self.determine_ddp_device_ids(),
            process_group=ProcessGroupDummy(0, 1),
            **self._ddp_kwargs,
        )

    @override
    def _register_ddp_hooks(self) -> None:
        from lightning_eff.training.shard_gradients import average_over_shards

        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self._gradients, average_over_shards)

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        trainer = self._trainer
        if trainer is None or not trainer.training:
            return dataloader
        assert self.replicas is not None and self._gradients is not None  # noqa: PT018
        loader = ShardedLoader(
            dataloader, self.max_replicas, seed=self._data_seed, keep=max(1, trainer.accumulate_grad_batches)
        )
        loader.before_fetch = self._before_batch
        steps = ShardSteps(trainer, loader, self._gradients, self.replica)
        steps.own([])
        self._fitting = _Fit(trainer, self.replicas, self._gradients, steps)
        return loader

    @property
    def _data_seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    # State, for a peer and from a peer.

    def _state(self) -> dict[str, Any]:
        return live_state(self._fit.trainer)

    def _load(self, state: dict[str, Any]) -> None:
        load_live_state(self._fit.trainer, state, loops=not self._fit.steps.window)

    # The step.

    def _before_batch(self) -> None:
        """Before each micro-batch is fetched: at the first of a step the replicas meet, and the data follow."""
        fit, loop = self._fit, self._fit.trainer.fit_loop
        if not fit.steps.window:
            if not fit.replicas.joined:
                fit.replicas.manager.set_step(fit.trainer.global_step)
            fit.replicas.begin()
            self._share_out()
            fit.steps.begin()
        index = loop.epoch_loop.batch_progress.current.ready
        fit.steps.window.append(index)
        fit.steps.loader.seek(fit.trainer.current_epoch, index)
        assert loop._data_fetcher is not None
        loop._data_fetcher.fetched = index

    def _share_out(self) -> None:
        """Which shards this replica computes in the step to come."""
        fit = self._fit
        members = fit.replicas.members
        shrinks = self.on_failure == "shrink"
        fit.steps.own([] if shrinks else shares(self.max_replicas, members)[self.replica])
        fit.gradients.divisor = len(members) if shrinks else self.max_replicas
        fit.steps.seed = fit.replicas.seed
        self.set_world_ranks()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self._fit.steps.own_step():
            return super().training_step(*args, **kwargs)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Repeat the step until it is committed; then, and only then, update."""
        fit = self._fit
        while True:
            fit.gradients.begin()
            loss = closure()
            if not fit.gradients.launched:
                raise RuntimeError("training_step returned None: with ddp_ft, as with DDP, every replica needs a loss")
            if fit.replicas.commit():
                super().optimizer_step(optimizer, _Once(loss), model, **kwargs)
                break
            if fit.replicas.again():
                break
            self._share_out()
            fit.steps.repeat()
        fit.replicas.settle()
        fit.steps.end()
        self.set_world_ranks()
        return loss

    # What all living replicas do together.

    def _together(self, operation: Callable[[Any], Any], alone: Any) -> Any:
        if not self._joined:
            return alone
        assert self.replicas is not None
        if self.replicas.in_attempt:
            return self.replicas.within(operation, alone)
        result = self.replicas.agree(operation)
        self.set_world_ranks()
        return result

    @override
    def reduce(self, tensor: Tensor, group: Any = None, reduce_op: ReduceOp | str | None = "mean") -> Tensor:
        """Over the living replicas; what ``training_step`` logs, over all shards that they compute."""
        if not isinstance(tensor, Tensor):
            return tensor
        value = tensor.detach().to("cpu", copy=True)
        name = str(reduce_op).rpartition(".")[2].lower()
        count = None
        if self._fitting is not None:
            value, of_step = self._fit.steps.reduced(value, partial(_combine, name=name))
            if self._fit.steps.aside:
                return tensor
            count = self.max_replicas if of_step and self.on_failure != "shrink" else None
        result: Tensor = self._together(lambda group: _reduce(group, value.clone(), name, count), value)
        return result.to(tensor.device)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return bool(self.reduce(torch.tensor(int(decision)), reduce_op="min" if all else "max"))

    @override
    def barrier(self, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        if name is None or not name.endswith(_NO_BARRIER):
            self.reduce(torch.zeros(1), reduce_op="sum")

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """From the replica that writes."""
        from lightning_eff.training.replicas import send_object

        def operation(group: Any) -> Any:
            replicas = self._fit.replicas
            return send_object(group, obj, replicas.members.index(cast(int, replicas.writer)))

        return self._together(operation, obj)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """From the living replicas, stacked."""
        from lightning_eff.training.replicas import gather_tensors

        if not self._joined:
            return tensor
        value = tensor.detach().cpu()
        result: Tensor = self._together(lambda group: torch.stack(gather_tensors(group, value)), value[None])
        return result.to(tensor.device)

    @override
    def teardown(self) -> None:
        if self._fitting is not None:
            self._fitting.steps.loader.close()
            self._fitting = None
        if self.replicas is not None:
            self.replicas.leave()
            self.replicas = None
        super().teardown()


@dataclass
class _Fit:
    """What there is while the Trainer fits."""

    trainer: Trainer
    replicas: Replicas
    gradients: ShardGradients
    steps: ShardSteps


class _Once:
    """A closure for the optimizer, of a loss that is there already."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.called = False

    def __call__(self) -> Any:
        if self.called:
            raise RuntimeError("ddp_ft evaluates the loss once a step, but the optimizer has asked for it again")
        self.called = True
        return self.loss


def shares(count: int, members: list[int]) -> dict[int, list[int]]:
    """Which shards of dead replicas each living one takes besides its own, evenly.

    >>> shares(4, [0, 2, 3])
    {0: [], 2: [1], 3: []}
    >>> shares(4, [1])
    {1: [0, 2, 3]}
    """
    share: dict[int, list[int]] = {member: [] for member in members}
    for orphan in range(count):
        if orphan not in share:
            neighbour = min(members, key=lambda member: (len(share[member]), (member - orphan) % count))
            share[neighbour].append(orphan)
    return share


_OPERATIONS = {"max": ReduceOp.MAX, "min": ReduceOp.MIN, "product": ReduceOp.PRODUCT}


def _reduce(group: Any, value: Tensor, name: str, count: int | None) -> Tensor:
    from lightning_eff.training.quorum import summed

    total = summed(group, value, _OPERATIONS.get(name, ReduceOp.SUM))
    if name in ("mean", "avg", "none"):
        total = total / (count or group.world)
    return total.to(value.dtype)


def _combine(values: Tensor, name: str) -> Tensor:
    """Those of one replica, before they are reduced over all: a mean is divided in the end."""
    if name in ("max", "min"):
        return values.amax(0) if name == "max" else values.amin(0)
    return values.prod(0) if name == "product" else values.sum(0)


def _check_torchft() -> None:
    try:
        import torchft  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "ddp_ft needs torchft: `pip install 'lightning-eff[ft]'`. It has wheels for Linux on x86-64 only, for "
            "Python 3.9 to 3.13"
        ) from error


def _environment_count(variable: str, argument: str) -> int:
    value = os.environ.get(variable)
    if value is None or not value.isdigit():
        raise ValueError(
            f"{argument} is not given, and the environment variable {variable} is {value!r}: start with "
            "`lightning-eff launch --replicas N script.py`, or give it"
        )
    return int(value)
