"""A run of train.py -> a folder -> `timm.create_model('local-dir:FOLDER', pretrained=True)`."""
import json
import shlex
from copy import deepcopy
from pathlib import Path

import pytest
import timm
import torch
from folders import FILES, MODEL, PLAIN, TRAINED, card, give_equal_logits, have_equal_weights, load, metrics
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.layers import convert_splitbn_model
from timm.models import parse_model_name, split_model_name_tag

from timm_ela.cli import main
from timm_ela.hub.publish import export_run

NAMES = ['日本', 'água', 'a b']


@pytest.fixture
def exported(new_model, write_run, tmp_path):
    """Exports a run of a new model."""
    def export(name: str = MODEL, **changes) -> Path:
        return export_run(write_run(new_model(name), **changes), tmp_path / 'out')
    return export


@pytest.mark.parametrize('kwargs, args', [
    ({}, {}),
    ({'in_chans': 1}, {'in_chans': 1}),
    ({'global_pool': 'max'}, {'gp': 'max'}),
    ({'act_layer': 'silu'}, {'model_kwargs': {'act_layer': 'silu'}}),
    ({'bn_eps': 0.1}, {'bn_eps': 0.1}),
], ids=['plain', 'one channel', 'max pooling', 'model_kwargs', 'bn_eps'])
def test_an_exported_run_comes_back_with_equal_weights_and_logits(new_model, write_run, tmp_path, kwargs, args):
    model = new_model(**kwargs)
    folder = export_run(write_run(model, **args), tmp_path / 'out')
    loaded = load(folder)
    assert have_equal_weights(model, loaded) and give_equal_logits(model, loaded)
    assert loaded.num_classes == model.num_classes
    config = resolve_model_data_config(loaded)
    channels = kwargs.get('in_chans', 3)
    assert tuple(config['input_size']) == (channels, 64, 64) and len(config['mean']) == len(config['std']) == channels
    assert {path.name for path in folder.iterdir()} == FILES | {'args.yaml'}
    assert 'num_classes' not in json.loads((folder / 'config.json').read_text())['model_args']


def test_the_config_says_how_the_run_saw_its_images(exported):
    seen = {'input_size': (3, 96, 128), 'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6), 'crop_pct': 0.75,
            'interpolation': 'bilinear'}
    args = {k: list(v) if isinstance(v, tuple) else v for k, v in seen.items()}
    model = load(exported(**args, img_size=None, data_dir='/gone/Some Flowers'))
    config = resolve_model_data_config(model)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in seen} == seen
    assert model.pretrained_cfg['tag'] == 'some_flowers' and model.pretrained_cfg['architecture'] == MODEL


@pytest.mark.parametrize('dataset', ['ILSVRC/imagenet-1k', '花 (ü): 2/3?'])
def test_a_tag_can_stand_in_the_name_of_a_model(new_model, write_run, tmp_path, dataset):
    run = write_run(new_model())
    tag = load(export_run(run, tmp_path / 'out', dataset=dataset)).pretrained_cfg['tag']
    assert parse_model_name(f'{MODEL}.{tag}') == (None, f'{MODEL}.{tag}')
    assert split_model_name_tag(f'{MODEL}.{tag}') == (MODEL, tag) and not set(tag) & set(' ()?*[]')


@pytest.mark.parametrize('kept, ema, force_cpu, weights, measured', [
    (False, True, False, 'raw', TRAINED),
    (False, False, False, 'raw', TRAINED),
    (True, True, False, 'average', TRAINED),
    (True, False, False, 'raw', {}),
    (True, True, True, 'raw', TRAINED),  # train.py then measures the raw weights
])
def test_the_weights_are_those_that_were_measured(
        new_model, write_run, tmp_path, kept, ema, force_cpu, weights, measured):
    models = {'raw': new_model(), 'average': new_model()}
    run = write_run(models['raw'], models['average'] if kept else None, model_ema_force_cpu=force_cpu)
    folder = export_run(run, tmp_path / 'out', ema=ema)
    assert have_equal_weights(load(folder), models[weights])
    assert metrics(folder) == measured
    assert ('%' in card(folder).text) == bool(measured)
    assert ('moving average' in card(folder).text) == (weights == 'average')


