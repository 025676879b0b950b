"""Checkpoints in other repositories' layouts compute, in our models, what their own code computes.

MobileNetV2's models here are written from the published layouts (names and order of the modules), with random weights.
EfficientNet-PyTorch's names are written out of timm's.
"""
import re

import pytest
import timm
import torch
import torchvision
from helpers import load, skeleton
from safetensors.torch import save_file
from torch import Tensor, nn

from timm_ela.hub.publish import convert_checkpoint
from timm_ela.models.efficientnet_layouts import rename_state_dict
from timm_ela.models.registry import graft_state_dict

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class CoordinateAttention(nn.Module):
    """Coordinate Attention under its authors' names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(8, channels // 32)
        self.conv1 = nn.Conv2d(channels, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, channels, 1)
        self.conv3 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        strips = torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT], 2)  # (N, C, H + W, 1)
        y = self.bn1(self.conv1(strips))
        h, w = (y * nn.functional.relu6(y + 3) / 6).split(x.shape[2:], 2)
        return x * self.conv2(h).sigmoid() * self.conv3(w.mT).sigmoid()


class LocalAttention(nn.Module):
    """ELA under its authors' names: by default the size of their ImageNet code, L."""

    def __init__(self, channels: int, kernel: int = 7, group: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels // group, bias=False)
        self.gn = nn.GroupNorm(16, channels)

    def forward(self, x: Tensor) -> Tensor:
        h, w = (self.gn(self.conv(x.mean(dim))).sigmoid() for dim in (3, 2))
        return x * h.unsqueeze(3) * w.unsqueeze(2)


class Residual(nn.Module):
    def __init__(self, conv: nn.Sequential, skip: bool) -> None:
        super().__init__()
        self.conv = conv
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skip else self.conv(x)


def conv_bn(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True) -> list:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out), *[nn.ReLU6()] * act]


class TheirMobileNetV2(nn.Module):
    """The layout of MBV2_CA, MBV2_ELA72 and, without attention, of d-li14/mobilenetv2.pytorch."""

    def __init__(self, attention: type[nn.Module] | None, num_classes: int = 1000) -> None:
        super().__init__()
        layers, width = [nn.Sequential(*conv_bn(3, 32, 3, 2))], 32
        for expand, out, count, first_stride in STAGES:
            for stride in [first_stride] + [1] * (count - 1):
                hidden, conv = width * expand, []
                if expand != 1:
                    conv += conv_bn(width, hidden)
                conv += conv_bn(hidden, hidden, 3, stride, groups=hidden)
                if attention and expand != 1:
                    conv.append(attention(hidden))
                conv += conv_bn(hidden, out, act=False)
                layers.append(Residual(nn.Sequential(*conv), stride == 1 and width == out))
                width = out
        self.features = nn.Sequential(*layers)
        self.conv = nn.Sequential(*conv_bn(width, 1280))
        head = nn.Linear(1280, num_classes)
        self.classifier = nn.Sequential(nn.Dropout(0.1), head) if attention else head

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.conv(self.features(x)).mean((2, 3)))


THEIRS = {  # their model, and ours that loads it: by graft where theirs has no attention
    'ca': (lambda: TheirMobileNetV2(CoordinateAttention), 'mobilenetv2_ca'),
    'ela': (lambda: TheirMobileNetV2(LocalAttention), 'mobilenetv2_ela_l'),
    'ela_s': (lambda: TheirMobileNetV2(lambda c: LocalAttention(c, 5)), 'mobilenetv2_ela_s'),
    'plain': (lambda: TheirMobileNetV2(None), 'mobilenetv2_ela_b'),
    'torchvision': (torchvision.models.mobilenet_v2, 'mobilenetv2_ela_s'),
}
WRAPPINGS = {
    'bare': lambda sd: sd,
    'module': lambda sd: {f'module.{k}': v for k, v in sd.items()},
    'state_dict': lambda sd: {'state_dict': sd, 'epoch': 3},
    'both': lambda sd: {'state_dict': {f'module.{k}': v for k, v in sd.items()}, 'arch': 'mbv2'},
}


