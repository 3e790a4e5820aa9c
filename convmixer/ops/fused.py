"""ConvMixer's stem and blocks with two feature maps per block kept for the backward pass.

    c = depthwise(x) + bias      z = BatchNorm(act(c)) + x      u = pointwise(z) + bias      y = BatchNorm(act(u))

Blocks pass on u with the scale and shift of its BatchNorm, instead of y = scale * act(u) + shift. Each block keeps c
and u; its backward pass computes x again from the u of the block before, and z from c and x. The functions return the
sums that BatchNorm needs. A function of vectors makes scale, shift, mean and variance of them. Its backward pass gives
the functions the gradients for their sums. Several processes are synchronised by adding up their sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from convmixer.errors import ArgumentError, ConvMixerError
from convmixer.ops import dispatch, reference
from convmixer.ops.depthwise import is_transformed
from convmixer.ops.limits import ACTIVATIONS

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# ---- functions with gradients ---------------------------------------------------------------------------------------


class _NoSecondDerivative(Function):
    """Passes on gradients; whoever differentiates them gets an error."""

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise ConvMixerError(
            "fused blocks have only first derivatives: for second ones, switch them off by set_fused(False)"
        )


def first_derivative(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Let the results of a backward pass raise an error when they are differentiated."""

    @functools.wraps(backward)
    def guarded(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        given = [result for result in results if result is not None]
        guarded = iter(_NoSecondDerivative.apply(len(given), *given, *grads, *ctx.saved_tensors))
        return tuple(None if result is None else next(guarded) for result in results)

    return guarded


class _Depthwise(Function):
    """(u, ...) of the block before -> x, c, and the sums of act(c)."""

    @staticmethod
    def forward(
        u: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        center: Tensor,
        act_before: str,
        act: str,
        batch: bool,
    ) -> tuple[Tensor, ...]:
        kernels = dispatch.kernels(u)
        x = kernels.normalize_act(u, scale, shift, act_before)
        return x, *kernels.depthwise(x, weight.to(u.dtype), bias.to(center.dtype), act, center)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        u, scale, shift, weight, bias, center, ctx.act_before, ctx.act, ctx.batch = inputs
        ctx.bias_type = bias.dtype
        ctx.save_for_backward(u, scale, shift, weight, center, output[1])

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_x: Tensor, grad_c: Tensor, grad_s: Tensor, grad_q: Tensor) -> tuple[Any, ...]:
        u, scale, shift, weight, center, c = ctx.saved_tensors
        kernels = dispatch.kernels(u)
        if ctx.batch:
            grad_c, _ = kernels.stats_grad(grad_c, c, ctx.act, center, grad_s, grad_q)
        grad_weight = grad_bias = grad_u = grad_scale = grad_shift = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            x = kernels.normalize_act(u, scale, shift, ctx.act_before)
            grad_weight, grad_bias = kernels.depthwise_weight_grad(x, grad_c, weight.shape[-1])
            grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_type)
        if any(ctx.needs_input_grad[:3]):
            grad_x = kernels.depthwise_input_grad(grad_c, weight.to(u.dtype), grad_x)
            grad_u, grad_scale, grad_shift = kernels.normalize_act_grad(grad_x, u, scale, ctx.act_before)
        return grad_u, grad_scale, grad_shift, grad_weight, grad_bias, None, None, None, None


