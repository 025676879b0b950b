"""Weights of a plain timm model, loaded into a model of ours, compute what they did before, and train as they did."""
import logging
from copy import deepcopy
from functools import cache

import pytest
import timm
import torch
from helpers import DEVICE, LOSS, OPTIMIZERS, assert_same_first_step, attentions, first_step, slot_blocks
from timm.layers import GroupNorm1
from torch import nn

from timm_ela.layers.attn_layers import ATTN_LAYERS
from timm_ela.models.registry import graft_state_dict

NEUTRAL = [suffix for suffix, layer in ATTN_LAYERS.items() if layer.neutral]
# The kinds of block, and the weights that make up for the layer: basic, bottleneck and universal inverted residual,
# where scale and shift of the norm before the layer are multiplied by the factor; inverted residual, and that with
# timm's own padding 'same', where the norm after the projection counts on activations that are smaller by it.
BEFORE = ('resnet18', 'resnet50', 'mobilenetv4_conv_small_050')
# Where one is enough: a layer for each factor, and a layer for each base.
BY_FACTOR = {ATTN_LAYERS[suffix].neutral.factor: suffix for suffix in reversed(NEUTRAL)}.values()
FEW = [
    ('resnet18', 'cbam'), ('resnet50', 'se'), ('mobilenetv2_050', 'ca'), ('tf_efficientnet_lite0', 'ela_b'),
    ('mobilenetv4_conv_small_050', 'ela_s')]
RATES = {'drop_path_rate': 0.4, 'drop_rate': 0.3}
LABELS = torch.tensor([3, 5, 0, 2], device=DEVICE)
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}  # of logits, relative, where the bits are not the same


def create(name, **kwargs):
    """A timm model; a ResNet with few blocks, but of each kind."""
    return timm.create_model(name, **({'layers': (2, 1, 1, 1)} if 'res' in name else {}), **kwargs)


def load(name, state_dict, **kwargs):
    return create(name, pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict}, **kwargs)


@pytest.fixture(scope='module')
def plain(randomize):
    """Plain models whose every weight matters: as if trained, where a fresh ResNet hides its blocks. Do not change."""
    @cache
    def plain(base):
        torch.manual_seed(0)
        return randomize(create(base)).eval()

    return plain


@pytest.fixture
def image():
    return torch.randn(4, 3, 64, 48)


def scaled_names(model, norm, weights):
    """Weights of each block's norm by name; 'before' is the norm before the layer in MobileNetV4."""
    names = set()
    for block, module in slot_blocks(model).items():
        of_block = norm
        if norm == 'before':
            of_block = 'pw_exp.bn' if isinstance(module.dw_mid, nn.Identity) else 'dw_mid.bn'
        names |= {f'{block}.{of_block}.{weight}' for weight in weights}
    return names


# Feature maps, and few logits, of random weights amplify rounding more: `times`.
def assert_same(got, want, exact, times=1):
    assert want.isfinite().all() and want.std() > 0
    if exact:
        assert torch.equal(got, want)
    else:
        assert (got - want).abs().max() <= times * CLOSE[want.dtype] * want.abs().max()


def assert_same_logits(model, plain, *images, exact):
    with torch.no_grad():
        for x in images:
            logits = plain.eval()(x)
            assert (logits[0] - logits[1]).abs().max() > 1e-3
            assert_same(model.eval()(x), logits, exact)


def assert_as_close_to(want, got, plain, exact):
    """Asserts that logits are as close to those of float32 as the plain model's."""
    assert torch.equal(got, plain) if exact else (got - want).abs().max() <= 2 * (plain - want).abs().max()


def assert_trains_on_the_same_bits(source, model, factor, scaled, image):
    """Asserts that logits, buffers and gradients are equal in training."""
    logits, before = [], {k: v.clone() for k, v in source.named_buffers()}
    for net in (source.train(), model.train()):
        torch.manual_seed(1)
        logits.append(net(image))
        nn.functional.cross_entropy(logits[-1], LABELS).backward()
    assert torch.equal(*logits)
    buffers, params = dict(model.named_buffers()), dict(model.named_parameters())
    for k, v in source.named_buffers():
        assert torch.equal(buffers[k], v), k
        assert not torch.equal(v, before[k]), k
    for k, p in source.named_parameters():
        assert torch.equal(params[k].grad * factor if k in scaled else params[k].grad, p.grad), k


@pytest.mark.parametrize(('base', 'layer', 'norm', 'kwargs'), [
    *(('resnet18', layer, 'bn2', {}) for layer in NEUTRAL),
    *((base, layer, norm, {}) for base, norm in (('resnet50', 'bn2'), (BEFORE[2], 'before')) for layer in BY_FACTOR),
    (*FEW[4], 'before', RATES),
    ('resnext50_32x4d', 'cbam', 'bn2', {}),
    *((base, layer, 'bn2', RATES) for base, layer in FEW[:2]),
    ('resnet18', 'cbam', 'bn2', {'attn_slot': 'output'}),
    ('resnet50', 'cbam', 'bn3', {'attn_slot': 'output'}),
])
def test_scaled_before_the_layer_a_model_trains_on_the_plain_models_bits(plain, image, base, layer, norm, kwargs):
    state_dict = plain(base).state_dict()
    source = load(base, state_dict, **{k: v for k, v in kwargs.items() if k != 'attn_slot'})
    model = load(f'{base}_{layer}', state_dict, **kwargs)
    assert_same_logits(model, source, image, image.contiguous(memory_format=torch.channels_last), exact=True)
    scaled = scaled_names(model, norm, ('weight', 'bias'))
    assert_trains_on_the_same_bits(source, model, ATTN_LAYERS[layer].neutral.factor, scaled, image)


