"""Feature maps at several resolutions from a backbone with a single one, for segmentation and detection.

After the simple feature pyramid of ViTDet (Li et al., "Exploring Plain Vision Transformer Backbones for Object
Detection", https://arxiv.org/abs/2203.16527), which has no top-down path. Each map of the pyramid comes from one map of
the backbone, (B, dim, h, w) in cells of p pixels:

    p -> q      transposed convolutions double, or max pooling divides, by the power of two that comes nearest to r
    q -> r      bilinear interpolation, if they differ (patches of 7 or 14 pixels); cells stay in their places
    project     1x1 convolution -> LayerNorm -> 3x3 convolution -> LayerNorm,  (B, channels, ceil(H/r), ceil(W/r))

where q and r are the pixels per cell of the resized and of the final map. Unlike ViTDet's, this pyramid takes any patch
size and any image size. Images are padded with zeros to whole patches, at the right and at the bottom, so that the
backbone sees every pixel.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, get_device_dtype
from timm.models._features import FeatureGetterNet, FeatureInfo
from torch import Tensor, nn

from convmixer.errors import ArgumentError, check_count, is_count
from convmixer.model import plain
from convmixer.wrappers import describe, find_inner

REDUCTIONS = (4, 8, 16, 32)


class FeaturePyramid(nn.Module):
    """A backbone, and layers that turn its features into maps of several resolutions.

    Args:
        backbone: A `ConvMixer`, or a model of timm, with `features_only=True` or with `forward_intermediates`. The
            pyramid uses it, not a copy, and removes its head and the blocks that no map needs. Its keys in the state
            dict start with `backbone.model.`, as in timm's feature extractors.
        reductions: Pixels of the image per cell, in increasing order. A map is
            (B, channels, ceil(H / reduction), ceil(W / reduction)).
        channels: Channels of every map.
        out_indices: The blocks (or outputs, with `features_only=True`) that the maps are made of: one for each
            reduction, or one for all. Negative numbers count from the end. None takes the last one, whose cells have
            seen most of the image.
        return_dict: Return an `OrderedDict` with the keys "0", "1", ..., as torchvision's detectors take it, instead of
            a list. The attribute may change at any time.

    Attributes:
        feature_info: timm's `FeatureInfo`, with `channels()` and `reduction()`.
        out_channels: Channels of every map, for torchvision's detectors.

    Raises:
        ArgumentError: An argument makes no sense, or the backbone does not say which feature maps it has.
        ImageError: From `forward`, as the backbone raises it.

    Example:
        >>> backbone = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> pyramid = convmixer.FeaturePyramid(backbone, (4, 8, 16), channels=64)
        >>> [tuple(features.shape) for features in pyramid(torch.zeros(1, 3, 50, 70))]
        [(1, 64, 13, 18), (1, 64, 7, 9), (1, 64, 4, 5)]
    """

    def __init__(
        self,
        backbone: nn.Module,
        reductions: Sequence[int] = REDUCTIONS,
        *,
        channels: int = 256,
        out_indices: Sequence[int] | None = None,
        return_dict: bool = False,
    ) -> None:
        reductions = check_reductions("reductions", reductions)
        check_count("channels", channels)
        super().__init__()
        self.backbone, self._sources = _extractor(backbone, out_indices, len(reductions))
        info: FeatureInfo = self.backbone.feature_info
        dims, strides = info.channels(), info.reduction()
        factory = get_device_dtype(self.backbone)
        self.levels = nn.ModuleList(
            _Level(dims[i], strides[i], reduction, channels, factory)
            for i, reduction in zip(self._sources, reductions, strict=True)
        )
        self._multiple: int = max(strides)
        self.feature_info = FeatureInfo(
            [{"num_chs": channels, "reduction": r, "module": f"levels.{i}"} for i, r in enumerate(reductions)],
            tuple(range(len(reductions))),
        )
        self.out_channels = channels
        self.return_dict = return_dict
        inner = find_inner(backbone)
        self.in_chans: int = getattr(inner, "in_chans", 3)
        self.pretrained_cfg: Any = getattr(backbone, "pretrained_cfg", None) or getattr(inner, "pretrained_cfg", None)

    def forward(self, x: Tensor) -> list[Tensor] | OrderedDict[str, Tensor]:
        """Compute the maps, finest first: (B, in_chans, H, W) -> (B, channels, ceil(H / r), ceil(W / r)) for each r."""
        height, width = x.shape[-2:]
        features = self.backbone(F.pad(x, (0, -width % self._multiple, 0, -height % self._multiple)))
        maps = [level(features[i], height, width) for level, i in zip(self.levels, self._sources, strict=True)]
        return OrderedDict((str(i), y) for i, y in enumerate(maps)) if self.return_dict else maps

    def set_fused(self, enable: bool | Literal["auto"] = True, *, sync_batchnorm: bool = False) -> None:
        """Compute the backbone's blocks by fused functions, as `ConvMixer.set_fused` does.

        Raises:
            ConvMixerError: As `ConvMixer.set_fused`, or the backbone is not a `ConvMixer` of this package.
        """
        inner = find_inner(self.backbone)
        if not hasattr(inner, "set_fused"):
            raise ArgumentError(f"{describe(inner)} has no fused blocks: they are for a convmixer.ConvMixer")
        inner.set_fused(enable, sync_batchnorm=sync_batchnorm)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
        find_inner(self.backbone).set_grad_checkpointing(enable)


class _Level(nn.Module):
    """The layers of one map of a pyramid.

    Args:
        dim: Channels of the backbone's map.
        stride: Pixels per cell of the backbone's map.
        reduction: Pixels per cell of the map to make.
        channels: Channels of the map to make.
        factory: Device and type of the parameters.
    """

    def __init__(self, dim: int, stride: int, reduction: int, channels: int, factory: dict[str, Any]) -> None:
        super().__init__()
        doublings = round(math.log2(stride / reduction))
        self.resize = nn.Sequential()
        for i in range(doublings):
            if i:
                self.resize.extend([LayerNorm2d(dim, **factory), nn.GELU()])
            narrower = max(dim // 2, 1)
            self.resize.append(nn.ConvTranspose2d(dim, narrower, kernel_size=2, stride=2, **factory))
            dim = narrower
        if doublings < 0:
            self.resize.append(nn.MaxPool2d(2**-doublings, ceil_mode=True))
        self.reduction = reduction
        # Cells of the map to make per resized cell, from 0.7 to 1.42; exactly 1 for patches of 1, 2, 4, ... pixels.
        self.scale = stride / 2**doublings / reduction
        self.project = nn.Sequential(
            nn.Conv2d(dim, channels, kernel_size=1, bias=False, **factory),
            LayerNorm2d(channels, **factory),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False, **factory),
            LayerNorm2d(channels, **factory),
        )

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """Map (B, dim, h, w), of an image of height x width, to (B, channels, ceil(height / r), ceil(width / r))."""
        x = self.resize(x)
        rows, columns = -(-height // self.reduction), -(-width // self.reduction)
        if self.scale == 1:
            x = x[..., :rows, :columns]
        else:
            x = _sample(_sample(x, self.scale, rows, dim=2), self.scale, columns, dim=3)
        result: Tensor = self.project(x)
        return result


def _sample(x: Tensor, scale: float, count: int, dim: int) -> Tensor:
    """Interpolate x along dim 2 or 3 into `count` cells, each 1 / scale cells of x wide.

    The last ones may lie beyond the border of x, and repeat it. `F.interpolate` takes either scale or size, and a
    scale that follows from the sizes would move cells by up to one.
    """
    last = x.shape[dim] - 1
    centres = (torch.arange(count, dtype=torch.float32, device=x.device) + 0.5) / scale - 0.5
    low = centres.clamp(0, last).floor().long()
    weight = (centres - low).clamp(0, 1).to(x.dtype)
    weight = weight[:, None] if dim == 2 else weight
    return torch.lerp(x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=last)), weight)


def check_reductions(name: str, reductions: Any) -> tuple[int, ...]:
    """Return the reductions of a pyramid as a tuple; raise an ArgumentError, with the argument's name, for others."""
    found = plain(reductions)
    found = found if isinstance(found, list) else []
    if not found or not all(map(is_count, found)) or sorted(set(found)) != found:
        raise ArgumentError(f"{name}={reductions!r}: give whole numbers in increasing order, such as {REDUCTIONS}")
    return tuple(found)


