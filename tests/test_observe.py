"""What `timm_ela.observe` computes: gates by the formula, Grad-CAM where the evidence is, and the model as it was."""
import re
from contextlib import contextmanager

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.checkpoint import checkpoint

from timm_ela import EfficientLocalAttention
from timm_ela.observe import observe
from timm_ela.plot import draw


@pytest.fixture
def make_model(randomize):
    def make(name='resnet18_ela_t', cfg=None, **kwargs):
        kwargs = {'num_classes': 10, 'pretrained_cfg_overlay': {'input_size': (3, 64, 96), **(cfg or {})}, **kwargs}
        return randomize(timm.create_model(name, **kwargs)).eval()

    return make


def transformed(image, model):
    return create_transform(**resolve_model_data_config(model))(image)[None]


@torch.no_grad()
def expected_gates(model, image, name):
    """The formula, from what reaches the module: a_h (C, H), a_w (C, W) and their products (C, H, W)."""
    inputs = []
    se = model.get_submodule(name)
    hook = se.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone()))
    model(transformed(image, model))
    hook.remove()
    a_h, a_w = (se.gn(se.conv(inputs[0].mean(d))).sigmoid()[0].numpy() for d in (3, 2))
    return a_h, a_w, a_h[:, :, None] * a_w[:, None, :]


@pytest.mark.parametrize('name, kwargs, modules', [
    ('resnet18_ela_t', {}, {1: 'layer1.1.se', 2: 'layer2.1.se', 3: 'layer3.1.se', 4: 'layer4.1.se'}),
    ('resnet18_ela_t', {'features_only': True, 'num_classes': None, 'out_indices': (1, 2)},
     {1: 'layer1.1.se', 2: 'layer2.1.se'}),
    # timm's feature 3 ends with blocks.4, two levels after feature 2
    ('mobilenetv2_ela_t', {'num_classes': 0},
     {1: 'blocks.1.1.se', 2: 'blocks.2.2.se', 3: 'blocks.4.2.se', 4: 'blocks.6.0.se'}),
])
def test_the_gates_of_a_stage_are_the_formula_in_its_last_ela_module(make_model, image, name, kwargs, modules):
    model = make_model(name, **kwargs)
    varying, third, mean = (observe(image, model, **options) for options in ({}, {'channel': 3}, {'mean': True}))
    assert (varying.cam is None) == (varying.classes == []) == bool(kwargs)
    for i, (stage, module) in enumerate(modules.items()):
        a_h, a_w, both = expected_gates(model, image, module)
        assert a_h.shape != a_w.shape and both.std() > 1e-3
        most, count = both.std((1, 2)).argmax(), len(both)
        for seen, shown, expected in (
                (varying, f'channel {most} of {count}', (both[most], a_h[most], a_w[most])),
                (third, f'channel 3 of {count}', (both[3], a_h[3], a_w[3])),
                (mean, f'mean of {count} channels', (both.mean(0), a_h.mean(0), a_w.mean(0)))):
            gate = seen.gates[i]
            assert (gate.stage, gate.shown, gate.varies_most) == (stage, shown, seen is varying)
            for drawn, right in zip((gate.map, gate.a_h, gate.a_w, gate.all), (*expected, both), strict=True):
                np.testing.assert_allclose(drawn, right, rtol=1e-4, atol=1e-6)
    assert len(varying.gates) == len(modules)
    stage = max(modules)
    assert [gate.stage for gate in observe(image, model, [stage]).gates] == [stage]


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (3, 'RGB'), (4, 'RGBA')])
def test_the_picture_is_what_the_model_saw(make_model, image, channels, mode):
    model, inputs = make_model(in_chans=channels, cfg={'mean': (0.3,) * 3, 'std': (0.4,) * 3}), []
    model.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    image.putalpha(Image.linear_gradient('L').resize(image.size))
    config = {**resolve_model_data_config(model), 'mean': (0,) * channels, 'std': (1,) * channels}
    pixels = create_transform(**config)(image.convert(mode))
    np.testing.assert_allclose(observe(image, model).picture, pixels[:3].permute(1, 2, 0), atol=1e-6)
    np.testing.assert_allclose(inputs[0][0], (pixels - 0.3) / 0.4, atol=1e-5)


