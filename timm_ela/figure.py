"""Draws what `observe` returns: the picture and its classes, Grad-CAM, the gates of Efficient Local Attention (ELA)."""
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .observe import Gate, Observation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# every gate of a graft: a plain model's weights with untrained attention, see models/graft.py
_GRAFT = 0.25
# closer gates count as those of an untrained graft
_MOVED = 0.01
# the lightness of these colour maps rises evenly, so they work in grey and for the colour-blind
_GATES, _CAM = 'viridis', 'inferno'
_BINS = 100
# in inches: a cell, the map in it, the strips at the map's left and lower edge, and the space above and below
_CELL, _MAP, _LEFT, _STRIP, _GAP = 2.25, 1.7, 0.47, 0.28, 0.04
_HEADER, _TITLE, _BELOW, _LINE, _END = 0.48, 0.4, 0.6, 0.155, 0.12


class _Box(NamedTuple):
    """Where axes are, in inches from the upper left corner of the figure."""

    left: float
    top: float
    width: float
    height: float

    def below(self, height: float) -> '_Box':
        return _Box(self.left, self.top + self.height + _GAP, self.width, height)

    def axes(self, figure: 'Figure', title: str = '', frame: bool = True) -> 'Axes':
        width, height = figure.get_size_inches()
        ax = figure.add_axes((
            self.left / width, 1 - (self.top + self.height) / height, self.width / width, self.height / height))
        ax.set_title(title, fontsize=8, loc='left', parse_math=False)
        if not frame:
            ax.set_axis_off()
        return ax


_Panel = Callable[['Figure', _Box], None]


def figure_class() -> type['Figure']:
    """Returns matplotlib's Figure. If matplotlib is not installed, the ModuleNotFoundError says how to install it."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('Plotting needs matplotlib: pip install matplotlib') from error
    return Figure


def _cut(name: str) -> str:
    """Shortens a name to what fits below a picture: ImageNet's names are lists of synonyms."""
    while len(name) > 22 and ', ' in name:
        name = name.rpartition(', ')[0]
    return name if len(name) <= 22 else f'{name[:21]}…'


def in_words(gates: Sequence[Gate]) -> str:
    """Says how far the gates are from those of an untrained graft."""
    if not gates:
        return 'The model has no ELA, so no gates are drawn.'
    stage, moved = max(((gate.stage, abs(gate.all - _GRAFT).max((1, 2))) for gate in gates), key=lambda m: m[1].max())
    if moved.max() < _MOVED:
        return f'Gates within {max(moved.max(), 0.0005):.3f} of an untrained graft ({_GRAFT}).'
    where = f'channel {moved.argmax()} of stage {stage}'
    return f'The gates differ from {_GRAFT} (untrained graft) by up to {moved.max():.2f}: {where}.'


def _draw_picture(seen: Observation, figure: 'Figure', box: _Box) -> None:
    height, width = seen.picture.shape[:2]
    ax = box.axes(figure, f'What the model saw\n{height} x {width} pixels', frame=False)
    ax.imshow(seen.picture, cmap='gray', vmin=0, vmax=1, aspect='auto')


def _draw_classes(seen: Observation, figure: 'Figure', box: _Box) -> None:
    """Draws a bar for each class, and on it its probability and name."""
    ax = box.axes(figure, frame=False)
    rows = range(len(seen.classes))
    ax.barh(rows, 1, height=0.85, color='0.95')
    ax.barh(rows, [p for p, _ in seen.classes], height=0.85, color='#a6c8e8')
    for i, (p, name) in enumerate(seen.classes):
        ax.text(0, i, f' {p:.1%}  {_cut(name)}', va='center', fontsize=8, parse_math=False)
    ax.set(xlim=(0, 1), ylim=(len(seen.classes) - 0.5, -0.5))


def _draw_cam(seen: Observation, cam: np.ndarray, figure: 'Figure', box: _Box) -> None:
    """Draws Grad-CAM over the picture in grey, and its scale below."""
    what = 'what' if cam.any() else 'nothing'
    ax = box.axes(figure, f'Grad-CAM: {what} speaks for\n{_cut(seen.cam_class)}', frame=False)
    ax.imshow(seen.picture.mean(2), cmap='gray', vmin=0, vmax=1, aspect='auto')
    ax.imshow(cam, cmap=_CAM, vmin=0, vmax=1, aspect='auto', alpha=0.3 + 0.4 * cam)
    bar = box.below(0.1).axes(figure)
    bar.imshow(np.linspace(0, 1, 256)[None], cmap=_CAM, aspect='auto', extent=(0, 1, 0, 1))
    bar.set_yticks([])
    bar.set_xticks([0.1, 0.9], ['nothing', 'most'], fontsize=7)


