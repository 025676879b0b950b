"""Speed and memory of ELA beside timm's attention layers, and of models beside their plain ones, on this machine.

A layer's floor is the time of the fewest passes over its tensor, at the bandwidth of a large copy that takes its turn
among the layers.
"""
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import create_attn
from timm.models import get_arch_name
from torch import Tensor, nn

from . import __version__, fused
from .attention import EfficientLocalAttention
from .catalog import BACKBONES
from .fused import ela_reference
from .timing import Call, Setting, measure

SHAPES = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7), (144, 56, 56), (960, 7, 7))
MODELS = ('resnet50_ela_b', 'mobilenetv2_ela_b')
# The fewest over the tensor. Forward: x is read to pool and read to gate, y is written. Backward: x and the gradient
# are read to reduce, the gradient is read again, and that of x is written.
PASSES = {'inference': 3, 'training': 7}
_LARGE = 2 ** 28  # bytes, more than caches hold
Called = Callable[[Tensor], Tensor]
Data = Iterator[tuple[Tensor, Tensor]]  # inputs and labels, or the gradients that come from above
_logger = logging.getLogger(__name__)


class _PlainFormula(EfficientLocalAttention):
    def forward(self, x: Tensor) -> Tensor:
        return ela_reference(x, self.conv.weight, self.gn.weight, self.gn.bias, self.gn.num_groups, self.gn.eps)


def layer_makers(channels: int, variant: str) -> dict[str, Callable[[], nn.Module]]:
    """What builds each of the layers that are compared."""
    ours = f'ELA-{variant.upper()}'
    return {
        ours: partial(EfficientLocalAttention, channels, variant),
        f'{ours} (plain formula)': partial(_PlainFormula, channels, variant),
        **{f'timm {name}': partial(create_attn, name, channels) for name in ('se', 'eca', 'cbam', 'coord', 'ela')},
    }


def _layer_step(called: Called, weights: list[Tensor], data: Data) -> object:
    x, upstream = next(data)
    return torch.autograd.grad(called(x), (x, *weights), upstream)


def _model_step(called: Called, weights: list[Tensor], data: Data) -> object:
    x, labels = next(data)
    return torch.autograd.grad(F.cross_entropy(called(x).float(), labels), weights)


def _both_modes(
        modules: dict[str, nn.Module],
        step: Callable[..., object],
        data: Data,
        setting: Setting,
        others: dict[str, Call],
) -> Iterator[tuple[str, dict[str, dict[str, float]]]]:
    torch.compiler.reset()  # a second shape would be compiled for any
    called = {name: setting.prepare(module) for name, module in modules.items()}
    for mode in PASSES:
        calls: dict[str, Call] = {}
        for name, module in modules.items():
            module.train(mode == 'training')
            calls[name] = partial(lambda f: f(next(data)[0]), called[name])
            if module.training:
                calls[name] = partial(step, called[name], list(module.parameters()), data)
        with torch.inference_mode(mode == 'inference'):
            measured = measure({**calls, **others}, setting)
        yield mode, measured


