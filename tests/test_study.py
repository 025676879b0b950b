"""`make study`: the page says what the table holds and no more; what is done is not done again."""
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, run
from PIL import Image

sys.path.insert(0, str(ROOT / 'weights_cards'))
import study_report as report

STUDY = ROOT / 'weights_cards' / 'study.py'
RUN = {
    'backbone': 'mobilenetv2_050', 'start': 'scratch', 'best_top1': 60, 'params': 700_000, 'macs': 8_000_000,
    'train_images_per_second': 400, 'train_images': 40_000, 'test_images': 10_000, 'epochs': 4, 'img_size': 64,
    'recipe': '--opt sgd', 'hardware': 'a CPU', 'device': 'cpu', 'threads': 1, 'parallel_runs': 2, 'python': '3',
    'torch': '2', 'timm': '1', 'timm_ela': '0', 'train_py': 'ab',
}
TOP1 = {'plain': (50, 51, 52), 'ela_b': (51, 53, 55), 'se': (52, 50, 53)}  # of the seeds 0, 1, 2


def runs(top1: dict[str, tuple[float, ...]], **changes) -> list[dict[str, object]]:
    return [{**RUN, 'attention': arm, 'seed': seed, 'top1': value, **changes}
            for arm, values in top1.items() for seed, value in enumerate(values)]


def cells(page: str, first: str) -> list[str]:
    """The cells of the line whose first one is this, but for that one."""
    line = next(line for line in page.splitlines() if line.startswith(f'| {first} |'))
    return [cell.strip() for cell in line.split('|')[2:-1]]


@pytest.fixture
def page(tmp_path):
    def page(rows):
        report.write_report(tmp_path / 'studies' / 'data.csv', rows)
        return (tmp_path / 'studies' / 'data.md').read_text()

    return page


def test_an_interval_is_students_of_the_differences_seed_by_seed(page):
    text = page(runs(TOP1))
    # differences 1, 2, 3: mean 2, standard deviation 1; the 97.5 % point of t with 2 degrees of freedom is 4.303
    assert cells(text, 'ELA-B')[:3] == ['3', '53.00 ± 2.00', f'+2.00 [{2 - 4.303 / 3 ** 0.5:+.2f}, +4.48]']
    assert cells(text, 'none')[:3] == ['3', '51.00 ± 1.00', '']


def test_seeds_that_the_plain_model_has_not_run_are_in_no_difference():
    assert report.paired({'0': 1.0, '1': 3.0, '2': 9.0}, {'0': 0.0, '1': 1.0})[0] == 1.5
    assert report.paired({'0': 1.0}, {'0': 0.0}) is None  # one difference has no spread


def test_what_was_not_run_is_an_empty_cell(page):
    text = page(runs(TOP1))
    assert not any(cells(text, 'ELA-T')) and not any(cells(text, 'Coordinate Attention'))
    assert all(cells(text, 'Squeeze-and-Excitation'))


def test_a_sentence_claims_no_more_than_its_interval():
    assert report.verdict('X', (0.5, 0.6)) == (
        'X is 0.50 points above the plain model, and its interval holds zero: no difference is shown.')
    assert report.verdict('X', (-0.5, 0.4)) == (
        'X is 0.50 points below the plain model, and its interval does not hold zero.')


def test_runs_from_a_graft_stand_apart_from_those_from_scratch(page):
    text = page(runs(TOP1) + runs({'ela_b': (53, 54, 55)}, start='plain, 2 epochs'))
    assert cells(text, 'ELA-B')[1] == cells(text, 'ELA-B from scratch')[1] == '53.00 ± 2.00'
    assert cells(text, 'ELA-B from plain, 2 epochs')[:3] == ['3', '54.00 ± 1.00', '+3.00 [+3.00, +3.00]']


def test_the_pictures_are_those_of_the_page_and_not_blank(page, tmp_path):
    text = page(runs(TOP1))
    pictures = sorted(path.name for path in (tmp_path / 'studies').glob('*.png'))
    assert pictures == ['data.mobilenetv2_050.params.png', 'data.mobilenetv2_050.train_images_per_second.png']
    for name in pictures:
        assert f']({name})' in text
        with Image.open(tmp_path / 'studies' / name) as picture:
            assert np.asarray(picture.convert('L')).std() > 10


def test_of_one_arm_alone_there_is_no_picture(page, tmp_path):
    text = page(runs({'ela_b': (51, 53, 55)}))
    assert cells(text, 'ELA-B')[:2] == ['3', '53.00 ± 2.00']
    assert '![' not in text and not list((tmp_path / 'studies').glob('*.png'))


def test_the_studies_that_ship_are_the_pages_of_their_tables(tmp_path):
    tables = list((ROOT / 'weights_cards' / 'studies').glob('**/*.csv'))
    assert tables
    for table in tables:
        report.write_report(tmp_path / table.name, report.read(table))
        for written in (table.name, f'{table.stem}.md'):
            assert (tmp_path / written).read_text() == (table.parent / written).read_text()
        shown = set(re.findall(r'\]\((\S+\.png)\)', (table.parent / f'{table.stem}.md').read_text()))
        assert shown == {path.name for path in table.parent.glob(f'{table.stem}.*.png')}


