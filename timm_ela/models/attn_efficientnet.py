"""MobileNetV2, MobileNetV4 and EfficientNet-Lite with an attention layer in every block that expands.

`MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381
`MobileNetV4: Universal Models for the Mobile Ecosystem` - https://arxiv.org/abs/2404.10518
`EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks` - https://arxiv.org/abs/1905.11946; Lite:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The layers' papers are in
attn_layers.py.

The layer is where the authors of Coordinate Attention and of ELA have it in their ImageNet code for MobileNetV2: on the
expanded width, before the projection. That is the place of timm's `se`. Nobody has published MobileNetV4 with it.
"""
from functools import partial

from timm.models import build_model_with_cfg, model_entrypoint

# the one private name of timm that is used here: timm 1.0.26 to 1.0.31 have the blocks in no other place
from timm.models._efficientnet_blocks import InvertedResidual, UniversalInvertedResidual
from timm.models.efficientnet import efficientnet_init_weights, pretrained_cfg_for_features
from torch import nn

from .efficientnet_layouts import rename_state_dict
from .graft import Slot, find_slot, graft
from .registry import Family, Model, make_default_cfgs, register_models, slot_models

# register_model adds each entry point
__all__: list[str] = []

_BASES = (
    'mobilenetv2_050', 'mobilenetv2_100', 'mobilenetv2_110d', 'mobilenetv2_120d', 'mobilenetv2_140',
    'mobilenetv4_conv_small_050', 'mobilenetv4_conv_small', 'mobilenetv4_conv_medium', 'mobilenetv4_conv_large',
    'mobilenetv4_hybrid_medium',
    'efficientnet_lite0', *(f'tf_efficientnet_lite{i}' for i in range(5)))
_SLOTS = (
    Slot(InvertedResidual, 'bn2', act='bn2.act', after='bn3'),
    Slot(UniversalInvertedResidual, 'dw_mid.bn', act='dw_mid.bn.act', after='pw_proj.bn'),
    # a block without a convolution between its expansion and its projection
    Slot(UniversalInvertedResidual, 'pw_exp.bn', act='pw_exp.bn.act', after='pw_proj.bn'),
)


def _build(model: Model, **kwargs) -> nn.Module:
    built = model_entrypoint(model.base)(**kwargs)
    for block in built.modules():
        if slot := find_slot(block, _SLOTS):
            weight = block.get_submodule(slot.before).weight
            block.se = model.layer.create(len(weight), device=weight.device, dtype=weight.dtype)
            efficientnet_init_weights(block.se)
    return built


def _create_attn_efficientnet(
        model: Model,
        pretrained: bool = False,
        features_only: bool = False,
        pretrained_strict: bool = True,
        **kwargs,
) -> nn.Module:
    # As in timm: features come from a model class without a head, unless the caller chooses how to take them.
    headless = features_only and not {'feature_cfg', 'feature_cls'} & kwargs.keys()
    head_args = ('num_classes', 'num_features', 'head_conv', 'head_bias', 'head_norm', 'global_pool')
    built = build_model_with_cfg(
        partial(_build, model, features_only=headless),
        model.name,
        pretrained,
        pretrained_filter_fn=model.checkpoint_filter_fn,
        pretrained_strict=pretrained_strict and not headless,
        features_only=features_only and not headless,
        kwargs_filter=head_args if headless else None,
        **kwargs,
    )
    if headless:
        built.pretrained_cfg = built.default_cfg = pretrained_cfg_for_features(built.pretrained_cfg)
    return built


_MODELS = slot_models(
    _BASES, Family(_create_attn_efficientnet, partial(graft, slots=_SLOTS), rename_state_dict))
default_cfgs = make_default_cfgs(_MODELS)
register_models(_MODELS)