@pytest.fixture(scope='module')
def theirs():
    """Each of THEIRS as if trained: where batch norm's statistics are not the data's, the image is lost on the way."""
    torch.manual_seed(1)
    models = {name: make() for name, (make, _) in THEIRS.items()}
    for model in models.values():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.uniform_(m.weight, 0.7, 1.4)
                nn.init.normal_(m.bias, 0, 0.2)
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = None  # the average of what it sees, here one batch
        with torch.no_grad():
            model.train()(torch.randn(4, 3, 64, 96))
    return {name: model.eval().double() for name, model in models.items()}  # float32's rounding grows on the way


@pytest.fixture
def image():
    return torch.randn(2, 3, 97, 64, dtype=torch.float64)


@pytest.mark.parametrize(('name', 'wrapping'), [
    *((name, 'bare') for name in THEIRS), *(('ca', wrapping) for wrapping in WRAPPINGS if wrapping != 'bare')])
def test_logits_are_those_of_their_own_code(theirs, image, name, wrapping):
    with torch.no_grad():
        state_dict = WRAPPINGS[wrapping](theirs[name].state_dict())
        model = load(THEIRS[name][1], state_dict, dtype=torch.float64).eval()
        want = theirs[name](image)
        assert (want[0] - want[1]).abs().max() > 0.01
        torch.testing.assert_close(model(image), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(('name', 'old'), [('ca', True), ('torchvision', False)])
def test_logits_from_a_file(theirs, image, tmp_path, name, old):
    state_dict = {k: v for k, v in theirs[name].state_dict().items() if not (old and k.endswith('num_batches_tracked'))}
    path = tmp_path / 'model.pth'
    torch.save(WRAPPINGS['both'](state_dict), path)
    overlay = {'file': str(path)}
    model = timm.create_model(
        THEIRS[name][1], pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(image), theirs[name](image), rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', ['ca', 'ela'])
def test_logits_after_timm_ela_convert(theirs, image, tmp_path, name):
    torch.save(WRAPPINGS['both'](theirs[name].state_dict()), tmp_path / 'theirs.pth.tar')
    convert_checkpoint(tmp_path / 'theirs.pth.tar', THEIRS[name][1], tmp_path / 'ours')
    model = timm.create_model(f'local-dir:{tmp_path / "ours"}', pretrained=True).eval().double()
    with torch.no_grad():
        torch.testing.assert_close(model(image), theirs[name](image), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    'kwargs', [{'num_classes': 7}, {'num_classes': 0}, {'in_chans': 1}, {'features_only': True}], ids=str)
@pytest.mark.parametrize('name', ['ca', 'torchvision'])
def test_they_are_adapted_as_timms_own(theirs, image, name, kwargs):
    model = load(THEIRS[name][1], theirs[name].state_dict(), dtype=torch.float64, **kwargs).eval()
    with torch.no_grad():
        if 'in_chans' in kwargs:
            weight = theirs[name].features[0][0].weight.sum(1, keepdim=True)
            torch.testing.assert_close(model.conv_stem.weight, weight, rtol=0, atol=1e-6)
        else:
            y = model(image)[-1] if 'features_only' in kwargs else model.blocks(model.bn1(model.conv_stem(image)))
            torch.testing.assert_close(y, theirs[name].features[:18](image), rtol=0, atol=1e-10)


def test_every_weight_is_renamed_and_none_invented(theirs):
    for name in ('ca', 'ela'):
        state_dict, model = theirs[name].state_dict(), skeleton(THEIRS[name][1])
        renamed = rename_state_dict(state_dict, model)
        assert renamed.keys() == model.state_dict().keys() and len(renamed) == len(state_dict)
        assert graft_state_dict(state_dict, model).keys() == renamed.keys()
        assert rename_state_dict(renamed, model) == renamed  # a state dict in timm's names


@pytest.mark.parametrize(('name', 'other', 'message'), [
    ('ca', 'mobilenetv2_ela_l',
     "'features.2.conv.6.conv1' stands where mobilenetv2_ela_l has 'blocks.1.0.se.conv': it is of another"),
    ('ela', 'mobilenetv2_ca', "'features.2.conv.6.conv' stands where mobilenetv2_ca has 'blocks.1.0.se.conv1'"),
    ('torchvision', 'mobilenetv2_110d_ela_b',
     "'classifier.1' stands where mobilenetv2_110d_ela_b has 'blocks.5.0.conv_dw'"),
    ('torchvision', 'resnet18_ela_b', 'Cannot graft onto resnet18_ela_b: the checkpoint lacks'),
])
def test_what_does_not_map_is_named(theirs, name, other, message):
    for kwargs in ({}, {'num_classes': 7}, {'features_only': True}):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            load(other, theirs[name].state_dict(), device='meta', **kwargs)


def test_an_unknown_weight_is_named(theirs):
    for kwargs in ({}, {'num_classes': 7}, {'features_only': True}):
        with pytest.raises(RuntimeError, match="'extra' stands where mobilenetv2_ca has 'nothing more'"):
            load('mobilenetv2_ca', {**theirs['ca'].state_dict(), 'extra.weight': torch.ones(1)}, **kwargs)


def test_weights_of_another_width_or_size_are_refused(theirs):
    for name, other in (('ela', 'mobilenetv2_ela_s'), ('ca', 'mobilenetv2_140_ca'), ('plain', 'mobilenetv2_140_ela_b')):
        with pytest.raises(RuntimeError, match='in the checkpoint and'):
            load(other, theirs[name].state_dict())


# EfficientNet-PyTorch's names, written out of timm's. In blocks that do not expand, batch norms are counted from 1.
FLAT = {'conv_dw': '_depthwise_conv', 'bn1': '_bn1', 'conv_pw': '_project_conv', 'bn2': '_bn2'}
EXPANDED = {'conv_pw': '_expand_conv', 'bn1': '_bn0', 'conv_dw': '_depthwise_conv', 'bn2': '_bn1',
            'conv_pwl': '_project_conv', 'bn3': '_bn2'}
ENDS = {'conv_stem': '_conv_stem', 'bn1': '_bn0', 'conv_head': '_conv_head', 'bn2': '_bn1', 'classifier': '_fc'}


def efficientnet_pytorch(plain):
    """State dict of a plain EfficientNet-Lite of timm under the names of EfficientNet-PyTorch."""
    renamed, blocks = {}, [f'blocks.{i}.{j}' for i, stage in enumerate(plain.blocks) for j in range(len(stage))]
    for key, value in plain.state_dict().items():
        module, _, parameter = key.rpartition('.')
        block, _, part = module.rpartition('.')
        if block:
            names = EXPANDED if hasattr(plain.get_submodule(block), 'conv_pwl') else FLAT
            renamed[f'_blocks.{blocks.index(block)}.{names[part]}.{parameter}'] = value
        else:
            renamed[f'{ENDS[module]}.{parameter}'] = value
    return renamed


@pytest.mark.parametrize(('base', 'layer', 'kwargs'), [
    ('tf_efficientnet_lite0', 'ela_b', {}),
    ('tf_efficientnet_lite1', 'se', {}),
    ('tf_efficientnet_lite0', 'ca', {'num_classes': 7}),
    ('tf_efficientnet_lite0', 'gc', {'features_only': True}),
    ('tf_efficientnet_lite0', 'cbam', {'in_chans': 1, 'output_stride': 16}),
])
def test_efficientnet_pytorchs_names_load(randomize, base, layer, kwargs):
    plain = randomize(timm.create_model(base))
    source = load(f'{base}_{layer}', plain.state_dict(), **kwargs).eval()
    model = load(f'{base}_{layer}', efficientnet_pytorch(plain), **kwargs).eval()
    x = torch.randn(2, kwargs.get('in_chans', 3), 64, 48)
    with torch.no_grad():
        if 'num_classes' in kwargs:
            assert torch.equal(model.forward_features(x), source.forward_features(x))
        elif 'features_only' in kwargs:
            assert all(torch.equal(*maps) for maps in zip(model(x), source(x), strict=True))
        else:
            assert torch.equal(model(x), source(x))


@pytest.mark.parametrize('layer', ['ela_b', 'se', 'sa'])
def test_squeeze_and_excitation_of_another_efficientnet_is_named(layer):
    b0 = {}
    for key, value in efficientnet_pytorch(skeleton('tf_efficientnet_lite0')).items():
        if key.endswith('_project_conv.weight'):
            block = key.partition('._project')[0]
            b0 |= {f'{block}._se_{part}.{kind}': torch.ones((1,) * ndim)
                   for part in ('reduce', 'expand') for kind, ndim in (('weight', 4), ('bias', 1))}
        b0[key] = value
    message = f"'_blocks.0._se_reduce' stands where tf_efficientnet_lite0_{layer} has 'blocks.0.0.conv_pw'"
    for kwargs in ({}, {'num_classes': 7}, {'features_only': True}):
        with pytest.raises(RuntimeError, match=message):
            load(f'tf_efficientnet_lite0_{layer}', b0, device='meta', **kwargs)


@pytest.mark.parametrize(('name', 'message'), [
    ('tf_efficientnet_lite1_ela_b', "'_fc' stands where tf_efficientnet_lite1_ela_b has 'blocks.5.1.conv_dw'"),
    ('mobilenetv2_ela_b', "'_fc' stands where mobilenetv2_ela_b has 'blocks.6.0.conv_dw'"),
    ('mobilenetv2_sa', 'stands where mobilenetv2_sa has'),
])
def test_efficientnet_pytorchs_names_for_another_backbone_are_refused_by_the_first_that_differs(name, message):
    with pytest.raises(RuntimeError, match=message):
        load(name, efficientnet_pytorch(skeleton('tf_efficientnet_lite0')), device='meta')


# -- Order -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(theirs):
    """A checkpoint in one of the layouts, and the model of ours for it."""
    def checkpoint(name):
        if name == 'efficientnet_pytorch':
            return efficientnet_pytorch(timm.create_model('tf_efficientnet_lite0')), 'tf_efficientnet_lite0_ela_b'
        return theirs[name].state_dict(), THEIRS[name][1]

    return checkpoint


LAYOUTS = pytest.mark.parametrize('name', [*THEIRS, 'efficientnet_pytorch'])
SORTED = 'The checkpoint is read by order, and .* its names are sorted, as in a safetensors file'


@LAYOUTS
def test_a_safetensors_file_has_lost_the_order_and_is_refused(checkpoint, tmp_path, name):
    state_dict, model = checkpoint(name)
    save_file(state_dict, tmp_path / 'model.safetensors')
    for overlay in ({}, {'num_classes': 7}):
        overlay['file'] = str(tmp_path / 'model.safetensors')
        with pytest.raises(RuntimeError, match=SORTED):
            timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(RuntimeError, match=SORTED):
        convert_checkpoint(tmp_path / 'model.safetensors', model, tmp_path / 'ours')
    assert not (tmp_path / 'ours').exists()


@LAYOUTS
@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}, {'features_only': True}, {'in_chans': 1}], ids=str)
def test_sorted_names_are_refused(checkpoint, name, kwargs):
    state_dict, model = checkpoint(name)
    for old in (False, True):
        mixed = dict(sorted(state_dict.items()))
        if old:
            mixed = {k: v for k, v in mixed.items() if not k.endswith('num_batches_tracked')}
        with pytest.raises(RuntimeError, match=SORTED):
            load(model, mixed, device='meta', **kwargs)


@LAYOUTS
def test_any_other_order_is_refused(checkpoint, name):
    state_dict, model = checkpoint(name)
    with pytest.raises(RuntimeError, match='read by order, .* it is of another architecture, or not in the original'):
        load(model, dict(reversed(state_dict.items())), device='meta')
