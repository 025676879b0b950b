"""Reads the weights in a checkpoint, and compares their names with a model's."""
from collections.abc import Iterable, Mapping
from typing import Any

from timm.models import clean_state_dict, get_pretrained_cfg
from torch import Tensor, nn


def unwrap(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """Returns a checkpoint's weights, from under 'state_dict' or 'model' if they are there, without a prefix 'module.'.

    Lightning's prefix 'model.' is removed too, if all names have it.
    """
    for wrapper in ('state_dict', 'model'):
        state_dict = state_dict.get(wrapper, state_dict)
    state_dict = clean_state_dict(state_dict)
    is_lightning = all(k.startswith('model.') for k in state_dict)
    return {k.removeprefix('model.') if is_lightning else k: v for k, v in state_dict.items()}


def difference(state_dict: Mapping[str, Tensor], model: nn.Module, without: Iterable[str] = ()) -> str:
    """Says which weights a checkpoint lacks and which it has too many, with the first of each. Empty if there are none.

    timm's loader is not strict where it makes a new head, and would leave missing weights at random values. The head
    itself does not count here: the loader reports it if it makes no new one. Nor do shapes, which it always compares.

    Args:
        state_dict: Weights in timm's names.
        model: One of our models.
        without: Weights of the model that the checkpoint need not have.
    """
    classifiers = get_pretrained_cfg(model.pretrained_cfg['architecture']).classifier or ()
    # VOLO has two
    heads = tuple(f'{name}.' for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    parts = {name for name, _ in model.named_children()}
    if not any(head.partition('.')[0] in parts for head in heads):
        # the model is for features, and may lack other parts between them and the head
        state_dict = {k: v for k, v in state_dict.items() if k.partition('.')[0] in parts}

    def counts(key: str) -> bool:
        # old checkpoints have no num_batches_tracked
        return not key.startswith(heads) and not key.endswith('num_batches_tracked')

    without = set(without)
    wanted = dict.fromkeys(k for k in model.state_dict() if k not in without)
    missing = [k for k in wanted if k not in state_dict and counts(k)]
    unexpected = [k for k in state_dict if k not in wanted and counts(k)]
    differing = [
        f'{what} {len(keys)} {kind}, first {keys[0]!r}'
        for what, kind, keys in (('lacks', 'weights', missing), ('has', 'unexpected weights', unexpected)) if keys]
    return f'the checkpoint {", and ".join(differing)}' if differing else ''


def check_weights(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights if their names are those of the model, but for the head.

    Raises:
        RuntimeError: If a weight is missing or unexpected.
    """
    if reason := difference(state_dict, model):
        raise RuntimeError(f'The weights are not those of {model.pretrained_cfg["architecture"]}: {reason}.')
    return state_dict
