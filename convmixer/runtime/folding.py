"""Exact folding: a ConvMixer for inference in which no BatchNorm is left.

In evaluation mode a BatchNorm is `x = a*g + b` per channel, and a block of the model computes

    c = depthwise(x)    z = x + a1*act(c) + b1    g' = act(pointwise(z))    x' = a2*g' + b2

The folded model carries `x/a = g + b/a` instead of x. Its a goes into the columns of both convolutions that read it,
b1 into the bias of the second one, and the residual becomes one multiply-add, `x/a + (a1/a)*act(c)`. What is left of
the BatchNorm is the addition of b/a. It stays in front of the depthwise convolution because of the zero padding there:
0/a is still 0, so the border needs no correction, whatever the image size and kernel. The alternative, to carry g and
to fold b into the depthwise bias, is only right in the interior. It needs a map of corrections for the border, which
costs an addition per element as well.

Dividing by a changes exponents and loses no digits: every rounding stays relative to x, as it is in the BatchNorm
itself. Only the range can be exceeded. Where 1/a, b/a, a1/a or a of a channel is above the square root of the largest
number, the channel is carried as x itself, by a multiply-add; so half of the exponents are left to weights and
activations. Eight bits have no exponents: channels of very different size do not fit one range, so a model that will be
quantized carries x throughout.
"""

# Annotations are not strings here: torch.fx writes those of `forward` into its code, for TorchScript to read.

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.layers import DropPath, SelectAdaptivePool2d
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm
from torchvision.ops.misc import FrozenBatchNorm2d

from convmixer.errors import ArgumentError
from convmixer.model import (
    ConvMixer,
    DepthwiseConv2d,
    Residual,
    check_dtype,
    check_input,
    count_outputs,
    evaluation_view,
    lay_out,
    take_indices,
)
from convmixer.transforms import preprocessing
from convmixer.wrappers import ADVICE, copy_module, describe, find_inner, unwrap

_CONVOLUTIONS = (nn.Conv2d.forward, DepthwiseConv2d.forward)  # what they compute follows from their settings
_NORMS = (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, FrozenBatchNorm2d.forward)
_DROPOUTS = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)
_FORWARDS = ("forward", "forward_features", "forward_head")
_WEIGHT_HOOKS = (BasePruningMethod, WeightNorm)  # compute a weight from other tensors; what else they do is nothing


def check_layers(model: Any) -> None:
    """Raise an ArgumentError where somebody has replaced a layer of a ConvMixer by what its folded copy would not have.

    An adapter or a dilated convolution has a weight of the same shape, too; and the copy does not call hooks.
    """
    stem, patch = model.stem, (model.patch_size, model.patch_size)
    if not _is_sequence(stem, 3):
        raise _replaced("stem", stem, "it is not the stem of a ConvMixer")
    _check_convolution("stem.0", stem[0], kernel_size=patch, stride=patch, padding=(0, 0))
    _check_norm("stem.2", stem[2])
    for i, block in enumerate(model.blocks):
        if not _is_sequence(block, 4):
            raise _replaced(f"blocks.{i}", block, "it is not a block of a ConvMixer")
        if type(block[0]) is not Residual or not _is_sequence(block[0].fn, 3):
            raise _replaced(f"blocks.{i}.0", block[0], "it is not the residual of a ConvMixer")
        branch: Any = block[0].fn
        size = getattr(branch[0], "kernel_size", (0,))[0]
        around: Any = (0, 0) if getattr(branch[0], "even_kernel", False) else (size // 2, size // 2)
        around = "same" if getattr(branch[0], "padding", None) == "same" else around
        _check_convolution(f"blocks.{i}.0.fn.0", branch[0], kernel_size=(size, size), padding=around, groups=model.dim)
        _check_norm(f"blocks.{i}.0.fn.2", branch[2])
        _check_dropout(f"blocks.{i}.0.drop_path", block[0].drop_path)
        _check_convolution(f"blocks.{i}.1", block[1], kernel_size=(1, 1), padding=(0, 0))
        _check_norm(f"blocks.{i}.3", block[3])
    if type(model.global_pool) is not SelectAdaptivePool2d:
        raise _replaced("global_pool", model.global_pool, "it is not timm's SelectAdaptivePool2d")
    _check_dropout("block_drop", model.block_drop)
    _check_dropout("head_drop", model.head_drop)
    _check_calls(model)


def _check_calls(model: Any) -> None:
    """Raise an ArgumentError where a call runs more than the layers, or other code than a ConvMixer's own."""
    if any(getattr(type(model), name) is not getattr(ConvMixer, name) for name in _FORWARDS):
        raise _replaced("the model", model, "its class computes otherwise than a ConvMixer")
    for name, module in model.named_modules():
        if name.split(".")[0] == "head":  # is taken as it is
            continue
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(isinstance(hook, _WEIGHT_HOOKS) for hook in hooks):
            raise ArgumentError(
                f"cannot fold this model: {name or 'the model'} has forward hooks, which its copy may not call. Remove "
                "them, or use the model as it is: without optimize, or exported with fold=False (--no-fold)"
            )
        own = [key for key in _FORWARDS if key in vars(module)]
        if own and (name or not hasattr(module, "_original_forward")):  # where accelerate keeps that of a model
            raise _replaced(name or "the model", module, f"it has a {own[0]} of its own")


def _update_weights(model: ConvMixer) -> None:
    """Compute the weights that hooks compute, as each call does: those of the last call may be out of date."""
    for module in (*model.stem.modules(), *model.blocks.modules()):
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, _WEIGHT_HOOKS):
                hook(module, ())


