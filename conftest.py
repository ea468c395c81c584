"""What must happen before anything imports Triton, the option `--device`, and what is skipped without a package.

Triton decides at import, by TRITON_INTERPRET, whether its kernels are compiled or run by its interpreter on the CPU,
and Lightning imports Triton. So on a machine without a GPU the variable is set here, for the whole run. It reaches
nothing but the tests that force the kernels: CPU tensors take the reference.
"""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples in docstrings are looked for by importing, and these modules import torchft.
if importlib.util.find_spec("torchft") is None:
    _modules = ("connect", "left_behind", "manager", "process_group", "replicas", "transport")
    collect_ignore = [f"lightning_eff/strategies/fault_tolerant/{name}.py" for name in _modules]
    collect_ignore.append("tests/strategies/fault_tolerant/replica_main.py")

# torch 2.8 starts the processes in which inductor compiles as soon as anything is compiled, by whatever backend, and
# keeps them: the next test would be blamed. Without this they are started when inductor has a kernel to compile.
os.environ.setdefault("TORCH_WARM_POOL", "0")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device`."""
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where the contract suite trains, two ranks of it on one card; the kernels take a GPU where there is one",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Tell it to the contract suite, and to the workers that it starts."""
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA or HIP device here")
    os.environ["LIGHTNING_EFF_TEST_DEVICE"] = device  # see tests/suite/device.py


def pytest_runtest_setup(item: pytest.Item) -> None:
    """``@pytest.mark.needs("torchft")``: skipped by that name where it is not there. An example cannot be marked."""
    names = [name for mark in item.iter_markers("needs") for name in mark.args]
    if isinstance(item, pytest.DoctestItem) and item.name.endswith("FaultTolerantDDPStrategy"):
        names.append("torchft")
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