def time_layers(shape: tuple[int, ...], variant: str, setting: Setting) -> list[dict[str, Any]]:
    """A row for each layer at one shape (C, H, W)."""
    layers = {name: make() for name, make in layer_makers(shape[0], variant).items()}
    draw = partial(setting.random, *shape, dtype=setting.amp_dtype)
    size = draw().nbytes
    # As many inputs, used in turn, as no cache holds.
    count = min(-(-_LARGE // size), setting.repeats * len(layers))
    data = cycle([(draw().requires_grad_(), draw()) for _ in range(count)])
    source = torch.randn(_LARGE // 4, device=setting.device)
    copy: Call = partial(torch.empty_like(source).copy_, source)
    rows: dict[str, dict[str, Any]] = {name: {'shape': list(shape), 'layer': name} for name in layers}
    for mode, measured in _both_modes(layers, _layer_step, data, setting, {'copy': copy}):
        bytes_per_ms = 2 * source.nbytes / measured['copy']['ms']  # read and written
        for name, row in rows.items():
            row |= {f'{mode}_{key}': value for key, value in measured[name].items()}
            row[f'{mode}_floor_ms'] = PASSES[mode] * size / bytes_per_ms
            row[f'{mode}_copy_gb_per_s'] = bytes_per_ms / 1e6
    return list(rows.values())


def time_models(base: str, names: Sequence[str], img_size: int, setting: Setting) -> list[dict[str, Any]]:
    """A row for a plain model and one for each of ours that is built on it."""
    models = {name: timm.create_model(name) for name in (base, *names)}
    labels = torch.randint(1000, (setting.batch_size,), device=setting.device)
    data = cycle([(setting.random(3, img_size, img_size), labels)])
    rows: dict[str, dict[str, Any]] = {name: {'model': name, 'plain': base} for name in models}
    for mode, measured in _both_modes(models, _model_step, data, setting, {}):
        for name, row in rows.items():
            row |= {f'{mode}_{key}': value for key, value in measured[name].items()}
            row[f'{mode}_images_per_s'] = setting.batch_size * 1e3 / measured[name]['ms']
    return list(rows.values())


def _check(name: str, make: Callable[[], nn.Module], batch_size: int, *shape: int) -> None:
    try:
        with torch.device('meta'):
            make()(torch.empty(batch_size, *shape))
    except Exception as error:
        raise ValueError(f'{name} at {"x".join(map(str, shape))}, batch {batch_size}: {error}') from error


def hardware(device: torch.device) -> str:
    """Name of the GPU, or of the CPU."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name()
    info = Path('/proc/cpuinfo')  # where `platform` knows no name
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def run_bench(
        setting: Setting,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        models: Sequence[str] = MODELS,
        variant: str = 'b',
        img_size: int = 224,
) -> dict[str, Any]:
    """Measures layers at each shape and models beside their plain ones.

    A layer's training step is forward and backward from a random gradient, to all gradients; a model's is forward,
    cross entropy and backward, without an optimizer.

    Args:
        setting: How.
        shapes: Shapes (C, H, W) for the layers.
        models: Models of ours.
        variant: Size of the ELA among the layers.
        img_size: Height and width of the models' input.

    Returns:
        What was measured, where and how, ready for JSON; the units stand in the keys.

    Raises:
        ValueError: Before anything is timed: if a model is not ours, or one or a layer cannot take its input.
    """
    plain: dict[str, list[str]] = {}
    for name in models:
        if get_arch_name(name) not in BACKBONES:
            raise ValueError(f'{name!r} is not a model of timm_ela, with a plain one beside it: see `timm-ela list`.')
        plain.setdefault(BACKBONES[get_arch_name(name)], []).append(name)
        _check(name, partial(timm.create_model, name), setting.batch_size, 3, img_size, img_size)
    for shape in shapes:
        for name, make in layer_makers(shape[0], variant).items():
            _check(name, make, setting.batch_size, *shape)

    result: dict[str, Any] = {
        'hardware': hardware(setting.device),
        'device': setting.device.type,
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'timm_ela': __version__,
        'dtype': str(setting.amp_dtype or torch.float32).removeprefix('torch.'),
        'autocast': setting.amp_dtype is not None,
        'memory_format': str(setting.memory_format).removeprefix('torch.').removesuffix('_format'),
        'compiled': setting.compile,
        'timm_ela_fused': fused._FUSED,
        'batch_size': setting.batch_size,
        'img_size': img_size,
        'repeats': setting.repeats,
        'layers': [],
        'models': [],
    }
    for shape in shapes:
        _logger.info(f'Timing layers at {"x".join(map(str, shape))}')
        result['layers'] += time_layers(shape, variant, setting)
    for base, names in plain.items():
        _logger.info(f'Timing {base} and {", ".join(names)}')
        result['models'] += time_models(base, names, img_size, setting)
    return result
