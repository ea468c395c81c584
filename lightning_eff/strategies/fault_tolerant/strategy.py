"""DDP that outlives its replicas: ``strategy="ddp_ft"``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_eff import _launched
from lightning_eff.arguments import (
    check,
    check_choice,
    check_count,
    check_flag,
)
from lightning_eff.strategies.fault_tolerant.comm_hook import average_over_shards
from lightning_eff.strategies.fault_tolerant.evaluation_share import EvaluationShare
from lightning_eff.strategies.fault_tolerant.fit import Fit
from lightning_eff.strategies.fault_tolerant.identity import Identity
from lightning_eff.strategies.fault_tolerant.limits import Limits
from lightning_eff.strategies.fault_tolerant.living_replicas import LivingReplicas
from lightning_eff.strategies.fault_tolerant.mecefo import MeCeFOSettings
from lightning_eff.strategies.fault_tolerant.metrics import Gather, compute_together
from lightning_eff.strategies.fault_tolerant.rendezvous import LeftBehindError, NoQuorumError
from lightning_eff.strategies.fault_tolerant.replica_group import ReplicaGroup
from lightning_eff.strategies.fault_tolerant.sharded_loader import ShardedLoader
from lightning_eff.strategies.fault_tolerant.start import (
    check_optimizers,
    check_processes,
    check_torchft,
    check_trainer,
)
from lightning_eff.strategies.fault_tolerant.writer import adopt_places, begin_at_saved_step, places
from lightning_eff.training.trainer import callbacks_of, sort_callbacks

OnFailure = Literal["takeover", "mecefo", "shrink"]


class FaultTolerantDDP(LivingReplicas):
    """What :class:`FaultTolerantDDPStrategy` does, to be put before the ``DDPStrategy`` of either name of Lightning."""

    rollback_refused = "its replicas would not go back together, and heal each other"

    def __init__(
        self,
        min_replicas: int = 1,
        max_replicas: int | None = None,
        lighthouse: str | None = None,
        on_failure: OnFailure = "takeover",
        heartbeat_timeout: float = 5.0,
        replica: int | None = None,
        host: str | None = None,
        run_id: str | None = None,
        collective_timeout: float = 60.0,
        connect_timeout: float = 10.0,
        quorum_timeout: float = 600.0,
        heal_timeout: float = 300.0,
        quorum_retries: int = 20,
        start_grace: float = 60.0,
        max_aborts: int = 10,
        mecefo_rank: int | float = 0.25,
        mecefo_every_n_steps: int = 100,
        mecefo_attention: list[str] | None = None,
        mecefo_ffn: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        check_torchft()
        check_choice("on_failure", on_failure, OnFailure)
        self.limits = Limits(
            heartbeat_timeout=heartbeat_timeout,
            collective_timeout=collective_timeout,
            connect_timeout=connect_timeout,
            quorum_timeout=quorum_timeout,
            heal_timeout=heal_timeout,
            start_grace=start_grace,
            quorum_retries=quorum_retries,
            max_aborts=max_aborts,
            min_replicas=min_replicas,
        )
        self.identity = Identity.of(replica, max_replicas, host, lighthouse, run_id)
        check_count("min_replicas", min_replicas, most=self.identity.count)
        self._mecefo_settings = MeCeFOSettings(mecefo_rank, mecefo_every_n_steps, mecefo_attention, mecefo_ffn)
        for refused in ("gradient_as_bucket_view", "static_graph", "ddp_comm_hook", "process_group"):
            usual = not kwargs.get(refused)
            check(refused, kwargs.get(refused), usual, "left out: ddp_ft has its own hook, buckets and groups")
        check_flag("find_unused_parameters", kwargs.get("find_unused_parameters", False))
        kwargs.pop("process_group", None)  # LightningCLI gives every argument of DDP
        self._wants_unused = bool(kwargs.pop("find_unused_parameters", False))
        super().__init__(
            self.identity.index, self.identity.count, on_failure == "shrink", find_unused_parameters=True, **kwargs
        )
        self.on_failure: OnFailure = on_failure

    @property
    def trainable_change_refused(self) -> str | None:
        """Why parameters cannot be frozen during a run; see training/trainable.py."""
        if self.on_failure != "mecefo":
            return None
        why = "where attention alone is trained, on_failure='mecefo' leaves a neighbour nothing to compute"
        return f"{why}: take on_failure='takeover'"

    # Setting up.

    @override
    def setup_distributed(self) -> None:
        """No process group of torch's: torchft's is made anew with every change of membership."""
        environment, size = self.cluster_environment, self.num_processes
        assert environment is not None
        check_processes(environment, self.num_nodes, size)
        environment.set_world_size(size)
        if self._group.size != size:  # a strategy may be set up again
            self._group = ReplicaGroup(self.local_rank, size, environment.main_port, self.limits.collective_timeout)
        self.set_world_ranks()

    @override
    def setup(self, trainer: Trainer) -> None:
        module = cast(LightningModule, self.lightning_module)
        fitting = trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check_trainer(trainer, self.on_failure, self.identity)
            self._writes = self.is_global_zero
            mecefo = self._mecefo_settings.of(module) if self.on_failure == "mecefo" else None
            all_used = not self._wants_unused and mecefo is None
            self._fitting = Fit(trainer, self._group, self.identity, self.limits, self.shrinks, all_used, mecefo)
        self.accelerator.setup(trainer)  # type: ignore[union-attr]
        self.precision_plugin.convert_module(cast(nn.Module, self.model))
        self.model_to_device()
        if fitting:
            self.configure_ddp()
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fitting:
            check_optimizers(self.optimizers)
            callbacks_of(trainer).append(self._fit.log)
            sort_callbacks(trainer)
            compute_together(module, Gather(self._gather, lambda: self._rank_and_size()[1]))

    @override
    def configure_ddp(self) -> None:
        if cast(LightningModule, self.lightning_module).automatic_optimization:
            super().configure_ddp()  # in manual optimization `ManualSteps` reduces the gradients

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        from lightning_eff.strategies.fault_tolerant.process_group import Nobody

        # The buckets must be the same on a replica that comes later. DDP never rebuilds them if it is to find unused
        # parameters.
        return DistributedDataParallel(
            model,
            device_ids=self.determine_ddp_device_ids(),
            process_group=Nobody(),
            **self._ddp_kwargs,
        )

    @override
    def _register_ddp_hooks(self) -> None:
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self._fit.gradients, average_over_shards)

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        if self._fitting is None:
            return dataloader
        trainer = self._fitting.trainer
        if not trainer.training:
            limit = trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
            return EvaluationShare(dataloader, self._rank_and_size, limit if isinstance(limit, float) else 1.0)
        loader = ShardedLoader(
            dataloader,
            self.max_replicas,
            seed=int(os.environ.get("PL_GLOBAL_SEED", 0)),
            group_rank=self._group.rank,
            group_size=self._group.size,
            keep=max(1, trainer.accumulate_grad_batches),
            before_fetch=self._before_batch,
        )
        self._fitting.steps.step.read_from(loader)
        return loader

    def on_train_start(self) -> None:
        """Before the first rendezvous: Lightning would set up the validation in the midst of them."""
        trainer = self._fit.trainer
        begin_at_saved_step(trainer)
        if trainer.enable_validation:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True

    def leave(self, status: int = 0) -> None:
        """Take this replica out of the run in order, while the others go on; see `Membership.leave`. Within a fit.

        If all leave at once, nobody would be left who knows the run: the hook ``on_all_leave`` is called.

        Args:
            status: the exit status of this process.
        """
        self._fit.replicas.leave(status)

    def on_train_end(self) -> None:
        """Nobody leaves while another may still need what it knows."""
        if self._met is not None:
            self._met.finish()
            self.barrier("end")
            if self._group.leads:
                _launched.note_progress(over=True)

    # The step.

    def _before_batch(self) -> None:
        """Before each micro-batch is fetched: the first of a step begins with a rendezvous, and the data follow."""
        fit, loop = self._fit, self._fit.trainer.fit_loop
        if not fit.steps.window:
            if not fit.replicas.joined:
                fit.replicas.start_at(fit.trainer.global_step)
            if fit.replicas.begin():
                adopt_places(fit.trainer, self.broadcast(places(fit.trainer)))
            if fit.replicas.all_leave:
                fit.end_of_all()
            fit.share_out()
            fit.steps.begin()
        index = loop.epoch_loop.batch_progress.current.ready
        fit.steps.step.fetch(fit.trainer.current_epoch, index)
        cast(Any, loop._data_fetcher).fetched = index

    @override
    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around the micro-batches of a step before its last."""
        with super().block_backward_sync(), self._fit.steps.without_sum():
            yield

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = self._fit.steps.run(partial(super().training_step, *args, **kwargs))
        self.set_world_ranks()
        return output

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        usual = partial(super().backward, closure_loss, optimizer, *args, **kwargs)
        return self._fit.steps.backward(closure_loss, usual, *args, **kwargs)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        update = partial(super().optimizer_step, optimizer, model=model, **kwargs)
        loss = self._fit.steps.optimizer_step(optimizer, closure, update)
        self.set_world_ranks()
        return loss

    @override
    def on_exception(self, exception: BaseException) -> None:
        if isinstance(exception, LeftBehindError | NoQuorumError):
            _launched.note_progress(anew=True)
        super().on_exception(exception)

    @override
    def teardown(self) -> None:
        if (fit := self._fitting) is not None:
            compute_together(fit.trainer.lightning_module, None)
            callbacks_of(fit.trainer)[:] = [each for each in callbacks_of(fit.trainer) if each is not fit.log]
            self._fitting = None
            fit.close()
        super().teardown()


