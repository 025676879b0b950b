"""`make study`: arms of a seed are pairs; the page says what the table holds and no more; what is done stays done."""
import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from helpers import ROOT, run
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_dataset, create_transform, resolve_model_data_config
from torch.utils.data import DataLoader

from timm_ela import ATTN_LAYERS
from timm_ela.hub.publish import convert_checkpoint

STUDIES = ROOT / 'weights_cards' / 'studies'
sys.path.insert(0, str(STUDIES))
import gates  # noqa: E402  not of the package
import report  # noqa: E402
import study  # noqa: E402

RUN = {
    'params': 4_000_000, 'train_images_per_second': 60.0, 'train_images': 50_000, 'test_images': 10_000, 'epochs': 3,
    'img_size': 96, 'recipe': '--opt sgd', 'hardware': 'a CPU', 'device': 'cpu', 'python': '3', 'torch': '2',
    'timm': '1', 'timm_ela': '0', 'train_py': 'ab',
}
BACKBONE = study.BACKBONE
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
    def page(rows, name='data'):
        report.write_report(rows, tmp_path / f'{name}.csv')
        return (tmp_path / f'{name}.md').read_text()

    return page


def test_the_arms_are_plain_and_layers_with_a_neutral_point():
    first, *others = report.ARMS
    assert first == 'plain' and all(ATTN_LAYERS[arm].neutral for arm in others)


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


def test_the_page_says_before_any_result_what_a_difference_must_be_to_count(page):
    # Holm tests the smallest p at 0.05 / 2: t with 2 degrees of freedom is 6.205 there, over the root of 3
    assert 'must exceed 3.6 standard deviations' in page(table(TOP1))
    assert 'must exceed' not in page(table({'plain': (50,), 'ela_b': (51,)}))


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
    assert ('Different from the plain model at the level 0.05, corrected: ELA-B +3.00 points (p < 0.001). The other '
            'differences are not significant.') in text
    assert 'the table ranks no layer' in page(table({'plain': (50, 51, 52), 'se': (52, 50, 53)}))
    assert 'the level 0.05' not in page(table({'plain': (50,), 'se': (52,)}))


def test_the_page_of_cifar10_marks_the_earlier_study_as_one_of_a_short_schedule(page):
    assert 'earlier study' not in page(table(TOP1))
    earlier = page(table(TOP1), 'cifar10').split('## An earlier study, from scratch')[1]
    rows = pd.read_csv(STUDIES / 'short-schedule' / 'cifar10.csv').query('start == "scratch" and attention == "ela_b"')
    assert f'ELA-B {rows.top1.mean():.1f} %' in earlier and 'numbers of a short schedule' in earlier


def test_the_picture_is_not_blank(page, tmp_path):
    assert '](data.png)' in page(table(TOP1))
    with Image.open(tmp_path / 'data.png') as picture:
        assert np.asarray(picture.convert('L')).std() > 10


def test_the_studies_that_ship_are_the_pages_of_their_tables(tmp_path):
    for path in [*STUDIES.glob('*.csv'), *STUDIES.glob('shipped/*.gates.csv')]:
        if path.stem.endswith('.gates'):
            text = gates.page(pd.read_csv(path), path.stem.removesuffix('.gates'))
            assert text == path.with_suffix('.md').read_text()
            continue
        report.write_report(pd.read_csv(path), tmp_path / path.name)
        for written in (path.name, f'{path.stem}.md'):
            assert (tmp_path / written).read_text() == (STUDIES / written).read_text()


def run_study(*args: object, **kwargs):
    return run([sys.executable, STUDIES / 'study.py', *args], **kwargs)


def test_a_folder_that_is_not_there_is_named_before_anything_runs(tmp_path, monkeypatch, capsys):
    args = tmp_path, '--scripts', tmp_path, '--output', tmp_path / 'out'
    monkeypatch.setattr(sys, 'argv', ['study.py', *map(str, args)])
    with pytest.raises(SystemExit, match='2'):
        study.main()
    assert f'there is no {tmp_path / "train"}' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_gates_are_measured_over_images_channels_and_positions_by_stage(randomize):
    torch.manual_seed(1)  # gates that differ within channels as well as between them
    model = randomize(timm.create_model('tf_efficientnet_lite0_ela_b')).eval()
    images = torch.randn(3, 3, 64, 96)
    maps = {}
    for name, module in model.named_modules():
        if name.startswith('blocks.2.') and name.endswith('.se'):
            module.register_forward_pre_hook(
                lambda m, args, name=name: maps.update({name: torch.einsum('nch,ncw->nchw', *m.gates(args[0]))}))
    with torch.no_grad():
        model(images)
    # each channel of each module counts once: their widths are alike, their sizes are not
    means = torch.cat([v.double().mean((0, 2, 3)) for v in maps.values()])
    squares = torch.cat([v.double().square().mean((0, 2, 3)) for v in maps.values()])
    measured = gates.measure_gates(model, [(images[:2], None), (images[2:], None)])
    assert sorted(measured) == [1, 2, 3, 4, 5, 6] and len(maps) == 2
    variance = squares.mean() - means.mean() ** 2
    within = squares.mean() - means.square().mean()
    assert 0.1 < within / variance < 0.9
    expected = [value.item() for value in (means.mean(), variance.sqrt(), within.sqrt())]
    assert measured[2] == pytest.approx(tuple(expected), rel=1e-4)


