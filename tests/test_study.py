"""`make study`: arms of a seed are pairs; the page says what the table holds and no more; what is done stays done."""
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import ROOT, run
from PIL import Image
from safetensors.torch import load_file

from timm_ela import ATTN_LAYERS

STUDIES = ROOT / 'weights_cards' / 'studies'
sys.path.insert(0, str(STUDIES))
import report  # noqa: E402  not of the package

RUN = {
    'params': 4_000_000, 'train_images_per_second': 60.0, 'train_images': 50_000, 'test_images': 10_000, 'epochs': 3,
    'img_size': 96, 'recipe': '--opt sgd', 'hardware': 'a CPU', 'device': 'cpu', 'python': '3', 'torch': '2',
    'timm': '1', 'timm_ela': '0', 'train_py': 'ab',
}
TOP1 = {'plain': (50, 51, 52), 'ela_b': (51, 53, 55), 'se': (52, 50, 53)}  # of the seeds 0, 1, 2


def table(top1: dict[str, tuple[float, ...]], **changes) -> pd.DataFrame:
    return pd.DataFrame([{**RUN, 'arm': arm, 'seed': seed, 'top1': value, **changes}
                         for arm, values in top1.items() for seed, value in enumerate(values)])


def cells(page: str, first: str) -> list[str]:
    """The cells of the line whose first one is this, but for that one."""
    line = next(line for line in page.splitlines() if line.startswith(f'| {first} |'))
    return [cell.strip() for cell in line.split('|')[2:-1]]


@pytest.fixture
def page(tmp_path):
    def page(rows):
        report.write_report(rows, tmp_path / 'data.csv')
        return (tmp_path / 'data.md').read_text()

    return page


def test_the_arms_are_plain_and_layers_with_a_neutral_point():
    assert report.ARMS[0] == 'plain'
    assert all(ATTN_LAYERS[arm].neutral for arm in report.ARMS[1:])


def test_an_interval_is_students_of_the_differences_seed_by_seed(page):
    text = page(table(TOP1))
    # differences 1, 2, 3: mean 2, standard deviation 1; the 97.5 % point of t with 2 degrees of freedom is 4.303
    assert cells(text, 'ELA-B')[:3] == ['3', '53.00 ± 2.00', f'+2.00 [{2 - 4.303 / 3 ** 0.5:+.2f}, +4.48]']
    assert cells(text, 'none')[:4] == ['3', '51.00 ± 1.00', '', '']


def test_p_values_are_corrected_for_their_number():
    p = pd.Series({'a': 0.01, 'b': 0.04, 'c': 0.03, 'd': float('nan'), 'e': 0.5})
    corrected = report.holm(p)
    # times 4, 3, 2, 1 in ascending order, never below the one before
    np.testing.assert_allclose(corrected[['a', 'c', 'b', 'e']], [0.04, 0.09, 0.09, 0.5])
    assert np.isnan(corrected['d']) and list(corrected.index) == list(p.index)


def test_seeds_that_the_plain_model_has_not_run_are_in_no_difference(page):
    rows = table({'plain': (50, 51), 'ela_b': (51, 54, 99)})
    assert cells(page(rows), 'ELA-B')[2].startswith('+2.00 ')
    assert cells(page(table({'plain': (50,), 'ela_b': (51,)})), 'ELA-B')[2:4] == ['', '']  # no spread


def test_what_was_not_run_is_an_empty_cell(page):
    text = page(table(TOP1))
    assert not any(cells(text, 'ELA-T')) and not any(cells(text, 'Coordinate Attention'))
    assert all(cells(text, 'Squeeze-and-Excitation'))


def test_a_sentence_claims_no_more_than_the_corrected_test(page):
    text = page(table({'plain': (50, 51, 52), 'ela_b': (53, 54.01, 54.99), 'se': (52, 50, 53)}))
    assert re.search(r'^- ELA-B is 3.00 points above the plain model \(p = 0\.00\): this is shown\.$', text, re.M)
    assert re.search(r'^- Squeeze-and-Excitation is 0.67 points above .*: nothing is shown\.$', text, re.M)


def test_the_picture_is_not_blank(page, tmp_path):
    assert '](data.png)' in page(table(TOP1))
    with Image.open(tmp_path / 'data.png') as picture:
        assert np.asarray(picture.convert('L')).std() > 10


