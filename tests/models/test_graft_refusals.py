"""What cannot be grafted is refused with the reason, and tags are there for what can."""
import dataclasses
import json
import re
from functools import partial

import pytest
import timm
import torch
from helpers import load, run_python, skeleton
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg

from timm_ela.hub.publish import convert_checkpoint
from timm_ela.layers.attn_layers import ATTN_LAYERS
from timm_ela.layers.ela import EfficientLocalAttention
from timm_ela.models.registry import MODELS

# num_classes=7 and features_only: there timm's loader is not strict.
WAYS_TO_LOAD = pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}, {'features_only': True}], ids=str)


@WAYS_TO_LOAD
@pytest.mark.parametrize('layer', ATTN_LAYERS)
@pytest.mark.parametrize('base', ['resnet18', 'tf_efficientnet_lite0'])
def test_a_checkpoint_with_some_of_the_attention_weights_is_refused(base, layer, kwargs):
    name = f'{base}_{layer}'
    state_dict = skeleton(name).state_dict()
    own = [k for k in state_dict if '.se.' in k]
    lost = [k for k in own if not k.endswith('num_batches_tracked')][3:]
    part = {k: v for k, v in state_dict.items() if k not in lost}
    with pytest.raises(RuntimeError) as error:
        load(name, part, device='meta', **kwargs)
    assert str(error.value) == (
        f'The checkpoint for {name} lacks {len(lost)} of {len(own)} attention weights, first {lost[0]!r}: '
        'it must hold all of them, or none to be grafted.')


@WAYS_TO_LOAD
@pytest.mark.parametrize(('name', 'other', 'reason'), [
    ('resnet18_ela_b', 'resnet34', "has 96 unexpected weights, first 'layer1.2.conv1.weight'"),
    ('resnet34_gc', 'resnet18', "lacks 80 weights, first 'layer1.2.conv1.weight'"),
    ('resnet50_ela_b', 'wide_resnet50_2', "'layer1.0.conv1.weight' is (128, 64, 1, 1) in the checkpoint"),
    ('resnet50_ca', 'resnet50d', "lacks 17 weights, first 'conv1.weight'"),
    ('resnet50_ela_b', 'seresnet50', "has 64 unexpected weights, first 'layer1.0.se.fc1.weight'"),
    ('mobilenetv2_050_se', 'mobilenetv2_100', "'conv_stem.weight' is (32, 3, 3, 3) in the checkpoint"),
    ('mobilenetv2_ela_b', 'resnet18', "first 'conv_stem.weight'"),
    ('tf_efficientnet_lite0_ela_b', 'efficientnet_b0',
     "has 64 unexpected weights, first 'blocks.0.0.se.conv_reduce.weight'"),
    ('tf_efficientnet_lite0_se', 'tf_efficientnet_lite1',
     "has 90 unexpected weights, first 'blocks.1.2.conv_pw.weight'"),
    ('tf_efficientnet_lite0_cbam', 'mobilenetv2_100', "lacks 15 weights, first 'blocks.5.3.conv_pw.weight'"),
])
def test_a_checkpoint_of_another_architecture_is_refused_with_the_first_key_that_differs(name, other, reason, kwargs):
    with pytest.raises(RuntimeError) as error:
        load(name, skeleton(other).state_dict(), device='meta', **kwargs)
    message = str(error.value)
    assert message.startswith(f'Cannot graft onto {name}: ') and '\n' not in message
    assert reason in message


OTHER_WAYS = pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}, {'in_chans': 1}], ids=str)


@OTHER_WAYS
@pytest.mark.parametrize('attention', [True, False], ids=['own', 'plain'])
@pytest.mark.parametrize(('base', 'key'), [
    ('resnet18', 'conv1.weight'), ('mobilenetv2_050', 'conv_stem.weight'), ('mobilenetv2_050', 'bn2.running_var')])
def test_a_checkpoint_without_the_stem_or_another_weight_is_refused(base, key, attention, kwargs):
    name = f'{base}_ela_t'
    state_dict = skeleton(name if attention else base).state_dict()
    del state_dict[key]
    with pytest.raises(RuntimeError, match=f"the checkpoint lacks 1 weights, first '{key}'"):
        load(name, state_dict, device='meta', **kwargs)


@OTHER_WAYS
@pytest.mark.parametrize('attention', [True, False], ids=['own', 'plain'])
def test_the_head_of_another_model_is_refused(attention, kwargs):
    state_dict = skeleton('resnet18_ela_t' if attention else 'resnet18').state_dict()
    state_dict['fc.weight'] = skeleton('resnet50').state_dict()['fc.weight']
    with pytest.raises(RuntimeError, match=r"'fc.weight' is \(1000, 2048\) in the checkpoint and "):
        load('resnet18_ela_t', state_dict, device='meta', **kwargs)


