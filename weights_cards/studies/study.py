"""`make study`: ELA and its rivals trained by timm's own train.py, one recipe for all, over several seeds.

Runs what is not done yet and goes on with what was cut off, then writes one row a run to a table, `<data>.csv`.
What stands in the table already, by the same recipe, versions and hardware, is done, too, wherever it ran.
`study_report.py` makes the page and the pictures of it.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from study_report import SCRATCH, check_one_study, read, write_report

import timm_ela
from timm_ela.bench import hardware
from timm_ela.catalog import BACKBONES, count
from timm_ela.registry import MODELS

TIMM_ELA = Path(sys.executable).with_name('timm-ela')
CORE = ('plain', 'se', 'ca', 'ela_b', 'ela_s')
ARMS = (*CORE, 'eca', 'cbam', 'ela_t', 'ela_l')
GRAFTED = 'ela_b'  # the arm that is also begun from a plain model, trained for half of the schedule

# Chosen on the plain model, on images of the training split.
RECIPE = {
    'img-size': 64, 'crop-pct': 1.0, 'batch-size': 64, 'opt': 'adamw', 'lr': 2e-3, 'weight-decay': 0.02,
    'sched': 'cosine', 'warmup-epochs': 0, 'scale': (0.7, 1.0), 'color-jitter': 0, 'train-interpolation': 'bilinear',
    'smoothing': 0.1,
}
FLAGS = ('--sched-on-updates', '--channels-last')
HEAD_INIT = {'head-init-scale': 0.01}  # without it, MobileNetV2 begins with a loss of 4.5 for ten classes


class Run(NamedTuple):
    backbone: str
    arm: str
    seed: int
    grafted: bool = False

    @property
    def model(self) -> str:
        if self.arm == 'plain':
            return self.backbone
        return next(name for name, pair in MODELS.items() if pair == (self.backbone, self.arm))

    @property
    def name(self) -> str:
        return f'{self.model}{".graft" if self.grafted else ""}.seed{self.seed}'


def options(values: dict[str, object]) -> list[str]:
    """Options of a command line; a tuple is several values."""
    return [str(word) for k, v in values.items() for word in (f'--{k}', *(v if isinstance(v, tuple) else (v,)))]


def summary(folder: Path) -> list[dict[str, str]]:
    """The epochs of a run; train.py repeats the header where it resumed, and an epoch that was cut off."""
    with open(folder / 'summary.csv', newline='') as file:
        rows = {row['epoch']: row for row in csv.DictReader(file) if row['epoch'] != 'epoch'}
    return list(rows.values())


def execute(command: list[object], log: Path, threads: int, keep: tuple[int, ...] = ()) -> None:
    with open(log, 'a') as file:
        env = {**os.environ, 'OMP_NUM_THREADS': str(threads), 'HF_HUB_OFFLINE': '1'}
        done = subprocess.run(
            [str(word) for word in command], stdout=file, stderr=subprocess.STDOUT, env=env, pass_fds=keep)
    if done.returncode:
        raise RuntimeError(f'exit code {done.returncode}: {log} says why')


def describe(args: argparse.Namespace, run: Run) -> dict[str, object]:
    """What makes the run what it is, and where it runs."""
    return {
        'start': f'plain, {args.epochs // 2} epochs' if run.grafted else SCRATCH, 'epochs': args.epochs,
        **args.counts,
        'recipe': ' '.join([*options(RECIPE), *([] if run.grafted else options(HEAD_INIT)), *FLAGS, *amp(args)]),
        'device': args.device, 'hardware': machine(args),
        'threads': threads(args), 'parallel_runs': args.jobs, 'python': platform.python_version(),
        'torch': torch.__version__, 'timm': timm.__version__, 'timm_ela': timm_ela.__version__,
        'train_py': hashlib.sha256((args.scripts / 'train.py').read_bytes()).hexdigest()[:12],
    }


def amp(args: argparse.Namespace) -> list[str]:
    return ['--amp', '--amp-dtype', 'bfloat16'] if args.device == 'cuda' else []


def machine(args: argparse.Namespace) -> str:
    return f'{hardware(torch.device(args.device))}, {os.cpu_count()} cores'


def threads(args: argparse.Namespace) -> int:
    return max(1, (os.cpu_count() or 1) // args.jobs) if args.device == 'cpu' else 1


def check_same(wanted: dict[str, object], found: dict[str, str], where: object, option: str) -> None:
    """Raises ValueError where a run was made otherwise than the study would make it now."""
    for key, value in wanted.items():
        if str(found.get(key)) != str(value) and key not in ('threads', 'parallel_runs'):
            raise ValueError(f'{where} is a run with {key} {found.get(key)}, not {value}: choose another {option}')


def carry_out(args: argparse.Namespace, run: Run) -> None:
    """Trains, or goes on training, and validates the last epoch's weights; what is done is not done again."""
    folder, wanted = args.output / run.name, describe(args, run)
    if not folder.exists() and run.name in args.known:
        check_same(wanted, args.known[run.name], f'{run.name} in {args.table}', '--studies')
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / 'study.json'
    if not file.exists():
        file.write_text(json.dumps(wanted, indent=2) + '\n')
    check_same(wanted, json.loads(file.read_text()), folder, '--output')
    if (folder / 'validate.json').exists():
        return
    with open(folder / 'lock', 'w') as lock:  # a train.py that outlived its study holds it, too
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(f'another process is at work in {folder}') from error
        train(args, run, folder, lock.fileno())


