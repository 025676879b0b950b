"""MobileNetV2 checkpoints of other repositories -> the names that timm gives to the same weights.

Coordinate Attention's authors (github.com/houqb/CoordAttention, MBV2_CA), ELA's authors (github.com/Xuwei86/ELA_Code,
MBV2_ELA72), and plain MobileNetV2 as these two and torchvision have it. All are one sequence `features`: the stem, then
the blocks, each of which is one sequence `conv`.
"""
from typing import Any

from timm.models import clean_state_dict
from torch import Tensor, nn

# Where a block has what, for blocks that do not expand and for those that do.
_FLAT = {'0': 'conv_dw', '1': 'bn1', '3': 'conv_pw', '4': 'bn2'}
_FLAT_EXPANDED = {'0': 'conv_pw', '1': 'bn1', '3': 'conv_dw', '4': 'bn2'}
_ATTENTION = {
    '6.conv': 'se.conv', '6.gn': 'se.gn',  # ELA
    '6.conv1': 'se.conv1', '6.bn1': 'se.bn1', '6.conv2': 'se.conv_h', '6.conv3': 'se.conv_w',  # Coordinate Attention
}
# a key that only this layout has -> the two tables
_LAYOUTS = {
    'features.2.conv.8.weight': (_FLAT, {**_FLAT_EXPANDED, **_ATTENTION, '7': 'conv_pwl', '8': 'bn3'}),
    'features.2.conv.7.weight': (_FLAT, {**_FLAT_EXPANDED, '6': 'conv_pwl', '7': 'bn3'}),
    'features.2.conv.1.0.weight': (  # torchvision
        {'0.0': 'conv_dw', '0.1': 'bn1', '1': 'conv_pw', '2': 'bn2'},
        {'0.0': 'conv_pw', '0.1': 'bn1', '1.0': 'conv_dw', '1.1': 'bn2', '2': 'conv_pwl', '3': 'bn3'},
    ),
}


def remap_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Renames a checkpoint in one of the layouts above; any other state dict is returned as it is.

    Args:
        state_dict: The weights, or the checkpoint with them under 'state_dict'; names may begin with 'module.'.
        model: MobileNetV2 of ours that will load them.

    Returns:
        The weights under the model's names.

    Raises:
        RuntimeError: If the model has no place for some of them.
    """
    weights = clean_state_dict(state_dict.get('state_dict', state_dict))
    layout = next((tables for key, tables in _LAYOUTS.items() if key in weights), None)
    if layout is None:
        return state_dict

    blocks = [
        (f'blocks.{i}.{j}', block)
        for i, stage in enumerate(getattr(model, 'blocks', ())) for j, block in enumerate(stage)
    ]
    head = f'features.{len(blocks) + 1}'  # torchvision's; the others have a module `conv` for it
    names = {
        'features.0.0': 'conv_stem', 'features.0.1': 'bn1',
        'conv.0': 'conv_head', 'conv.1': 'bn2', f'{head}.0': 'conv_head', f'{head}.1': 'bn2',
        'classifier': 'classifier', 'classifier.1': 'classifier',
    }
    for i, (block, module) in enumerate(blocks, 1):
        for place, name in layout[hasattr(module, 'conv_pwl')].items():
            names[f'features.{i}.conv.{place}'] = f'{block}.{name}'

    remapped, foreign = {}, []
    places = model.state_dict().keys()
    optional = {'conv_head', 'bn2', 'classifier'}  # absent from models for features, or without a classifier
    for key, value in weights.items():
        module, _, parameter = key.rpartition('.')
        name = f'{names.get(module)}.{parameter}'
        if name in places or names.get(module) in optional:
            remapped[name] = value
        else:
            foreign.append(key)
    if foreign:
        arch = model.pretrained_cfg.get('architecture', type(model).__name__)
        raise RuntimeError(f'{arch} has no place for {len(foreign)} weights of the checkpoint: {", ".join(foreign)}.')
    return remapped
