"""The command line: what it prints, and what bad input gets: one line on stderr, exit code 2, and nothing written."""
import json
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load, save

from timm_ela import cli
from timm_ela.hub import publish, push
from timm_ela.layers.attn_layers import ATTN_LAYERS
from timm_ela.models.registry import MODELS, read_counts

COMMANDS = ('list', 'run', 'convert', 'export', 'push', 'plot')
MODEL, PLAIN = 'mobilenetv2_050_ela_t', 'mobilenetv2_050'  # the smallest


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
@pytest.mark.parametrize('pattern, names', [
    ('mobilenetv2_050_ela_*', 'mobilenetv2_050_ela_*'),
    # a model with its tag, as create_model takes it
    ('resnet50_ela_b.graft_a1_in1k', 'resnet50_ela_b.graft_a1_in1k'),
    # timm's name of MobileNetV2 at width 1
    ('mobilenetv2_100_ela_*.graft_ra_in1k', 'mobilenetv2_ela_*.graft_ra_in1k'),
    ('mobilenetv2_100?ela_b', 'mobilenetv2_ela_b'),
])
def test_list_tells_the_names_that_the_filter_finds_with_their_counts_and_tags(capsys, pattern, names):
    cli.main(['list', pattern, '--json'])
    models = json.loads(capsys.readouterr().out)
    assert {f'{m["name"]}.{tag}' for m in models for tag in m['tags']} == set(timm.list_pretrained(names))
    for m in models:
        model, counts = MODELS[m['name']], read_counts()[m['name']]
        assert m['backbone'] == model.base and (m['params'], m['macs'], m['saved']) == counts
        default = timm.get_pretrained_cfg(m['name']).tag
        assert default == m['tags'][0] or default not in m['tags']


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
def test_a_pipe_that_ends_early_is_no_error_of_list(forks):
    code = '''
        import os, sys
        from timm_ela.cli import main
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        main()
        sys.stdout.flush()
    '''
    assert forks(code, 'list', '--tags', hook=False, exit_code=-signal.SIGPIPE).stderr == ''


