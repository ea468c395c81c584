"""What must happen before anything imports Triton.

Triton decides at import, by TRITON_INTERPRET, whether its kernels are compiled or run by its interpreter on the CPU,
and Lightning imports Triton. So on a machine without a GPU the variable is set here, for the whole run. It reaches
nothing but the tests that force the kernels: CPU tensors take the reference.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
