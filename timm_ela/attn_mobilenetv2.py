"""MobileNetV2 with an attention layer in every block that expands (16 of 17 at width 1.0).

`MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381; the layers' papers are in
layers.py.

The default slot is that of the ImageNet code of the authors of Coordinate Attention and of ELA: after the depthwise
convolution's activation, before the projection. `attn_slot='output'`: after the projection's batch norm, before the
residual add, with or without one.
"""
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch.nn as nn
from timm.models import EfficientNet, EfficientNetFeatures, build_model_with_cfg
from timm.models._builder import pretrained_cfg_for_features
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels

from .blocks import OutputAttnInvertedResidual
from .graft import graft_state_dict
from .layers import create_attn_layer
from .registry import register_attn_models

__all__: list[str] = []  # register_model adds each entry point

_ARCH_DEF = [  # timm's
    ['ds_r1_k3_s1_c16'],
    ['ir_r2_k3_s2_e6_c24'],
    ['ir_r3_k3_s2_e6_c32'],
    ['ir_r4_k3_s2_e6_c64'],
    ['ir_r3_k3_s1_e6_c96'],
    ['ir_r3_k3_s2_e6_c160'],
    ['ir_r1_k3_s1_e6_c320'],
]
# prefix of our names -> plain timm model, its channel and depth multipliers, whether stem and head keep their widths
_WIDTHS: dict[str, tuple[str, float, float, bool]] = {
    'mobilenetv2': ('mobilenetv2_100', 1.0, 1.0, False),
    'mobilenetv2_050': ('mobilenetv2_050', 0.5, 1.0, False),
    'mobilenetv2_110d': ('mobilenetv2_110d', 1.1, 1.2, True),
    'mobilenetv2_120d': ('mobilenetv2_120d', 1.2, 1.4, True),
    'mobilenetv2_140': ('mobilenetv2_140', 1.4, 1.0, False),
}


def _create_layer(name: str, width: int | None, inner_width: int, **kwargs) -> nn.Module:
    return create_attn_layer(name, width or inner_width, **kwargs)


def _build(
        model_cls: type[nn.Module],
        attn_slot: str,
        layer: str,
        block_args: list[list[dict[str, Any]]],
        round_chs_fn: Callable[[float], int],
        **kwargs,
) -> nn.Module:
    # The rows carry the layer: timm's builder would give a `se_layer=` its own ratio, and the inner width in any slot.
    for row in chain.from_iterable(block_args):
        if row['block_type'] == 'ir':
            width = round_chs_fn(row['out_chs']) if attn_slot == 'output' else None
            row.update(se_layer=partial(_create_layer, layer, width), se_ratio=0)
    model = model_cls(block_args, round_chs_fn=round_chs_fn, **kwargs)
    if attn_slot == 'output':
        for block in model.modules():
            if isinstance(block, InvertedResidual):
                block.__class__ = OutputAttnInvertedResidual  # timm's builder takes no block class of others
    return model


def _create_attn_mobilenetv2(
        name: str,
        prefix: str,
        layer: str,
        attn_slot: str,
        pretrained: bool = False,
        features_only: bool = False,
        pretrained_strict: bool = True,
        **kwargs,
) -> nn.Module:
    _, channel_multiplier, depth_multiplier, fix_stem_head = _WIDTHS[prefix]
    round_chs_fn = partial(round_channels, multiplier=channel_multiplier)
    model_args: dict[str, Any] = dict(
        block_args=decode_arch_def(_ARCH_DEF, depth_multiplier=depth_multiplier, fix_first_last=fix_stem_head),
        num_features=1280 if fix_stem_head else max(1280, round_chs_fn(1280)),
        stem_size=32,
        fix_stem=fix_stem_head,
        round_chs_fn=round_chs_fn,
        norm_layer=kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=resolve_act_layer(kwargs, 'relu6'),
    )
    # As timm does: a model of its own without the head, unless the caller chooses how to take the features.
    headless = features_only and not {'feature_cfg', 'feature_cls'} & kwargs.keys()
    model = build_model_with_cfg(
        partial(_build, EfficientNetFeatures if headless else EfficientNet, attn_slot, layer),
        name,
        pretrained,
        pretrained_filter_fn=graft_state_dict,
        pretrained_strict=pretrained_strict and not headless,
        features_only=features_only and not headless,
        kwargs_filter=('num_classes', 'num_features', 'head_conv', 'global_pool') if headless else None,
        **{**model_args, **kwargs},
    )
    if headless:
        model.pretrained_cfg = model.default_cfg = pretrained_cfg_for_features(model.pretrained_cfg)
    return model


register_attn_models(__name__, {prefix: row[0] for prefix, row in _WIDTHS.items()}, _create_attn_mobilenetv2)