def test_of_weights_alone_the_card_says_what_is_known(new_model, write_run, tmp_path, capsys):
    average, run = new_model(), write_run(new_model(), new_model())
    weights = {k: v.float() for k, v in average.state_dict().items()}
    save_file(weights, run / 'avg.safetensors')  # as timm's avg_checkpoints.py writes them
    with pytest.raises(SystemExit):
        main(['convert', str(run / 'avg.safetensors'), '--model', MODEL, str(tmp_path / 'out')])
    advice = capsys.readouterr().err.split('`')[1]
    assert '--checkpoint' in advice
    main(shlex.split(advice.replace('RUN', str(run)).removeprefix('timm-ela ')))
    assert have_equal_weights(load(tmp_path / 'out'), average)
    said = 'Weights: not known whether averaged. Their accuracy was not measured.\n'
    assert said in card(tmp_path / 'out').text


@pytest.mark.parametrize('validation, kept', [(None, False), ('validation', True), ('val', True)])
def test_an_accuracy_that_was_measured_on_training_images_too_is_left_out(
        new_model, write_run, tmp_path, caplog, validation, kept):
    image = tmp_path / 'data' / 'train' / 'a' / '1.png'
    image.parent.mkdir(parents=True)
    image.touch()
    if validation:
        (tmp_path / 'data' / validation).mkdir()
    run = write_run(new_model(), data_dir=str(tmp_path / 'data'))
    assert metrics(export_run(run, tmp_path / 'out')) == (TRAINED if kept else {})
    assert ("no 'validation': train.py measured the accuracy on training images too" in caplog.text) != kept


def test_a_run_with_split_batch_norm_is_exported_without_what_is_for_training_alone(new_model, write_run, tmp_path):
    model = new_model()
    split = convert_splitbn_model(deepcopy(model), 2)
    assert any('aux_bn' in key for key in split.state_dict())
    assert have_equal_weights(load(export_run(write_run(split, split_bn=True, aug_splits=2), tmp_path / 'out')), model)


@pytest.mark.parametrize('row, checkpoint, measured', [
    # A resumed run: its last line is what was saved.
    ('1,2.0,1.5,12.5,50.0,0.1\r\n', 'model_best.pth.tar', {'top1': 12.5, 'top5': 50.0}),
    ('1,2.0,,,,0.1\r\n', 'model_best.pth.tar', {}),
    ('', 'last.pth.tar', {'top1': 60.0, 'top5': 84.75}),
])
def test_the_accuracy_is_in_the_last_row_of_the_checkpoints_epoch(
        new_model, write_run, tmp_path, row, checkpoint, measured):
    run = write_run(new_model())
    with (run / 'summary.csv').open('a') as file:
        file.write(row)
    folder = export_run(run, tmp_path / 'out', checkpoint=checkpoint)
    assert metrics(folder) == measured
    assert load(folder).get_classifier().bias.any() == (checkpoint == 'model_best.pth.tar')


@pytest.mark.parametrize('name, args, base, license, start', [
    (MODEL, {'pretrained': True}, 'timm/mobilenetv2_050.lamb_in1k', 'apache-2.0', 'timm/mobilenetv2_050.lamb_in1k'),
    ('resnet18_ela_t', {'pretrained': True, 'model': 'resnet18_ela_t.graft_tv_in1k'}, 'timm/resnet18.tv_in1k',
     'bsd-3-clause', 'timm/resnet18.tv_in1k'),
    (MODEL, {'pretrained': False}, None, None, None),
    (MODEL, {'pretrained': True, 'pretrained_path': '/my/plain.pth'}, None, None, 'plain.pth'),
    # train.py does not read it
    (MODEL, {'pretrained': False, 'pretrained_path': '/my/plain.pth'}, None, None, None),
    (MODEL, {'pretrained': True, 'initial_checkpoint': '/my/model.safetensors'}, None, None, 'model.safetensors'),
])
def test_the_base_model_and_its_licence_are_those_of_the_weights_that_the_run_began_with(
        exported, name, args, base, license, start):
    made = card(exported(name, **args))
    assert (made.data.base_model, made.data.license) == (base, license)
    assert f"trained with timm's `train.py`{f' from `{start}`' if start else ''}. Licence" in made.text


