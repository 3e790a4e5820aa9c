"""Encoders for segmentation_models_pytorch (extra `dense`): `register_encoders`, then `smp.Unet(NAME, ...)`."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from convmixer.errors import ArgumentError, check_count, is_count, optional
from convmixer.factory import create_model
from convmixer.pyramid import FeaturePyramid
from convmixer.registry import list_models, list_pretrained

__all__ = ["ConvMixerEncoder", "register_encoders"]


def register_encoders(*, channels: int = 128, finest: Literal[2, 4] = 2, block: int = -1) -> list[str]:
    """Register the variants and weights of this package as encoders of segmentation_models_pytorch.

    `variant` is an encoder with random weights, and `variant.tag` one with these weights. Use both with
    `encoder_weights=None`. A second call replaces the encoders of the first one.

    Args:
        channels: Channels of every feature map.
        finest: Reduction of the finest map, 2 or 4. With 4 the map of reduction 2 has 0 channels, as in the library's
            own Mix Vision Transformers. That saves time where a decoder does not use this map, as in FPN, PAN and
            DeepLabV3Plus. UnetPlusPlus and Linknet need 2: Linknet's features pass through that map.
        block: The block whose output all maps are made of; negative numbers count from the end. Later blocks are
            removed, so an earlier one costs less. If a model has no such block, building it raises an error.

    Returns:
        The names of the encoders.

    Raises:
        DependencyError: segmentation_models_pytorch is missing.
        ArgumentError: An argument makes no sense.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> from convmixer.segmentation import register_encoders
        >>> names = register_encoders()
        >>> unet = smp.Unet("convmixer_256_8.cifar10", encoder_weights=None, classes=11)
        >>> unet(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 11, 64, 64])
    """
    _check_finest(finest)
    check_count("channels", channels)
    if isinstance(block, bool) or not isinstance(block, int):
        raise ArgumentError(f"block={block!r}: give the number of a block, such as 3, or -1 for the last")
    library = optional("segmentation_models_pytorch.encoders", "register_encoders", "dense")
    pretrained = list_pretrained()
    names = [*list_models(), *pretrained]
    settings = {"channels": channels, "finest": finest, "block": block}
    for name in names:
        library.encoders[name] = {
            "encoder": ConvMixerEncoder,
            "pretrained_settings": _NoDownloads(),
            "params": {"name": name, "pretrained": name in pretrained, **settings},
        }
    return names


def _check_finest(finest: int) -> None:
    if finest not in (2, 4):
        raise ArgumentError(f"finest={finest!r}; valid: 2, 4")


class _NoDownloads(dict[str, Any]):
    """The weights of an encoder that the library can download: none. A look-up raises an error that says what to do."""

    def __contains__(self, weights: object) -> bool:
        raise ArgumentError(
            f"encoder_weights={weights!r}: the weights of a ConvMixer are in its name, such as "
            f"{list_pretrained()[0]!r}; pass encoder_weights=None with it"
        )


class ConvMixerEncoder(nn.Module):
    """A `FeaturePyramid` with the interface of segmentation_models_pytorch's encoders.

    Args:
        name: As in `create_model`.
        pretrained: Load the weights that the name stands for.
        channels: As in `register_encoders`.
        finest: As in `register_encoders`.
        block: As in `register_encoders`.
        depth: Number of maps after the image, of reductions 2, 4, 8, ...
        output_stride: Largest reduction; further maps are the last one again.

    Attributes:
        pyramid: The `FeaturePyramid`.
        out_channels: Channels of the image and of each map.

    Raises:
        ArgumentError: An argument makes no sense.
    """

    _is_torch_scriptable = False
    _is_torch_exportable = True
    _is_torch_compilable = True

    def __init__(
        self,
        name: str,
        pretrained: bool,
        channels: int,
        finest: int,
        block: int = -1,
        depth: int = 5,
        output_stride: int = 32,
    ) -> None:
        _check_finest(finest)
        if not is_count(depth, 2):
            raise ArgumentError(f"encoder_depth={depth!r}: give a whole number of at least 2; decoders need 3 to 5")
        super().__init__()
        self._backbone_arguments: dict[str, Any] = {"name": name, "pretrained": pretrained, "out_indices": (block,)}
        self._reductions = [min(2**i, output_stride) for i in range(1, depth + 1)]
        self.output_stride: int = self._reductions[-1]
        computed = sorted({r for r in self._reductions if r >= finest})
        self.pyramid = FeaturePyramid(self._backbone(in_chans=3), computed, channels=channels)
        self.out_channels = [3, *(channels if r in computed else 0 for r in self._reductions)]

    def _backbone(self, in_chans: int) -> nn.Module:
        """Create a feature extractor for images with `in_chans` channels."""
        model: nn.Module = create_model(**self._backbone_arguments, device="cpu", in_chans=in_chans, features_only=True)
        return model

    def forward(self, x: Tensor) -> list[Tensor]:
        """Compute the maps of images (B, C, H, W).

        Returns:
            The images, and a map (B, channels, ceil(H / r), ceil(W / r)) for each reduction r. With `finest=4` the map
            of reduction 2 has 0 channels.
        """
        height, width = x.shape[-2:]
        maps = dict(zip(self.pyramid.feature_info.reduction(), self.pyramid(x), strict=True))
        if 2 not in maps:
            maps[2] = x.new_empty(x.shape[0], 0, -(-height // 2), -(-width // 2))
        return [x, *(maps[r] for r in self._reductions)]

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Rebuild the backbone for images with `in_channels` channels; weights are adapted as by `create_model`."""
        if in_channels != self.out_channels[0]:
            self.pyramid.backbone = self._backbone(in_channels)
            self.pyramid.in_chans = self.out_channels[0] = in_channels

    def make_dilated(self, output_stride: int) -> None:
        """Do nothing: the library calls this after the constructor, which has used `output_stride` already."""
