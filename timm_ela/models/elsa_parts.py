"""Shared by the families with ELSA: replacing the attention of a timm model by ELSA, and checking weights."""
from typing import Any

from timm.models import named_apply
from timm.models.vision_transformer import get_init_weights_vit
from torch import Tensor, nn

from ..layers.elsa import EnhancedLocalSelfAttention
from .weights import difference


def elsa_in_place_of(
        attn: nn.Module,
        qkv_bias: bool,
        weight_init: str = '',
        **options: Any,
) -> EnhancedLocalSelfAttention:
    """ELSA with the width, heads, dropout rates, device and dtype of another attention, and with scale 1.

    Args:
        attn: Attention of a timm model, with `num_heads`, `proj`, `attn_drop` and `proj_drop`.
        qkv_bias: Whether queries, keys and values have a bias.
        weight_init: Initialization of linear layers, as in timm's vision transformers; 'skip' leaves PyTorch's.
        **options: kernel_size, group_width, lam and gamma of EnhancedLocalSelfAttention.
    """
    layer = EnhancedLocalSelfAttention(
        attn.proj.out_features,
        attn.num_heads,
        qkv_bias=qkv_bias,
        qk_scale=1,
        attn_drop=attn.attn_drop.p,
        proj_drop=attn.proj_drop.p,
        device=attn.proj.weight.device,
        dtype=attn.proj.weight.dtype,
        **options,
    )
    if weight_init != 'skip':
        named_apply(get_init_weights_vit(weight_init, needs_reset=False), layer)
    return layer


def check_weights(state_dict: dict[str, Tensor], model: nn.Module, hint: str = '') -> dict[str, Tensor]:
    """Returns the weights if they fit the model. `hint` is for the error of a position bias of another size.

    Raises:
        RuntimeError: If they are those of another architecture or size.
    """
    if reason := difference(state_dict, model, adapted=True):
        hint = hint if 'relative_position_bias_table\' is' in reason else ''
        raise RuntimeError(f'The weights are not those of {model.pretrained_cfg["architecture"]}: {reason}{hint}.')
    return state_dict
