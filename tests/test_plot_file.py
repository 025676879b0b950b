"""What `timm-ela plot` writes: a picture as a whole, or nothing."""
import os
import re
import resource
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
from helpers import ROOT
from PIL import Image

from timm_ela import cli
from timm_ela import plot as plot_module
from timm_ela.plot import plot_file


@pytest.fixture
def image():
    """A wide picture without symmetries."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 13, 3), dtype=np.uint8)).resize((260, 140))


@pytest.mark.parametrize('content', [None, b'', b'no image', b'\x89PNG\r\n\x1a\n' + bytes(40), 'truncated'])
def test_an_image_that_does_not_decode_is_named_in_one_line(tmp_path, image, content):
    path = tmp_path / 'picture.png'
    if content == 'truncated':
        image.save(path)
        content = path.read_bytes()[:3000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r'Cannot read the image .*picture\.png') as error:
        plot_file(path, 'no_such_model', tmp_path / 'out.png')  # before a model is looked for
    assert '\n' not in str(error.value) and not (tmp_path / 'out.png').exists()


def test_the_file_is_a_picture(tmp_path, image):
    image.save(tmp_path / 'in.png')
    for name, kind in (('out.png', 'PNG'), ('out.jpg', 'JPEG'), ('out', 'PNG')):
        plot_file(tmp_path / 'in.png', 'resnet18_ela_t', str(tmp_path / name), pretrained=False, stages=[1])
        with Image.open(tmp_path / name) as written:
            assert written.format == kind and np.asarray(written.convert('L')).std() > 10


def test_a_folder_given_as_a_model_gets_a_hint(tmp_path, monkeypatch, image):
    monkeypatch.chdir(tmp_path)
    image.save('in.png')
    (tmp_path / 'my-model').mkdir()
    with pytest.raises(ValueError, match=r"^'my-model' is a folder, not a model name: give local-dir:my-model\.$"):
        plot_file('in.png', 'my-model', 'out.png')


@pytest.mark.parametrize('kwargs, error', [
    ({'channel': 512}, 'Stage 1 has channels 0 to 63, got 512'),
    ({'class_index': 1000}, 'classes 0 to 999, got 1000'),
    ({'models': 'resnet18_ela_x'}, 'Unknown model'),
    ({'models': ['resnet18', 'resnet18_ela_x']}, 'Unknown model'),
    ({'stages': [7]}, 'no ELA in stage 7'),
    ({'output': 'out.xyz'}, "'xyz' is not supported, only .*png"),
    ({'output': 'no_such_folder/out.png'}, 'no folder no_such_folder to write out.png'),
])
def test_a_failure_writes_nothing(tmp_path, monkeypatch, image, kwargs, error):
    monkeypatch.chdir(tmp_path)
    image.save('in.png')
    kwargs = {'image': 'in.png', 'models': 'resnet18_ela_t', 'output': 'out.png', 'pretrained': False, **kwargs}
    with pytest.raises((ValueError, RuntimeError, OSError), match=error) as raised:
        plot_file(**kwargs)
    assert '\n' not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ['in.png']


@pytest.mark.parametrize('kwargs', [
    {'output': 'out.xyz'}, {'output': 'no_such_folder/out.png'}, {'models': ['resnet18', '.']}], ids=str)
def test_what_can_be_refused_is_refused_before_a_download(tmp_path, monkeypatch, image, kwargs):
    monkeypatch.chdir(tmp_path)
    image.save('in.png')
    monkeypatch.setattr(plot_module, 'create_model', None)
    with pytest.raises((ValueError, OSError)):
        plot_file(**{'image': 'in.png', 'models': 'resnet18_ela_t', 'output': 'out.png', **kwargs})


@pytest.mark.parametrize('options, cam_class, of', [
    ([], None, 'varies'), (['--class', '3', '--channel', '5'], 'tiger shark', 'channel 5 of 64'),
    (['--mean'], None, 'mean of 64 channels')])
def test_the_command_passes_its_options_on(tmp_path, monkeypatch, image, options, cam_class, of):
    drawn = []
    draw = plot_module.draw
    monkeypatch.setattr(plot_module, 'draw', lambda seen, names: drawn.extend(seen) or draw(seen, names))
    image.save(tmp_path / 'in.png')
    models, output = ['resnet18', 'resnet18_ela_t'], str(tmp_path / 'out.png')
    cli.main(['plot', str(tmp_path / 'in.png'), '--model', *models, '--no-pretrained', '--stages', '1', *options,
              '-o', output])
    assert Image.open(output).format == 'PNG'
    assert [one.model for one in drawn] == models and [len(one.gates) for one in drawn] == [0, 1]
    gate, = drawn[1].gates
    assert gate.varies_most if of == 'varies' else gate.of == of
    for one in drawn:
        assert one.cam_class.startswith(cam_class) if cam_class else one.cam_class == one.classes[0][1]


def test_one_channel_or_the_mean_is_shown(capsys):
    with pytest.raises(SystemExit):
        cli.main(['plot', 'in.png', '--model', 'resnet18_ela_t', '--channel', '1', '--mean'])
    assert 'not allowed with' in capsys.readouterr().err


def test_several_models_are_drawn_below_their_names(tmp_path, monkeypatch, image):
    image.save(tmp_path / 'in.png')
    titles = []
    draw = plot_module.draw
    monkeypatch.setattr(plot_module, 'draw', lambda seen, names: titles.extend(names) or draw(seen, names))
    names = ['resnet18', 'resnet18_ca', 'resnet18_ela_t']
    sizes = []
    for models in (names[:1], names[:2], names):
        plot_file(tmp_path / 'in.png', models, tmp_path / 'out.png', pretrained=False)
        sizes.append(Image.open(tmp_path / 'out.png').size)
    assert sizes[0][0] == sizes[1][0] < sizes[2][0] == 1350 and sizes[0][1] < sizes[1][1] < sizes[2][1]
    assert titles == [*names[:1], *names[:2], *names]


def test_a_failed_run_keeps_the_older_file(tmp_path, image):
    image.save(tmp_path / 'in.png')
    (tmp_path / 'out.png').write_text('older')
    with pytest.raises(ValueError, match='stage 9'):
        plot_file(tmp_path / 'in.png', 'resnet18_ela_t', tmp_path / 'out.png', pretrained=False, stages=[9])
    assert (tmp_path / 'out.png').read_text() == 'older'


def test_a_full_disk_keeps_the_older_file_and_leaves_no_part(tmp_path, image):
    image.save(tmp_path / 'in.png')
    (tmp_path / 'out.png').write_text('older')
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes of any file: a write stops as on a full disk
    try:
        with pytest.raises(OSError, match=r'out\.png|too large'):
            plot_file(tmp_path / 'in.png', 'resnet18_ela_t', tmp_path / 'out.png', pretrained=False, stages=[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {'in.png', 'out.png'}
    assert (tmp_path / 'out.png').read_text() == 'older'


def test_a_link_a_device_and_a_pipe_stay_what_they_are(tmp_path, image):
    def plot(output):
        plot_file(tmp_path / 'in.png', 'resnet18_ela_t', output, pretrained=False, stages=[1])

    image.save(tmp_path / 'in.png')
    (tmp_path / 'link.png').symlink_to(tmp_path / 'out.png')
    plot(tmp_path / 'link.png')
    assert (tmp_path / 'link.png').is_symlink() and Image.open(tmp_path / 'out.png').format == 'PNG'
    plot('/dev/null')
    assert not Path('/dev/null').is_file()
    reading, writing = os.pipe()
    with ThreadPoolExecutor(1) as pool, open(reading, 'rb') as end:
        read = pool.submit(end.read)
        plot(f'/dev/fd/{writing}')
        os.close(writing)
        assert Image.open(BytesIO(read.result())).format == 'PNG'


@pytest.mark.parametrize('name, asked, loaded', [
    ('resnet18_ela_t', True, True),
    ('resnet18_ela_t', False, False),
    ('local-dir:folder', False, True),
    ('hf-hub:owner/name', False, True),
])
def test_a_source_always_loads_its_weights(tmp_path, monkeypatch, image, name, asked, loaded):
    calls = []

    def create_model(*args, **kwargs):
        calls.append((args, kwargs))
        return timm.create_model('resnet18_ela_t', num_classes=10)

    monkeypatch.setattr(plot_module, 'create_model', create_model)
    image.save(tmp_path / 'in.png')
    plot_file(tmp_path / 'in.png', name, tmp_path / 'out.png', asked, stages=[1])
    assert calls == [((name,), {'pretrained': loaded})]


def test_the_readme_begins_with_a_picture_that_loads_fast():
    before, _, rest = (ROOT / 'README.md').read_text(encoding='utf-8').partition('](')
    picture = ROOT / rest.partition(')')[0]
    assert re.fullmatch(r'# timm_ela\n\n!\[[^]]+', before)
    assert Image.open(picture).width >= 900 and picture.stat().st_size < 150_000
