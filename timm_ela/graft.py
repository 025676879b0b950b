"""The models' checkpoint filter: plain timm checkpoint -> ELA checkpoint that computes the same, to the bit.

With the GroupNorm at zero every gate is sigmoid(0) = 1/2, so ELA multiplies by exactly 1/4; four times the weights of
what it feeds (or of the batch norm that feeds it) give the plain network back, since 4 is a power of two. The gates
start where the sigmoid's slope is greatest.
"""
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from .attention import EfficientLocalAttention
from .blocks import InnerAttnBottleneck, OutputAttnInvertedResidual
from .remap import remap_state_dict

_logger = logging.getLogger(__name__)

GRAFT = 'graft_'  # tag prefix
_SCALE = 4
# The parameters that take the factor, by the block that holds the module; subclasses come first.
_SCALED = {
    InnerAttnBottleneck: ('conv3.weight',),
    Bottleneck: ('bn3.weight', 'bn3.bias'),
    BasicBlock: ('bn2.weight', 'bn2.bias'),
    OutputAttnInvertedResidual: ('bn3.weight', 'bn3.bias'),
    InvertedResidual: ('conv_pwl.weight',),
}


def graft_cfgs(name: str, base: str) -> dict[str, PretrainedCfg]:
    """Pretrained cfgs of an ELA model: one `graft_<tag>` per tag that timm serves from the Hub for the plain model.

    Args:
        name: ELA model, such as 'resnet50_ela_b'.
        base: Its plain timm model, such as 'resnet50'.

    Returns:
        Cfgs for timm's `generate_default_cfgs`, the plain model's default first, each pointing at timm's repository.
    """
    return {
        f'{name}.{GRAFT}{cfg.tag}': replace(cfg, url=None, architecture=None, tag=None)
        for cfg in get_arch_pretrained_cfgs(base).values() if cfg.hf_hub_id
    }


def _attention_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    blocks: Any = tuple(_SCALED)
    for name, module in model.named_modules():
        if isinstance(module, blocks) and not isinstance(module.se, nn.Identity | None):
            yield f'{name}.', module


def _check_plain(state_dict: dict[str, Tensor], model: nn.Module, own: set[str], arch: str) -> None:
    """Refuses what is not a checkpoint of the plain model: timm's own loader may be not strict (another head)."""
    cfg = model.pretrained_cfg
    adapted = {cfg.get('first_conv'), cfg.get('classifier')}  # timm fits these two to in_chans and num_classes

    def is_adapted(key: str) -> bool:
        return key.rpartition('.')[0] in adapted

    expected = {k: v for k, v in model.state_dict().items() if k not in own}
    # Old checkpoints have no num_batches_tracked, and batch norm fills it in.
    missing = [k for k in expected if k not in state_dict and not (is_adapted(k) or k.endswith('num_batches_tracked'))]
    parts = {name for name, _ in model.named_children()}  # features_only models of EfficientNet have no head at all
    unexpected = [k for k in state_dict if k not in expected and not is_adapted(k) and k.partition('.')[0] in parts]
    for what, keys in (('lacks', missing), ('holds foreign', unexpected)):
        if keys:
            raise RuntimeError(
                f'Cannot graft onto {arch}: the checkpoint {what} {len(keys)} weights, first {keys[0]!r}; '
                f'it must be one of the plain model.')
    for k, v in expected.items():
        if k in state_dict and v.shape != state_dict[k].shape and not is_adapted(k):
            raise RuntimeError(
                f'Cannot graft onto {arch}: {k!r} is {tuple(state_dict[k].shape)} in the checkpoint and '
                f'{tuple(v.shape)} in the model; it must be one of the plain model.')


def graft_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Completes a plain model's state dict with ELA weights that change nothing; the models' checkpoint filter.

    A state dict that holds all of the model's attention weights is returned as it is. The authors' own checkpoints
    (see remap.py) are renamed first.

    Args:
        state_dict: Weights of the plain timm model (for an ELA model), of the model itself, or of its authors' model.
        model: Model of ours that will load them.

    Returns:
        State dict of the model; a grafted one computes the plain model's logits bit for bit.

    Raises:
        RuntimeError: If some attention weights are missing, or all of them and the layer is not ELA, or the weights are
            those of another architecture.
    """
    state_dict = remap_state_dict(state_dict, model)
    arch = model.pretrained_cfg.get('architecture', type(model).__name__)
    blocks = list(_attention_blocks(model))
    own = {f'{block}se.{k}': v for block, parent in blocks for k, v in parent.se.state_dict().items()}
    missing = [k for k in own if k not in state_dict and not k.endswith('num_batches_tracked')]
    if not missing:
        return state_dict
    is_ela = all(isinstance(parent.se, EfficientLocalAttention) for _, parent in blocks)
    if not is_ela or any(k in state_dict for k in own):
        raise RuntimeError(
            f'The checkpoint for {arch} lacks {len(missing)} of {len(own)} {"ELA" if is_ela else "attention"} weights, '
            f'first {missing[0]!r}; it must hold all of them{", or none to be grafted" if is_ela else ""}.')
    _check_plain(state_dict, model, set(own), arch)

    grafted = dict(state_dict)
    for k, v in own.items():
        grafted[k] = v.detach().clone() if k.endswith('conv.weight') else v.new_zeros(v.shape)
    for block, parent in blocks:
        scaled = next(keys for cls, keys in _SCALED.items() if isinstance(parent, cls))
        for k in scaled:
            grafted[block + k] = state_dict[block + k] * _SCALE
    _logger.warning(
        f'Grafted plain weights onto {arch}: it computes what the plain model does, its ELA gates are untrained.')
    return grafted
