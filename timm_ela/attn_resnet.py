"""ResNets with an attention layer in every block.

`Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385; the layers' papers are in layers.py.

The default slots are those of the ELA authors' released backbone: in a Bottleneck after the 3x3 convolution's
activation, on the inner width; in a BasicBlock after bn2, before the residual add. Their backbone also adds a skip
around the module, which neither the paper's formula nor their MobileNetV2 has; these models follow the formula. The
papers of SE, CBAM and ECA have the layer where `attn_slot='output'` puts it, after the last batch norm.
"""
from functools import partial
from typing import Any

from timm.models import ResNet, build_model_with_cfg
from timm.models.resnet import BasicBlock, Bottleneck

from .blocks import InnerAttnBottleneck
from .graft import graft_state_dict
from .layers import create_attn_layer
from .registry import register_attn_models

__all__: list[str] = []  # register_model adds each entry point

_BASIC = dict(inner=BasicBlock, output=BasicBlock)
_BOTTLENECK = dict(inner=InnerAttnBottleneck, output=Bottleneck)
# name -> block of each slot, blocks of each stage
_RESNETS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    'resnet18': (_BASIC, (2, 2, 2, 2)),
    'resnet34': (_BASIC, (3, 4, 6, 3)),
    'resnet50': (_BOTTLENECK, (3, 4, 6, 3)),
    'resnet101': (_BOTTLENECK, (3, 4, 23, 3)),
    'resnet152': (_BOTTLENECK, (3, 8, 36, 3)),
}


def _create_attn_resnet(
        name: str,
        base: str,
        layer: str,
        attn_slot: str,
        pretrained: bool = False,
        block_args: dict | None = None,
        **kwargs,
) -> ResNet:
    blocks, layers = _RESNETS[base]
    return build_model_with_cfg(
        ResNet,
        name,
        pretrained,
        pretrained_filter_fn=graft_state_dict,
        block_args={'attn_layer': partial(create_attn_layer, layer), **(block_args or {})},
        **{'block': blocks[attn_slot], 'layers': layers, **kwargs},
    )


register_attn_models(__name__, {name: name for name in _RESNETS}, _create_attn_resnet)