def test_frozen_gates_are_a_quarter_everywhere_and_the_trained_ones_stay(randomize):
    model = randomize(timm.create_model('tf_efficientnet_lite0_ela_s')).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    loader = [(torch.randn(2, 3, 64, 96), None)]
    assert set(gates.measure_gates(gates.freeze(model), loader).values()) == {(0.25, 0.0, 0.0)}
    assert all(min(spreads) > 0.01 for _, *spreads in gates.measure_gates(model, loader).values())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_the_page_of_the_gates_tells_how_far_they_moved_and_what_they_add():
    rows = [{'arm': 'ela_b', 'seed': seed, 'stage': stage, 'mean': 0.25 + 0.01 * stage, 'spread': 0.1, 'within': 0.05,
             'images': 8, 'top1': 90 + seed, 'top1_frozen': 88, 'test_images': 9}
            for seed in (0, 1) for stage in (1, 2)]
    expected = ['2', '90.50', '88.00', '-2.50', '+0.010, 0.100, 0.050', '+0.020, 0.100, 0.050']
    assert cells(gates.page(pd.DataFrame(rows), 'data'), 'ELA-B') == expected


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


def write_loop(path: Path) -> Path:
    """Writes what train.py does to its images: it seeds, makes a model, and prints the batches of epochs from START."""
    path.write_text("""
import sys
from timm.data import create_dataset, create_loader
from timm.models import create_model
from timm.utils import random_seed
model, data, start = sys.argv[1:4]
random_seed(int(sys.argv[sys.argv.index('--seed') + 1]))
create_model(model)
dataset = create_dataset('', data, split='train')
loader = create_loader(dataset, (3, 32, 32), 8, is_training=True, num_workers=2, use_prefetcher=False)
for epoch in range(int(start), 3):
    loader.sampler.set_epoch(epoch)
    print([(y.tolist(), x.double().sum((1, 2, 3)).tolist()) for x, y in loader])
""")
    return path


def test_two_models_of_a_seed_see_the_same_augmented_images_in_every_epoch_and_after_a_resume(
        forks, pictures, tmp_path):
    def batches(model: str, seed: int = 3, start: int = 0) -> list[str]:
        code = 'import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0])'
        loop = write_loop(tmp_path / 'loop.py')
        return forks(
            code, STUDIES / 'paired_train.py', loop, model, pictures, start, '--seed', seed).stdout.splitlines()

    plain = batches('resnet18')
    assert len({*plain}) == 3  # each epoch has an order of its own
    assert batches('resnet18_ela_b') == plain
    assert batches('resnet18_ela_b', start=1) == plain[1:]
    assert not {*batches('resnet18', seed=4)} & {*plain}


@pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ, reason='TIMM_SCRIPTS is not set: the folder of timm\'s train.py and its like')
def test_two_arms_that_do_not_learn_have_the_same_losses_to_the_digit(pictures, tmp_path):
    """They stay the network they started as, the same to the bit: equal losses mean equal images."""
    model = timm.create_model('resnet18', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'plain.pth')
    convert_checkpoint(tmp_path / 'plain.pth', 'resnet18_ela_b', tmp_path / 'start')
    train = [sys.executable, STUDIES / 'paired_train.py', Path(os.environ['TIMM_SCRIPTS']).resolve() / 'train.py']

    def losses(model: str, start: Path, seed: int) -> list[float]:
        name = f'{model}.{seed}'
        run([*train, '--data-dir', pictures, '--val-split', 'test', '--model', model, '--initial-checkpoint', start,
             '--num-classes', 3, '--img-size', 32, '--batch-size', 20, '--epochs', 2, '--warmup-epochs', 0,
             '--lr', 1e-30, '--workers', 2, '--device', 'cpu', '--seed', seed,
             '--output', tmp_path, '--experiment', name])
        return list(pd.read_csv(tmp_path / name / 'summary.csv').train_loss)

    plain = losses('resnet18', tmp_path / 'plain.pth', seed=0)
    assert plain[0] != plain[1]
    assert losses('resnet18_ela_b', tmp_path / 'start' / 'model.safetensors', seed=0) == plain
    assert losses('resnet18', tmp_path / 'plain.pth', seed=1) != plain


@pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ, reason='TIMM_SCRIPTS is not set: the folder of timm\'s train.py and its like')
def test_a_study_starts_all_arms_from_one_network_runs_once_and_goes_on_where_it_was_cut_off(pictures, tmp_path):
    out, scripts = tmp_path / 'runs', Path(os.environ['TIMM_SCRIPTS']).resolve()
    common = ('--scripts', scripts, '--output', out, '--images', 32, '--seeds', 1, '--img-size', 32)

    def go():
        run_study(pictures, *common, '--epochs', 2, '--arms', 'plain', 'ela_b')
        return pd.read_csv(out / 'tints.csv')

    rows = go()
    assert list(rows.arm) == ['plain', 'ela_b'] and list(rows.train_images) == 2 * [96]
    assert (rows.train_images_per_second > 0).all()
    folders = [out / f'{name}.seed0' for name in (BACKBONE, f'{BACKBONE}_ela_b')]
    for row, folder in zip(rows.itertuples(), folders, strict=True):
        assert row.top1 == json.loads((folder / 'validate.json').read_text())['top1']

    plain, ours = torch.load(out / 'plain.seed0.pth'), load_file(folders[1] / 'start' / 'model.safetensors')
    assert all(torch.equal(ours[k], v) for k, v in plain.items() if 'bn3' not in k)
    x, logits = torch.randn(2, 3, 32, 32), []
    for name, weights in ((BACKBONE, plain), (f'{BACKBONE}_ela_b', ours)):
        model = timm.create_model(name, num_classes=3).eval()
        model.load_state_dict(weights)
        logits.append(model(x))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5 * logits[0].abs().max().item())

    run([sys.executable, STUDIES / 'gates.py', pictures, '--runs', out])
    learnt = pd.read_csv(out / 'tints.gates.csv')
    for row in rows.iloc[1:].itertuples():
        of_arm = learnt[learnt.arm == row.arm]
        assert list(of_arm.stage) == [1, 2, 3, 4, 5, 6] and (of_arm.top1 == row.top1).all()
    assert (learnt.spread > 0).all() and (learnt.test_images == 24).all()
    # with frozen gates the images are prepared as validate.py prepares them
    model, _ = gates.measure_run(folders[1], pictures, images=8)
    transform = create_transform(**resolve_model_data_config(model))
    test = DataLoader(create_dataset('', pictures, split='test', transform=transform), 24)
    assert gates.measure_top1(model, test) == rows.top1[1]
    with Image.open(out / 'tints.gates.webp') as picture:
        assert np.asarray(picture.convert('L')).std() > 10

    logs = {folder: (folder / 'log').read_text() for folder in folders}
    pd.testing.assert_frame_equal(go(), rows)
    assert logs == {folder: (folder / 'log').read_text() for folder in folders}

    # the second epoch was cut off: what train.py left is the first one's checkpoint
    before = torch.load(folders[1] / 'checkpoint-1.pth.tar', weights_only=False)['state_dict']
    (folders[1] / 'validate.json').unlink()
    for name in ('checkpoint-1', 'last'):
        (folders[1] / f'{name}.pth.tar').unlink()
    (folders[1] / 'last.pth.tar').hardlink_to(folders[1] / 'checkpoint-0.pth.tar')
    go()
    added = (folders[1] / 'log').read_text().removeprefix(logs[folders[1]])
    assert 'Train: 1 [' in added and 'Train: 0 [' not in added
    after = torch.load(folders[1] / 'checkpoint-1.pth.tar', weights_only=False)['state_dict']
    assert all(torch.equal(v, after[k]) for k, v in before.items())

    done = run_study(pictures, *common, '--epochs', 3, '--arms', 'plain', exit_code=1)
    assert 'has epochs 2, not 3: choose another --output' in done.stderr
    assert set(pd.read_csv(out / 'tints.csv').epochs) == {2}  # the table is as it was

    # a part that was done elsewhere is not done again, and the pairs are the same
    part, elsewhere = tmp_path / 'part.csv', tmp_path / 'elsewhere'
    rows[rows.arm == 'plain'].to_csv(part, index=False)
    again = [word if word != out else elsewhere for word in common]
    run_study(pictures, *again, '--epochs', 2, '--arms', 'plain', 'ela_b', '--done', part)
    assert not (elsewhere / f'{BACKBONE}.seed0').exists()
    assert list(pd.read_csv(elsewhere / 'tints.csv').top1) == list(rows.top1[:2])
    done = run_study(pictures, *again, '--epochs', 3, '--arms', 'ela_b', '--done', part, exit_code=1)
    assert 'part.csv: plain of seed 0 has epochs 2, not 3' in done.stderr