# run: the models in any script, where PyTorch's hook is off
def test_run_is_python_with_the_models_registered(forks, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text('''
import json, os, sys
import timm
from beside import HERE
print(json.dumps([__name__, sys.argv, HERE, os.getcwd(), timm.is_model('resnet18_ela_t')]))
raise KeyError("its own")
''')
    (tmp_path / 'beside.py').write_text('HERE = True')  # python would find it too
    args = ['a folder', '--model', 'resnet18_ela_t', '--help', '--debug', '-h', '--', '--version']
    code = 'import runpy; runpy.run_module("timm_ela", run_name="__main__", alter_sys=True)'
    done = forks(code, 'run', script, *args, hook=False, exit_code=1)
    assert json.loads(done.stdout) == ['__main__', [str(script), *args], True, sys.prefix, True]
    assert f'"{script}", line 6' in done.stderr and done.stderr.endswith("KeyError: 'its own'\n")


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


def test_without_a_command_it_prints_its_help_which_names_every_command(capsys):
    cli.main([])
    out = capsys.readouterr().out
    assert out.startswith('usage: timm-ela') and all(f'\n    {command} ' in out for command in COMMANDS)


# Bad input
class Code:
    """Pickles as code that makes a file where it is run."""

    def __reduce__(self):
        return os.mkdir, ('was_run',)


def saved(value: object) -> bytes:
    torch.save(value, buffer := BytesIO())
    return buffer.getvalue()


def weights(name: str, factor: float = 1) -> dict[str, torch.Tensor]:
    return {k: v.double() * factor for k, v in timm.create_model(name, num_classes=3).state_dict().items()}


ARGS, BEST, SUMMARY, NAMES, PTH = 'run/args.yaml', 'run/model_best.pth.tar', 'run/summary.csv', 'names.txt', 'c.pth'
EXPORT, CONVERT = 'export run new/out --class-names names.txt', f'convert c.pth --model {MODEL} out'


@pytest.mark.parametrize('file, content, command, told', [
    (BEST, lambda data: data[:len(data) // 2], EXPORT, BEST + ' is truncated, corrupt or no checkpoint: PytorchStream'),
    (BEST, lambda data: data[:10 ** 5] + b'spoilt' + data[10 ** 5 + 6:], EXPORT, 'the checksum of'),
    (PTH, lambda data: saved({'state_dict': Code()}), CONVERT, 'c.pth holds posix.mkdir, and code is never run'),
    (PTH, lambda data: saved(timm.create_model(MODEL)), CONVERT, 'EfficientNet, and code is never run: save the state'),
    (PTH, lambda data: saved({'epoch': 3, 'net': weights(PLAIN)}), CONVERT, "c.pth holds 'epoch', 'net', and no state"),
    (PTH, lambda data: saved({'state_dict': [1]}), CONVERT, "c.pth holds 'state_dict', and no state dict"),
    (PTH, lambda data: saved(weights(MODEL)), CONVERT, f'c.pth is a checkpoint of {MODEL} already'),
    (PTH, lambda data: saved(weights('mobilenetv2_100')), CONVERT, f'not those of {MODEL}: Error'),
    (PTH, lambda data: saved(weights(PLAIN, torch.nan)), CONVERT, "not finite: 'conv_stem.weight' holds NaN"),
    # too large for a float32
    (BEST, lambda data: saved({'state_dict': weights(MODEL, 1e300)}), EXPORT, "not finite: 'conv_stem.weight' holds"),
    # train.py writes its arguments here too
    (PTH, lambda data: saved({'state_dict': weights(PLAIN), 'args': Namespace(gp=3)}), CONVERT, 'c.pth: '),
    (PTH, lambda data: saved({'state_dict': weights(PLAIN), 'args': Namespace(mean=[1, 2])}), CONVERT, 'c.pth: '),
    (ARGS, lambda data: data + b'model_kwargs: 3', EXPORT, 'args.yaml: '),
    (ARGS, lambda data: data + b'model_kwargs: {no_such: 2}', EXPORT, 'args.yaml: '),
    (ARGS, lambda data: data + b'input_size: 224', EXPORT, 'args.yaml: '),
    (ARGS, lambda data: b'model: [', EXPORT, 'args.yaml: while parsing'),
    (ARGS, lambda data: b'- 1', EXPORT, 'args.yaml: it names no model'),
    (ARGS, lambda data: b'\xff\xfe\x81', EXPORT, "args.yaml: 'utf-8' codec"),
    (ARGS, lambda data: b'model: resnet18_ela_x', EXPORT, 'args.yaml: Unknown model (resnet18_ela_x)'),
    (ARGS, lambda data: data.replace(b'ela_t', b'ela_b'), EXPORT, 'not those of mobilenetv2_050_ela_b'),
    (ARGS, lambda data: data.replace(b'_ela_t', b''), EXPORT, 'has 48 unexpected weights'),
    (ARGS, lambda data: data, 'export . new/out', 'train.py, such as run.'),
    (SUMMARY, lambda data: data.replace(b'70.5', b'abc'), EXPORT, 'summary.csv: could not convert string to float'),
    (BEST, lambda data: data, EXPORT + ' --checkpoint no.pth', 'run has no no.pth: choose another one with --ch'),
    (ARGS, lambda data: data, EXPORT + ' --tag a/b', "The tag 'a/b' cannot stand in MODEL.TAG"),
    (PTH, lambda data: saved(weights(PLAIN)), CONVERT + ' --tag a/b', "The tag 'a/b' cannot stand in MODEL.TAG"),
    (NAMES, lambda data: b'a\nb', EXPORT, 'names.txt holds 2 class names, the head has 3 outputs'),
])
def test_bad_input_is_told_and_nothing_is_written(fails, train_run, monkeypatch, file, content, command, told):
    monkeypatch.chdir(train_run.parent)
    Path(NAMES).write_text('a\nb\nc')
    Path(file).write_bytes(content(Path(file).read_bytes() if file != PTH else b''))
    files = sorted(Path().rglob('*'))
    line = fails(*command.split())
    assert told in line and 'weights_only' not in line and len(line) < 400
    assert sorted(Path().rglob('*')) == files


@pytest.fixture
def no_hub(monkeypatch):
    """A token, and an error if the Hub is asked."""
    monkeypatch.setenv('HF_TOKEN', 'hf_x')
    monkeypatch.setattr(push, 'HfApi', None)


@pytest.mark.parametrize('repo_id, told', [
    ('me', "'me' has no owner: it must be OWNER/NAME"), ('me/--x', "'me/--x'"), ('me/x', 'has no model.safetensors')])
def test_what_cannot_be_pushed_is_told_before_the_hub_is_asked(fails, tmp_path, no_hub, repo_id, told):
    assert told in fails('push', tmp_path, repo_id)


@pytest.mark.parametrize('file, change, told', [
    ('model.safetensors', lambda data: data[:-1], 'model.safetensors is truncated'),
    ('model.safetensors', lambda data: save({k: v * torch.nan for k, v in load(data).items()}), 'holds NaN'),
    ('config.json', lambda data: b'{}', 'timm cannot load'),
    ('config.json', lambda data: data.replace(b'ela_t', b'ela_b'), 'size mismatch for blocks.1.0.se.conv.weight'),
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
    (['list', '--jsn'], '--jsn'), (['list', 'vgg*'], "'vgg*': `timm-ela list`"), (['list', 'vgg'], 'is a wildcard'),
    (['push', 'nothere', 'me/x'], 'There is no folder nothere'), (['run', 'no.py', '-x'], 'no.py'),
    (['plot', 'no.png', '--model', 'x'], 'no.png'),
    (['export', 'nothere', 'out'], 'There is no nothere/args.yaml'),
    (['convert', 'no.pth', '--model', PLAIN, 'out'], f"'{PLAIN}' is not a model of timm_ela"),
    (['convert', 'no.pth', '--model', MODEL, 'out'], 'no.pth'),
], ids=' '.join)
def test_a_line_that_is_not_understood_is_told_why(fails, words, told):
    assert told in fails(*words)


@pytest.mark.parametrize('words', [['run', '--debug', 'no.py'], ['export', 'no', 'out', '--debug']], ids=' '.join)
def test_debug_gives_the_traceback(words):
    with pytest.raises(FileNotFoundError, match='There is no '):
        cli.main(words)


# What is printed
def test_the_call_that_convert_and_export_print_loads_the_folder(capsys, train_run, tmp_path):
    plain = timm.create_model(PLAIN, num_classes=4)
    torch.save(plain.state_dict(), tmp_path / 'c.pth')
    cli.main(['export', str(train_run), str(tmp_path / "it's mine")])
    cli.main(['convert', str(tmp_path / 'c.pth'), '--model', MODEL, str(tmp_path / 'out of "two" words')])
    calls = [line.partition('Load it with: ')[2] for line in capsys.readouterr().out.splitlines()]
    exported, converted = (eval(call, {'timm': timm}) for call in calls)
    assert (exported.num_classes, converted.num_classes) == (3, 4)
    assert torch.equal(converted.conv_stem.weight, plain.conv_stem.weight)


def test_a_name_that_cannot_be_printed_is_no_error(train_run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', TextIOWrapper(BytesIO(), encoding='ascii'))
    cli.main(['export', str(train_run), str(tmp_path / 'out-\udce9-日本')])
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue().startswith(b'Wrote ')
    assert (tmp_path / 'out-\udce9-日本' / 'config.json').is_file()