def _extractor(backbone: Any, out_indices: Any, count: int) -> tuple[Any, list[int]]:
    """Return a module that computes a backbone's feature maps, and for each level which of them it is made of."""
    info: Any = getattr(backbone, "feature_info", None)
    is_extractor = isinstance(info, FeatureInfo)
    if not is_extractor and not (isinstance(info, list) and info and hasattr(backbone, "forward_intermediates")):
        raise ArgumentError(
            f"{describe(backbone)} does not say which feature maps it has: give a ConvMixer, or a model of timm "
            "with features_only=True. Build the pyramid first, then compile or wrap it"
        )
    total = len(info.out_indices) if is_extractor else len(info)
    blocks = _indices(out_indices, total, count)
    if is_extractor:
        if getattr(backbone, "output_fmt", "NCHW") != "NCHW":
            raise ArgumentError(
                f"{describe(backbone)} returns maps with channels last: give the model of timm without features_only"
            )
        return backbone, blocks
    wanted = sorted(set(blocks))
    return FeatureGetterNet(backbone, tuple(wanted)), [wanted.index(block) for block in blocks]


def _indices(out_indices: Any, total: int, count: int) -> list[int]:
    """Return `count` indices from 0 to total - 1; raise an ArgumentError for what `FeaturePyramid` does not take."""
    found = [-1] if out_indices is None else plain(out_indices)
    found = found if isinstance(found, list) else []
    valid = all(is_count(i, -total) and i < total for i in found)
    if not valid or len(found) not in (1, count):
        raise ArgumentError(
            f"out_indices={out_indices!r}: give one index for all {count} maps or {count} of them, "
            f"from {-total} to {total - 1}"
        )
    return [i % total for i in found] * (count if len(found) == 1 else 1)