class _Pointwise(Function):
    """c and x -> u, and the sums of act(u). What x is computed from is an input too, and is saved instead of x."""

    @staticmethod
    def forward(
        c: Tensor,
        scale: Tensor,
        shift: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        u_before: Tensor,
        scale_before: Tensor,
        shift_before: Tensor,
        center: Tensor,
        act_before: str,
        act: str,
        batch: bool,
    ) -> tuple[Tensor, ...]:
        matrix = weight.flatten(1).to(c.dtype)
        result: tuple[Tensor, ...] = dispatch.kernels(c).pointwise(
            c, scale, shift, x, matrix, bias.to(center.dtype), act, center
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        c, scale, shift, _, weight, bias, *before, center, ctx.act_before, ctx.act, ctx.batch = inputs
        ctx.bias_type = bias.dtype
        ctx.save_for_backward(c, scale, shift, weight, *before, center, output[0])

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_u: Tensor, grad_s: Tensor, grad_q: Tensor) -> tuple[Any, ...]:
        c, scale, shift, weight, u_before, scale_before, shift_before, center, u = ctx.saved_tensors
        kernels = dispatch.kernels(c)
        total = None
        if ctx.batch:
            grad_u, total = kernels.stats_grad(grad_u, u, ctx.act, center, grad_s, grad_q)
        grad_weight = grad_bias = grad_c = grad_scale = grad_shift = grad_z = None
        if ctx.needs_input_grad[4]:
            before = u_before, scale_before, shift_before, ctx.act_before
            z = kernels.sum_normalized(c, scale, shift, ctx.act, *before)
            grad_weight = kernels.pointwise_weight_grad(grad_u, z).to(weight.dtype)
            grad_weight = grad_weight.view(weight.shape)  # of the strides that DDP expects
        if ctx.needs_input_grad[5]:
            total = grad_u.sum((0, 2, 3), dtype=center.dtype) if total is None else total
            grad_bias = total.to(ctx.bias_type)
        if any(ctx.needs_input_grad[:4]):
            grad_z = kernels.pointwise_input_grad(grad_u, weight.flatten(1).to(c.dtype))
            grad_c, grad_scale, grad_shift = kernels.normalize_act_grad(grad_z, c, scale, ctx.act)
        return grad_c, grad_scale, grad_shift, grad_z, grad_weight, grad_bias, *[None] * 7


class _Normalize(Function):
    """`scale * act(u) + shift`, of which only u is kept."""

    @staticmethod
    def forward(u: Tensor, scale: Tensor, shift: Tensor, act: str) -> Tensor:
        result: Tensor = dispatch.kernels(u).normalize_act(u, scale, shift, act)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        u, scale, _, ctx.act = inputs
        ctx.save_for_backward(u, scale)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        u, scale = ctx.saved_tensors
        return *dispatch.kernels(u).normalize_act_grad(grad, u, scale, ctx.act), None


class _Stats(Function):
    """The sums of act(u), for the stem."""

    @staticmethod
    def forward(u: Tensor, center: Tensor, act: str) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = dispatch.kernels(u).stats(u, act, center)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        u, center, ctx.act = inputs
        ctx.save_for_backward(u, center)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_s: Tensor, grad_q: Tensor) -> tuple[Any, ...]:
        u, center = ctx.saved_tensors
        grad, _ = dispatch.kernels(u).stats_grad(torch.zeros_like(u), u, ctx.act, center, grad_s, grad_q)
        return grad, None, None


class _Affine(Function):
    """The sums of act(u) -> scale and shift of its BatchNorm, and its mean and variance, which pass on no gradients."""

    @staticmethod
    def forward(
        s: Tensor, q: Tensor, center: Tensor, weight: Tensor | None, bias: Tensor | None, count: float, eps: float
    ) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = dispatch.kernels(s).affine(s, q, center, weight, bias, count, eps)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        s, q, center, weight, bias, ctx.count, ctx.eps = inputs
        ctx.has_weight, ctx.has_bias = weight is not None, bias is not None
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)  # no zeros for mean and variance
        ctx.save_for_backward(s, q, center, *(() if weight is None else (weight,)))

    @staticmethod
    @first_derivative
    def backward(ctx: Any, grad_scale: Tensor | None, grad_shift: Tensor | None, *_: None) -> tuple[Any, ...]:
        s, q, center, *weights = ctx.saved_tensors
        grad_scale = torch.zeros_like(s) if grad_scale is None else grad_scale
        grad_shift = torch.zeros_like(s) if grad_shift is None else grad_shift
        weight = weights[0] if weights else None
        grad_s, grad_q, grad_weight = dispatch.kernels(s).affine_grad(
            grad_scale, grad_shift, s, q, center, weight, ctx.count, ctx.eps
        )
        grad_weight, grad_bias = grad_weight if ctx.has_weight else None, grad_shift if ctx.has_bias else None
        return grad_s, grad_q, None, grad_weight, grad_bias, None, None


