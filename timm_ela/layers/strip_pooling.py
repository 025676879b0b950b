"""Strip Pooling's block."""
from torch import Tensor, nn


class StripPooling(nn.Module):
    """Strip Pooling: a gate for each value, from the means over rows and over columns.

    For x of shape (N, C, H, W)::

        s_h = BatchNorm(Conv3x1(mean of x over W))        (N, C, H, 1)
        s_w = BatchNorm(Conv1x3(mean of x over H))        (N, C, 1, W)
        y = x * sigmoid(Conv1x1(ReLU(s_h + s_w)))         (N, C, H, W)

    Its inner width is C, as in the ResNets of the authors' code (https://github.com/houqb/SPNet): 7C^2 + 5C parameters.
    Parameters have the names of their SPBlock, whose weights load unchanged. SPBlock returns the gate; this module also
    multiplies x by it. Only the 1 x 1 convolution has a bias, as in their code; the paper's equations leave biases and
    norms out. timm's `attn_layer='strip'` is another module.

    Source: `Strip Pooling: Rethinking Spatial Pooling for Scene Parsing` - https://arxiv.org/abs/2003.13328
    """

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        """
        Args:
            channels: Channels C of the input.
            device, dtype: Device and dtype of the parameters.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(channels, **dd)
        self.conv2 = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1), bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(channels, **dd)
        self.conv3 = nn.Conv2d(channels, channels, 1, **dd)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Gates x (N, C, H, W), and returns the same shape."""
        s_h = self.bn1(self.conv1(x.mean(3, keepdim=True)))  # (N, C, H, 1)
        s_w = self.bn2(self.conv2(x.mean(2, keepdim=True)))  # (N, C, 1, W)
        return x * self.conv3(self.relu(s_h + s_w)).sigmoid()
