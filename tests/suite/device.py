"""The device that the contract suite trains on: `pytest --device cuda` moves its models and their samples to a GPU.

Two ranks share one card, over gloo: NCCL refuses that. The choice is an environment variable, so that the workers of
the pool have it too.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from torch import Tensor

VARIABLE = "LIGHTNING_EFF_TEST_DEVICE"
DEVICE = os.environ.get(VARIABLE, "cpu")


class OneCard(CUDAAccelerator):
    """As many ranks as are asked for, all of them on the first card."""

    @staticmethod
    def parse_devices(devices: Any) -> int:  # type: ignore[override]
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("cuda", 0)] * devices

    def setup_device(self, device: torch.device) -> None:
        torch.cuda.init()  # or a device mesh would choose the card by the local rank
        super().setup_device(device)


def accelerator(device: str = DEVICE, package: str = "lightning.pytorch") -> Any:
    """The Trainer's. One of the other name knows no accelerator of this one's: it takes as many cards as ranks."""
    if device == "cpu":
        return "cpu"
    return OneCard() if package == "lightning.pytorch" else "cuda"


def generator_state() -> Tensor:
    """Of the generator that dropout draws from."""
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()
