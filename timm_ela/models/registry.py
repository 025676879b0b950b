"""The table of our models, a row each, and their place in timm's registry."""
import csv
import warnings
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

GRAFT = 'graft_'  # prefix of the tags whose weights are a plain model's
# Fields of a cfg that tell of its weights, not of the model.
WEIGHTS_INFO = ('license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


class Family(NamedTuple):
    """What models that are built in the same way share."""

    create: Callable[..., nn.Module]  # create(model, pretrained, **kwargs); timm looks for default_cfgs in its module
    complete: Callable[[dict[str, Tensor], nn.Module, AttnLayer], dict[str, Tensor]]  # grafts weights, or checks them
    rename: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] = lambda weights, model: weights  # as timm's


class Model(NamedTuple):
    """One model of ours."""

    name: str
    base: str  # the plain timm model
    layer: AttnLayer
    family: Family

    def rename_state_dict(self, state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """The weights of a checkpoint under timm's names; see `unwrap` for what may be around them."""
        return self.family.rename(unwrap(state_dict), model)

    def checkpoint_filter_fn(self, state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
        """Renames the weights of a checkpoint, and grafts those of a plain model; see `graft`."""
        return self.family.complete(self.rename_state_dict(state_dict, model), model, self.layer)


class Counts(NamedTuple):
    """Costs of a model at 224 x 224 pixels with 1000 classes."""

    params: int
    macs: int  # multiply-adds of convolutions and matrix products, by torch's FlopCounterMode


MODELS: dict[str, Model] = {}


def slot_models(bases: Iterable[str], family: Family) -> list[Model]:
    """A model for each plain timm model and each of ATTN_LAYERS. Width 1.0 of MobileNetV2 is not named."""
    return [
        Model(f'{base.removesuffix("_100")}_{layer.suffix}', base, layer, family)
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


def register_models(models: Sequence[Model]) -> dict[str, Callable[..., nn.Module]]:
    """Registers models with timm.

    Returns:
        The entry points by name, to be put into the module of the family's `create`.
    """
    entrypoints = {model.name: register_model(_entrypoint(model)) for model in models}
    MODELS.update({model.name: model for model in models})
    return entrypoints


def _entrypoint(model: Model) -> Callable[..., nn.Module]:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        if pretrained and model.layer.no_weights:
            cfg = resolve_pretrained_cfg(
                model.name, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
            if not (cfg.has_weights or cfg.state_dict):
                raise RuntimeError(f'There are no pretrained weights for {model.name}: {model.layer.no_weights}')
        return model.family.create(model, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = model.name
    entrypoint.__doc__ = f'{model.base} with {model.layer.title} - {model.layer.paper.url}'
    entrypoint.__module__ = model.family.create.__module__
    return entrypoint


def register_base_names(module: str, models: Iterable[Model]) -> None:
    """Makes `<timm base>_<layer>` another name of a model where the two differ, which timm does not list.

    Args:
        module: `__name__` of the family's module.
        models: Rows of the family.
    """
    names = {f'{model.base}_{model.layer.suffix}': model.name for model in models}
    names = {k: v for k, v in names.items() if k != v}
    register_model_deprecations(module, names)  # timm's only names that it does not list; ours are not deprecated
    warnings.filterwarnings('ignore', f'Mapping deprecated model name ({"|".join(names)}) to current ')


@cache
def read_counts() -> dict[str, Counts]:
    """The costs of our models and of their plain ones, which `make cards` measures."""
    with files(__package__).joinpath('counts.csv').open(encoding='utf-8') as file:
        return {row['name']: Counts(int(row['params']), int(row['macs'])) for row in csv.DictReader(file)}


def graft_state_dict(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Completes a plain model's state dict with attention weights that change nothing, as loading it does.

    Args:
        state_dict: Weights of the plain timm model, of the model itself, or of its authors' model.
        model: Model of ours that will load them.

    Returns:
        State dict of the model.

    Raises:
        RuntimeError: If the weights are those of another architecture, or hold a part of the attention's.
    """
    return MODELS[model.pretrained_cfg['architecture']].checkpoint_filter_fn(state_dict, model)
