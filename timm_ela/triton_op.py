"""ELA by Triton kernels, as two custom operators: 3 passes over the feature map forward, 4 backward.

Differentiable, twice too, and opaque to torch.compile. For backward it keeps x, the gates and the parameters. The plain
formula is `fused.ela_reference`; `supported` tells where this file can stand in for it.
"""
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import ela_reference, strip_logits

try:
    from triton import JITFunction, cdiv, next_power_of_2

    from . import kernels
    INTERPRETED = not isinstance(kernels.pool_kernel, JITFunction)  # TRITON_INTERPRET=1
except ImportError:  # not every platform has Triton
    kernels = None  # type: ignore[assignment]
    INTERPRETED = False

MAX_WIDTH = 1024  # the kernels over feature maps hold whole rows
MAX_GROUP = 8192  # the kernels over strips hold a whole GroupNorm group
OPTIONS = {'enable_fp_fusion': True}  # multiply-add, as in PyTorch's kernels; left open, Triton 3.9 warns
TILE = 4096  # values of x that a program works on at once: at most 32 per thread, more would not fit its registers


@torch.compiler.assume_constant_result
def _runs_on(device: torch.device) -> bool:
    if kernels is None or INTERPRETED:
        return INTERPRETED
    return device.type == 'cuda' and torch.cuda.get_device_capability(device) >= (8, 0)


def supported(x: Tensor, conv_weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, norm_groups: int) -> bool:
    """Whether `ela_triton` takes these tensors, outside torch.func's transforms and forward-mode autograd.

    What the plain formula refuses is left to it, with the error.
    """
    return (
        _runs_on(x.device)
        and type(x) in (Tensor, torch.nn.Parameter)  # a distributed tensor knows no operator of ours
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and all(p.device == x.device and p.dtype in (x.dtype, torch.float32)
                for p in (conv_weight, norm_weight, norm_bias))
        and x.ndim == 4
        and x.numel() > 0
        and conv_weight.shape[0] == norm_weight.shape[0] == norm_bias.shape[0] == x.shape[1]
        and conv_weight.shape[2] % 2 == 1
        and norm_groups > 0 and not (x.shape[1] % norm_groups or x.shape[1] % conv_weight.shape[1])
        and x.shape[3] <= MAX_WIDTH
        and x[0].numel() < 2 ** 31  # offsets in one image are 32-bit
        and not (x.shape[0] * x.shape[1] == norm_groups and 1 in x.shape[2:])
    )


def ela_triton(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float = 1e-5,
) -> Tensor:
    """The same as `ela_reference`, for what is `supported`; float32 inside, whatever autocast says."""
    return ela_forward(x, conv_weight, norm_weight, norm_bias, norm_groups, eps)[0]


def _is_last(x: Tensor) -> bool:
    """Whether the kernels see x as channels_last; what is neither that nor contiguous is copied."""
    _, c, h, w = x.shape
    return x.stride(1) == 1 and c > 1 and h * w > 1 and not x.is_contiguous()  # of one channel or one pixel, both hold


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_last(x) else torch.contiguous_format


