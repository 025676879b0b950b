"""What is wrong in the files of a run is refused in a line that names the file and the place."""
from argparse import Namespace

import pytest
import timm
import torch
import yaml
from folders import MODEL, PLAIN

from timm_ela.hub.publish import convert_checkpoint, export_run
from timm_ela.hub.train_run import TrainRun


def test_an_accuracy_that_is_no_number_is_refused(train_run):
    path = train_run / 'summary.csv'
    path.write_bytes(path.read_bytes().replace(b'70.5', b'abc'))
    with pytest.raises(ValueError) as error:
        TrainRun.read(train_run)
    assert str(error.value) == f"{path}: could not convert string to float: 'abc'"


def test_where_something_is_missing_the_way_on_is_told(train_run, tmp_path):
    with pytest.raises(FileNotFoundError, match=f'train.py, such as {train_run}.$'):
        export_run(train_run.parent, tmp_path / 'other' / 'out')
    with pytest.raises(FileNotFoundError, match='run has no best.pth: choose another one with --checkpoint NAME.$'):
        export_run(train_run, tmp_path / 'out', checkpoint='best.pth')


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


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e300])
def test_weights_that_are_not_finite_are_neither_exported_nor_converted(write_run, tmp_path, value):
    models = [timm.create_model(name, num_classes=3) for name in (MODEL, PLAIN)]
    for model in models:
        model.double().blocks[2][0].bn1.running_var[1] = value  # 1e300 becomes infinite in a float32
    torch.save(models[1].state_dict(), tmp_path / 'c.pth')
    run = write_run(models[0])
    for write, source in ((export_run, [run]), (convert_checkpoint, [tmp_path / 'c.pth', MODEL])):
        with pytest.raises(ValueError, match="not finite: 'blocks.2.0.bn1.running_var' holds NaN or infinity"):
            write(*source, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
