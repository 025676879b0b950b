"""What `plot_attention` draws and `timm-ela plot` writes: the numbers of `observe`, on one scale, in words."""
import importlib
import os
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from timm.data import ImageNetInfo

from timm_ela import cli, plot_attention
from timm_ela import plot as plot_module
from timm_ela.observe import observe
from timm_ela.plot import in_words, plot_file


def make_model(name='resnet18_ela_t', size=(64, 96), bias=None, **kwargs):
    """A model whose gates and batch norms are random, or whose gates are a graft's but for this bias of a channel."""
    torch.manual_seed(0)
    kwargs = {'num_classes': 10, 'pretrained_cfg_overlay': {'input_size': (3, *size)}, **kwargs}
    model = timm.create_model(name, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.BatchNorm2d)):
            for parameter in module.parameters():
                parameter.data.uniform_(-1, 2)
        if isinstance(module, torch.nn.GroupNorm) and bias is not None:
            module.weight.data.zero_()
            module.bias.data.zero_()[0] = bias
    return model


def titled(figure, start):
    """The panels, in their order, whose title starts so."""
    return [ax for ax in figure.axes if ax.get_title(loc='left').startswith(start)]


def texts(figure):
    """Texts that stand on axes, without titles and labels."""
    return [text.get_text() for ax in figure.findobj(Axes) for text in ax.texts]


@pytest.mark.parametrize('kwargs', [{}, {'channel': 5, 'stages': [2]}, {'mean': True, 'stages': [3]}], ids=str)
def test_the_numbers_drawn_are_those_observed(image, kwargs):
    model = make_model()
    figure, seen = plot_attention(image, model, **kwargs), observe(image, model, **kwargs)
    assert [ax.get_title(loc='left').partition('\n')[0] for ax in figure.axes] == [
        'resnet18_ela_t', 'What the model saw', 'Grad-CAM: what speaks for',
        *(f'stage {gate.stage}: {gate.shown}' for gate in seen.gates), 'All gates, of all channels']
    _, picture, cam, *maps, _ = figure.axes
    assert picture.get_title(loc='left').endswith('\n64 x 96 pixels')
    np.testing.assert_array_equal(picture.images[0].get_array(), seen.picture)
    bars, = picture.child_axes
    assert [text.get_text() for text in bars.texts] == [f' {p:.1%}  {name}' for p, name in seen.classes]
    # the first container has the grey bars behind them
    np.testing.assert_allclose([bar.get_width() for bar in bars.containers[1]], [p for p, _ in seen.classes])
    assert cam.get_title(loc='left').endswith(f'\n{seen.classes[0][1]}')
    np.testing.assert_array_equal(cam.images[1].get_array(), seen.cam)
    for ax, gate in zip(maps, seen.gates, strict=True):
        values = f'{"gate" if kwargs else "varies most"}: {gate.map.min():.3f} to {gate.map.max():.3f}'
        assert ax.get_title(loc='left').endswith(f'\n{values}')
        np.testing.assert_array_equal(ax.images[0].get_array(), gate.map)
        for strip, values in zip(ax.child_axes, (gate.a_h, gate.a_w), strict=True):
            stairs, = strip.patches
            np.testing.assert_array_equal(stairs.get_data().values, values)
            assert stairs.get_data().baseline == 0.5


def test_strips_lie_along_the_map_row_by_row(image):
    figure = plot_attention(image, make_model(), [3])
    FigureCanvasAgg(figure).draw()
    ax, = titled(figure, 'stage')
    left, below = ax.child_axes
    box, beside, under = (a.get_window_extent() for a in (ax, left, below))
    np.testing.assert_allclose((beside.y0, beside.y1, under.x0, under.x1), (box.y0, box.y1, box.x0, box.x1))
    assert beside.x1 < box.x0 and under.y1 < box.y0
    assert (left.get_ylim(), below.get_xlim()) == ((4, 0), (0, 6))
    low, high = left.get_xlim()
    assert below.get_ylim() == (low, high) and left.get_ylabel().endswith(f': {low} to {high}')
    assert low <= min(left.patches[0].get_data().values) and max(below.patches[0].get_data().values) <= high


