"""The table of our models, one row each, and their registration with timm."""
import csv
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from timm.models import (
    DefaultCfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    register_model,
    register_model_deprecations,
    resolve_pretrained_cfg,
)
from torch import Tensor, nn

from ..layers.attn_layers import ATTN_LAYERS, AttnLayer
from .weights import unwrap

# prefix of the tags whose weights are those of a plain model, grafted (see graft.py)
GRAFT = 'graft_'
# fields of a cfg that describe its weights, not the model
WEIGHTS_INFO = ('license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


class Family(NamedTuple):
    """What models that are built in the same way share.

    Attributes:
        build: build(model, pretrained, **kwargs) makes a model. timm looks for `default_cfgs` in its module.
        graft_or_check: Grafts a plain model's weights, and checks others.
        rename: Gives weights of other layouts timm's names.
    """

    build: Callable[..., nn.Module]
    graft_or_check: Callable[[dict[str, Tensor], nn.Module, AttnLayer], dict[str, Tensor]]
    rename: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = lambda weights, model: weights


class Model(NamedTuple):
    """One model of ours: `base` is the name of the plain timm model."""

    name: str
    base: str
    layer: AttnLayer
    family: Family

    def rename_state_dict(self, state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """Returns the weights of a checkpoint, which `unwrap` takes out of it, under timm's names."""
        return self.family.rename(unwrap(state_dict), model)

    def checkpoint_filter_fn(self, state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """Renames the weights of a checkpoint, and grafts those of a plain model; see `graft`."""
        return self.family.graft_or_check(self.rename_state_dict(state_dict, model), model, self.layer)


class Counts(NamedTuple):
    """Costs of a model at 224 x 224 pixels with 1000 classes.

    Attributes:
        params: Parameters.
        macs: Multiply-adds of convolutions and matrix products, by torch's FlopCounterMode.
        saved: Bytes that a training step in float32 keeps for its backward pass, per image.
    """

    params: int
    macs: int
    saved: int


MODELS: dict[str, Model] = {}


def slot_models(bases: Iterable[str], family: Family) -> list[Model]:
    """Returns a model for each plain timm model and each of ATTN_LAYERS. MobileNetV2 1.0 has no width in its name."""
    return [
        Model(f'{base.removesuffix("_100")}_{layer.suffix}', base, layer, family)
        for base in bases for layer in ATTN_LAYERS.values()]


def make_default_cfgs(models: Iterable[Model]) -> dict[str, DefaultCfg]:
    """Returns the pretrained cfgs of models, as timm reads them in a module's `default_cfgs`.

    If the layer has a neutral point, the model gets a tag `graft_<tag>` with the same settings for each tag of the
    plain model that timm serves from the Hub, the default first. Otherwise it gets the plain model's settings and no
    tag.
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


def register_models(models: Sequence[Model]) -> None:
    """Registers a family's models with timm, and puts their entry points into the module of the family's `build`.

    MobileNetV2 1.0 is registered by its name in timm too: `mobilenetv2_100_<layer>`.
    """
    module = models[0].family.build.__module__
    vars(sys.modules[module]).update({model.name: register_model(_entrypoint(model)) for model in models})
    MODELS.update({model.name: model for model in models})
    # timm does not list deprecated names, and warns when a model is made by one
    others = {f'{model.base}_{model.layer.suffix}': model.name for model in models if model.base.endswith('_100')}
    register_model_deprecations(module, others)


def _entrypoint(model: Model) -> Callable[..., nn.Module]:
    """Returns timm's entry point of a model. Its `zero_init_attn` starts random weights at the neutral point."""
    neutral = model.layer.neutral

    def entrypoint(pretrained: bool = False, zero_init_attn: bool = False, **kwargs) -> nn.Module:
        if zero_init_attn and not neutral:
            raise ValueError(f'zero_init_attn is not for {model.name}: {model.layer.title} has no neutral point.')
        if pretrained and model.layer.no_weights:
            cfg = resolve_pretrained_cfg(
                model.name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
            if not (cfg.has_weights or cfg.state_dict):
                raise RuntimeError(f'There are no pretrained weights for {model.name}: {model.layer.no_weights}')
        built = model.family.build(model, pretrained, **kwargs)
        if zero_init_attn and neutral and not pretrained:
            for name, parameter in built.named_parameters():
                if name.endswith(tuple(f'.se.{k}' for k in neutral.zeroed)):
                    nn.init.zeros_(parameter)
        return built

    entrypoint.__name__ = entrypoint.__qualname__ = model.name
    entrypoint.__doc__ = f'{model.base} with {model.layer.title} - {model.layer.paper.url}'
    entrypoint.__module__ = model.family.build.__module__
    return entrypoint


@cache
def read_counts() -> dict[str, Counts]:
    """Returns the costs of our models and of the plain ones, which `make cards` measures."""
    with files(__package__).joinpath('counts.csv').open(encoding='utf-8') as file:
        return {row.pop('name'): Counts(**{k: int(v) for k, v in row.items()}) for row in csv.DictReader(file)}


def graft_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Grafts as `pretrained=True` does: completes a plain model's state dict with attention that changes nothing.

    Args:
        state_dict: Weights of the plain timm model, of the model itself, or of its authors' model.
        model: Model of ours that will load them.

    Returns:
        State dict of the model.

    Raises:
        KeyError: If the model is not one of timm_ela.
        RuntimeError: If the weights are those of another architecture or cannot be grafted, or if only some attention
            weights are there.
    """
    return MODELS[model.pretrained_cfg['architecture']].checkpoint_filter_fn(state_dict, model)
