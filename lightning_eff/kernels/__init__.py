"""Ops that run on every step, each as a plain-torch reference and a Triton kernel, and the choice between them."""

from lightning_eff.kernels.dispatch import Choice, OpStatus, choose, status
from lightning_eff.kernels.resources import CompiledKernel, compile_report

__all__ = ["Choice", "CompiledKernel", "OpStatus", "choose", "compile_report", "status"]
