"""What is wrong in the files of a run is refused in a line that names the file and the place."""
from argparse import Namespace

import pytest
import timm
import torch
import yaml

from timm_ela.hub.publish import convert_checkpoint, export_run
from timm_ela.hub.train_run import TrainRun

MODEL, PLAIN = 'mobilenetv2_050_ela_t', 'mobilenetv2_050'  # the smallest


@pytest.mark.parametrize('old, new, told', [
    (b'70.5', b'5000', 'eval_top1 of epoch 1 is 5000.0, not a percentage from 0 to 100.'),
    (b'95.25', b'-5', 'eval_top5 of epoch 1 is -5.0, not a percentage from 0 to 100.'),
    (b'70.5', b'inf', 'eval_top1 of epoch 1 is inf, not a percentage from 0 to 100.'),
    (b'70.5', b'abc', "could not convert string to float: 'abc'"),
])
def test_an_accuracy_that_cannot_be_is_refused(train_run, old, new, told):
    path = train_run / 'summary.csv'
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ValueError) as error:
        TrainRun.read(train_run)
    assert str(error.value) == f'{path}: {told}'


def test_an_epoch_that_is_not_in_the_table_is_told(train_run, caplog):
    path = train_run / 'summary.csv'
    path.write_text(path.read_text().replace('\n1,', '\n7,'))
    assert TrainRun.read(train_run).metrics == {}
    assert 'no row of epoch 1' in caplog.text


def test_a_folder_that_is_no_run_is_told_from_what_it_holds(train_run, tmp_path):
    with pytest.raises(FileNotFoundError, match=f'train.py, such as {train_run}.$'):
        export_run(train_run.parent, tmp_path / 'other' / 'out')
    out = export_run(train_run, tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match=f'^{out} is an export already: push it'):
        export_run(out, tmp_path / 'other' / 'out')


@pytest.mark.parametrize('change', [
    {'num_classes': [3]}, {'gp': 3}, {'model_kwargs': 3}, {'model_kwargs': {'no_such': 2}}, {'input_size': 224},
    {'input_size': ['a', 'b', 'c']}, {'mean': [0.5, 0.5]},
], ids=str)
def test_an_argument_that_timm_does_not_take_ends_in_its_error_with_the_files_name(train_run, tmp_path, change):
    path = train_run / 'args.yaml'
    args = yaml.safe_load(path.read_text()) | change
    path.write_text(yaml.safe_dump(args))
    with pytest.raises(ValueError, match=f'^{path}: .') as error:
        export_run(train_run, tmp_path / 'out')
    assert '\n' not in str(error.value) and error.value.__cause__

    checkpoint = tmp_path / 'c.pth.tar'  # train.py writes its arguments here, too
    plain = timm.create_model(PLAIN, num_classes=3)
    torch.save({'state_dict': plain.state_dict(), 'args': Namespace(**args)}, checkpoint)
    with pytest.raises(ValueError, match=f'^{checkpoint}: .'):
        convert_checkpoint(checkpoint, MODEL, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_weights_that_are_not_finite_are_not_exported(write_run, tmp_path, value):
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
