"""What a replica needs before its first rendezvous with the others."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer
from torch.optim import LBFGS, Optimizer

from lightning_eff import _launched
from lightning_eff.strategies.fault_tolerant.identity import Identity
from lightning_eff.training.namespaces import MisconfigurationException, is_a
from lightning_eff.training.trainer import gradient_scaler


def check_torchft() -> None:
    """Say what is missing, if it is."""
    try:
        import torchft  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            "ddp_ft needs torchft: `pip install 'lightning-eff[ft]'`. It has wheels for Linux on x86-64 only, for "
            "Python 3.9 to 3.13"
        ) from error


def reach_lighthouse(host: str, port: int, timeout: float) -> None:
    """Wait for a lighthouse to listen.

    Raises:
        ConnectionError: it does not, within ``timeout`` seconds.
    """
    began = time.monotonic()
    while not _listens(host, port, timeout):
        waited = time.monotonic() - began
        if waited > timeout:
            raise ConnectionError(
                f"the lighthouse at {host}, port {port} could not be reached within {waited:.0f} s. Is it running "
                "(`lightning-eff lighthouse`), and is its address right?"
            )
        time.sleep(0.2)


def _listens(host: str, port: int, timeout: float) -> bool:
    try:
        socket.create_connection((host, port), timeout).close()
    except OSError:
        return False
    return True


def leave_if_over() -> None:
    """End a replica that begins after others have come to the run's end: alone it would begin the run anew.

    The launcher names a file that exists from then on (`_launched.FINISHED`); without it nothing is known.
    """
    if os.path.exists(os.environ.get(_launched.FINISHED, "")):
        raise SystemExit(0)


def check_processes(environment: ClusterEnvironment, nodes: int, devices: int) -> None:
    """Refuse a replica that is not of this machine, or has other processes than devices."""
    if nodes > 1:
        raise MisconfigurationException(
            f"Trainer(num_nodes={nodes}): a replica of ddp_ft lies on one machine. Leave it at 1, and start a replica "
            "on each, with `lightning-eff launch` or by hand"
        )
    # Lightning's own starts as many as there are devices.
    if not is_a(environment, LightningEnvironment) and environment.world_size() != devices:
        raise MisconfigurationException(
            f"processes of this replica: {environment.world_size()}, Trainer(devices={devices}): each has one device, "
            "so give the same number (`lightning-eff launch --nproc-per-node`)"
        )


def check_trainer(trainer: Trainer, on_failure: str, identity: Identity) -> None:
    """Refuse what a step that is repeated cannot be made of, and a replica that knows no lighthouse."""
    if identity.lighthouse is None:
        raise MisconfigurationException(
            "ddp_ft needs a lighthouse: start with `lightning-eff launch --replicas N script.py`, or give "
            "`lighthouse='http://HOST:PORT'` of one that `lightning-eff lighthouse` runs"
        )
    if not trainer.lightning_module.automatic_optimization and on_failure == "mecefo":
        raise MisconfigurationException(
            "on_failure='mecefo' approximates the backward pass of one loss, and with `automatic_optimization = False` "
            "training_step makes its own: take on_failure='takeover'"
        )
    if gradient_scaler(trainer.strategy) is not None:
        raise MisconfigurationException(
            "ddp_ft does not agree on the scale of a GradScaler: use precision='bf16-mixed' in place of '16-mixed'"
        )
    if getattr(trainer, "reload_dataloaders_every_n_epochs", 0):
        raise MisconfigurationException("ddp_ft does not support reload_dataloaders_every_n_epochs: set it to 0")


def check_optimizers(optimizers: Sequence[Optimizer]) -> None:
    """Refuse those that want the loss more than once."""
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise MisconfigurationException(
            "ddp_ft evaluates the loss once a step, and all decide together whether it counts; LBFGS evaluates it "
            "several times. Use an optimizer that steps once per gradient"
        )
