"""The gates of Efficient Local Attention (ELA), drawn beside the picture that the model saw."""
import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm import create_model, is_model
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.data.loader import adapt_to_chs
from timm.models import get_arch_name, parse_model_name
from torch import Tensor, nn

from .layers.ela import EfficientLocalAttention

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

_LEAST_RANGE = 0.1  # of a scale: gates that vary less look flat
_MOVED = 0.01  # least change of a gate that the title does not call a fresh graft
_WIDTH = 3  # of a map, in inches


def figure_class() -> type['Figure']:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Plotting needs matplotlib: pip install matplotlib') from error
    return Figure


def _open_image(image: str | Path | Image.Image) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert('RGB')
    try:
        with Image.open(image) as opened:
            return opened.convert('RGB')
    except Exception as error:  # a broken file makes Pillow raise one of many types, often without naming the file
        raise ValueError(f'Cannot read the image {str(image)!r}: {error}') from error


class _Panel(NamedTuple):
    """What is drawn of one stage."""

    title: str
    gate: np.ndarray  # (H, W), a_h * a_w
    a_h: np.ndarray  # (H,)
    a_w: np.ndarray  # (W,)
    of: str  # 'mean over channels', or the channel
    moved: float  # greatest distance of a gate of any channel from a fresh graft's, 1/4
    where: str  # the channel and stage of that gate


def _arch(model: nn.Module) -> str:
    return getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)


def _stages(model: nn.Module, wanted: Sequence[int] | None = None) -> dict[int, str]:
    """Names the last ELA module of each stage, or of those wanted. Stage i ends at entry i of timm's `feature_info`.

    Raises:
        ValueError: If the model has no ELA module, or none in a stage that is wanted.
    """
    names = [name for name, _ in model.named_modules()]
    features = [info['module'] for info in getattr(model, 'feature_info', ())]
    ends = [max((i for i, n in enumerate(names) if f'{n}.'.startswith(f'{f}.')), default=len(names)) for f in features]
    ela = [(i, n) for i, (n, m) in enumerate(model.named_modules()) if isinstance(m, EfficientLocalAttention)]
    if not ela:
        raise ValueError(f"{_arch(model)} has no ELA module to plot: give an ELA model, such as 'resnet50_ela_b'.")
    stages = {sum(end < i for end in ends): n for i, n in ela}
    if unknown := [stage for stage in wanted or () if stage not in stages]:
        raise ValueError(f'{_arch(model)} has no ELA in stage {unknown[0]}, only in {", ".join(map(str, stages))}.')
    return {stage: stages[stage] for stage in wanted or stages}


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


def _make_panel(stage: int, gates: Sequence[np.ndarray], channel: int | None) -> _Panel:
    """Reduces the gates a_h (C, H) and a_w (C, W) of a stage to one channel, or to means over all."""
    a_h, a_w = gates
    channels, height, width = *a_h.shape, a_w.shape[1]
    if channel is not None and not 0 <= channel < channels:
        raise ValueError(f'Stage {stage} has channels 0 to {channels - 1}, got {channel}.')
    of = 'mean over channels' if channel is None else f'channel {channel}'
    ends = (a_h.max(1) * a_w.max(1), a_h.min(1) * a_w.min(1))  # greatest and smallest gate of each channel
    moved = np.maximum(*(abs(end - 0.25) for end in ends))
    picked = slice(None) if channel is None else slice(channel, channel + 1)
    a_h, a_w = a_h[picked], a_w[picked]
    gate = np.einsum('ch,cw->hw', a_h, a_w) / len(a_h)
    return _Panel(
        f'stage {stage}: {height} x {width}, {channels} channels\n'
        f'gate {gate.min():.3f} to {gate.max():.3f}, mean {gate.mean():.3f}',
        gate, a_h.mean(0), a_w.mean(0), of, float(moved.max()), f'channel {moved.argmax()} of stage {stage}')


