"""Registers one model with timm for every backbone and attention layer."""
import sys
from collections.abc import Callable
from typing import Any

from timm.models import generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn

from .blocks import SLOTS
from .graft import graft_cfgs
from .layers import ATTN_LAYERS

MODELS: dict[str, tuple[str, str]] = {}  # name -> plain timm model, key of ATTN_LAYERS

_OF_WEIGHTS = ('architecture', 'tag', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


def _cfgs(name: str, base: str, layer: str) -> dict[str, Any]:
    """Pretrained cfgs: grafts for ELA, else one without weights that has the plain model's data settings."""
    if ATTN_LAYERS[layer].is_ela:
        return graft_cfgs(name, base)
    cfg = get_pretrained_cfg(base).to_dict(remove_source=True)
    return {name: {k: v for k, v in cfg.items() if k not in _OF_WEIGHTS}}


def register_attn_models(module: str, bases: dict[str, str], create: Callable[..., nn.Module]) -> None:
    """Registers `<prefix>_<layer>` for each of the backbones and each of ATTN_LAYERS, with its pretrained cfgs.

    Args:
        module: The calling module's `__name__`: where timm looks for the entry points and for `default_cfgs`.
        bases: Prefix of our names -> plain timm model.
        create: Called as `create(name, prefix, layer, attn_slot, pretrained, **kwargs)`.
    """
    home: Any = sys.modules[module]
    rows = {f'{prefix}_{layer}': (prefix, layer) for prefix in bases for layer in ATTN_LAYERS}
    home.default_cfgs = generate_default_cfgs(
        {k: v for name, (prefix, layer) in rows.items() for k, v in _cfgs(name, bases[prefix], layer).items()})
    for name, (prefix, layer) in rows.items():
        entrypoint = _entrypoint(name, prefix, layer, create)
        entrypoint.__name__ = entrypoint.__qualname__ = name
        entrypoint.__doc__ = f'{bases[prefix]} with {ATTN_LAYERS[layer].title} - {ATTN_LAYERS[layer].paper}'
        entrypoint.__module__ = module
        setattr(home, name, register_model(entrypoint))
    MODELS.update({name: (bases[prefix], layer) for name, (prefix, layer) in rows.items()})


def _entrypoint(name: str, prefix: str, layer: str, create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, attn_slot: str = 'inner', **kwargs) -> nn.Module:
        if attn_slot not in SLOTS:
            raise ValueError(f'Unknown attn_slot {attn_slot!r}: it is one of {", ".join(map(repr, SLOTS))}.')
        return create(name, prefix, layer, attn_slot, pretrained, **kwargs)

    return entrypoint
