"""Makes the page and the pictures of a study from its table, one row a run; what was not run is an empty cell."""
import csv
import math
from io import StringIO
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t

from timm_ela.layers import ATTN_LAYERS

ARMS = ('plain', 'se', 'cbam', 'eca', 'ca', 'ela_t', 'ela_b', 'ela_s', 'ela_l')
TITLES = {'plain': 'none', **{name: layer.title for name, layer in ATTN_LAYERS.items()}}
COLORS = {'plain': '#555555', 'ela': '#0072b2', 'other': '#e69f00'}  # Okabe and Ito: told apart by all readers
SCRATCH = 'scratch'
SETTING = (
    '{train_images} training images, {test_images} test images, {epochs} epochs, {img_size} px, seeds {seed}.',
    'One recipe for all: `{recipe}`.',
    'The same seed draws other batches for another model: timm shuffles by the generator that the weights were drawn '
    'from. Pairs by seed are pairs in name, and over a few seeds an interval is wide.',
    '{hardware}, device {device}, {threads} thread a run, {parallel_runs} runs at a time; Python {python}, '
    'torch {torch}, timm {timm}, timm_ela {timm_ela}; SHA-256 of train.py: {train_py}...',
    'Training images/s: forward and backward at the recipe\'s batch and image size with 1000 classes, all models in '
    'turn in one run of `timm-ela bench` with all cores; to be compared within a table.',
)
VERSIONS = ('python', 'torch', 'timm', 'timm_ela', 'train_py')
PICTURES = (  # column, label of the axis, text in the picture's place
    ('params', 'parameters', 'Accuracy against parameters'),
    ('train_images_per_second', 'training images per second', 'Accuracy against training speed'),
)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def of(rows: list[dict[str, str]], **values: str) -> list[dict[str, str]]:
    return [row for row in rows if all(row[k] == v for k, v in values.items())]


def top1(rows: list[dict[str, str]]) -> dict[str, float]:
    """Final epoch's accuracy by seed."""
    return {row['seed']: float(row['top1']) for row in rows}


def spread(values: list[float]) -> str:
    """Mean and standard deviation, one decimal more than a percent of accuracy deserves."""
    if not values:
        return ''
    return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')


def paired(arm: dict[str, float], plain: dict[str, float]) -> tuple[float, float] | None:
    """Mean of the differences seed by seed, and half the width of its 95 % interval (Student's t)."""
    differences = [arm[seed] - plain[seed] for seed in arm if seed in plain]
    if len(differences) < 2:
        return None
    n = len(differences)
    return mean(differences), float(t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)


def interval(difference: tuple[float, float] | None) -> str:
    if difference is None:
        return ''
    middle, half = difference
    return f'{middle:+.2f} [{middle - half:+.2f}, {middle + half:+.2f}]'


def verdict(title: str, difference: tuple[float, float], other: str = 'the plain model') -> str:
    """One sentence that claims no more than the interval does."""
    middle, half = difference
    where = f'{abs(middle):.2f} points {"above" if middle > 0 else "below"} {other}'
    if abs(middle) <= half:
        return f'{title} is {where}, and its interval holds zero: no difference is shown.'
    return f'{title} is {where}, and its interval does not hold zero.'


def line(rows: list[dict[str, str]], title: str, plain: dict[str, float] | None) -> str:
    """One row of a table of arms."""
    if not rows:
        return f'| {title} | | | | | | | |'
    first, values = rows[0], top1(rows)
    difference = '' if plain is None else interval(paired(values, plain))
    best = spread([float(row['best_top1']) for row in rows])
    speed = first['train_images_per_second']
    return (f'| {title} | {len(rows)} | {spread(list(values.values()))} | {difference} | {best} '
            f'| {int(first["params"]):,} | {int(first["macs"]):,} | {speed} |')


HEADER = ('| attention | n | top-1 (%) | against plain, paired [95 %] | best epoch | parameters | multiply-adds '
          '| training images/s |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |')