@pytest.mark.parametrize('attention', [True, False], ids=['own', 'plain'])
@pytest.mark.parametrize('name', ['resnet18_ela_t', 'mobilenetv2_050_ela_t'])
def test_a_head_may_be_missing_only_where_it_is_made_anew(name, attention):
    source = skeleton(name if attention else MODELS[name].base)
    state_dict = {k: v for k, v in source.state_dict().items() if not k.startswith(('fc.', 'classifier.'))}
    for kwargs in ({'num_classes': 7}, {'num_classes': 0}, {'features_only': True}):
        load(name, state_dict, device='meta', **kwargs)
    with pytest.raises(RuntimeError, match=r'Missing key.*(fc|classifier)\.weight'):
        load(name, state_dict, device='meta')


class WithSkip(EfficientLocalAttention):
    """ELA as the authors' DeepLab backbone has it."""

    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}], ids=str)
@pytest.mark.parametrize(('name', 'layer', 'found'), [
    ('resnet18_ela_b', 'se', 'SEModule'), ('resnet50_ela_b', 'ela', 'EfficientLocalAttn'),
    ('resnet18_se', 'ese', 'EffectiveSEModule'), ('resnet18_eca', EfficientLocalAttention, 'EfficientLocalAttention'),
    ('resnet50_ela_b', WithSkip, 'WithSkip'), ('resnet18_ca', 'cbam', 'CbamModule')])
def test_a_block_with_another_layer_than_the_models_is_refused(name, layer, found, kwargs):
    state_dict = timm.create_model(MODELS[name].base).state_dict()
    with pytest.raises(RuntimeError, match=fr'^Cannot graft onto {name}: layer1.0.se is {found}, which does not mult'):
        load(name, state_dict, block_args={'attn_layer': layer}, **kwargs)


@pytest.mark.parametrize(('name', 'layer'), [
    ('resnet50_ela_b', partial(EfficientLocalAttention, variant='l', num_groups=8)), ('resnet18_eca', 'ceca')])
def test_a_block_with_another_layer_of_the_same_neutral_point_is_grafted(name, layer):
    source = timm.create_model(MODELS[name].base, zero_init_last=False).eval()
    model = load(name, source.state_dict(), block_args={'attn_layer': layer}).eval()
    x = torch.randn(2, 3, 64, 48)
    assert torch.equal(model(x), source(x))


@WAYS_TO_LOAD
@pytest.mark.parametrize('base', ['resnet18', 'mobilenetv2_050'])
def test_a_checkpoint_without_the_statistics_of_a_norm_is_refused(base, kwargs):
    state_dict = {k: v for k, v in skeleton(base).state_dict().items() if 'running_' not in k}
    with pytest.raises(RuntimeError, match=r"the checkpoint lacks \d+ weights, first 'bn1.running_mean'"):
        load(f'{base}_ela_b', state_dict, device='meta', **kwargs)


@WAYS_TO_LOAD
@pytest.mark.parametrize('attention', [True, False], ids=['own', 'plain'])
@pytest.mark.parametrize(('name', 'first', 'prefix'), [
    ('resnet18_ela_t', 'conv1.weight', 'net.'), ('mobilenetv2_050_ca', 'conv_stem.weight', 'backbone.'),
    ('resnet50_ca', 'conv1.weight', 'model.')])
def test_a_prefix_of_the_names_is_said(name, first, prefix, attention, kwargs):
    state_dict = skeleton(name if attention else MODELS[name].base).state_dict()
    state_dict = {f'{prefix}{k}': v for k, v in state_dict.items()} | {'criterion.weight': torch.ones(3)}
    with pytest.raises(RuntimeError) as error:
        load(name, state_dict, device='meta', **kwargs)
    message = str(error.value)
    assert re.search(fr"lacks \d+ weights, first '{first}'", message)
    assert f"(the missing weights are under the prefix '{prefix}': remove it)" in message


def test_convert_says_the_prefix_and_nothing_of_a_classifier(tmp_path, caplog):
    torch.save({f'net.{k}': v for k, v in timm.create_model('resnet18').state_dict().items()}, tmp_path / 'net.pth')
    with pytest.raises(RuntimeError, match="under the prefix 'net.'"):
        convert_checkpoint(tmp_path / 'net.pth', 'resnet18_ela_t', tmp_path / 'ours')
    assert 'classifier' not in caplog.text


