"""`make demo`: from real images to a published folder, by the commands that a user types, in a few minutes on a CPU.

It begins with the trained weights that ship with the repository, offline. timm's scripts are not in its wheel: they are
taken from the folder in TIMM_SCRIPTS, or from a shallow clone of timm at the tag of the installed version. Where
neither can be had, fresh weights stand in for trained ones.
"""
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from skimage import data as photographs
from sklearn.datasets import load_digits
from timm.data import create_transform, resolve_model_data_config

ROOT = Path('demo')
CACHE = Path('.cache')
MODEL = 'resnet18_ela_b'
TRAINED = 'local-dir:weights_cards/mobilenetv2_050_ela_s.cifar10'
REPOSITORY = 'https://github.com/huggingface/pytorch-image-models'
TIMM_ELA = str(Path(sys.executable).with_name('timm-ela'))
NAMES = {sys.executable: 'python', TIMM_ELA: 'timm-ela'}


def run(*command: str | Path) -> None:
    """Prints a command as a user would type it, and runs it."""
    words = [str(word) for word in command]
    print(f'\n$ {shlex.join(NAMES.get(word, word) for word in words)}', flush=True)
    subprocess.run(words, check=True)


def show_trained() -> None:
    """Classifies a photograph with the weights that ship here, and draws what they look at."""
    picture = ROOT / 'cat.png'
    picture.parent.mkdir(exist_ok=True)
    Image.fromarray(photographs.chelsea()).save(picture)
    print(f'Loading trained weights: timm.create_model("{TRAINED}", pretrained=True)')
    model = timm.create_model(TRAINED, pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        probabilities = model(transform(Image.open(picture)).unsqueeze(0)).softmax(1)[0]
    names = model.pretrained_cfg['label_names']
    # seven in ten of CIFAR-10's test images are right, this cat is not: see the card
    best = [f'{names[i]} {p:.0%}' for p, i in zip(*probabilities.topk(3), strict=True)]
    print(f'{picture} looks like', ', '.join(best))
    run(TIMM_ELA, 'plot', picture, '--model', TRAINED, '-o', ROOT / 'cat-attention.png')


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
    """A folder with timm's scripts alone: beside timm's sources they would import those, not the installed timm."""
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
    """Classifies with the weights that ship; then trains, validates, exports, loads back, draws."""
    show_trained()
    data, run_dir, exported = ROOT / 'digits', ROOT / 'runs' / 'digits', ROOT / f'{MODEL}.digits'
    write_digits(data)
    scripts = find_scripts()
    if scripts:
        common = ('--data-dir', data, '--model', MODEL, '--num-classes', '10', '--img-size', '32', '--crop-pct', '1.0',
                  '--device', 'cpu', '--workers', '1')
        shutil.rmtree(run_dir, ignore_errors=True)  # train.py would number a second folder of the same name
        run(sys.executable, scripts / 'train.py', *common, '--epochs', '5', '--batch-size', '64', '--opt', 'adamw',
            '--lr', '2e-3', '--warmup-epochs', '1', '--no-aug', '--log-interval', '100', '--output', run_dir.parent,
            '--experiment', run_dir.name)
        checkpoint = run_dir / 'model_best.pth.tar'
        run(sys.executable, scripts / 'validate.py', *common, '--checkpoint', checkpoint)
        run(TIMM_ELA, 'export', run_dir, exported, '--force')
    else:
        print('timm\'s scripts cannot be had (no TIMM_SCRIPTS, no clone): the rest goes on with fresh weights.')
        plain, names = ROOT / 'resnet18.pth', ROOT / 'names.txt'
        torch.save(timm.create_model('resnet18', num_classes=10).state_dict(), plain)
        names.write_text('\n'.join('0123456789'))
        run(TIMM_ELA, 'convert', plain, exported, '--model', MODEL, '--class-names', names, '--force')
        checkpoint = exported / 'model.safetensors'
    check(exported, checkpoint)
    picture = next((data / 'validation' / '5').glob('*.png'))
    run(TIMM_ELA, 'plot', picture, '--model', f'local-dir:{exported}', '-o', ROOT / 'attention.png')
    print(f'\nSee {ROOT / "cat-attention.png"} and {ROOT / "attention.png"}')


if __name__ == '__main__':
    main()
