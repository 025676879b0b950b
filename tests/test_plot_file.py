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
def plot(tmp_path, monkeypatch, image):
    """Plots stage 1 of a model with random weights, unless told otherwise, in a folder that holds in.png alone."""
    monkeypatch.chdir(tmp_path)
    image.save('in.png')
    defaults = {'image': 'in.png', 'models': 'resnet18_ela_t', 'output': 'out.png', 'pretrained': False, 'stages': [1]}
    return lambda **kwargs: plot_file(**{**defaults, **kwargs})


def test_the_file_is_a_picture(plot):
    for name, kind in (('out.png', 'PNG'), ('out.jpg', 'JPEG'), ('out', 'PNG')):
        plot(output=name)
        with Image.open(name) as written:
            assert written.format == kind and np.asarray(written.convert('L')).std() > 10


@pytest.mark.parametrize('kwargs, error, before_a_download', [
    ({'output': 'out.xyz'}, "'xyz' is not supported, only .*png", True),
    ({'output': 'no_such_folder/out.png'}, 'no folder no_such_folder to write out.png', True),
    ({'image': 'no.png', 'models': 'no_such_model'}, 'Cannot read the image .no.png', True),
    ({'models': ['resnet18', '.']}, r"^'\.' is a folder, not a model name: give local-dir:\.\.$", True),
    ({'models': ['resnet18', 'resnet18_ela_x']}, 'Unknown model', False),
    ({'stages': [7]}, 'no ELA in stage 7', False),
    ({'channel': 512}, 'Stage 1 has channels 0 to 63, got 512', False),
    ({'class_index': 1000}, 'classes 0 to 999, got 1000', False),
])
def test_a_failure_keeps_the_older_file_and_leaves_nothing(plot, monkeypatch, kwargs, error, before_a_download):
    Path('out.png').write_text('older')
    if before_a_download:
        monkeypatch.setattr(plot_module, 'create_model', None)
    with pytest.raises((ValueError, RuntimeError, OSError), match=error) as raised:
        plot(**kwargs)
    assert '\n' not in str(raised.value)
    assert sorted(os.listdir()) == ['in.png', 'out.png'] and Path('out.png').read_text() == 'older'


@pytest.mark.parametrize('content', [b'', b'no image', b'\x89PNG\r\n\x1a\n' + bytes(40), 'truncated'])
def test_an_image_that_does_not_decode_is_named_in_one_line(plot, content):
    Path('bad.png').write_bytes(Path('in.png').read_bytes()[:3000] if content == 'truncated' else content)
    with pytest.raises(ValueError, match=r'^Cannot read the image .bad\.png') as error:
        plot(image='bad.png')
    assert '\n' not in str(error.value) and not Path('out.png').exists()


def test_a_full_disk_keeps_the_older_file_and_leaves_no_part(plot):
    Path('out.png').write_text('older')
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # bytes of any file: a write stops as on a full disk
    try:
        with pytest.raises(OSError, match=r'out\.png|too large'):
            plot()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir()) == ['in.png', 'out.png'] and Path('out.png').read_text() == 'older'


def test_a_link_a_device_and_a_pipe_stay_what_they_are(plot):
    Path('link.png').symlink_to('out.png')
    plot(output='link.png')
    assert Path('link.png').is_symlink() and Image.open('out.png').format == 'PNG'
    plot(output='/dev/null')
    assert not Path('/dev/null').is_file()
    reading, writing = os.pipe()
    with ThreadPoolExecutor(1) as pool, open(reading, 'rb') as end:
        read = pool.submit(end.read)
        plot(output=f'/dev/fd/{writing}')
        os.close(writing)
        assert Image.open(BytesIO(read.result())).format == 'PNG'


@pytest.mark.parametrize('options, cam_class, of', [
    ([], None, 'varies'), (['--class', '3', '--channel', '5'], 'tiger shark', 'channel 5 of 64'),
    (['--mean'], None, 'mean of 64 channels')])
def test_the_command_passes_its_options_on(plot, monkeypatch, options, cam_class, of):
    drawn, titles, draw = [], [], plot_module.draw
    monkeypatch.setattr(
        plot_module, 'draw', lambda seen, names: titles.extend(names) or drawn.extend(seen) or draw(seen, names))
    models = ['resnet18', 'resnet18_ela_t']
    cli.main(['plot', 'in.png', '--model', *models, '--no-pretrained', '--stages', '1', *options, '-o', 'out.png'])
    assert Image.open('out.png').format == 'PNG'
    assert titles == [one.model for one in drawn] == models and [len(one.gates) for one in drawn] == [0, 1]
    gate, = drawn[1].gates
    assert gate.varies_most if of == 'varies' else gate.of == of
    for one in drawn:
        assert one.cam_class.startswith(cam_class) if cam_class else one.cam_class == one.classes[0][1]


@pytest.mark.parametrize('name, asked, loaded', [
    ('resnet18_ela_t', True, True), ('resnet18_ela_t', False, False), ('local-dir:folder', False, True),
    ('hf-hub:owner/name', False, True)])
def test_a_source_always_loads_its_weights(plot, monkeypatch, name, asked, loaded):
    calls = []
    monkeypatch.setattr(plot_module, 'create_model', lambda *args, **kwargs: calls.append((args, kwargs)) or (
        timm.create_model('resnet18_ela_t', num_classes=10)))
    plot(models=name, pretrained=asked)
    assert calls == [((name,), {'pretrained': loaded})]


def test_the_readme_begins_with_a_picture_that_loads_fast():
    before, _, rest = (ROOT / 'README.md').read_text(encoding='utf-8').partition('](')
    picture = ROOT / rest.partition(')')[0]
    assert re.fullmatch(r'# timm_ela\n\n!\[[^]]+', before)
    assert Image.open(picture).width >= 900 and picture.stat().st_size < 150_000
