"""Efficient Local Attention for timm: models by name, pretrained weights, and export to the Hugging Face Hub.

`ELA: Efficient Local Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2403.01123

This file runs at the end of every `import torch` (see autoload.py), so it imports the standard library only. The public
names load when they are first used.
"""
from typing import Any

from .autoload import install

__version__ = '0.4.0'
__all__ = ['ATTN_LAYERS', 'EfficientLocalAttention', 'VARIANTS', '__version__', 'graft_state_dict', 'plot_attention']


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    # timm first, as in a thread that imports timm: in another order, two threads could wait for each other
    import timm.models  # noqa: F401

    if name == 'ATTN_LAYERS':
        from .layers.attn_layers import ATTN_LAYERS
        return ATTN_LAYERS
    if name == 'graft_state_dict':
        from .models.registry import graft_state_dict
        return graft_state_dict
    if name == 'plot_attention':
        from .plot import plot_attention
        return plot_attention
    from .layers import ela
    return getattr(ela, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
