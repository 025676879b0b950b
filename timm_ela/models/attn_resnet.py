"""ResNets with an attention layer in every block.

`Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385; the layers' papers are in
attn_layers.py.

`attn_slot='inner'`, the default, is the slot of the ELA authors' released backbone: in a Bottleneck after the 3x3
convolution's activation, on the inner width; in a BasicBlock after bn2, before the residual add. Their backbone also
adds a skip around the module, which neither the paper's formula nor their MobileNetV2 has; these models follow the
formula. `attn_slot='output'` is the slot of the papers of SE, CBAM and ECA: after the last batch norm, before the
residual add. In a BasicBlock the two are the same.
"""
from typing import Any

from timm.models import ResNet, build_model_with_cfg
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from .blocks import InnerAttnBottleneck
from .graft import Slot, graft
from .registry import MODELS, Model, make_default_cfgs, register_models, slot_models
from .weights import unwrap

__all__: list[str] = []  # register_model adds each entry point

# plain timm model -> block of each slot, blocks of each stage
_BASIC = {'inner': BasicBlock, 'output': BasicBlock}
_BOTTLENECK = {'inner': InnerAttnBottleneck, 'output': Bottleneck}
_RESNETS: dict[str, tuple[dict[str, type[nn.Module]], tuple[int, ...]]] = {
    'resnet18': (_BASIC, (2, 2, 2, 2)),
    'resnet34': (_BASIC, (3, 4, 6, 3)),
    'resnet50': (_BOTTLENECK, (3, 4, 6, 3)),
    'resnet101': (_BOTTLENECK, (3, 4, 23, 3)),
    'resnet152': (_BOTTLENECK, (3, 8, 36, 3)),
}
_SLOTS = {
    InnerAttnBottleneck: Slot('bn2', act='act2', behind='bn3'),
    # no convolution follows the layer
    Bottleneck: Slot('bn3'),
    BasicBlock: Slot('bn2'),
}


def rename_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The weights of a checkpoint; see `unwrap`."""
    return unwrap(state_dict)


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Grafts a plain ResNet's weights onto the model; see `graft`."""
    layer = MODELS[model.pretrained_cfg['architecture']].layer
    return graft(rename_state_dict(state_dict, model), model, layer, _SLOTS)


def _create_attn_resnet(
        model: Model,
        pretrained: bool = False,
        attn_slot: str = 'inner',
        block_args: dict[str, Any] | None = None,
        **kwargs,
) -> ResNet:
    blocks, layers = _RESNETS[model.base]
    if attn_slot not in blocks:
        raise ValueError(f'Unknown attn_slot {attn_slot!r}: it is one of {", ".join(map(repr, blocks))}.')
    return build_model_with_cfg(
        ResNet,
        model.name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        block_args={'attn_layer': model.layer.create, **(block_args or {})},
        **{'block': blocks[attn_slot], 'layers': layers, **kwargs},
    )


_MODELS = slot_models(_RESNETS)
default_cfgs = make_default_cfgs(_MODELS)
globals().update(register_models(_MODELS, _create_attn_resnet))
