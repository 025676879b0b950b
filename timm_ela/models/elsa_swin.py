"""ELSA-Swin: a Swin Transformer with Enhanced Local Self-Attention, not window attention, in its first three stages.

`ELSA: Enhanced Local Self-Attention for Vision Transformer` - https://arxiv.org/abs/2112.12786
`Swin Transformer: Hierarchical Vision Transformer using Shifted Windows` - https://arxiv.org/abs/2103.14030

The last stage is Swin's own. Checkpoints in the authors' layout load: https://github.com/damo-cv/ELSA
"""
import logging
import re
from functools import partial
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models import SwinTransformer, build_model_with_cfg, model_entrypoint
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from ..layers.attn_layers import ELSA
from ..layers.elsa import EnhancedLocalSelfAttention, elsa_in_place_of
from .registry import Family, Model, make_default_cfgs, register_models
from .weights import check_weights

# register_model adds each entry point
__all__: list[str] = []

_logger = logging.getLogger(__name__)

# name -> plain timm model, and channels per group of ELSA's grouped convolution
_ELSA_SWINS = {
    'elsa_swin_tiny': ('swin_tiny_patch4_window7_224', 4),
    'elsa_swin_small': ('swin_small_patch4_window7_224', 8),
    'elsa_swin_base': ('swin_base_patch4_window7_224', 8),
}


class ElsaSwinBlock(nn.Module):
    """A block of Swin with ELSA in place of window attention; the other parts are the block's own."""

    def __init__(self, block: SwinTransformerBlock, attn: EnhancedLocalSelfAttention) -> None:
        """
        Args:
            block: The block of timm's Swin that it replaces.
            attn: Its attention.
        """
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = block.norm1, attn, block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2

    def set_input_size(
            self,
            feat_size: tuple[int, int],
            window_size: tuple[int, int],
            always_partition: bool | None = None,
    ) -> None:
        """Does nothing: the block has no windows and takes any size."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, C) to (N, H, W, C)."""
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def build_elsa_swin(
        base: str,
        elsa_kernel: int = 7,
        group_width: int = 8,
        lam: float = 0,
        gamma: float = 1,
        weight_init: str = '',
        **kwargs: Any,
) -> SwinTransformer:
    """Builds timm's Swin with ELSA in all stages but the last.

    Args:
        base: The plain timm model.
        elsa_kernel: Positions along a side of ELSA's square.
        group_width: Channels per group of ELSA's grouped convolution.
        lam: Exponent of the ghost head's factor; 0 leaves the factor out.
        gamma: Factor of the ghost head's summand; 0 leaves the summand out.
        weight_init: As in timm.
        **kwargs: As timm's SwinTransformer takes them.
    """
    model = model_entrypoint(base)(weight_init=weight_init, **kwargs)
    for stage in model.layers[:-1]:
        for i, block in enumerate(stage.blocks):
            attn = elsa_in_place_of(
                block.attn, block.attn.qkv.bias is not None, weight_init,
                kernel_size=elsa_kernel, group_width=group_width, lam=lam, gamma=gamma)
            stage.blocks[i] = ElsaSwinBlock(block, attn)
    return model


def rename_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Gives weights in the authors' layout timm's names. Weights in timm's layout keep their names.

    Of the weights of a detector or a segmenter, whose keys begin with 'backbone.', it returns the backbone's. The norm
    of the last feature map becomes the norm before the classifier.
    """
    backbone = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
    if backbone:
        # timm returns the other feature maps without a norm
        norms = tuple(f'norm{i}.' for i in range(len(model.layers) - 1))
        _logger.warning(
            f'The checkpoint of a detector or a segmenter has no classifier: only its backbone is taken. '
            f'{len(state_dict) - len(backbone)} other weights, and all norms but the last, are left out.')
        state_dict = {
            k.replace(f'norm{len(norms)}.', 'norm.'): v for k, v in backbone.items() if not k.startswith(norms)}
    if not any(k.endswith('.attn.rb') or k.startswith('layers.0.downsample.') for k in state_dict):
        return state_dict
    last = f'layers.{len(model.layers) - 1}.blocks.'
    renamed = {}
    for k, v in state_dict.items():
        # timm computes these
        if k.endswith(('.relative_id', '.relative_position_index', '.attn_mask')):
            continue
        # timm merges patches at the start of a stage, the authors at the end of the one before
        k = re.sub(r'^layers\.(\d+)\.downsample', lambda m: f'layers.{int(m[1]) + 1}.downsample', k)
        k = re.sub(r'^head\.(?!fc\.)', 'head.fc.', k)
        if k.startswith(last):
            k = k.replace('.attn.post_proj.', '.attn.proj.')
            if '.attn.pre_proj.' in k:
                value, query, key = v.chunk(3)
                k, v = k.replace('.attn.pre_proj.', '.attn.qkv.'), torch.cat([query, key, value])
            if k.endswith('.attn.rb'):
                # the authors measure positions from query to key, timm from key to query
                k, v = k.replace('.attn.rb', '.attn.relative_position_bias_table'), v.flip(1).t()
        renamed[k] = v
    return renamed


def _resize_position_bias(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resizes position biases of another window size, as timm's Swin does."""
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    for k, v in state_dict.items():
        if k.endswith('.relative_position_bias_table') and k in shapes:
            window = model.get_submodule(k.rpartition('.')[0]).window_size
            if v.shape != shapes[k] or window[0] != window[1]:
                state_dict[k] = resize_rel_pos_bias_table(v, window, shapes[k])
    return state_dict


def _create_elsa_swin(model: Model, pretrained: bool = False, **kwargs) -> SwinTransformer:
    base, group_width = _ELSA_SWINS[model.name]
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs.get('depths', (2, 2, 6, 2))))))
    return build_model_with_cfg(
        partial(build_elsa_swin, base),
        model.name,
        pretrained,
        pretrained_filter_fn=lambda weights, built: _resize_position_bias(
            model.checkpoint_filter_fn(weights, built), built),
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
        **{'group_width': group_width, **kwargs},
    )


_FAMILY = Family(_create_elsa_swin, lambda weights, model, layer: check_weights(weights, model), rename_state_dict)
_MODELS = [Model(name, base, ELSA, _FAMILY) for name, (base, _) in _ELSA_SWINS.items()]
default_cfgs = make_default_cfgs(_MODELS)
register_models(_MODELS)
