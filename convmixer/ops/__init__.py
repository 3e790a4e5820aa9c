"""Tensor functions whose speed matters more than their length."""

from convmixer.ops.depthwise import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
