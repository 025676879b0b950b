"""The attention layers of the registered models, one row each: ELA's four sizes, and what ELA is compared with.

The other layers have the settings of their papers, and are timm's modules where timm has them. Where a paper's
equations and its authors' code differ, the layers have:

- SE: biases in both layers, as in the authors' released models. The equations have none.
- CBAM: a batch norm after the spatial convolution, as in the authors' code, and no biases in the channel MLP, as in the
  equation.
- Coordinate Attention: biases and at least 8 hidden channels, as in the authors' code.

timm's GlobalContext has a LayerNorm with an epsilon of 1e-6, where the authors have 1e-5.
"""
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from timm.layers import EcaModule, GlobalContext, SEModule
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import nn

from .ela import VARIANTS, EfficientLocalAttention
from .elsa import EnhancedLocalSelfAttention
from .shuffle_attn import ShuffleAttention
from .strip_pooling import StripPooling
from .triplet_attn import TripletAttention


class Paper(NamedTuple):
    """A paper on arXiv. BibTeX's 'and' separates the authors."""

    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def url(self) -> str:
        return f'https://arxiv.org/abs/{self.arxiv}'

    @property
    def bibtex(self) -> str:
        key = f'{self.authors.partition(",")[0].lower()}{self.year}'
        fields = dict(
            title=self.title, author=self.authors, journal=f'arXiv preprint arXiv:{self.arxiv}', year=self.year)
        return f'@article{{{key},\n' + ',\n'.join(f'  {k:7} = {{{v}}}' for k, v in fields.items()) + '\n}'


class Neutral(NamedTuple):
    """The neutral point of a layer: weights with which it multiplies its input by exactly 1 / factor.

    Gradients there are not zero, so the layer leaves the point as soon as it is trained.

    Attributes:
        zeroed: Parameters that are zero at this point.
        factor: A power of two, so that scaling by it does not round.
    """

    zeroed: tuple[str, ...]
    factor: int


class AttnLayer(NamedTuple):
    """An attention layer: its names, its paper, and how it is made.

    Attributes:
        suffix: Suffix of the names of models with this layer.
        title: Name of the layer.
        paper: Paper that introduced it.
        module: Class of the layer, or a partial of it: module(channels, device=..., dtype=...). It must have a
            parameter, by which a checkpoint of the model differs from one of the plain model.
        neutral: Neutral point, or None if the layer has none.
        no_weights: Why there are no pretrained weights, if the layer has no neutral point.
    """

    suffix: str
    title: str
    paper: Paper
    module: Callable[..., nn.Module]
    neutral: Neutral | None = None
    no_weights: str = ''

    @property
    def tag(self) -> str:
        """Name of the method without its size: 'ela' for 'ela_t'."""
        return self.suffix.partition('_')[0]

    def create(self, channels: int, act_layer: Any = None, device=None, dtype=None) -> nn.Module:
        """Builds the layer for a feature map (N, channels, H, W), as timm's builders call it.

        Args:
            channels: Channels of the feature map.
            act_layer: Not used: timm's builders pass the block's activation, and each paper has its own.
            device, dtype: Device and dtype of the parameters.
        """
        return self.module(channels, device=device, dtype=dtype)