def test_the_readme_quotes_the_study_that_ships():
    readme = ' '.join((ROOT / 'README.md').read_text().split())
    rows = report.read(ROOT / 'weights_cards' / 'studies' / 'cifar10.csv')
    plain = report.top1(report.of(rows, attention='plain'))
    for arm, start in (('ela_b', report.SCRATCH), ('ela_s', report.SCRATCH), ('ela_b', 'plain, 2 epochs'),
                       ('se', report.SCRATCH), ('ca', report.SCRATCH)):
        middle, half = report.paired(report.top1(report.of(rows, attention=arm, start=start)), plain)
        assert f'{middle:+.2f} [{middle - half:+.2f}, {middle + half:+.2f}]' in readme


@pytest.mark.parametrize(('changes', 'said'), [
    ({'epochs': 8}, 'epochs is 4 in some runs, 8 in others'),
    ({'device': 'cuda'}, 'device is cpu in some runs, cuda in others'),
    ({'recipe': '--opt adam'}, 'recipe is --opt adam in some runs, --opt sgd in others'),
])
def test_runs_that_were_made_otherwise_are_not_compared(changes, said):
    with pytest.raises(ValueError, match=said):
        report.check_one_study(runs(TOP1) + runs({'eca': (50, 50, 50)}, **changes))
    report.check_one_study(runs(TOP1) + runs({'ela_b': (50, 50, 50)}, start='a graft', recipe='its own'))


def study(*args: object, **kwargs):
    return run([sys.executable, STUDY, *args], **kwargs)


def test_a_folder_that_is_not_there_is_named_before_anything_runs(tmp_path):
    done = study(tmp_path, '--scripts', tmp_path, '--output', tmp_path / 'out', exit_code=2)
    assert f'there is no {tmp_path / "train"}' in done.stderr
    assert not (tmp_path / 'out').exists()


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
def test_a_study_runs_once_and_goes_on_where_it_was_cut_off(pictures, tmp_path):
    out, scripts = tmp_path / 'runs', Path(os.environ['TIMM_SCRIPTS']).resolve()
    common = ('--scripts', scripts, '--output', out, '--images', 30, '--seeds', 1)

    def go():
        study(pictures, *common, '--epochs', 2, '--arms', 'plain', 'ela_b')
        return report.read(out / 'studies' / 'tints.csv')

    rows = go()
    assert [(row['model'], row['start'], row['train_images']) for row in rows] == [
        ('mobilenetv2_050', 'scratch', '90'), ('mobilenetv2_050_ela_b', 'scratch', '90'),
        ('mobilenetv2_050_ela_b', 'plain, 1 epochs', '90')]
    assert all(float(row['train_images_per_second']) > 0 for row in rows)

    plain = out / 'mobilenetv2_050.seed0'
    assert float(rows[0]['top1']) == json.loads((plain / 'validate.json').read_text())['top1']
    logs = {path: path.read_text() for path in out.glob('*/log')}
    assert len(logs) == 3
    assert go() == rows
    assert logs == {path: path.read_text() for path in out.glob('*/log')}

    # the plain model's second epoch was cut off, after its line in summary.csv and before its checkpoint
    (plain / 'validate.json').unlink()
    for name in ('last', 'checkpoint-1'):
        (plain / f'{name}.pth.tar').unlink()
    (plain / 'last.pth.tar').hardlink_to(plain / 'checkpoint-0.pth.tar')
    assert [row['resumed'] for row in go()] == ['1', '0', '0']
    added = (plain / 'log').read_text().removeprefix(logs[plain / 'log'])
    assert 'Train: 1 [' in added and 'Train: 0 [' not in added

    done = study(pictures, *common, '--epochs', 3, '--arms', 'plain', exit_code=1)
    assert 'is a run with epochs 2, not 3: choose another --output' in done.stderr

    # what the table has is not done again elsewhere, where it was made as it would be made now
    table, elsewhere = out / 'studies' / 'tints.csv', tmp_path / 'elsewhere'
    common = ('--scripts', scripts, '--output', elsewhere, '--studies', table.parent, '--images', 30, '--seeds', 1)
    study(pictures, *common, '--epochs', 2, '--arms', 'plain', 'eca')
    assert [path.parent.name for path in elsewhere.glob('*/log')] == ['mobilenetv2_050_eca.seed0']
    assert [row['attention'] for row in report.read(table)] == ['plain', 'eca', 'ela_b', 'ela_b']
    done = study(pictures, *common, '--epochs', 3, '--arms', 'plain', exit_code=1)
    assert 'is a run with epochs 2, not 3: choose another --studies' in done.stderr
    assert len(report.read(table)) == 4