def train(args: argparse.Namespace, run: Run, folder: Path, lock: int) -> None:
    data = {'data-dir': args.data, 'model': run.model, 'num-classes': len(args.classes), 'device': args.device}
    log, last = folder / 'log', folder / f'checkpoint-{args.epochs - 1}.pth.tar'  # train.py writes it at the very end
    if not last.exists():
        start: dict[str, object] = {} if run.grafted else HEAD_INIT
        if (folder / 'last.pth.tar').exists():
            start = {**start, 'resume': folder / 'last.pth.tar'}
        elif run.grafted:
            half, parent = args.epochs // 2, run._replace(arm='plain', grafted=False)
            if not (folder / 'graft').exists():
                plain, checkpoint = args.output / parent.name, f'checkpoint-{half - 1}.pth.tar'
                if not (plain / checkpoint).exists():
                    raise FileNotFoundError(f'there is no {checkpoint} in {plain}: train that here, into another table')
                check_same(describe(args, parent), json.loads((plain / 'study.json').read_text()), plain, '--output')
                convert = [TIMM_ELA, 'convert', plain / checkpoint, folder / 'graft', '--model', run.model]
                execute(convert, log, threads(args))
            start = {'initial-checkpoint': folder / 'graft' / 'model.safetensors', 'start-epoch': half}
        execute([
            sys.executable, args.scripts / 'train.py', *options({
                **data, 'val-split': 'test', **RECIPE, 'epochs': args.epochs, 'seed': run.seed, **start,
                'workers': args.workers, 'checkpoint-hist': args.epochs, 'log-interval': 500,
                'output': folder.parent, 'experiment': folder.name}), *FLAGS, *amp(args)], log, threads(args), (lock,))
        if not last.exists():
            raise RuntimeError(f'train.py was interrupted: {log}')
    execute([sys.executable, args.scripts / 'validate.py', *options({
        **data, 'split': 'test', 'img-size': RECIPE['img-size'], 'crop-pct': RECIPE['crop-pct'], 'batch-size': 250,
        'workers': args.workers, 'checkpoint': last, 'results-file': folder / 'validate.part',
        'results-format': 'json'}), '--channels-last', *amp(args)], log, threads(args), (lock,))
    (folder / 'validate.part').rename(folder / 'validate.json')


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


def known_rows(table: Path) -> dict[str, dict[str, str]]:
    """The rows of a table that was written before, by the names of their runs."""
    rows = read(table) if table.exists() else []
    return {Run(row['backbone'], row['attention'], int(row['seed']), row['start'] != SCRATCH).name: row for row in rows}


