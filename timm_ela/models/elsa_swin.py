"""ELSA-Swin: Swin Transformer whose first three stages have Enhanced Local Self-Attention in place of windows.

`ELSA: Enhanced Local Self-Attention for Vision Transformer` - https://arxiv.org/abs/2112.12786
`Swin Transformer: Hierarchical Vision Transformer using Shifted Windows` - https://arxiv.org/abs/2103.14030

The last stage is Swin's own. Checkpoints in the authors' layout load: https://github.com/damo-cv/ELSA
"""
import logging
import re
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models import SwinTransformer, build_model_with_cfg, named_apply
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn

from ..layers.attn_layers import ELSA
from ..layers.elsa import EnhancedLocalSelfAttention
from .registry import Family, Model, make_default_cfgs, register_models
from .weights import difference, unwrap

__all__: list[str] = []  # register_model adds each entry point

_logger = logging.getLogger(__name__)

# name -> plain timm model, and what differs from ElsaSwinTransformer's defaults
_ELSA_SWINS: dict[str, tuple[str, dict[str, Any]]] = {
    'elsa_swin_tiny': ('swin_tiny_patch4_window7_224', dict(group_width=4)),
    'elsa_swin_small': ('swin_small_patch4_window7_224', dict(depths=(2, 2, 18, 2))),
    'elsa_swin_base': (
        'swin_base_patch4_window7_224', dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))),
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


class ElsaSwinTransformer(SwinTransformer):
    """Swin Transformer with ELSA in all stages but the last.

    Source: `ELSA: Enhanced Local Self-Attention for Vision Transformer` - https://arxiv.org/abs/2112.12786
    """

    def __init__(
            self,
            *args: Any,
            elsa_kernel: int = 7,
            group_width: int = 8,
            lam: float = 0,
            gamma: float = 1,
            weight_init: str = '',
            device=None,
            dtype=None,
            **kwargs: Any,
    ) -> None:
        """
        Args:
            *args: As timm's SwinTransformer takes them.
            elsa_kernel: Positions along a side of ELSA's square.
            group_width: Channels per group of ELSA's grouped convolution.
            lam: Exponent of the ghost head's factor.
            gamma: Factor of the ghost head's summand.
            weight_init: As in timm.
            device: Device of the parameters.
            dtype: Dtype of the parameters.
            **kwargs: As timm's SwinTransformer takes them.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__(*args, weight_init=weight_init, **dd, **kwargs)
        for stage in self.layers[:-1]:
            for i, block in enumerate(stage.blocks):
                old = block.attn
                attn = EnhancedLocalSelfAttention(
                    block.dim,
                    old.num_heads,
                    elsa_kernel,
                    qkv_bias=old.qkv.bias is not None,
                    qk_scale=1,
                    attn_drop=old.attn_drop.p,
                    proj_drop=old.proj_drop.p,
                    group_width=group_width,
                    lam=lam,
                    gamma=gamma,
                    **dd,
                )
                if weight_init != 'skip':
                    named_apply(get_init_weights_vit(weight_init, needs_reset=False), attn)
                stage.blocks[i] = ElsaSwinBlock(block, attn)


def rename_state_dict(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Weights in the authors' layout, or in timm's, under timm's names.

    Of a detector or a segmenter, whose keys begin with 'backbone.', the backbone is taken, and the norm of its last
    feature map as that of the classifier.
    """
    state_dict = unwrap(state_dict)
    backbone = {k.removeprefix('backbone.'): v for k, v in state_dict.items() if k.startswith('backbone.')}
    if backbone:
        norms = tuple(f'norm{i}.' for i in range(len(model.layers) - 1))  # of feature maps that timm gives without
        _logger.warning(
            f'The checkpoint is one of a detector or a segmenter: its backbone is taken and it has no classifier; '
            f'{len(state_dict) - len(backbone)} weights outside of it, and the norms before the last, are left out.')
        state_dict = {
            k.replace(f'norm{len(norms)}.', 'norm.'): v for k, v in backbone.items() if not k.startswith(norms)}
    if not any(k.endswith('.attn.rb') or k.startswith('layers.0.downsample.') for k in state_dict):
        return state_dict
    last = f'layers.{len(model.layers) - 1}.blocks.'
    renamed = {}
    for k, v in state_dict.items():
        if k.endswith(('.relative_id', '.relative_position_index', '.attn_mask')):
            continue  # timm makes them anew
        # timm merges patches at the start of a stage, the authors at the end of the one before
        k = re.sub(r'^layers\.(\d+)\.downsample', lambda m: f'layers.{int(m[1]) + 1}.downsample', k)
        k = re.sub(r'^head\.(?!fc\.)', 'head.fc.', k)
        if k.startswith(last):
            k = k.replace('.attn.post_proj.', '.attn.proj.')
            if '.attn.pre_proj.' in k:
                value, query, key = v.chunk(3)
                k, v = k.replace('.attn.pre_proj.', '.attn.qkv.'), torch.cat([query, key, value])
            if k.endswith('.attn.rb'):
                # the authors count from query to key, timm from key to query
                k, v = k.replace('.attn.rb', '.attn.relative_position_bias_table'), v.flip(1).t()
        renamed[k] = v
    return renamed


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Renames weights in the authors' layout, and checks that they are the model's.

    Raises:
        RuntimeError: If they are those of another architecture, or of another size of image or window.
    """
    state_dict = rename_state_dict(state_dict, model)
    if reason := difference(state_dict, model, adapted=True):
        of_size = '; make the model for the weights\' size, and call set_input_size after they are loaded'
        hint = of_size if 'relative_position_bias_table\' is' in reason else ''
        raise RuntimeError(f'The weights are not those of {model.pretrained_cfg["architecture"]}: {reason}{hint}.')
    return state_dict


def _fit(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """`checkpoint_filter_fn`, after position biases of another window are resized, as in timm's Swin."""
    state_dict, own = rename_state_dict(state_dict, model), model.state_dict()
    for k, v in state_dict.items():
        if k.endswith('.relative_position_bias_table') and k in own:
            window, shape = model.get_submodule(k.rpartition('.')[0]).window_size, own[k].shape
            if v.shape != shape or window[0] != window[1]:
                state_dict[k] = resize_rel_pos_bias_table(v, window, shape)
    return checkpoint_filter_fn(state_dict, model)


def _create_elsa_swin(model: Model, pretrained: bool = False, **kwargs) -> ElsaSwinTransformer:
    differences = _ELSA_SWINS[model.name][1]
    out_indices = kwargs.pop('out_indices', tuple(range(len(kwargs.get('depths', (2, 2, 6, 2))))))
    return build_model_with_cfg(
        ElsaSwinTransformer,
        model.name,
        pretrained,
        pretrained_filter_fn=_fit,
        feature_cfg=dict(flatten_sequential=True, out_indices=out_indices),
        **{**differences, **kwargs},
    )


_FAMILY = Family(
    _create_elsa_swin, lambda weights, model, layer: checkpoint_filter_fn(weights, model), rename_state_dict)
_MODELS = [Model(name, base, ELSA, _FAMILY) for name, (base, _) in _ELSA_SWINS.items()]
default_cfgs = make_default_cfgs(_MODELS)
globals().update(register_models(_MODELS))