@pytest.mark.parametrize('layer', NEUTRAL)
def test_elsewhere_logits_are_the_plain_models_up_to_rounding(plain, image, layer):
    source, images = plain('mobilenetv2_050'), (image, image.contiguous(memory_format=torch.channels_last))
    assert_same_logits(load(f'mobilenetv2_050_{layer}', source.state_dict()), source, *images, exact=False)
    source = deepcopy(source).double()
    model = load(f'mobilenetv2_050_{layer}', source.state_dict(), dtype=torch.float64)
    assert_same_logits(model, source, image.double(), exact=False)


@pytest.mark.parametrize(('base', 'layer'), FEW[2:4])
def test_elsewhere_random_depth_and_dropout_drop_the_same(plain, image, base, layer):
    state_dict = plain(base).state_dict()
    nets = (load(name, state_dict, **RATES) for name in (base, f'{base}_{layer}'))
    want, got = (first_step(net, image, LABELS, 'sgd')[0] for net in nets)
    assert got == pytest.approx(want, rel=LOSS)


# Resnets do by the test of their bits; test_pretrained.py has Lite, whose eps needs statistics of real weights.
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('layer', [suffix for suffix in NEUTRAL if ATTN_LAYERS[suffix].neutral.factor > 1])
def test_every_convolution_and_the_head_take_the_plain_models_first_step(plain, image, layer, optimizer):
    source = deepcopy(plain('mobilenetv2_050'))
    model = load(f'mobilenetv2_050_{layer}', source.state_dict())
    assert_same_first_step(model, source, image, LABELS, optimizer)


# Small steps: random weights and labels make the loss of large ones chaotic.
@pytest.mark.parametrize(('optimizer', 'lr'), [('sgd', 5e-4), ('adamw', 5e-5)])
def test_with_the_attention_frozen_five_steps_lead_to_the_plain_models_loss(plain, optimizer, lr):
    source, images, losses = deepcopy(plain('mobilenetv2_050')), torch.randn(16, 3, 64, 48), []
    model = load('mobilenetv2_050_ca', source.state_dict())
    for m in attentions(model).values():
        m.requires_grad_(False)
    for net in (source, model):
        learner = OPTIMIZERS[optimizer]([p for p in net.train().parameters() if p.requires_grad], lr=lr)
        for _ in range(6):
            loss = nn.functional.cross_entropy(net(images), torch.arange(16))
            learner.zero_grad()
            loss.backward()
            learner.step()
            losses.append(loss.item())
    first, last, grafted = losses[0], losses[5], losses[11]
    assert last < 0.95 * first
    assert grafted == pytest.approx(last, rel=LOSS)


@pytest.mark.parametrize('act', ['silu', 'relu'])
@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_logits_are_the_same_with_another_activation(plain, image, base, layer, act):
    state_dict = plain(base).state_dict()
    source, model = (load(name, state_dict, act_layer=act) for name in (base, f'{base}_{layer}'))
    # ReLU passes a power of two, which SiLU does not; behind a BasicBlock's layer is no activation
    assert_same_logits(model, source, image, exact=act == 'relu' or base == 'resnet18')


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layer', BY_FACTOR)
def test_a_model_in_half_precision_computes_the_plain_models_bits(plain, image, layer, dtype):
    state_dict = plain('resnet18').state_dict()
    source, model = (load(name, state_dict, dtype=dtype) for name in ('resnet18', f'resnet18_{layer}'))
    assert_same_logits(model, source, image.to(dtype), exact=True)


def test_loading_weights_takes_no_random_numbers(plain):
    numbers, overlay = [], {'state_dict': plain('resnet18').state_dict()}
    for pretrained in (False, True):
        torch.manual_seed(0)
        create('resnet18_cbam', pretrained=pretrained, pretrained_cfg_overlay=overlay)
        numbers.append(torch.rand(3))
    assert torch.equal(*numbers)


@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_logits_are_the_same_in_half_precision_and_from_half_precision_files(plain, image, base, layer):
    exact = base in BEFORE
    state_dict = {k: v.half() if v.is_floating_point() else v for k, v in plain(base).state_dict().items()}
    source, model = load(base, state_dict), load(f'{base}_{layer}', state_dict)
    assert_same_logits(model, source, image, exact=exact)
    with torch.no_grad():
        want = source.eval()(image)
        with torch.autocast(DEVICE, torch.bfloat16):
            assert_as_close_to(want, model.eval()(image), source(image), exact)
        assert_as_close_to(want, model.bfloat16()(image.bfloat16()), source.bfloat16()(image.bfloat16()), exact)