def _reduced(layer: Callable[..., nn.Module], ratio: int, least: int = 1, **kwargs) -> Callable[..., nn.Module]:
    """Returns a layer of timm with channels // ratio hidden channels, but at least `least`, as a `module` of a row."""
    def module(channels: int, **dd) -> nn.Module:
        return layer(channels, rd_channels=max(least, channels // ratio), **kwargs, **dd)

    return module


ELA = Paper(
    'ELA: Efficient Local Attention for Deep Convolutional Neural Networks', 'Xu, Wei and Wan, Yi', 2024, '2403.01123')

ATTN_LAYERS = {layer.suffix: layer for layer in (
    *(AttnLayer(
        f'ela_{variant}',
        f'ELA-{variant.upper()}',
        ELA,
        partial(EfficientLocalAttention, variant=variant, inplace=True),
        Neutral(('gn.weight', 'gn.bias'), 4),
    ) for variant in VARIANTS),
    AttnLayer(
        'ca',
        'Coordinate Attention',
        Paper('Coordinate Attention for Efficient Mobile Network Design',
              'Hou, Qibin and Zhou, Daquan and Feng, Jiashi', 2021, '2103.02907'),
        _reduced(CoordAttn, 32, least=8, bias=True),
        Neutral(('conv_h.weight', 'conv_h.bias', 'conv_w.weight', 'conv_w.bias'), 4),
    ),
    AttnLayer(
        'eca',
        'Efficient Channel Attention',
        Paper('ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks',
              'Wang, Qilong and Wu, Banggu and Zhu, Pengfei and Li, Peihua and Zuo, Wangmeng and Hu, Qinghua',
              2019, '1910.03151'),
        EcaModule,
        Neutral(('conv.weight',), 2),
    ),
    AttnLayer(
        'se',
        'Squeeze-and-Excitation',
        Paper('Squeeze-and-Excitation Networks',
              'Hu, Jie and Shen, Li and Albanie, Samuel and Sun, Gang and Wu, Enhua', 2017, '1709.01507'),
        _reduced(SEModule, 16),
        Neutral(('fc2.weight', 'fc2.bias'), 2),
    ),
    AttnLayer(
        'cbam',
        'Convolutional Block Attention',
        Paper('CBAM: Convolutional Block Attention Module',
              'Woo, Sanghyun and Park, Jongchan and Lee, Joon-Young and Kweon, In So', 2018, '1807.06521'),
        _reduced(CbamModule, 16),
        Neutral(('channel.fc2.weight', 'spatial.conv.bn.weight', 'spatial.conv.bn.bias'), 4),
    ),
    AttnLayer(
        'gc',
        'Global Context',
        Paper('GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond',
              'Cao, Yue and Xu, Jiarui and Lin, Stephen and Wei, Fangyun and Hu, Han', 2019, '1904.11492'),
        _reduced(GlobalContext, 16, fuse_add=True, fuse_scale=False),
        Neutral(('mlp_add.fc2.weight', 'mlp_add.fc2.bias'), 1),
    ),
    AttnLayer(
        'triplet',
        'Triplet Attention',
        Paper('Rotate to Attend: Convolutional Triplet Attention Module',
              'Misra, Diganta and Nalamada, Trikay and Arasanipalai, Ajay Uppili and Hou, Qibin', 2020, '2010.03045'),
        TripletAttention,
        no_weights='it averages three gates, and dividing by 3 rounds, so it cannot be set to change nothing. '
                   'Train from scratch, with pretrained=False.',
    ),
    AttnLayer(
        'sa',
        'Shuffle Attention',
        Paper('SA-Net: Shuffle Attention for Deep Convolutional Neural Networks',
              'Zhang, Qing-Long and Yang, Yu-Bin', 2021, '2102.00240'),
        ShuffleAttention,
        no_weights='it shuffles the channels, so it cannot be set to change nothing. '
                   'Train from scratch, with pretrained=False.',
    ),
    AttnLayer(
        'sp',
        'Strip Pooling',
        Paper('Strip Pooling: Rethinking Spatial Pooling for Scene Parsing',
              'Hou, Qibin and Zhang, Li and Cheng, Ming-Ming and Feng, Jiashi', 2020, '2003.13328'),
        StripPooling,
        Neutral(('conv3.weight', 'conv3.bias'), 2),
    ),
)}

# not in ATTN_LAYERS: it replaces the attention of a transformer block, and cannot take the place of a gate
ELSA = AttnLayer(
    'elsa',
    'ELSA',
    Paper('ELSA: Enhanced Local Self-Attention for Vision Transformer',
          'Zhou, Jingkai and Wang, Pichao and Wang, Fan and Liu, Qiong and Li, Hao and Jin, Rong', 2021, '2112.12786'),
    EnhancedLocalSelfAttention,
    no_weights='the authors keep theirs on Google Drive and Baidu, linked from https://github.com/damo-cv/ELSA; '
               '`timm-ela convert` reads them.',
)

# ELSA in VOLO, for which the authors released nothing: see models/elsa_volo.py
ELSA_VOLO = ELSA._replace(
    title='ELSA (a reading of the paper: its authors released no ELSA-VOLO)',
    no_weights='its authors released no ELSA-VOLO, and this model is a reading of their paper. '
               'Train from scratch, with pretrained=False.',
)
