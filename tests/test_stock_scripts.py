"""timm's own scripts, unmodified, train, validate and export our models by name alone.

They are not in timm's package: TIMM_SCRIPTS names a folder with them, such as a checkout of timm's repository.
"""
import csv
import json
import os
import re
import shlex
import sys
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import timm
import torch
from helpers import AUTOLOAD_OFF, run
from PIL import Image
from safetensors.torch import save_file

from timm_ela.hub.publish import export_run

pytestmark = pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ, reason='TIMM_SCRIPTS is not set: the folder of timm\'s train.py and its like')

CLASSES = ('green', 'blue', 'red')


@pytest.fixture(scope='module')
def pictures(tmp_path_factory) -> Path:
    """Noise with a tint for each class."""
    folder, rng = tmp_path_factory.mktemp('pictures'), np.random.default_rng(0)
    for split in ('train', 'validation'):
        for channel, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.normal(110, 40, (48, 64, 3))
                pixels[..., channel] += rng.normal(50, 20)
                Image.fromarray(pixels.clip(0, 255).astype('uint8')).save(folder / split / name / f'{name}{i}.png')
    return folder


def script(name: str, *args: object, **kwargs) -> CompletedProcess:
    return run([sys.executable, Path(os.environ['TIMM_SCRIPTS']).resolve() / name, *args], **kwargs)


def train(pictures: Path, run_dir: Path, model: str, *args: object, **kwargs) -> CompletedProcess:
    return script(
        'train.py', '--data-dir', pictures, '--model', model, '--num-classes', len(CLASSES), '--img-size', 32,
        '-b', 8, '-vb', 8 * len(CLASSES), '-j', 1, '--device', 'cpu', '--warmup-epochs', 0,
        '--output', run_dir.parent, '--experiment', run_dir.name, *args, **kwargs)


def summary(run_dir: Path) -> list[dict[str, float]]:
    with open(run_dir / 'summary.csv') as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def checkpoint(run_dir: Path) -> dict:
    return torch.load(run_dir / 'last.pth.tar', map_location='cpu', weights_only=False)


@pytest.fixture(scope='module')
def trained(pictures, tmp_path_factory) -> Path:
    """One epoch from scratch; timm's last batch norms at zero would keep the attention still for its first steps."""
    run_dir = tmp_path_factory.mktemp('runs') / 'scratch'
    train(
        pictures, run_dir, 'resnet18_ela_b', '--epochs', 1, '--epoch-repeats', 8, '--lr', 0.02, '--model-ema',
        '--model-ema-decay', 0.5, '--channels-last', '--grad-checkpointing', '--model-kwargs', 'zero_init_last=False')
    return run_dir


# train.py
def test_train_moves_every_ela_weight(trained):
    assert [row['epoch'] for row in summary(trained)] == [0]
    saved = checkpoint(trained)
    assert saved['arch'] == 'resnet18_ela_b'
    own = {k: v for k, v in saved['state_dict'].items() if '.se.' in k}
    assert len(own) == 8 * 3
    for key, value in own.items():
        assert torch.isfinite(value).all()
        assert not torch.equal(value, saved['state_dict_ema'][key]), key  # the average lags behind what moves


def test_train_resumes_as_torchscript_where_the_hook_is_off(pictures, trained, tmp_path):
    """train.py's own flag `--device-modules` registers the models."""
    done = train(
        pictures, tmp_path / 'resumed', 'resnet18_ela_b', '--epochs', 2, '--lr', 0.02, '--torchscript',
        '--device-modules', 'timm_ela', '--resume', trained / 'last.pth.tar', env=AUTOLOAD_OFF)
    assert [row['epoch'] for row in summary(tmp_path / 'resumed')] == [1]
    assert 'Grafted' not in done.stderr


def test_train_grafts_a_plain_checkpoint(pictures, tmp_path):
    """Compiled, and in bfloat16. The head is new: train.py always begins it anew for `--pretrained-path`."""
    plain = timm.create_model('mobilenetv2_050', num_classes=len(CLASSES)).state_dict()
    save_file(plain, tmp_path / 'plain.safetensors')
    # train.py takes a learning rate of 0 for not given
    done = train(
        pictures, tmp_path / 'grafted', 'mobilenetv2_050_ela_t', '--epochs', 1, '--lr', 1e-30, '--pretrained',
        '--pretrained-path', tmp_path / 'plain.safetensors', '--amp', '--amp-dtype', 'bfloat16',
        '--torchcompile', 'eager')
    assert done.stderr.count('Grafted plain weights onto mobilenetv2_050_ela_t') == 1
    grafted = checkpoint(tmp_path / 'grafted')['state_dict']
    assert all(torch.equal(v, grafted[k]) for k, v in plain.items() if v.ndim == 4)


# validate.py
def test_the_validate_command_in_a_card_repeats_the_metrics_of_training(pictures, trained, tmp_path):
    """Of the averaged weights, as train.py's are with `--model-ema`."""
    export_run(trained, tmp_path / 'my-model')
    card = (tmp_path / 'my-model' / 'README.md').read_text(encoding='utf-8')
    [command] = re.findall(r'^validate\.py (.*)$', card, re.MULTILINE)
    own = {'DATA': pictures, 'hf-hub:OWNER/NAME': f'local-dir:{tmp_path / "my-model"}'}
    done = script('validate.py', *(own.get(word, word) for word in shlex.split(command)), '--device', 'cpu')
    [row] = summary(trained)
    assert row['eval_top1'] > 34  # more than one class for all would give
    result = json.loads(done.stdout.partition('--result\n')[2])
    assert result['top1'] == pytest.approx(row['eval_top1'], abs=1e-3)
    loss = float(re.search(r'Loss:\s+([\d.]+)', done.stderr)[1])  # one batch holds all pictures
    assert loss == pytest.approx(row['eval_loss'], rel=1e-3)


# onnx_export.py
def test_onnx_export_computes_the_same_at_any_size(trained, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    script(
        'onnx_export.py', tmp_path / 'model.onnx', '--model', 'resnet18_ela_b', '--num-classes', len(CLASSES),
        '--checkpoint', trained / 'last.pth.tar', '--img-size', 32, '--dynamic-size')
    model = timm.create_model(
        'resnet18_ela_b', num_classes=len(CLASSES), checkpoint_path=trained / 'last.pth.tar').eval()
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx')
    for height, width in ((32, 32), (48, 80)):
        x = torch.randn(1, 3, height, width)
        [logits] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)