def measure_speeds(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Fills in training images a second, from one interleaved run of all models whose hardware is here."""
    file, part = args.output / f'speed-{args.device}.json', args.output / 'speed.part'
    here = [row for row in rows if (row['device'], row['hardware']) == (args.device, machine(args))]
    wanted = [model for model in BACKBONES if model in {row['model'] for row in here}]
    measured = json.loads(file.read_text())['models'] if file.exists() else []
    if not {*wanted} <= {row['model'] for row in measured}:
        execute([
            TIMM_ELA, 'bench', '--only', 'models', '--models', *wanted, *options({
                'img-size': RECIPE['img-size'], 'batch-size': RECIPE['batch-size'], 'device': args.device,
                'json': part}), '--channels-last', *(['--amp-dtype', 'bfloat16'] if args.device == 'cuda' else []),
        ], args.output / 'speed.log', os.cpu_count() or 1)
        part.rename(file)
        measured = json.loads(file.read_text())['models']
    speeds = {row['model']: round(row['training_images_per_s']) for row in measured}
    for row in here:
        row['train_images_per_second'] = speeds.get(row['model'], '')


def table_row(args: argparse.Namespace, run: Run) -> dict[str, object]:
    """What the table holds of one run, all of it read from the files of the run."""
    folder = args.output / run.name
    result, epochs = json.loads((folder / 'validate.json').read_text()), summary(folder)
    used = yaml.safe_load((folder / 'args.yaml').read_text())
    params, macs = count(run.model, used['img_size'], used['num_classes'])
    return {
        'backbone': run.backbone, 'attention': run.arm, 'model': run.model, 'seed': used['seed'],
        'img_size': used['img_size'], 'top1': result['top1'], 'top5': result['top5'],
        'best_top1': max(float(epoch['eval_top1']) for epoch in epochs),
        'top1_by_epoch': ' '.join(epoch['eval_top1'] for epoch in epochs),
        'train_loss': round(float(epochs[-1]['train_loss']), 4), 'params': params, 'macs': macs,
        'train_images_per_second': '',
        'resumed': int(bool(used['resume'])),
        **json.loads((folder / 'study.json').read_text()),
    }


def phases(args: argparse.Namespace) -> list[list[Run]]:
    """The core first, seed by seed; then what begins from a plain model; then the rest of the grid."""
    core, rest = ([Run(b, arm, seed) for b in args.backbones for seed in range(args.seeds) for arm in args.arms
                   if (arm in CORE) is wanted] for wanted in (True, False))
    grafts = [Run(b, GRAFTED, seed, True) for b in args.backbones for seed in range(args.seeds)]
    return [core, grafts if {'plain', GRAFTED} <= {*args.arms} and args.epochs > 1 else [], rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('data', type=Path, help='image folder with train/ and test/')
    parser.add_argument('--scripts', type=Path, required=True, help='folder of timm\'s train.py and validate.py alone')
    parser.add_argument('--output', type=Path, default=Path('output/study'), help='where the runs are kept')
    parser.add_argument('--studies', type=Path, help='where table and page are kept (default: OUTPUT/studies)')
    parser.add_argument('--device', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
    parser.add_argument('--workers', type=int, default=1, help='loader processes of a run')
    parser.add_argument('--backbones', nargs='+', default=['mobilenetv2_050'], choices=sorted({*BACKBONES.values()}))
    parser.add_argument('--arms', nargs='+', default=list(ARMS), choices=ARMS)
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--images', type=int, default=4000, help='training images of each class')
    parser.add_argument('--report', action='store_true', help='train nothing; table and page of what is done')
    args = parser.parse_args()
    for needed in (args.data / 'train', args.data / 'test', args.scripts / 'train.py', args.scripts / 'validate.py'):
        if not needed.exists():
            parser.error(f'there is no {needed}')
    args.output = args.output.resolve()
    args.table = (args.studies or args.output / 'studies') / f'{args.data.name}.csv'
    args.known = known_rows(args.table)
    args.classes = sorted(folder.name for folder in (args.data / 'train').iterdir())
    args.data = split(args.data, args.output / f'first-{args.images}' / args.data.name, args.images)
    args.counts = {f'{part}_images': sum(1 for _ in (args.data / part).glob('*/*')) for part in ('train', 'test')}

    failed = False
    for runs in [] if args.report else phases(args):
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(carry_out, args, run) for run in runs]
            try:
                for run, job in zip(runs, jobs, strict=True):
                    error = job.exception()
                    failed |= error is not None
                    print(f'{run.name}: {error or "done"}', file=sys.stderr if error else sys.stdout, flush=True)
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                sys.exit('interrupted: the same command goes on')
    done = [run for runs in phases(args) for run in runs if (args.output / run.name / 'validate.json').exists()]
    rows = list({**args.known, **{run.name: table_row(args, run) for run in done}}.values())
    try:
        check_one_study(rows)
        measure_speeds(args, rows)
        if rows:
            write_report(args.table, rows)
    except (ValueError, RuntimeError) as error:
        sys.exit(f'{args.table} is left as it was: {error}')
    sys.exit(failed)


if __name__ == '__main__':
    main()
