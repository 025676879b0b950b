"""What a model makes of a picture: what it saw, its classes, where it looked (Grad-CAM), and its ELA gates."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.data.loader import adapt_to_chs
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional as F

from .layers.ela import EfficientLocalAttention

_Gates = tuple[np.ndarray, np.ndarray]
_Reader = Callable[[Tensor], Tensor]
# channels of a model -> mode of a picture
_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}


class Gate(NamedTuple):
    """The gates a_h * a_w of a stage's last ELA: `all` of every channel, `map` of one channel or of the mean.

    `shown` says which: 'channel 3 of 64' or 'mean of 64 channels'. Unless a channel is given, it is the one whose gate
    varies most over the picture. Stages count from 0.
    """

    stage: int
    shown: str
    varies_most: bool
    map: np.ndarray  # (H, W)
    a_h: np.ndarray  # (H,)
    a_w: np.ndarray  # (W,)
    all: np.ndarray  # (C, H, W)


class Observation(NamedTuple):
    """What a model made of a picture.

    Without a classifier, `classes` is empty; without ELA, `gates` is. `cam` is None without a classifier or a feature
    map. Values of `picture` and `cam` are in [0, 1]. `classes` are probabilities and names, the most probable first.
    """

    model: str
    picture: np.ndarray  # (H, W, 1 or 3)
    classes: list[tuple[float, str]]
    cam: np.ndarray | None  # (H, W)
    cam_class: str
    gates: list[Gate]


def observe(
        image: str | Path | Image.Image,
        model: nn.Module,
        stages: Sequence[int] | None = None,
        topk: int = 5,
        class_names: Sequence[str] | None = None,
        channel: int | None = None,
        mean: bool = False,
        class_index: int | None = None,
) -> Observation:
    """Shows a picture to a model, and leaves the model as it was.

    Arguments and errors are those of `plot_attention`.
    """
    # the model inside a compiled, distributed or averaged one has the attributes and the names of modules
    model = unwrap_model(model)
    cfg = getattr(model, 'pretrained_cfg', {})
    name = cfg.get('architecture', type(model).__name__)
    ela = _ela_modules(model, name, stages)
    # a model that returns features has no num_classes
    classes = getattr(model, 'num_classes', 0)
    if not ela and not classes:
        raise ValueError(f'{name} has neither classes nor ELA: there is nothing to plot.')
    if class_index is not None and not 0 <= class_index < classes:
        raise ValueError(f'{name} has {classes} classes, counted from 0; got {class_index}.')
    labels = _class_names(classes, cfg, class_names) if classes else []
    x, picture = _prepare(image if isinstance(image, Image.Image) else Image.open(image), model, name)
    size, weight = x.shape[1:], next(model.parameters())

    # Grad-CAM needs gradients, also in inference mode and with frozen parameters
    with _watched(model, ela.values(), size) as (gates, maps), torch.inference_mode(False), torch.enable_grad():
        output = model(x[None].to(weight.device, weight.dtype, copy=True).requires_grad_())
        shown = [_choose(stage, *gates[module], channel, mean) for stage, module in ela.items()]
        if not classes:
            return Observation(name, picture, [], None, '', shown)
        logits = output[0].float()
        explained = int(logits.argmax()) if class_index is None else class_index
        cam = grad_cam(logits[explained], [*maps.values()], size) if maps else None
    p = logits.detach().softmax(0)
    top = [(float(p[i]), labels[i]) for i in p.argsort(descending=True)[:topk].tolist()]
    return Observation(name, picture, top, cam, labels[explained], shown)


def _prepare(image: Image.Image, model: nn.Module, name: str) -> tuple[Tensor, np.ndarray]:
    """Returns the model's input (C, H, W), and the picture (H, W, 1 or 3) that it shows."""
    channels, config = getattr(model, 'in_chans', 3), resolve_model_data_config(model)
    if channels not in _MODES:
        raise ValueError(f'{name} takes {channels} channels; plot reads pictures of 1 (grey), 3 (RGB) or 4 (RGBA).')
    stats = {k: adapt_to_chs(config[k], channels) for k in ('mean', 'std')}
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in stats.values())
    x = create_transform(**{**config, **stats})(image.convert(_MODES[channels]))
    return x, (x * std + mean).clamp(0, 1)[:3].permute(1, 2, 0).numpy()


def _class_names(count: int, cfg: dict[str, Any], given: Sequence[str] | None) -> list[str]:
    if given is not None and len(given) != count:
        raise ValueError(f'The model has {count} classes, but {len(given)} class names were given.')
    names = given or cfg.get('label_names') or ()
    names = [names[k] for k in sorted(names, key=int)] if isinstance(names, dict) else list(names)
    # the names in the cfg are those of the checkpoint: the model may have another head by now
    if len(names) != count:
        return ImageNetInfo().label_descriptions() if count == 1000 else [f'class {i}' for i in range(count)]
    descriptions = {} if given else cfg.get('label_descriptions') or {}
    return [descriptions.get(name, name) for name in names]


