"""Measures how far training moved the gates of a study's ELA models from 1/4, where they start, and what they add.

    python weights_cards/studies/gates.py DATA --runs output/study

Reads the runs of study.py. Writes `<data>.gates.csv`, one row for each run and stage, and from it `<data>.gates.md`;
and `<data>.gates.webp`, the gates of one run on three photographs.
"""
import argparse
import copy
import json
from collections import defaultdict
from functools import partial
from io import BytesIO
from pathlib import Path

import pandas as pd
import timm
import torch
import yaml
from PIL import Image
from report import TITLES, markdown
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from timm_ela import EfficientLocalAttention, plot_attention
from timm_ela.models.registry import MODELS

# images of scikit-image
PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee')
INTRO = """\
# Gates of ELA on {name}

Every row of [{name}.gates.csv]({name}.gates.csv) is a stage of one run of `train.py`. A stage is an index of
`model.blocks`; stage 0 has no ELA. A gate is a_h * a_w, and starts at exactly 1/4. `moved` is the mean of the gates
over images, channels and positions, minus 1/4. `spread` is their standard deviation. `within` is the part of it within
the channels, over images and positions: it is 0 if the gate of each channel is constant. All are measured on {images}
test images, and are means over the n seeds. The runs, with hardware and versions, are in [{name}.csv]({name}.csv).

Frozen: the same weights with every gate set back to 1/4. Nothing is trained again, and batch norm keeps its statistics.
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
    neutral = MODELS[model.pretrained_cfg['architecture']].layer.neutral
    assert neutral is not None
    for module in frozen.modules():
        if isinstance(module, EfficientLocalAttention):
            for name in neutral.zeroed:
                nn.init.zeros_(module.get_parameter(name))
    return frozen


@torch.inference_mode()
def measure_top1(model: nn.Module, loader: DataLoader) -> float:
    """Returns the top-1 accuracy in percent."""
    right = sum((model(x).argmax(1) == y).sum().item() for x, y in loader)
    return round(100 * right / len(loader.dataset), 4)


def spaced(dataset, number: int) -> Subset:
    """Returns images at equal distances in the dataset, which is sorted by class."""
    number = min(number, len(dataset))
    return Subset(dataset, [i * len(dataset) // number for i in range(number)])


def measure_run(folder: Path, data: Path, images: int) -> tuple[nn.Module, list[dict[str, object]]]:
    """Returns the model of a run after its last epoch, and the run's rows."""
    used = yaml.safe_load((folder / 'args.yaml').read_text())
    model = timm.create_model(
        used['model'], num_classes=used['num_classes'],
        checkpoint_path=str(folder / f'checkpoint-{used["epochs"] - 1}.pth.tar'))
    model = model.eval().to(memory_format=torch.channels_last)
    config = resolve_data_config({'img_size': used['img_size'], 'crop_pct': used['crop_pct']}, model=model)
    test = create_dataset('', data, split='test', transform=create_transform(**config))
    # plot_attention reads these
    model.pretrained_cfg.update(
        {k: config[k] for k in ('input_size', 'crop_pct')}, label_names=[*test.reader.class_to_idx])

    gates = measure_gates(model, DataLoader(spaced(test, images), 64))
    top1 = json.loads((folder / 'validate.json').read_text())['top1']
    frozen = measure_top1(freeze(model), DataLoader(test, 128))
    return model, [
        {'arm': MODELS[used['model']].layer.suffix, 'model': used['model'], 'seed': used['seed'], 'stage': stage,
         'mean': round(mean, 5), 'spread': round(spread, 5), 'within': round(within, 5),
         'images': min(images, len(test)), 'top1': top1, 'top1_frozen': frozen, 'test_images': len(test)}
        for stage, (mean, spread, within) in sorted(gates.items())]


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
    return f'{intro}\n{markdown(rows)}\n\n![Gates on three photographs]({name}.gates.webp)\n'


def draw(model: nn.Module, path: Path) -> None:
    """Writes the gates of a model on three photographs, one below the other."""
    from skimage import data as photographs

    pictures = []
    for name in PHOTOGRAPHS:
        file = BytesIO()
        plot_attention(Image.fromarray(getattr(photographs, name)()), model).savefig(file, format='png', dpi=100)
        pictures.append(Image.open(file).convert('RGB'))
    whole = Image.new('RGB', (max(p.width for p in pictures), sum(p.height for p in pictures)), 'white')
    for i, picture in enumerate(pictures):
        whole.paste(picture, (0, sum(p.height for p in pictures[:i])))
    whole.save(path, quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='image folder with test/')
    parser.add_argument('--runs', type=Path, default=Path('output/study'), help='--output of study.py')
    parser.add_argument('--images', type=int, default=512, help='test images that the gates are measured on')
    parser.add_argument('--draw', default='ela_b', help='arm whose gates are drawn, of the first seed')
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    drawn = None
    for folder in sorted(path.parent for path in args.runs.glob('*_ela_*.seed*/validate.json')):
        model, of_run = measure_run(folder, args.data, args.images)
        rows += of_run
        drawn = drawn or (model if of_run[0]['arm'] == args.draw else None)
        print(f'{folder.name}: done', flush=True)
    if drawn is None:
        parser.error(f'there is no finished run of {args.draw} in {args.runs}')
    path = args.runs / f'{args.data.name}.gates'
    pd.DataFrame(rows).to_csv(f'{path}.csv', index=False, lineterminator='\n')
    Path(f'{path}.md').write_text(page(pd.read_csv(f'{path}.csv'), args.data.name), encoding='utf-8')
    draw(drawn, Path(f'{path}.webp'))


if __name__ == '__main__':
    main()
