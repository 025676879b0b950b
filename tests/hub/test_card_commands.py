"""The commands in the card of a run: train.py's that trains as the run did, validate.py's that measures as it did."""
import os
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import timm
import yaml

from timm_ela.hub.cards import run_card
from timm_ela.hub.train_run import TrainRun

MODEL = 'mobilenetv2_050_ela_t'  # the smallest
TRAIN_ARGS = yaml.safe_load(Path(__file__).with_name('train_args.yaml').read_text())
TRAINED = {'top1': 70.5, 'top5': 95.25}

# What says where a run ran, what it logged and saved, or what it was called, not how it trained.
NOT_RECIPE = {
    'data', 'data_dir', 'dataset_download', 'dataset_trust_remote_code', 'val_num_samples', 'resume', 'no_resume_opt',
    'start_epoch', 'device', 'device_modules', 'local_rank', 'no_ddp_bb', 'dist_bn', 'synchronize_step', 'fuser',
    'grad_checkpointing', 'torchscript', 'torchcompile', 'torchcompile_mode', 'model_ema_force_cpu', 'workers',
    'worker_seeding', 'pin_mem', 'no_prefetcher', 'use_multi_epochs_loader', 'validation_batch_size', 'log_interval',
    'val_interval', 'recovery_interval', 'checkpoint_hist', 'save_images', 'output', 'experiment', 'eval_metric', 'tta',
    'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id', 'help',
}


@pytest.fixture
def train_parser(monkeypatch):
    """The parser of timm's train.py."""
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip('TIMM_SCRIPTS names no folder with train.py')
    monkeypatch.syspath_prepend(os.environ['TIMM_SCRIPTS'])
    monkeypatch.setattr(sys, 'argv', ['train.py'])
    return pytest.importorskip('train').parser


@cache
def untrained():
    return timm.create_model(MODEL)


def read_recipe(parser, run):
    """What train.py would read from the recipe of a run's card."""
    text = run_card(untrained(), TrainRun(run, {}, False, 1, TRAINED), None)
    command = text.split('## Recipe')[1].split('```bash\n')[1].split('```')[0].replace('\\\n', '')
    return vars(parser.parse_args(shlex.split(command)[1:]))


@pytest.mark.parametrize('args', [
    {}, {'no_aug': True, 'model_ema': True, 'model_ema_decay': 0.99}, {'amp': True, 'amp_dtype': 'bfloat16'},
    {'lr': None, 'momentum': 0.0, 'clip_grad': 1.0},
    {'val_split': 'test', 'sched_on_updates': True, 'head_init_scale': 0.01},
    {'mean': [0.5, 0.5, 0.5], 'scale': [0.5, 1.0], 'opt_betas': [0.9, 0.95], 'model_kwargs': {'act_layer': 'silu'}},
    {'cutmix': 1.0, 'mixup_prob': 0.5, 'mixup_off_epoch': 5},
    {'train_img_sizes': [96, 128], 'train_size_schedule': 'progressive', 'train_size_random_mix': 0.0},
    {'train_interpolation': '', 'val_split': '', 'class_map': 'names.txt'},
    {'sched': 'step', 'decay_epochs': 2.4, 'decay_rate': 0.97}, {'lr_cycle_limit': 3, 'lr_cycle_decay': 0.7},
], ids=str)
def test_the_recipe_is_what_train_py_would_read_as_this_run(train_parser, args):
    run = TRAIN_ARGS | args
    read = read_recipe(train_parser, run)
    assert {k for k in read if k not in {'data_dir'} and read[k] != run.get(k, train_parser.get_default(k))} == set()


def test_no_argument_of_train_py_that_changes_the_training_is_missing_in_the_recipe(train_parser):
    counts = {  # only with these
        'amp': True, 'bce_loss': True, 'clip_grad': 1.0, 'cutmix': 1.0, 'kd_model_name': 'resnet18', 'layer_decay': 0.9,
        'lr_cycle_limit': 2, 'lr_noise': [0.5, 0.9], 'model_ema': True, 'naflex_loader': True, 'reprob': 0.5,
        'train_img_sizes': [96, 128], 'lr': None}
    schedules = {
        'decay_epochs': 'step', 'decay_milestones': 'multistep', 'patience_epochs': 'plateau', 'decay_rate': 'poly'}
    values = {  # the rest is any
        'in_chans': 3, 'input_size': [3, 64, 64], 'model_kwargs': {'alpha': 7}, 'opt_kwargs': {'beta': 7}}
    missing = set()
    for action in train_parser._actions:
        name, of = action.dest, action.type or str
        value = action.choices[-1] if action.choices else not action.default if action.nargs == 0 else of('7')
        value = values.get(name, [value] if action.nargs == '+' else value)
        run = TRAIN_ARGS | counts | {'sched': schedules.get(name, 'cosine')} | {name: value}
        if name not in NOT_RECIPE and read_recipe(train_parser, run)[name] != value:
            missing.add(name)
    assert missing == set()


def test_the_recipe_tells_no_path_of_the_machine(tmp_path):
    folder = tmp_path / 'out'
    text = run_card(untrained(), TrainRun(TRAIN_ARGS | {
        'model': f'local-dir:{folder}', 'class_map': '/my/names.txt', 'initial_checkpoint': '/my/last.pth.tar'},
        {}, False, 1, TRAINED), None)
    assert str(folder.parent) not in text and '/my' not in text
    assert f'--model local-dir:{folder.name} ' in text
    assert text.count('--class-map names.txt') == 2 and '--initial-checkpoint last.pth.tar' in text


@pytest.mark.parametrize('args, words', [
    ({}, ''), ({'input_size': [3, 64, 64]}, ''),
    ({'in_chans': 1, 'mean': [0.5], 'std': [0.25]}, '--in-chans 1'), ({'input_size': [1, 64, 64]}, '--in-chans 1'),
    ({'class_map': '/my/names.txt'}, '--class-map names.txt'),
    ({'dataset': 'hfds/a/b', 'input_key': 'img', 'target_key': 'label'},
     '--dataset hfds/a/b --input-key img --target-key label'),
    ({'val_num_samples': 50, 'model_dtype': 'bfloat16', 'fast_norm': True},
     '--num-samples 50 --model-dtype bfloat16 --fast-norm'),
    ({'amp': True, 'amp_dtype': 'bfloat16'}, '--amp --amp-dtype bfloat16'),
], ids=str)
def test_the_command_in_a_card_measures_what_train_py_measured(args, words):
    model = timm.create_model(MODEL, in_chans=1 if '--in-chans' in words else 3)
    text = run_card(model, TrainRun(TRAIN_ARGS | args, {}, False, 1, TRAINED), None)
    [command] = re.findall(r'^validate\.py (.*)$', text, re.MULTILINE)
    assert command == ' '.join(filter(None, [
        '--data-dir DATA', words, '--split validation --model hf-hub:OWNER/NAME --pretrained']))
