"""MobileNetV2 with Efficient Local Attention (ELA).

`ELA: Efficient Local Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2403.01123
`MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381

The slot is that of the authors' ImageNet code: after the depthwise convolution's activation, before the projection, in
the blocks that expand (16 of 17 at width 1.0).
"""
from functools import partial
from typing import Any

import torch.nn as nn
from timm.models import EfficientNet, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from timm.models.efficientnet import _create_effnet

from .attention import VARIANTS, EfficientLocalAttention
from .graft import graft_cfgs, graft_state_dict

__all__: list[str] = []  # register_model adds each entry point

# timm's MobileNetV2 with an attention slot (se) in the rows that expand; the layer sizes itself, the ratio is not used.
_ARCH_DEF = [
    ['ds_r1_k3_s1_c16'],
    ['ir_r2_k3_s2_e6_c24_se0.25'],
    ['ir_r3_k3_s2_e6_c32_se0.25'],
    ['ir_r4_k3_s2_e6_c64_se0.25'],
    ['ir_r3_k3_s1_e6_c96_se0.25'],
    ['ir_r3_k3_s2_e6_c160_se0.25'],
    ['ir_r1_k3_s1_e6_c320_se0.25'],
]
# prefix of our names -> plain timm model, its multipliers
_WIDTHS: dict[str, tuple[str, dict[str, Any]]] = {
    'mobilenetv2': ('mobilenetv2_100', dict(channel_multiplier=1.0)),
    'mobilenetv2_050': ('mobilenetv2_050', dict(channel_multiplier=0.5)),
    'mobilenetv2_110d': ('mobilenetv2_110d', dict(channel_multiplier=1.1, depth_multiplier=1.2, fix_stem_head=True)),
    'mobilenetv2_120d': ('mobilenetv2_120d', dict(channel_multiplier=1.2, depth_multiplier=1.4, fix_stem_head=True)),
    'mobilenetv2_140': ('mobilenetv2_140', dict(channel_multiplier=1.4)),
}
# name -> prefix, ELA variant
_MODELS = {f'{prefix}_ela_{variant}': (prefix, variant) for prefix in _WIDTHS for variant in VARIANTS}

default_cfgs = generate_default_cfgs(
    {k: v for name, (prefix, _) in _MODELS.items() for k, v in graft_cfgs(name, _WIDTHS[prefix][0]).items()})


def _create_ela_mobilenetv2(
        name: str,
        pretrained: bool = False,
        channel_multiplier: float = 1.0,
        depth_multiplier: float = 1.0,
        fix_stem_head: bool = False,
        **kwargs,
) -> EfficientNet:
    round_chs_fn = partial(round_channels, multiplier=channel_multiplier)
    model_args = dict(
        block_args=decode_arch_def(_ARCH_DEF, depth_multiplier=depth_multiplier, fix_first_last=fix_stem_head),
        num_features=1280 if fix_stem_head else max(1280, round_chs_fn(1280)),
        stem_size=32,
        fix_stem=fix_stem_head,
        round_chs_fn=round_chs_fn,
        norm_layer=kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=resolve_act_layer(kwargs, 'relu6'),
        se_layer=partial(EfficientLocalAttention, variant=_MODELS[name][1]),
    )
    return _create_effnet(name, pretrained, pretrained_filter_fn=graft_state_dict, **{**model_args, **kwargs})


def _register(name: str) -> None:
    prefix, variant = _MODELS[name]
    base, multipliers = _WIDTHS[prefix]

    def entrypoint(pretrained: bool = False, **kwargs) -> EfficientNet:
        return _create_ela_mobilenetv2(name, pretrained, **multipliers, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f'{base} with ELA-{variant.upper()}.'
    globals()[name] = register_model(entrypoint)


BACKBONES = {name: _WIDTHS[prefix][0] for name, (prefix, _) in _MODELS.items()}
for _name in _MODELS:
    _register(_name)