def test_all_gates_of_all_models_have_one_scale_from_0_and_a_distribution(image):
    models = [make_model(), make_model('resnet18'), make_model('mobilenetv2_ela_b', bias=0)]
    for drawn, chosen in ((models, [1, 4]), (models[2:], [3])):
        figure = plot_attention(image, drawn, chosen)
        seen = [observe(image, model, chosen).gates for model in drawn]
        scale = 0, max([0.5, *(gate.all.max() for stages in seen for gate in stages)])
        assert {ax.images[0].get_clim() for ax in titled(figure, 'stage')} == {scale}
        for ax, stages in zip(titled(figure, 'All gates'), filter(None, seen), strict=True):
            assert ax.get_xlim() == ax.child_axes[0].get_xlim() == scale
            assert [line.get_xdata()[0] for line in ax.lines] == [0.25]
            assert [label.get_text() for label in ax.get_yticklabels()] == [f'stage {gate.stage}' for gate in stages]
            for row, (gate, histogram) in enumerate(zip(stages, ax.patches, strict=True)):
                heights, edges, baseline = histogram.get_data()
                counts, _ = np.histogram(gate.all, edges)
                assert counts.sum() == gate.all.size and baseline == row
                np.testing.assert_allclose((row - heights) / (row - heights).max(), counts / counts.max())


@pytest.mark.parametrize('bias, said', [
    (0.01, 'All gates are within 0.01 of an untrained graft (0.25).'),
    # sigmoid(1)^2 = 0.534
    (1, 'The gates differ from 0.25 (untrained graft) by up to 0.28: channel 0 of stage 1.'),
])
def test_a_sentence_says_how_far_the_gates_are_from_a_grafts(image, bias, said):
    model = make_model(bias=bias)
    for kwargs in ({}, {'channel': 3}, {'mean': True}):
        assert in_words(observe(image, model, **kwargs).gates) == said
    assert texts(plot_attention(image, model))[0] == said


@pytest.mark.parametrize('name, below, title', [
    (r'$\none$', r'$\none$', r'$\none$'),
    ('rubber eraser, rubber, pencil eraser', 'rubber eraser', 'rubber eraser, rubber'),
    ('a very long name of a class', 'a very long name o…', 'a very long name of a…')])
def test_a_class_name_is_as_long_as_there_is_space_and_no_formula(image, name, below, title):
    plain, gated = make_model('resnet18'), make_model()
    figure = plot_attention(image, [plain, gated], [1], class_names=[name] * 10, titles=[r'$\no$'] * 2)
    FigureCanvasAgg(figure).draw()
    assert [text.partition('%  ')[2] for text in texts(figure) if '%' in text] == [name] * 5 + [below] * 5
    assert len(titled(figure, f'Grad-CAM: what speaks for\n{title}')) == 2
    torch.nn.init.zeros_(plain.fc.weight)
    assert titled(plot_attention(image, plain, class_names=[name] * 10), f'Grad-CAM: nothing speaks for\n{title}')


def test_models_stand_below_each_other_and_pictures_keep_the_ratio_of_their_sides(image):
    models = [make_model('resnet18'), make_model('resnet18_ca', size=(128, 64)), make_model()]
    figure = plot_attention(image, models, titles=['plain', 'CA', 'ELA'])
    FigureCanvasAgg(figure).draw()
    titles = [titled(figure, title)[0] for title in ('plain', 'CA', 'ELA')]
    pictures = titled(figure, 'What the model saw')
    rows = [ax.get_window_extent() for group in zip(titles, pictures, strict=True) for ax in group]
    assert all(above.y0 > row.y1 for above, row in zip(rows, rows[1:], strict=False))
    for panels in (pictures, titled(figure, 'Grad-CAM')):
        boxes = [ax.get_window_extent() for ax in panels]
        np.testing.assert_allclose([box.height / box.width for box in boxes], [2 / 3, 2, 2 / 3], rtol=0.02)
    assert texts(figure).count('The model has no ELA, so no gates are drawn.') == 2
    with pytest.raises(ValueError, match='There are 3 models, but 2 titles'):
        plot_attention(image, models, titles=['a', 'b'])