def _new_strips(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    if _is_last(x):
        return x.new_empty((n, h + w, c), dtype=torch.float32).transpose(1, 2)
    return x.new_empty((n, c, h + w), dtype=torch.float32)


def _launch_maps(kernel: Any, x: Tensor, tensors: tuple[Tensor, ...]) -> None:
    """Runs a kernel over feature maps: a program for each image and block of channels."""
    n, c, h, w = x.shape
    last, bw = _is_last(x), next_power_of_2(w)
    # Small batches have to occupy the GPU, too.
    if last:  # one row of few channels: sums over it cross one warp, seldom more
        bc = min(next_power_of_2(c), 64 if bw < 32 else max(8, min(32, TILE // 2 // bw)))
        while bc > 16 and c % bc or bc > 8 and n * cdiv(c, bc) < 1024:
            bc //= 2
        bh, warps = 1, max(1, bc * bw // 1024)
    else:
        bc = min(next_power_of_2(c), max(1, TILE // (bw * next_power_of_2(h))))
        while bc > 8 and n * cdiv(c, bc) < 256:
            bc //= 2
        bh, warps = min(next_power_of_2(h), max(1, TILE // (bw * bc))), 4
    v = gcd(w, 8)  # a constant that W is a multiple of: rows are read in vectors of as many values
    stages = min(3, cdiv(h, bh)) if bc * bh * bw <= TILE else 1  # blocks on their way while one is worked on, and that
    with torch.cuda.device_of(x):
        kernel[(n * cdiv(c, bc),)](
            *tensors, c, h, w // v, LAST=last, V=v, BC=bc, BH=bh, BW=bw, STAGES=stages, num_warps=warps, **OPTIONS)


def _launch_strips(
        kernel: Any, x: Tensor, tensors: tuple[Tensor, ...], kernel_size: int, groups: int, eps: float) -> None:
    """Runs a kernel over strips: a program for each image, strip and GroupNorm group."""
    n, c, h, w = x.shape
    bc, bl = next_power_of_2(c // groups), next_power_of_2(max(h, w))
    with torch.cuda.device_of(x):
        kernel[(n * groups * 2,)](
            *tensors, c, h, w, groups, eps, LAST=_is_last(x), K=kernel_size, BC=bc, BL=bl,
            num_warps=min(16, max(1, bc * bl // 256)), **OPTIONS)


def _has_strip_kernel(x: Tensor, conv_weight: Tensor, norm_groups: int) -> bool:
    _, c, h, w = x.shape
    group = next_power_of_2(c // norm_groups) * next_power_of_2(max(h, w))
    return conv_weight.shape[1] == 1 and group <= MAX_GROUP


@torch.library.custom_op('timm_ela::ela_forward', mutates_args=())
def ela_forward(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float,
) -> tuple[Tensor, Tensor]:
    """The gated x, and the gates (N, C, H + W)."""
    x = x.contiguous(memory_format=_memory_format(x))
    params = conv_weight.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    z, gates, y = _new_strips(x), _new_strips(x), torch.empty_like(x)
    _launch_maps(kernels.pool_kernel, x, (x, z))
    if _has_strip_kernel(x, conv_weight, norm_groups):
        _launch_strips(kernels.strip_kernel, x, (z, *params, gates), conv_weight.shape[2], norm_groups, eps)
    else:
        conv, gamma, beta = (p.float() for p in params)
        with torch.autocast(x.device.type, enabled=False):
            for z_, gate in zip(z.split(x.shape[2:], 2), gates.split(x.shape[2:], 2), strict=True):
                gate.copy_(strip_logits(z_.contiguous(), conv, gamma, beta, norm_groups, eps).sigmoid())
    _launch_maps(kernels.gate_kernel, x, (x, gates, y))
    return y, gates


@ela_forward.register_fake
def _(x, conv_weight, norm_weight, norm_bias, norm_groups, eps):
    return torch.empty_like(x, memory_format=_memory_format(x)), _new_strips(x)


def _strip_backward(
        z: Tensor, gate: Tensor, da: Tensor, conv: Tensor, gamma: Tensor, norm_groups: int, eps: float,
) -> list[Tensor]:
    """As the kernel: replaces z (N, C, L) by its gradient. Returns the parameters' gradients."""
    channels, group_size, kernel_size = conv.shape
    conv_groups, padding = channels // group_size, [kernel_size // 2]
    strip = z.contiguous()
    convolved = F.conv1d(strip, conv, None, padding=padding, groups=conv_groups).contiguous()
    sizes = len(z), channels, z.shape[2], norm_groups
    _, mean, rstd = torch.native_group_norm(convolved, gamma, None, *sizes, eps)
    grad = (da * gate * (1 - gate)).contiguous()
    grad, dgamma, dbeta = torch.ops.aten.native_group_norm_backward(
        grad, convolved, mean, rstd, gamma, *sizes, [True, True, True])
    dz, dconv, _ = torch.ops.aten.convolution_backward(
        grad, strip, conv, None, [1], padding, [1], False, [0], conv_groups, [True, True, False])
    z.copy_(dz)
    return [dconv, dgamma, dbeta]


@torch.library.custom_op('timm_ela::ela_backward', mutates_args=())
def ela_backward(
        dy: Tensor,
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        gates: Tensor,
        norm_groups: int,
        eps: float,
        needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty if not needed), of the convolution's weight, and of GroupNorm's scale and shift."""
    x = x.contiguous(memory_format=_memory_format(x))
    dy = dy.contiguous(memory_format=_memory_format(x))
    conv_weight, norm_weight = conv_weight.contiguous(), norm_weight.contiguous()
    # A hook on saved tensors may have changed the layout of x, or of the gates.
    gates = gates.transpose(1, 2).contiguous().transpose(1, 2) if _is_last(x) else gates.contiguous()
    z, da = _new_strips(x), _new_strips(x)
    _launch_maps(kernels.reduce_kernel, x, (x, gates, dy, z, da))
    if _has_strip_kernel(x, conv_weight, norm_groups):
        channels, _, kernel_size = conv_weight.shape
        shares = z.new_empty(2 * len(x), channels, kernel_size), *z.new_empty(2, 2 * len(x), channels)
        _launch_strips(
            kernels.strip_backward_kernel, x, (z, conv_weight, norm_weight, gates, da, *shares),
            kernel_size, norm_groups, eps)
        dconv, dgamma, dbeta = (share.sum(0) for share in shares)
    else:
        params, sizes = (conv_weight.float(), norm_weight.float()), x.shape[2:]
        with torch.autocast(x.device.type, enabled=False):
            of_h, of_w = (
                _strip_backward(*strips, *params, norm_groups, eps)
                for strips in zip(z.split(sizes, 2), gates.split(sizes, 2), da.split(sizes, 2), strict=True))
        dconv, dgamma, dbeta = (a + b for a, b in zip(of_h, of_w, strict=True))
    dx = x.new_empty(0)
    if needs_dx:
        dx = torch.empty_like(x)
        _launch_maps(kernels.expand_kernel, x, (gates, dy, z, dx))
    dconv = dconv.view(conv_weight.shape).to(conv_weight.dtype)
    return dx, dconv, dgamma.to(norm_weight.dtype), dbeta.to(norm_weight.dtype)


@ela_backward.register_fake
def _(dy, x, conv_weight, norm_weight, gates, norm_groups, eps, needs_dx):
    dx = torch.empty_like(x, memory_format=_memory_format(x)) if needs_dx else x.new_empty(0)
    dconv = torch.empty_like(conv_weight, memory_format=torch.contiguous_format)
    return dx, dconv, torch.empty_like(norm_weight), torch.empty_like(norm_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.norm_groups, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros are written for the gates' gradient


def _backward(ctx: Any, dy: Tensor | None, _dgates: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    x, conv_weight, norm_weight, norm_bias, gates = ctx.saved_tensors
    needed = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled():  # create_graph: the gradients must be differentiable themselves
        # Aliases: x may itself depend on the weights, and that path is not this operator's.
        inputs = x, conv_weight, norm_weight, norm_bias = [
            t.view_as(t) for t in (x, conv_weight, norm_weight, norm_bias)]
        with torch.autocast(x.device.type, enabled=False):
            y = ela_reference(
                x.float(), conv_weight.float(), norm_weight.float(), norm_bias.float(), ctx.norm_groups, ctx.eps)
            found = iter(torch.autograd.grad(
                y.to(x.dtype), [t for t, need in zip(inputs, needed, strict=True) if need], dy, create_graph=True))
        return *(next(found) if need else None for need in needed), None, None
    grads = ela_backward(dy, x, conv_weight, norm_weight, gates, ctx.norm_groups, ctx.eps, needed[0])
    return *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


ela_forward.register_autograd(_backward, setup_context=_setup_context)
