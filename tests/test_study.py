"""`make study`: arms of a seed are pairs; the page says what the table holds and no more; what is done stays done."""
import json
import os
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from helpers import ROOT, run
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from timm_ela import graft_state_dict

STUDIES = ROOT / 'weights_cards' / 'studies'
SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS', '')).resolve()
sys.path.insert(0, str(STUDIES))
import gates  # noqa: E402  not of the package
import report  # noqa: E402
import study  # noqa: E402

RUN = {
    'params': 4_000_000, 'train_images_per_second': 60.0, 'train_images': 50_000, 'test_images': 10_000, 'epochs': 3,
    'img_size': 96, 'recipe': '--opt sgd', 'hardware': 'a CPU', 'device': 'cpu', 'python': '3', 'torch': '2',
    'timm': '1', 'timm_ela': '0', 'train_py': 'ab',
}
TOP1 = {'plain': (50, 51, 52), 'ela_b': (51, 53, 55), 'se': (52, 50, 53)}  # of the seeds 0, 1, 2


def page(top1: dict[str, tuple[float, ...]]) -> str:
    """The page of a study in which the seeds of each arm had this top-1."""
    return report.page(pd.DataFrame([
        {**RUN, 'arm': arm, 'seed': seed, 'top1': value}
        for arm, values in top1.items() for seed, value in enumerate(values)]), 'data.scratch')


def cells(page: str, first: str) -> list[str]:
    """The cells of the line whose first one is this, but for that one."""
    line = next(line for line in page.splitlines() if line.startswith(f'| {first} |'))
    return [cell.strip() for cell in line.split('|')[2:-1]]


def test_an_interval_is_students_of_the_differences_seed_by_seed():
    text = page(TOP1)
    # differences 1, 2, 3: mean 2, standard deviation 1; the 97.5 % point of t with 2 degrees of freedom is 4.303
    assert cells(text, 'ELA-B')[:3] == ['3', '53.00 ± 2.00', f'+2.00 [{2 - 4.303 / 3 ** 0.5:+.2f}, +4.48]']
    # differences that do not vary have no test
    assert cells(page({'plain': (50, 51, 52), 'ela_b': (49.9, 50.9, 51.9)}), 'ELA-B')[2:4] == ['', '']
    assert cells(text, 'none') == ['3', '51.00 ± 1.00', '', '', '4,000,000', '41.7']  # 3 * 50,000 / 60 seconds
    text = page({'plain': (9, 9, 9), 'ela_b': TOP1['plain'], 'ela_b_neutral': TOP1['ela_b']})
    assert 'paired by seed: +2.00 points, with an uncorrected 95 % interval of [-0.48, +4.48]' in text


def test_p_values_are_corrected_for_their_number():
    # times 4, 3, 2, 1 in ascending order, never below the one before
    np.testing.assert_allclose(report.holm(pd.Series([0.01, 0.04, 0.03, 0.5])), [0.04, 0.09, 0.09, 0.5])


def test_the_page_says_before_any_result_what_a_difference_must_be_to_count():
    # Holm tests the smallest p at 0.05 / 2: t with 2 degrees of freedom is 6.205 there, over the root of 3
    assert 'must exceed 3.6 standard deviations' in page(TOP1)
    assert 'must exceed' not in page({'plain': (50,), 'ela_b': (51,)})


def test_a_sentence_claims_no_more_than_the_corrected_test():
    text = page({'plain': (50, 51, 52), 'ela_b': (53, 54.01, 54.99), 'se': (52, 50, 53)})
    assert ('Different from the plain model at the level 0.05, corrected: ELA-B +3.00 points (p < 0.001). The other '
            'differences are not significant.') in text
    assert 'the table ranks no layer' in page({'plain': (50, 51, 52), 'se': (52, 50, 53)})
    assert 'the level 0.05' not in page({'plain': (50,), 'se': (52,)})


def test_the_studies_that_ship_are_the_pages_of_their_tables(tmp_path):
    tables_of_gates = {*STUDIES.rglob('*.gates.csv')}
    for path in tables_of_gates:
        text = gates.page(pd.read_csv(path), path.stem.removesuffix('.gates'))
        assert text == path.with_suffix('.md').read_text()
    for path in {*STUDIES.glob('*.csv')} - tables_of_gates:
        report.write_report(pd.read_csv(path), tmp_path / path.name)
        for written in (path, path.with_suffix('.md')):
            assert (tmp_path / written.name).read_text() == written.read_text()


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


def test_frozen_gates_are_a_quarter_everywhere_and_the_models_own_stay(randomize):
    model = randomize(timm.create_model('tf_efficientnet_lite0_ela_s')).eval()
    loader = [(torch.randn(2, 3, 64, 96), None)]
    measured = gates.measure_gates(model, loader)
    assert set(gates.measure_gates(gates.freeze(model), loader).values()) == {(0.25, 0.0, 0.0)}
    assert gates.measure_gates(model, loader) == measured


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for folder in product(('train', 'test'), ('blue', 'green', 'red')):
        path = tmp_path.joinpath('tints', *folder)
        path.mkdir(parents=True)
        for i in range(40):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), 'uint8')).save(path / f'{i}.png')
    return tmp_path / 'tints'


needs_scripts = pytest.mark.skipif(
    'TIMM_SCRIPTS' not in os.environ, reason='TIMM_SCRIPTS is not set: the folder of timm\'s train.py and its like')


