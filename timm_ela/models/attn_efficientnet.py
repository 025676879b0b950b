"""MobileNetV2 and EfficientNet-Lite with an attention layer in every block that expands.

`MobileNetV2: Inverted Residuals and Linear Bottlenecks` - https://arxiv.org/abs/1801.04381
`EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks` - https://arxiv.org/abs/1905.11946; Lite:
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The layers' papers are in
attn_layers.py.

The slot is that of the ImageNet code of the authors of Coordinate Attention and of ELA: after the depthwise
convolution's activation, before the projection.
"""
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from timm.models import EfficientNet, EfficientNetFeatures, build_model_with_cfg
from timm.models._builder import pretrained_cfg_for_features
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import (
    BN_EPS_TF_DEFAULT,
    decode_arch_def,
    resolve_act_layer,
    resolve_bn_args,
    round_channels,
)
from torch import Tensor, nn

from .efficientnet_layouts import rename_state_dict
from .graft import Slot, graft
from .registry import MODELS, Model, make_default_cfgs, register_base_names, register_models, slot_models

__all__: list[str] = []  # register_model adds each entry point

_MOBILENETV2 = [  # the two arch_defs are timm's
    ['ds_r1_k3_s1_c16'],
    ['ir_r2_k3_s2_e6_c24'],
    ['ir_r3_k3_s2_e6_c32'],
    ['ir_r4_k3_s2_e6_c64'],
    ['ir_r3_k3_s1_e6_c96'],
    ['ir_r3_k3_s2_e6_c160'],
    ['ir_r1_k3_s1_e6_c320'],
]
_LITE = [
    ['ds_r1_k3_s1_e1_c16'],
    ['ir_r2_k3_s2_e6_c24'],
    ['ir_r2_k5_s2_e6_c40'],
    ['ir_r3_k3_s2_e6_c80'],
    ['ir_r3_k5_s1_e6_c112'],
    ['ir_r4_k5_s2_e6_c192'],
    ['ir_r1_k3_s1_e6_c320'],
]


class _Backbone(NamedTuple):
    arch_def: list[list[str]]
    width: float  # multiplier of the channels
    depth: float  # multiplier of the blocks in a stage
    fixed_ends: bool  # True if stem and head keep their widths, and the first and last stages their depths
    defaults: dict[str, Any] = {}  # of timm's `tf_` models


_TF = {'bn_eps': BN_EPS_TF_DEFAULT, 'pad_type': 'same'}
_BACKBONES = {  # by their plain timm model
    'mobilenetv2_050': _Backbone(_MOBILENETV2, 0.5, 1.0, False),
    'mobilenetv2_100': _Backbone(_MOBILENETV2, 1.0, 1.0, False),
    'mobilenetv2_110d': _Backbone(_MOBILENETV2, 1.1, 1.2, True),
    'mobilenetv2_120d': _Backbone(_MOBILENETV2, 1.2, 1.4, True),
    'mobilenetv2_140': _Backbone(_MOBILENETV2, 1.4, 1.0, False),
    'efficientnet_lite0': _Backbone(_LITE, 1.0, 1.0, True),
    'tf_efficientnet_lite0': _Backbone(_LITE, 1.0, 1.0, True, _TF),
    'tf_efficientnet_lite1': _Backbone(_LITE, 1.0, 1.1, True, _TF),
    'tf_efficientnet_lite2': _Backbone(_LITE, 1.1, 1.2, True, _TF),
    'tf_efficientnet_lite3': _Backbone(_LITE, 1.2, 1.4, True, _TF),
    'tf_efficientnet_lite4': _Backbone(_LITE, 1.4, 1.8, True, _TF),
}
_SLOTS = {InvertedResidual: Slot('bn2', act='bn2.act', behind='bn3')}


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Renames a checkpoint of another repository, and grafts a plain model's weights; see `graft`."""
    layer = MODELS[model.pretrained_cfg['architecture']].layer
    return graft(rename_state_dict(state_dict, model), model, layer, _SLOTS)


def _build(model_cls: type[nn.Module], attn_layer, block_args: list[list[dict[str, Any]]], **kwargs) -> nn.Module:
    # The rows carry the layer: to a `se_layer=` of the model, timm's builder would give a reduction ratio of its own.
    for row in chain.from_iterable(block_args):
        if row['block_type'] == 'ir':
            row.update(se_layer=attn_layer, se_ratio=0)
    return model_cls(block_args, **kwargs)


def _create_attn_efficientnet(
        model: Model,
        pretrained: bool = False,
        features_only: bool = False,
        pretrained_strict: bool = True,
        **kwargs,
) -> nn.Module:
    backbone = _BACKBONES[model.base]
    kwargs = {**backbone.defaults, **kwargs}
    round_chs_fn = partial(round_channels, multiplier=backbone.width)
    model_args: dict[str, Any] = dict(
        block_args=decode_arch_def(
            backbone.arch_def, depth_multiplier=backbone.depth, fix_first_last=backbone.fixed_ends),
        num_features=1280 if backbone.fixed_ends else max(1280, round_chs_fn(1280)),
        stem_size=32,
        fix_stem=backbone.fixed_ends,
        round_chs_fn=round_chs_fn,
        norm_layer=kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        act_layer=resolve_act_layer(kwargs, 'relu6'),
    )
    # As in timm: features come from a model class without a head, unless the caller chooses how to take them.
    headless = features_only and not {'feature_cfg', 'feature_cls'} & kwargs.keys()
    built = build_model_with_cfg(
        partial(_build, EfficientNetFeatures if headless else EfficientNet, model.layer.create),
        model.name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        pretrained_strict=pretrained_strict and not headless,
        features_only=features_only and not headless,
        kwargs_filter=('num_classes', 'num_features', 'head_conv', 'global_pool') if headless else None,
        **{**model_args, **kwargs},
    )
    if headless:
        built.pretrained_cfg = built.default_cfg = pretrained_cfg_for_features(built.pretrained_cfg)
    return built


_MODELS = slot_models(_BACKBONES)
default_cfgs = make_default_cfgs(_MODELS)
globals().update(register_models(_MODELS, _create_attn_efficientnet))
register_base_names(__name__, _MODELS)
