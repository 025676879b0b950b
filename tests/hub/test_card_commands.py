"""What repeats a run: its args.yaml, published without what is local, and the validate.py command of its card."""
import os
import re
import sys
from pathlib import Path

import pytest
import timm
import yaml
from folders import MODEL, TRAINED

from timm_ela.hub.cards import run_card
from timm_ela.hub.publish import export_run
from timm_ela.hub.train_run import TrainRun, published_args, write_args

TRAIN_ARGS = yaml.safe_load(Path(__file__).with_name('train_args.yaml').read_text())
# A run of ada's, with paths of her machine wherever train.py takes one.
OF_ADA = {
    'data': '/home/ada/flowers', 'data_dir': '/home/ada/flowers', 'output': '/home/ada/runs', 'experiment': 'ada-1',
    'resume': '/home/ada/runs/last.pth.tar', 'no_resume_opt': True, 'start_epoch': 3, 'local_rank': 1,
    'log_interval': 7, 'log_wandb': True, 'wandb_project': 'ada', 'wandb_tags': ['ada'], 'wandb_resume_id': 'ada',
    'class_map': 'lists/ada/names.txt', 'initial_checkpoint': 'C:\\Users\\ada\\first.pth.tar',
    'kd_model_name': 'local-dir:ada/teacher', 'dataset': 'hfds//home/ada/flowers', 'val_split': '~ada/val',
    'opt_kwargs': {'state': '~ada/state.pt', 'files': ['/home/ada/a.txt', '../ada/b.txt']},
    'model_kwargs': {'pretrained_cfg_overlay': {'file': 'runs/ada/x.pth', 'url': 'file:///home/ada/y.pth'}}}
LOCAL = {
    'data', 'data_dir', 'output', 'experiment', 'resume', 'no_resume_opt', 'start_epoch', 'local_rank', 'log_interval',
    'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id'}


def test_train_py_reads_a_published_config_as_the_run(tmp_path, monkeypatch):
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip('TIMM_SCRIPTS names no folder with train.py')
    monkeypatch.syspath_prepend(os.environ['TIMM_SCRIPTS'])
    monkeypatch.delitem(sys.modules, 'train', raising=False)  # a config changes the defaults of its parser
    train = pytest.importorskip('train')
    run, path = TRAIN_ARGS | OF_ADA, tmp_path / 'args.yaml'
    write_args(run, path)
    monkeypatch.setattr(sys, 'argv', ['train.py', '--config', str(path), '--data-dir', 'DATA'])
    read = vars(train._parse_args()[0])
    assert {key for key in read if read[key] != run[key]} == LOCAL | {
        'class_map', 'initial_checkpoint', 'kd_model_name', 'dataset', 'val_split', 'opt_kwargs', 'model_kwargs'}


def test_a_published_config_has_every_other_argument_bare_names_of_files_and_whole_names_of_models_and_data():
    names = {
        'model': 'hf-hub:timm/resnet18.a1_in1k', 'aa': 'rand-m9-mstd0.5-inc1', 'train_split': 'train[:90%]',
        'val_split': 'images/val', 'dataset': 'hfds/timm/oxford-iiit-pet', 'kd_model_name': 'resnet50.a1_in1k',
        'model_kwargs': {'pretrained_cfg_overlay': {'hf_hub_id': 'timm/resnet18.a1_in1k'}}}
    assert published_args(names) == names
    published = published_args(TRAIN_ARGS | OF_ADA | {'model': 'local-dir:/home/ada/first/'})
    assert TRAIN_ARGS.keys() - published.keys() == LOCAL
    assert {key: value for key, value in published.items() if value != TRAIN_ARGS[key]} == {
        'model': 'local-dir:first', 'kd_model_name': 'local-dir:teacher', 'dataset': 'hfds/flowers',
        'class_map': 'names.txt', 'initial_checkpoint': 'first.pth.tar', 'val_split': 'val',
        'opt_kwargs': {'state': 'state.pt', 'files': ['a.txt', 'b.txt']},
        'model_kwargs': {'pretrained_cfg_overlay': {'file': 'x.pth', 'url': 'y.pth'}}}
    assert published_args(published) == published


def test_an_export_tells_no_path_and_no_user_of_the_machine(write_run, tmp_path):
    run = write_run(timm.create_model(MODEL, num_classes=3), **OF_ADA)
    folder = export_run(run, tmp_path / 'out')
    for name in ('args.yaml', 'README.md', 'config.json'):
        text = (folder / name).read_text(encoding='utf-8')
        assert 'ada' not in re.findall(r'[a-z]+', text) and str(tmp_path) not in text
        assert re.findall(r"""(?:^|[\s'"`])(?:~|[/\\]|[A-Z]:)[\w/\\]+""", text) == []


@pytest.mark.parametrize('args, words', [
    ({}, ''), ({'in_chans': 1}, '--in-chans 1'), ({'class_map': '/my/two names.txt'}, "--class-map 'two names.txt'"),
    ({'dataset': 'hfds/a/b', 'input_key': 'img', 'target_key': 'label'},
     '--dataset hfds/a/b --input-key img --target-key label'),
    ({'val_num_samples': 50, 'model_dtype': 'bfloat16', 'fast_norm': True},
     '--model-dtype bfloat16 --fast-norm --num-samples 50'),
    ({'amp': True, 'amp_dtype': 'bfloat16'}, '--amp --amp-dtype bfloat16'),
], ids=str)
def test_the_command_in_a_card_measures_what_train_py_measured(args, words):
    model = timm.create_model(MODEL, device='meta')
    model.pretrained_cfg['input_size'] = (args.get('in_chans', 3), 64, 64)
    text = run_card(model, TrainRun(TRAIN_ARGS | args, {}, False, 1, TRAINED), 'data', None)
    command = f'--data-dir DATA {words} --split validation --model hf-hub:OWNER/NAME --pretrained'.replace('  ', ' ')
    assert re.findall(r'^validate\.py (.*)$', text, re.MULTILINE) == [command]
