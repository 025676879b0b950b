"""ResNets with an attention layer in every block.

`Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385; the layers' papers are in
attn_layers.py.

`attn_slot='inner'`, the default, is the slot of the ELA authors' released backbone: in a Bottleneck after the 3x3
convolution's activation, on the inner width; in a BasicBlock after bn2, before the residual add. Their backbone also
adds a skip around the module, which neither the paper's formula nor their MobileNetV2 has; these models follow the
formula. `attn_slot='output'` is the slot of the papers of SE, CBAM and ECA: after the last batch norm, before the
residual add. In a BasicBlock the two are the same.
"""
from functools import partial
from typing import Any

from timm.layers import create_attn
from timm.models import ResNet, build_model_with_cfg, model_entrypoint
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor

from .graft import Slot, graft
from .registry import Family, Model, make_default_cfgs, register_models, slot_models

# register_model adds each entry point
__all__: list[str] = []

_BASIC = ('resnet18', 'resnet34')
_BOTTLENECK = (
    'resnet26', 'resnet50', 'resnet50d', 'resnet101', 'resnet152', 'resnext50_32x4d', 'wide_resnet50_2')
_ATTN_SLOTS = ('inner', 'output')


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


_SLOTS = (
    Slot(InnerAttnBottleneck, 'bn2', act='act2', after='bn3'),
    Slot(Bottleneck, 'bn3'),
    Slot(BasicBlock, 'bn2'),
)


def _create_attn_resnet(
        model: Model,
        pretrained: bool = False,
        attn_slot: str = 'inner',
        block_args: dict[str, Any] | None = None,
        **kwargs,
) -> ResNet:
    if attn_slot not in _ATTN_SLOTS:
        raise ValueError(f'Unknown attn_slot {attn_slot!r}: it is one of {", ".join(map(repr, _ATTN_SLOTS))}.')
    if attn_slot == 'inner' and model.base not in _BASIC:
        kwargs.setdefault('block', InnerAttnBottleneck)
    return build_model_with_cfg(
        model_entrypoint(model.base),
        model.name,
        pretrained,
        pretrained_filter_fn=model.checkpoint_filter_fn,
        block_args={'attn_layer': model.layer.create, **(block_args or {})},
        **kwargs,
    )


_MODELS = slot_models((*_BASIC, *_BOTTLENECK), Family(_create_attn_resnet, partial(graft, slots=_SLOTS)))
default_cfgs = make_default_cfgs(_MODELS)
register_models(_MODELS)
