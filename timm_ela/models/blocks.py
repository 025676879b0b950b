"""timm's residual blocks with the attention layer in a place where timm's blocks have none."""
from timm.layers import create_attn
from timm.models.resnet import Bottleneck
from torch import Tensor


class InnerAttnBottleneck(Bottleneck):
    """timm's Bottleneck with its attention layer on the inner width, between the 3x3 convolution and conv3."""

    def __init__(self, *args, attn_layer=None, device=None, dtype=None, **kwargs) -> None:
        super().__init__(*args, device=device, dtype=dtype, **kwargs)
        self.se = create_attn(attn_layer, self.conv3.in_channels, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)
        if self.se is not None:
            x = self.se(x)

        x = self.conv3(x)
        x = self.bn3(x)
        if self.drop_path is not None:
            x = self.drop_path(x)

        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.act3(x)
        return x