def make_starts(name: str, arms: tuple[str, ...], seed: int = 0) -> list[nn.Module]:
    """Models of a study's arms before training."""
    starts = []
    for arm in arms:
        run = study.Run(arm, seed, study.model_name(study.STUDIES[name], arm), Path())
        model = timm.create_model(run.model, num_classes=3).eval()
        model.load_state_dict(study.make_start(study.STUDIES[name], run, 3))
        starts.append(model)
    return starts


@pytest.mark.parametrize(('name', 'arms'), [('finetune', ('plain', 'ela_b')), ('scratch', ('plain', 'ela_b_neutral'))])
def test_a_graft_starts_as_the_plain_model_of_its_seed(name, arms):
    models, x = make_starts(name, arms), torch.randn(2, 3, 32, 32)
    plain, grafted = (model(x) for model in models)
    torch.testing.assert_close(grafted, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
    assert not models[1].get_parameter('blocks.2.0.se.gn.weight').any()
    assert (make_starts(name, arms[:1], seed=1)[0](x) - plain).abs().max() > 0.1 * plain.abs().max()


def test_from_scratch_all_arms_share_the_plain_models_weights_and_the_layers_are_as_published():
    plain, se, ours = (model.state_dict() for model in make_starts('scratch', ('plain', 'se', 'ela_b')))
    assert all(torch.equal(v, se[k]) and torch.equal(v, ours[k]) for k, v in plain.items())
    assert (ours['blocks.2.0.se.gn.weight'] == 1).all() and se['blocks.2.0.se.fc2.weight'].any()


@needs_scripts
def test_two_arms_that_do_not_learn_have_the_same_losses_to_the_digit(pictures, tmp_path):
    """They stay the network they started as, the same to the bit: equal losses mean equal images in equal batches."""
    plain = timm.create_model('resnet18', num_classes=3).state_dict()
    torch.save(plain, tmp_path / 'resnet18.pth')
    torch.save(
        graft_state_dict(plain, timm.create_model('resnet18_ela_b', num_classes=3)), tmp_path / 'resnet18_ela_b.pth')

    def losses(model: str, seed: int) -> list[float]:
        name = f'{model}.{seed}'
        run([sys.executable, STUDIES / 'paired_train.py', SCRIPTS / 'train.py',
             '--data-dir', pictures, '--val-split', 'test', '--model', model,
             '--initial-checkpoint', tmp_path / f'{model}.pth', '--num-classes', 3, '--img-size', 32,
             '--batch-size', 20, '--epochs', 2, '--warmup-epochs', 0, '--lr', 1e-30, '--workers', 2, '--device', 'cpu',
             '--seed', seed, '--output', tmp_path, '--experiment', name])
        return list(pd.read_csv(tmp_path / name / 'summary.csv').train_loss)

    first, second = losses('resnet18', seed=0)
    assert first != second
    assert losses('resnet18_ela_b', seed=0) == [first, second]
    assert losses('resnet18', seed=1)[0] != first


@needs_scripts
def test_a_study_runs_once_and_goes_on_where_it_was_cut_off(pictures, tmp_path):
    table, folder = tmp_path / 'tints.scratch.csv', tmp_path / 'tints.scratch'
    plain, ours = folder / 'plain.seed0', folder / 'ela_b.seed0'

    def run_study(**kwargs):
        return run([
            sys.executable, STUDIES / 'study.py', 'scratch', pictures, '--scripts', SCRIPTS, '--output', tmp_path,
            '--layers', 'ela_b', '--seeds', 1, '--epochs', 2, '--images', 32, '--img-size', 32], **kwargs)

    run_study()
    rows = pd.read_csv(table)
    assert list(rows.arm) == ['plain', 'ela_b'] and list(rows.train_images) == 2 * [96]
    assert (rows.train_images_per_second > 0).all()
    for row in rows.itertuples():
        model, test = gates.load_run(row, folder / f'{row.arm}.seed0', pictures)
        assert row.top1 == gates.measure_top1(model, DataLoader(test, 120)) == float(row.top1_by_epoch.split()[1])

    run([sys.executable, STUDIES / 'gates.py', pictures, table])
    learnt = pd.read_csv(tmp_path / 'tints.scratch.gates.csv')
    assert list(learnt.stage) == [1, 2, 3, 4, 5, 6] and (learnt.top1 == rows.top1[1]).all()
    assert (learnt.spread > 0).all() and (learnt.test_images == 120).all()

    # the second epoch was cut off: what train.py left is the first one's checkpoint
    logs = {path: (path / 'log').read_text() for path in (plain, ours)}
    before = torch.load(ours / 'checkpoint-1.pth.tar', weights_only=False)['state_dict']
    for name in ('checkpoint-1', 'last'):
        (ours / f'{name}.pth.tar').unlink()
    (ours / 'last.pth.tar').hardlink_to(ours / 'checkpoint-0.pth.tar')
    run_study()
    pd.testing.assert_frame_equal(pd.read_csv(table), rows)
    assert (plain / 'log').read_text() == logs[plain]
    added = (ours / 'log').read_text().removeprefix(logs[ours])
    assert 'Train: 1 [' in added and 'Train: 0 [' not in added
    after = torch.load(ours / 'checkpoint-1.pth.tar', weights_only=False)['state_dict']
    assert all(torch.equal(v, after[k]) for k, v in before.items())

    made = json.loads((plain / 'study.json').read_text())
    (plain / 'study.json').write_text(json.dumps({**made, 'timm_ela': '0.0.1'}))
    refused = run_study(exit_code=1)
    assert f'timm_ela 0.0.1, not {made["timm_ela"]}: choose another --output' in refused.stderr
