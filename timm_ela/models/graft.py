"""Grafting: loads the weights of a plain model (one without attention) into the same model with attention.

The grafted model computes what the plain model does, and trains as it does. Each attention layer starts at its neutral
point, where it multiplies its input by exactly 1 / factor, and a batch norm beside it makes up for that. The neutral
gates of ELA are sigmoid(0) = 1/2, where the sigmoid's slope is greatest.

Grafting scales no convolution. If a weight before a batch norm is f times as large, the model computes the same, but
the weight's steps, relative to its size, are f times smaller under Adam, and f squared times smaller under SGD.
"""
import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..layers.attn_layers import AttnLayer
from .weights import check_weights, difference

_logger = logging.getLogger(__name__)


class Slot(NamedTuple):
    """The place of the attention layer in blocks of a class. The layer's name is `se`; the others are:

    Attributes:
        block: Class of the blocks.
        before: Norm before the layer.
        act: Activation between that norm and the layer.
        after: Batch norm after the convolution that follows the layer; '' if none follows.
    """

    block: type[nn.Module]
    before: str
    act: str = ''
    after: str = ''


def find_slot(block: nn.Module, slots: Sequence[Slot]) -> Slot | None:
    """Returns the first slot of the block's class whose norm the block has. None if it has no slot."""
    fitting = (slot for slot in slots if isinstance(block, slot.block) and slot.before in dict(block.named_modules()))
    return next(fitting, None)


def graft(
        state_dict: dict[str, Tensor],
        model: nn.Module,
        layer: AttnLayer,
        slots: Sequence[Slot],
) -> dict[str, Tensor]:
    """Grafts: completes a plain model's state dict with attention weights that change nothing.

    Args:
        state_dict: Weights of the plain model, or of the model itself, in timm's names.
        model: Model of ours that will load them.
        layer: Attention layer of the model.
        slots: Slots of the model's blocks.

    Returns:
        State dict of the model. One that already has all attention weights is returned unchanged.

    Raises:
        RuntimeError: If only some of the attention weights are missing; if the weights are those of another
            architecture, even with timm's `pretrained_strict=False`; or if they cannot be grafted, because the layer
            has no neutral point, a block holds another layer (one that has weights), or a norm cannot take the factor.
    """
    arch = model.pretrained_cfg['architecture']
    blocks = {
        f'{name}.': (block, slot) for name, block in model.named_modules()
        if (slot := find_slot(block, slots)) and not isinstance(block.se, nn.Identity | None)}
    attention = [f'{name}se.{k}' for name, (block, _) in blocks.items() for k in block.se.state_dict()]
    missing = [k for k in attention if k not in state_dict and not k.endswith('num_batches_tracked')]
    if not missing:
        return check_weights(state_dict, model)
    if any(k in state_dict for k in attention):
        raise RuntimeError(
            f'The checkpoint for {arch} lacks {len(missing)} of {len(attention)} attention weights, first '
            f'{missing[0]!r}: it must hold all of them, or none to be grafted.')
    if layer.neutral is None:
        raise RuntimeError(f'Cannot graft plain weights onto {arch}: {layer.no_weights}')
    if reason := difference(state_dict, model, without=attention):
        raise RuntimeError(f'Cannot graft onto {arch}: {reason}; it must be one of the plain model.')

    grafted = dict(state_dict)
    for name, (block, slot) in blocks.items():
        try:
            grafted |= _scaled(state_dict, name, block, slot, layer.neutral.factor)
        except KeyError as error:
            raise RuntimeError(
                f'Cannot graft onto {arch}: it has no {error}, which must make up for the attention: its batch norms '
                'need scale, shift and running statistics.') from None
        neutral = {
            k: v.new_zeros(v.shape) if k in layer.neutral.zeroed else v.detach().clone()
            for k, v in block.se.state_dict().items()}
        if not _is_neutral(block.se, neutral, block.get_submodule(slot.before).weight, layer.neutral.factor):
            raise RuntimeError(
                f'Cannot graft onto {arch}: {name}se is {type(block.se).__name__}, which does not multiply by '
                f'1/{layer.neutral.factor} where {" and ".join(layer.neutral.zeroed)} are zero, as {layer.title} does.')
        grafted |= {f'{name}se.{k}': v for k, v in neutral.items()}
    _logger.warning(
        f'Grafted plain weights onto {arch}: it computes what the plain model does until its attention is trained.')
    return grafted


def _is_neutral(attn: nn.Module, state: Mapping[str, Tensor], like: Tensor, factor: int) -> bool:
    """True if the layer, with these weights, divides a map by exactly the factor. A user may have replaced it."""
    if like.is_meta:
        return True
    # Small integers are exact in every dtype when they are divided. Random numbers would shift those of the user's run.
    x = torch.arange(2 * len(like) * 3 * 5, device=like.device) % 7 + 1
    x = x.view(2, len(like), 3, 5).to(like.dtype)
    # copies, since a batch norm in training mode updates its statistics
    weights = {k: v.clone() for k, v in state.items()}
    with torch.no_grad():
        return torch.equal(functional_call(attn, weights, (x.clone(),)) * factor, x)


def _scaled(
        state_dict: Mapping[str, Tensor],
        name: str,
        block: nn.Module,
        slot: Slot,
        factor: int,
) -> dict[str, Tensor]:
    """Returns weights of a block's norm that make up for a layer that multiplies by 1 / factor."""
    if not slot.after or isinstance(block.get_submodule(slot.act), nn.ReLU):
        # ReLU(f * x) is f * ReLU(x), and a power of two does not round: the result is equal to the bit
        return {k: state_dict[k] * factor for k in (f'{name}{slot.before}.weight', f'{name}{slot.before}.bias')}
    norm, eps = f'{name}{slot.after}', block.get_submodule(slot.after).eps
    # in float16, small variances would lose bits
    mean, var, weight = (
        v.to(torch.promote_types(v.dtype, torch.float32))
        for v in (state_dict[f'{norm}.{k}'] for k in ('running_mean', 'running_var', 'weight')))
    return {
        f'{norm}.running_mean': mean / factor,
        f'{norm}.running_var': var / factor ** 2,
        # the ratio is 1 up to eps: in training, the batch's own statistics undo the factor
        f'{norm}.weight': weight * ((var + eps * factor ** 2) / (var + eps)).sqrt(),
    }
