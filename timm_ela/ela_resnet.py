"""ResNets with Efficient Local Attention (ELA).

`ELA: Efficient Local Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2403.01123
`Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385

The slots are those of the authors' released backbone: in a Bottleneck after the 3x3 convolution's activation, on the
inner width; in a BasicBlock after bn2, before the residual add. Their backbone also adds a skip around the module,
which neither the paper's formula nor their MobileNetV2 has; these models follow the formula.
"""
from functools import partial
from typing import Any

from timm.layers import create_attn
from timm.models import ResNet, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor

from .attention import VARIANTS, EfficientLocalAttention
from .graft import graft_cfgs, graft_state_dict

__all__ = ['InnerAttnBottleneck']  # register_model adds each entry point


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


_RESNETS: dict[str, dict[str, Any]] = {
    'resnet18': dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    'resnet34': dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    'resnet50': dict(block=InnerAttnBottleneck, layers=(3, 4, 6, 3)),
    'resnet101': dict(block=InnerAttnBottleneck, layers=(3, 4, 23, 3)),
    'resnet152': dict(block=InnerAttnBottleneck, layers=(3, 8, 36, 3)),
}
# name -> plain timm model, ELA variant
_MODELS = {f'{base}_ela_{variant}': (base, variant) for base in _RESNETS for variant in VARIANTS}

default_cfgs = generate_default_cfgs(
    {k: v for name, (base, _) in _MODELS.items() for k, v in graft_cfgs(name, base).items()})


def _create_ela_resnet(name: str, pretrained: bool = False, block_args: dict | None = None, **kwargs) -> ResNet:
    base, variant = _MODELS[name]
    attn_layer = partial(EfficientLocalAttention, variant=variant)
    return build_model_with_cfg(
        ResNet,
        name,
        pretrained,
        pretrained_filter_fn=graft_state_dict,
        block_args={'attn_layer': attn_layer, **(block_args or {})},
        **{**_RESNETS[base], **kwargs},
    )


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs) -> ResNet:
        return _create_ela_resnet(name, pretrained, **kwargs)

    base, variant = _MODELS[name]
    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f'{base} with ELA-{variant.upper()}.'
    globals()[name] = register_model(entrypoint)


BACKBONES = {name: base for name, (base, _) in _MODELS.items()}
for _name in _MODELS:
    _register(_name)
