"""Makes the page and the picture of a study from its table, one row a run."""
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from timm_ela import ATTN_LAYERS

TITLES = {'plain': 'none', **{name: layer.title for name, layer in ATTN_LAYERS.items()},
          'ela_b_neutral': 'ELA-B from its neutral point'}
# of Okabe and Ito, told apart by the colour-blind
COLORS = {'plain': '#555555', 'ela': '#0072b2', 'other': '#e69f00'}
LEVEL = 0.05
STUDIES = {
    'finetune': """\
# Attention layers fine-tuned on {data}

All arms of a seed start from the same function, up to rounding: ImageNet weights of EfficientNet-Lite0, grafted, and
one head. Seeds differ in the head, the layers' random weights, the order and the augmentation, not in the images.
""",
    'scratch': """\
# Attention layers trained from scratch on {data}

All arms of a seed start from the same random weights of MobileNetV2 0.5. The layers start as published. "From its
neutral point" is a graft: every gate of ELA is 1/4 at first (the weight of its GroupNorm is 0), and the model computes
what the plain one does. Seeds differ in the weights, the order and the augmentation, not in the images. The learning
rate is high, since it is the plain model's best; a layer that loses here may want a lower one.
""",
}
INTRO = """\
Every row of [{name}.csv]({name}.csv) is one run of timm's `train.py`, by `make study`.
All arms of a seed see the same images in the same order: [paired_train.py](paired_train.py) starts `train.py` and seeds
its loader anew at each epoch. The number is the top-1 accuracy of the final epoch on the test split, in percent.

- {train_images} training images, {test_images} test images, epochs: {epochs}, {img_size} px.
- One recipe for all, chosen on the plain model: `{recipe}`.
- {hardware}, device {device}; Python {python}, torch {torch}, timm {timm}, timm_ela {timm_ela}; SHA-256 of train.py:
  {train_py}.
- Difference: paired by seed, with its uncorrected 95 % interval (Student's t). p: paired t-test, corrected by Holm for
  the number of arms. {power}
- Minutes: forward and backward of a run's images on all cores, without loading them, from the images a second that were
  measured with all arms in turn in one process (medians). A few percent are noise; [speed.md](speed.md) has ratios with
  quartiles, at 224 px.
"""
POWER = """\
With {n} seeds and {arms} arms, the mean difference must exceed {ratio:.1f} standard deviations of the
  differences for the smallest corrected p to be below {level}. A difference that is not significant is no evidence that
  there is none."""


def holm(p: pd.Series) -> pd.Series:
    """Holm's correction of p-values for their number."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def compare(table: pd.DataFrame, base: str = 'plain') -> pd.DataFrame:
    """One line for each arm: n, mean and deviation, the paired difference to the base, parameters and minutes."""
    by_seed = table.pivot(index='seed', columns='arm', values='top1')[list(table.arm.unique())]
    differences = by_seed.sub(by_seed[base], axis=0).drop(columns=base)
    # a single seed has no spread: its interval and its p are NaN
    with np.errstate(all='ignore'):
        test = stats.ttest_1samp(differences, 0)
        low, high = test.confidence_interval(1 - LEVEL)
    paired = pd.DataFrame(
        {'difference': differences.mean(), 'low': low, 'high': high, 'p': test.pvalue}, differences.columns)
    # few images can give all seeds the same difference, which has no spread either
    paired['p'] = paired.p.where(differences.std() > 1e-9)
    lines = by_seed.agg(['count', 'mean', 'std']).T.join(paired.assign(p=holm(paired.p)))
    minutes = table.train_images * table.epochs / table.train_images_per_second / 60
    return lines.join(table.assign(minutes=minutes).groupby('arm')[['params', 'minutes']].first())


def p_value(p: float) -> str:
    return '< 0.001' if p < 0.001 else f'{p:.3f}'


def power(lines: pd.DataFrame) -> str:
    """How large a difference must be to be significant."""
    n, arms = int(lines['count'].max()), int(lines.p.count())
    if not arms:
        return 'There are too few seeds for a test.'
    least = stats.t.ppf(1 - LEVEL / arms / 2, n - 1) / n ** 0.5
    return POWER.format(n=n, arms=arms, ratio=least, level=LEVEL)


def verdict(table: pd.DataFrame, lines: pd.DataFrame) -> str:
    """Which arms differ from plain, and what a start from the neutral point gains. It claims no more than the tests."""
    if lines.p.isna().all():
        return ''
    text = f'No difference to the plain model is significant at the level {LEVEL}, corrected: the table ranks no layer.'
    shown = [f'{TITLES[arm]} {line.difference:+.2f} points (p {p_value(line.p)})'
             for arm, line in lines[lines.p < LEVEL].iterrows()]
    if shown:
        text = (f'Different from the plain model at the level {LEVEL}, corrected: {", ".join(shown)}. The other '
                'differences are not significant.')
    if 'ela_b_neutral' in lines.index:
        line = compare(table, 'ela_b').loc['ela_b_neutral']
        text += (f'\n\n{TITLES["ela_b_neutral"]} less ELA-B as published, paired by seed: {line.difference:+.2f} '
                 f'points, with an uncorrected 95 % interval of [{line.low:+.2f}, {line.high:+.2f}].')
    return text


def cells(arm: str, line: pd.Series) -> list[str]:
    """The cells of an arm's line."""
    deviation = f' ± {line["std"]:.2f}' if line['count'] > 1 else ''
    tested = ['', '']
    if pd.notna(line.p):
        tested = [f'{line.difference:+.2f} [{line.low:+.2f}, {line.high:+.2f}]', p_value(line.p)]
    return [TITLES[arm], f'{line["count"]:.0f}', f'{line["mean"]:.2f}{deviation}', *tested, f'{line.params:,.0f}',
            f'{line.minutes:.1f}']