def _draw_gate(gate: Gate, limit: float, figure: 'Figure', box: _Box) -> None:
    """Draws a gate as a map, a_h along its left edge and a_w along its lower edge."""
    height, width = gate.map.shape
    low, high = gate.map.min(), gate.map.max()
    digits = 2 if high - low > 0.01 else 4
    values = f'{"varies most" if gate.varies_most else "gate"}: {low:.{digits}f} to {high:.{digits}f}'
    ax = box.axes(figure, f'stage {gate.stage}: {gate.of}\n{values}', frame=False)
    ax.imshow(gate.map, cmap=_GATES, vmin=0, vmax=limit, aspect='auto', extent=(0, width, height, 0))

    # both strips share a scale, in tenths or hundredths, filled from 0.5, the a_h and a_w of a fresh graft
    strips = np.array([0.5, *gate.a_h, *gate.a_w])
    parts = 10 if np.ptp(strips) > 0.02 else 100
    low, high = np.floor(parts * strips.min()) / parts, np.ceil(parts * strips.max()) / parts
    low, high = (0.4, 0.6) if low == high else (low, high)
    ticks = {'ticks': [low, high], 'labels': [f'{v:.2g}'.lstrip('0') or '0' for v in (low, high)], 'fontsize': 7}
    fill = {'baseline': 0.5, 'fill': True, 'color': '#4477aa'}
    line = {'color': '0.4', 'linewidth': 0.8}

    a_h = _Box(box.left - _STRIP - _GAP, box.top, _STRIP, box.height).axes(figure)
    a_h.axvline(0.5, **line)
    a_h.stairs(gate.a_h, np.arange(height + 1), orientation='horizontal', **fill)
    a_h.set(xlim=(low, high), ylim=(height, 0), yticks=[])
    a_h.set_ylabel('rows, $a_h$', fontsize=7, labelpad=2)
    a_h.xaxis.tick_top()
    a_h.set_xticks(**ticks)

    a_w = box.below(_STRIP).axes(figure)
    a_w.axhline(0.5, **line)
    a_w.stairs(gate.a_w, np.arange(width + 1), **fill)
    a_w.set(xlim=(0, width), ylim=(low, high), xticks=[])
    a_w.set_xlabel('columns, $a_w$', fontsize=7, labelpad=2)
    a_w.set_yticks(**ticks)
    # keep the labels inside the strips' lengths, where there is no other text
    for label, side in zip(a_h.get_xticklabels(), ('left', 'right'), strict=True):
        label.set_ha(side)
    for label, side in zip(a_w.get_yticklabels(), ('bottom', 'top'), strict=True):
        label.set_va(side)


def _draw_all_gates(gates: Sequence[Gate], limit: float, figure: 'Figure', box: _Box) -> None:
    """Draws a histogram of all gates of each stage, one above the other, and the colours of the maps below."""
    ax = box.axes(figure, f'All gates, of all channels\ndashed: {_GRAFT}, untrained graft')
    edges = np.linspace(0, limit, _BINS + 1)
    for i, gate in enumerate(gates):
        counts = np.histogram(gate.all, edges)[0]
        ax.stairs(i - 0.85 * counts / counts.max(), edges, baseline=i, fill=True, color='#4477aa')
        ax.hlines(i, gate.all.min(), gate.all.max(), color='black', linewidth=0.9)
    ax.axvline(_GRAFT, color='#cc3311', linewidth=1, linestyle='--')
    ax.set(xlim=(0, limit), ylim=(len(gates) - 0.8, -1), xticks=[])
    ax.set_yticks(range(len(gates)), [f'stage {gate.stage}' for gate in gates], fontsize=7)
    bar = box.below(0.12).axes(figure)
    bar.imshow(edges[None], cmap=_GATES, vmin=0, vmax=limit, aspect='auto', extent=(0, limit, 0, 1))
    bar.set_yticks([])
    bar.tick_params(labelsize=7)
    bar.set_xlabel('gate = $a_h a_w$, the factor of a feature', fontsize=7, labelpad=2)


def draw(seen: Sequence[Observation], titles: Sequence[str], columns: int = 4) -> 'Figure':
    """Draws observations one below the other. All gates share a scale, from 0 to the greatest gate or to 0.5.

    Args:
        seen: What `observe` returned.
        titles: A title for each.
        columns: Panels side by side; 2 if there are no gates.

    Returns:
        The figure, which is not registered with pyplot.
    """
    gates = [gate for one in seen for gate in one.gates]
    columns, limit = columns if gates else 2, max([0.5, *(float(gate.all.max()) for gate in gates)])
    headers: list[float] = []
    placed: list[tuple[_Panel, _Box]] = []
    top = 0.
    for one in seen:
        headers.append(top)
        panels: list[_Panel] = [partial(_draw_picture, one)]
        if one.cam is not None:
            panels.append(partial(_draw_cam, one, one.cam))
        panels += [partial(_draw_gate, gate, limit) for gate in one.gates]
        if one.gates:
            panels.append(partial(_draw_all_gates, one.gates, limit))
        height = min(max(_MAP * one.picture.shape[0] / one.picture.shape[1], 0.8), 2.6)
        classes, below = partial(_draw_classes, one), _BELOW
        top += _HEADER + _TITLE
        if columns > 2 and not one.gates:
            # in place of the gates
            panels.append(classes)
        elif one.classes:
            placed.append((classes, _Box(_LEFT, top + height + _GAP, _MAP, _LINE * len(one.classes))))
            below = max(_BELOW, _LINE * len(one.classes) + 0.1)
        for i, panel in enumerate(panels):
            if i and i % columns == 0:
                top, below = top + height + below + _TITLE, _BELOW
            left = i % columns * _CELL + _LEFT
            wide = i == len(panels) - 1 and columns > 2
            # at the figure's edge, the labels of its stages need more space than a strip
            left += 0.1 * (wide and i % columns == 0)
            placed.append((panel, _Box(left, top, columns * _CELL - left - 0.08 if wide else _MAP, height)))
        top += height + below + _END

    figure = figure_class()(figsize=(columns * _CELL, top))
    for one, title, header in zip(seen, titles, headers, strict=True):
        at = {'x': 0.1 / (columns * _CELL), 'va': 'top', 'parse_math': False}
        # the end of a path says most
        title = title if len(title) <= 25 * columns else f'…{title[1 - 25 * columns:]}'
        figure.text(y=1 - (header + 0.08) / top, s=title, fontsize=10, weight='bold', **at)
        figure.text(y=1 - (header + 0.26) / top, s=in_words(one.gates), fontsize=8, **at)
    for draw_panel, box in placed:
        draw_panel(figure, box)
    return figure
