"""Tensor functions whose speed matters more than their length."""

from convmixer.ops.depthwise import (
    depthwise_conv2d,
    prefers_channels_last,
    runs_on_kernels,
    set_depthwise_kernels,
)

__all__ = ["depthwise_conv2d", "prefers_channels_last", "runs_on_kernels", "set_depthwise_kernels"]