@pytest.mark.parametrize('models, kwargs', [
    ([{'size': (32, 128)}], {'stages': [1, 4]}),
    ([{'size': (128, 64), 'in_chans': 1, 'num_classes': 2}], {}),
    ([{'bias': 0}, {'name': 'resnet18_ca'}], {'stages': [3, 4], 'mean': True}),
    ([{'name': 'resnet18'}], {'topk': 10, 'titles': [f'local-dir:{"folder/" * 20}my-model']}),
    ([{'name': 'resnet18'}, {}, {'name': 'mobilenetv2_ela_b', 'size': (96, 64)}], {'topk': 8}),
])
def test_no_text_is_clipped_or_overlaps_another(image, models, kwargs):
    models = [make_model(**model) for model in models]
    longest = sorted(ImageNetInfo().label_descriptions(), key=len)[-models[0].num_classes:]
    figure = plot_attention(image, models, class_names=longest, **kwargs)
    FigureCanvasAgg(figure).draw()
    shown, panels = [], figure.findobj(Axes)
    for ax in panels:
        shown += [ax._left_title, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            shown += [axis.label, *(label for at, label in ticks if low <= at <= high)]
    boxes = {text: text.get_window_extent() for text in shown if text.get_text()}
    assert len(boxes) > 5 and figure.get_figwidth() == 9
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        assert not any(box.overlaps(ax.get_window_extent()) for ax in panels if ax is not text.axes), text
        # 9.7 pixels in a README, 900 pixels wide
        assert text.get_fontsize() >= 7
    for (a, box), (b, other) in combinations(boxes.items(), 2):
        assert not box.overlaps(other), (a, b)


@pytest.fixture
def plot(tmp_path, monkeypatch, image):
    """Plots stage 1 of a model with random weights, unless told otherwise, in a folder that holds in.png alone."""
    monkeypatch.chdir(tmp_path)
    image.save('in.png')
    defaults = {'image': 'in.png', 'models': ['resnet18_ela_t'], 'output': 'out.png', 'pretrained': False}
    return lambda **kwargs: plot_file(**{**defaults, 'stages': [1], **kwargs})


def test_the_file_is_a_picture_without_pyplot(plot, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)
    # the name of a model stays one where a folder is called so
    Path('resnet18_ela_t').mkdir()
    for name, kind in (('out.png', 'PNG'), ('out.jpg', 'JPEG'), ('out', 'PNG')):
        plot(output=name)
        with Image.open(name) as written:
            assert written.format == kind and np.asarray(written.convert('L')).std() > 10


@pytest.mark.parametrize('kwargs, error', [
    ({'output': 'out.xyz'}, "'xyz' is not supported .*png"),
    ({'output': 'no_such_folder/out.png'}, 'No such file or directory: .*no_such_folder/out.png'),
    ({'image': 'no.png', 'models': ['none']}, 'No such file or directory: .*no.png'),
    ({'image': 'out.png'}, 'cannot identify image file .*out.png'),
    ({'models': ['resnet18', '.']}, r"^'\.' is a folder, not a model name: give local-dir:\.\.$"),
    ({'stages': [7]}, 'no ELA in stage 7'),
])
def test_a_failure_is_one_line_and_keeps_the_older_file(plot, kwargs, error):
    Path('out.png').write_text('older')
    with pytest.raises((ValueError, RuntimeError, OSError), match=error) as raised:
        plot(**kwargs)
    assert '\n' not in str(raised.value)
    assert sorted(os.listdir()) == ['in.png', 'out.png'] and Path('out.png').read_text() == 'older'


def test_only_drawing_needs_matplotlib(image, monkeypatch):
    for name in ('matplotlib', 'matplotlib.cm', 'matplotlib.figure'):
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(plot_module)
    with pytest.raises(ModuleNotFoundError, match='matplotlib'):
        plot_attention(image, make_model())


@pytest.mark.parametrize('options, asked', [
    ([], {}), (['--class', '3', '--channel', '5'], {'class_index': 3, 'channel': 5}),
    (['--mean', '--stages', '1', '2', '--no-pretrained'], {'mean': True, 'stages': [1, 2]})])
def test_the_command_loads_the_models_and_passes_its_options_on(plot, monkeypatch, options, asked):
    made, drawn = {}, []
    monkeypatch.setattr(plot_module, 'create_model', lambda name, pretrained: made.update({name: pretrained}))
    monkeypatch.setattr(plot_module, 'plot_attention', lambda *args, **kwargs: drawn.append(kwargs) or Figure())
    models = ['resnet18_ela_t', 'local-dir:folder', 'hf-hub:owner/name']
    cli.main(['plot', 'in.png', '--model', *models, *options, '-o', 'out.png'])
    assert Image.open('out.png').format == 'PNG'
    # a source always loads its weights
    assert made == dict(zip(models, ['--no-pretrained' not in options, True, True], strict=True))
    defaults = {'stages': None, 'class_index': None, 'channel': None, 'mean': False}
    assert drawn == [{'titles': models, **defaults, **asked}]
