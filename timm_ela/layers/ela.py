"""Efficient Local Attention (ELA) as a module.

`ELA: Efficient Local Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2403.01123
"""
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from .ela_functional import check_input, ela, gate, open_gates

torch.fx.wrap('ela')  # one node in a traced graph, with its checks and its choice of path inside

# The paper's four sizes. group_size: channels per group of the convolution (1 is depthwise).
VARIANTS: dict[str, dict[str, int]] = {
    't': dict(kernel_size=5, group_size=1, num_groups=32),
    'b': dict(kernel_size=7, group_size=1, num_groups=16),
    's': dict(kernel_size=5, group_size=8, num_groups=16),
    'l': dict(kernel_size=7, group_size=8, num_groups=16),
}


class EfficientLocalAttention(nn.Module):
    """Efficient Local Attention: gates a feature map by what it holds along its rows and along its columns.

    For x of shape (N, C, H, W)::

        a_h = sigmoid(GroupNorm(Conv1d(mean of x over W)))    (N, C, H)
        a_w = sigmoid(GroupNorm(Conv1d(mean of x over H)))    (N, C, W)
        y[n, c, h, w] = x[n, c, h, w] * a_h[n, c, h] * a_w[n, c, w]

    One bias-free Conv1d and one affine GroupNorm serve both strips, as in the authors' code; parameters are named as
    theirs (`conv.weight`, `gn.weight`, `gn.bias`), so their modules' weights load as they are. Where the published
    number of GroupNorm groups does not divide C (MobileNetV2 has C = 144, ELA-T 32 groups), the module uses
    `gcd(num_groups, C)` groups; where it divides, that changes nothing.

    Not timm's `attn_layer='ela'` (EfficientLocalAttn), which has a convolution and a one-group GroupNorm for each
    strip, a SiLU before the sigmoid, and none of the four sizes.

    With `inplace=True` the module writes its output into its input in eval mode, as timm's models let their activations
    do, to save a second map. It does so only in eager mode, if no graph is recorded and the input is neither a view nor
    requires a gradient (in inference mode PyTorch records no views: there, an alias of the whole input is written to as
    well). Whoever keeps the input, such as a forward hook on the layer before, then sees it gated; hooks on the module
    itself do, too.

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
            variant: Size of the paper: 't', 'b', 's' or 'l'; sets the next three where they are not given.
            kernel_size: Taps of the convolution along a strip, odd.
            group_size: Channels per group of the convolution; 1 is depthwise.
            num_groups: Groups of the GroupNorm, as published; `gcd(num_groups, channels)` are used.
            eps: GroupNorm's epsilon.
            inplace: Write the output into the input in eval mode, where that is safe for gradients and views.
            act_layer: Not used: timm's builders pass the block's activation to every attention layer.
            device: Device of the parameters.
            dtype: Dtype of the parameters.

        Raises:
            ValueError: If the variant is unknown, the kernel size even, or the channels no multiple of group_size.
        """
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f'Unknown ELA variant {variant!r}: it is one of {", ".join(map(repr, VARIANTS))}.')
        given = dict(kernel_size=kernel_size, group_size=group_size, num_groups=num_groups)
        size = {**VARIANTS[variant], **{k: v for k, v in given.items() if v is not None}}
        for name, value in size.items():
            if value < 1 or (name == 'kernel_size' and value % 2 == 0):
                raise ValueError(f'ELA needs a positive{" odd" if name == "kernel_size" else ""} {name}, got {value}.')
        if channels % size['group_size']:
            raise ValueError(
                f'ELA variant {variant!r} needs channels in multiples of group_size={size["group_size"]}, '
                f'got {channels}: variants \'t\' and \'b\' take any number, or set group_size.')

        dd = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv1d(
            channels,
            channels,
            size['kernel_size'],
            padding=size['kernel_size'] // 2,
            groups=channels // size['group_size'],
            bias=False,
            **dd,
        )
        self.inplace = inplace
        self.gn = nn.GroupNorm(gcd(size['num_groups'], channels), channels, eps=eps, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Gates x.

        Args:
            x: Feature map (N, C, H, W), any layout.

        Returns:
            Gated feature map (N, C, H, W), in x's dtype and memory format.

        Raises:
            ValueError: If x is not 4-D with C channels, or from GroupNorm where a group holds a single value; compiled
                and scripted, the errors are those of the compiler.
        """
        conv, gn = self.conv, self.gn
        if torch.jit.is_scripting() or self._parts_are_unmodified():
            # num_groups and eps through self: so TorchScript sees them as constants
            return ela(
                x, conv.weight, gn.weight, gn.bias, self.gn.num_groups, self.gn.eps,
                not torch.jit.is_scripting() and self._may_write_into(x))
        return gate(x, *self._logits(x))

    @torch.jit.ignore
    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two gates of x: a_h (N, C, H) and a_w (N, C, W), values in (0, 1), in x's dtype."""
        return open_gates(x, *self._logits(x))

    @torch.jit.ignore
    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self._parts_are_unmodified():  # a wrapped part may have no weight
            check_input(x, self.conv.weight, self.gn.weight, self.gn.bias)
        return self.gn(self.conv(x.mean(3))), self.gn(self.conv(x.mean(2)))

    @torch.jit.unused
    def _may_write_into(self, x: Tensor) -> bool:
        # a graph of fx may return any of its nodes: what it traces with a Proxy must leave its inputs as they are
        return self.inplace and not self.training and isinstance(x, Tensor)

    @torch.jit.ignore
    def _parts_are_unmodified(self) -> bool:
        """True if conv and gn are unmodified: no hooks, no pruning (which is a hook), no wrappers, no offload."""
        return all(
            type(m).forward is made.forward
            and 'forward' not in vars(m)  # accelerate's offload sets one
            and not (m._forward_pre_hooks or m._forward_hooks or m._backward_pre_hooks or m._backward_hooks)
            for m, made in ((self.conv, nn.Conv1d), (self.gn, nn.GroupNorm)))
