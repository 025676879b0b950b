"""The table of our models, a row each, and their place in timm's registry."""
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from types import ModuleType
from typing import Any, NamedTuple

from timm.models import (
    DefaultCfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    model_entrypoint,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from ..layers.attn_layers import ATTN_LAYERS, AttnLayer

GRAFT = 'graft_'  # prefix of the tags whose weights are a plain model's
# Fields of a cfg that tell of its weights, not of the model.
WEIGHTS_INFO = ('license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


class Model(NamedTuple):
    """One model of ours."""

    name: str
    base: str  # the plain timm model
    layer: AttnLayer


class Counts(NamedTuple):
    """Costs of a model at 224 x 224 pixels with 1000 classes."""

    params: int
    macs: int  # multiply-adds of convolutions and matrix products, by torch's FlopCounterMode


MODELS: dict[str, Model] = {}


def slot_models(bases: Iterable[str]) -> list[Model]:
    """A model for each plain timm model and each of ATTN_LAYERS. Width 1.0 of MobileNetV2 is not named."""
    return [
        Model(f'{base.removesuffix("_100")}_{layer.suffix}', base, layer)
        for base in bases for layer in ATTN_LAYERS.values()]


def make_default_cfgs(models: Iterable[Model]) -> dict[str, DefaultCfg]:
    """Pretrained cfgs of models, as timm reads them in a module's `default_cfgs`.

    A layer with a neutral point has one tag `graft_<tag>` for each tag that timm serves from the Hub for the plain
    model, the plain model's default first, with the same settings. Another has the plain model's settings and no tag.
    """
    cfgs: dict[str, Any] = {}
    for model in models:
        if model.layer.neutral:
            cfgs |= {
                f'{model.name}.{GRAFT}{cfg.tag}': replace(cfg, url=None, architecture=None, tag=None)
                for cfg in get_arch_pretrained_cfgs(model.base).values() if cfg.hf_hub_id}
        else:
            cfg = get_pretrained_cfg(model.base).to_dict(remove_source=True)
            cfgs[model.name] = {k: v for k, v in cfg.items() if k not in ('architecture', 'tag', *WEIGHTS_INFO)}
    return generate_default_cfgs(cfgs)


def register_models(models: Sequence[Model], create: Callable[..., nn.Module]) -> dict[str, Callable[..., nn.Module]]:
    """Registers a family with timm.

    Args:
        models: Rows of the family.
        create: Called as `create(model, pretrained, **kwargs)`. Its module is the family's, where timm looks for
            `default_cfgs`.

    Returns:
        The entry points by name, to be put into that module.
    """
    entrypoints = {model.name: register_model(_entrypoint(model, create)) for model in models}
    MODELS.update({model.name: model for model in models})
    return entrypoints


def _entrypoint(model: Model, create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        if pretrained and model.layer.no_weights:
            cfg = resolve_pretrained_cfg(
                model.name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
            if not (cfg.has_weights or cfg.state_dict):
                raise RuntimeError(f'There are no pretrained weights for {model.name}: {model.layer.no_weights}')
        return create(model, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = model.name
    entrypoint.__doc__ = f'{model.base} with {model.layer.title} - {model.layer.paper.url}'
    entrypoint.__module__ = create.__module__
    return entrypoint


def register_base_names(module: str, models: Iterable[Model]) -> None:
    """Lets timm map `<timm base>_<layer>` to our name where the two differ, without listing it.

    Args:
        module: `__name__` of the family's module.
        models: Rows of the family.
    """
    names = {f'{model.base}_{model.layer.suffix}': model.name for model in models}
    register_model_deprecations(module, {k: v for k, v in names.items() if k != v})


@cache
def read_counts() -> dict[str, Counts]:
    """The costs of our models and of their plain ones, which `make cards` measures."""
    with files(__package__).joinpath('counts.csv').open(encoding='utf-8') as file:
        return {row['name']: Counts(int(row['params']), int(row['macs'])) for row in csv.DictReader(file)}


def family(name: str) -> ModuleType:
    """The module of one of our models, with its `rename_state_dict` and its `checkpoint_filter_fn`."""
    return sys.modules[model_entrypoint(name).__module__]


def graft_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Completes a plain model's state dict with attention weights that change nothing, as loading it does.

    Args:
        state_dict: Weights of the plain timm model, of the model itself, or of its authors' model.
        model: Model of ours that will load them.

    Returns:
        State dict of the model; see the family's `checkpoint_filter_fn`.

    Raises:
        RuntimeError: If the weights are those of another architecture, or hold a part of the attention's.
    """
    return family(model.pretrained_cfg['architecture']).checkpoint_filter_fn(state_dict, model)
