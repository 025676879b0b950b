"""Triplet Attention."""
import torch
from timm.layers import ConvNormAct
from torch import Tensor, nn


class AttentionGate(nn.Module):
    """Gate of Triplet Attention: maximum and mean over the channels, convolution, batch norm, sigmoid."""

    def __init__(self, kernel_size: int = 7, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = ConvNormAct(
            2, 1, kernel_size, apply_act=False, norm_kwargs={'momentum': 0.01}, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Pools x (N, D, A, B) over D, and gives the gate (N, 1, A, B)."""
        pooled = torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)
        return self.conv(pooled).sigmoid()


class TripletAttention(nn.Module):
    """Triplet Attention: the mean of x gated in three ways, each by a map of two of its dimensions.

    For x of shape (N, C, H, W), one branch each for the maps (C, W), (H, C) and (H, W)::

        pooled = [max, mean] of x over the third dimension        2 channels
        gate = sigmoid(BatchNorm(Conv7x7(pooled)))                1 channel
        y = mean of x * gate over the branches

    It has 300 parameters for any number of channels. They have the names of the authors' code
    (https://github.com/landskape-ai/triplet-attention), so the weights of their modules load unchanged. The momentum of
    the batch norm, 0.01 (0.99 in other conventions), is also from their code; the paper does not state it.

    Source: `Rotate to Attend: Convolutional Triplet Attention Module` - https://arxiv.org/abs/2010.03045
    """

    def __init__(self, channels: int, kernel_size: int = 7, device=None, dtype=None) -> None:
        """
        Args:
            channels: Not used: the layer takes any number of channels.
            kernel_size: Side of the convolutions, odd.
            device, dtype: Device and dtype of the parameters.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.cw = AttentionGate(kernel_size, **dd)
        self.hc = AttentionGate(kernel_size, **dd)
        self.hw = AttentionGate(kernel_size, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Gates x (N, C, H, W), and returns the same shape."""
        a_cw = self.cw(x.permute(0, 2, 1, 3)).permute(0, 2, 1, 3)  # (N, C, 1, W)
        a_hc = self.hc(x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)  # (N, C, H, 1)
        a_hw = self.hw(x)  # (N, 1, H, W)
        return (x * a_cw + x * a_hc + x * a_hw) / 3