class FaultTolerantDDPStrategy(FaultTolerantDDP, DDPStrategy):
    """Data parallel training that goes on when replicas die, and takes them back.

    A replica is one process with one device, or several on one machine that live and die together. Each is started by
    itself: ``lightning-eff launch --replicas 3 train.py`` on one machine, or torchrun or Slurm on each node with the
    addresses given. torchft's lighthouse says who is alive. A step counts when all living replicas have it; one that
    fails, because somebody died, is repeated by those who are left. Who comes back gets the whole state of the run from
    a living peer before its next step. LR schedulers and ``trainer.global_step`` count such steps alone.

    In manual optimization each ``step()`` of an optimizer is such a step. When one has failed ``training_step`` is run
    again from its start, past those that all have: see the card for what that asks of it.

    Between the steps one living replica writes checkpoints and logs, and the next one when it dies; ``reduce``,
    ``broadcast``, ``all_gather``, ``barrier`` and ``self.log(sync_dist=True)`` are over the living;
    ``trainer.world_size`` is that of a replica, and ``trainer.global_rank`` is 0 on the replica that writes.

    Args:
        min_replicas: fewer than these wait; give it to the lighthouse as well.
        max_replicas: into how many shards the data are cut, and how many replicas there can be. By default the
            environment variable ``NUM_REPLICA_GROUPS``, which the launcher sets.
        lighthouse: its address, ``http://HOST:PORT``; by default the environment variable ``TORCHFT_LIGHTHOUSE``.
        on_failure: what becomes of a dead replica's shard. ``"takeover"``: a neighbour computes it besides its own, so
            that batches, samples and loss are those of a run without the failure. ``"mecefo"``: the same, but the
            neighbour's backward pass is approximated so that it costs less. ``"shrink"``: it is left out.
        heartbeat_timeout: seconds after which the lighthouse takes a silent replica for dead. The lighthouse has its
            own setting of this; here it says how patient a replica is that waits.
        replica: index of this replica, from 0, the same after a restart; by default the environment variable
            ``REPLICA_GROUP_ID``.
        host: the address on which this replica listens, and under which the others reach it. By default the
            environment variable ``FT_HOST``, or loopback. Nobody but the replicas should reach it: see the card.
        run_id: the same text in all replicas of a run, by which those of another run on the same lighthouse are turned
            away; by default the environment variable ``LIGHTNING_EFF_RUN_ID``.
        collective_timeout: seconds for one collective; longer than the slowest replica's step. So long does a step
            wait for a peer that is stopped, or whose link is cut, without having died.
        connect_timeout: seconds to connect to the lighthouse, and to the peers after a change: to those, a tenth of a
            second more for each.
        quorum_timeout: seconds that a replica waits for the others before a step: for validations, for checkpoints,
            for ``min_replicas``.
        heal_timeout: seconds for which the others wait while one gets the state of the run from a peer, and one more
            for each 10 MB of weights and optimizer state.
        quorum_retries: how often a lighthouse that does not answer is asked again.
        start_grace: seconds for which the first step waits for all ``max_replicas``.
        max_aborts: how often one step may fail in a row.
        mecefo_rank: with ``"mecefo"``, the rank of a neighbour's weight gradients: a number, or a fraction of the
            shorter side. See `lightning_eff.functional.mecefo.MeCeFO`.
        mecefo_every_n_steps: committed steps for which the vectors behind them are kept.
        mecefo_attention: patterns of the names of the attention modules; by default they are found by structure.
        mecefo_ffn: the same for the feed-forward modules.
        **kwargs: of Lightning's ``DDPStrategy`` and of DDP, such as ``bucket_cap_mb``.

    Raises:
        ValueError: an argument is out of its range.
        ModuleNotFoundError: torchft is absent.
        MisconfigurationException: at the start of ``fit``: no lighthouse, a replica on several machines, a GradScaler,
            LBFGS, data that cannot be cut into shards, manual optimization with ``"mecefo"``.
        ConnectionError: the lighthouse cannot be reached.

    Example:
        >>> from lightning_eff.strategies import FaultTolerantDDPStrategy
        >>> strategy = FaultTolerantDDPStrategy(max_replicas=3, replica=0, lighthouse="http://127.0.0.1:29510")

    Source: torchft (https://github.com/meta-pytorch/torchft) for membership; the takeover of a neighbour's work after
    Hu et al., "MeCeFO" (https://arxiv.org/abs/2510.16415), section 3.
    """
