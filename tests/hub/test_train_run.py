"""What is wrong in the files of a run is refused in a line that names the file and the place."""
import codecs

import pytest
import timm
import torch
import yaml

from timm_ela.hub.publish import export_run
from timm_ela.hub.train_run import TrainRun

MODEL = 'mobilenetv2_050_ela_t'  # the smallest


@pytest.fixture(scope='module')
def model():
    return timm.create_model(MODEL, num_classes=3)


@pytest.mark.parametrize('change, told', [
    (lambda text: text.replace(b'70.5', b'5000'), 'line 3: eval_top1 is 5000, not a percentage from 0 to 100'),
    (lambda text: text.replace(b'95.25', b'-5'), 'line 3: eval_top5 is -5, not a percentage'),
    (lambda text: text.replace(b'70.5', b'inf'), 'line 3: eval_top1 is inf, not a percentage'),
    (lambda text: text.replace(b'70.5', b'abc'), "line 3: eval_top1 is 'abc', not a number"),
    (lambda text: text.replace(b'70.5', b'"70,5"'), "line 3: eval_top1 is '70,5', not a number"),
    (lambda text: text.replace(b'70.5', b'70,5'), 'line 3: 1 values too many; decimals take a point'),
    (lambda text: text.replace(b',', b';'), 'no column epoch: it must be a table with commas'),
    (lambda text: text.decode().encode('utf-16'), 'not the UTF-8 text with commas'),
])
def test_an_accuracy_that_cannot_be_is_refused_with_file_and_line(model, write_run, change, told):
    folder = write_run(model)
    path = folder / 'summary.csv'
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        TrainRun.read(folder)
    assert str(error.value).startswith(str(path)) and told in str(error.value) and '\n' not in str(error.value)


def test_a_byte_order_mark_does_not_lose_the_accuracy(model, write_run):
    folder = write_run(model)
    path = folder / 'summary.csv'
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert TrainRun.read(folder).metrics == {'top1': 70.5, 'top5': 95.25}


@pytest.mark.parametrize('change, told', [
    ({'num_classes': [3]}, 'num_classes is [3], and must be of type int'),
    ({'num_classes': True}, 'num_classes is True, and must be of type int'),
    ({'dataset': ['a']}, "dataset is ['a'], and must be of type str"),
    ({'model_kwargs': 3}, 'model_kwargs is 3, and must be of type dict'),
    ({'input_size': 224}, 'input_size is 224, and must be of type list'),
    ({'bn_eps': 'small'}, "bn_eps is 'small', and must be of type float"),
    ({'model_ema': 1}, 'model_ema is 1, and must be of type bool'),
])
def test_an_argument_of_another_type_is_named(model, write_run, change, told):
    folder = write_run(model, **change) if 'model_ema' not in change else write_run(model)
    path = folder / 'args.yaml'
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(ValueError) as error:
        TrainRun.read(folder)
    assert str(error.value) == f'{path}: {told}.'


@pytest.mark.parametrize('option', ['tag', 'license'])
@pytest.mark.parametrize('text', ['a\nb', '', 'a\x1bb'])
def test_a_tag_or_a_licence_of_several_lines_is_refused(model, write_run, tmp_path, option, text):
    with pytest.raises(ValueError, match=f'The {option} is .*a line of printable characters'):
        export_run(write_run(model), tmp_path / 'out', **{option: text})
    assert not (tmp_path / 'out').exists()


def test_a_line_break_in_the_datasets_name_is_a_blank(model, write_run, tmp_path):
    folder = write_run(model, data_dir='/data/my\nflowers')
    assert TrainRun.read(folder).dataset == 'my flowers'
    export_run(folder, tmp_path / 'out')
    assert timm.create_model(f'local-dir:{tmp_path / "out"}').pretrained_cfg['tag'] == 'my_flowers'


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_not_finite_are_not_exported(model, write_run, tmp_path, value):
    broken = timm.create_model(MODEL, num_classes=3)
    with torch.no_grad():
        broken.blocks[2][0].bn1.running_var[1] = value
    with pytest.raises(ValueError, match="not finite: 'blocks.2.0.bn1.running_var' holds NaN or infinity"):
        export_run(write_run(broken), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
