"""ELSA-VOLO: a VOLO whose Outlookers, the blocks of the first stage, have ELSA in place of outlook attention.

`ELSA: Enhanced Local Self-Attention for Vision Transformer` - https://arxiv.org/abs/2112.12786
`VOLO: Vision Outlooker for Visual Recognition` - https://arxiv.org/abs/2106.13112

These models are a reading of the paper and not the authors' models: they released no code, configuration or weights of
an ELSA-VOLO. The reading rests on the abstract, which names D1 to D5 and calls ELSA a drop-in without architecture
modification, and on the authors' ELSABlock, which has the signature and the defaults of VOLO's Outlooker (mlp_ratio 3,
no qkv bias).

Heads, widths and MLPs are VOLO's. ELSA has the defaults of the authors' class and block: kernel 5, lam and gamma 1,
groups of 8 channels, scale 1.
"""
from functools import partial
from typing import Any

from timm.models import VOLO, build_model_with_cfg, model_entrypoint
from timm.models.volo import Outlooker

from ..layers.attn_layers import ELSA_VOLO
from ..layers.elsa import elsa_in_place_of
from .registry import Family, Model, make_default_cfgs, register_models
from .weights import check_weights

# register_model adds each entry point
__all__: list[str] = []


def build_elsa_volo(
        base: str,
        elsa_kernel: int = 5,
        group_width: int = 8,
        lam: float = 1,
        gamma: float = 1,
        **kwargs: Any,
) -> VOLO:
    """Builds timm's VOLO with ELSA in its Outlookers.

    Args:
        base: The plain timm model.
        elsa_kernel: Positions along a side of ELSA's square.
        group_width: Channels per group of ELSA's grouped convolution.
        lam: Exponent of the ghost head's factor; 0 leaves the factor out, which is faster.
        gamma: Factor of the ghost head's summand; 0 leaves the summand out.
        **kwargs: As timm's VOLO takes them.
    """
    model = model_entrypoint(base)(**kwargs)
    for block in model.modules():
        if isinstance(block, Outlooker):
            block.attn = elsa_in_place_of(
                block.attn, block.attn.v.bias is not None,
                kernel_size=elsa_kernel, group_width=group_width, lam=lam, gamma=gamma)
    return model


def _create_elsa_volo(model: Model, pretrained: bool = False, **kwargs) -> VOLO:
    return build_model_with_cfg(
        partial(build_elsa_volo, model.base),
        model.name,
        pretrained,
        pretrained_filter_fn=model.checkpoint_filter_fn,
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


_FAMILY = Family(_create_elsa_volo, lambda weights, model, layer: check_weights(weights, model))
_MODELS = [Model(f'elsa_volo_d{i}', f'volo_d{i}_224', ELSA_VOLO, _FAMILY) for i in range(1, 6)]
default_cfgs = make_default_cfgs(_MODELS)
register_models(_MODELS)