def test_the_studies_that_ship_are_the_pages_of_their_tables(tmp_path):
    for path in STUDIES.glob('*.csv'):
        report.write_report(pd.read_csv(path), tmp_path / path.name)
        for written in (path.name, f'{path.stem}.md'):
            assert (tmp_path / written).read_text() == (STUDIES / written).read_text()


def study(*args: object, **kwargs):
    return run([sys.executable, STUDIES / 'study.py', *args], **kwargs)


def test_a_folder_that_is_not_there_is_named_before_anything_runs(tmp_path):
    done = study(tmp_path, '--scripts', tmp_path, '--output', tmp_path / 'out', exit_code=2)
    assert f'there is no {tmp_path / "train"}' in done.stderr
    assert not (tmp_path / 'out').exists()


def test_two_models_of_a_seed_draw_the_same_numbers_after_they_are_made(tmp_path):
    """And see the same images: train.py's loader and its workers draw from the generator from then on."""
    script = tmp_path / 'train.py'
    script.write_text(
        'import sys, random, numpy, torch\nfrom timm.models import create_model\n'
        'from timm.utils import random_seed\nrandom_seed(int(sys.argv[sys.argv.index("--seed") + 1]))\n'
        'create_model(sys.argv[1])\nprint(torch.randperm(9).tolist(), random.random(), numpy.random.rand())\n')
    command = [sys.executable, STUDIES / 'paired_train.py', script]
    plain, ours = (run([*command, name, '--seed', '3']).stdout for name in ('resnet18', 'resnet18_ela_b'))
    assert plain == ours != run([*command, 'resnet18', '--seed', '4']).stdout


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 40), ('test', 8)):
        for channel, name in enumerate(('green', 'blue', 'red')):
            (tmp_path / 'tints' / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(110, 40, (32, 32, 3))
                pixels[..., channel] += 60
                image = Image.fromarray(pixels.clip(0, 255).astype('uint8'))
                image.save(tmp_path / 'tints' / split / name / f'{i}.png')
    return tmp_path / 'tints'


@pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ, reason='TIMM_SCRIPTS is not set: the folder of timm\'s train.py and its like')
def test_a_study_starts_all_arms_from_one_network_runs_once_and_goes_on_where_it_was_cut_off(pictures, tmp_path):
    out, scripts = tmp_path / 'runs', Path(os.environ['TIMM_SCRIPTS']).resolve()
    common = ('--scripts', scripts, '--output', out, '--images', 32, '--seeds', 1, '--img-size', 32)

    def go():
        study(pictures, *common, '--epochs', 2, '--arms', 'plain', 'ela_b')
        return pd.read_csv(out / 'tints.csv')

    rows = go()
    assert list(rows.arm) == ['plain', 'ela_b'] and list(rows.train_images) == [96, 96]
    assert (rows.train_images_per_second > 0).all()
    folders = [out / f'{name}.seed0' for name in ('tf_efficientnet_lite0', 'tf_efficientnet_lite0_ela_b')]
    for row, folder in zip(rows.itertuples(), folders, strict=True):
        assert row.top1 == json.loads((folder / 'validate.json').read_text())['top1']

    plain, ours = torch.load(out / 'plain.seed0.pth'), load_file(folders[1] / 'start' / 'model.safetensors')
    assert all(torch.equal(ours[k], v * 4 if 'conv_pwl.weight' in k else v) for k, v in plain.items())
    # both saw the same images: at the very start, both networks have the same loss
    losses = [re.search(r'Train: 0 \[ +0/.*?Loss: ([\d.]+)', (folder / 'log').read_text())[1] for folder in folders]
    assert losses[0] == losses[1]

    logs = {folder: (folder / 'log').read_text() for folder in folders}
    pd.testing.assert_frame_equal(go(), rows)
    assert logs == {folder: (folder / 'log').read_text() for folder in folders}

    # the second epoch was cut off, after its line in summary.csv and before its checkpoint
    (folders[0] / 'validate.json').unlink()
    checkpoint = torch.load(folders[0] / 'checkpoint-1.pth.tar', weights_only=False)
    (folders[0] / 'checkpoint-1.pth.tar').unlink()
    torch.save({**checkpoint, 'epoch': 0}, folders[0] / 'last.pth.tar')
    go()
    added = (folders[0] / 'log').read_text().removeprefix(logs[folders[0]])
    assert 'Train: 1 [' in added and 'Train: 0 [' not in added

    done = study(pictures, *common, '--epochs', 3, '--arms', 'plain', exit_code=1)
    assert 'has epochs 2, not 3: choose another --output' in done.stderr
