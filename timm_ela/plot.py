"""The gates of Efficient Local Attention (ELA), drawn over the picture that the model saw."""
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from timm import create_model
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.data.loader import adapt_to_chs
from timm.models import parse_model_name
from torch import Tensor, nn

from .layers.ela import EfficientLocalAttention

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LEAST_RANGE = 0.1  # of a scale: gates that vary less are to look flat, as they are


def figure_class() -> type['Figure']:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("Plotting needs matplotlib: pip install 'timm-ela[plot]'") from error
    return Figure


def _open_image(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert('RGB')
    try:
        with Image.open(image) as opened:
            return opened.convert('RGB')
    except Exception as error:  # a broken file makes Pillow raise one of many types, often without naming the file
        raise ValueError(f'Cannot read the image {str(image)!r}: {error}') from error


def _stages(model: nn.Module) -> dict[int, str]:
    """Names the last ELA module of each stage, a stage being what leads to one entry of timm's `feature_info`."""
    names = [name for name, _ in model.named_modules()]
    features = [info['module'] for info in getattr(model, 'feature_info', ())]
    ends = [max((i for i, n in enumerate(names) if f'{n}.'.startswith(f'{f}.')), default=len(names)) for f in features]
    ela = [(i, n) for i, (n, m) in enumerate(model.named_modules()) if isinstance(m, EfficientLocalAttention)]
    return {sum(end < i for end in ends): n for i, n in ela}


def _forward(model: nn.Module, x: Tensor, attention: Iterable[nn.Module]) -> tuple[Any, dict]:
    """Gives the model's output for x (C, H, W) in eval mode, and (a_h, a_w) of each attention module."""
    gates = {}

    def keep(module: EfficientLocalAttention, args: tuple) -> None:
        gates[module] = [gate[0].float().cpu().numpy() for gate in module.gates(args[0])]

    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_pre_hook(keep) for module in attention]
    weight = next(model.parameters())
    try:
        with torch.inference_mode():
            return model.eval()(x.unsqueeze(0).to(weight.device, weight.dtype)), gates
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode


def _class_names(count: int, cfg: dict[str, Any], given: Sequence[str] | None) -> list[str]:
    if given is not None and len(given) != count:
        raise ValueError(f'The model has {count} classes, but {len(given)} class names were given.')
    names = given or cfg.get('label_names') or ()
    names = [names[k] for k in sorted(names, key=int)] if isinstance(names, dict) else list(names)
    if len(names) != count:  # a checkpoint's names are not those of a head put on since
        return ImageNetInfo().label_descriptions() if count == 1000 else [f'class {i}' for i in range(count)]
    descriptions = {} if given else cfg.get('label_descriptions') or {}
    return [descriptions.get(name, name) for name in names]


