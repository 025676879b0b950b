"""What `timm_ela.bench` measured, as tables and as a picture."""
import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from .plot import figure_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REFERENCE = 'timm ela'
_MODES = {'inference': 'forward', 'training': 'forward + backward'}  # what a layer does in each
_COLOURS = {'inference': '#0072B2', 'training': '#E69F00'}  # all eyes tell them apart


def _number(value: float) -> str:
    return f'{value:.0f}' if value >= 100 else f'{value:#.3g}'


def _time(row: dict[str, Any], mode: str) -> str:
    ms, low, high = (row[f'{mode}_{key}'] for key in ('ms', 'q25_ms', 'q75_ms'))
    return f'{_number(ms)} ({(high - low) / ms:.0%})'


def _shape(row: dict[str, Any]) -> str:
    return 'x'.join(map(str, row['shape']))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        ' | '.join(f'{cell:{"<" if i < text_columns else ">"}{width}}'
                   for i, (cell, width) in enumerate(zip(cells, widths, strict=True)))
        for cells in (header, *rows)]
    rule = ' | '.join('-' * width if i < text_columns else f'{"-" * (width - 1)}:' for i, width in enumerate(widths))
    return '\n'.join(f'| {line} |' for line in (lines[0], rule, *lines[1:]))


def _references(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each row the one that it is compared with: timm's ELA at its shape, or its plain model."""
    by_shape = {_shape(row): row for row in rows if row.get('layer') == REFERENCE}
    by_name = {row['model']: row for row in rows if 'model' in row}
    return [by_name[row['plain']] if 'model' in row else by_shape[_shape(row)] for row in rows]


def layers_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row for each layer and shape, each time with its interquartile range."""
    header = ['C x H x W', 'layer']
    for mode in _MODES.values():
        header += [f'{mode} ms (IQR)', '/ timm ela', '/ floor', 'peak MiB']
    cells = []
    for row, reference in zip(rows, _references(rows), strict=True):
        cells.append([_shape(row), row['layer']])
        for mode in _MODES:
            ms = row[f'{mode}_ms']
            cells[-1] += [
                _time(row, mode), f'{ms / reference[f"{mode}_ms"]:.2f}',
                f'{ms / row[f"{mode}_floor_ms"]:.2f}', _number(row[f'{mode}_peak_mib'])]
    return _table(header, cells, text_columns=2)


def models_table(rows: Sequence[dict[str, Any]]) -> str:
    """One row for each model, below its plain one."""
    header = ['model']
    for mode in _MODES:
        header += [f'{mode} ms (IQR)', 'images/s', 'time / plain', 'peak MiB']
    cells = []
    for row, reference in zip(rows, _references(rows), strict=True):
        cells.append([row['model']])
        for mode in _MODES:
            ms = row[f'{mode}_ms']
            cells[-1] += [
                _time(row, mode), _number(row[f'{mode}_images_per_s']),
                f'{ms / reference[f"{mode}_ms"]:.2f}', _number(row[f'{mode}_peak_mib'])]
    return _table(header, cells, text_columns=1)


def setting_line(result: dict[str, Any]) -> str:
    """Hardware, versions and setting of a run."""
    copies = [v for row in result['layers'] for k, v in row.items() if k.endswith('copy_gb_per_s')]
    return ', '.join([
        result['hardware'],
        f'{result["threads"]} thread{"s" * (result["threads"] > 1)}',
        f'Python {result["python"]}',
        *(f'{name} {result[name]}' for name in ('torch', 'timm', 'timm_ela')),
        f'{result["dtype"]}{" autocast" * result["autocast"]}',
        result['memory_format'],
        'compiled' if result['compiled'] else 'eager',
        f'TIMM_ELA_FUSED={result["timm_ela_fused"]}',
        f'batch {result["batch_size"]}',
        *([f'models at {result["img_size"]} px'] if result['models'] else []),
        f'medians of {result["repeats"]}',
        *([f'copies at {_number(min(copies))} to {_number(max(copies))} GB/s'] if copies else []),
    ])


def report(result: dict[str, Any]) -> str:
    """The run as Markdown."""
    parts = [setting_line(result) + ':', f'    {result["command"]}']
    if result['layers']:
        parts.append(layers_table(result['layers']))
    if result['models']:
        parts.append(models_table(result['models']))
    return '\n\n'.join(parts)


def _draw_bars(ax: 'Axes', rows: Sequence[dict[str, Any]], units: Sequence[dict[str, float]]) -> None:
    """Draws a bar for each row and mode: its time over that of the same mode in units."""
    ends = []
    for offset, (mode, does) in zip((-0.2, 0.2), _MODES.items(), strict=True):
        low, mid, high = (
            [row[f'{mode}_{key}'] / unit[mode] for row, unit in zip(rows, units, strict=True)]
            for key in ('q25_ms', 'ms', 'q75_ms'))
        places = [i + offset for i in range(len(rows))]
        ax.barh(places, mid, 0.38, color=_COLOURS[mode], label=f'{does} ({mode})')
        ax.hlines(places, low, high, color='0.2')
        for place, ratio, end in zip(places, mid, high, strict=True):
            ax.annotate(_number(ratio), (end, place), (3, 0), textcoords='offset points', va='center', fontsize=7)
        ends += high
    ax.axvline(1, color='0.2', linewidth=0.8, linestyle=':')
    ax.set(xlim=(0, 1.15 * max(ends)), ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), [row.get('layer') or row['model'] for row in rows])
    ax.tick_params(labelsize=8)


def plot_report(result: dict[str, Any]) -> 'Figure':
    """A panel for each shape, of times over the floor, and one for the models, of times over those of the plain ones.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    panels = []
    for shape in dict.fromkeys(map(_shape, result['layers'])):
        rows = [row for row in result['layers'] if _shape(row) == shape]
        floors = [{mode: row[f'{mode}_floor_ms'] for mode in _MODES} for row in rows]
        panels.append((f'layers, input {result["batch_size"]}x{shape}', 'time / floor', rows, floors))
    pairs = zip(result['models'], _references(result['models']), strict=True)
    if ours := [(row, plain) for row, plain in pairs if row is not plain]:
        plains = [{mode: plain[f'{mode}_ms'] for mode in _MODES} for _, plain in ours]
        title = 'models, input {batch_size}x3x{img_size}x{img_size}'.format(**result)
        panels.append((title, 'time / plain model', [row for row, _ in ours], plains))

    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = figure_class()(figsize=(4.4 * columns, 3.4 * lines + 1), layout='constrained')
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    for ax, (title, label, rows, units) in zip(axes, panels, strict=False):
        _draw_bars(ax, rows, units)
        ax.set_title(title, fontsize=9)
        ax.set_xlabel(label, fontsize=8)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=8, title_fontsize=8,
        title='dotted: floor, or plain model; lines: quartiles')
    figure.suptitle('\n'.join(wrap(setting_line(result), 50 * columns)), fontsize=8)
    return figure