def _limits(arrays: Iterable[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([a.ravel() for a in arrays])
    low, high = values.min(), values.max()
    margin = max(0., _LEAST_RANGE - (high - low)) / 2
    return low - margin, high + margin


def _in_words(panels: Sequence[_Panel]) -> str:
    """Says how far the gates have moved."""
    most = max(panels, key=lambda panel: panel.moved)
    if most.moved < _MOVED:
        return f'Gates within {max(most.moved, 0.0005):.3f} of a fresh graft (0.25): they have hardly moved.'
    return f'Single channels are up to {most.moved:.2f} from a fresh graft (0.25): {most.where}.'


def _draw_picture(figure: 'SubFigure', picture: np.ndarray, lines: Sequence[str]) -> None:
    """Draws the picture (H, W, 3) and, below it, its most probable classes."""
    above, below = figure.subplots(2, 1, height_ratios=(5, 1))
    above.imshow(picture, cmap='gray', vmin=0, vmax=1, aspect='auto')
    above.set_title(f'What the model saw\n{picture.shape[0]} x {picture.shape[1]} pixels', fontsize=9)
    above.set_axis_off()
    below.set_axis_off()
    below.text(0, 1, '\n'.join(lines), va='top', fontsize=8, parse_math=False)


def _draw_panel(figure: 'SubFigure', panel: _Panel, limits: tuple[float, float], of_strips: tuple[float, float]) -> Any:
    """Draws a stage's gate as a map, a_h along its left edge and a_w along its lower edge. Returns the map."""
    (left, ax), (corner, below) = figure.subplots(
        2, 2, width_ratios=(1, 5), height_ratios=(5, 1), gridspec_kw=dict(wspace=0.02, hspace=0.02))
    corner.set_axis_off()
    height, width = panel.gate.shape
    image = ax.imshow(panel.gate, vmin=limits[0], vmax=limits[1], aspect='auto', extent=(0, width, height, 0))
    ax.set_axis_off()
    ax.set_title(panel.title, fontsize=9)
    dotted = {'color': '0.6', 'linewidth': 0.8, 'linestyle': ':'}
    ticks = {'ticks': of_strips, 'labels': [f'{v:.2f}' for v in of_strips], 'fontsize': 7}

    left.axvline(0.5, **dotted)
    left.stairs(panel.a_h, np.arange(height + 1), orientation='horizontal', baseline=None)
    left.set(xlim=of_strips, ylim=(height, 0), yticks=[])
    left.set_ylabel(f'$a_h$, {panel.of}', fontsize=8)
    left.set_xticks(**ticks)

    below.axhline(0.5, **dotted)
    below.stairs(panel.a_w, np.arange(width + 1), baseline=None)
    below.set(xlim=(0, width), ylim=of_strips, xticks=[])
    below.set_xlabel(f'$a_w$, {panel.of}', fontsize=8)
    below.yaxis.tick_right()
    below.set_yticks(**ticks)
    return image


def _draw(
        arch: str,
        picture: np.ndarray,
        lines: Sequence[str],
        panels: Sequence[_Panel],
) -> 'Figure':
    """Draws the picture and all stages, on scales that the stages share."""
    cells = len(panels) + 1
    columns = cells if cells < 6 else -(-cells // 2)
    rows = -(-cells // columns)
    height = float(np.clip(_WIDTH * picture.shape[0] / picture.shape[1], 1.5, 6))
    size = (columns * _WIDTH * 1.5 + 1.5, rows * (height * 1.2 + 1) + 0.6)
    figure = figure_class()(figsize=size, layout='constrained')
    limits = _limits(panel.gate for panel in panels)
    of_strips = _limits([np.array([0.5]), *(a for panel in panels for a in (panel.a_h, panel.a_w))])

    body, bar = figure.subfigures(1, 2, width_ratios=(columns * _WIDTH * 1.5, 1.5))
    subfigures = body.subfigures(rows, columns, squeeze=False).flatten()
    _draw_picture(subfigures[0], picture, lines)
    for subfigure, panel in zip(subfigures[1:], panels, strict=False):
        image = _draw_panel(subfigure, panel, limits, of_strips)
    ax = bar.subplots()
    figure.colorbar(image, cax=ax)
    ax.set_box_aspect(12)
    ax.axhline(0.25, color='white', linewidth=2)
    ax.yaxis.set_label_position('left')
    ax.set_ylabel('gate $a_h a_w$ (white: fresh graft)', fontsize=8)

    figure.suptitle(f'{arch}: ELA gates, {panels[0].of}. {_in_words(panels)}', fontsize=10)
    return figure


def plot_attention(
        image: str | Path | Image.Image,
        model: nn.Module,
        stages: Sequence[int] | None = None,
        topk: int = 5,
        class_names: Sequence[str] | None = None,
        channel: int | None = None,
) -> 'Figure':
    """Draws the ELA gates of a model beside the picture that it saw, and its most probable classes.

    One panel per stage shows the stage's last ELA module: a_h * a_w as a map, a_h and a_w along its edges, on scales
    that all panels share. They are means over channels, or those of one channel. The title says how far the gates of
    all channels are from those of a fresh graft. The picture is what timm's evaluation transform makes of the image.
    The model is left as it was, in its mode and without hooks.

    Args:
        image: Path of an image file, or a PIL image.
        model: timm model with ELA modules.
        stages: Stages as timm counts features, from 0; by default all that have ELA.
        topk: Number of classes to show.
        class_names: One name per class; by default the checkpoint's, or ImageNet's for 1000 classes.
        channel: Channel to show, from 0; by default the mean over all.

    Returns:
        The figure, which is not registered with pyplot.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the image cannot be read, or the model has no ELA, no such stage or channel, or class_names has
            the wrong length.
    """
    figure_class()
    names = _stages(model, stages)
    classes = getattr(model, 'num_classes', 0)  # none in a model that gives features
    labels = _class_names(classes, getattr(model, 'pretrained_cfg', {}), class_names) if classes else []

    x, picture = _prepare(image, model)
    attention = [model.get_submodule(name) for name in names.values()]
    output, gates = _forward(model, x, attention)
    panels = [_make_panel(stage, gates[m], channel) for stage, m in zip(names, attention, strict=True)]
    return _draw(_arch(model), picture, _class_lines(output, labels, topk) if classes else [], panels)


def _prepare(image: str | Path | Image.Image, model: nn.Module) -> tuple[Tensor, np.ndarray]:
    """The model's input (C, H, W), and the picture (H, W, C) in it."""
    channels, config = getattr(model, 'in_chans', 3), resolve_model_data_config(model)
    stats = {k: adapt_to_chs(config[k], channels) for k in ('mean', 'std')}
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in stats.values())
    opened = _open_image(image)
    x = create_transform(**{**config, **stats})(opened.convert('L') if channels == 1 else opened)
    return x, (x * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def _class_lines(output: Tensor, labels: Sequence[str], topk: int) -> list[str]:
    """The most probable classes, a line each."""
    top = output[0].float().softmax(0).topk(min(topk, len(labels)))
    shown = [label if len(label) <= 40 else f'{label[:39]}…' for label in labels]
    return [f'{p:.1%}  {shown[c]}' for p, c in zip(top.values.tolist(), top.indices.tolist(), strict=True)]


def plot_file(
        image: str | Path,
        model_name: str,
        output: str | Path,
        stages: Sequence[int] | None = None,
        topk: int = 5,
        channel: int | None = None,
        pretrained: bool = True,
) -> None:
    """Writes what `plot_attention` draws for a model by name. Nothing is written unless everything worked.

    Args:
        image: Path of an image file.
        model_name: Model that timm knows, or a source: 'hf-hub:owner/name', 'local-dir:folder'.
        output: File to write; its suffix says the format.
        stages: Stages as timm counts features; by default all that have ELA.
        topk: Number of classes to show.
        channel: Channel to show; by default the mean over all.
        pretrained: Load pretrained weights; a source's are loaded in any case.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        OSError: If the output cannot be written.
        RuntimeError: If timm does not know the model or has no weights for it.
        ValueError: As in `plot_attention`, if the output's suffix is not an image format, or if model_name is a folder.
    """
    output = Path(output)
    kind, kinds = output.suffix[1:].lower() or 'png', figure_class()().canvas.get_supported_filetypes()
    if kind not in kinds:  # this and what follows: before a download
        raise ValueError(f'{str(output)!r}: format {kind!r} is not supported, only {", ".join(sorted(kinds))}.')
    if not output.parent.is_dir():
        raise FileNotFoundError(f'There is no folder {output.parent} to write {output.name} into.')
    opened = _open_image(image)
    source = parse_model_name(model_name)[0]
    if source is None and is_model(get_arch_name(model_name)):
        _stages(create_model(model_name, device='meta'), stages)  # raises for a model without ELA
    elif source is None and Path(model_name).is_dir():
        raise ValueError(f'{model_name!r} is a folder, not a model name: give local-dir:{model_name}.')
    model = create_model(model_name, pretrained=pretrained or source is not None)
    rendered = BytesIO()
    figure = plot_attention(opened, model, stages, topk, channel=channel)
    figure.savefig(rendered, format=kind, dpi=150)
    _write(output, rendered.getvalue())


def _write(path: Path, data: bytes) -> None:
    """Writes a file as a whole or not at all, where its folder lets it: a full disk leaves no half picture."""
    if path.exists() and not path.is_file():  # a pipe, such as /dev/stdout
        path.write_bytes(data)
        return
    path = path.resolve()
    partial = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EBUSY, errno.EPERM, errno.EROFS):
            raise
        path.write_bytes(data)  # a mount point, or a file of one's own in a folder of others
    finally:
        with suppress(OSError):
            partial.unlink()