def _limits(arrays: Iterable[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([a.ravel() for a in arrays])
    low, high = values.min(), values.max()
    margin = max(0., _LEAST_RANGE - (high - low)) / 2
    return low - margin, high + margin


def _draw_strips(ax: 'Axes', a_h: np.ndarray, a_w: np.ndarray, limits: tuple[float, float]) -> None:
    """Draws a_h (H,) along the left edge of an image's axes and a_w (W,) along the lower one, over a dotted 0.5."""
    (_, width), (height, _) = ax.get_xlim(), ax.get_ylim()
    thick, gap = 0.17, 0.03  # in widths of the image
    dotted = {'color': '0.6', 'linewidth': 0.8, 'linestyle': ':'}
    ticks = {'ticks': limits, 'labels': [f'{v:.2f}' for v in limits], 'fontsize': 7}
    rows = ax.inset_axes((-thick - gap, 0, thick, 1), xlim=limits, ylim=(height, 0), yticks=[])
    rows.axvline(0.5, **dotted)
    rows.stairs(a_h, np.linspace(0, height, len(a_h) + 1), orientation='horizontal', baseline=None)
    rows.xaxis.tick_top()
    rows.set_xticks(**ticks)
    rows.set_ylabel('$a_h$', rotation=0, labelpad=8)
    thick, gap = thick * width / height, gap * width / height
    columns = ax.inset_axes((0, -thick - gap, 1, thick), xlim=(0, width), ylim=limits, xticks=[])
    columns.axhline(0.5, **dotted)
    columns.stairs(a_w, np.linspace(0, width, len(a_w) + 1), baseline=None)
    columns.yaxis.tick_right()
    columns.set_yticks(**ticks)
    columns.set_xlabel('$a_w$ (dotted: 0.5)', fontsize=9)


def plot_attention(
        image: str | Path | Image.Image,
        model: nn.Module,
        stages: Sequence[int] | None = None,
        topk: int = 5,
        class_names: Sequence[str] | None = None,
) -> 'Figure':
    """Draws the ELA gates of a model over the picture that it saw, and its most probable classes.

    One panel per stage shows the stage's last ELA module: the mean over channels of a_h * a_w over the picture, and the
    means of a_h and of a_w along its edges, on scales that all panels share. The picture is what timm's evaluation
    transform makes of the image. The model is left as it was, in its mode and without hooks.

    Args:
        image: Path of an image file, or a PIL image.
        model: timm model with ELA modules.
        stages: Stages as timm counts features, from 0; all that have ELA where none are given.
        topk: Number of classes to show.
        class_names: One name per class; otherwise the checkpoint's, or ImageNet's where there are 1000 classes.

    Returns:
        The figure, free of pyplot's state.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the image cannot be read, the model has no ELA, no such stage or another number of classes.
    """
    new_figure = figure_class()
    cfg, names = getattr(model, 'pretrained_cfg', {}), _stages(model)
    arch = cfg.get('architecture', type(model).__name__)
    if not names:
        raise ValueError(f"{arch} has no ELA module to plot: give an ELA model, such as 'resnet50_ela_b'.")
    stages = list(stages or names)
    if unknown := [stage for stage in stages if stage not in names]:
        raise ValueError(f'{arch} has no ELA in stage {unknown[0]}, only in {", ".join(map(str, names))}.')
    classes = getattr(model, 'num_classes', 0)  # none in a model that gives features
    labels = _class_names(classes, cfg, class_names) if classes else []

    channels, config = getattr(model, 'in_chans', 3), resolve_model_data_config(model)
    stats = {k: adapt_to_chs(config[k], channels) for k in ('mean', 'std')}
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in stats.values())
    opened = _open_image(image)
    x = create_transform(**{**config, **stats})(opened.convert('L') if channels == 1 else opened)
    attention = [model.get_submodule(names[stage]) for stage in stages]
    output, gates = _forward(model, x, attention)
    overlays = [np.einsum('ch,cw->hw', *gates[m]) / len(gates[m][0]) for m in attention]
    strips = [[gate.mean(0) for gate in gates[m]] for m in attention]
    (low, high), strip_limits = _limits(overlays), _limits([np.array([0.5]), *sum(strips, [])])

    _, height, width = x.shape
    extent = (0, width, height, 0)
    picture = {'X': (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(), 'cmap': 'gray', 'vmin': 0, 'vmax': 1}
    cells = len(stages) + 2  # the picture first, the classes last
    rows = 1 if cells < 4 else 2
    columns = -(-cells // rows)
    w, h = 3, 3 * height / width  # inches of an image; room for its strips and titles comes on top
    all_w, all_h = columns * (w + 1.2) + 1.2, rows * (h + 1.5)
    figure = new_figure(figsize=(all_w, all_h))
    figure.subplots_adjust(0.9 / all_w, 0.9 / all_h, 1 - 1.5 / all_w, 1 - 0.6 / all_h, 1.2 / w, 1.5 / h)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.set_axis_off()
    for ax in axes[:cells - 1]:
        ax.imshow(**picture, extent=extent)
    axes[0].set_title(f'{arch} saw {height}x{width}', fontsize=9)
    for ax, stage, overlay, strip in zip(axes[1:], stages, overlays, strips, strict=False):
        gate = ax.imshow(overlay, alpha=0.5, vmin=low, vmax=high, extent=extent, interpolation='nearest')
        ax.set_title(f'stage {stage}: {names[stage]}, {len(strip[0])}x{len(strip[1])}\n'
                     f'gate {overlay.min():.3f} to {overlay.max():.3f}', fontsize=9)
        _draw_strips(ax, strip[0], strip[1], strip_limits)
    bar = figure.colorbar(gate, cax=figure.add_axes((1 - 1.05 / all_w, 0.1, 0.2 / all_w, 0.8)))
    bar.set_label('gate: mean over channels of $a_h a_w$\n(fresh graft: 0.25)', fontsize=8)
    if classes:
        top = output[0].float().softmax(0).topk(min(topk, classes))
        axes[cells - 1].barh(range(len(top.indices)), top.values.tolist(), height=0.2)
        axes[cells - 1].set(xlim=(0, 1), ylim=(len(top.indices) - 0.5, -0.7))
        for i, (p, c) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            label = labels[c] if len(labels[c]) <= 40 else f'{labels[c]:.39}…'
            axes[cells - 1].text(0, i - 0.15, f'{p:.1%}  {label}', va='bottom', fontsize=9, parse_math=False)
    return figure


def plot_file(
        image: str | Path,
        model_name: str,
        output: str | Path,
        stages: Sequence[int] | None = None,
        topk: int = 5,
        pretrained: bool = True,
) -> None:
    """Writes what `plot_attention` draws for a model by name; nothing is written unless everything worked.

    Args:
        image: Path of an image file.
        model_name: Model that timm knows, or a source: 'hf-hub:owner/name', 'local-dir:folder'.
        output: File to write; its suffix says the format.
        stages: Stages as timm counts features; all that have ELA where none are given.
        topk: Number of classes to show.
        pretrained: Load pretrained weights; a source's are loaded in any case.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        OSError: If the output cannot be written.
        RuntimeError: If timm does not know the model or has no weights for it.
        ValueError: As in `plot_attention`, and if the output's suffix is no format.
    """
    figure_class()
    opened = _open_image(image)  # both before a download
    model = create_model(model_name, pretrained=pretrained or parse_model_name(model_name)[0] is not None)
    rendered = BytesIO()
    plot_attention(opened, model, stages, topk).savefig(rendered, format=Path(output).suffix[1:] or 'png', dpi=150)
    Path(output).write_bytes(rendered.getvalue())
