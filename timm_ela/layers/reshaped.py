"""Parameters that have another shape in their module than in its state dict."""
from functools import partial
from typing import Any

from torch import nn

Shape = tuple[int, ...]


def reshape_parameter(module: nn.Module, name: str, *shape: int) -> None:
    """Gives a module's parameter another shape; state dicts keep the present one."""
    parameter = module.get_parameter(name)
    stored = tuple(parameter.shape)
    setattr(module, name, nn.Parameter(parameter.detach().view(shape)))
    module.register_state_dict_post_hook(partial(_view, name=name, old=shape, new=stored, keep_vars=True))
    module.register_load_state_dict_pre_hook(partial(_view, name=name, old=stored, new=shape))


def _view(
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        *args: Any,
        name: str,
        old: Shape,
        new: Shape,
        keep_vars: bool = False,
) -> None:
    value = state_dict.get(prefix + name)
    # a tracer looks for the parameters themselves in state_dict(keep_vars=True)
    if keep_vars and isinstance(value, nn.Parameter):
        return
    # if it is missing or has another shape, load_state_dict reports that
    if value is not None and value.shape == old:
        state_dict[prefix + name] = value.view(new)