def test_another_norm_takes_the_factor_before_the_layer_and_is_refused_behind_it(image, randomize):
    kwargs = {'norm_layer': GroupNorm1}
    source = randomize(create('resnet18', **kwargs))
    assert_same_logits(load('resnet18_ela_b', source.state_dict(), **kwargs), source, image, exact=True)
    source = create('mobilenetv2_050', **kwargs)
    with pytest.raises(RuntimeError, match="it has no 'blocks.1.0.bn3.running_mean', which must make up for the att"):
        load('mobilenetv2_050_ela_b', source.state_dict(), **kwargs)


@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_only_the_norm_beside_the_layer_is_changed_and_the_rest_of_the_layer_is_random(plain, base, layer):
    source = plain(base).state_dict()
    before = {k: v.clone() for k, v in source.items()}
    model = create(f'{base}_{layer}')
    model.load_state_dict(graft_state_dict(source, model))  # not through timm's loader, which copies what it is given
    assert all(torch.equal(source[k], v) for k, v in before.items())  # what the caller holds stays as it was
    state_dict = model.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(state_dict[k], v)}
    if base in BEFORE:
        assert changed == scaled_names(model, 'before' if 'v4' in base else 'bn2', ('weight', 'bias'))
    else:
        assert changed == scaled_names(model, 'bn3', ('running_mean', 'running_var', 'weight'))
    for k, m in attentions(model).items():
        for name, p in m.named_parameters():
            if name in ATTN_LAYERS[layer].neutral.zeroed:
                assert not p.any(), k
            elif p.ndim > 1:
                assert p.std() > 0, k  # zero would never learn


@pytest.mark.parametrize('kwargs', [
    {'num_classes': 7}, {'features_only': True},
    {'features_only': True, 'out_indices': (2, 4), 'feature_cls': 'fx'}], ids=str)
@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_features_are_the_plain_models_also_below_a_new_head(plain, image, base, layer, kwargs):
    source, model = (load(name, plain(base).state_dict(), **kwargs).eval() for name in (base, f'{base}_{layer}'))
    if 'features_only' in kwargs:
        wanted, found = source(image), model(image)
        assert model.feature_info.channels() == source.feature_info.channels() == [f.shape[1] for f in found]
        assert model.feature_info.reduction() == source.feature_info.reduction()
    else:
        wanted, found = ([net.forward_features(image)] for net in (source, model))
        assert model(image).shape == (4, 7)
    for got, want in zip(found, wanted, strict=True):
        assert_same(got, want, exact=base in BEFORE, times=5)


@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_a_model_of_features_takes_a_grafted_state_dict(plain, image, base, layer):
    weights = plain(base).state_dict()
    source, model = load(base, weights, features_only=True), create(f'{base}_{layer}', features_only=True)
    assert not model.load_state_dict(graft_state_dict(weights, model), strict=False).missing_keys
    for got, want in zip(model.eval()(image), source.eval()(image), strict=True):
        assert_same(got, want, exact=base in BEFORE, times=5)


FORMS = {
    'old PyTorch': lambda weights: {k: v for k, v in weights.items() if not k.endswith('num_batches_tracked')},
    'DistributedDataParallel': lambda weights: {'state_dict': {f'module.{k}': v for k, v in weights.items()}},
    # of a module that calls its network `model`
    'Lightning': lambda weights: {'state_dict': {f'model.{k}': v for k, v in weights.items()}},
}


@pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(('base', 'layer'), FEW[:3:2])
def test_plain_weights_load_in_the_forms_in_which_others_save_them(plain, image, base, layer, form):
    source = plain(base)
    model = load(f'{base}_{layer}', form(source.state_dict()))
    assert_same_logits(model, source, image, exact=base in BEFORE)


@pytest.mark.parametrize('num_classes', [1000, 7])
@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_a_complete_checkpoint_passes_untouched_and_in_silence(plain, image, caplog, base, layer, num_classes):
    source = plain(f'{base}_{layer}')
    state_dict = source.state_dict()
    filtered = graft_state_dict(state_dict, source)
    assert filtered.keys() == state_dict.keys() and all(filtered[k] is v for k, v in state_dict.items())
    model = load(f'{base}_{layer}', dict(state_dict), num_classes=num_classes).eval()
    assert torch.equal(model.forward_features(image), source.forward_features(image))
    assert not [r for r in caplog.records if r.name.startswith('timm_ela') or r.levelno >= logging.WARNING]


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}, {'features_only': True}], ids=str)
@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_a_graft_is_said_in_one_line_once(plain, caplog, base, layer, kwargs):
    load(f'{base}_{layer}', plain(base).state_dict(), **kwargs)
    record, = (r for r in caplog.records if r.name.startswith('timm_ela'))
    assert record.levelno == logging.WARNING
    assert f'{base}_{layer}' in record.getMessage() and '\n' not in record.getMessage()
