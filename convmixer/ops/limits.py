"""What the kernels of fused blocks take: activations, and for Triton types, kernel sizes and GPUs."""

from __future__ import annotations

import torch
from torch import nn

ACTIVATIONS = {nn.GELU: "gelu", nn.ReLU: "relu", nn.Identity: "identity"}  # by the names that the kernels know
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_SIZES = range(2, 16)
CAPABILITY = (8, 0)


def unsupported(device: torch.device) -> str | None:
    """Return why the Triton kernels do not run on a CUDA device; None where they do."""
    if torch.version.hip:
        return "the Triton kernels are for CUDA, and this PyTorch is built for ROCm"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        least = ".".join(map(str, CAPABILITY))
        return f"compute capability {found[0]}.{found[1]}: the Triton kernels need a GPU of at least {least}"
    return None
