"""Our models are timm's with an attention layer in each slot, and counts.csv says what that costs.

The table is held to the models as built and to published numbers; the layers' own parameters are counted by hand in
tests/layers/formulas.py.
"""
import re
import sys
from functools import cache

import pytest
import timm
import torch
from helpers import ROOT, attentions, skeleton, slot_blocks, slot_widths

from timm_ela.layers.attn_layers import ATTN_LAYERS
from timm_ela.models.registry import MODELS, read_counts

sys.path.insert(0, str(ROOT / 'weights_cards'))
sys.path.insert(0, str(ROOT / 'tests' / 'layers'))
from formulas import parameters
from make_cards import measure

# 1000 classes: plain, then with ELA-T, B, S and L
PUBLISHED = {
    'resnet18': (11_689_512, 11_702_952, 11_706_792, 11_770_152, 11_800_872),
    'resnet50': (25_557_032, 25_583_464, 25_591_016, 25_715_624, 25_776_040),
    'resnet101': (44_549_160, 44_606_056, 44_622_312, 44_890_536, 45_020_584),
    'mobilenetv2_100': (3_504_872, 3_554_600, 3_568_808, 3_803_240, 3_916_904),
    'mobilenetv4_conv_small': (3_774_024, 3_804_488, 3_813_192, 3_956_808, 4_026_440),
    'tf_efficientnet_lite0': (4_652_008, 4_714_504, 4_732_360, 5_026_984, 5_169_832),
}
SLOT_MODELS = {k: m for k, m in MODELS.items() if m.layer in ATTN_LAYERS.values()}
BASES = list(dict.fromkeys(model.base for model in SLOT_MODELS.values()))


def test_every_model_and_every_plain_one_has_a_row_and_none_else():
    assert read_counts().keys() == MODELS.keys() | {model.base for model in MODELS.values()}


def test_every_row_has_the_parameters_of_the_plain_model_as_built_and_of_the_layers_by_their_formulas():
    counts = read_counts()
    for name in {model.base for model in MODELS.values()} | (MODELS.keys() - SLOT_MODELS.keys()):
        assert counts[name].params == sum(p.numel() for p in skeleton(name).parameters())
    for name, model in SLOT_MODELS.items():
        added = [parameters(model.layer.suffix, width) for width in slot_widths(skeleton(model.base))]
        assert counts[name].params == counts[model.base].params + sum(added), name


@pytest.mark.parametrize('base', PUBLISHED)
def test_parameters_are_the_published_ones(base):
    names = (base, *(f'{base.removesuffix("_100")}_ela_{size}' for size in 'tbsl'))
    assert tuple(read_counts()[name].params for name in names) == PUBLISHED[base]


COUNTED = ['resnet18', *(name for name, model in MODELS.items() if model.base == 'resnet18'), *(
    name for base in ('resnet50', 'mobilenetv2_050', 'mobilenetv4_conv_small_050', 'tf_efficientnet_lite0')
    for name in (base, f'{base}_ela_b'))]
as_built = cache(measure)


@pytest.mark.parametrize('name', COUNTED)
def test_multiply_adds_are_those_of_the_model_as_built(name):
    assert read_counts()[name].macs == as_built(name).macs


@pytest.mark.parametrize('name', COUNTED)
def test_memory_of_training_is_that_of_the_model_as_built(name):
    assert read_counts()[name].saved == as_built(name).saved


def test_every_base_has_every_layer():
    names = {(f'{base.removesuffix("_100")}_{layer}', base, layer) for base in BASES for layer in ATTN_LAYERS}
    assert {(k, m.base, m.layer.suffix) for k, m in SLOT_MODELS.items()} == names


def shapes(state_dict):
    return {k: v.shape for k, v in state_dict.items()}


def expected_shapes(plain, layer, slot='inner'):
    """State dict of the plain model with the layer, called `se`, in each of its slots."""
    expected = shapes(plain.state_dict())
    for block, width in zip(slot_blocks(plain), slot_widths(plain, slot), strict=True):
        expected |= shapes({f'{block}.se.{k}': v for k, v in layer.create(width, device='meta').state_dict().items()})
    return expected


# every layer on one backbone, and each other backbone with one of the layers in turn
BUILT = [f'resnet18_{layer}' for layer in ATTN_LAYERS] + [
    name for i, base in enumerate(BASES) for name, model in SLOT_MODELS.items()
    if (model.base, model.layer) == (base, [*ATTN_LAYERS.values()][i % len(ATTN_LAYERS)]) and base != 'resnet18']


@pytest.mark.parametrize('name', BUILT)
def test_the_state_dict_is_the_plain_models_with_the_layer_of_its_width_in_every_slot(name):
    model, plain = SLOT_MODELS[name], skeleton(SLOT_MODELS[name].base)
    state_dict = skeleton(name).state_dict()
    assert shapes(state_dict) == expected_shapes(plain, model.layer)
    assert [k for k in state_dict if '.se.' not in k] == list(plain.state_dict())
    assert {type(m) for m in attentions(skeleton(name)).values()} == {type(model.layer.create(16, device='meta'))}


@pytest.mark.parametrize('base', ['resnet34', 'resnet50'])
@pytest.mark.parametrize('layer', ATTN_LAYERS)
def test_the_output_slot_has_the_blocks_output_width(base, layer):
    model = timm.create_model(f'{base}_{layer}', attn_slot='output', device='meta')
    assert shapes(model.state_dict()) == expected_shapes(skeleton(base), ATTN_LAYERS[layer], 'output')


OPTIONS = dict(
    num_classes=7, in_chans=1, global_pool='max', drop_rate=0.2, drop_path_rate=0.3, act_layer='silu',
    dtype=torch.bfloat16)
# timm's MobileNetV4 takes an output stride with features_only alone, and its ResNet takes no options of batch norms
STRIDE, NORMS = dict(output_stride=8), dict(bn_momentum=0.3, bn_eps=1e-2)


@pytest.mark.parametrize('kwargs', [{}, OPTIONS], ids=['defaults', 'options'])
@pytest.mark.parametrize('base', BASES)
def test_without_its_attention_a_model_is_timms_in_every_module_and_setting(base, kwargs):
    """Padding, strides, dilations, epsilons, momenta, activations, rates: all that modules print."""
    if kwargs:
        kwargs = kwargs | (STRIDE if 'v4' not in base else {}) | (NORMS if 'res' not in base else {})
    model, plain = (timm.create_model(n, device='meta', **kwargs) for n in (f'{base.removesuffix("_100")}_eca', base))
    assert {p.dtype for p in model.parameters()} == {p.dtype for p in plain.parameters()}
    assert len(attentions(model)) == len(slot_blocks(plain)) > 0
    for block, theirs in zip(slot_blocks(model).values(), slot_blocks(plain).values(), strict=True):
        if theirs.se is not None:
            block.se = theirs.se
        else:
            del block._modules['se']
    assert re.sub('InnerAttnBottleneck', 'Bottleneck', str(model)) == str(plain)
