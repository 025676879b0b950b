"""What `plot_attention` draws: panels whose numbers are those of `observe`, on one scale, in words that can be read."""
import importlib
import sys
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from timm.data import ImageNetInfo

from timm_ela import figure as figure_module
from timm_ela import plot as plot_module
from timm_ela import plot_attention
from timm_ela.observe import observe
from timm_ela.plot import plot_file


def make_model(name='resnet18_ela_t', size=(64, 96), zero_gates=False, **kwargs):
    """A model whose gates and batch norms are random, or whose gates are those of a fresh graft."""
    torch.manual_seed(0)
    kwargs = {'num_classes': 10, 'pretrained_cfg_overlay': {'input_size': (3, *size)}, **kwargs}
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.BatchNorm2d)):
            for parameter in module.parameters():
                parameter.data.uniform_(-1, 2)
                if zero_gates and isinstance(module, torch.nn.GroupNorm):
                    parameter.data.zero_()
    return model.eval()


def eight_stages(**kwargs):
    model = make_model('resnet50_ela_b', **kwargs)
    blocks = [f'layer{i}.{j}' for i, count in enumerate((3, 4, 6, 3), 1) for j in (0, count - 1)]
    model.feature_info = [
        {'module': name, 'num_chs': 128 * 2 ** int(name[5]), 'reduction': 2 ** (int(name[5]) + 1)} for name in blocks]
    return model


def titled(figure, start):
    """The axes, in the order of the panels, whose title starts so."""
    return [ax for ax in figure.axes if ax.get_title(loc='left').startswith(start)]


def texts(figure):
    """Texts that stand in the figure or on its axes, without titles and labels."""
    return [text.get_text() for holder in (figure, *figure.axes) for text in holder.texts]


def strips(figure, ax):
    """The axes of a_h and of a_w beside a map: they are made right after it."""
    i = figure.axes.index(ax)
    return figure.axes[i + 1:i + 3]


def test_the_panels_come_in_their_order(image):
    axes = [ax for ax in plot_attention(image, make_model()).axes if ax.get_title(loc='left')]
    boxes = {ax.get_title(loc='left').splitlines()[0].split(':')[0]: ax.get_position() for ax in axes}
    assert sorted(boxes, key=lambda title: (-round(boxes[title].y1, 3), boxes[title].x0)) == [
        'What the model saw', 'Grad-CAM', 'stage 1', 'stage 2', 'stage 3', 'stage 4', 'All gates, of all channels']


@pytest.mark.parametrize('kwargs', [{}, {'channel': 5}, {'mean': True}], ids=str)
def test_the_numbers_drawn_are_those_observed(image, kwargs):
    model = make_model()
    figure, seen = plot_attention(image, model, **kwargs), observe(image, model, **kwargs)
    for ax, gate in zip(titled(figure, 'stage'), seen.gates, strict=True):
        values = f'{"gate" if kwargs else "varies most"}: {gate.map.min():.2f} to {gate.map.max():.2f}'
        assert ax.get_title(loc='left') == f'stage {gate.stage}: {gate.of}\n{values}'
        a_h, a_w = (strip.patches[0].get_data().values for strip in strips(figure, ax))
        for drawn, right in ((ax.images[0].get_array(), gate.map), (a_h, gate.a_h), (a_w, gate.a_w)):
            np.testing.assert_array_equal(drawn, right)
    picture, = titled(figure, 'What the model saw\n64 x 96 pixels')
    np.testing.assert_array_equal(picture.images[0].get_array(), seen.picture)
    cam, = titled(figure, f'Grad-CAM: what speaks for\n{seen.classes[0][1]}')
    np.testing.assert_array_equal(cam.images[1].get_array(), seen.cam)
    assert [text for text in texts(figure) if '%' in text] == [f' {p:.1%}  {name}' for p, name in seen.classes]
    # The first container has the grey bars behind them.
    bars = [patch.get_width() for ax in figure.axes for box in ax.containers[1:2] for patch in box]
    np.testing.assert_allclose(bars, [p for p, _ in seen.classes])


def test_strips_lie_along_the_map_row_by_row(image):
    figure = plot_attention(image, make_model(size=(64, 96)), [3])
    ax, = titled(figure, 'stage')
    assert ax.images[0].get_extent() == [0, 6, 4, 0]  # left, right, bottom, top
    left, below = strips(figure, ax)
    assert left.get_ylim() == ax.get_ylim() == (4, 0) and below.get_xlim() == ax.get_xlim() == (0, 6)
    assert left.get_xlim() == below.get_ylim()
    FigureCanvasAgg(figure).draw()
    box, (beside, under) = ax.get_window_extent(), (strip.get_window_extent() for strip in (left, below))
    np.testing.assert_allclose((beside.y0, beside.y1, under.x0, under.x1), (box.y0, box.y1, box.x0, box.x1))
    assert beside.x1 < box.x0 and under.y1 < box.y0
    for strip in (left.patches[0], below.patches[0]):
        assert strip.get_data().baseline == 0.5


