"""`plot_attention` and `timm-ela plot`: draws what `observe` returns, as a figure of matplotlib or as a file."""
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from timm import create_model, is_model
from torch import nn

from .observe import Gate, Observation, observe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

# every gate of a graft: a plain model's weights with untrained attention, see models/graft.py
_GRAFT = 0.25
# gates closer than this to _GRAFT count as untrained
_MOVED = 0.01
# the lightness of these colour maps rises evenly, so they work in grey and for the colour-blind
_GATES, _CAM = 'viridis', 'inferno'
_BLUE = '#4477aa'
_TITLE = {'loc': 'left', 'fontsize': 8, 'parse_math': False}


def in_words(gates: Sequence[Gate]) -> str:
    """Says how far the gates are from those of an untrained graft."""
    if not gates:
        return 'The model has no ELA, so no gates are drawn.'
    stage, moved = max(((gate.stage, abs(gate.all - _GRAFT).max((1, 2))) for gate in gates), key=lambda m: m[1].max())
    if moved.max() < _MOVED:
        return f'All gates are within {_MOVED} of an untrained graft ({_GRAFT}).'
    where = f'channel {moved.argmax()} of stage {stage}'
    return f'The gates differ from {_GRAFT} (untrained graft) by up to {moved.max():.2f}: {where}.'


def _cut(name: str, length: int) -> str:
    """Shortens a class name to `length` letters at most. ImageNet's names are lists of synonyms: the last go first."""
    while len(name) > length and ', ' in name:
        name = name.rpartition(', ')[0]
    return name if len(name) <= length else f'{name[:length - 1]}…'


def _add_strip(ax: 'Axes', inches: float, left: bool = False) -> 'Axes':
    """Adds axes of a thickness in inches along the lower edge of a panel, or along its left edge."""
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory

    corner = ax.figure.dpi_scale_trans + ScaledTranslation(0, 0, ax.transAxes)
    if left:
        return ax.inset_axes((-inches - 0.04, 0, inches, 1), transform=blended_transform_factory(corner, ax.transAxes))
    return ax.inset_axes((0, -inches - 0.04, 1, inches), transform=blended_transform_factory(ax.transAxes, corner))


def _draw_title(title: str, seen: Observation, ax: 'Axes') -> None:
    ax.set_title(title, y=0.45, pad=0, loc='left', fontsize=10, weight='bold', parse_math=False)
    ax.text(0, 0, in_words(seen.gates), fontsize=8)
    ax.set_axis_off()


def _draw_picture(seen: Observation, ax: 'Axes') -> None:
    height, width = seen.picture.shape[:2]
    ax.set_title(f'What the model saw\n{height} x {width} pixels', **_TITLE)
    ax.imshow(seen.picture, cmap='gray', vmin=0, vmax=1, aspect='auto')
    ax.set_axis_off()
    # without gates, the classes have a panel
    if seen.gates and seen.classes:
        _draw_classes(seen, 19, _add_strip(ax, 0.155 * len(seen.classes)))


def _draw_classes(seen: Observation, length: int, ax: 'Axes') -> None:
    """Draws a bar for each class, and on it its probability and name."""
    rows = range(len(seen.classes))
    ax.barh(rows, 1, height=0.85, color='0.95')
    ax.barh(rows, [p for p, _ in seen.classes], height=0.85, color='#a6c8e8')
    for i, (p, name) in enumerate(seen.classes):
        ax.text(0, i, f' {p:.1%}  {_cut(name, length)}', va='center', fontsize=8, parse_math=False, clip_on=True)
    ax.set(xlim=(0, 1), ylim=(len(seen.classes) - 0.5, -0.5))
    ax.set_axis_off()


def _draw_cam(seen: Observation, cam: np.ndarray, ax: 'Axes') -> None:
    """Draws Grad-CAM over the picture in grey, and its scale below."""
    ax.set_title(f'Grad-CAM: {"what" if cam.any() else "nothing"} speaks for\n{_cut(seen.cam_class, 22)}', **_TITLE)
    ax.imshow(seen.picture.mean(2), cmap='gray', vmin=0, vmax=1, aspect='auto')
    colors = ax.imshow(cam, cmap=_CAM, vmin=0, vmax=1, aspect='auto', alpha=0.3 + 0.4 * cam)
    ax.set_axis_off()
    bar = ax.figure.colorbar(colors, cax=_add_strip(ax, 0.1), orientation='horizontal')
    bar.set_ticks([0.1, 0.9], labels=['nothing', 'most'], fontsize=7)


