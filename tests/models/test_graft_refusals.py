"""Weights that do not fit are refused with the reason, and tags are there for what can be grafted."""
import dataclasses
import re
from functools import partial

import pytest
import timm
import torch
from helpers import load, skeleton
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from timm_ela.layers.attn_layers import ATTN_LAYERS
from timm_ela.layers.ela import EfficientLocalAttention
from timm_ela.models.registry import MODELS

# with a new head, timm's loader is not strict
LOOSE = {'num_classes': 7, 'device': 'meta'}


@pytest.mark.parametrize('name', [*(f'resnet18_{layer}' for layer in ATTN_LAYERS), 'tf_efficientnet_lite0_cbam'])
def test_a_checkpoint_with_some_of_the_attention_weights_is_refused(name):
    state_dict = skeleton(name).state_dict()
    own = [k for k in state_dict if '.se.' in k]
    lost = [k for k in own if not k.endswith('num_batches_tracked')][3:]
    part = {k: v for k, v in state_dict.items() if k not in lost}
    with pytest.raises(RuntimeError) as error:
        load(name, part, **LOOSE)
    assert str(error.value) == (
        f'The checkpoint for {name} lacks {len(lost)} of {len(own)} attention weights, first {lost[0]!r}: '
        'it must hold all of them, or none to be grafted.')


@pytest.mark.parametrize(('name', 'other', 'reason'), [
    ('resnet18_ela_b', 'resnet34', "has 80 unexpected weights, first 'layer1.2.conv1.weight'"),
    ('resnet34_gc', 'resnet18', "lacks 80 weights, first 'layer1.2.conv1.weight'"),
    ('resnet50_ca', 'resnet50d', "lacks 17 weights, first 'conv1.weight'"),
    ('resnet50_ela_b', 'seresnet50', "has 64 unexpected weights, first 'layer1.0.se.fc1.weight'"),
    ('mobilenetv2_ela_b', 'resnet18', "first 'conv_stem.weight'"),
    ('tf_efficientnet_lite0_ela_b', 'efficientnet_b0',
     "has 64 unexpected weights, first 'blocks.0.0.se.conv_reduce.weight'"),
    ('tf_efficientnet_lite0_se', 'tf_efficientnet_lite1',
     "has 75 unexpected weights, first 'blocks.1.2.conv_pw.weight'"),
    ('tf_efficientnet_lite0_cbam', 'mobilenetv2_100', "lacks 15 weights, first 'blocks.5.3.conv_pw.weight'"),
    ('elsa_swin_tiny', 'swin_tiny_patch4_window7_224', "first 'layers.0.blocks.0.attn.ghost_head'"),
    ('elsa_volo_d1', 'volo_d1_224', "lacks 32 weights, first 'network.0.0.attn.ghost_head'"),
    ('elsa_volo_d1', 'elsa_volo_d2', "has 76 unexpected weights, first 'network.0.4.norm1.weight'"),
])
def test_a_checkpoint_of_another_architecture_is_refused_with_the_first_key_that_differs(name, other, reason):
    with pytest.raises(RuntimeError) as error:
        load(name, skeleton(other).state_dict(), **LOOSE)
    message = str(error.value)
    begin = f'The weights are not those of {name}: ' if name.startswith('elsa') else f'Cannot graft onto {name}: '
    assert message.startswith(begin) and reason in message and '\n' not in message


@pytest.mark.parametrize(('name', 'other', 'first'), [
    ('resnet50_ela_b', 'wide_resnet50_2', 'layer1.0.conv1.weight'),
    ('mobilenetv2_050_se', 'mobilenetv2_100', 'conv_stem.weight')])
def test_a_checkpoint_of_another_width_is_refused_with_both_shapes(name, other, first):
    weights, wanted = (skeleton(n).state_dict()[first].shape for n in (other, name))
    with pytest.raises(RuntimeError, match=f'size mismatch for {first}: .* with shape {re.escape(str(weights))} from '
                                           f'checkpoint, the shape in current model is {re.escape(str(wanted))}'):
        load(name, skeleton(other).state_dict(), **LOOSE)


