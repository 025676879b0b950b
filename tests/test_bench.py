"""`timm-ela bench`: what takes its turn, how it is timed and counted, and what the table, the file and the picture say.

No test holds a time to anything: only the arithmetic on it.
"""
import json
import re
import shlex
import sys
from functools import partial
from subprocess import CompletedProcess

import pytest
import timm
import torch
from helpers import ROOT, run
from PIL import Image

import timm_ela
from timm_ela import bench, bench_report, cli, timing
from timm_ela.bench import layer_makers, run_bench, time_layers, time_models
from timm_ela.timing import Setting, interleave, measure, peak_mib, pick_device, timed

CPU = torch.device('cpu')
LAYERS = ['ELA-T', 'ELA-T (plain formula)', 'timm se', 'timm eca', 'timm cbam', 'timm coord', 'timm ela']
MODELS = ['mobilenetv2_050', 'mobilenetv2_050_ela_t']
MODES = ('inference', 'training')
OPTIONS = ('--shapes 16x9x5 24x7x7 --variant t --models mobilenetv2_050_ela_t --img-size 64 -b 2 --device cpu '
           '--threads 1 --channels-last --repeats 2')


@pytest.fixture(scope='module')
def done(tmp_path_factory) -> tuple[CompletedProcess, dict, Image.Image]:
    """A run of the command: its process, the JSON file and the picture that it wrote."""
    folder = tmp_path_factory.mktemp('bench')
    words = [*OPTIONS.split(), '--json', folder / 'out.json', '--plot', folder / 'out.png']
    process = run([sys.executable, '-m', 'timm_ela', 'bench', *words], cwd=ROOT)
    with Image.open(folder / 'out.png') as image:
        image.load()
    return process, json.loads((folder / 'out.json').read_text()), image


def cells(markdown: str) -> list[list[list[str]]]:
    """The rows of each table in a text, without its header's rule."""
    tables = re.findall(r'(?:^\|.*\|\n?)+', markdown, re.MULTILINE)
    rows = [[[c.strip() for c in line.strip('|').split('|')] for line in t.splitlines()] for t in tables]
    assert all(len({len(line) for line in t.splitlines()}) == 1 for t in tables), 'not aligned'
    assert all(re.fullmatch('[-:]+', ''.join(table[1])) for table in rows)
    return [[table[0], *table[2:]] for table in rows]


# What is printed and written
def test_the_table_has_a_row_for_each_layer_at_each_shape_and_for_each_model(done):
    layers, models = cells(done[0].stdout)
    assert [row[:2] for row in layers[1:]] == [[shape, name] for shape in ('16x9x5', '24x7x7') for name in LAYERS]
    assert [row[0] for row in models[1:]] == MODELS
    assert all(cell for table in (layers, models) for row in table for cell in row)
    assert [row[3] for row in layers if row[1] == 'timm ela'] == ['1.00', '1.00']
    assert models[1][3] == models[1][7] == '1.00'


def test_the_head_says_hardware_versions_setting_and_the_exact_command(done):
    head, command = done[0].stdout.split('\n\n')[:2]
    assert len(head.splitlines()) == 1 and done[1]['hardware'] and done[1]['hardware'] in head
    for part in (f'torch {torch.__version__}', f'timm {timm.__version__}', f'timm_ela {timm_ela.__version__}',
                 '1 thread,', 'float32', 'channels_last', 'eager', 'TIMM_ELA_FUSED=1', 'batch 2', '64 px',
                 'medians of 2', 'GB/s'):
        assert part in head
    assert command.strip() == done[1]['command']
    program, *words = shlex.split(command)
    args = cli._parser().parse_args(words)
    assert program == 'timm-ela' and (args.shapes, args.repeats) == ([(16, 9, 5), (24, 7, 7)], 2)


def test_nothing_but_progress_is_on_stderr(done):
    assert done[0].stderr.splitlines() == [
        'Timing layers at 16x9x5', 'Timing layers at 24x7x7', f'Timing {MODELS[0]} and {MODELS[1]}']


