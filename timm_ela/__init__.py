"""Efficient Local Attention for timm: models by name, pretrained weights, and export to the Hugging Face Hub.

`ELA: Efficient Local Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2403.01123

This file runs at the end of every `import torch` (see autoload.py), so it imports the standard library only. The public
names load when they are first used.
"""
import sys
from importlib import import_module
from typing import Any

from .autoload import install

__version__ = '0.3.0'

# public name -> module that defines it
_PUBLIC = {
    'EfficientLocalAttention': 'layers.ela',
    'VARIANTS': 'layers.ela',
    'ATTN_LAYERS': 'layers.attn_layers',
    'graft_state_dict': 'models.registry',
    'plot_attention': 'plot',
}
__all__ = [*_PUBLIC, '__version__']


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        # timm first, as in a thread that imports timm: in another order, two threads could wait for each other
        import_module('timm.models')
        return getattr(import_module(f'{__name__}.{_PUBLIC[name]}'), name)
    # if autoload.py has dropped this package, it is imported again, without its loaded submodules as attributes
    if module := sys.modules.get(f'{__name__}.{name}'):
        return module
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
