"""Grafting: plain weights -> a model with attention that computes the same, to the bit.

At its neutral point (see attn_layers.py) a layer multiplies its input by exactly 1 / factor. The weights that follow
it, or those of the batch norm before it, are multiplied by the factor: that gives the plain network back, since the
factor is a power of two. For the gates of ELA the point is sigmoid(0) = 1/2, where the sigmoid's slope is greatest.
"""
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layers.attn_layers import AttnLayer
from .weights import difference

_logger = logging.getLogger(__name__)

# Class of a block -> its parameters that are multiplied by the factor. The first class that fits a block counts.
Scaled = Mapping[type[nn.Module], tuple[str, ...]]


def graft(state_dict: dict[str, Tensor], model: nn.Module, layer: AttnLayer, scaled: Scaled) -> dict[str, Tensor]:
    """Completes a plain model's state dict with attention weights that change nothing.

    Args:
        state_dict: Weights of the plain model, or of the model itself, in timm's names.
        model: Model of ours that will load them.
        layer: Attention layer of the model.
        scaled: Parameters that take the factor, by the class of the block that holds the layer.

    Returns:
        State dict of the model. One that has all attention weights already is returned as it is.

    Raises:
        RuntimeError: If some of the attention weights are missing, if all are and the layer has no neutral point, or if
            the weights are those of another architecture, also with timm's `pretrained_strict=False`.
    """
    arch = model.pretrained_cfg.get('architecture', type(model).__name__)
    classes: Any = tuple(scaled)
    blocks = {
        f'{name}.': block for name, block in model.named_modules()
        if isinstance(block, classes) and not isinstance(block.se, nn.Identity | None)}
    own = {f'{name}se.{k}': v for name, block in blocks.items() for k, v in block.se.state_dict().items()}
    missing = [k for k in own if k not in state_dict and not k.endswith('num_batches_tracked')]
    if not missing:
        if reason := difference(state_dict, model, adapted=True):
            raise RuntimeError(f'The weights are not those of {arch}: {reason}.')
        return state_dict
    if any(k in state_dict for k in own):
        raise RuntimeError(
            f'The checkpoint for {arch} lacks {len(missing)} of {len(own)} attention weights, first {missing[0]!r}: '
            'it must hold all of them, or none to be grafted.')
    if layer.neutral is None:
        raise RuntimeError(f'Cannot graft plain weights onto {arch}: {layer.no_weights}')
    if reason := difference(state_dict, model, without=own, adapted=True):
        raise RuntimeError(f'Cannot graft onto {arch}: {reason}; it must be one of the plain model.')

    grafted = dict(state_dict)
    for k, v in own.items():
        grafted[k] = v.new_zeros(v.shape) if k.partition('.se.')[2] in layer.neutral.zeroed else v.detach().clone()
    for name, block in blocks.items():
        for k in next(parameters for cls, parameters in scaled.items() if isinstance(block, cls)):
            grafted[name + k] = state_dict[name + k] * layer.neutral.factor
    _logger.warning(
        f'Grafted plain weights onto {arch}: it computes what the plain model does, its attention is untrained.')
    return grafted
