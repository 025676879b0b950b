"""The attention layers that models are registered with: ELA's four sizes, and those that its paper compares it with.

The latter are timm's own, set as in their papers. They compute the papers' equations with two additions: SEModule's two
layers have biases, as in its authors' released models, and CbamModule's spatial convolution has a batch norm, as in its
authors' code (which has biases in the channel MLP, too; its equation and timm do not).
"""
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import nn

from .attention import VARIANTS, EfficientLocalAttention

ELA_PAPER = 'https://arxiv.org/abs/2403.01123'


class AttnLayer(NamedTuple):
    title: str
    paper: str
    layer: Callable[..., nn.Module]
    reduction: int = 0  # hidden channels: channels // reduction, at least min_hidden; 0 where there are none
    min_hidden: int = 1

    @property
    def is_ela(self) -> bool:
        return self.paper == ELA_PAPER


# suffix of the models' names -> layer
ATTN_LAYERS = {
    **{
        f'ela_{variant}': AttnLayer(
            f'ELA-{variant.upper()}',
            ELA_PAPER,
            partial(EfficientLocalAttention, variant=variant),
        ) for variant in VARIANTS
    },
    'ca': AttnLayer(
        'Coordinate Attention', 'https://arxiv.org/abs/2103.02907', partial(CoordAttn, bias=True), 32, min_hidden=8),
    'eca': AttnLayer('Efficient Channel Attention', 'https://arxiv.org/abs/1910.03151', EcaModule),
    'se': AttnLayer('Squeeze-and-Excitation', 'https://arxiv.org/abs/1709.01507', SEModule, 16),
    'cbam': AttnLayer('Convolutional Block Attention', 'https://arxiv.org/abs/1807.06521', CbamModule, 16),
}


def create_attn_layer(
        name: str,
        channels: int,
        act_layer: Any = None,
        device=None,
        dtype=None,
) -> nn.Module:
    """Builds an attention layer as its paper has it.

    Args:
        name: Key of ATTN_LAYERS.
        channels: Channels of the feature map (N, C, H, W) that the layer gates.
        act_layer: Not used: timm's builders pass the block's activation, and each paper has its own.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """
    row = ATTN_LAYERS[name]
    hidden = {'rd_channels': max(row.min_hidden, channels // row.reduction)} if row.reduction else {}
    return row.layer(channels, **hidden, device=device, dtype=dtype)