@pytest.mark.parametrize('attention', [True, False], ids=['own', 'plain'])
@pytest.mark.parametrize(('base', 'change', 'reason'), [
    ('resnet18', {'conv1.weight': None}, "the checkpoint lacks 1 weights, first 'conv1.weight'"),
    ('mobilenetv2_050', {'conv_stem.weight': None}, "the checkpoint lacks 1 weights, first 'conv_stem.weight'"),
    ('mobilenetv2_050', {'bn2.running_var': None}, "the checkpoint lacks 1 weights, first 'bn2.running_var'"),
    ('resnet18', {'layer1.0.conv2.weight': None, 'layer1.0.conv9.weight': torch.ones(1)},
     "the checkpoint lacks 1 weights, first 'layer1.0.conv2.weight', and has 1 unexpected weights, first "
     "'layer1.0.conv9.weight'"),
    ('resnet18', {'conv1.weight': None, 'net.conv1.weight': torch.ones(1)},
     "the checkpoint lacks 1 weights, first 'conv1.weight', and has 1 unexpected weights, first 'net.conv1.weight'"),
], ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_a_weight_too_few_or_too_many_is_named(base, change, reason, attention):
    name = f'{base}_ela_t'
    weights = {**skeleton(name if attention else base).state_dict(), **change}
    with pytest.raises(RuntimeError) as error:
        load(name, {k: v for k, v in weights.items() if v is not None}, **LOOSE)
    begin, end = (f'The weights are not those of {name}: ', '.') if attention else (
        f'Cannot graft onto {name}: ', '; it must be one of the plain model.')
    message = str(error.value)
    assert message.startswith(begin + reason) and message.endswith(end) and '\n' not in message


@pytest.mark.parametrize(('source', 'name', 'head'), [
    *((source, f'{base}_ela_t', head) for base, head in (('resnet18', 'fc'), ('mobilenetv2_050', 'classifier'))
      for source in (base, f'{base}_ela_t')),
    ('elsa_volo_d1', 'elsa_volo_d1', 'head'), ('elsa_volo_d1', 'elsa_volo_d1', 'aux_head')])
def test_a_head_may_be_missing_only_where_it_is_made_anew(source, name, head):
    state_dict = {k: v for k, v in skeleton(source).state_dict().items() if k.rpartition('.')[0] != head}
    for kwargs in ({'num_classes': 7}, {'num_classes': 0}, {'features_only': True}):
        load(name, state_dict, device='meta', **kwargs)
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{head}\.weight'):
        load(name, state_dict, device='meta')


class WithSkip(EfficientLocalAttention):
    """ELA as the authors' DeepLab backbone has it."""

    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(('name', 'layer', 'found'), [
    ('resnet18_ela_b', 'se', 'SEModule'), ('resnet50_ela_b', 'ela', 'EfficientLocalAttn'),
    ('resnet18_se', 'ese', 'EffectiveSEModule'), ('resnet18_eca', EfficientLocalAttention, 'EfficientLocalAttention'),
    ('resnet50_ela_b', WithSkip, 'WithSkip'), ('resnet18_ca', 'cbam', 'CbamModule')])
def test_a_block_with_another_layer_than_the_models_is_refused(name, layer, found):
    state_dict = timm.create_model(MODELS[name].base).state_dict()
    with pytest.raises(RuntimeError, match=fr'^Cannot graft onto {name}: layer1.0.se is {found}, which does not mult'):
        load(name, state_dict, block_args={'attn_layer': layer}, num_classes=7)


@pytest.mark.parametrize(('name', 'layer'), [
    ('resnet50_ela_b', partial(EfficientLocalAttention, variant='l', num_groups=8)), ('resnet18_eca', 'ceca')])
def test_a_block_with_another_layer_of_the_same_neutral_point_is_grafted(name, layer):
    source = timm.create_model(MODELS[name].base, zero_init_last=False).eval()
    model = load(name, source.state_dict(), block_args={'attn_layer': layer}).eval()
    x = torch.randn(2, 3, 64, 48)
    assert torch.equal(model(x), source(x))


@pytest.mark.parametrize('base', {model.base: None for model in MODELS.values()})
def test_tags_are_the_plain_models_with_graft_before_them_where_the_layer_has_a_neutral_point(base):
    theirs = {k: cfg for k, cfg in get_arch_pretrained_cfgs(base).items() if cfg.hf_hub_id}
    assert theirs
    for name, model in MODELS.items():
        if model.base != base:
            continue
        assert bool(model.layer.neutral) != bool(model.layer.no_weights) and '\n' not in model.layer.no_weights
        if not model.layer.neutral:
            assert not timm.is_model_pretrained(name) and not timm.list_pretrained(f'{name}.*')
            with pytest.raises(RuntimeError) as error:
                timm.create_model(name, pretrained=True, device='meta')
            assert str(error.value) == f'There are no pretrained weights for {name}: {model.layer.no_weights}'
            continue
        ours = get_arch_pretrained_cfgs(name)
        assert list(ours) == [f'{name}.graft_{cfg.tag}' for cfg in theirs.values()]
        for cfg, plain_cfg in zip(ours.values(), theirs.values(), strict=True):
            assert cfg.hf_hub_id == f'timm/{base}.{plain_cfg.tag}'
            same = [{k: v for k, v in dataclasses.asdict(c).items() if k not in ('architecture', 'tag', 'url')}
                    for c in (cfg, plain_cfg)]
            assert same[0] == same[1]
            assert (cfg.architecture, cfg.url) == (name, None)
        assert get_pretrained_cfg(name).tag == f'graft_{get_pretrained_cfg(base).tag}'
        assert set(timm.list_pretrained(f'{name}.*')) == set(ours)


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}], ids=str)
@pytest.mark.parametrize('name', ['resnet18_sa', 'tf_efficientnet_lite0_triplet'])
def test_without_a_neutral_point_there_are_settings_and_own_weights_but_no_plain_ones(name, kwargs):
    base, layer = MODELS[name].base, MODELS[name].layer
    own, settings = timm.create_model(name).state_dict(), []
    for cfg in (get_pretrained_cfg(name), get_pretrained_cfg(base)):
        settings.append([getattr(cfg, k) for k in (
            'mean', 'std', 'input_size', 'test_input_size', 'crop_pct', 'first_conv', 'classifier')])
    assert settings[0] == settings[1]
    assert get_pretrained_cfg(name).license is None and get_pretrained_cfg(name).tag is None
    with pytest.raises(RuntimeError, match=f'There are no pretrained weights for {name}: {layer.no_weights}'):
        timm.create_model(name, pretrained=True, **kwargs)
    with pytest.raises(RuntimeError, match=f'Cannot graft plain weights onto {name}: {layer.no_weights}'):
        load(name, skeleton(base).state_dict(), device='meta', **kwargs)
    loaded = load(name, own, **kwargs).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in own.items() if not k.startswith(('fc.', 'classifier.')))