def check_outputs(json_file: str | None, plot_file: str | None) -> None:
    """What would keep the results from being written, before hours are spent on them.

    Raises:
        ModuleNotFoundError: If a picture is to be drawn and matplotlib is not installed.
        OSError: If a file cannot be written.
        ValueError: If the picture's suffix is no format.
    """
    if plot_file:
        formats = figure_class()().canvas.get_supported_filetypes()
        if Path(plot_file).suffix[1:].lower() not in formats:
            raise ValueError(f'{plot_file!r} is no picture: its name must end in one of {", ".join(sorted(formats))}.')
    for file in filter(None, (json_file, plot_file)):
        path = Path(file)
        if path.is_dir():
            raise IsADirectoryError(f'{file!r} is a folder, not a file to write.')
        if not path.parent.is_dir():
            raise FileNotFoundError(f'There is no folder {str(path.parent)!r} to write {path.name!r} in.')
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PermissionError(f'{file!r} cannot be written.')


def write_outputs(result: dict[str, Any], json_file: str | None, plot_file: str | None) -> None:
    """Writes the files that are asked for, the picture only once it is drawn."""
    if json_file:
        Path(json_file).write_text(json.dumps(result, indent=2) + '\n')
    if plot_file:
        drawn = BytesIO()
        plot_report(result).savefig(drawn, format=Path(plot_file).suffix[1:].lower(), dpi=150)
        Path(plot_file).write_bytes(drawn.getvalue())