def test_the_file_holds_every_number_of_the_table_with_its_unit(done):
    _, result, _ = done
    assert bench_report.report(result) == done[0].stdout.rstrip('\n')
    common = {f'{mode}_{key}' for mode in MODES for key in ('ms', 'q25_ms', 'q75_ms', 'peak_mib')}
    for row in result['layers']:
        more = {f'{mode}_{key}' for mode in MODES for key in ('floor_ms', 'copy_gb_per_s')}
        assert row.keys() == {'shape', 'layer'} | common | more
    for row in result['models']:
        assert row.keys() == {'model', 'plain'} | common | {f'{mode}_images_per_s' for mode in MODES}
        for mode in MODES:
            assert row[f'{mode}_images_per_s'] == pytest.approx(2 / (row[f'{mode}_ms'] / 1000))
    for row in result['layers'] + result['models']:
        for mode in MODES:
            assert 0 < row[f'{mode}_q25_ms'] <= row[f'{mode}_ms'] <= row[f'{mode}_q75_ms']
            assert row[f'{mode}_peak_mib'] > 0


def test_the_picture_is_a_png_and_not_blank(done):
    image = done[2]
    assert image.format == 'PNG' and image.width > 1000
    assert {(0, 114, 178), (230, 159, 0)} <= {colour for _, colour in image.convert('RGB').getcolors(2 ** 24)}


def made_up() -> dict:
    """A result whose ratios are known: timm's ELA takes 12 ms, the floor is 2 ms, the plain model takes 100 ms."""
    def modes(ms: float, **more: float) -> dict:
        values = {'ms': ms, 'q25_ms': ms * 0.9, 'q75_ms': ms * 1.2, 'peak_mib': 2.0, **more}
        return {f'{m}_{k}': v * (1 + 2 * (m == 'training')) for m in MODES for k, v in values.items()}

    return {
        'hardware': 'A processor', 'threads': 2, 'python': '3.11', 'torch': '2.5', 'timm': '1.0', 'timm_ela': '0.1',
        'dtype': 'bfloat16', 'autocast': True, 'memory_format': 'contiguous', 'compiled': True, 'timm_ela_fused': 2,
        'batch_size': 8, 'img_size': 224, 'repeats': 30, 'command': 'timm-ela bench',
        'layers': [{'shape': [8, 4, 5], 'layer': name, **modes(ms, floor_ms=2.0, copy_gb_per_s=9.0)}
                   for name, ms in (('ELA-B', 3.0), ('timm ela', 12.0))],
        'models': [{'model': name, 'plain': 'resnet50', **modes(ms, images_per_s=8e3 / ms)}
                   for name, ms in (('resnet50', 100.0), ('resnet50_ela_b', 125.0))],
    }


def test_ratios_are_to_timms_ela_to_the_floor_and_to_the_plain_model():
    layers, models = cells(bench_report.report(made_up()))
    assert layers[1] == ['8x4x5', 'ELA-B', '3.00 (30%)', '0.25', '1.50', '2.00', '9.00 (30%)', '0.25', '1.50', '6.00']
    assert models[2][:5] == ['resnet50_ela_b', '125 (30%)', '64.0', '1.25', '2.00']


def test_a_picture_draws_those_ratios_with_one_panel_for_each_shape_and_one_for_the_models():
    layers, models = bench_report.plot_report(made_up()).axes
    assert [bar.get_width() for bar in layers.patches] == pytest.approx([1.5, 6, 1.5, 6])
    assert [bar.get_width() for bar in models.patches] == pytest.approx([1.25, 1.25])
    assert [label.get_text() for label in layers.get_yticklabels()] == ['ELA-B', 'timm ela']
    assert (layers.get_xlabel(), models.get_xlabel()) == ('time / floor', 'time / plain model')


# How it is timed
def test_every_repeat_runs_each_once_and_none_always_follows_another():
    turns = []

    def time(call):
        turns.append(call())
        return lambda: float(len(turns))

    names = 'abcd'
    times = interleave({name: partial(str, name) for name in names}, 40, time)
    repeats = [turns[i:i + 4] for i in range(0, 160, 4)]
    assert all(sorted(repeat) == list(names) for repeat in repeats)
    assert {repeat[0] for repeat in repeats} == set(names)
    assert all(len({b for a, b in zip(turns, turns[1:], strict=False) if a == name} - {name}) == 3 for name in names)
    # asked for only when all of the repeat has been called, and kept in order
    assert all(times[name] == [4.0 * (i + 1) for i in range(40)] for name in names)


