"""The trained weights that ship are what their card says, offline and to the digit."""
import json
import os
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
import yaml
from helpers import ROOT, run
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from timm_ela import EfficientLocalAttention
from timm_ela.models.registry import MODELS

CARDS = ROOT / 'weights_cards'
FOLDERS = sorted(path.parent for path in CARDS.glob('*/config.json'))
assert FOLDERS
pytestmark = pytest.mark.parametrize('folder', FOLDERS, ids=lambda folder: folder.name)


def load(folder: Path):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def card(folder: Path) -> str:
    return (folder / 'README.md').read_text(encoding='utf-8')


def accuracy(folder: Path) -> float:
    results = ModelCard.load(folder / 'README.md').data.eval_results
    return next(result.metric_value for result in results if result.metric_name == 'Top-1 accuracy')


def measured(folder: Path) -> list[float]:
    """Top-1 of the runs of this model with its seed and number of epochs, in the tables below weights_cards/studies."""
    tables = [pd.read_csv(path) for path in CARDS.glob('studies/**/*.csv')]
    args = yaml.safe_load((folder / 'args.yaml').read_text())
    seed, epochs = args['seed'], args['epochs']
    assert f'- Seed: {seed}\n' in card(folder) and f'- Epochs: {epochs}\n' in card(folder)
    rows = pd.concat(tables).query('model == @folder.stem and seed == @seed and epochs == @epochs')
    return list(rows.top1)


def test_a_folder_is_what_a_repository_would_hold_and_small(folder):
    assert {path.name for path in folder.iterdir()} == {'README.md', 'args.yaml', 'config.json', 'model.safetensors'}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 8e6


def test_the_weights_load_strictly_and_are_trained_and_the_class_names_are_in_the_config(folder):
    model = load(folder)
    weights = load_file(folder / 'model.safetensors')
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[k].to(v.dtype), v) for k, v in model.state_dict().items())
    assert all(m.gn.bias.abs().max() > 1e-2 for m in model.modules() if isinstance(m, EfficientLocalAttention))
    config = json.loads((folder / 'config.json').read_text())
    assert len(config['label_names']) == config['num_classes'] == model.num_classes
    assert config['architecture'] in MODELS


def test_the_cards_code_gives_the_logits_that_stand_below_it(folder):
    code, logits = re.search(r'## A check.*?```python\n(.*?)```.*?```json\n(.*?)```', card(folder), re.DOTALL).groups()
    names = {'model': load(folder)}
    exec(code, names)
    expected = torch.tensor(json.loads(logits))
    torch.testing.assert_close(names['logits'], expected, rtol=0, atol=1e-3)
    assert names['logits'].argmax() == expected.argmax()


def test_the_cards_accuracy_stands_in_a_table(folder):
    assert accuracy(folder) in measured(folder)


@pytest.mark.skipif(
    not {'TIMM_SCRIPTS', 'CIFAR10'} <= os.environ.keys(),
    reason='TIMM_SCRIPTS or CIFAR10 is not set: timm\'s scripts, and the images in train/ and test/')
def test_timms_validate_measures_the_accuracy_of_the_card(folder, tmp_path):
    validate, images = (Path(os.environ[name]).resolve() for name in ('TIMM_SCRIPTS', 'CIFAR10'))
    run([sys.executable, validate / 'validate.py', '--data-dir', images,
         '--split', 'test', '--model', f'local-dir:{folder}', '--pretrained', '--device', 'cpu', '--channels-last',
         '--results-file', tmp_path / 'results.json', '--results-format', 'json'])
    measured = json.loads((tmp_path / 'results.json').read_text())['top1']
    assert measured == pytest.approx(accuracy(folder), abs=0.05)
