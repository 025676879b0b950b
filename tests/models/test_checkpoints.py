"""Checkpoints of version 0.2.0 load and give the logits that they gave then.

The files in checkpoints/ are narrow models with random weights in half precision; that of EfficientNet-Lite0 is the
trained one that ships. A change that needs new files breaks everyone's checkpoints.
"""
from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT

FOLDER = Path(__file__).parent / 'checkpoints'
RESNET = dict(layers=(1, 1, 1, 1), channels=(8, 16, 8, 16))
SWIN = dict(
    img_size=(64, 96), window_size=2, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), mlp_ratio=1,
    elsa_kernel=3)
CASES = {
    'resnet18_ela_t': (RESNET, (0.34845925, 1.34398533, 0.74307534)),
    'resnet50_ela_s': (RESNET, (-0.74660996, 0.69787647, 0.12908985)),
    'elsa_swin_tiny': (SWIN, (1.03527614, -0.40738987, -0.39851714)),
}


def assert_logits(model, logits):
    image = torch.linspace(-40, 40, 3 * 64 * 96, dtype=torch.float64).sin().view(1, 3, 64, 96)
    with torch.no_grad():
        got = model.eval().double()(image)[0]
    torch.testing.assert_close(got, torch.tensor(logits, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize('name', CASES)
def test_a_state_dict_has_its_logits(name):
    kwargs, logits = CASES[name]
    overlay = {'file': str(FOLDER / f'{name}.safetensors'), 'num_classes': 3}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, **kwargs)
    assert_logits(model, logits)


def test_a_folder_has_its_logits():
    model = timm.create_model(
        f'local-dir:{ROOT / "weights_cards" / "tf_efficientnet_lite0_ela_b.cifar10"}', pretrained=True)
    assert_logits(model, (
        1.60436795, -1.04434421, -0.15019746, -0.10801549, -1.11628086, -0.70320646, -1.03409909, -0.49848220,
        -0.87269183, -0.81498744))