def test_what_is_slow_only_the_first_times_is_not_timed(monkeypatch):
    called: list[int] = []
    monkeypatch.setattr(timing, 'interleave', lambda calls, *_: {name: [float(len(called))] for name in calls})
    assert measure({'a': lambda: called.append(1)}, Setting(CPU, 2, 1))['a']['ms'] == 3


def test_what_is_to_be_compiled_is(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda module: lambda x: 'compiled')
    module = torch.nn.Identity()
    assert Setting(CPU, 2, 1, compile=True).prepare(module)(1) == 'compiled'
    assert Setting(CPU, 2, 1).prepare(module) is module


def test_a_gpu_is_waited_for_only_when_the_time_is_asked_for(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append('record')

        def synchronize(self):
            log.append('wait')

        def elapsed_time(self, end):
            return 2.5

    monkeypatch.setattr(torch.cuda, 'Event', Event)
    ms = timed(lambda: log.append('call'), torch.device('cuda'))
    assert log == ['record', 'call', 'record']
    assert ms() == 2.5 and log[3:] == ['wait']


def test_the_peak_is_what_is_alive_together_and_was_made_in_the_call():
    before = [torch.ones(2 ** 20)]  # 4 MiB

    def call():
        before.clear()
        pair = [torch.ones(2 ** 18), torch.ones(2 ** 18)]  # 1 MiB each
        pair.clear()
        return torch.ones(2 ** 17)

    assert peak_mib(call, CPU) == 2


def test_the_floor_is_the_passes_over_the_input_at_the_bandwidth_of_the_copy(monkeypatch):
    copy_ms = 2 * 2 ** 28 / 1e7  # reads and writes 256 MiB at 10 GB/s
    figures = {'q25_ms': 1.0, 'ms': 1.0, 'q75_ms': 1.0, 'peak_mib': 1.0}
    monkeypatch.setattr(bench, 'measure', lambda calls, _: {n: figures | {'ms': copy_ms} for n in calls})
    for dtype, size in ((None, 4), (torch.bfloat16, 2)):
        for row in time_layers((16, 9, 5), 'b', Setting(CPU, 2, 1, amp_dtype=dtype)):
            input_bytes = 2 * 16 * 9 * 5 * size
            assert row['inference_copy_gb_per_s'] == row['training_copy_gb_per_s'] == pytest.approx(10)
            assert row['inference_floor_ms'] == pytest.approx(3 * input_bytes / 1e7)
            assert row['training_floor_ms'] == pytest.approx(7 * input_bytes / 1e7)


# What takes its turn
@pytest.fixture
def outputs(monkeypatch) -> list[dict]:
    """For each mode what the calls gave, each called twice; nothing is timed."""
    kept: list[dict] = []

    def measure(calls, _):
        kept.append({name: (call(), call()) for name, call in calls.items()})
        return {name: {'ms': 1.0} for name in calls}

    monkeypatch.setattr(bench, 'measure', measure)
    return kept


@pytest.mark.parametrize('amp_dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('channels_last', [False, True])
def test_layers_go_forward_and_back_to_every_gradient_with_inputs_in_turn(outputs, amp_dtype, channels_last):
    setting = Setting(CPU, 2, 3, channels_last, amp_dtype)
    time_layers((16, 9, 5), 't', setting)
    forward, step = outputs
    assert list(forward) == list(step) == [*LAYERS, 'copy']
    for name in LAYERS:
        layer = bench.layer_makers(16, 't')[name]()
        for y in forward[name]:
            assert y.shape == (2, 16, 9, 5) and not y.requires_grad and y.std() > 0
            assert y.is_contiguous(memory_format=setting.memory_format)
        assert not torch.equal(*forward[name])
        for grads in step[name]:
            assert [g.shape for g in grads] == [(2, 16, 9, 5), *(p.shape for p in layer.parameters())]
            assert grads[0].dtype == (amp_dtype or torch.float32) and all(g.isfinite().all() for g in grads)
        assert not torch.equal(step[name][0][0], step[name][1][0])


def test_elas_inference_takes_a_full_size_tensor_less_than_the_plain_formula():
    x = torch.randn(2, 64, 28, 28)  # large beside its strips
    makers, full = layer_makers(64, 't'), x.nbytes / 2 ** 20
    with torch.inference_mode():
        ours, plain = (peak_mib(partial(makers[name](), x), CPU) for name in ('ELA-T', 'ELA-T (plain formula)'))
    assert full < ours < plain - 0.5 * full


def test_models_take_a_step_to_every_gradient_beside_the_plain_one(outputs):
    rows = time_models(MODELS[0], MODELS[1:], 64, Setting(CPU, 2, 1))
    assert [(row['model'], row['plain']) for row in rows] == [(name, MODELS[0]) for name in MODELS]
    forward, step = outputs
    for name in MODELS:
        shapes = [p.shape for p in timm.create_model(name).parameters()]
        assert forward[name][0].shape == (2, 1000) and not forward[name][0].requires_grad
        assert [g.shape for g in step[name][0]] == shapes and all(g.abs().sum() > 0 for g in step[name][0][-2:])


def test_models_of_one_backbone_are_compared_in_one_group(monkeypatch):
    groups = []
    monkeypatch.setattr(bench, 'time_models', lambda base, names, *_: groups.append((base, names)) or [])
    run_bench(Setting(CPU, 2, 1), (), ['resnet18_ela_b', 'mobilenetv2_050_ela_t', 'resnet18_ca'], img_size=64)
    assert groups == [('resnet18', ['resnet18_ela_b', 'resnet18_ca']), ('mobilenetv2_050', ['mobilenetv2_050_ela_t'])]


# Errors come before anything is timed
@pytest.mark.parametrize('changes, told', [
    ({'models': ['resnet18_ela_b', 'resnet18_ela_x']}, "'resnet18_ela_x' is not a model of timm_ela"),
    ({'models': ['resnet18']}, "'resnet18' is not a model of timm_ela, with a plain one beside it"),
    ({'models': ['resnet18_ela_b'], 'img_size': 1}, 'resnet18_ela_b at 3x1x1, batch 1: '),
    ({'shapes': [(16, 9, 5), (12, 7, 7)], 'variant': 's'}, 'ELA-S at 12x7x7, batch 1: .* multiples of group_size=8'),
    ({'shapes': [(16, 1, 1)]}, 'ELA-B at 16x1x1, batch 1: Expected more than 1 value per channel'),
])
def test_a_model_or_a_shape_that_cannot_be_is_named_before_anything_is_timed(monkeypatch, changes, told):
    monkeypatch.setattr(bench, 'measure', None)
    with pytest.raises(ValueError, match=f'^{told}') as error:
        run_bench(Setting(CPU, 1, 1), **{'shapes': [], 'models': [], **changes})
    assert '\n' not in str(error.value)


def test_a_gpu_that_is_not_there_is_told_and_none_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert pick_device(None) == pick_device('cpu') == CPU
    with pytest.raises(ValueError, match='^There is no CUDA device here for --device cuda'):
        pick_device('cuda')


def test_a_run_that_fails_keeps_the_older_files(monkeypatch, tmp_path, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, 'run_bench', interrupted)
    (tmp_path / 'out.json').write_text('older')
    with pytest.raises(SystemExit):
        cli.main(['bench', '--json', str(tmp_path / 'out.json'), '--plot', str(tmp_path / 'out.png')])
    assert 'KeyboardInterrupt' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['out.json']
    assert (tmp_path / 'out.json').read_text() == 'older'


def test_the_readme_names_flags_that_there_are(capsys):
    section = (ROOT / 'README.md').read_text(encoding='utf-8').split('\n## Speed\n')[1].split('\n## ')[0]
    commands = re.findall(r'^timm-ela (bench .*?)(?: +#.*)?$', section, re.MULTILINE)
    assert commands and all(cli._parser().parse_args(shlex.split(line)).command == 'bench' for line in commands)
    with pytest.raises(SystemExit):
        cli.main(['bench', '--help'])
    flag = re.compile(r'(?<!\S)`?(--[a-z][a-z-]*)')
    assert set(flag.findall(section)) <= set(flag.findall(capsys.readouterr().out))