def _ela_modules(model: nn.Module, name: str, wanted: Sequence[int] | None) -> dict[int, EfficientLocalAttention]:
    """Returns the last ELA module of each stage, or of each wanted stage; nothing for a model without ELA.

    Stage i ends at entry i of timm's `feature_info`.
    """
    names = [n for n, _ in model.named_modules()]
    features = [info['module'] for info in getattr(model, 'feature_info', ())]
    # the number of the last module inside each feature's module
    ends = [max((i for i, n in enumerate(names) if f'{n}.'.startswith(f'{f}.')), default=len(names)) for f in features]
    ela = [(i, m) for i, m in enumerate(model.modules()) if isinstance(m, EfficientLocalAttention)]
    stages = {sum(end < i for end in ends): m for i, m in ela}
    if stages and (unknown := [stage for stage in wanted or () if stage not in stages]):
        raise ValueError(f'{name} has no ELA in stage {unknown[0]}, only in {", ".join(map(str, stages))}.')
    return {stage: stages[stage] for stage in (wanted if stages and wanted else stages)}


@contextmanager
def _watched(
        model: nn.Module,
        ela: Iterable[nn.Module],
        size: Sequence[int],
) -> Iterator[tuple[dict[nn.Module, _Gates], dict[str, tuple[Tensor, _Reader]]]]:
    """Sets a model to eval mode, collects the gates of its ELA modules and its feature maps, and restores the model.

    Take gradients inside the `with`: for them, a module that uses torch's checkpoint runs again, with its hooks. timm's
    checkpointing is switched off: it calls the blocks of a stage and not the stage, whose hook would not run.
    """
    gates: dict[nn.Module, _Gates] = {}
    maps: dict[str, tuple[Tensor, _Reader]] = {}

    def keep_gates(module: EfficientLocalAttention, args: tuple) -> None:
        a_h, a_w = (gate[0].detach().float().cpu().numpy() for gate in module.gates(args[0]))
        gates[module] = (a_h, a_w)

    def keep_map(info: dict[str, Any], module: nn.Module, args: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(output, Tensor) and (read := _reader(output, info, size)):
            # if it runs twice, keep the first output: the scores were computed from it
            maps.setdefault(info['module'], (output, read))

    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for module in ela:
            stack.callback(module.register_forward_pre_hook(keep_gates).remove)
        for info in getattr(model, 'feature_info', ()):
            if info['module'] in modules:
                stack.callback(modules[info['module']].register_forward_hook(partial(keep_map, info)).remove)
        for module in modules.values():
            for flag in ('training', 'grad_checkpointing'):
                if getattr(module, flag, False):
                    stack.callback(setattr, module, flag, True)
                    setattr(module, flag, False)
        yield gates, maps


def _choose(stage: int, a_h: np.ndarray, a_w: np.ndarray, channel: int | None, mean: bool) -> Gate:
    """Makes a stage's gate from a_h (C, H) and a_w (C, W), for the given channel or the one that varies most."""
    both = np.einsum('ch,cw->chw', a_h, a_w)
    if mean:
        return Gate(stage, f'mean of {len(both)} channels', False, both.mean(0), a_h.mean(0), a_w.mean(0), both)
    chosen = int(both.std((1, 2)).argmax()) if channel is None else channel
    if not 0 <= chosen < len(both):
        raise ValueError(f'Stage {stage} has channels 0 to {len(both) - 1}, got {chosen}.')
    shown = f'channel {chosen} of {len(both)}'
    return Gate(stage, shown, channel is None, both[chosen], a_h[chosen], a_w[chosen], both)


def _reader(feature: Tensor, info: dict[str, Any], size: Sequence[int]) -> _Reader | None:
    """Returns what makes a map (C, h, w) of a timm feature: NCHW, NHWC, or tokens after a prefix. None for others."""
    channels, grid = info['num_chs'], [-(-length // info['reduction']) for length in size]
    if feature.ndim == 4 and feature.shape[1] == channels:
        return lambda x: x[0]
    if feature.ndim == 4 and feature.shape[3] == channels:
        return lambda x: x[0].movedim(-1, 0)
    if feature.ndim == 3 and feature.shape[1] >= prod(grid) and feature.shape[2] == channels:
        return lambda x: x[0, -prod(grid):].unflatten(0, grid).movedim(-1, 0)
    return None


def grad_cam(score: Tensor, maps: Sequence[tuple[Tensor, _Reader]], size: Sequence[int]) -> np.ndarray:
    """Computes Grad-CAM (H, W) in [0, 1] of a class's score, at the last feature map, the one before pooling.

    If the head takes a class token only, the last map has no gradient, and the map before it is used.

    Source: `Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization` -
    https://arxiv.org/abs/1610.02391
    """
    for feature, read in reversed(maps):
        gradient, = torch.autograd.grad(score, feature, retain_graph=True, allow_unused=True, materialize_grads=True)
        gradient, feature = (read(t.detach().float()) for t in (gradient, feature))
        if gradient.any():
            break
    cam = (gradient.mean((1, 2), keepdim=True) * feature).sum(0).relu()
    cam = F.interpolate(cam[None, None], tuple(size), mode='bilinear')[0, 0]
    cam -= cam.min()
    return (cam / (cam.max() or 1)).cpu().numpy()
