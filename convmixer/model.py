"""ConvMixer (Trockman & Kolter, "Patches Are All You Need?", https://arxiv.org/abs/2201.09792).

    stem    Conv2d(in_chans, dim, p, stride=p) -> act -> BatchNorm
    block   x + BatchNorm(act(depthwise k x k (x))),  then  BatchNorm(act(1x1 (.)))      `depth` times
    head    global pool -> dropout -> Linear

The activation comes before BatchNorm everywhere, every convolution has a bias, and resolution never changes after
the stem. Parameter names are those of timm's `convmixer.py` (Apache-2.0), so that its weights load strictly; the code
is this package's own. Deviations from timm: dropout before every block and stochastic depth (both off by default),
activations by name, inputs checked, on CPUs a faster weight gradient under `torch.compile`, `channels_last` feature
maps, and `set_fused`: the same numbers by `ops.fused`, which keeps two feature maps per block for the backward pass.
"""

# Annotations are not strings here: torch.fx writes those of `forward` into its code, for TorchScript to read.

import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
import torch.nn.functional as F
from timm.layers import DropPath, SelectAdaptivePool2d, get_act_layer, get_device_dtype
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from convmixer import ops
from convmixer.errors import (
    ArgumentError,
    ConvMixerError,
    DependencyError,
    ImageError,
    WeightsError,
    check_count,
    is_count,
    nearest,
)
from convmixer.native import training as native
from convmixer.ops import dispatch, fused
from convmixer.registry import UNNAMED
from convmixer.wrappers import describe, is_compiled

if TYPE_CHECKING:
    from torch.nn.modules.module import _IncompatibleKeys

