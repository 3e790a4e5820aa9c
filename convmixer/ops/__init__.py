"""Tensor functions whose speed matters more than their length."""

from convmixer.ops.depthwise import depthwise_conv2d, runs_on_kernels, set_depthwise_kernels

__all__ = ["depthwise_conv2d", "runs_on_kernels", "set_depthwise_kernels"]