def _is_sequence(layers: Any, count: int) -> bool:
    """Return whether something computes so many layers one after the other."""
    return isinstance(layers, nn.Sequential) and type(layers).forward is nn.Sequential.forward and len(layers) == count


def _check_convolution(name: str, layer: Any, **settings: Any) -> None:
    if type(layer).forward not in _CONVOLUTIONS:
        raise _replaced(name, layer, "it does not compute as nn.Conv2d does")
    wanted = {"stride": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros", **settings}
    for key, value in wanted.items():
        if getattr(layer, key) != value:
            raise _replaced(name, layer, f"it has {key}={getattr(layer, key)!r} instead of {value!r}")
    if layer.bias is None:
        raise _replaced(name, layer, "it has no bias")


def _check_norm(name: str, layer: Any) -> None:
    if type(layer).forward not in _NORMS:
        raise _replaced(name, layer, "it does not compute as nn.BatchNorm2d does")
    if layer.running_mean is None:
        raise _replaced(name, layer, "it has no running statistics, so each batch has its own")


def _check_dropout(name: str, layer: Any) -> None:
    if type(layer) not in _DROPOUTS:
        raise _replaced(name, layer, "it does more than drop values in training")


def _replaced(name: str, layer: Any, why: str) -> ArgumentError:
    return ArgumentError(
        f"cannot fold this model: {name} is {describe(layer)}, and {why}. Use the model as it is: without optimize, or "
        "exported with fold=False (--no-fold)"
    )


def _exact(tensor: Tensor) -> Tensor:
    """Return a copy in float64, on the CPU because not every device has that type."""
    return tensor.detach().to("cpu", torch.float64, copy=True)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return scale and shift, (dim,) each, of a BatchNorm in evaluation mode."""
    scale = 1 / (_exact(norm.running_var) + norm.eps).sqrt()
    if norm.weight is not None:
        scale = _exact(norm.weight) * scale
    shift = -_exact(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _exact(norm.bias)


def _fill(layer: Any, weight: Tensor, bias: Tensor) -> Any:
    """Give a layer, made on the meta device, these values."""
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


class _Affine(nn.Module):
    """`scale*x + shift` per channel, (B, dim, H, W) -> (B, dim, H, W); without a scale only the addition."""

    scale: Tensor | None
    shift: Tensor

    def __init__(self, scale: Tensor | None, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", None if scale is None else scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift if self.scale is None else torch.addcmul(self.shift, self.scale, x)


class _Block(nn.Module):
    """One block, from activation to activation: it owns the BatchNorm before it, and the next block the one at its end.

    Args:
        block: The block of the original.
        norm: The BatchNorm before it.
        largest: Largest magnitude that may be folded.
    """

    gain: Tensor

    def __init__(self, block: Any, norm: nn.Module, largest: float) -> None:
        super().__init__()
        (depthwise, act, inner), pointwise = block[0].fn, block[1]
        scale, shift = _affine(norm)
        gain, offset = _affine(inner)
        sizes = torch.stack([scale, 1 / scale, shift / scale, gain / scale]).abs()
        fits = (sizes <= largest).all(0)  # also False for the NaN of 0/0
        unit = scale.where(fits, 1.0)  # each channel is carried as x/unit
        dim = len(unit)
        self.norm = _Affine(None if fits.all() else scale / unit, shift / unit)
        self.register_buffer("gain", (gain / unit)[:, None, None])
        self.depthwise = _fill(
            DepthwiseConv2d(dim, dim, depthwise.kernel_size[0], groups=dim, device="meta"),
            _exact(depthwise.weight) * unit[:, None, None, None],
            _exact(depthwise.bias),
        )
        self.act = copy.deepcopy(act)
        weight = _exact(pointwise.weight)
        self.pointwise = _fill(
            nn.Conv2d(dim, dim, 1, device="meta"),
            weight * unit[:, None, None],
            _exact(pointwise.bias) + weight[:, :, 0, 0] @ offset,
        )
        self.last_act = copy.deepcopy(block[2])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = torch.addcmul(x, self.gain, self.act(self.depthwise(x)))
        result: Tensor = self.last_act(self.pointwise(x))
        return result


class FoldedConvMixer(nn.Module):
    """What `fold` makes of a `ConvMixer`: equal outputs, no BatchNorm, only for inference.

    It has the original's `forward`, `forward_features`, `forward_head` and `forward_intermediates`, its `num_features`,
    `num_classes`, `in_chans`, `feature_info` and `pretrained_cfg`, but other parameters, which need no gradient.
    Gradients with respect to images can be computed. It stays in evaluation mode.

    Raises:
        ArgumentError: From `train()`.
        ImageError: From `forward`: an input that is not (B, in_chans, H, W) with H and W of at least a patch.

    Example:
        >>> model = convmixer.create_model("convmixer_256_8", pretrained=True, device="cpu")
        >>> folded = convmixer.optimize(model)
        >>> type(folded).__name__, folded.forward_features(torch.rand(1, 3, 32, 32)).shape
        ('FoldedConvMixer', torch.Size([1, 256, 16, 16]))
    """

    if TYPE_CHECKING:

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(self, model: ConvMixer, normalization: bool, dtype: torch.dtype, divide: bool = True) -> None:
        super().__init__()
        self.patch_size, self.in_chans, self.channels_last = model.patch_size, model.in_chans, model.channels_last
        self.num_features, self.num_classes = model.num_features, count_outputs(model)
        self.head_hidden_size = model.head_hidden_size
        self.feature_info = copy.deepcopy(model.feature_info)
        self.pretrained_cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
        conv: Any = model.stem[0]
        weight, bias = _exact(conv.weight), _exact(conv.bias)
        if normalization:
            self.pretrained_cfg = preprocessing(model)
            mean, std = (weight.new_tensor(self.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
            weight = weight / std
            bias = bias - (weight * mean).sum((1, 2, 3))
            self.pretrained_cfg |= {"mean": (0.0,) * self.in_chans, "std": (1.0,) * self.in_chans}
        stem = nn.Conv2d(self.in_chans, model.dim, self.patch_size, self.patch_size, device="meta")
        self.stem = nn.Sequential(_fill(stem, weight, bias), copy.deepcopy(model.stem[1]))
        blocks: list[Any] = list(model.blocks)
        norms: list[Any] = [model.stem[2], *(block[3] for block in blocks)]
        largest = torch.finfo(dtype).max ** 0.5 if divide else 0.0
        self.blocks = nn.ModuleList(_Block(b, n, largest) for b, n in zip(blocks, norms[:-1], strict=True))
        self.norms = nn.ModuleList(_Affine(*_affine(n)) for n in norms[1:])  # for features, which are x itself
        self.global_pool = copy.deepcopy(model.global_pool)
        self.head = copy_module(model.head)
        self.to(conv.weight.device, dtype).requires_grad_(False).eval()
        self.zero_grad()  # the copies of activations and head brought theirs

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the last block's output, (B, dim, H // patch_size, W // patch_size)."""
        result: Tensor = self.norms[-1](self._activations(x))
        return result

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits (B, num_classes); with pre_logits to pooled features, (B, head_hidden_size)."""
        x = self.global_pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.classify(self._activations(x))

    def classify(self, x: Tensor) -> Tensor:
        """Map what the last BatchNorm takes, (B, dim, h, w), to logits (B, num_classes)."""
        if self.global_pool.pool_type in ("avg", "fastavg"):
            x = x.mean((2, 3), keepdim=True)  # a mean commutes with the last BatchNorm, which is then cheap
        return self.forward_head(self.norms[-1](x))

    def _activations(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to the last BatchNorm's input, (B, dim, H // patch_size, W // patch_size)."""
        check_input(x, self.in_chans, self.patch_size)
        x = lay_out(self.stem(x), self.channels_last)
        for block in self.blocks:
            x = block(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """Return features after chosen blocks, as `ConvMixer.forward_intermediates` does."""
        if output_fmt not in ("NCHW", "NHWC"):
            raise ArgumentError(f"unknown output_fmt {output_fmt!r}; valid: NCHW, NHWC")
        taken, last = take_indices(indices, len(self.blocks))
        check_input(x, self.in_chans, self.patch_size)
        x = lay_out(self.stem(x), self.channels_last)
        end = last + 1 if stop_early else len(self.blocks)
        intermediates: list[Tensor] = []
        for i in range(end):
            x = self.blocks[i](x)
            if i in taken:
                features = self.norms[i](x)
                intermediates.append(features if output_fmt == "NCHW" else features.permute(0, 2, 3, 1))
        return intermediates if intermediates_only else (self.norms[end - 1](x), intermediates)

    def get_classifier(self) -> nn.Module:
        """Return the head: a Linear, or Identity without classes."""
        return self.head

    def train(self, mode: bool = True) -> "FoldedConvMixer":
        """Raise an error unless `mode` is False: evaluation mode is the only one."""
        if mode:
            raise ArgumentError("an optimized model cannot be trained: train the original, then optimize it again")
        return super().train(False)


def find_convmixer(model: nn.Module) -> ConvMixer:
    """Return the `ConvMixer` in wrappers and timm's feature extractor; raise an ArgumentError for anything else."""
    found = find_inner(model)
    if not isinstance(found, ConvMixer):
        raise ArgumentError(f"cannot optimize {describe(found)}, which is not a convmixer.ConvMixer: {ADVICE}")
    return found


def fold(
    model: nn.Module, normalization: bool = False, dtype: torch.dtype | None = None, *, divide: bool = True
) -> FoldedConvMixer | FeatureGetterNet:
    """Return a folded copy of a model; `convmixer.optimize` says what the arguments mean.

    Args:
        divide: Carry x/a between blocks where the type's range allows it; without it x itself, for quantization.

    Returns:
        A `FoldedConvMixer`; for a feature extractor timm's `FeatureGetterNet` around one.

    Raises:
        ArgumentError: Another kind of module; a model with a layer that is not a ConvMixer's; a type that is not
            floating point; `normalization` for a model that says nothing about its preprocessing.
    """
    model = unwrap(model)
    original = find_convmixer(model)
    check_layers(original)
    _update_weights(original)
    dtype = next(original.parameters()).dtype if dtype is None else dtype
    check_dtype(dtype)
    # A parametrized weight is computed when it is read; in training mode, spectral_norm's reading changes the model.
    computed = any(map(parametrize.is_parametrized, original.modules()))
    folded = FoldedConvMixer(
        cast("ConvMixer", evaluation_view(original)) if computed else original, normalization, dtype, divide
    )
    if original is model:
        return folded
    extractor = cast("FeatureGetterNet", copy.deepcopy(model, {id(original): folded}).eval())
    if normalization:
        config = {name: folded.pretrained_cfg[name] for name in ("input_size", "mean", "std")}
        getattr(extractor, "pretrained_cfg", {}).update(config)
    return extractor
