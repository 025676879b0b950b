"""Reads the weights in a checkpoint, and compares them with a model's."""
from collections.abc import Iterable, Mapping
from typing import Any

from timm.models import clean_state_dict
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


def difference(
        state_dict: Mapping[str, Tensor],
        model: nn.Module,
        *,
        without: Iterable[str] = (),
        adapted: bool = False,
) -> str:
    """Says how the keys or shapes of a checkpoint differ from a model's, with the first of each. Empty if they agree.

    timm's loader is not strict when num_classes differs, and would leave missing weights at random values.

    Args:
        state_dict: Weights in timm's names.
        model: The model.
        without: Keys of the model that the checkpoint need not have.
        adapted: Whether timm adapts the weights to the model: the first convolution to the input channels, the head to
            the classes. The head may then be missing: timm reports that itself unless it makes a new head.
    """
    cfg: Mapping[str, Any] = model.pretrained_cfg if adapted else {}
    stem, heads = f'{cfg.get("first_conv")}.weight', cfg.get('classifier') or ()
    # VOLO has two
    heads = (heads,) if isinstance(heads, str) else heads

    def is_head(key: str) -> bool:
        return key.rpartition('.')[0] in heads

    without = set(without)
    own = {k: v for k, v in model.state_dict().items() if k not in without}
    parts = {name for name, _ in model.named_children()}
    # an EfficientNet with features_only has no head
    headless = heads and not any(head.partition('.')[0] in parts for head in heads)
    # Checkpoints of old versions of PyTorch have no num_batches_tracked, and batch norm fills it in.
    missing = [k for k in own if not (k in state_dict or is_head(k) or k.endswith('num_batches_tracked'))]
    unexpected = [
        k for k in state_dict if not (k in own or is_head(k) or (headless and k.partition('.')[0] not in parts))]
    differing = [
        f'{what} {len(keys)} {kind}, first {keys[0]!r}'
        for what, kind, keys in (('lacks', 'weights', missing), ('has', 'unexpected weights', unexpected)) if keys]
    if differing:
        prefixes = (k.removesuffix(missing[0]) for k in state_dict if missing and k.endswith(f'.{missing[0]}'))
        prefix = next((prefix for prefix in prefixes if all(f'{prefix}{k}' in state_dict for k in missing)), '')
        hint = f' (the missing weights are under the prefix {prefix!r}: remove it)' if prefix else ''
        return f'the checkpoint {", and ".join(differing)}{hint}'
    for k in filter(state_dict.__contains__, own):
        found, wanted = list(state_dict[k].shape), list(own[k].shape)
        axis = 1 if k == stem else 0 if is_head(k) else None
        if axis is not None and len(found) == len(wanted) > axis:
            found[axis] = wanted[axis]
        if found != wanted:
            return f'{k!r} is {tuple(state_dict[k].shape)} in the checkpoint and {tuple(wanted)} in the model'
    return ''
