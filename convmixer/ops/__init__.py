"""Tensor functions of a ConvMixer: plain definitions, and faster ways to the same numbers.

    model --> depthwise (a layer), fused (stem and blocks) --> dispatch (by device) --> reference, or triton/ on a GPU

- `reference`: the truth, in plain PyTorch, for any device and compiler; tests compare everything else with it
- `depthwise`: the depthwise convolution of plain layers, and which memory layout is faster
- `fused`: blocks that keep two feature maps each for the backward pass
- `limits`: which activations, types, kernel sizes and GPUs the kernels take

Feature maps are (B, C, H, W), vectors (C,). The room imports only `errors`; it knows tensors and layers, not models.
"""

from convmixer.ops.depthwise import (
    depthwise_conv2d,
    is_forward_mode,
    is_transformed,
    prefers_channels_last,
    runs_on_kernels,
    set_depthwise_kernels,
)

__all__ = [
    "depthwise_conv2d",
    "is_forward_mode",
    "is_transformed",
    "prefers_channels_last",
    "runs_on_kernels",
    "set_depthwise_kernels",
]
