"""What is wrong in the files of a run is refused in a line that names the file and the place."""
import codecs
from argparse import Namespace

import pytest
import timm
import torch
import yaml

from timm_ela.hub.publish import convert_checkpoint, export_run
from timm_ela.hub.train_run import TrainRun

MODEL, PLAIN = 'mobilenetv2_050_ela_t', 'mobilenetv2_050'  # the smallest


@pytest.fixture(scope='module')
def model():
    return timm.create_model(MODEL, num_classes=3)


@pytest.mark.parametrize('change, told', [
    (lambda text: text.replace(b'70.5', b'5000'), 'line 3: eval_top1 is 5000, not a percentage from 0 to 100'),
    (lambda text: text.replace(b'95.25', b'-5'), 'line 3: eval_top5 is -5, not a percentage'),
    (lambda text: text.replace(b'70.5', b'inf'), 'line 3: eval_top1 is inf, not a percentage'),
    (lambda text: text.replace(b'70.5', b'abc'), "line 3: eval_top1 is 'abc', not a number"),
    (lambda text: text.replace(b'70.5', b'"70,5"'), "line 3: eval_top1 is '70,5', not a number"),
    (lambda text: text.replace(b'70.5', b'70,5'), 'line 3: not as many values as columns; decimals take a point'),
    (lambda text: text.replace(b',', b';'), 'no column epoch: it must be a table with commas'),
    (lambda text: text.decode().encode('utf-16'), 'not the UTF-8 text with commas'),
    (lambda text: b'\n' + text, 'no column epoch'),
    (lambda text: text.replace(b'eval_top1', b'top1'), 'no column eval_top1'),
    (lambda text: text[:text.index(b'95.25')].rpartition(b',')[0], 'line 3: not as many values as columns'),
])
def test_an_accuracy_that_cannot_be_is_refused_with_file_and_line(model, write_run, change, told):
    folder = write_run(model)
    path = folder / 'summary.csv'
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError) as error:
        TrainRun.read(folder)
    assert str(error.value).startswith(str(path)) and told in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('change', [lambda text: codecs.BOM_UTF8 + text, lambda text: text.replace(b',', b', ')])
def test_a_byte_order_mark_or_blanks_do_not_lose_the_accuracy(model, write_run, change):
    folder = write_run(model)
    path = folder / 'summary.csv'
    path.write_bytes(change(path.read_bytes()))
    assert TrainRun.read(folder).metrics == {'top1': 70.5, 'top5': 95.25}


def test_an_epoch_that_is_not_in_the_table_is_told(model, write_run, caplog):
    folder = write_run(model)
    path = folder / 'summary.csv'
    path.write_text(path.read_text().replace('\n1,', '\n7,'))
    assert TrainRun.read(folder).metrics == {}
    assert 'no row of epoch 1' in caplog.text


@pytest.mark.parametrize('change, told', [
    ({'num_classes': [3]}, 'num_classes is [3], and must be int'),
    ({'num_classes': True}, 'num_classes is True, and must be int'),
    ({'dataset': ['a']}, "dataset is ['a'], and must be a text"),
    ({'gp': 3}, 'gp is 3, and must be a line of text'),
    ({'interpolation': 'a\nb'}, "interpolation is 'a\\nb', and must be a line of text"),
    ({'model_kwargs': 3}, 'model_kwargs is 3, and must be a dict of names'),
    ({'model_kwargs': {1: 2}}, 'model_kwargs is {1: 2}, and must be a dict of names'),
    ({'input_size': 224}, 'input_size is 224, and must be a list of numbers'),
    ({'input_size': ['a', 'b', 'c']}, "input_size is ['a', 'b', 'c'], and must be a list of numbers"),
    ({'bn_eps': 'small'}, "bn_eps is 'small', and must be a number"),
    ({'crop_pct': float('nan')}, 'crop_pct is nan, and must be a number'),
    ({'model_ema': 1}, 'model_ema is 1, and must be bool'),
])
def test_an_argument_of_another_type_is_named(model, write_run, tmp_path, change, told):
    folder = write_run(model)
    path = folder / 'args.yaml'
    args = yaml.safe_load(path.read_text()) | change
    path.write_text(yaml.safe_dump(args))
    with pytest.raises(ValueError) as error:
        TrainRun.read(folder)
    assert str(error.value) == f'{path}: {told}.'

    checkpoint = tmp_path / 'c.pth.tar'  # train.py writes its arguments here, too
    plain = timm.create_model(PLAIN, num_classes=3)
    torch.save({'state_dict': plain.state_dict(), 'args': Namespace(**args)}, checkpoint)
    with pytest.raises(ValueError) as error:
        convert_checkpoint(checkpoint, MODEL, tmp_path / 'out')
    assert str(error.value) == f'{checkpoint}: {told}.'


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


def test_weights_that_become_infinite_are_not_converted(tmp_path):
    state_dict = timm.create_model(PLAIN, num_classes=3).double().state_dict()
    state_dict['conv_head.weight'][0] = 1e300
    torch.save(state_dict, tmp_path / 'c.pth')
    with pytest.raises(ValueError, match="'conv_head.weight' holds NaN or infinity"):
        convert_checkpoint(tmp_path / 'c.pth', MODEL, tmp_path / 'out')


@pytest.mark.parametrize('name', ['a\nb.pth', 'a\udcff.pth'])
def test_a_name_that_cannot_be_printed_does_not_break_the_card(tmp_path, name):
    torch.save(timm.create_model(PLAIN, num_classes=3).state_dict(), tmp_path / name)
    out = convert_checkpoint(tmp_path / name, MODEL, tmp_path / 'out')
    assert f'# {MODEL}, converted from a b.pth\n'.replace('a b', 'a b' if '\n' in name else 'a ') in (
        out / 'README.md').read_text(encoding='utf-8')
