"""ddp_ft without a second replica: what it refuses, what it says, and its parts."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, cast

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import rank_zero_only as pytorch_rank_zero_only

from harness.runs import fit
from lightning_eff.strategies import FaultTolerantDDPStrategy
from lightning_eff.strategies.fault_tolerant.identity import Identity
from lightning_eff.strategies.fault_tolerant.step_in_hand import shares

pytest.importorskip("torchft", reason="torchft has wheels for Linux on x86-64 only")


@pytest.fixture(autouse=True)
def _process_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a DDP strategy sets for the life of its process, and a single-device Trainer does not set back."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else Lightning sets it
    before = [getattr(each, "rank", None) for each in (rank_zero_only, pytorch_rank_zero_only)]
    yield
    for each, rank in zip((rank_zero_only, pytorch_rank_zero_only), before, strict=True):
        cast(Any, each).rank = 0 if rank is None else rank


ARGUMENTS = {"max_replicas": 3, "replica": 0, "lighthouse": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"min_replicas": 4}, r"min_replicas=4.*an integer from 1 to 3"),
        ({"min_replicas": 0}, "min_replicas=0"),
        ({"on_failure": "ignore"}, "on_failure='ignore'.*takeover.*mecefo.*shrink"),
        ({"replica": 3}, "replica=3.*an integer from 0 to 2"),
        ({"heartbeat_timeout": 0.0}, "heartbeat_timeout=0.0.*seconds"),
        ({"start_grace": -1.0}, "start_grace=-1.0"),
        ({"quorum_timeout": float("nan")}, "quorum_timeout=nan.*seconds"),
        ({"collective_timeout": "60"}, "collective_timeout='60'"),
        ({"max_aborts": True}, "max_aborts=True"),
        ({"quorum_retries": -1}, "quorum_retries=-1"),
        ({"min_replicas": 1.0}, "min_replicas=1.0"),
        ({"lighthouse": "nowhere"}, "lighthouse='nowhere'.*HOST:PORT"),
        ({"host": ""}, "host=''"),
        ({"run_id": 3}, "run_id=3"),
        ({"mecefo_rank": 0.0}, "mecefo_rank=0.0"),
        ({"mecefo_rank": True}, "mecefo_rank=True"),
        ({"mecefo_every_n_steps": 0}, "mecefo_every_n_steps=0"),
        ({"mecefo_attention": "*.attn"}, "mecefo_attention='\\*.attn'.*list of patterns"),
        ({"mecefo_ffn": []}, "mecefo_ffn=\\[\\]"),
        ({"find_unused_parameters": 1}, "find_unused_parameters=1"),
        ({"static_graph": True}, "static_graph=True"),
        ({"process_group": "mine"}, "process_group='mine'.*own hook, buckets and groups"),
        ({"max_replicas": None}, "NUM_REPLICA_GROUPS.*lightning-eff launch"),
        ({"replica": None}, "REPLICA_GROUP_ID.*lightning-eff launch"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        FaultTolerantDDPStrategy(**{**ARGUMENTS, **arguments})


def test_torchft_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchft", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-eff\[ft\].*Linux on x86-64"):
        FaultTolerantDDPStrategy(**ARGUMENTS)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning's launcher leaves these in the environment."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "LOCAL_RANK": "0", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


def _fit(module: L.LightningModule, strategy: Any = None, **trainer: Any) -> None:
    fit(module, strategy=strategy or FaultTolerantDDPStrategy(**ARGUMENTS), max_steps=2, **{"devices": 1, **trainer})


class Manual(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(
    ("module", "trainer", "what"),
    [
        (
            BoringModel,
            {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
            "GradScaler.*bf16-mixed",
        ),
        (BoringModel, {"reload_dataloaders_every_n_epochs": 1}, "reload_dataloaders_every_n_epochs"),
        (BoringModel, {"num_nodes": 2}, "a replica of ddp_ft lies on one machine"),
    ],
)
def test_refused(module: type[L.LightningModule], trainer: dict[str, Any], what: str) -> None:
    with pytest.raises(MisconfigurationException, match=what):
        _fit(module(), **trainer)


@pytest.mark.usefixtures("launched")
def test_manual_optimization_is_not_approximated() -> None:
    strategy = FaultTolerantDDPStrategy(**ARGUMENTS, on_failure="mecefo")
    with pytest.raises(MisconfigurationException, match=r"automatic_optimization = False.*on_failure='takeover'"):
        _fit(Manual(), strategy)


@pytest.mark.usefixtures("launched")
def test_no_lighthouse_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    strategy = FaultTolerantDDPStrategy(max_replicas=3, replica=0)
    with pytest.raises(MisconfigurationException, match=r"needs a lighthouse.*launch"):
        _fit(BoringModel(), strategy)


@pytest.mark.usefixtures("launched")
def test_a_lighthouse_that_is_not_there() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    strategy = FaultTolerantDDPStrategy(max_replicas=3, replica=0, lighthouse=f"127.0.0.1:{port}", connect_timeout=0.3)
    with pytest.raises(ConnectionError, match=rf"127\.0\.0\.1, port {port} could not be reached within \d+ s"):
        _fit(BoringModel(), strategy)


def test_the_string(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUM_REPLICA_GROUPS", "4")
    monkeypatch.setenv("REPLICA_GROUP_ID", "2")
    monkeypatch.setenv("TORCHFT_LIGHTHOUSE", "http://127.0.0.1:9")
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy="ddp_ft", logger=False, enable_checkpointing=False)
    strategy = trainer.strategy
    assert isinstance(strategy, FaultTolerantDDPStrategy)
    assert strategy.identity == Identity(2, 4, "127.0.0.1", "http://127.0.0.1:9", "")


def test_shares_are_even_and_complete() -> None:
    for count in range(1, 7):
        for alive in range(1, 2**count):
            members = [index for index in range(count) if alive >> index & 1]
            share = shares(count, members)
            assert sorted(members + [shard for shards in share.values() for shard in shards]) == list(range(count))
            sizes = [len(shards) for shards in share.values()]
            assert max(sizes) - min(sizes) <= 1


LEFT_BEHIND = """
import threading, time
from datetime import timedelta
from torchft.coordination import LighthouseServer
from lightning_eff.strategies.fault_tolerant.manager import QuorumManager

lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=2)
seconds = timedelta(seconds=10)
address = f"http://127.0.0.1:{lighthouse.address().rpartition(':')[2]}"
manager = QuorumManager("replica_0", "127.0.0.1", address, seconds, seconds, 20 * seconds, 0, dict, print)
began = time.monotonic()
threading.Timer(1.0, manager.break_off).start()
try:
    manager.ask_for_quorum(newcomers=False, timeout=200.0)
except ConnectionAbortedError:
    print("ended" if time.monotonic() - began < 5.0 else "late", flush=True)
manager.shutdown(wait=False)
"""


def test_a_replica_that_was_left_behind_ends_though_the_lighthouse_never_answers() -> None:
    """Neither the call nor the thread in which it waits keeps the process."""
    done = subprocess.run([sys.executable, "-c", LEFT_BEHIND], capture_output=True, text=True, timeout=150, check=True)
    assert done.stdout == "ended\n"