def test_the_card_is_a_valid_model_card_with_the_accuracy_the_recipe_and_the_versions(new_model, write_run):
    run = write_run(new_model(), data_dir='/gone/data', val_split='test')
    folder = export_run(run, run.parent / 'out', dataset='Some Flowers')
    data, text = card(folder).data, card(folder).text
    assert (data.library_name, data.pipeline_tag, data.model_name) == (
        'timm', 'image-classification', f'{MODEL} on Some Flowers')
    assert {'timm', 'ela'} <= set(data.tags) and f'# {MODEL}, trained on Some Flowers\n' in text
    assert {(r.dataset_name, r.dataset_split, r.metric_type) for r in data.eval_results} == {
        ('Some Flowers', 'test', 'accuracy')}
    assert 'On the test split, after epoch 1 ' in text and '70.50 %' in text and '64 x 64' in text
    assert 'Epochs: 8, batch size: 64, optimizer: adamw. [args.yaml](./args.yaml) holds all arguments but' in text
    assert '\ntrain.py --config args.yaml --data-dir DATA\n' in text
    assert f'timm {timm.__version__}, torch {torch.__version__}' in text
    assert '\n\n\n' not in text and '{' not in text.split('```bibtex')[0]


def test_a_card_of_a_second_stage_has_the_licence_of_the_first(new_model, write_run, tmp_path):
    first = export_run(write_run(new_model()), tmp_path / 'first', license='mit')
    (tmp_path / 'run').rename(tmp_path / 'earlier')
    for start, license in (({}, 'mit'), ({'initial_checkpoint': '/my/other.pth'}, None)):
        run = write_run(new_model(), model=f'local-dir:{first}', pretrained=True, **start)
        second = export_run(run, tmp_path / f'second{license}')
        assert (card(second).data.license, card(second).data.base_model) == (license, None)
        assert f" from `{start.get('initial_checkpoint', 'local-dir:first').rpartition('/')[2]}`. " in card(second).text
        run.rename(tmp_path / f'run{license}')


@pytest.mark.parametrize('name, is_ours', [('mobilenetv2_050_ca', True), (PLAIN, False)])
def test_the_card_of_a_model_without_ela_does_not_name_ela(exported, name, is_ours):
    folder = exported(name)
    text = card(folder).text
    assert load(folder).num_classes == 7
    assert ('2103.02907' in text) == ('timm_ela (' in text) == is_ours
    assert 'ELA' not in text and '2403.01123' not in text and 'ela' not in card(folder).data.tags


@pytest.mark.parametrize('file, args, names', [
    ('names.txt', {}, NAMES),
    (None, {'class_map': 'map.txt'}, NAMES[::-1]),
    (None, {}, sorted(NAMES)),
    (None, {'num_classes': 4}, None),
    (None, {'class_map': 'gone.txt'}, None),
    (None, {'data_dir': 'gone'}, None),
])
def test_class_names_come_from_the_file_or_the_class_map_or_the_data(
        new_model, write_run, tmp_path, monkeypatch, caplog, file, args, names):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        (tmp_path / 'data' / 'train' / name / '1.png').touch()
    # timm looks for a map below the folder that it reads
    (tmp_path / 'data' / 'train' / 'map.txt').write_text('\n'.join(reversed(NAMES)), encoding='utf-8')
    (tmp_path / 'names.txt').write_text('\n'.join(NAMES) + '\n', encoding='utf-8-sig')
    run = write_run(new_model(num_classes=args.get('num_classes', 3)), **{'data_dir': 'data', **args})
    folder = export_run(run, 'out', class_names=file)
    assert json.loads((folder / 'config.json').read_text()).get('label_names') == names
    assert load(folder).pretrained_cfg.get('label_names') == names
    assert ('No class names are written' in caplog.text) == (names is None)