def _draw_gate(gate: Gate, colors: 'ScalarMappable', ax: 'Axes') -> None:
    """Draws a gate as a map, a_h along its left edge and a_w along its lower edge."""
    values = f'{"varies most" if gate.varies_most else "gate"}: {gate.map.min():.3f} to {gate.map.max():.3f}'
    ax.set_title(f'stage {gate.stage}: {gate.shown}\n{values}', **_TITLE)
    ax.imshow(gate.map, cmap=colors.cmap, norm=colors.norm, aspect='auto')
    ax.set_axis_off()

    # both strips share a scale in tenths, and are filled from 0.5, the a_h and a_w of an untrained graft
    both = np.append(gate.a_h, gate.a_w)
    low, high = min(0.4, np.floor(10 * both.min()) / 10), max(0.6, np.ceil(10 * both.max()) / 10)
    fill = {'baseline': 0.5, 'fill': True, 'color': _BLUE}

    a_h = _add_strip(ax, 0.28, left=True)
    a_h.axvline(0.5, color='0.4', linewidth=0.8)
    a_h.stairs(gate.a_h, orientation='horizontal', **fill)
    a_h.set(xlim=(low, high), ylim=(len(gate.a_h), 0), xticks=[], yticks=[])
    a_h.set_ylabel(f'rows, $a_h$: {low:.1f} to {high:.1f}', fontsize=7)

    a_w = _add_strip(ax, 0.28)
    a_w.axhline(0.5, color='0.4', linewidth=0.8)
    a_w.stairs(gate.a_w, **fill)
    a_w.set(xlim=(0, len(gate.a_w)), ylim=(low, high), xticks=[], yticks=[])
    a_w.set_xlabel(f'columns, $a_w$: {low:.1f} to {high:.1f}', fontsize=7)


def _draw_all_gates(gates: Sequence[Gate], colors: 'ScalarMappable', ax: 'Axes') -> None:
    """Draws a histogram of all gates of each stage, one above the other, and the colours of the maps below."""
    ax.set_title(f'All gates, of all channels\ndashed: {_GRAFT}, untrained graft', **_TITLE)
    for i, gate in enumerate(gates):
        counts, edges = np.histogram(gate.all, 100, colors.get_clim())
        ax.stairs(i - 0.85 * counts / counts.max(), edges, baseline=i, fill=True, color=_BLUE)
        ax.hlines(i, gate.all.min(), gate.all.max(), color='black', linewidth=0.9)
    ax.axvline(_GRAFT, color='#cc3311', linewidth=1, linestyle='--')
    ax.set(xlim=colors.get_clim(), ylim=(len(gates) - 0.8, -1), xticks=[])
    ax.set_yticks(range(len(gates)), [f'stage {gate.stage}' for gate in gates], fontsize=7)
    bar = ax.figure.colorbar(colors, cax=_add_strip(ax, 0.12), orientation='horizontal')
    bar.ax.tick_params(labelsize=7)
    bar.set_label('gate = $a_h a_w$, the factor of a feature', fontsize=7)


