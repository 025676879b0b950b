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
        model = load(THEIRS[name][1], WRAPPINGS[wrapping](theirs[name].state_dict())).eval().double()
        want = theirs[name](image)
        assert (want[0] - want[1]).abs().max() > 0.01
        torch.testing.assert_close(model(image), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize(('name', 'kind', 'old'), [
    ('ca', 'pth', True), ('ca', 'safetensors', False), ('torchvision', 'pth', False)])
def test_logits_from_a_file(theirs, image, tmp_path, name, kind, old):
    state_dict = {k: v for k, v in theirs[name].state_dict().items() if not (old and k.endswith('num_batches_tracked'))}
    path = tmp_path / f'model.{kind}'
    save_file(state_dict, path) if kind == 'safetensors' else torch.save(WRAPPINGS['both'](state_dict), path)
    model = timm.create_model(THEIRS[name][1], pretrained=True, pretrained_cfg_overlay={'file': str(path)})
    with torch.no_grad():
        torch.testing.assert_close(model.eval().double()(image), theirs[name](image), rtol=0, atol=1e-10)


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
    model = load(THEIRS[name][1], theirs[name].state_dict(), **kwargs).eval().double()
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
    ('ca', 'mobilenetv2_ela_l', 'mobilenetv2_ela_l has no place for 176 weights of the checkpoint, which is of another '
     'architecture: features.2.conv.6.conv1.weight, features.2.conv.6.conv1.bias, features.2.conv.6.bn1.weight, ...'),
    ('ela', 'mobilenetv2_ca', 'mobilenetv2_ca has no place for 48 weights of the checkpoint, which is of another '
     'architecture: features.2.conv.6.conv.weight, features.2.conv.6.gn.weight, features.2.conv.6.gn.bias, ...'),
    ('torchvision', 'mobilenetv2_110d_ela_b', 'mobilenetv2_110d_ela_b has no place for 6 weights'),
    ('torchvision', 'resnet18_ela_b', "Cannot graft onto resnet18_ela_b: the checkpoint lacks"),
])
def test_what_does_not_map_is_named(theirs, name, other, message):
    for kwargs in ({}, {'num_classes': 7}, {'features_only': True}):
        with pytest.raises(RuntimeError, match=f'^{re.escape(message)}'):
            load(other, theirs[name].state_dict(), device='meta', **kwargs)


def test_an_unknown_weight_is_named_with_the_others_of_its_kind(theirs):
    state_dict = {**theirs['ca'].state_dict(), 'features.3.conv.9.weight': torch.ones(1), 'extra': torch.ones(1)}
    with pytest.raises(RuntimeError, match=r'^mobilenetv2_ca has no place for 2 .*: features.3.conv.9.weight, extra$'):
        load('mobilenetv2_ca', state_dict, device='meta')


def test_weights_of_another_width_or_size_are_refused(theirs):
    for name, other in (('ela', 'mobilenetv2_ela_s'), ('ca', 'mobilenetv2_140_ca'), ('plain', 'mobilenetv2_140_ela_b')):
        with pytest.raises(RuntimeError, match='size mismatch|in the checkpoint and'):
            load(other, theirs[name].state_dict())


# EfficientNet-PyTorch's names, written out of timm's. In blocks that do not expand, batch norms are counted from 1.
FLAT = {'conv_dw': '_depthwise_conv', 'bn1': '_bn1', 'conv_pw': '_project_conv', 'bn2': '_bn2'}
EXPANDED = {'conv_pw': '_expand_conv', 'bn1': '_bn0', 'conv_dw': '_depthwise_conv', 'bn2': '_bn1',
            'conv_pwl': '_project_conv', 'bn3': '_bn2'}
ENDS = {'conv_stem': '_conv_stem', 'bn1': '_bn0', 'conv_head': '_conv_head', 'bn2': '_bn1', 'classifier': '_fc'}


def efficientnet_pytorch(plain):
    """State dict of a plain EfficientNet-Lite of timm, in reverse order, under the names of EfficientNet-PyTorch."""
    renamed, blocks = {}, [f'blocks.{i}.{j}' for i, stage in enumerate(plain.blocks) for j in range(len(stage))]
    for key, value in reversed(plain.state_dict().items()):
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
def test_efficientnet_pytorchs_names_load_in_any_order(randomize, base, layer, kwargs):
    plain = randomize(timm.create_model(base))
    source = load(base, plain.state_dict(), **kwargs).eval()
    model = load(f'{base}_{layer}', efficientnet_pytorch(plain), **kwargs).eval()
    x = torch.randn(2, kwargs.get('in_chans', 3), 64, 48)
    with torch.no_grad():
        if 'num_classes' in kwargs:
            assert torch.equal(model.forward_features(x), source.forward_features(x))
        elif 'features_only' in kwargs:
            assert all(torch.equal(*maps) for maps in zip(model(x), source(x), strict=True))
        else:
            assert torch.equal(model(x), source(x))


@pytest.mark.parametrize('name', ['tf_efficientnet_lite0_ela_b', 'tf_efficientnet_lite0_se'])
def test_squeeze_and_excitation_of_another_efficientnet_is_named(name):
    state_dict = efficientnet_pytorch(skeleton('tf_efficientnet_lite0'))
    b0 = {f'_blocks.{i}._se_{part}.{kind}': torch.ones(1)
          for i in range(16) for part in ('reduce', 'expand') for kind in ('weight', 'bias')}
    for kwargs in ({}, {'num_classes': 7}, {'features_only': True}):
        with pytest.raises(RuntimeError, match=f'^{name} has no place for 64 .*: _blocks.0._se_reduce.weight, '):
            load(name, state_dict | b0, device='meta', **kwargs)


@pytest.mark.parametrize(('name', 'message'), [
    ('tf_efficientnet_lite1_ela_b', "lacks 75 weights, first 'blocks.5.1.conv_pw.weight'"),
    ('mobilenetv2_ela_b', "lacks 15 weights, first 'blocks.6.0.conv_pw.weight'"),
])
def test_efficientnet_pytorchs_names_for_another_backbone_are_refused_by_the_first_that_differs(name, message):
    state_dict = efficientnet_pytorch(skeleton('tf_efficientnet_lite0'))
    with pytest.raises(RuntimeError) as error:
        load(name, state_dict, device='meta')
    assert str(error.value).startswith(f'Cannot graft onto {name}: ') and message in str(error.value)