@WAYS_TO_LOAD
def test_the_first_missing_and_the_first_unexpected_weight_are_named_together(kwargs):
    state_dict = skeleton('resnet18').state_dict()
    state_dict['layer1.0.conv9.weight'] = state_dict.pop('layer1.0.conv2.weight')
    with pytest.raises(RuntimeError) as error:
        load('resnet18_ela_t', state_dict, device='meta', **kwargs)
    assert str(error.value) == (
        "Cannot graft onto resnet18_ela_t: the checkpoint lacks 1 weights, first 'layer1.0.conv2.weight', and has 1 "
        "unexpected weights, first 'layer1.0.conv9.weight'; it must be one of the plain model.")


SETTINGS = ('mean', 'std', 'input_size', 'test_input_size', 'crop_pct', 'first_conv', 'classifier')


@pytest.mark.parametrize('base', {model.base: None for model in MODELS.values()})
def test_tags_are_the_plain_models_with_graft_before_them_where_the_layer_has_a_neutral_point(base):
    theirs = {k: cfg for k, cfg in get_arch_pretrained_cfgs(base).items() if cfg.hf_hub_id}
    assert theirs
    for name, model in MODELS.items():
        if model.base != base:
            continue
        assert bool(model.layer.neutral) != bool(model.layer.no_weights)
        if not model.layer.neutral:
            assert not timm.is_model_pretrained(name) and not timm.list_pretrained(f'{name}.*')
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


# A layer that has no neutral point, and a family of one model with it, as a file of ours would have them.
NO_NEUTRAL = '''
import json, sys
import timm, torch
from timm.layers import EcaModule
from timm_ela.layers.attn_layers import ATTN_LAYERS, AttnLayer
from timm_ela.models.registry import MODELS, Model, make_default_cfgs, register_models

layer = AttnLayer('odd', 'Odd', ATTN_LAYERS['eca'].paper, EcaModule, no_weights='its gates cannot be neutral.')
families = {base: MODELS[f'{base}_se'].family for base in ('resnet18', 'tf_efficientnet_lite0')}

def create(model, pretrained=False, **kwargs):
    return families[model.base].create(model, pretrained, **kwargs)

models = [Model(f'{k}_odd', k, layer, family._replace(create=create)) for k, family in families.items()]
default_cfgs = make_default_cfgs(models)
globals().update(register_models(models))

def failure(name, **kwargs):
    try:
        timm.create_model(name, pretrained=True, **kwargs)
    except RuntimeError as error:
        return str(error)

answers = {}
for name, base in (m[:2] for m in models):
    plain, own = timm.create_model(base).state_dict(), timm.create_model(name)
    again = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': own.state_dict()})
    answers[name] = {
        'tags': timm.list_pretrained(f'{name}*'),
        'bare': failure(name),
        'classes': failure(name, num_classes=7),
        'plain': failure(name, pretrained_cfg_overlay={'state_dict': plain}),
        'plain classes': failure(name, pretrained_cfg_overlay={'state_dict': plain}, num_classes=7),
        'complete': all(torch.equal(v, own.state_dict()[k]) for k, v in again.state_dict().items()),
        'settings': [[str(getattr(timm.get_pretrained_cfg(n), k)) for k in sys.argv[1:]] for n in (name, base)],
        'of weights': [timm.get_pretrained_cfg(name).license, timm.get_pretrained_cfg(name).tag],
    }
print(json.dumps(answers))
'''


def test_without_a_neutral_point_there_are_settings_but_no_tags_and_the_reason_is_said():
    answers = json.loads(run_python(NO_NEUTRAL, *SETTINGS).stdout)
    assert len(answers) == 2
    for name, answer in answers.items():
        assert answer['tags'] == []
        assert answer['bare'] == answer['classes'] == (
            f'There are no pretrained weights for {name}: its gates cannot be neutral.')
        assert answer['plain'] == answer['plain classes'] == (
            f'Cannot graft plain weights onto {name}: its gates cannot be neutral.')
        assert answer['complete']
        assert answer['settings'][0] == answer['settings'][1]
        assert answer['of weights'] == [None, None]


def test_every_layer_of_ours_without_a_neutral_point_gives_its_reason():
    for name, model in MODELS.items():
        if not model.layer.neutral:
            with pytest.raises(RuntimeError) as error:
                timm.create_model(name, pretrained=True, device='meta')
            assert str(error.value) == f'There are no pretrained weights for {name}: {model.layer.no_weights}'
            assert '\n' not in model.layer.no_weights
