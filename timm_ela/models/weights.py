"""What tells the weights of a checkpoint from those of a model."""
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn


def difference(
        state_dict: Mapping[str, Tensor],
        model: nn.Module,
        *,
        without: Iterable[str] = (),
        adapted: bool = False,
) -> str:
    """Says in what a checkpoint differs from a model: in keys or shapes, the first of them. Empty if in nothing.

    timm's loader is not strict when num_classes differs, and would leave what is missing at random.

    Args:
        state_dict: Weights in timm's names.
        model: The model.
        without: Keys of the model that the checkpoint need not have.
        adapted: Whether timm fits the weights to the model: the first convolution to its input channels, the head to
            its classes. A head may then be missing, since timm is strict where it does not make a new one.
    """
    cfg: Mapping[str, Any] = model.pretrained_cfg if adapted else {}
    stem, head = f'{cfg.get("first_conv")}.weight', cfg.get('classifier') or ''

    def is_head(key: str) -> bool:
        return head != '' and key.rpartition('.')[0] == head

    without = set(without)
    own = {k: v for k, v in model.state_dict().items() if k not in without}
    parts = {name for name, _ in model.named_children()}
    headless = head != '' and head.partition('.')[0] not in parts  # features_only models of EfficientNet
    # Checkpoints of old versions of PyTorch have no num_batches_tracked, and batch norm fills it in.
    missing = [k for k in own if not (k in state_dict or is_head(k) or k.endswith('num_batches_tracked'))]
    unexpected = [
        k for k in state_dict if not (k in own or is_head(k) or (headless and k.partition('.')[0] not in parts))]
    for what, keys in (('lacks {} weights', missing), ('has {} unexpected weights', unexpected)):
        if keys:
            return f'the checkpoint {what.format(len(keys))}, first {keys[0]!r}'
    for k in filter(state_dict.__contains__, own):
        found, wanted = list(state_dict[k].shape), list(own[k].shape)
        axis = 1 if k == stem else 0 if is_head(k) else None
        if axis is not None and len(found) == len(wanted) > axis:
            found[axis] = wanted[axis]
        if found != wanted:
            return f'{k!r} is {tuple(state_dict[k].shape)} in the checkpoint and {tuple(wanted)} in the model'
    return ''
