"""Efficient Local Attention (ELA). Where a result is computed in two ways, the plain formula is first."""
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .tracing import (
    have_same_size,
    is_fixed_size_export,
    is_in_transform,
    is_onnx_export,
    is_tracing,
    needs_backward,
    runs_on_cpu,
)

VARIANTS: dict[str, dict[str, int]] = {
    't': dict(kernel_size=5, group_size=1, num_groups=32),
    'b': dict(kernel_size=7, group_size=1, num_groups=16),
    's': dict(kernel_size=5, group_size=8, num_groups=16),
    'l': dict(kernel_size=7, group_size=8, num_groups=16),
}


class EfficientLocalAttention(nn.Module):
    """Efficient Local Attention: multiplies a feature map by two gates, one along its height and one along its width.

    For x of shape (N, C, H, W)::

        a_h = sigmoid(GroupNorm(Conv1d(mean of x over W)))    (N, C, H)
        a_w = sigmoid(GroupNorm(Conv1d(mean of x over H)))    (N, C, W)
        y[n, c, h, w] = x[n, c, h, w] * a_h[n, c, h] * a_w[n, c, w]

    Both means (strips) share one bias-free Conv1d and one affine GroupNorm, as in the authors' code; the weights of
    their modules load unchanged. Where the published number of GroupNorm groups does not divide C (32 for ELA-T, C =
    144), the module uses `gcd(num_groups, C)`. timm's `attn_layer='ela'` is another module: a convolution and a
    one-group GroupNorm for each strip, and a SiLU.

    Hook, wrap or replace `conv` and `gn`. They are called on (N, C, H) and then on (N, C, W), but in eval mode, for a
    square map, once on both as one batch (2N, C, H).

    With `inplace=True` the output overwrites the input, as in timm's activations, and a kept reference to the input
    then shows the output. This happens only in eval and eager mode, without gradients, without hooks or a replaced
    `forward`, and if the input is no view. Tensors of inference mode do not know that they are views: there, a view of
    a whole tensor is overwritten too, and one of a part of it is not.

    Source: `ELA: Efficient Local Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2403.01123
    """

    def __init__(
            self,
            channels: int,
            variant: str = 'b',
            *,
            kernel_size: int | None = None,
            group_size: int | None = None,
            num_groups: int | None = None,
            eps: float = 1e-5,
            inplace: bool = False,
            act_layer: Any = None,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            channels: Channels C of the input.
            variant: Size in the paper: 't', 'b', 's' or 'l'. It sets the next three arguments where they are None.
            kernel_size: Kernel size of the convolution, odd.
            group_size: Channels per group of the convolution; 1 is depthwise.
            num_groups: Groups of the GroupNorm, as published; the module uses `gcd(num_groups, channels)`.
            eps: GroupNorm's epsilon.
            inplace: Overwrite the input in eval mode, where that is safe for gradients, views and hooks.
            act_layer: Not used: timm's builders pass the block's activation to every attention layer.
            device, dtype: Device and dtype of the parameters.

        Raises:
            ValueError: If a size is unknown or not positive, kernel_size even, or channels no multiple of group_size.
        """
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f'Unknown ELA variant {variant!r}: it is one of {", ".join(map(repr, VARIANTS))}.')
        given = dict(kernel_size=kernel_size, group_size=group_size, num_groups=num_groups)
        size = {**VARIANTS[variant], **{k: v for k, v in given.items() if v is not None}}
        for name, value in {'channels': channels, **size}.items():
            if value < 1 or (name == 'kernel_size' and value % 2 == 0):
                wanted = 'positive and odd' if name == 'kernel_size' else 'positive'
                raise ValueError(f'{name} of ELA must be {wanted}, got {value}.')
        if channels % size['group_size']:
            multiples = f'ELA variant {variant!r} needs channels in multiples of group_size={size["group_size"]}'
            raise ValueError(f"{multiples}, got {channels}: variants 't' and 'b' take any number, or set group_size.")
        taps, groups, dd = size['kernel_size'], channels // size['group_size'], {'device': device, 'dtype': dtype}
        self.conv = StripConv(channels, channels, taps, padding=taps // 2, groups=groups, bias=False, **dd)
        self.gn = StripNorm(gcd(size['num_groups'], channels), channels, eps=eps, **dd)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        """Gates x (N, C, H, W), and returns the same shape, dtype and memory format."""
        logits_h, logits_w = self._logits(x)
        inplace = not torch.jit.is_scripting() and self._may_write_into(x)
        return gate(x, logits_h, logits_w, inplace)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the two gates of x: a_h (N, C, H) and a_w (N, C, W), values in (0, 1), in x's dtype."""
        return sigmoid_gates(x, *self._logits(x))

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns what the sigmoids of the gates take: (N, C, H) and (N, C, W)."""
        z_h, z_w = strips(x)
        if torch.jit.is_scripting() or self.training or not have_same_size(z_h, z_w):
            return self.gn(self.conv(z_h)), self.gn(self.conv(z_w))
        else:
            # Both are one batch: for a single image, the calls take most of the time. Not in training, where a part
            # that a user put in, such as a batch norm, may depend on the whole batch.
            logits_h, logits_w = self.gn(self.conv(torch.cat((z_h, z_w)))).chunk(2)
            return logits_h, logits_w

    @torch.jit.unused
    def _may_write_into(self, x: Tensor) -> bool:
        hooks = self._forward_pre_hooks or self._forward_hooks or _global_forward_pre_hooks or _global_forward_hooks
        # torch.fx passes a Proxy, and its graph may return x. In inference mode, only the storage's size tells a view.
        # is_tracing() comes before vars(), which PyTorch 2.5 cannot compile.
        return (
            self.inplace and not (self.training or is_tracing() or is_in_transform())
            and not (hooks or 'forward' in vars(self))
            and isinstance(x, Tensor) and not (x.requires_grad or x._is_view())
            and x.untyped_storage().nbytes() == x.numel() * x.element_size())


class StripConv(nn.Conv1d):
    """Conv1d of a strip, without bias."""

    def forward(self, z: Tensor) -> Tensor:
        if torch.jit.is_scripting() or self._is_changed():
            return self._conv_forward(z, self.weight, self.bias)
        else:
            return strip_conv(z, self.weight)

    @torch.jit.unused
    def _is_changed(self) -> bool:
        options = self.padding_mode, self.stride, self.dilation, self.padding
        return self.bias is not None or options != ('zeros', (1,), (1,), (self.kernel_size[0] // 2,))


class StripNorm(nn.GroupNorm):
    """GroupNorm of a strip."""

    def forward(self, z: Tensor) -> Tensor:
        if torch.jit.is_scripting() or is_onnx_export() or not (
                is_fixed_size_export(z) and z.shape[1] * z.shape[2] > self.num_groups):
            return F.group_norm(z, self.num_groups, self.weight, self.bias, self.eps)
        else:
            # XNNPACK has no group_norm, and a mean over dimensions 2 and 3 only; OpenVINO turns this into one operator
            g = z.reshape(z.shape[0], self.num_groups, -1, 1)
            g = g - g.mean((2, 3), keepdim=True)
            z = (g / ((g * g).mean((2, 3), keepdim=True) + self.eps).sqrt()).reshape(z.shape)
            return z * self.weight.view(-1, 1) + self.bias.view(-1, 1) if self.affine else z


@torch.fx.wrap
def strips(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the means of x (N, C, H, W) over its width (N, C, H) and over its height (N, C, W)."""
    if x.dim() != 4:
        raise ValueError(f'ELA takes a map (N, C, H, W), got one of shape {list(x.shape)}.')
    if torch.jit.is_scripting():
        return x.mean(3), x.mean(2)
    else:
        return (_Mean.apply(x, 3), _Mean.apply(x, 2)) if needs_backward([x]) else (_reduce(x, 3), _reduce(x, 2))


@torch.fx.wrap
def strip_conv(z: Tensor, weight: Tensor) -> Tensor:
    """conv1d of z (N, C, L) with weight (C, C / groups, K), padded to the same length."""
    # conv2d: conv1d is slower in channels_last, ExecuTorch fails on it, and inductor does not vectorize what follows it
    if torch.jit.is_scripting() or not (needs_backward([z, weight]) and weight.shape[1] == 1 and runs_on_cpu(z)):
        (n, c, length), half, groups = z.shape, weight.shape[2] // 2, weight.shape[0] // weight.shape[1]
        if not torch.jit.is_scripting() and not is_tracing() and c != weight.shape[0]:
            raise ValueError(f'ELA has {weight.shape[0]} channels, got a map of {c}.')
        z = F.conv2d(z.view(n, c, 1, length), weight.unsqueeze(2), None, padding=[0, half], groups=groups)
        # XNNPACK has no squeeze; with dynamic sizes, a view would restrict them
        return z.view(n, c, length) if not torch.jit.is_scripting() and is_fixed_size_export(z) else z.squeeze(2)
    else:
        return _DepthwiseConv.apply(z, weight)


def sigmoid_gates(x: Tensor, logits_h: Tensor, logits_w: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gates in x's dtype: CUDA autocast's GroupNorm returns float32, which would promote the whole map."""
    return logits_h.sigmoid().to(x.dtype), logits_w.sigmoid().to(x.dtype)


@torch.fx.wrap
def gate(x: Tensor, logits_h: Tensor, logits_w: Tensor, inplace: bool = False) -> Tensor:
    """Returns x (N, C, H, W) times the sigmoids of logits_h (N, C, H) and logits_w (N, C, W)."""
    if torch.jit.is_scripting() or is_tracing() or is_in_transform():
        n, c, h, w = x.shape
        a_h, a_w = sigmoid_gates(x, logits_h.view(n, c, h, 1), logits_w.view(n, c, 1, w))
        # onnxruntime multiplies slowly by a gate, ExecuTorch by a product of gates
        return x * (a_h * a_w) if not torch.jit.is_scripting() and is_onnx_export() else x * a_h * a_w
    elif needs_backward([x, logits_h, logits_w]):
        return _Gate.apply(x, logits_h, logits_w)
    else:
        return _multiply(x, logits_h, logits_w, inplace)


def _is_nhwc(x: Tensor) -> bool:
    """True for a map in channels_last on a CPU, where operations that mix memory formats are slow."""
    return x.stride(1) == 1 and runs_on_cpu(x)


def _to_nhwc(strip: Tensor) -> Tensor:
    """Returns a strip (N, C, L) with its channels last in memory."""
    return strip.transpose(1, 2).contiguous().transpose(1, 2)


def _reduce(x: Tensor, dim: int, mean: bool = True) -> Tensor:
    """Returns the mean, or the sum, of x (N, C, H, W) over its height (dim 2) or its width (dim 3)."""
    if not (_is_nhwc(x) or is_fixed_size_export(x)):
        return x.mean(dim) if mean else x.sum(dim)
    # in NHWC, pooling is far faster than a reduction over one axis; in an export, XNNPACK takes pooling only
    size = (x.shape[2], 1) if dim == 2 else (1, x.shape[3])
    return F.avg_pool2d(x, size, divisor_override=None if mean else 1).flatten(2)


def _multiply(x: Tensor, logits_h: Tensor, logits_w: Tensor, inplace: bool = False) -> Tensor:
    """Computes `gate`, with at most one allocation of x's size if no graph is recorded."""
    if _is_nhwc(x):
        logits_h, logits_w = _to_nhwc(logits_h), _to_nhwc(logits_w)
    a_h, a_w = sigmoid_gates(x, logits_h, logits_w)
    y = x.mul_(a_h.unsqueeze(3)) if inplace else x * a_h.unsqueeze(3)
    return y * a_w.unsqueeze(2) if y.requires_grad else y.mul_(a_w.unsqueeze(2))


class _Mean(Function):
    """Mean over one side, whose gradient takes no memory of x's size. PyTorch's own would take it for each strip."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.shape, ctx.dim, ctx.nhwc = x.shape, dim, _is_nhwc(x)
        return _reduce(x, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad / ctx.shape[ctx.dim]
        # autograd adds this view to the gradient that _Gate gives, in place if nothing else holds that
        return (_to_nhwc(grad) if ctx.nhwc else grad).unsqueeze(ctx.dim).expand(ctx.shape), None


class _Gate(Function):
    """`gate` that saves x and nothing else of its size, and reads x once in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, logits_h: Tensor, logits_w: Tensor) -> Tensor:
        ctx.save_for_backward(x, logits_h, logits_w)
        return _multiply(x, logits_h, logits_w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, logits_h, logits_w = ctx.saved_tensors
        grad_x = _multiply(grad, logits_h, logits_w)
        # the derivative of the sigmoid a is a (1 - a), and grad_x already has the factor a: both strips share a product
        product = grad_x * x
        sum_h, sum_w = _reduce(product, 3, mean=False), _reduce(product, 2, mean=False)
        # sigmoid(-logit) is 1 - a, without the rounding of a difference
        return grad_x, sum_h * (-logits_h).sigmoid(), sum_w * (-logits_w).sigmoid()


class _DepthwiseConv(Function):
    """Depthwise `strip_conv`. On a CPU, PyTorch's own backward pass takes several times as long for large batches."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(z, weight)
        return strip_conv(z, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # under autocast, grad has another dtype than the saved tensors
        z, weight = (t.to(grad.dtype) for t in ctx.saved_tensors)
        shifted = F.pad(z, 2 * (weight.shape[2] // 2,)).unfold(2, z.shape[2], 1)  # (N, C, taps, L), a view
        grad_weight = torch.stack([(grad * tap).sum(0) for tap in shifted.unbind(2)], 1).sum(2).unsqueeze(1)
        return strip_conv(grad, weight.flip(-1)), grad_weight
