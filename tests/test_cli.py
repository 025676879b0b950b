"""The command line: what it prints, and what bad input gets: one line on stderr, exit code 2, and nothing written."""
import json
import os
import pickle
import shlex
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper

import pytest
import timm
import torch
from helpers import run
from safetensors.torch import load, save

import timm_ela
from timm_ela import cli
from timm_ela.hub import publish, push
from timm_ela.layers.attn_layers import ATTN_LAYERS
from timm_ela.models.registry import MODELS, read_counts

COMMANDS = ('list', 'run', 'convert', 'export', 'push', 'plot')
MODEL, PLAIN = 'mobilenetv2_050_ela_t', 'mobilenetv2_050'  # the smallest
MODULE = (sys.executable, '-m', 'timm_ela')


@pytest.fixture
def fails(capsys) -> Callable[..., str]:
    """Runs a command that must end with exit code 2 and exactly one line on stderr, which it gives."""
    def fails(*words: object) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        err = err.lstrip('\r')  # push wipes its progress bar away
        assert (end.value.code, out) == (2, '')
        assert err.endswith('\n') and len(err.splitlines()) == 1, err
        assert err.startswith('timm-ela') and ': error: ' in err
        return err
    return fails


# list
@pytest.mark.parametrize('pattern, count', [('mobilenetv2_050_ela_*', 4), ('*18_ela_*', 4), ('resnet18_ca', 1)])
def test_list_tells_the_names_that_the_filter_finds_with_their_counts_and_tags(capsys, pattern, count):
    cli.main(['list', pattern, '--json'])
    models = json.loads(capsys.readouterr().out)
    assert {m['name'] for m in models} == set(timm.list_models(pattern)) and len(models) == count
    for m in models:
        tags = [name.partition('.')[2] for name in timm.list_pretrained(f'{m["name"]}.*')]
        counts = read_counts()[m['name']]
        assert m == {
            'name': m['name'], 'backbone': MODELS[m['name']].base, 'params': counts.params, 'macs': counts.macs,
            'tags': m['tags']}
        assert sorted(m['tags']) == sorted(tags) and m['tags'][0] == timm.get_pretrained_cfg(m['name']).tag


def test_list_is_a_table_below_each_paper_with_the_default_tag_or_all_tags(capsys):
    cli.main(['list', 'resnet18_*'])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    papers = [words for words in lines if words[-1].startswith('https://arxiv.org/abs/')]
    assert len(papers) == len(ATTN_LAYERS) and papers[1] == ['ELA-B', '-', 'https://arxiv.org/abs/2403.01123']
    models = [words for words in lines if words not in papers]
    assert [words[0] for words in models] == [f'resnet18_{suffix}' for suffix in ATTN_LAYERS]
    default = timm.get_pretrained_cfg('resnet18_ela_b').tag
    assert models[1] == ['resnet18_ela_b', '11.707', 'M', 'params', '1.814', 'G', 'multiply-adds', default, '(+6)']
    cli.main(['list', 'resnet18_ela_b', '--tags'])
    words = capsys.readouterr().out.splitlines()[1].split()
    assert sorted(words[-7:]) == sorted(n.partition('.')[2] for n in timm.list_pretrained('resnet18_ela_b.*'))


@pytest.mark.skipif(os.name == 'nt', reason='Windows has no signal of broken pipes')
def test_a_pipe_that_ends_early_is_no_error_of_list():
    assert run(['sh', '-c', f'{shlex.join(MODULE)} list --tags | true']).stderr == ''