_LOGGER = logging.getLogger(__name__)
GLOBAL_POOLS = ("avg", "max", "avgmax", "catavgmax", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax", "")
ACTIVATIONS = [
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "silu",
    "swish",
    "mish",
    "hard_sigmoid",
    "hard_swish",
    "hard_mish",
    "sigmoid",
    "tanh",
    "prelu",
    "identity",
]


def activation(act_layer: str | type[nn.Module]) -> type[nn.Module]:
    """Return the class that `act_layer` of `ConvMixer` means.

    Raises:
        ArgumentError: An unknown name, or not a class of modules that needs no arguments.
    """
    if not isinstance(act_layer, str):
        try:
            fine = isinstance(act_layer, type) and isinstance(act_layer(), nn.Module)
        except TypeError:
            fine = False
        if not fine:
            raise ArgumentError(
                f"act_layer={act_layer!r}: give a name such as 'gelu', or an nn.Module class that needs no arguments"
            )
        return act_layer
    if act_layer not in ACTIVATIONS:
        raise ArgumentError(f"unknown act_layer {act_layer!r}; {nearest(act_layer, ACTIVATIONS)}")
    if act_layer in ("gelu", "relu"):  # PyTorch's own classes, as in the published models
        return nn.GELU if act_layer == "gelu" else nn.ReLU
    return cast("type[nn.Module]", get_act_layer(act_layer))


def _new(act: type[nn.Module], device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Module:
    """Make an activation; one with parameters, such as PReLU, has them where those of the layers are."""
    module = act()
    return module if next(module.parameters(), None) is None else module.to(device=device, dtype=dtype)


def _check_rate(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ArgumentError(f"{name}={value!r}: give a probability in [0, 1)")


def as_dtype(dtype: Any) -> Any:
    """Return the type that a name such as "bfloat16" or "torch.bfloat16" means; anything else as it is."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else None
    return found if isinstance(found, torch.dtype) else dtype


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ArgumentError for a type in which a model cannot be computed."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ArgumentError(f"dtype={dtype!r}: give a floating point type such as torch.bfloat16 or 'bfloat16'")


@functools.lru_cache
def _say_plain(recorder: str) -> None:
    _LOGGER.info("fused blocks: off in what %s makes, which sees the plain layers", recorder)


# Called while compiling, and its result taken: some versions of PyTorch (2.7 to 2.11) take `is_exporting()` itself for
# True in each compilation.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _recorder() -> str:
    """Return the name of what records a model layer by layer, or ""."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    return "torch.export" if torch.compiler.is_exporting() else ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_recorded(compiling: bool) -> bool:
    """Return whether a recorder runs the model, which gets plain layers; the log then says so."""
    if recorder := _recorder():
        _say_plain(recorder)
        return True
    if compiling and (lacking := fused.cannot_compile()):
        raise DependencyError(lacking)
    return False


def check_input(x: Tensor, in_chans: int, patch_size: int) -> None:
    """Raise ImageError where the shape of x does not fit; skipped inside tracers and compilers."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or isinstance(x, torch.fx.Proxy):
        return
    shape = tuple(x.shape)
    if len(shape) != 4:
        raise ImageError(f"input of shape {shape}: a batch of images (B, {in_chans}, H, W) is needed")
    if shape[1] != in_chans:
        hint = "; it looks channels-last: permute(0, 3, 1, 2) it" if shape[3] == in_chans else ""
        raise ImageError(
            f"input of shape {shape} has {shape[1]} channels, this model takes in_chans={in_chans}{hint}. "
            f"For other channel counts build the model with in_chans={shape[1]}"
        )
    if min(shape[2:]) < patch_size:
        raise ImageError(
            f"image of {shape[2]}x{shape[3]} pixels is smaller than one {patch_size}x{patch_size} patch: resize it"
        )


def lay_out(x: Tensor, channels_last: bool) -> Tensor:
    """Lay out the stem's output (B, dim, h, w) in channels_last, if asked; what follows keeps the layout."""
    if not torch.jit.is_scripting():
        # vmap knows no layouts, and in torch.export they would bind the sizes of images to each other.
        channels_last = channels_last and not ops.is_transformed() and _recorder() != "torch.export"
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def check_head(tensors: Mapping[str, Any], model: "ConvMixer", source: str) -> None:
    """Raise WeightsError where weights have a head for another pool than the model's."""
    head, dim = tensors.get("head.weight"), model.num_features
    if not isinstance(head, Tensor) or head.ndim != 2 or not isinstance(model.head, nn.Linear):
        return
    found, needed = head.shape[1], model.head.in_features
    stem = tensors.get("stem.0.weight")
    if isinstance(stem, Tensor) and len(stem) != dim:
        return  # a model of other sizes, which a list of them says better
    if found != needed and {found, needed} == {dim, 2 * dim}:
        pool = model.global_pool.pool_type
        advice = (
            "Give global_pool='catavgmax'"
            if found > needed
            else f"Load the weights without global_pool, then call reset_classifier({model.num_classes}, {pool!r}), "
            "which makes a new head"
        )
        raise WeightsError(
            f"{source}: the head takes {found} features, and global_pool={pool!r} makes {needed}. {advice}"
        )


def plain(numbers: Any) -> Any:
    """Return numbers of NumPy or PyTorch as Python's; arrays, lists and tuples of them as lists; all else as it is."""
    numbers = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    return [plain(number) for number in numbers] if isinstance(numbers, list | tuple) else numbers


def count_outputs(model: Any) -> int:
    """Return how many outputs the head of a model has, which may have been replaced by hand; 0 without a head.

    Of a head that is not a Linear only `num_classes` says it.
    """
    head = getattr(model, "head", None)
    return head.out_features if isinstance(head, nn.Linear) else getattr(model, "num_classes", 0)


def take_indices(indices: int | Sequence[int] | None, depth: int) -> tuple[list[int], int]:
    """Return block indices as non-negative numbers, and the largest; see `ConvMixer.forward_intermediates`."""
    if indices is None:
        return list(range(depth)), depth - 1
    indices = plain(indices)
    if isinstance(indices, int):
        if not is_count(indices) or indices > depth:
            raise ArgumentError(f"indices={indices}: the number of last blocks to take is 1 to {depth}")
        return list(range(depth - indices, depth)), depth - 1
    indices = [plain(i) for i in indices]
    fine = all(is_count(i, -depth) and i < depth for i in indices)
    taken = [i % depth for i in indices] if fine else []
    if not taken or len(set(taken)) < len(taken):
        raise ArgumentError(f"indices={indices!r}: give different block indices from {-depth} to {depth - 1}")
    return taken, max(taken)


def mirror(model: nn.Module) -> nn.Module:
    """Copy only the modules: each tensor, hook and setting in them is the original's own.

    Modes and hooks of the copy may be changed while others use the original. What `torch.compile` made of a module is
    left out: the copy computes eagerly.

    Raises:
        ArgumentError: TorchScript, or a `forward` replaced by what still calls the original.
    """
    return _mirror(model, {})


def _mirror(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if is_compiled(module):
        return _mirror(cast("nn.Module", module._orig_mod), made)
    if id(module) in made:
        return made[id(module)]
    twin: nn.Module = object.__new__(type(module))
    made[id(module)] = twin
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:  # as accelerate replaces `forward`
            value = MethodType(value.__func__, twin)
        twin.__dict__[name] = copy.copy(value) if name in _CONTAINERS else value
    twin.__dict__.pop("_compiled_call_impl", None)
    replaced = "forward" in vars(twin) and getattr(twin.forward, "__self__", None) is not twin
    if isinstance(module, torch.jit.ScriptModule) or replaced:
        raise ArgumentError(
            f"{describe(module)} whose computation cannot be put in evaluation mode only for this call: call eval() "
            "on the model first"
        )
    twin._modules = {name: None if child is None else _mirror(child, made) for name, child in module._modules.items()}
    return twin


# What `nn.Module` keeps in dictionaries and sets: tensors, modules and hooks, by name.
_CONTAINERS = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)}


def evaluation_view(model: nn.Module) -> nn.Module:
    """Return the model in evaluation mode: itself if all of it is, else a `mirror` of it. The model's own modes stay.

    Raises:
        ArgumentError: As `mirror`.
    """
    if not any(m.training or "_compiled_call_impl" in vars(m) or is_compiled(m) for m in model.modules()):
        return model
    return mirror(model).eval()


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise k x k convolution that keeps the resolution, (B, dim, H, W) -> (B, dim, H, W).

    Arguments are those of `nn.Conv2d`, as libraries such as peft make further layers of a layer's class. A depthwise
    layer chooses its padding itself; one of another geometry is a plain convolution.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.even_kernel = self.exports_kernels = False
        self.border = [0, 0, 0, 0]
        height, width = self.kernel_size
        plain_steps = self.stride == self.dilation == (1, 1) and self.padding_mode == "zeros" and height == width
        self.is_depthwise = plain_steps and self.groups == self.in_channels == self.out_channels
        if self.is_depthwise:
            self._set_border(self.kernel_size[0])

    def _set_border(self, kernel_size: int) -> None:
        self.is_depthwise = True
        before, after = (kernel_size - 1) // 2, kernel_size // 2
        # Even kernels need one more row and column at the end, which convolutions cannot do by themselves.
        self.even_kernel = before != after
        self.border = [before, after, before, after]
        self.padding = (0, 0) if self.even_kernel else (before, before)
        self.exports_kernels = False  # what is exported for others has no operators of this package in it

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self.is_depthwise and not self._is_exported(x) and ops.runs_on_kernels(x, self.weight, self.training):
                return ops.depthwise_conv2d(x, self.weight, self.bias)
        if self.even_kernel:
            x = F.pad(x, self.border)
        result: Tensor = self._conv_forward(x, self.weight, self.bias)
        return result

    def _is_exported(self, x: Tensor) -> bool:
        return isinstance(x, torch.fx.Proxy) or (bool(_recorder()) and not self.exports_kernels)


def _keeps_resolution(layer: nn.Module) -> bool:
    """Return whether a layer is a depthwise convolution with square kernels that keeps the resolution."""
    if type(layer) is not nn.Conv2d or "forward" in vars(layer):  # such as a hook of accelerate, which would stay
        return False
    if not layer.groups == layer.in_channels == layer.out_channels > 1:
        return False
    height, width = layer.kernel_size
    same = layer.padding == "same" or (height % 2 == 1 and layer.padding == (height // 2, height // 2))
    plain = layer.stride == (1, 1) and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return height == width and same and plain


def accelerate(model: nn.Module) -> nn.Module:
    """Let the depthwise layers of any model, such as timm's own ConvMixer, run on this package's GPU kernels.

    Depthwise `nn.Conv2d` layers with square kernels and equal resolution become `DepthwiseConv2d`, in place. Weights,
    state dict, hooks and results stay the same, up to rounding. Models of this package do not need it.

    Returns:
        The model.

    Raises:
        ArgumentError: It has no such layer.

    Example:
        >>> model = convmixer.accelerate(timm.create_model("convmixer_768_32"))
        >>> type(model.blocks[0][0].fn[0]).__name__
        'DepthwiseConv2d'
    """
    found = 0
    for layer in model.modules():
        if _keeps_resolution(layer):
            layer.__class__ = DepthwiseConv2d
            layer._set_border(layer.kernel_size[0])  # type: ignore[operator, index]
        found += isinstance(layer, DepthwiseConv2d)
    if not found:
        raise ArgumentError(
            f"{type(model).__name__} has no depthwise convolution that keeps the resolution: nn.Conv2d with "
            "groups=channels, square kernels, stride 1, zero padding"
        )
    return model


class Residual(nn.Module):
    """`x + drop_path(fn(x))`."""

    def __init__(self, fn: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.fn = fn
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.drop_path(self.fn(x))
        return result


def _block(
    dim: int,
    kernel_size: int,
    act: type[nn.Module],
    drop_path: float,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Sequential:
    spatial = nn.Sequential(
        DepthwiseConv2d(dim, dim, kernel_size, groups=dim, device=device, dtype=dtype),
        _new(act, device, dtype),
        nn.BatchNorm2d(dim, device=device, dtype=dtype),
    )
    return nn.Sequential(
        Residual(spatial, drop_path),
        nn.Conv2d(dim, dim, kernel_size=1, device=device, dtype=dtype),
        _new(act, device, dtype),
        nn.BatchNorm2d(dim, device=device, dtype=dtype),
    )


class ConvMixer(nn.Module):
    """A ConvMixer with timm's interface for classification and feature extraction.

    Args:
        dim: Channels of every layer.
        depth: Number of blocks.
        kernel_size: Side of the depthwise kernels, odd or even.
        patch_size: Side and stride of the patch embedding; features are (B, dim, H // patch_size, W // patch_size).
        in_chans: Channels of the input.
        num_classes: Outputs of the head; 0 leaves the head out.
        global_pool: One of `GLOBAL_POOLS`; "" with num_classes=0 returns the feature map itself.
        act_layer: Name from `ACTIVATIONS`, or an `nn.Module` class that is constructed without arguments.
        drop_rate: Dropout before the head.
        block_drop_rate: Dropout before every block, as the Keras example of ConvMixer has it.
        drop_path_rate: Stochastic depth: the last block's spatial branch is dropped per image with this probability,
            earlier ones with linearly less.
        device: Where parameters are created.
        dtype: Type of the parameters.

    Attributes:
        channels_last: Compute the blocks in channels_last, whatever the layout of images and weights. False, as in a
            new module, leaves the layout to them. It may be set at any time; `create_model` sets it where that is
            faster.
        pretrained_cfg: What `create_model` says about the model, as timm has it: `input_size`, `mean`, `std`,
            `label_names`, ...

    Raises:
        ArgumentError: A value that makes no sense.
        ImageError: From `forward`: an input that is not (B, in_chans, H, W) with H and W of at least patch_size.

    Example:
        >>> model = convmixer.ConvMixer(dim=64, depth=4, kernel_size=5, patch_size=2, num_classes=10)
        >>> model(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    if TYPE_CHECKING:  # TorchScript would read the annotation, too
        pretrained_cfg: dict[str, Any]

        def __call__(self, x: Tensor) -> Tensor: ...

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        act_layer: str | type[nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dim, depth, kernel_size, patch_size, in_chans = map(plain, (dim, depth, kernel_size, patch_size, in_chans))
        counts = {"dim": dim, "depth": depth, "kernel_size": kernel_size, "patch_size": patch_size}
        for name, value in {**counts, "in_chans": in_chans}.items():
            check_count(name, value, 1)
        drop_rate, block_drop_rate, drop_path_rate = map(plain, (drop_rate, block_drop_rate, drop_path_rate))
        rates = {"drop_rate": drop_rate, "block_drop_rate": block_drop_rate, "drop_path_rate": drop_path_rate}
        for name, rate in rates.items():
            _check_rate(name, rate)
        act = activation(act_layer)
        super().__init__()
        self.dim = dim
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.num_features = dim
        self.grad_checkpointing = self.channels_last = False
        self.fused = self.sync_batchnorm = False
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, device=device, dtype=dtype),
            _new(act, device, dtype),
            nn.BatchNorm2d(dim, device=device, dtype=dtype),
        )
        drop_paths = [drop_path_rate * (i + 1) / depth for i in range(depth)]
        self.blocks = nn.Sequential(*(_block(dim, kernel_size, act, p, device, dtype) for p in drop_paths))
        self.block_drop = nn.Dropout(block_drop_rate)
        self.feature_info = [{"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)]
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(num_classes, global_pool, {"device": device, "dtype": dtype})

    def _set_head(self, num_classes: int, global_pool: str, factory: dict[str, Any]) -> None:
        num_classes = plain(num_classes)
        check_count("num_classes", num_classes, 0)
        if global_pool not in GLOBAL_POOLS:
            raise ArgumentError(f"unknown global_pool {global_pool!r}; {nearest(global_pool, GLOBAL_POOLS)}")
        if num_classes and not global_pool:
            raise ArgumentError(
                f"num_classes={num_classes} with global_pool='': a head needs a pool; use num_classes=0, or 'avg'"
            )
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size: int = self.num_features * self.global_pool.feat_mult()
        self.head: nn.Module = (
            nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes else nn.Identity()
        )

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last block's output: (B, in_chans, H, W) -> (B, dim, H // patch_size, W // patch_size)."""
        if not torch.jit.is_scripting():
            check_input(x, self.in_chans, self.patch_size)
            if self._runs_fused(x):
                return self._fused_features(x, self.blocks, [len(self.blocks) - 1])[0]
        x = lay_out(self.stem(x), self.channels_last)
        if not torch.jit.is_scripting():
            if self._has_only_blocks():
                result: Tensor = self.blocks(x)  # called as a whole, which hooks and FSDP may wait for
                return result
        for block in self.blocks:
            x = self.block_drop(x)
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def _has_only_blocks(self) -> bool:
        """Return whether nothing but the blocks themselves runs from one to the next."""
        drop = self.block_drop
        plain_drop = type(drop) is nn.Dropout and drop.p == 0 and not (drop._forward_hooks or drop._forward_pre_hooks)
        return plain_drop and isinstance(self.blocks, nn.Sequential) and not self.grad_checkpointing

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits (B, num_classes); with pre_logits to pooled features, (B, head_hidden_size)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits: (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = ...,
        norm: bool = ...,
        stop_early: bool = ...,
        output_fmt: str = ...,
        intermediates_only: Literal[False] = ...,
    ) -> tuple[Tensor, list[Tensor]]: ...

    @overload
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = ...,
        norm: bool = ...,
        stop_early: bool = ...,
        output_fmt: str = ...,
        *,
        intermediates_only: Literal[True],
    ) -> list[Tensor]: ...

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """Compute the features after chosen blocks.

        Args:
            x: Images, (B, in_chans, H, W).
            indices: The last n blocks if a number, the given blocks (negative ones count from the end) if a sequence,
                all of them if None. Features come in the order of the blocks.
            norm: Without effect: every block ends with its BatchNorm. Part of timm's interface.
            stop_early: Do not compute blocks after the last one asked for.
            output_fmt: Layout of the intermediates, "NCHW" or "NHWC".
            intermediates_only: Return only the list.

        Returns:
            (last features computed, intermediates), or only the intermediates: each (B, dim, h, w), or (B, h, w, dim)
            with "NHWC".

        Raises:
            ArgumentError: An index that no block has, or an unknown layout.
            ImageError: Images that do not fit the model.

        Example:
            >>> model = convmixer.ConvMixer(dim=64, depth=4, kernel_size=5, patch_size=2)
            >>> last, maps = model.forward_intermediates(torch.zeros(1, 3, 32, 32), indices=[0, 3])
            >>> [tuple(features.shape) for features in maps]
            [(1, 64, 16, 16), (1, 64, 16, 16)]
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ArgumentError(f"unknown output_fmt {output_fmt!r}; valid: NCHW, NHWC")
        taken, last = take_indices(indices, len(self.blocks))
        check_input(x, self.in_chans, self.patch_size)
        blocks = self.blocks[: last + 1] if stop_early else self.blocks
        if self._runs_fused(x):
            wanted = sorted({*taken, len(blocks) - 1})
            maps = self._fused_features(x, blocks, wanted)
            x, found = maps[-1], [y for i, y in zip(wanted, maps, strict=True) if i in taken]
        else:
            x, found = lay_out(self.stem(x), self.channels_last), []
            for i, block in enumerate(blocks):
                x = self.block_drop(x)
                x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
                if i in taken:
                    found.append(x)
        intermediates = [y if output_fmt == "NCHW" else y.permute(0, 2, 3, 1) for y in found]
        return intermediates if intermediates_only else (x, intermediates)

    # ---- fused blocks -------------------------------------------------------------------------------------------

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def set_fused(self, enable: bool | Literal["auto"] = True, *, sync_batchnorm: bool = False) -> None:
        """Compute stem and blocks by fused functions, which keep less than half as much for the backward pass.

        Parameters, state dict and results stay the same, up to rounding. TorchScript, `torch.fx` and `torch.export` see
        the plain layers, and the log says so. First derivatives only.

        Args:
            enable: False goes back to the layers. "auto" is True where this package has kernels for the model's device,
                type and layers, Triton's on a GPU and native ones on a CPU, and False elsewhere, since fused blocks by
                PyTorch save memory but not time; the choice is written to the log.
            sync_batchnorm: In training, BatchNorm sees the images of all processes of the default group, on CPUs too,
                as layers of `nn.SyncBatchNorm` do. The parameters must be the same in each, as
                DistributedDataParallel makes them.

        Raises:
            ArgumentError: The model has what fused blocks do not: dropout between blocks, stochastic depth, activations
                other than GELU and ReLU, replaced layers, hooks on layers.
            DependencyError: Triton is missing, on a GPU.
            ConvMixerError: There are no kernels for this device, the type of the parameters or the kernel size.

        Example:
            >>> model = convmixer.ConvMixer(dim=64, depth=4, kernel_size=5, patch_size=2)
            >>> model.set_fused()
            >>> model.fused
            True
        """
        if not (isinstance(enable, bool) or enable == "auto"):
            raise ArgumentError(f"fused={enable!r}; valid: True, False, 'auto'")
        if sync_batchnorm and enable is not True:
            raise ArgumentError(
                "sync_batchnorm=True needs fused=True: it is for fused blocks; layers have nn.SyncBatchNorm"
            )
        self.fused = self.sync_batchnorm = False
        if enable is False:
            return
        weight = cast("Tensor", self.stem[0].weight)
        try:
            self._check_fused()
            dispatch.check(weight.device, weight.dtype, fused.kernel_sizes(self.blocks))
        except ConvMixerError as error:
            if enable is True:
                raise
            _LOGGER.info("fused='auto': off, %s", error)
            return
        if enable == "auto":
            kind, lacking = weight.device.type, None
            if kind == "cpu":
                lacking = native.refusal(self.stem, self.blocks, weight.dtype)
            elif kind != "cuda":
                lacking = "it saves memory but not time"
            if lacking:
                _LOGGER.info("fused='auto': off, on %s: %s", kind, lacking)
                return
            _LOGGER.info("fused='auto': on, by %s", "Triton" if kind == "cuda" else "native kernels")
        self.fused, self.sync_batchnorm = True, sync_batchnorm

    def _fused_features(self, x: Tensor, blocks: nn.Sequential, taken: list[int]) -> list[Tensor]:
        options = {"checkpointing": self.grad_checkpointing, "channels_last": self.channels_last}
        if native.takes(self.stem, blocks, x, taken, self.sync_batchnorm):
            return [native.features(self.stem, blocks, x, **options)]
        return fused.features(self.stem, blocks, x, taken, sync_batchnorm=self.sync_batchnorm, **options)

    def _check_fused(self) -> None:
        fused.check(self.stem, self.blocks, self.block_drop, depthwise=DepthwiseConv2d, residual=Residual)

    def _runs_fused(self, x: Tensor) -> bool:
        if not self.fused:
            return False
        if isinstance(x, torch.fx.Proxy):
            _say_plain("torch.fx")
            return False
        if _is_recorded(torch.compiler.is_compiling()):
            return False
        self._check_fused()  # layers may have been replaced
        if ops.is_forward_mode():
            raise ConvMixerError("fused blocks have no forward-mode derivatives (jvp, jacfwd): set_fused(False)")
        return True

    def __prepare_scriptable__(self) -> "ConvMixer":
        """Return the model: `torch.jit.script` calls this first."""
        if self.fused:
            _say_plain("torch.jit.script")
        return self

    # ---- timm's contract ----------------------------------------------------------------------------------------

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last one in `indices`, and the head.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Without effect. Part of timm's interface.
            prune_head: Also remove the head and the pool.

        Returns:
            The indices, counted from 0 and in rising order, as the features come.

        Raises:
            ArgumentError: An index that no block has.

        Example:
            >>> model = convmixer.ConvMixer(dim=64, depth=4, kernel_size=5, patch_size=2)
            >>> model.prune_intermediate_layers([0, 1])
            [0, 1]
            >>> model(torch.zeros(1, 3, 32, 32)).shape  # the features
            torch.Size([1, 64, 16, 16])
        """
        taken, last = take_indices(indices, len(self.blocks))
        self.blocks = self.blocks[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return sorted(taken)  # in the order in which the features come

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def get_classifier(self) -> nn.Module:
        """Return the head: a Linear, or Identity without classes."""
        return self.head

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new, randomly initialised one for `num_classes` (0: none), and the pool if given.

        The new classes have no names, even if there are as many as before: set `pretrained_cfg["label_names"]`.

        Raises:
            ArgumentError: A negative number, an unknown pool, or classes without a pool.

        Example:
            >>> model = convmixer.ConvMixer(dim=64, depth=4, kernel_size=5, patch_size=2)
            >>> model.reset_classifier(3)
            >>> model(torch.zeros(1, 3, 32, 32)).shape
            torch.Size([1, 3])
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._set_head(num_classes, pool, get_device_dtype(self))
        config = getattr(self, "pretrained_cfg", None)
        if num_classes and config:
            self.pretrained_cfg = {**config, **UNNAMED, "tag": None}  # these name the old classes
        self.global_pool.train(self.training)
        self.head.train(self.training)

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return the patterns that sort parameters into layers, for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore  # type: ignore[untyped-decorator]
    def no_weight_decay(self) -> set[str]:
        """Return further parameters without weight decay: none. timm's optimizers exempt biases and norms."""
        return set()

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> "_IncompatibleKeys":
        """Load as `nn.Module` does; a model on the meta device, which has no storage, takes the tensors over."""
        check_head(state_dict, self, "these weights")
        assign = assign or any(parameter.is_meta for parameter in self.parameters())
        differences: _IncompatibleKeys = super().load_state_dict(state_dict, strict, assign)
        return differences