def tables(rows: list[dict[str, str]], backbone: str) -> list[str]:
    """The grid of one backbone, what it says, and the runs that began from a plain model."""
    here = of(rows, backbone=backbone)
    plain = top1(of(here, attention='plain'))
    parts = [f'## {backbone}']
    lines, sentences = [], []
    for arm in ARMS:
        runs = of(here, attention=arm, start=SCRATCH)
        lines.append(line(runs, TITLES[arm], None if arm == 'plain' else plain))
        if arm != 'plain' and (difference := paired(top1(runs), plain)):
            sentences.append(verdict(TITLES[arm], difference))
    parts += ['\n'.join([HEADER, *lines]), '\n'.join(f'- {sentence}' for sentence in sentences)]
    grafts = [row for row in here if row['start'] != SCRATCH]
    if grafts:
        arm = grafts[0]['attention']
        scratch = of(here, attention=arm, start=SCRATCH)
        title = f'{TITLES[arm]} from {grafts[0]["start"]}'
        lines = [line(of(here, attention='plain'), 'none', None), line(scratch, f'{TITLES[arm]} from scratch', plain),
                 line(grafts, title, plain)]
        sentences = [
            f'- {verdict(title, difference, other)}'
            for values, other in ((plain, 'the plain model'), (top1(scratch), 'the one from scratch'))
            if (difference := paired(top1(grafts), values))]
        parts += [
            '### From a graft',
            'The plain model\'s weights after half of the schedule, grafted by `timm-ela convert`, then the second '
            'half with a fresh optimizer, and the head as it is. All rows have the same number of epochs.',
            '\n'.join([HEADER, *lines]), '\n'.join(sentences)]
    return [part for part in parts if part]


def pictures(rows: list[dict[str, str]], name: str, backbone: str) -> list[tuple[str, str, str, str]]:
    """Column, label, alternative text and file of the pictures there are: one arm alone is none."""
    return [(column, label, alt, f'{name}.{backbone}.{column}.png') for column, label, alt in PICTURES
            if len({row['attention'] for row in of(rows, backbone=backbone, start=SCRATCH) if row[column]}) > 1]


def draw(rows: list[dict[str, str]], backbone: str, column: str, label: str, path: Path) -> None:
    """Accuracy against a column of the table: means over the seeds, and their standard deviation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout='constrained')
    axes = figure.add_subplot()
    for arm, marker in zip(ARMS, 'osP^vDX<>', strict=True):
        runs = of(rows, backbone=backbone, attention=arm, start=SCRATCH)
        if not runs or not runs[0][column]:
            continue
        values = [float(row['top1']) for row in runs]
        color = COLORS['plain' if arm == 'plain' else 'ela' if arm.startswith('ela') else 'other']
        x = float(runs[0][column])
        name = 'plain' if arm == 'plain' else arm.upper().replace('_', '-')
        axes.errorbar(
            x, mean(values), stdev(values) if len(values) > 1 else None, fmt=marker, capsize=4, color=color,
            label=f'{name} (n = {len(values)})')
    axes.set(xlabel=label, ylabel='top-1 of the final epoch (%)',
             title=f'{backbone}: mean and standard deviation over seeds')
    axes.margins(0.1)
    figure.legend(loc='outside right center')
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def page(rows: list[dict[str, str]], name: str) -> str:
    """The page of a study, all of it read from the table."""
    backbones = list(dict.fromkeys(row['backbone'] for row in rows))
    scratch = of(rows, start=SCRATCH)
    value = {column: ', '.join(dict.fromkeys(row[column] for row in scratch)) for column in rows[0]}
    parts = [
        f'# Attention layers on {name}',
        f'Every row of [{name}.csv]({name}.csv) is one run of timm\'s unmodified `train.py` and `validate.py`, by '
        '`make study`. The number is the top-1 accuracy of the **final** epoch on the test split, in percent; the best '
        'epoch stands beside it only to be looked at. Cells are empty where nothing was run.',
        '\n'.join(f'- {text.format(**value)}' for text in SETTING),
    ]
    for backbone in backbones:
        parts += tables(rows, backbone)
        parts += [f'![{alt}]({picture})' for *_, alt, picture in pictures(rows, name, backbone)]
    return '\n\n'.join(part for part in parts if part) + '\n'


def check_one_study(rows: list[dict[str, object]]) -> None:
    """Raises ValueError where rows that would be compared were made otherwise."""
    by_start = [[row for row in rows if row['start'] == start] for start in dict.fromkeys(row['start'] for row in rows)]
    made = ('epochs', 'train_images', 'test_images', 'img_size', 'device', 'hardware', *VERSIONS)
    for column, group in [*((column, rows) for column in made), *(('recipe', group) for group in by_start)]:
        values = {str(row.get(column)) for row in group}
        if len(values) > 1:
            raise ValueError(f'{column} is {" in some runs, ".join(sorted(values))} in others')


def write_report(path: Path, rows: list[dict[str, object]]) -> None:
    """Writes the table `<name>.csv`, and from it `<name>.md` and its pictures."""
    folder, name, text = path.parent, path.stem, StringIO(newline='')
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: (row['backbone'], row['start'] != SCRATCH, int(row['seed']),
                                         ARMS.index(row['attention'])))
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(text.getvalue())
    table = read(path)
    for backbone in dict.fromkeys(row['backbone'] for row in table):
        for column, label, _, picture in pictures(table, name, backbone):
            draw(table, backbone, column, label, folder / picture)
    (folder / f'{name}.md').write_text(page(table, name))
