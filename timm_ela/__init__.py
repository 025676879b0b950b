"""Efficient Local Attention for timm: models by name, pretrained weights, and export to the Hugging Face Hub.

`ELA: Efficient Local Attention for Deep Convolutional Neural Networks` - https://arxiv.org/abs/2403.01123

This file runs at the end of every `import torch` (see autoload.py), so it imports the standard library only. The public
names load when they are first used.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .autoload import install

if TYPE_CHECKING:
    # For type checkers, and for PyInstaller, which follows import statements. They must not run: if a module's import
    # fails in one thread, an import statement in another thread can return the half-loaded module.
    from .layers.attn_layers import ATTN_LAYERS
    from .layers.ela import VARIANTS, EfficientLocalAttention
    from .models import attn_efficientnet, attn_resnet, elsa_swin, elsa_volo  # noqa: F401
    from .models.registry import graft_state_dict
    from .plot import plot_attention

__version__ = '0.4.0'
__all__ = ['ATTN_LAYERS', 'EfficientLocalAttention', 'VARIANTS', '__version__', 'graft_state_dict', 'plot_attention']
_MODULES = {
    'ATTN_LAYERS': 'layers.attn_layers', 'EfficientLocalAttention': 'layers.ela', 'VARIANTS': 'layers.ela',
    'graft_state_dict': 'models.registry', 'plot_attention': 'plot'}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    # Import timm first, as a thread that imports timm does: in different orders, two threads could wait for each other.
    import_module('timm.models')
    return getattr(import_module(f'.{_MODULES[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


install()
