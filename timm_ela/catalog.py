"""What there is: each model with its backbone, parameters, multiply-adds and tags, read from timm's registry."""
from dataclasses import dataclass
from functools import cache

import timm
import torch
from timm.models import get_arch_pretrained_cfgs
from torch.utils.flop_counter import FlopCounterMode

from . import attn_mobilenetv2, attn_resnet  # noqa: F401  they fill MODELS
from .registry import MODELS

BACKBONES = {name: base for name, (base, _) in MODELS.items()}  # our model -> plain timm model


@dataclass(frozen=True)
class ModelInfo:
    """One model: its counts at 224 x 224 pixels and 1000 classes."""

    name: str
    backbone: str
    params: int
    macs: int  # multiply-adds of convolutions and matrix products, by torch's FlopCounterMode
    tags: tuple[str, ...]  # the default first


def model_names(pattern: str = '') -> list[str]:
    """Names of our models in their tables' order, by a wildcard as timm's `list_models` takes it."""
    found = set(timm.list_models(pattern))
    return [name for name in BACKBONES if name in found]


@cache
def count(name: str, img_size: int = 224, num_classes: int = 1000) -> tuple[int, int]:
    """Parameters and multiply-adds of any timm model at img_size x img_size pixels, without allocating its weights."""
    model = timm.create_model(name, num_classes=num_classes, device='meta').eval()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model(torch.empty(1, 3, img_size, img_size, device='meta'))
    return sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2


def describe(name: str) -> ModelInfo:
    """Counts and tags of one of our models."""
    params, macs = count(name)
    tags = tuple(cfg.tag for cfg in get_arch_pretrained_cfgs(name).values() if cfg.has_weights)
    return ModelInfo(name, BACKBONES[name], params, macs, tags)
