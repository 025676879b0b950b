"""Measures how far training moved the gates of a study's ELA models from 1/4, where a graft starts, and what they add.

    python weights_cards/studies/gates.py DATA output/study/DATA.scratch.csv

Reads the table and the runs of study.py. Writes `<table>.gates.csv`, one row for each run and stage, and from it
`<table>.gates.md`.
"""
import argparse
import copy
from collections import defaultdict
from functools import partial
from pathlib import Path

import pandas as pd
import timm
import torch
import yaml
from report import TITLES, markdown
from timm.data import ImageDataset, create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from timm_ela import EfficientLocalAttention

INTRO = """\
# Gates of ELA on {name}

Every row of [{name}.gates.csv]({name}.gates.csv) is a stage of one run of `train.py`. A stage is an index of
`model.blocks`; stage 0 has no ELA. A gate is a_h * a_w, and 1/4 in a graft. `moved` is the mean of the gates over
images, channels and positions, minus 1/4. `spread` is their standard deviation. `within` is the part of it within
the channels, over images and positions: it is 0 if the gate of each channel is constant. All are measured on {images}
test images, and are means over the n seeds. The runs, with hardware and versions, are in [{name}.csv]({name}.csv).

Frozen: the same weights with every gate set to 1/4. Nothing is trained again, and batch norm keeps its statistics.
The difference shows how much the other weights rely on the gates that they were trained with. It does not show the
accuracy of a model that is trained without gates. Top-1 is measured on {test_images} test images.
"""


def moments(a: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the means (N, C) of a gate (N, C, L) and of its square."""
    a = a.double()
    return a.mean(2), a.square().mean(2)


@torch.inference_mode()
def measure_gates(model: nn.Module, loader: DataLoader) -> dict[int, tuple[float, float, float]]:
    """Returns `spreads` of the gates a_h * a_w over images, channels and positions, for each stage.

    A stage is an entry of the model's `blocks`. The modules of a stage are weighted by their channels.
    """
    products: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str, module: EfficientLocalAttention, args: tuple[Tensor]) -> None:
        # a_h depends only on the row and a_w only on the column, so the mean of a_h * a_w is the product of their means
        (h, hh), (w, ww) = (moments(gate) for gate in module.gates(args[0]))
        products[name].append(torch.stack([h * w, hh * ww]))

    hooks = [
        module.register_forward_pre_hook(partial(keep, name))
        for name, module in model.named_modules() if isinstance(module, EfficientLocalAttention)]
    for x, _ in loader:
        model(x)
    for hook in hooks:
        hook.remove()
    by_stage: dict[int, list[Tensor]] = defaultdict(list)
    for name, values in products.items():
        by_stage[int(name.split('.')[1])].append(torch.cat(values, 1).mean(1))  # (2, channels)
    return {stage: spreads(torch.cat(values, 1)) for stage, values in by_stage.items()}


def spreads(channels: Tensor) -> tuple[float, float, float]:
    """Returns the mean, and the standard deviations overall and within channels, from the channels' moments (2, C)."""
    (mean, square), between = channels.mean(1), channels[0].square().mean()
    return mean.item(), (square - mean ** 2).clamp(0).sqrt().item(), (square - between).clamp(0).sqrt().item()


def freeze(model: nn.Module) -> nn.Module:
    """Returns a copy of a model with its ELA at the neutral point, where every gate is 1/4."""
    frozen = copy.deepcopy(model)
    for module in frozen.modules():
        if isinstance(module, EfficientLocalAttention):
            nn.init.zeros_(module.gn.weight)
            nn.init.zeros_(module.gn.bias)
    return frozen


@torch.inference_mode()
def measure_top1(model: nn.Module, loader: DataLoader) -> float:
    """Returns the top-1 accuracy in percent."""
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
    return round(100 * right / len(loader.dataset), 4)


def load_run(run, folder: Path, data: Path) -> tuple[nn.Module, ImageDataset]:
    """Returns the model of a run after its last epoch, and the test images, prepared as in train.py."""
    used = yaml.safe_load((folder / 'args.yaml').read_text())
    last = folder / f'checkpoint-{run.epochs - 1}.pth.tar'
    model = timm.create_model(run.model, num_classes=used['num_classes'], checkpoint_path=last)
    transform = create_transform(**resolve_data_config(used, model=model))
    return (
        model.eval().to(memory_format=torch.channels_last),
        create_dataset('', data, split='test', transform=transform))


def measure_run(run, folder: Path, data: Path, images: int) -> list[dict[str, object]]:
    """Returns a row for each stage of a run of the study's table, from about `images` evenly spaced test images."""
    model, test = load_run(run, folder, data)
    part = Subset(test, range(0, len(test), max(1, len(test) // images)))
    gates = measure_gates(model, DataLoader(part, 64))
    frozen = measure_top1(freeze(model), DataLoader(test, 128))
    return [
        {'arm': run.arm, 'model': run.model, 'seed': run.seed, 'stage': stage, 'mean': round(mean, 5),
         'spread': round(spread, 5), 'within': round(within, 5), 'images': len(part), 'top1': run.top1,
         'top1_frozen': frozen, 'test_images': len(test)} for stage, (mean, spread, within) in sorted(gates.items())]


def page(table: pd.DataFrame, name: str) -> str:
    """Returns the page about the gates, made from the table only."""
    stages = sorted(table.stage.unique())
    header = ['attention', 'n', 'top-1 (%)', 'frozen at 1/4', 'difference',
              *(f'stage {stage}: moved, spread, within' for stage in stages)]
    rows = [header, ['---', *['---:'] * (len(header) - 1)]]
    for arm in (arm for arm in TITLES if arm in set(table.arm)):
        here = table[table.arm == arm]
        runs, by_stage = here.groupby('seed').first(), here.groupby('stage')[['mean', 'spread', 'within']].mean()
        moved = by_stage['mean'] - 0.25
        rows.append([
            TITLES[arm], str(len(runs)), f'{runs.top1.mean():.2f}', f'{runs.top1_frozen.mean():.2f}',
            f'{(runs.top1_frozen - runs.top1).mean():+.2f}',
            *(f'{moved[s]:+.3f}, {by_stage.spread[s]:.3f}, {by_stage.within[s]:.3f}' for s in stages)])
    intro = INTRO.format(name=name, images=table.images.max(), test_images=table.test_images.max())
    return f'{intro}\n{markdown(rows)}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='image folder with test/')
    parser.add_argument('table', type=Path, help='table of a study, beside the folder of its runs')
    parser.add_argument('--images', type=int, default=512, help='test images that the gates are measured on')
    args = parser.parse_args()
    rows = []
    for run in pd.read_csv(args.table).query('arm.str.startswith("ela")').itertuples():
        rows += measure_run(run, args.table.with_suffix('') / f'{run.arm}.seed{run.seed}', args.data, args.images)
        print(f'{run.arm} of seed {run.seed}: done', flush=True)
    path = args.table.with_suffix('.gates.csv')
    pd.DataFrame(rows).to_csv(path, index=False, lineterminator='\n')
    path.with_suffix('.md').write_text(page(pd.read_csv(path), args.table.stem), encoding='utf-8')


if __name__ == '__main__':
    main()