# Help
@pytest.mark.parametrize('command', COMMANDS)
def test_the_help_of_a_command_holds_one_example_and_it_parses(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)  # where none of its files are
    with pytest.raises(SystemExit) as end:
        cli.main([command, '--help'])
    assert end.value.code == 0
    examples = [line for line in capsys.readouterr().out.splitlines() if line.startswith('example:')]
    assert len(examples) == 1
    program, *words = shlex.split(examples[0].removeprefix('example: '))
    assert program == 'timm-ela' and words[0] == command
    try:
        cli.main(words)
    except SystemExit:
        assert '--help)' not in capsys.readouterr().err  # with which the parser's errors end


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(['--help'])
    out = capsys.readouterr().out
    assert all(f'\n    {command} ' in out for command in COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(['--version'])
    assert capsys.readouterr().out.strip() == timm_ela.__version__


# Bad input
class Code:
    """Pickles as code that makes a file where it is run."""

    def __reduce__(self):
        return os.mkdir, ('was_run',)


def saved(value: object) -> bytes:
    torch.save(value, buffer := BytesIO())
    return buffer.getvalue()


@pytest.mark.parametrize('spoil, told', [
    (None, 'model_best.pth.tar'),
    (lambda data: data[:len(data) // 2], 'truncated'),
    (lambda data: data[:10 ** 5] + bytes([data[10 ** 5] ^ 0xff]) + data[10 ** 5 + 1:], 'checksum'),
    (lambda data: b'<!DOCTYPE html><html><body>404: not found</body></html>', 'no checkpoint'),
    (lambda data: b'', 'no checkpoint'),
    (lambda data: pickle.dumps(Code()), 'no checkpoint'),
    (lambda data: saved({'state_dict': Code()}), 'code is never run'),
    (lambda data: saved(timm.create_model(MODEL)), 'save the state_dict'),
    (lambda data: saved([1]), 'holds a list'),
], ids=['gone', 'truncated', 'corrupt', 'page', 'empty', 'raw code', 'code', 'module', 'list'])
def test_a_checkpoint_that_cannot_be_read_is_named(fails, train_run, tmp_path, monkeypatch, spoil, told):
    monkeypatch.chdir(tmp_path)
    file = train_run / 'model_best.pth.tar'
    data = file.read_bytes()
    file.unlink()
    if spoil:
        file.write_bytes(spoil(data))
    files = sorted(tmp_path.rglob('*'))
    for command in (['export', 'run', 'out'], ['convert', 'run/model_best.pth.tar', '--model', MODEL, 'out']):
        line = fails(*command)
        assert told in line and 'model_best.pth.tar' in line and 'weights_only' not in line and len(line) < 400
    assert sorted(tmp_path.rglob('*')) == files


@pytest.mark.parametrize('args, told', [
    (None, 'There is no '),
    ('model: [', 'args.yaml: while parsing'),
    ('- 1', 'args.yaml: it names no model'),
    (b'\xff\xfe\x81'.decode('latin1'), 'args.yaml'),
    ('model: resnet18_ela_x', 'args.yaml: Unknown model (resnet18_ela_x)'),
    ('model: mobilenetv2_050_ela_t.graft_x', 'graft_x'),
    ('model: mobilenetv2_050_ela_b\nnum_classes: 3', 'not those of mobilenetv2_050_ela_b'),
    ('model: mobilenetv2_050\nnum_classes: 3', 'has 48 unexpected weights'),
])
def test_a_run_that_is_not_one_of_train_py_is_told_why(fails, train_run, tmp_path, args, told):
    (train_run / 'args.yaml').unlink()
    if args is not None:
        (train_run / 'args.yaml').write_text(args, encoding='latin1')
    assert told in fails('export', train_run, tmp_path / 'new' / 'out')
    assert sorted(tmp_path.iterdir()) == [train_run]


@pytest.mark.parametrize('name, change, model, told', [
    (MODEL, lambda d: d, MODEL, "is a checkpoint of mobilenetv2_050_ela_t already"),
    ('mobilenetv2_100', lambda d: d, MODEL, 'must be one of the plain model'),
    (PLAIN, lambda d: {'epoch': 3, 'net': d}, MODEL, "holds 'epoch', 'net', and no state dict"),
    (PLAIN, lambda d: {'state_dict': [1]}, MODEL, "holds 'state_dict', and no state dict"),
    (PLAIN, lambda d: {1: 2}, MODEL, 'holds 1, and no state dict'),
    (PLAIN, lambda d: {}, MODEL, 'no state dict'),
    (PLAIN, lambda d: d, PLAIN, f"'{PLAIN}' is not a model of timm_ela"),
    (PLAIN, lambda d: d, 'resnet18_ela_x', "'resnet18_ela_x' is not a model of timm_ela"),
])
def test_weights_that_cannot_be_grafted_are_told_why(fails, tmp_path, name, change, model, told):
    torch.save(change(timm.create_model(name, num_classes=3).state_dict()), tmp_path / 'c.pth')
    assert told in fails('convert', tmp_path / 'c.pth', '--model', model, tmp_path / 'out')
    assert [path.name for path in tmp_path.iterdir()] == ['c.pth']


@pytest.mark.parametrize('names, told', [
    ('a\nb', 'holds 2 class names, the head has 3 outputs'), ('\xff', 'utf-8'), (None, 'names.txt')])
def test_class_names_must_be_as_many_as_the_heads_outputs(fails, train_run, tmp_path, names, told):
    if names is not None:
        (tmp_path / 'names.txt').write_text(names, encoding='latin1')
    line = fails('export', train_run, tmp_path / 'out', '--class-names', tmp_path / 'names.txt')
    assert told in line and 'names.txt' in line and not (tmp_path / 'out').exists()


@pytest.fixture
def no_hub(monkeypatch):
    """A token, and an error if the Hub is asked."""
    monkeypatch.setenv('HF_TOKEN', 'hf_x')
    monkeypatch.setattr(push, 'HfApi', None)


@pytest.mark.parametrize('repo_id, told', [
    ('me', "'me' has no owner: it must be OWNER/NAME"), ('me/x/y', "'me/x/y'"), ('me/--x', "'me/--x'"),
    ('me/x', 'has no model.safetensors')])
def test_what_cannot_be_pushed_is_told_before_the_hub_is_asked(fails, tmp_path, no_hub, repo_id, told):
    assert told in fails('push', tmp_path, repo_id)


@pytest.mark.parametrize('file, change, told', [
    ('model.safetensors', lambda data: b'', 'model.safetensors is truncated'),
    ('model.safetensors', lambda data: data[:-1], 'model.safetensors is truncated'),
    ('model.safetensors', lambda data: save({k: v * torch.nan for k, v in load(data).items()}), 'holds NaN'),
    ('config.json', lambda data: b'{', 'timm cannot load'),
    ('config.json', lambda data: b'{}', 'timm cannot load'),
    ('config.json', lambda data: data.replace(b'ela_t', b'ela_x'), 'ela_x'),
    ('config.json', lambda data: data.replace(b'ela_t', b'ela_b'), "'blocks.1.0.se.conv.weight' is"),
    ('config.json', lambda data: data.replace(b'"num_classes": 3', b'"num_classes": 4'), 'classifier.weight'),
    ('config.json', lambda data: data.replace(b'050_ela_t', b'050'), 'Unexpected key'),
    ('README.md', lambda data: b'\xff' + data, "README.md: 'utf-8' codec"),
])
def test_a_folder_that_nobody_could_load_is_not_pushed(fails, train_run, tmp_path, no_hub, file, change, told):
    out = publish.export_run(train_run, tmp_path / 'out')
    before = (out / file).read_bytes()
    (out / file).write_bytes(change(before))
    assert (out / file).read_bytes() != before
    assert told in fails('push', out, 'me/x')


def test_options_of_an_export_are_refused_for_a_folder_that_is_exported(fails, tmp_path, no_hub):
    for name in push.FILES:
        (tmp_path / name).touch()
    line = fails('push', tmp_path, 'me/x', '--tag', 'mine', '--no-ema')
    assert 'is not a train.py run' in line and '--tag, --no-ema' in line


@pytest.mark.parametrize('words, told', [
    (['train'], "'train'"), (['export', 'run'], 'out_dir'), (['list', '--jsn'], '--jsn'),
    (['convert', 'a.pth', 'out'], '--model'), (['list', 'vgg*'], "'vgg*': `timm-ela list`"),
    (['list', 'vgg'], 'use a wildcard'), (['push', 'nothere', 'me/x'], 'There is no folder nothere'),
    (['run', 'no.py', '-x'], 'no.py'), (['plot', 'no.png', '--model', 'x'], 'no.png'),
    (['export', 'nothere', 'out'], 'There is no nothere/args.yaml'),
    (['plot', 'no.png', '--model', 'x', '--channel', '1', '--mean'], 'not allowed with'),
], ids=' '.join)
def test_a_line_that_is_not_understood_is_told_why(fails, words, told):
    assert told in fails(*words)


@pytest.mark.parametrize('words', [['run', '--debug', 'no.py'], ['export', 'no', 'out', '--debug']], ids=' '.join)
def test_debug_gives_the_traceback(words):
    with pytest.raises(FileNotFoundError, match='There is no '):
        cli.main(words)


# What is printed
def test_the_command_that_convert_prints_can_be_typed(capsys, tmp_path):
    plain, out = timm.create_model(PLAIN, num_classes=3), tmp_path / 'out of "two" words'
    torch.save(plain.state_dict(), tmp_path / 'c.pth')
    cli.main(['convert', str(tmp_path / 'c.pth'), '--model', MODEL, str(out)])
    words = shlex.split(capsys.readouterr().out.partition('Train it with: ')[2])
    assert words == ['train.py', '--data-dir', 'DATA', '--model', f'local-dir:{out}', '--pretrained']
    model = timm.create_model(words[-2], pretrained=True)
    assert torch.equal(model.conv_stem.weight, plain.conv_stem.weight)


def test_the_call_that_export_prints_loads_the_folder(capsys, train_run, tmp_path):
    cli.main(['export', str(train_run), str(tmp_path / "it's mine")])
    call = capsys.readouterr().out.partition('Load it with: ')[2]
    assert eval(call, {'timm': timm}).num_classes == 3


def test_a_name_that_cannot_be_printed_is_no_error(train_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', TextIOWrapper(BytesIO(), encoding='ascii'))
    cli.main(['export', str(train_run), str(tmp_path / 'out-\udce9-日本')])
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().startswith(b'Wrote ')
    assert (tmp_path / 'out-\udce9-日本' / 'config.json').is_file()


def test_without_a_command_it_prints_its_help(capsys):
    cli.main([])
    assert capsys.readouterr().out.startswith('usage: timm-ela')
