"""What `timm_ela.plot` draws: its numbers are the gates, and the model is left as it was."""
import importlib
import re
import sys
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
import timm
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

from timm_ela import plot as plot_module
from timm_ela import plot_attention
from timm_ela.plot import plot_file


def make_model(name='resnet18_ela_t', size=(64, 96), zero_gates=False, cfg=None, **kwargs):
    """A model whose gates and batch norms are random, or whose gates are those of a fresh graft."""
    torch.manual_seed(0)
    overlay = {'input_size': (3, *size), **(cfg or {})}
    model = timm.create_model(name, pretrained_cfg_overlay=overlay, **{'num_classes': 10, **kwargs})
    for module in model.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.BatchNorm2d)):
            for parameter in module.parameters():
                parameter.data.uniform_(-1, 2)
                if zero_gates and isinstance(module, torch.nn.GroupNorm):
                    parameter.data.zero_()
    return model.eval()


@pytest.fixture
def image():
    """A wide picture without symmetries."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 13, 3), dtype=np.uint8)).resize((260, 140))


def panels(figure):
    """(title, gate map, a_h, a_w) of each stage, as drawn."""
    titled = [ax for ax in figure.axes if ax.get_title().startswith('stage')]
    drawn = []
    for ax in titled:
        left, below = strips(ax)
        drawn.append((ax.get_title(), ax.images[0], left.patches[0].get_data(), below.patches[0].get_data()))
    return drawn


def strips(ax):
    """The axes of a_h and of a_w beside a map."""
    left, _, _, below = (a for a in ax.figure.axes)
    return left, below


def class_texts(figure):
    lines = [line for ax in figure.axes for text in ax.texts for line in text.get_text().splitlines()]
    return [line for line in lines if line]


def expected_gates(model, image, names):
    """The formula, from what reaches the modules: (mean a_h * a_w, mean a_h, mean a_w) of each."""
    inputs = {}
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args: inputs.update({m: args[0].clone()}))
    transform = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        model(transform(image)[None])
        for name in names:
            se = model.get_submodule(name)
            a_h, a_w = (se.gn(se.conv(inputs[se].mean(d))).sigmoid()[0] for d in (3, 2))
            yield (a_h[:, :, None] * a_w[:, None, :]).mean(0), a_h.mean(0), a_w.mean(0)


def test_the_numbers_drawn_are_the_gates(image):
    model = make_model()
    drawn = panels(plot_attention(image, model, [2, 4]))
    names = 'layer2.1.se', 'layer4.1.se'
    expected = list(expected_gates(model, image, names))
    for (title, gate, rows, columns), name, (both, a_h, a_w) in zip(drawn, names, expected, strict=True):
        assert both.shape[0] != both.shape[1] and both.std() > 1e-3
        torch.testing.assert_close(torch.tensor(gate.get_array()), both)
        torch.testing.assert_close(torch.tensor(rows.values), a_h)
        torch.testing.assert_close(torch.tensor(columns.values), a_w)
        assert f'{len(a_h)} x {len(a_w)}, {model.get_submodule(name).gn.num_channels} channels' in title
        assert f'gate {both.min():.3f} to {both.max():.3f}, mean {both.mean():.3f}' in title
        assert name not in title


def test_a_single_channel_can_be_drawn(image):
    model = make_model()
    figure = plot_attention(image, model, [2], channel=5)
    inputs = []
    model.layer2[1].se.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone()))
    model(create_transform(**resolve_model_data_config(model))(image)[None])
    a_h, a_w = (a[0, 5].detach() for a in model.layer2[1].se.gates(inputs[0]))
    (_, gate, rows, columns), = panels(figure)
    torch.testing.assert_close(torch.tensor(gate.get_array()), a_h[:, None] * a_w)
    torch.testing.assert_close(torch.tensor(rows.values), a_h)
    torch.testing.assert_close(torch.tensor(columns.values), a_w)
    assert 'channel 5' in figure.get_suptitle() and 'mean over' not in figure.get_suptitle()
    for channel in (128, -1):
        with pytest.raises(ValueError, match=rf'^Stage 2 has channels 0 to 127, got {channel}\.$'):
            plot_attention(image, model, [2], channel=channel)


def test_strips_lie_along_the_map_row_by_row(image):
    figure = plot_attention(image, make_model(size=(64, 96)), [3])
    ax, = (ax for ax in figure.axes if ax.get_title().startswith('stage'))
    assert ax.images[0].get_extent() == [0, 6, 4, 0]  # left, right, bottom, top
    left, below = strips(ax)
    assert left.get_ylim() == ax.get_ylim() == (4, 0) and below.get_xlim() == ax.get_xlim() == (0, 6)
    FigureCanvasAgg(figure).draw()
    box, (beside, under) = ax.get_window_extent(), (strip.get_window_extent() for strip in (left, below))
    np.testing.assert_allclose((beside.y0, beside.y1, under.x0, under.x1), (box.y0, box.y1, box.x0, box.x1))
    assert beside.x1 < box.x0 and under.y1 < box.y0
    assert left.get_ylabel().endswith('mean over channels') and below.get_xlabel().endswith('mean over channels')


def test_the_maps_do_not_take_on_the_pictures_brightness(image):
    dark, bright = (image.point(lambda v, k=k: v * k) for k in (0, 1))
    model = make_model(zero_gates=True)
    for (_, a, *_), (_, b, *_) in zip(*(panels(plot_attention(i, model)) for i in (dark, bright)), strict=True):
        assert a.get_alpha() is None and (a.to_rgba(a.get_array()) == b.to_rgba(b.get_array())).all()


@pytest.mark.parametrize(('bias', 'said'), [
    (0, 'Gates within 0.001 of a fresh graft (0.25): they have hardly moved.'),
    (0.01, 'Gates within 0.003 of a fresh graft (0.25): they have hardly moved.'),
    (1, 'Single channels are up to 0.28 from a fresh graft (0.25): channel 0 of stage 1.'),  # sigmoid(1)^2 = 0.534
])
def test_the_title_says_in_words_how_far_the_gates_have_moved(image, bias, said):
    model = make_model(zero_gates=True)
    for m in model.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.bias.data[0] = bias  # of one channel: the mean over channels hides it
    assert plot_attention(image, model).get_suptitle().endswith(said)


def test_the_picture_is_what_the_model_saw(image):
    model = make_model(cfg={'mean': (0.1, 0.2, 0.3), 'std': (0.4, 0.5, 0.6)})
    config = {**resolve_model_data_config(model), 'mean': (0, 0, 0), 'std': (1, 1, 1)}
    seen = create_transform(**config)(image).permute(1, 2, 0)
    np.testing.assert_allclose(plot_attention(image, model, [1]).axes[0].images[0].get_array(), seen, atol=1e-6)


def test_a_model_of_grey_pictures_sees_grey(image):
    model = make_model(in_chans=1)
    assert plot_attention(image, model, [1]).axes[0].images[0].get_array().shape[:2] == (64, 96)


@pytest.mark.parametrize('name, kwargs, stages', [
    ('resnet18_ela_t', {}, {1: 'layer1.1.se', 2: 'layer2.1.se', 3: 'layer3.1.se', 4: 'layer4.1.se'}),
    ('resnet18_ela_t', {'features_only': True, 'num_classes': None, 'out_indices': (1, 2)},
     {1: 'layer1.1.se', 2: 'layer2.1.se'}),
    # timm's feature 3 ends with blocks.4, two levels after feature 2
    ('mobilenetv2_ela_t', {}, {1: 'blocks.1.1.se', 2: 'blocks.2.2.se', 3: 'blocks.4.2.se', 4: 'blocks.6.0.se'}),
])
def test_by_default_each_stage_shows_its_last_ela_module(image, name, kwargs, stages):
    drawn = panels(plot_attention(image, make_model(name, **kwargs)))
    modules = dict(timm.create_model(name, **kwargs).named_modules())
    wanted = [f'stage {s}: {modules[n].gn.num_channels} channels' for s, n in stages.items()]
    assert [re.sub(r' \d+ x \d+,', '', title.splitlines()[0]) for title, *_ in drawn] == wanted


def test_panels_share_one_scale_that_spans_them(image):
    figure = plot_attention(image, make_model())
    gates = [gate for _, gate, *_ in panels(figure)]
    (low, high), = {gate.get_clim() for gate in gates}
    assert low <= min(g.get_array().min() for g in gates) and high >= max(g.get_array().max() for g in gates)
    assert figure.axes[-1].get_ylim() == (low, high)  # the colour bar's
    children = [strips(ax) for ax in figure.axes if ax.get_title().startswith('stage')]
    (low, high), = {limits for left, below in children for limits in (left.get_xlim(), below.get_ylim())}
    values = [strip.values for _, _, *pair in panels(figure) for strip in pair]
    assert low <= min(0.5, *(s.min() for s in values)) and high >= max(0.5, *(s.max() for s in values))


def test_a_fresh_graft_is_drawn_flat_at_a_quarter(image):
    for title, gate, rows, columns in panels(plot_attention(image, make_model(zero_gates=True))):
        assert 'gate 0.250 to 0.250' in title and (gate.get_array() == 0.25).all()
        assert (rows.values == 0.5).all() and (columns.values == 0.5).all()
        np.testing.assert_allclose(gate.get_clim(), (0.2, 0.3), rtol=1e-6)


def test_the_model_is_left_as_it_was(image, monkeypatch):
    model = make_model().train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}

    def check():
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())  # batch norm's statistics too

    plot_attention(image, model)
    check()

    def fail(x):
        raise RuntimeError('out of memory')

    monkeypatch.setattr(model, 'forward_head', fail)
    with pytest.raises(RuntimeError, match='out of memory'):
        plot_attention(image, model)
    check()


def test_the_top_classes_carry_the_models_probabilities(image):
    model = make_model()
    with torch.no_grad():
        p = model(create_transform(**resolve_model_data_config(model))(image)[None])[0].softmax(0)
    expected = [f'{p[i]:.1%}  class {i}' for i in p.argsort(descending=True)]
    assert class_texts(plot_attention(image, model)) == expected[:5]
    assert class_texts(plot_attention(image, model, topk=20)) == expected
    assert class_texts(plot_attention(image, model, [1], topk=2)) == expected[:2]


@pytest.mark.parametrize('cfg, given, expected', [
    ({}, None, ['class 2', 'class 0', 'class 1']),
    ({'label_names': ['n0', 'n1', 'n2']}, None, ['n2', 'n0', 'n1']),
    ({'label_names': {'2': 'n2', '0': 'n0', '1': 'n1'}}, None, ['n2', 'n0', 'n1']),
    ({'label_names': ['n0', 'n1', 'n2'], 'label_descriptions': {'n0': 'cat'}}, None, ['n2', 'cat', 'n1']),
    ({'label_names': ['n0', 'n1', 'n2'], 'label_descriptions': {'n0': 'cat'}}, ['n0', 'b', 'c'], ['c', 'n0', 'b']),
    ({'label_names': ['of', 'another', 'head', 'entirely']}, None, ['class 2', 'class 0', 'class 1']),
    ({}, ['x' * 41, 'y' * 40, 'z'], ['z', 'x' * 39 + '…', 'y' * 40]),
])
def test_class_names(image, cfg, given, expected):
    model = make_model(num_classes=3, cfg=cfg)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.tensor([1, 0, 2]))
    figure = plot_attention(image, model, [1], class_names=given)
    assert [text.partition('  ')[2] for text in class_texts(figure)] == expected


def test_a_class_name_is_no_formula(image):
    FigureCanvasAgg(plot_attention(image, make_model(), [1], class_names=[r'$\none$'] * 10)).draw()


def test_a_thousand_classes_are_imagenets(image):
    model = make_model(num_classes=1000)
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.copy_(torch.arange(1000) == 281)
    top = class_texts(plot_attention(image, model, [1], topk=1))
    assert top == ['0.3%  tabby, tabby cat']


def test_a_model_without_a_classifier_has_no_classes_to_show(image):
    figure = plot_attention(image, make_model(num_classes=0))
    assert len(panels(figure)) == 4 and not class_texts(figure)


@pytest.mark.parametrize('size, stages', [((64, 64), [1]), ((48, 128), [1, 4]), ((128, 64), [1, 2, 3, 4])])
def test_no_text_is_clipped_or_overlaps_another(image, size, stages):
    names = sorted(ImageNetInfo().label_descriptions(), key=len)[-10:]
    figure = plot_attention(image, make_model(size=size), stages, class_names=names)
    FigureCanvasAgg(figure).draw()
    texts = []
    for ax in figure.findobj(Axes):
        texts += [ax.title, *ax.texts]
    texts.append(figure._suptitle)
    for ax in figure.findobj(Axes):
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            texts += [axis.label, *(label for at, label in ticks if low <= at <= high)]
    boxes = {text: text.get_window_extent() for text in texts if text.get_text()}
    assert len(boxes) > 3 + 5 * len(stages)
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for (a, box), (b, other) in combinations(boxes.items(), 2):
        assert not box.overlaps(other), (a, b)


def test_no_ela_stage_or_name_too_many_is_said(image):
    with pytest.raises(ValueError, match=r'^resnet18 has no ELA module to plot: give an ELA model, such as .resnet50'):
        plot_attention(image, timm.create_model('resnet18'))
    with pytest.raises(ValueError, match=r'^resnet18_ela_t has no ELA in stage 0, only in 1, 2, 3, 4\.$'):
        plot_attention(image, make_model(), [1, 0])
    with pytest.raises(ValueError, match=r'^The model has 10 classes, but 2 class names were given\.$'):
        plot_attention(image, make_model(), class_names=['a', 'b'])


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, image):
    for name in ('matplotlib', 'matplotlib.figure'):
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(plot_module)  # the module itself does without
    for call in (lambda: plot_attention(image, make_model()), lambda: plot_file('none.png', 'none', 'out.png')):
        with pytest.raises(ModuleNotFoundError, match=r'^Plotting needs matplotlib: pip install matplotlib$'):
            call()


def test_pyplot_is_not_touched(monkeypatch, image):
    monkeypatch.setitem(sys.modules, 'matplotlib.pyplot', None)
    plot_attention(image, make_model(), [4]).savefig(BytesIO())
