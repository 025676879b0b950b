"""Efficient Local Attention as functions: the plain formula, then the path that costs less.

`ELA: Efficient Local Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2403.01123
"""
import torch
import torch.nn.functional as F
from torch import Tensor


def strip_gate(
        z: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float,
) -> Tensor:
    """Turns one pooled strip (N, C, L) into its gate (N, C, L): sigmoid(GroupNorm(Conv1d(z)))."""
    channels, group_size, kernel_size = conv_weight.shape
    z = F.conv1d(z, conv_weight, None, padding=[kernel_size // 2], groups=channels // group_size)
    return F.group_norm(z, norm_groups, norm_weight, norm_bias, eps).sigmoid()


def ela_reference(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float = 1e-5,
) -> Tensor:
    """The formula, written plainly: document, oracle, and what is traced for TorchScript, compile and export.

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
    a_h = strip_gate(x.mean(3), conv_weight, norm_weight, norm_bias, norm_groups, eps)  # (N, C, H)
    a_w = strip_gate(x.mean(2), conv_weight, norm_weight, norm_bias, norm_groups, eps)  # (N, C, W)
    # Under CUDA autocast GroupNorm returns float32, which would promote the whole activation.
    return x * a_h.to(x.dtype).unsqueeze(3) * a_w.to(x.dtype).unsqueeze(2)


def pool_strips(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means of x over its width (N, C, H) and over its height (N, C, W), each by the faster way for x's layout."""
    if x.stride(1) == 1 and x.device.type == 'cpu':
        # channels_last: mean over one axis is far slower than pooling over the same strip
        return F.avg_pool2d(x, (1, x.shape[3])).squeeze(3), F.avg_pool2d(x, (x.shape[2], 1)).squeeze(2)
    return x.mean(3), x.mean(2)


def ela_gates(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The two gates a_h (N, C, H) and a_w (N, C, W) in x's dtype. Arguments as in `ela_reference`.

    Raises:
        ValueError: If x is not 4-D, or its channels are not those of the weights.
    """
    if x.ndim != 4 or x.shape[1] != norm_weight.shape[0]:
        raise ValueError(
            f'ELA expects an input of shape (N, {norm_weight.shape[0]}, H, W), got {tuple(x.shape)}.')
    z_h, z_w = pool_strips(x)
    args = (conv_weight, norm_weight, norm_bias, norm_groups, eps)
    return strip_gate(z_h, *args).to(x.dtype), strip_gate(z_w, *args).to(x.dtype)


def ela(
        x: Tensor,
        conv_weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float = 1e-5,
) -> Tensor:
    """The same as `ela_reference`, at less cost in eager mode; there, the errors are those of `ela_gates`."""
    args = (conv_weight, norm_weight, norm_bias, norm_groups, eps)
    if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return ela_reference(x, *args)  # a compiler fuses it by itself, and an export needs nothing of ours to run
    a_h, a_w = ela_gates(x, *args)
    a_h, a_w = a_h.unsqueeze(3), a_w.unsqueeze(2)  # (N, C, H, 1), (N, C, 1, W)
    y = x * a_h
    # Without a graph the second product needs no memory of its own.
    return y * a_w if y.requires_grad else y.mul_(a_w)
