"""A run of train.py -> a folder -> `timm.create_model('local-dir:FOLDER', pretrained=True)`."""
import json
from pathlib import Path

import pytest
import timm
import torch
from folders import FILES, MODEL, PLAIN, card, give_equal_logits, have_equal_weights, load, metrics
from timm.data import resolve_model_data_config
from timm.layers import convert_splitbn_model

from timm_ela.hub.publish import export_run

NAMES = ['rose', 'tulip', 'água', '日本', 'a b', 'x', 'y']
TRAINED = {'top1': 70.5, 'top5': 95.25}  # what write_run measured on model_best.pth.tar


@pytest.fixture
def exported(new_model, write_run, tmp_path):
    """Exports a run of a new model."""
    def export(name: str = MODEL, **changes) -> Path:
        return export_run(write_run(new_model(name), **changes), tmp_path / 'out')
    return export


@pytest.mark.parametrize('kwargs, args', [
    ({}, {}),
    ({'in_chans': 1}, {'in_chans': 1, 'mean': [0.5], 'std': [0.25]}),
    ({'global_pool': 'max'}, {'gp': 'max'}),
    ({'act_layer': 'silu'}, {'model_kwargs': {'act_layer': 'silu'}}),
    ({'bn_eps': 0.1}, {'bn_eps': 0.1}),
], ids=['plain', 'one channel', 'max pooling', 'model_kwargs', 'bn_eps'])
def test_an_exported_run_comes_back_with_equal_weights_and_logits(new_model, write_run, tmp_path, kwargs, args):
    model = new_model(**kwargs)
    folder = export_run(write_run(model, **args), tmp_path / 'out')
    loaded = load(folder)
    assert have_equal_weights(model, loaded) and give_equal_logits(model, loaded)
    assert (loaded.num_classes, loaded.in_chans) == (model.num_classes, model.in_chans)
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


def test_the_size_is_the_one_that_was_measured_not_what_the_plain_weights_recommend(exported):
    assert timm.get_pretrained_cfg('resnet18_ela_t').test_input_size == (3, 288, 288)
    model = load(exported('resnet18_ela_t', pretrained=True, img_size=None, crop_pct=None))
    config = resolve_model_data_config(model, use_test_size=True)
    assert tuple(config['input_size']) == (3, 224, 224) and config['crop_pct'] == 0.95