class _AllReduce(Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(x: Tensor, group: Any) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _AllReduce.apply(grad, ctx.group), None


# ---- BatchNorm of sums ----------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean, variance, and variance without bias, per channel (C,)."""

    mean: Tensor
    var: Tensor
    unbiased: Tensor


def _processes(group: Any) -> int:
    distributed = torch.distributed
    return distributed.get_world_size(group) if distributed.is_available() and distributed.is_initialized() else 1


def is_synchronised(module: Any, asked: bool) -> bool:
    """Return whether a BatchNorm sees the images of other processes, by its class or because that was asked for."""
    wanted = module.training and (asked or type(module) is nn.SyncBatchNorm)
    return wanted and _processes(getattr(module, "process_group", None)) > 1


def check_count(shape: Sequence[int]) -> None:
    """Raise ArgumentError for features (B, C, H, W) whose variance BatchNorm cannot take."""
    count = shape[0] * shape[2] * shape[3]
    if count < 2:
        raise ArgumentError(
            "BatchNorm in training mode needs more than 1 value per channel, and features of shape "
            f"{tuple(shape)} have {count}: give more images, or larger ones"
        )


def _expected(convolution: Any, act: str, u: Tensor, features: Tensor | None, wide: torch.dtype) -> Tensor:
    """Estimate the mean of `act(u)`, (C,), where u is a convolution of an input whose mean is `features`; None: zero.

    BatchNorm's sums are taken relative to it, so that their squares keep the digits of the variance. It depends only on
    parameters, since a forward pass must not change what its backward pass reads. Running means do change: even if they
    are copied, a compiler computes the copy again in the backward pass, from means that have moved.
    """
    if features is None:
        return reference.activate(convolution.bias.detach().to(wide), act)
    weight, bias = convolution.weight.detach(), convolution.bias.detach()
    mean: Tensor = dispatch.kernels(u).expected_mean(weight, bias, features, act)
    return mean


@dataclass(frozen=True)
class _Norm:
    """What a BatchNorm does to activations whose sums are known.

    Attributes:
        weight, bias: Its parameters, (C,); None if it has none.
        mean: The running mean or, with `batch`, what sums are taken relative to, (C,).
        var: The running variance, (C,); None with `batch`.
        eps: What is added to the variance.
        batch: Whether it uses the statistics of this batch.
        synchronised: Whether the batch is that of all processes in `group`.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor | None
    eps: float
    batch: bool
    synchronised: bool
    group: Any

    @staticmethod
    def of(module: Any, convolution: Any, act: str, u: Tensor, features: Tensor | None, synchronised: bool) -> _Norm:
        """Describe a BatchNorm after the activation of u, the output of a convolution of features of this mean."""
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        batch = module.training or module.running_mean is None
        if batch:
            mean, var = _expected(convolution, act, u, features, wide), None
        else:
            mean, var = (running.detach().to(wide, copy=True) for running in (module.running_mean, module.running_var))
        group = getattr(module, "process_group", None)
        synchronised = is_synchronised(module, synchronised)
        weight, bias = (None if p is None else p.to(wide) for p in (module.weight, module.bias))
        return _Norm(weight, bias, mean, var, module.eps, batch, synchronised, group)

    @property
    def features(self) -> Tensor:
        """The mean of its outputs, (C,)."""
        return torch.zeros_like(self.mean) if self.bias is None else self.bias.detach()

    def affine(self, u: Tensor, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor, Moments]:
        """Return BatchNorm's scale and shift, (C,) each, and the moments that they are made of.

        Args:
            u: What the activation takes, (B, C, H, W), for its shape.
            sums: The sums of `act(u) - mean` and of its square, (C,) each. Without `batch` they are not read: the
                moments are then the running ones.

        Raises:
            ArgumentError: There are fewer than two values per channel.
        """
        if self.var is not None:
            affine = reference.scale_and_shift(self.mean, self.var, self.weight, self.bias, self.eps)
            return *affine, Moments(self.mean, self.var, self.var)
        s, q = sums
        count: Any = u.shape[0] * u.shape[2] * u.shape[3]
        divisor = torch.sym_float(count)
        if self.synchronised:
            # All processes have the same parameters, so their sums are relative to the same mean.
            total = _AllReduce.apply(torch.cat([s, q, s.new_full((1,), count)]), self.group)
            count, divisor = total[-1].detach(), 1.0  # kernels take a number, so the sums are divided here
            s, q = (total[:-1] / count).chunk(2)
        else:
            check_count(u.shape)
        scale, shift, mean, var = _Affine.apply(s, q, self.mean, self.weight, self.bias, divisor, self.eps)
        return scale, shift, Moments(mean, var, var * (count / (count - 1)))


class _Track(Function):
    """Moves the running statistics of one BatchNorm. `torch.func` lets only a `Function` change a module's tensors."""

    @staticmethod
    def forward(
        mean: Tensor, unbiased: Tensor, running_mean: Tensor, running_var: Tensor, count: Tensor | None, momentum: Any
    ) -> None:
        if count is not None:
            count.add_(1)
            if momentum is None:  # a cumulative average
                momentum = 1 / count.to(mean.dtype)
        for running, now in ((running_mean, mean), (running_var, unbiased)):
            wide = running.to(now.dtype)
            running.copy_(wide + (now - wide) * (0.0 if momentum is None else momentum))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


@torch.no_grad()
def track(norms: Iterable[Any], moments: Iterable[Moments]) -> None:
    """Move running statistics and counters as nn.BatchNorm2d does in training.

    Layers with the same momentum move together, in a few kernels. Layers without a momentum, or whose statistics have
    another type than the moments, move one by one, and so do all layers under `torch.func`.

    Args:
        norms: The BatchNorm layers; those in evaluation mode, without running statistics or without
            `track_running_stats` do not move.
        moments: Those of the batch for each layer.
    """
    together: dict[Any, list[tuple[Any, Moments]]] = {}
    seen: list[Any] = []
    for norm, batch in zip(norms, moments, strict=True):
        if not norm.training or not norm.track_running_stats or norm.running_mean is None:
            continue
        if is_transformed() or norm.momentum is None or norm.running_mean.dtype != batch.mean.dtype:
            move = _Track.apply if is_transformed() else _Track.forward
            statistics = norm.running_mean, norm.running_var, norm.num_batches_tracked
            move(batch.mean, batch.unbiased, *statistics, norm.momentum)
        else:
            before = sum(norm is other for other in seen)  # a list that holds a tensor twice would lose an update
            together.setdefault((norm.momentum, before), []).append((norm, batch))
            seen.append(norm)
    for (momentum, _), pairs in together.items():
        running = [tensor for norm, _ in pairs for tensor in (norm.running_mean, norm.running_var)]
        torch._foreach_lerp_(
            running, [tensor for _, batch in pairs for tensor in (batch.mean, batch.unbiased)], momentum
        )
        counters = [norm.num_batches_tracked for norm, _ in pairs if norm.num_batches_tracked is not None]
        if counters:
            torch._foreach_add_(counters, 1)


# ---- stem and blocks ------------------------------------------------------------------------------------------------


class _State(NamedTuple):
    """Features `scale * act(u) + shift`, or u itself where scale and shift are None; `mean` estimates their means."""

    u: Tensor
    scale: Tensor | None
    shift: Tensor | None
    act: str
    mean: Tensor


def features(
    stem: Any,
    blocks: Any,
    images: Tensor,
    taken: Iterable[int],
    *,
    checkpointing: bool = False,
    sync_batchnorm: bool = False,
    channels_last: bool = False,
) -> list[Tensor]:
    """Compute the outputs of stem and blocks for images; `check` says what these layers must be.

    Args:
        stem: Convolution, activation, BatchNorm.
        blocks: See `check`.
        images: (B, in_chans, H, W).
        taken: The blocks whose output is wanted, as numbers.
        checkpointing: Save one feature map per block, u, and compute c again in the backward pass.
        sync_batchnorm: In training, BatchNorm sees the images of all processes.
        channels_last: Compute in channels_last, whatever the layout of images and weights; on CUDA devices always.

    Returns:
        Feature maps (B, C, h, w), in the order of the blocks.
    """

    def compute(images: Tensor) -> tuple[list[Tensor], list[Moments]]:
        state, *moments = _embed(stem, images, kernel_sizes(blocks), sync_batchnorm, channels_last)
        found: list[Tensor] = []
        for i, block in enumerate(blocks):
            state, *more = _mix(block, state, checkpointing and not torch.compiler.is_compiling(), sync_batchnorm)
            moments += more
            if i in taken:
                found.append(_normalize(state))
        return found, moments

    run: Any = compute
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        # By itself, a compiler also saves a part of what the backward pass would compute again.
        policy = functools.partial(_policy, checkpointing)
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        run = functools.partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    found: list[Tensor]
    found, moments = run(images)
    track([norm for _, norm in layers(stem, blocks)], moments)  # here, as a checkpoint would do it twice
    return found


def _policy(checkpointing: bool, _context: Any, operator: Any, *arguments: Any, **_options: Any) -> CheckpointPolicy:
    """Say whether a compiler saves the result of an operator for the backward pass."""
    name = str(operator)  # the Triton operators exist only where Triton does
    if operator is torch.ops.aten.convolution.default:
        saved = not checkpointing or arguments[8] == 1  # groups
    elif name == "convmixer.triton_depthwise.default":
        saved = not checkpointing
    else:  # besides u, vectors and the sums that make them
        saved = name == "convmixer.triton_pointwise.default" or operator is torch.ops.aten.sum.dim_IntList
        saved |= all(argument.ndim < 2 for argument in arguments if isinstance(argument, Tensor))
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def _embed(
    stem: Any, images: Tensor, sizes: Iterable[int], sync_batchnorm: bool, channels_last: bool
) -> tuple[_State, Moments]:
    """Compute the stem."""
    convolution, act, module = stem
    u = convolution(images)
    dispatch.check(u.device, u.dtype, sizes)  # autocast chooses the type, and models move
    if u.is_cuda or channels_last:
        u = u.contiguous(memory_format=torch.channels_last)  # on CUDA as the kernels write
    act = ACTIVATIONS[type(act)]
    norm = _Norm.of(module, convolution, act, u, None, sync_batchnorm)
    scale, shift, moments = norm.affine(u, _Stats.apply(u, norm.mean, act) if norm.batch else ())
    return _State(u, scale, shift, act, norm.features), moments


def _mix(block: Any, state: _State, checkpointing: bool, sync_batchnorm: bool) -> tuple[_State, Moments, Moments]:
    """Compute a block."""
    (depthwise, act, module1), (_, pointwise, _, module2) = block[0].fn, block
    u, act = state.u, ACTIVATIONS[type(act)]
    norm1 = _Norm.of(module1, depthwise, act, u, state.mean, sync_batchnorm)
    norm2 = _Norm.of(module2, pointwise, act, u, state.mean + norm1.features, sync_batchnorm)
    if not (torch.is_grad_enabled() or norm1.batch or norm2.batch):
        return _infer(depthwise, pointwise, norm1, norm2, _normalize(state), act)
    before, scale, shift = state.act, state.scale, state.shift
    if scale is None or shift is None:
        before, scale, shift = "identity", torch.ones_like(norm1.mean), torch.zeros_like(norm1.mean)

    def compute(u: Tensor, scale: Tensor, shift: Tensor, *parameters: Tensor) -> tuple[Any, ...]:
        x, c, *sums = _Depthwise.apply(u, scale, shift, *parameters[:2], norm1.mean, before, act, norm1.batch)
        *affine, moments = norm1.affine(c, sums)
        input_of_block = u.detach(), scale.detach(), shift.detach()
        return *_Pointwise.apply(
            c, *affine, x, *parameters[2:], *input_of_block, norm2.mean, before, act, norm2.batch
        ), *moments

    run: Any = compute
    if checkpointing and torch.is_grad_enabled():
        run = functools.partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    # Parameters are arguments: what is computed again must use these, whatever the modules hold by then.
    parameters = (depthwise.weight, depthwise.bias, pointwise.weight, pointwise.bias)
    u, s, q, *moments1 = run(u, scale, shift, *parameters)
    scale, shift, moments2 = norm2.affine(u, (s, q))
    return _State(u, scale, shift, act, norm2.features), Moments(*moments1), moments2


def _infer(
    depthwise: Any, pointwise: Any, norm1: _Norm, norm2: _Norm, x: Tensor, act: str
) -> tuple[_State, Moments, Moments]:
    """Compute a block without gradients and by running statistics."""
    kernels, wide = dispatch.kernels(x), norm1.mean.dtype
    *affine1, moments1 = norm1.affine(x, ())
    *affine2, moments2 = norm2.affine(x, ())
    weights = depthwise.weight.to(x.dtype), depthwise.bias.to(wide), act
    z = kernels.depthwise_infer(x, *weights, *affine1, x)
    weights = pointwise.weight.flatten(1).to(x.dtype), pointwise.bias.to(wide), act
    u = kernels.pointwise_infer(z, *weights, *affine2)
    return _State(u, None, None, act, norm2.features), moments1, moments2


def _normalize(state: _State) -> Tensor:
    """Return the features themselves, (B, C, H, W)."""
    if state.scale is None:
        return state.u
    result: Tensor = _Normalize.apply(state.u, state.scale, state.shift, state.act)
    return result


# ---- what can be fused ----------------------------------------------------------------------------------------------


def cannot_compile() -> str | None:
    """Say why `torch.compile` does not take fused blocks; None where it does."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8):
        here = torch.__version__
        return f"torch.compile of fused blocks needs torch 2.8, this is {here}: set_fused(False), or no compile"
    return None


def layers(stem: Any, blocks: Any) -> list[tuple[Any, Any]]:
    """Return each convolution with its BatchNorm: the stem's, then depthwise and pointwise of each block."""
    found = [(stem[0], stem[2])]
    for block in blocks:
        found += [(block[0].fn[0], block[0].fn[2]), (block[1], block[3])]
    return found


def kernel_sizes(blocks: Any) -> list[int]:
    """Return the kernel size of the depthwise convolution of each block."""
    return [block[0].fn[0].kernel_size[0] for block in blocks]


def check(stem: Any, blocks: Any, block_drop: nn.Module, depthwise: type, residual: type[Any]) -> None:
    """Raise ArgumentError where fused blocks would not compute what the layers compute.

    Args:
        stem: Convolution, activation, BatchNorm.
        blocks: Each a residual of depthwise convolution, activation and BatchNorm; pointwise convolution, activation,
            BatchNorm.
        block_drop: Dropout before every block.
        depthwise: Class of the depthwise convolutions.
        residual: Class of the residuals.
    """
    found = _obstacles(stem, blocks, block_drop, depthwise, residual)
    if found:
        _refuse(found[0])


# Not compiled: PyTorch 2.8 and 2.9 run a function that raises again, in parts, and then overlook hooks.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse(reason: str) -> None:
    raise ArgumentError(f"this model cannot be fused: {reason}. set_fused(False) runs its layers one by one")


def _obstacles(stem: Any, blocks: Any, block_drop: Any, depthwise: type, residual: type[Any]) -> list[str]:
    """Say what keeps a model from being fused, one line each."""
    found: list[str] = []  # not a generator: PyTorch 2.7 does not look into those while it compiles
    for name, module in (("blocks", blocks), ("block_drop", block_drop)):
        if _has_hooks(module):
            found.append(f"{name} has hooks or a forward of its own, which would not be called")
    if block_drop.p:
        found.append(f"block_drop_rate={block_drop.p}, and fused blocks have no dropout between them")
    plain = ((nn.Conv2d,), tuple(ACTIVATIONS), _NORMS)
    groups: list[tuple[str, Any, Any]] = [("stem", stem, plain)]
    for i, block in enumerate(blocks):
        groups.append((f"blocks.{i}", block, ((residual,), *plain)))
        first: Any = block[0]
        if isinstance(first, residual):
            groups.append((f"blocks.{i}.0.fn", first.fn, ((depthwise,), *plain[1:])))
            if _has_hooks(first.drop_path):
                found.append(f"blocks.{i}.0.drop_path has hooks or a forward of its own, which would not be called")
            if getattr(first.drop_path, "drop_prob", 0.0):
                found.append("drop_path_rate is above 0, and fused blocks have no stochastic depth")
    activations: list[str] = []
    for group, modules, expected in groups:
        for i, (module, classes) in enumerate(zip(modules, expected, strict=False)):
            found += [f"{group}.{i} {what}" for what in _layer_obstacles(module, classes, group == "stem")]
            if type(module) in ACTIVATIONS:
                activations.append(type(module).__name__)
        if len(modules) != len(expected):
            found.append(f"{group} has {len(modules)} layers, not {len(expected)}")
        if _has_hooks(modules):
            found.append(f"{group} has hooks or a forward of its own, which would not be called")
    if len(set(activations)) > 1:
        found.append(f"its activations differ: {', '.join(sorted(set(activations)))}")
    return found


def _layer_obstacles(module: Any, classes: Sequence[type], in_stem: bool) -> list[str]:
    """Say what keeps one layer from being fused."""
    found: list[str] = []
    kind = type(module)
    if kind not in classes:
        names = [c.__name__ for c in classes]
        own = f"{kind.__name__} of {kind.__module__}" if kind.__name__ in names else kind.__name__
        found.append(f"is a {own}, not {' or '.join(names)}")
    if getattr(module, "approximate", "none") != "none":
        found.append(f"is a GELU approximated by {module.approximate}")
    if isinstance(module, nn.Conv2d) and module.bias is None:
        found.append("has no bias")
    if kind is nn.Conv2d and not in_stem and _geometry(module) != ((1, 1), (1, 1), (0, 0), 1):
        found.append("is not a plain 1x1 convolution")
    if _has_hooks(module):
        found.append("has hooks or a forward of its own, which would not be called")
    return found


def _geometry(convolution: Any) -> tuple[Any, ...]:
    return convolution.kernel_size, convolution.stride, convolution.padding, convolution.groups


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module runs more than the `forward` of its class."""
    return any(getattr(module, hooks) for hooks in _HOOKS) or "forward" in module.__dict__