class Toy(nn.Module):
    """Cuts a picture into squares of 8 pixels, its one feature, in any of timm's layouts; class 1 likes bright ones."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.num_classes = layout, 3
        self.embed, self.feature, self.last = nn.Conv2d(3, 2, 8, 8, bias=False), nn.Identity(), nn.Identity()
        self.head = nn.Linear(2, 3, bias=False)
        nn.init.constant_(self.embed.weight, 1)
        self.head.weight.data.zero_()[1] = 1
        self.feature_info = [{'module': name, 'num_chs': 2, 'reduction': 8} for name in ('feature', 'last')]
        self.pretrained_cfg = {'input_size': (3, 32, 48), 'mean': (0, 0, 0), 'std': (1, 1, 1), 'crop_pct': 1}

    def forward(self, x):
        x = self.embed(x)
        if self.layout == 'NCHW':
            return self.head(self.last(self.feature(x)).mean((2, 3)))
        x = x.permute(0, 2, 3, 1)
        if self.layout == 'NHWC':
            return self.head(self.last(self.feature(x)).mean((1, 2)))
        x = self.feature(torch.cat([x.new_zeros(1, 1, 2), x.flatten(1, 2)], 1))
        if self.layout == 'tokens':
            return self.head(self.last(x)[:, 1:].mean(1))
        return self.head(self.last(torch.cat([x.mean(1, keepdim=True), x[:, 1:]], 1))[:, 0])


@pytest.mark.parametrize('layout', ['NCHW', 'NHWC', 'tokens', 'tokens, of which the head reads the first'])
def test_grad_cam_lies_where_the_evidence_is(layout):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[8:16, 32:40] = 255
    # by default of the most probable class
    for class_index in (None, 1):
        seen = observe(Image.fromarray(pixels), Toy(layout), class_index=class_index)
        assert seen.cam.shape == (32, 48) and seen.cam_class == 'class 1'
        assert seen.cam.min() == 0 and seen.cam.max() == 1 and (seen.cam[11:13, 35:37] > 0.98).all()
        assert not seen.cam[20:].any() and not seen.cam[:, :27].any()
    assert not observe(Image.fromarray(pixels), Toy(layout), class_index=0).cam.any()


def test_without_a_feature_map_there_is_no_grad_cam(make_model, image):
    model = Toy('NCHW')
    model.feature_info = [{'module': 'embed.weight', 'num_chs': 2, 'reduction': 8}]
    seen = observe(image, model)
    assert seen.cam is None and len(seen.classes) == 3
    model = nn.Sequential(nn.Conv2d(3, 32, 8, 8), EfficientLocalAttention(32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.num_classes = 32
    gated = observe(image, model)
    assert [gate.all.shape for gate in gated.gates] == [(32, 28, 28)] and len(gated.classes) == 5 and gated.cam is None
    features = observe(image, make_model(features_only=True, num_classes=None))
    assert len(draw([seen, gated, features], ['Toy', 'mine', 'features']).axes) == 3 + 4 + 7


@pytest.mark.parametrize('name', ['resnet18_ca', 'test_vit', 'elsa_swin_tiny', 'elsa_volo_d1', 'hiera_tiny_224'])
def test_any_model_of_timm_and_any_layer_has_a_grad_cam(randomize, image, name):
    model = timm.create_model(name, num_classes=10)
    seen = observe(image, randomize(model).eval() if 'resnet' in name else model.eval())
    assert seen.gates == [] and seen.model == name
    assert seen.cam.shape == tuple(resolve_model_data_config(model)['input_size'][1:])
    # 0: nothing speaks for the class
    assert seen.cam.min() == 0 and seen.cam.max() in (0, 1)


def test_gradients_may_be_off(make_model, image):
    model = make_model()
    expected = observe(image, model).cam
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            np.testing.assert_array_equal(observe(image, model).cam, expected)
    np.testing.assert_array_equal(observe(image, model.requires_grad_(False)).cam, expected)


def test_a_model_in_half_precision(make_model, image):
    model = make_model()
    single, half = observe(image, model), observe(image, model.bfloat16())
    assert half.cam.dtype == np.float32 and np.abs(half.cam - single.cam).mean() < 0.1
    np.testing.assert_allclose(half.gates[0].all, single.gates[0].all, atol=0.05)


@contextmanager
def left_as_it_is(model):
    """Checks that a model keeps its weights and buffers, the modes and flags of its modules, hooks and gradients."""
    def state():
        flags = [{k: v for k, v in vars(m).items() if not k.startswith('_')} for m in model.modules()]
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
        return flags, hooks, [(p.grad, p.requires_grad) for p in model.parameters()]

    before, weights = state(), {k: v.clone() for k, v in model.state_dict().items()}
    yield
    assert state() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def same(seen, other):
    for gate, expected in zip(seen.gates, other.gates, strict=True):
        np.testing.assert_array_equal(gate.all, expected.all)
    np.testing.assert_array_equal(seen.cam, other.cam)
    return seen.classes == other.classes and seen.cam.max() == 1


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('name', ['resnet18_ela_t', 'mobilenetv2_050_ela_t', 'test_convnext'])
def test_a_model_in_training_is_left_as_it_is(make_model, image, name, checkpointing):
    model = make_model(name)
    expected = observe(image, model)
    model.set_grad_checkpointing(checkpointing)
    # frozen
    next(model.train().children()).eval().requires_grad_(False)
    with left_as_it_is(model):
        assert same(observe(image, model), expected)
    model.forward_head = None
    with left_as_it_is(model), pytest.raises(TypeError):
        observe(image, model)


class Checkpointed(nn.Module):
    """A user's module that keeps nothing for the gradients: its block runs again for them."""

    def __init__(self, block):
        super().__init__()
        self.block, self.again = block, False

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)