@pytest.mark.parametrize('kept, ema, force_cpu, weights, measured', [
    (False, True, False, 'raw', TRAINED),
    (False, False, False, 'raw', TRAINED),
    (True, True, False, 'average', TRAINED),
    (True, False, False, 'raw', {}),
    (True, True, True, 'raw', TRAINED),  # train.py then measures the raw weights
    (True, False, True, 'raw', TRAINED),
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


@pytest.mark.parametrize('files, kept', [
    ([], True),  # the folder was emptied since
    (['train/a/'], True),
    (['train/a/1.png'], False),
    (['a/1.png'], False),
    (['train/a/1.png', 'val/'], True),  # a name that timm takes for it
])
def test_an_accuracy_that_was_measured_on_training_images_too_is_left_out(
        new_model, write_run, tmp_path, caplog, files, kept):
    for file in ['', *files]:
        path = tmp_path / 'data' / file
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
        if path.suffix:
            path.touch()
    run = write_run(new_model(), data_dir=str(tmp_path / 'data'))
    assert metrics(export_run(run, tmp_path / 'out')) == (TRAINED if kept else {})
    assert ("no 'validation': train.py measured the accuracy on training images too" in caplog.text) != kept


def test_a_run_with_split_batch_norm_is_exported_as_the_model_that_was_validated(new_model, write_run, tmp_path):
    model = convert_splitbn_model(new_model(), 2)
    loaded = load(export_run(write_run(model, split_bn=True, aug_splits=2), tmp_path / 'out'))
    assert any('aux_bn' in key for key in model.state_dict()) and not any('aux_bn' in k for k in loaded.state_dict())
    assert give_equal_logits(model, loaded)


@pytest.mark.parametrize('row, checkpoint, measured', [
    # A resumed run: its last line is what was saved.
    ('1,2.0,1.5,12.5,50.0,0.1\r\n', 'model_best.pth.tar', {'top1': 12.5, 'top5': 50.0}),
    ('1,2.0,nan,12.5,nan,0.1\r\n', 'model_best.pth.tar', {'top1': 12.5}),
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


@pytest.mark.parametrize('name, args, base, license', [
    (MODEL, {'pretrained': True}, 'timm/mobilenetv2_050.lamb_in1k', 'apache-2.0'),
    (MODEL, {'pretrained': True, 'model': f'{MODEL}.graft_lamb_in1k'}, 'timm/mobilenetv2_050.lamb_in1k', 'apache-2.0'),
    ('resnet18_ela_t', {'pretrained': True, 'model': 'resnet18_ela_t.graft_tv_in1k'}, 'timm/resnet18.tv_in1k',
     'bsd-3-clause'),
    (PLAIN, {'pretrained': True}, 'timm/mobilenetv2_050.lamb_in1k', 'apache-2.0'),
    (MODEL, {'pretrained': False}, None, None),
    (MODEL, {'pretrained': True, 'pretrained_path': '/my/plain.pth'}, None, None),
    (MODEL, {'pretrained': True, 'initial_checkpoint': '/my/model.safetensors'}, None, None),
])
def test_the_base_model_and_its_licence_are_those_of_the_weights_that_the_run_began_with(
        exported, name, args, base, license):
    data = card(exported(name, **args)).data
    assert (data.base_model, data.license) == (base, license)


@pytest.mark.parametrize('split', [None, '', 'test'])
def test_the_card_is_a_valid_model_card_with_the_split_and_the_versions(exported, split):
    folder = exported(data_dir='/gone/flowers', val_split=split)
    data, text = card(folder).data, card(folder).text
    assert (data.library_name, data.pipeline_tag, data.model_name) == (
        'timm', 'image-classification', f'{MODEL} on flowers')
    assert {'timm', 'ela'} <= set(data.tags)
    assert {(r.dataset_name, r.dataset_split, r.metric_type) for r in data.eval_results} == {
        ('flowers', split or 'validation', 'accuracy')}
    assert f'On the {split or "validation"} split, after epoch 1 ' in text and '70.50 %' in text and '64 x 64' in text
    assert f'timm {timm.__version__}, torch {torch.__version__}' in text
    assert '\n\n\n' not in text and '{' not in text.split('```bibtex')[0]


def test_a_dataset_can_be_named_where_its_folder_has_no_name(new_model, write_run, tmp_path):
    run = write_run(new_model(), data_dir='/gone/data')
    folder = export_run(run, tmp_path / 'out', dataset='Some Flowers')
    assert f'# {MODEL}, trained on Some Flowers\n' in card(folder).text
    assert {result.dataset_name for result in card(folder).data.eval_results} == {'Some Flowers'}
    assert load(folder).pretrained_cfg['tag'] == 'some_flowers'


@pytest.mark.parametrize('args, lines', [
    ({}, ['Epochs: 8', 'Batch size: 64', 'Optimizer: adamw', 'Learning rate: 0.002', 'Schedule: cosine', 'Seed: 42',
          'Image size: 64 x 64', 'Augmentation: scale [0.08, 1.0], ratio [0.75, 1.3333333333333333], hflip 0.5, '
          'color_jitter 0.4']),
    ({'lr': None, 'grad_accum_steps': 4}, ['Learning rate: 0.1 for a batch of 256', 'Batch size: 64 x 4']),
    ({'train_img_sizes': [96, 128]}, ['Image size: 96, 128']),
    ({'no_aug': True}, ['Augmentation: none']),
    ({'no_aug': True, 'mixup': 0.2, 'cutmix': 1.0}, ['Augmentation: mixup 0.2, cutmix 1.0']),
    ({'aa': 'rand-m9', 'scale': None, 'ratio': None, 'color_jitter': None}, ['Augmentation: hflip 0.5, aa rand-m9']),
], ids=str)
def test_the_card_shows_eight_values_of_the_recipe_and_links_the_rest(exported, args, lines):
    recipe = card(exported(**args)).text.split('## Recipe\n\n')[1]
    bullets, rest = recipe.split('\n\n', 1)
    assert len(bullets.splitlines()) == 8 and {f'- {line}' for line in lines} <= set(bullets.splitlines())
    assert rest.startswith('[args.yaml](./args.yaml) ')
    assert '\ntrain.py --config args.yaml --data-dir DATA\n' in rest


def test_a_card_of_a_second_stage_has_the_licence_and_the_name_of_the_first(new_model, write_run, tmp_path):
    first = export_run(write_run(new_model()), tmp_path / 'first', license='mit')
    (tmp_path / 'run').rename(tmp_path / 'earlier')
    for start, license in (({}, 'mit'), ({'initial_checkpoint': '/my/other.pth'}, None)):
        run = write_run(new_model(), model=f'local-dir:{first}', pretrained=True, **start)
        second = export_run(run, tmp_path / f'second{license}')
        assert (card(second).data.license, card(second).data.base_model) == (license, None)
        words = '--initial-checkpoint other.pth ' if start else ''
        command = f'train.py --config args.yaml --data-dir DATA {words}--model local-dir:first'
        assert f'\n{command}\n' in card(second).text
        run.rename(tmp_path / f'run{license}')


@pytest.mark.parametrize('name, is_ours', [('mobilenetv2_050_ca', True), (PLAIN, False)])
def test_the_card_of_a_model_without_ela_does_not_name_ela(exported, caplog, name, is_ours):
    folder = exported(name)
    text = card(folder).text
    assert load(folder).num_classes == 7
    assert (f'{name} is a model of timm, not one of timm_ela' in caplog.text) != is_ours
    assert ('2103.02907' in text) == ('timm_ela (' in text) == is_ours
    assert 'ELA' not in text and '2403.01123' not in text and 'ela' not in card(folder).data.tags


@pytest.fixture
def class_names(tmp_path):
    """The data of a run: an image folder, a class map in another order, a list of names."""
    for name in NAMES:
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        (tmp_path / 'data' / 'validation' / name).mkdir(parents=True)
        (tmp_path / 'data' / 'train' / name / '1.png').touch()
    for folder in ('data/train', '.'):  # timm looks for a map below the folder that it reads
        (tmp_path / folder / 'map.txt').write_text('\n'.join(reversed(NAMES)), encoding='utf-8')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'names.txt').write_text('\n'.join(NAMES[3:] + NAMES[:3]) + '\n', encoding='utf-8-sig')
    return tmp_path


@pytest.mark.parametrize('file, args, names', [
    ('names.txt', {'data_dir': '{}/data'}, NAMES[3:] + NAMES[:3]),
    (None, {'data_dir': '{}/data', 'class_map': 'map.txt'}, NAMES[::-1]),
    (None, {'data_dir': '{}/gone', 'class_map': '{}/map.txt'}, NAMES[::-1]),
    (None, {'data_dir': '{}/data'}, sorted(NAMES)),
    (None, {'data': '{}/data'}, sorted(NAMES)),
    (None, {'data_dir': '{}/data', 'num_classes': 8}, None),
    (None, {'data_dir': '{}/empty'}, None),
    (None, {'data_dir': '{}/data', 'class_map': 'gone.txt'}, None),
    (None, {'data_dir': '{}/gone'}, None),
    (None, {}, None),
])
def test_class_names_come_from_the_file_or_the_class_map_or_the_data(
        new_model, write_run, class_names, caplog, file, args, names):
    args = {k: v.format(class_names) if isinstance(v, str) else v for k, v in args.items()}
    run = write_run(new_model(num_classes=args.get('num_classes', 7)), **args)
    folder = export_run(run, class_names / 'out', class_names=file and class_names / file)
    assert json.loads((folder / 'config.json').read_text()).get('label_names') == names
    assert load(folder).pretrained_cfg.get('label_names') == names
    assert ('No class names are written' in caplog.text) == (names is None)
