"""Efficient Local Attention as functions: the plain formula, its forms for compilers and exports, and the eager path.

`ELA: Efficient Local Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2403.01123
"""
import logging
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from .tracing import is_exporting, is_traced, is_transformed

_FUSED = True
if (_value := os.environ.get('TIMM_ELA_FUSED', '1')) in ('0', '1'):
    _FUSED = _value == '1'
else:
    logging.getLogger(__name__).warning(f'TIMM_ELA_FUSED={_value} is neither 0 nor 1: taken as 1.')


def set_fused(enable: bool = True) -> None:
    """Chooses how `ela` computes in eager mode, as timm's `set_fused_attn` does. TIMM_ELA_FUSED sets the default.

    Args:
        enable: Take the path that costs less; else the plain formula, `ela_reference`.
    """
    global _FUSED
    _FUSED = enable


def strip_logits(
        z: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float,
) -> Tensor:
    """The logits (N, C, L) of one gate from its pooled strip z (N, C, L): GroupNorm(Conv1d(z))."""
    channels, group_size, kernel_size = conv_weight.shape
    z = F.conv1d(z, conv_weight, None, padding=[kernel_size // 2], groups=channels // group_size)
    return F.group_norm(z, norm_groups, norm_weight, norm_bias, eps)


def open_gates(x: Tensor, logits_h: Tensor, logits_w: Tensor) -> tuple[Tensor, Tensor]:
    """The gates a_h and a_w of x from their logits, of the logits' shapes and in x's dtype."""
    # Under CUDA autocast GroupNorm returns float32, which would promote the whole activation.
    return logits_h.sigmoid().to(x.dtype), logits_w.sigmoid().to(x.dtype)


def gate(x: Tensor, logits_h: Tensor, logits_w: Tensor) -> Tensor:
    """Multiplies x (N, C, H, W) by the gates that logits_h (N, C, H) and logits_w (N, C, W) open."""
    a_h, a_w = open_gates(x, logits_h, logits_w)
    return x * a_h.unsqueeze(3) * a_w.unsqueeze(2)


def ela_reference(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float = 1e-5,
) -> Tensor:
    """The formula, written plainly: document, oracle, and what TorchScript and exports of free sizes trace.

    Args:
        x: Feature map (N, C, H, W).
        conv_weight: Weight (C, C / groups, K) of the one convolution that serves both strips, K odd.
        norm_weight: GroupNorm's scale (C,).
        norm_bias: GroupNorm's shift (C,).
        norm_groups: Groups of the GroupNorm.
        eps: GroupNorm's epsilon.

    Returns:
        x * a_h * a_w, (N, C, H, W) in x's dtype.
    """
    logits_h = strip_logits(x.mean(3), conv_weight, norm_weight, norm_bias, norm_groups, eps)
    logits_w = strip_logits(x.mean(2), conv_weight, norm_weight, norm_bias, norm_groups, eps)
    return gate(x, logits_h, logits_w)


def _ela_compiled(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float,
) -> Tensor:
    """`ela_reference` with strips that stay 4-D, for torch.compile.

    Inductor computes maps in channels_last on a CPU, and 4-D strips with them. Strips of 3-D stay as they are, and the
    product with them is then not vectorized.
    """
    groups, half = conv_weight.shape[0] // conv_weight.shape[1], conv_weight.shape[2] // 2
    z_h = F.conv2d(x.mean(3, keepdim=True), conv_weight.unsqueeze(3), None, padding=(half, 0), groups=groups)
    z_w = F.conv2d(x.mean(2, keepdim=True), conv_weight.unsqueeze(2), None, padding=(0, half), groups=groups)
    a_h, a_w = open_gates(x, *(F.group_norm(z, norm_groups, norm_weight, norm_bias, eps) for z in (z_h, z_w)))
    return x * a_h * a_w


def _ela_exported(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float,
) -> Tensor:
    """`ela_reference` for an export of fixed H and W, in operators that onnxruntime computes in its blocked layout.

    Strips are maps of width 1, pooled and convolved as maps are. GroupNorm's scale and shift are a 1x1 convolution,
    as products that repeat a factor along a short axis are slow there; of those, one is left, of the two gates.
    """
    n, channels, height, width = x.shape
    group_size, kernel_size = conv_weight.shape[1:]

    def gate_of(z: Tensor, length: int) -> Tensor:
        z = F.conv2d(
            z, conv_weight.unsqueeze(3), None, padding=(kernel_size // 2, 0), groups=channels // group_size)
        z = F.instance_norm(z.reshape(n, norm_groups, channels // norm_groups * length, 1), eps=eps)
        z = z.reshape(n, channels, length, 1)
        return F.conv2d(z, norm_weight.view(-1, 1, 1, 1), norm_bias, groups=channels).sigmoid().to(x.dtype)

    a_h = gate_of(F.avg_pool2d(x, (1, width)), height)
    a_w = gate_of(F.avg_pool2d(x, (height, 1)).reshape(n, channels, width, 1), width)
    return x * (a_h * a_w.reshape(n, channels, 1, width))


def _channels_last_on_cpu(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.device.type == 'cpu'


def _lay_out(strip: Tensor, x: Tensor) -> Tensor:
    """A strip (N, C, L) in the memory format of x: mixed formats multiply slowly."""
    if _channels_last_on_cpu(x):
        return strip.transpose(1, 2).contiguous().transpose(1, 2)
    return strip


def pool_strips(x: Tensor, divide: bool = True) -> tuple[Tensor, Tensor]:
    """Means of x, or sums, over its width (N, C, H) and its height (N, C, W), by the faster way for its layout."""
    if _channels_last_on_cpu(x):
        # a reduction over one axis is far slower than pooling over the same strip
        sizes, divisor = ((1, x.shape[3]), (x.shape[2], 1)), None if divide else 1
        of_h, of_w = (F.avg_pool2d(x, size, divisor_override=divisor) for size in sizes)
        return of_h.squeeze(3), of_w.squeeze(2)
    return (x.mean(3), x.mean(2)) if divide else (x.sum(3), x.sum(2))


class _Pool(Function):
    """x and its two strips. Backward adds the strips' gradients to that of x in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.size = x.shape[2:]
        return x.view_as(x), *pool_strips(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_h: Tensor, grad_w: Tensor) -> Tensor:
        height, width = ctx.size
        grad_h = _lay_out(grad_h / width, grad).unsqueeze(3)
        grad_w = _lay_out(grad_w / height, grad).unsqueeze(2)
        if torch.is_grad_enabled():  # a graph of this backward is asked for
            return grad + grad_h + grad_w
        return grad.add_(grad_h).add_(grad_w)  # in place: only _Gate.backward has it


def _depthwise_conv(z: Tensor, weight: Tensor) -> Tensor:
    # conv1d does not use oneDNN for short strips, and takes 20 times as long
    z, weight = z.unsqueeze(2), weight.unsqueeze(2)
    return F.conv2d(z, weight, None, padding=[0, weight.shape[3] // 2], groups=weight.shape[0]).squeeze(2)


class _DepthwiseConv(Function):
    """The depthwise convolution of the strips. PyTorch's own backward pass takes many times as long."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        return _depthwise_conv(z, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        z, weight = (t.to(grad.dtype) for t in ctx.saved_tensors)  # autocast's
        grad_weight, half = None, weight.shape[2] // 2
        if ctx.needs_input_grad[1]:
            shifted = F.pad(z, (half, half)).unfold(2, z.shape[2], 1)  # (N, C, taps, L), a view
            grad_weight = torch.stack([(grad * tap).sum(0) for tap in shifted.unbind(2)], 1).sum(2).unsqueeze(1)
        return _depthwise_conv(grad, weight.flip(2)), grad_weight


class _Gate(Function):
    """x * sigmoid(logits_h) * sigmoid(logits_w). It saves x and nothing else of its size, and backward reads x once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits_h: Tensor, logits_w: Tensor) -> Tensor:
        ctx.save_for_backward(x, logits_h, logits_w)
        return _gated(x, logits_h, logits_w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, logits_h, logits_w = ctx.saved_tensors
        grad_x = _gated(grad, logits_h, logits_w)
        # d sigmoid = a (1 - a), and a is in grad_x already: one product serves both strips
        sum_h, sum_w = pool_strips(grad_x * x, divide=False)
        return grad_x, sum_h * (-logits_h).sigmoid(), sum_w * (-logits_w).sigmoid()  # 1 - a, of all its bits


def _gated(x: Tensor, logits_h: Tensor, logits_w: Tensor, inplace: bool = False) -> Tensor:
    """`gate`, in at most one allocation if no graph is recorded."""
    a_h, a_w = open_gates(x, logits_h, logits_w)
    y = x.mul_(a_h.unsqueeze(3)) if inplace else x * a_h.unsqueeze(3)
    return y * a_w.unsqueeze(2) if torch.is_grad_enabled() else y.mul_(a_w.unsqueeze(2))


def _logits(z: Tensor, conv_weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, groups: int, eps: float) -> Tensor:
    """`strip_logits`, faster for short strips and in the backward pass on a CPU."""
    # Drop taps that only ever see padding: with them, strips of length 2 run 27 times slower.
    spare = max(0, conv_weight.shape[2] // 2 + 1 - max(1, z.shape[2]))
    conv_weight = conv_weight[..., spare:conv_weight.shape[2] - spare]
    if conv_weight.shape[1] == 1 and z.device.type == 'cpu':
        conv = _DepthwiseConv.apply if torch.is_grad_enabled() else _depthwise_conv
        return F.group_norm(conv(z, conv_weight), groups, norm_weight, norm_bias, eps)
    return strip_logits(z, conv_weight, norm_weight, norm_bias, groups, eps)


def _both_logits(x: Tensor, z_h: Tensor, z_w: Tensor, *args: Any) -> list[Tensor]:
    """The logits of both gates in the memory format of x, in one batch if the strips have the same length."""
    # Do not batch strips of length 1: GroupNorm's single-value error would vanish.
    if z_h.shape == z_w.shape and z_h.shape[2] > 1:
        both = torch.cat([z_h.unsqueeze(2), z_w.unsqueeze(2)]).squeeze(2)  # of 4-D strips, cat keeps the layout
        return list(_lay_out(_logits(both, *args), x).chunk(2))
    return [_lay_out(_logits(z, *args), x) for z in (z_h, z_w)]


def _owns_its_memory(x: Tensor) -> bool:
    """True unless x shares its memory: in inference mode PyTorch does not record views, and only their size tells."""
    return not (x.requires_grad or x._is_view()) and x.untyped_storage().nbytes() == x.numel() * x.element_size()


def _is_autocast(x: Tensor) -> bool:
    """True if autocast casts x, so that x and the weights may differ in dtype."""
    device, casts = x.device.type, (torch.float32, torch.float16, torch.bfloat16)
    return x.dtype in casts and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_input(x: Tensor, conv_weight: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> None:
    """Raises a ValueError unless x is 4-D, with the weights' channels, device and (but under autocast) dtype."""
    if x.ndim != 4 or x.shape[1] != norm_weight.shape[0]:
        raise ValueError(
            f'ELA expects an input of shape (N, {norm_weight.shape[0]}, H, W), got {tuple(x.shape)}.')
    for name, value in (('conv.weight', conv_weight), ('gn.weight', norm_weight), ('gn.bias', norm_bias)):
        if value.device != x.device:
            raise ValueError(f'ELA expects {name} on the input\'s device, {x.device}, got {value.device}.')
        if value.dtype != x.dtype and not _is_autocast(x):
            raise ValueError(
                f'ELA expects {name} in the input\'s dtype, {x.dtype}, got {value.dtype}: cast one, or use autocast.')


def ela(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float = 1e-5,
        inplace: bool = False,
) -> Tensor:
    """The same as `ela_reference`, at less cost in eager mode.

    Keeps nothing of x's size for the backward pass but x itself.

    Args:
        x: Feature map (N, C, H, W).
        conv_weight: Weight (C, C / groups, K) of the convolution.
        norm_weight: GroupNorm's scale (C,).
        norm_bias: GroupNorm's shift (C,).
        norm_groups: Groups of the GroupNorm.
        eps: GroupNorm's epsilon.
        inplace: Write the result into x, in eager mode, if no graph is recorded and x is neither a view nor requires
            a gradient. The plain formula, and what is compiled, exported or scripted, never writes into x.

    Returns:
        x * a_h * a_w, (N, C, H, W) in x's dtype.

    Raises:
        ValueError: If x is not 4-D, its channels are not those of the weights, or devices or dtypes are mixed (other
            dtypes of the weights are right under autocast); in eager mode.
    """
    if torch.jit.is_scripting():  # an fx graph is scripted through this function
        return ela_reference(x, conv_weight, norm_weight, norm_bias, norm_groups, eps)
    else:
        return _ela(x, conv_weight, norm_weight, norm_bias, norm_groups, eps, inplace)


def _ela(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        groups: int,
        eps: float,
        inplace: bool,
) -> Tensor:
    args = (conv_weight, norm_weight, norm_bias, groups, eps)
    # An exported program needs nothing of ours to run. Pooling needs known sizes (in dynamo, every size looks like an
    # int); instance_norm needs more than one value, even where GroupNorm takes one in each of several samples.
    if (is_exporting() and not torch.compiler.is_dynamo_compiling()
            and isinstance(x.shape[2], int) and isinstance(x.shape[3], int)
            and x.shape[1] // groups * min(x.shape[2:]) > 1):
        return _ela_exported(x, *args)
    # A compiler fuses by itself. In an export of free sizes, 4-D strips would forbid some of them.
    if is_traced():
        compiled = torch.compiler.is_dynamo_compiling() and not is_exporting()
        return _ela_compiled(x, *args) if compiled else ela_reference(x, *args)
    check_input(x, conv_weight, norm_weight, norm_bias)
    if not _FUSED or is_transformed():
        return ela_reference(x, *args)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, conv_weight, norm_weight, norm_bias))):
        with torch.no_grad():
            logits_h, logits_w = _both_logits(x, *pool_strips(x), *args)
            return _gated(x, logits_h, logits_w, inplace and _owns_its_memory(x))
    x, z_h, z_w = _Pool.apply(x)
    return _Gate.apply(x, *_both_logits(x, z_h, z_w, *args))
