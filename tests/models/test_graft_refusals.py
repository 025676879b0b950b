"""Weights that do not fit are refused with the reason, and tags are there for what can be grafted."""
import dataclasses
import re
from functools import partial

import pytest
import timm
import torch
from helpers import load, skeleton
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from timm_ela.layers.ela import EfficientLocalAttention
from timm_ela.models.registry import MODELS

# with a new head, timm's loader is not strict
LOOSE = {'num_classes': 7, 'device': 'meta'}


@pytest.mark.parametrize('name', ['resnet18_ela_t', 'resnet18_triplet', 'tf_efficientnet_lite0_cbam'])
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
    ('resnet50_ela_b', 'seresnet50', "has 64 unexpected weights, first 'layer1.0.se.fc1.weight'"),
    ('tf_efficientnet_lite0_ela_b', 'efficientnet_b0',
     "has 64 unexpected weights, first 'blocks.0.0.se.conv_reduce.weight'"),
    ('tf_efficientnet_lite0_cbam', 'mobilenetv2_100', "lacks 15 weights, first 'blocks.5.3.conv_pw.weight'"),
    ('elsa_swin_tiny', 'swin_tiny_patch4_window7_224', "first 'layers.0.blocks.0.attn.ghost_head'"),
    ('elsa_volo_d1', 'volo_d1_224', "lacks 32 weights, first 'network.0.0.attn.ghost_head'"),
    ('elsa_volo_d1', 'elsa_volo_d2', "has 76 unexpected weights, first 'network.0.4.norm1.weight'"),
])
def test_a_checkpoint_of_another_architecture_is_refused_with_the_first_key_that_differs(name, other, reason):
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        load(name, skeleton(other).state_dict(), **LOOSE)


def test_a_checkpoint_of_another_width_is_refused():
    with pytest.raises(RuntimeError, match='size mismatch for layer1.0.conv1.weight'):
        load('resnet50_ela_b', skeleton('wide_resnet50_2').state_dict(), **LOOSE)


@pytest.mark.parametrize('attention', [True, False], ids=['own', 'plain'])
@pytest.mark.parametrize(('base', 'change', 'reason'), [
    ('mobilenetv2_050', {'bn2.running_var': None}, "the checkpoint lacks 1 weights, first 'bn2.running_var'"),
    ('resnet18', {'conv1.weight': None, 'net.conv1.weight': torch.ones(1)},
     "the checkpoint lacks 1 weights, first 'conv1.weight', and has 1 unexpected weights, first 'net.conv1.weight'"),
], ids=lambda value: '-'.join(value) if isinstance(value, dict) else '')
def test_a_weight_too_few_or_too_many_is_named(base, change, reason, attention):
    name = f'{base}_ela_t'
    weights = {**skeleton(name if attention else base).state_dict(), **change}
    with pytest.raises(RuntimeError) as error:
        load(name, {k: v for k, v in weights.items() if v is not None}, **LOOSE)
    assert str(error.value) == (
        f'The weights are not those of {name}: {reason}.' if attention else
        f'Cannot graft onto {name}: {reason}; it must be one of the plain model.')


@pytest.mark.parametrize(('source', 'name', 'head'), [
    ('resnet18', 'resnet18_ela_t', 'fc'), ('mobilenetv2_050_ela_t', 'mobilenetv2_050_ela_t', 'classifier'),
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


OF_WEIGHTS = ('hf_hub_id', 'license', 'description', 'origin_url', 'paper_name', 'paper_ids', 'notes')


def settings(cfg, *without):
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in ('architecture', 'tag', 'url', *without)}


@pytest.mark.parametrize('name', [name for name, model in MODELS.items() if model.layer.neutral])
def test_tags_are_the_plain_models_that_the_hub_has_with_graft_before_them(name):
    base = MODELS[name].base
    theirs = [cfg for cfg in get_arch_pretrained_cfgs(base).values() if cfg.hf_hub_id]
    ours = get_arch_pretrained_cfgs(name)
    assert theirs and list(ours) == [f'{name}.graft_{cfg.tag}' for cfg in theirs]
    for cfg, plain_cfg in zip(ours.values(), theirs, strict=True):
        assert cfg.hf_hub_id == f'timm/{base}.{plain_cfg.tag}' and cfg.url is None
        assert settings(cfg) == settings(plain_cfg)
    assert get_pretrained_cfg(name).tag == f'graft_{get_pretrained_cfg(base).tag}'


@pytest.mark.parametrize('name', [name for name, model in MODELS.items() if not model.layer.neutral])
def test_without_a_neutral_point_there_are_settings_but_no_weights_and_the_reason_is_said(name):
    cfg, plain_cfg = get_pretrained_cfg(name), get_pretrained_cfg(MODELS[name].base)
    assert settings(cfg, *OF_WEIGHTS) == settings(plain_cfg, *OF_WEIGHTS)
    assert cfg.tag is None and not cfg.has_weights and not any(getattr(cfg, field) for field in OF_WEIGHTS)
    reason = f'There are no pretrained weights for {name}: {MODELS[name].layer.no_weights}'
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        timm.create_model(name, pretrained=True, device='meta')


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}], ids=str)
def test_without_a_neutral_point_own_weights_load_and_plain_ones_do_not(kwargs):
    own = timm.create_model('resnet18_sa').state_dict()
    loaded = load('resnet18_sa', own, **kwargs).state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in own.items() if not k.startswith('fc.'))
    with pytest.raises(RuntimeError, match='Cannot graft plain weights onto resnet18_sa: it shuffles the channels'):
        load('resnet18_sa', skeleton('resnet18').state_dict(), device='meta', **kwargs)