def test_a_module_that_runs_again_for_gradients_is_left_as_it_is(make_model, image):
    model = make_model()
    model.layer4 = Checkpointed(model.layer4)
    model.feature_info[-1]['module'] = 'layer4.block.0'
    expected = observe(image, model)
    model.train().layer4.again = True
    with left_as_it_is(model):
        assert same(observe(image, model), expected)


@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel, ModelEmaV3])
def test_of_a_wrapped_model_the_model_inside_is_shown(make_model, image, wrap):
    model = make_model()
    expected = observe(image, model)
    seen = observe(image, wrap(model))
    assert same(seen, expected) and seen.model == 'resnet18_ela_t'


def test_the_top_classes_carry_the_models_probabilities(make_model, image):
    model = make_model()
    with torch.no_grad():
        p = model(transformed(image, model))[0].softmax(0)
    expected = [(p[i].item(), f'class {i}') for i in p.argsort(descending=True)]
    for count in (2, 10):
        for seen, right in zip(observe(image, model, topk=count).classes, expected[:count], strict=True):
            assert seen == (pytest.approx(right[0], rel=1e-4), right[1])


@pytest.mark.parametrize('cfg, given, expected', [
    ({}, None, ['class 2', 'class 0', 'class 1']),
    ({'label_names': ['n0', 'n1', 'n2']}, None, ['n2', 'n0', 'n1']),
    ({'label_names': {'2': 'n2', '0': 'n0', '1': 'n1'}}, None, ['n2', 'n0', 'n1']),
    ({'label_names': ['n0', 'n1', 'n2'], 'label_descriptions': {'n0': 'cat'}}, None, ['n2', 'cat', 'n1']),
    ({'label_names': ['n0', 'n1', 'n2'], 'label_descriptions': {'n0': 'cat'}}, ['n0', 'b', 'c'], ['c', 'n0', 'b']),
    # of another head
    ({'label_names': ['n0', 'n1', 'n2', 'n3']}, None, ['class 2', 'class 0', 'class 1']),
    ({'num_classes': 1000}, None, ['great white shark', 'tench', 'goldfish']),
])
def test_class_names(make_model, image, cfg, given, expected):
    model = make_model(num_classes=cfg.pop('num_classes', 3), cfg=cfg)
    nn.init.zeros_(model.fc.weight)
    nn.init.constant_(model.fc.bias, -9)
    model.fc.bias.data[:3] = torch.tensor([1, 0, 2])
    seen = observe(image, model, topk=3, class_names=given)
    assert all(name.startswith(start) for (_, name), start in zip(seen.classes, expected, strict=True))


@pytest.mark.parametrize('made, asked, told', [
    ({}, {'class_index': 10}, 'resnet18_ela_t has 10 classes, counted from 0; got 10.'),
    ({}, {'class_index': -1}, 'resnet18_ela_t has 10 classes, counted from 0; got -1.'),
    ({}, {'stages': [2], 'channel': 128}, 'Stage 2 has channels 0 to 127, got 128.'),
    ({}, {'stages': [2], 'channel': -1}, 'Stage 2 has channels 0 to 127, got -1.'),
    ({}, {'stages': [1, 0]}, 'resnet18_ela_t has no ELA in stage 0, only in 1, 2, 3, 4.'),
    ({}, {'class_names': ['a', 'b']}, 'The model has 10 classes, but 2 class names were given.'),
    ({'name': 'resnet18', 'num_classes': 0}, {}, 'resnet18 has neither classes nor ELA: there is nothing to plot.'),
    ({'in_chans': 2}, {}, 'resnet18_ela_t takes 2 channels; plot reads pictures of 1 (grey), 3 (RGB) or 4 (RGBA).'),
], ids=str)
def test_what_cannot_be_shown_is_said(make_model, image, made, asked, told):
    with pytest.raises(ValueError, match=f'^{re.escape(told)}$'):
        observe(image, make_model(**made), **asked)
