"""Shuffle Attention."""
from typing import Any

import torch
from torch import Tensor, nn


class ShuffleAttention(nn.Module):
    """Shuffle Attention: in each group of channels, one half gets a gate per channel, the other half one per value.

    For a group's halves x_0 and x_1, (N, C / 2G, H, W) each::

        y_0 = x_0 * sigmoid(cweight * mean of x_0 over H and W + cbias)
        y_1 = x_1 * sigmoid(sweight * GroupNorm(x_1) + sbias)        one channel a group of the GroupNorm

    A channel shuffle with two groups follows. All groups share the parameters: 3C / G in all. cweight and sweight start
    at zero, cbias and sbias at one, as in the authors' code (https://github.com/wofmanaf/SA-Net). The weights of their
    modules load unchanged.

    The authors use 64 groups, which needs channels in multiples of 128. For other numbers of channels (MobileNetV2 has
    144), the layer uses the greatest number of groups below 64 whose double divides the channels (36 for 144).

    Source: `SA-Net: Shuffle Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2102.00240
    """

    def __init__(self, channels: int, groups: int = 64, device=None, dtype=None) -> None:
        """
        Args:
            channels: Channels C of the input, even.
            groups: Greatest number of groups G.
            device, dtype: Device and dtype of the parameters.

        Raises:
            ValueError: If the number of channels is odd.
        """
        super().__init__()
        if channels % 2:
            raise ValueError(f'Shuffle Attention halves the channels: it needs an even number of them, got {channels}.')
        self.groups = next(g for g in range(min(groups, channels // 2), 0, -1) if channels % (2 * g) == 0)
        half = channels // (2 * self.groups)
        dd = {'device': device, 'dtype': dtype}
        # The authors have (1, half, 1, 1). In channels_last, gradients of 4-D parameters have other strides than the
        # parameters, and DistributedDataParallel would warn.
        self.cweight = nn.Parameter(torch.empty(half, 1, 1, **dd))
        self.cbias = nn.Parameter(torch.empty(half, 1, 1, **dd))
        self.sweight = nn.Parameter(torch.empty(half, 1, 1, **dd))
        self.sbias = nn.Parameter(torch.empty(half, 1, 1, **dd))
        self.gn = nn.GroupNorm(half, half, **dd)
        self.register_load_state_dict_pre_hook(_drop_first_dimension)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weights to zero and biases to one, as the authors do."""
        for weight, bias in ((self.cweight, self.cbias), (self.sweight, self.sbias)):
            nn.init.zeros_(weight)
            nn.init.ones_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Gates x (N, C, H, W), and returns a contiguous map of the same shape."""
        n, c, h, w = x.shape
        x_0, x_1 = x.reshape(n * self.groups, c // self.groups, h, w).chunk(2, 1)  # (N * G, C / 2G, H, W)
        y_0 = x_0 * (self.cweight * x_0.mean((2, 3), keepdim=True) + self.cbias).sigmoid()
        y_1 = x_1 * (self.sweight * self.gn(x_1) + self.sbias).sigmoid().to(x.dtype)
        y = torch.cat([y_0, y_1], 1)
        return y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _drop_first_dimension(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Gives weights in the shape of the authors' code, (1, C / 2G, 1, 1), the shape of the module's parameters."""
    for name in ('cweight', 'cbias', 'sweight', 'sbias'):
        value = state_dict.get(prefix + name)
        if value is not None and value.ndim == 4:
            state_dict[prefix + name] = value.squeeze(0)