def draw(seen: Sequence[Observation], titles: Sequence[str], columns: int = 4) -> 'Figure':
    """Draws observations one below the other, in rows of `columns` panels.

    All gates share a scale, from 0 to the greatest gate or to 0.5.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    colors = ScalarMappable(cmap=_GATES)
    colors.set_clim(0, max([0.5, *(gate.all.max() for one in seen for gate in one.gates)]))
    # rows of the functions that draw the panels, and the height of each row as a part of a panel's width
    mosaic: list[list[Callable[[Axes], None]]] = []
    heights: list[float] = []
    for one, title in zip(seen, titles, strict=True):
        # keep the end of a long path
        title = title if len(title) <= 25 * columns else f'…{title[1 - 25 * columns:]}'
        panels: list[Callable[[Axes], None]] = [partial(_draw_picture, one)]
        if one.cam is not None:
            panels.append(partial(_draw_cam, one, one.cam))
        panels += [partial(_draw_gate, gate, colors) for gate in one.gates]
        panels.append(partial(_draw_all_gates, one.gates, colors) if one.gates else partial(_draw_classes, one, 50))
        # the last panel takes what is left of its row
        panels += panels[-1:] * (-len(panels) % columns)
        rows = [panels[i:i + columns] for i in range(0, len(panels), columns)]
        mosaic += [[partial(_draw_title, title, one)] * columns, *rows]
        heights += [0.25] + [max(one.picture.shape[0] / one.picture.shape[1], 0.45)] * len(rows)

    figure = Figure((2.25 * columns, 10 * len(mosaic)), layout='constrained')
    layout = figure.get_layout_engine()
    layout.set(w_pad=0.06, h_pad=0.06, wspace=0, hspace=0)
    axes = figure.subplot_mosaic(mosaic, height_ratios=heights)
    for draw_panel, ax in axes.items():
        draw_panel(ax)
    # the layout fills the figure: choose the height at which the panels have the picture's ratio
    layout.execute(figure)
    width, height = axes[mosaic[1][0]].get_window_extent().size / figure.dpi
    figure.set_figheight(figure.get_figheight() + (width - height / heights[1]) * sum(heights))
    return figure


def plot_attention(
        image: str | Path | Image.Image,
        model: nn.Module | Sequence[nn.Module],
        stages: Sequence[int] | None = None,
        topk: int = 5,
        class_names: Sequence[str] | None = None,
        channel: int | None = None,
        *,
        mean: bool = False,
        class_index: int | None = None,
        titles: Sequence[str] | None = None,
) -> 'Figure':
    """Draws what a model makes of a picture: its most probable classes, Grad-CAM, and the gates of its ELA modules.

    The picture is what timm's evaluation transform makes of the image: grey, RGB or RGBA, as the model takes it.
    Grad-CAM shows which places speak for a class, at the last feature map that timm's `feature_info` names. One panel
    per stage shows the gate a_h * a_w of the stage's last ELA module as a map, with a_h and a_w along its edges. All
    maps share a scale, which starts at 0. The last panel is the distribution of the gates of all channels: all are 0.25
    in an untrained graft, which has a plain model's weights and an ELA that changes nothing. The model is left as it
    was.

    Args:
        image: Path of an image file, or a PIL image.
        model: timm model, with ELA modules or without; or several, drawn one below the other.
        stages: Stages to show, counted from 0 as timm's features; by default all with ELA.
        topk: Number of classes to show.
        class_names: One name per class; by default the checkpoint's, or ImageNet's for 1000 classes.
        channel: Channel to show in every stage, from 0; by default the one whose gate varies most over the picture.
        mean: Show the mean over all channels.
        class_index: Class of the Grad-CAM; by default the most probable.
        titles: Title of each model; by default its architecture.

    Returns:
        The figure, which is not registered with pyplot.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
        ValueError: If the model's channels are not those of a picture, if the model has neither classes nor ELA, or
            lacks the stage, channel or class, or if class_names or titles have the wrong length.
    """
    models = [model] if isinstance(model, nn.Module) else model
    if titles and len(titles) != len(models):
        raise ValueError(f'There are {len(models)} models, but {len(titles)} titles.')
    seen = [observe(image, one, stages, topk, class_names, channel, mean, class_index) for one in models]
    return draw(seen, titles or [one.model for one in seen])


def plot_file(
        image: str | Path,
        models: Sequence[str],
        output: str | Path,
        pretrained: bool = True,
        **options: Any,
) -> None:
    """Writes what `plot_attention`, with its options, draws for models by name. The file's suffix is its format.

    A model is a name of timm's, or a source whose weights are always loaded: 'hf-hub:owner/name' or 'local-dir:folder'.

    Raises:
        ValueError: As in `plot_attention`, if a model is a folder, or if matplotlib does not know the format.
    """
    # a file that is no image is refused before models are downloaded
    opened = Image.open(image)
    for name in models:
        # timm would take the last part of a path as a model's name
        if Path(name).is_dir() and not is_model(name):
            raise ValueError(f'{name!r} is a folder, not a model name: give local-dir:{name}.')
    made = [create_model(name, pretrained=pretrained or ':' in name) for name in models]
    figure = plot_attention(opened, made, titles=models, **options)
    figure.savefig(output, format=Path(output).suffix[1:] or 'png', dpi=150)