def markdown(rows: list[list[str]]) -> str:
    """A table, whose second row says how the columns are aligned."""
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def page(table: pd.DataFrame, name: str) -> str:
    """The page of a study, from its table. `name` is <data>.<study>, such as cifar10.finetune."""
    lines, (data, _, study) = compare(table), name.rpartition('.')
    header = ['attention', 'n', 'top-1 (%)', 'against plain [95 %]', 'p', 'parameters', 'minutes']
    values = {column: ', '.join(map(str, table[column].unique())) for column in table}
    parts = [
        STUDIES[study].format(data=data),
        INTRO.format(name=name, power=power(lines), **values),
        markdown([header, ['---', *['---:'] * 6], *(cells(arm, line) for arm, line in lines.iterrows())]),
        verdict(table, lines),
        f'![Top-1 beside the plain model\'s, parameters and minutes]({name}.png)']
    if table.epochs.max() > 1:
        parts.append(f'![Top-1 by epoch and by time, means and ranges over the seeds]({name}.curves.png)')
    return '\n\n'.join(part.strip() for part in parts if part) + '\n'


def draw(table: pd.DataFrame, path: Path) -> None:
    """Each arm's top-1 beside the plain model's, seed by seed and with the interval of the mean; its size and speed."""
    lines = compare(table)[::-1]
    top1 = table.pivot(index='seed', columns='arm', values='top1')
    figure = Figure(figsize=(11, 1.2 + 0.28 * len(lines)), layout='constrained')
    paired, params, minutes = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    paired.axvline(0, color=COLORS['plain'])
    for y, (arm, line) in enumerate(lines.iterrows()):
        color = COLORS['plain' if arm == 'plain' else 'ela' if arm.startswith('ela') else 'other']
        params.plot(line.params / 1e6, y, 'o', color=color)
        minutes.plot(line.minutes, y, 'o', color=color)
        if arm != 'plain':
            paired.plot(top1[arm] - top1['plain'], [y] * len(top1), 'o', color=color, alpha=0.4, markersize=4)
            paired.hlines(y, line.low, line.high, color=color)
            paired.plot(line.difference, y, 'D', color=color)
    paired.set_yticks(range(len(lines)), [TITLES[arm] for arm in lines.index])
    paired.set_title('dots: seeds; diamond: mean, with its 95 % interval', fontsize=9)
    titles = {paired: "top-1 less the plain model's (points)", params: 'parameters (millions)',
              minutes: 'minutes of training'}
    for ax, title in titles.items():
        ax.set_xlabel(title)
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_curves(table: pd.DataFrame, path: Path) -> None:
    """Top-1 of each arm after each epoch, over epochs and over minutes of training: means and ranges of the seeds."""
    lines = compare(table)
    curves = table.set_index('arm').top1_by_epoch.str.split(expand=True).astype(float).groupby(level='arm')
    figure = Figure(figsize=(11, 4.5), layout='constrained')
    by_epoch, by_minute = figure.subplots(1, 2, sharey=True)
    epochs = np.arange(1, table.epochs.max() + 1)
    for i, (arm, line) in enumerate(lines.iterrows()):
        mean, low, high = (of_arm.loc[arm] for of_arm in (curves.mean(), curves.min(), curves.max()))
        for ax, x in ((by_epoch, epochs), (by_minute, epochs / len(epochs) * line.minutes)):
            ax.plot(x, mean, color=f'C{i}', marker='.', label=TITLES[arm])
            ax.fill_between(x, low, high, color=f'C{i}', alpha=0.2)
    by_epoch.legend()
    by_epoch.set(xlabel='epoch', ylabel='top-1 (%)')
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    by_minute.set(xlabel='minutes of training')
    for ax in (by_epoch, by_minute):
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def write_report(table: pd.DataFrame, path: Path) -> None:
    """Writes `<name>.csv`, and from it `<name>.md` and `<name>.png`."""
    table.to_csv(path, index=False, lineterminator='\n')
    table = pd.read_csv(path)
    draw(table, path.with_suffix('.png'))
    if table.epochs.max() > 1:
        draw_curves(table, path.with_suffix('.curves.png'))
    path.with_suffix('.md').write_text(page(table, path.stem), encoding='utf-8')