@pytest.mark.parametrize('models', [[make_model()], [make_model(zero_gates=True)], [
    make_model(), make_model('resnet18'), make_model('mobilenetv2_ela_b', zero_gates=True)]], ids=len)
def test_all_gates_have_one_scale_from_0(image, models):
    figure = plot_attention(image, models)
    gates = [gate.all for model in models for gate in observe(image, model).gates]
    (low, high), = {ax.images[0].get_clim() for ax in titled(figure, 'stage')}
    assert (low, high) == (0, max(0.5, *(gate.max() for gate in gates)))
    for ax in titled(figure, 'All gates'):
        bar = figure.axes[figure.axes.index(ax) + 1]
        assert ax.get_xlim() == bar.get_xlim() == bar.images[0].get_clim() == (low, high)


@pytest.mark.parametrize(('bias', 'title', 'scale'), [
    (0, 'gate: 0.2500 to 0.2500', ['.4', '.6']), (0.004, 'gate: 0.2510 to 0.2510', ['.5', '.51']),
    (-0.25, 'gate: 0.1917 to 0.1917', ['.4', '.5']),
])
def test_gates_that_hardly_move_are_shown_with_more_digits(image, bias, title, scale):
    model = make_model(zero_gates=True)
    for m in model.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.bias.data.fill_(bias)
    figure = plot_attention(image, model, [2], channel=1)
    ax, = titled(figure, 'stage')
    assert ax.get_title(loc='left').splitlines()[1] == title
    left, below = strips(figure, ax)
    assert [[label.get_text() for label in labels] for labels in (left.get_xticklabels(), below.get_yticklabels())] == [
        scale, scale]


@pytest.mark.parametrize(('name', 'short'), [
    ('dog', 'dog'), ('panpipe, pandean pipe, syrinx', 'panpipe, pandean pipe'),
    ('rubber eraser, rubber, pencil eraser', 'rubber eraser, rubber'),
    ('one very long name of a class', 'one very long name of…'),
])
def test_a_long_class_name_keeps_its_first_synonyms(image, name, short):
    figure = plot_attention(image, make_model('resnet18'), class_names=[name] * 10)
    assert all(text.endswith(f'%  {short}') for text in texts(figure) if '%' in text)
    assert titled(figure, f'Grad-CAM: what speaks for\n{short}')


def test_the_distribution_counts_every_gate_and_marks_a_quarter(image):
    model = make_model()
    ax, = titled(plot_attention(image, model, [2, 4]), 'All gates, of all channels\ndashed: 0.25, untrained graft')
    assert [label.get_text() for label in ax.get_yticklabels()] == ['stage 2', 'stage 4']
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.25, 0.25]]
    for i, (gate, histogram) in enumerate(zip(observe(image, model, [2, 4]).gates, ax.patches, strict=True)):
        heights, edges, baseline = histogram.get_data()
        counts, _ = np.histogram(gate.all, edges)
        assert counts.sum() == gate.all.size and baseline == i
        np.testing.assert_allclose((i - heights) / (i - heights).max(), counts / counts.max())


@pytest.mark.parametrize(('bias', 'said'), [
    (0, 'Gates within 0.001 of an untrained graft (0.25).'),
    (0.01, 'Gates within 0.003 of an untrained graft (0.25).'),
    (1, 'The gates differ from 0.25 (untrained graft) by up to 0.28: channel 0 of stage 1.'),  # sigmoid(1)^2 = 0.534
])
def test_the_title_says_in_words_how_far_the_gates_are_from_a_grafts(image, bias, said):
    model = make_model(zero_gates=True)
    for m in model.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.bias.data[0] = bias  # of one channel: the mean over channels hides it
    for kwargs in ({}, {'channel': 3}, {'mean': True}):
        assert texts(plot_attention(image, model, **kwargs))[:2] == ['resnet18_ela_t', said]


def test_models_stand_below_each_other_in_columns_and_those_without_ela_have_two_panels(image):
    models = [make_model('resnet18'), make_model('resnet18_ca'), make_model()]
    figure = plot_attention(image, models, titles=['plain', 'CA', 'ELA'])
    cams, boxes = titled(figure, 'Grad-CAM'), [ax.get_position() for ax in titled(figure, 'Grad-CAM')]
    for ax, model in zip(cams, models, strict=True):
        np.testing.assert_array_equal(ax.images[1].get_array(), observe(image, model).cam)
    assert len({round(box.x0, 6) for box in boxes}) == len({round(box.width, 6) for box in boxes}) == 1
    assert boxes[0].y0 > boxes[1].y1 and boxes[1].y0 > boxes[2].y1
    titles = [text for text in figure.texts if text.get_text() in ('plain', 'CA', 'ELA')]
    assert [text.get_position()[1] > box.y1 for text, box in zip(titles, boxes, strict=True)] == [True] * 3
    assert len([ax for ax in figure.axes if ax.get_title(loc='left')]) == 3 * 2 + 4 + 1
    assert len(titled(figure, 'stage')) == 4 and len([t for t in texts(figure) if '%' in t]) == 15
    assert texts(figure).count('The model has no ELA, so no gates are drawn.') == 2
    one, two = plot_attention(image, models[0]), plot_attention(image, models[:2])
    assert one.get_figwidth() == two.get_figwidth() < figure.get_figwidth() == 9
    assert one.get_figheight() < two.get_figheight() < figure.get_figheight()


def test_there_is_a_title_for_each_model(image):
    with pytest.raises(ValueError, match='There are 1 models, but 2 titles'):
        plot_attention(image, make_model('resnet18'), titles=['a', 'b'])


def test_a_class_that_nothing_speaks_for_is_said_so(image):
    model = make_model('resnet18')
    torch.nn.init.zeros_(model.fc.weight)
    assert titled(plot_attention(image, model, class_index=3), 'Grad-CAM: nothing speaks for\nclass 3')


def test_a_class_name_is_no_formula(image):
    names = [r'$\none$'] * 10
    FigureCanvasAgg(plot_attention(image, make_model(), [1], class_names=names, titles=[r'$\no$'])).draw()


@pytest.mark.parametrize('models, kwargs', [
    ([make_model(size=(64, 64))], {'stages': [1]}),
    ([make_model(size=(48, 128))], {'stages': [1, 4]}),
    ([make_model(size=(128, 64))], {}),
    ([make_model(in_chans=1, num_classes=2)], {}),
    ([make_model(zero_gates=True)], {'mean': True}),
    ([make_model(zero_gates=True), make_model('resnet18_ca')], {'stages': [3, 4]}),
    ([make_model('resnet18')], {'topk': 10, 'titles': [f'local-dir:{"folder/" * 20}my-model']}),
    ([make_model('resnet18_se'), make_model('resnet18_ca', size=(64, 64))], {}),
    ([make_model('resnet18'), make_model(), make_model('mobilenetv2_ela_b', size=(96, 64))], {'topk': 8}),
    ([make_model(features_only=True, num_classes=None)], {}),
    ([eight_stages(size=(128, 128))], {}),
])
def test_no_text_is_clipped_or_overlaps_another(image, models, kwargs):
    classes = getattr(models[0], 'num_classes', None)
    if classes:
        kwargs['class_names'] = sorted(ImageNetInfo().label_descriptions(), key=len)[-classes:]
    figure = plot_attention(image, models, **kwargs)
    FigureCanvasAgg(figure).draw()
    shown = list(figure.texts)
    for ax in figure.findobj(Axes):
        shown += [ax._left_title, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            shown += [axis.label, *(label for at, label in ticks if low <= at <= high)]
    boxes = {text: text.get_window_extent() for text in shown if text.get_text()}
    assert len(boxes) > 5
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
        others = [ax for ax in figure.axes if ax is not text.axes]
        assert not any(box.overlaps(ax.get_window_extent()) for ax in others), text
        assert text.get_fontsize() >= 7  # 9.7 pixels in a README, 900 pixels wide
    assert figure.get_figwidth() <= 9
    for (a, box), (b, other) in combinations(boxes.items(), 2):
        assert not box.overlaps(other), (a, b)


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, image):
    for name in ('matplotlib', 'matplotlib.figure'):
        monkeypatch.setitem(sys.modules, name, None)
    for module in (figure_module, plot_module):  # the modules themselves do without
        importlib.reload(module)
    for call in (lambda: plot_attention(image, make_model()), lambda: plot_file('none.png', 'none', 'out.png')):
        with pytest.raises(ModuleNotFoundError, match=r'^Plotting needs matplotlib: pip install matplotlib$'):
            call()


def test_pyplot_is_not_touched(monkeypatch, image):
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)
    plot_attention(image, make_model(), [4]).savefig(BytesIO())
