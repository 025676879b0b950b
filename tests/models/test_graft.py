"""Weights of a plain timm model, loaded into a model of ours, compute what they did before, and train as they did."""
import logging
from copy import deepcopy
from functools import cache

import pytest
import timm
import torch
from helpers import DEVICE, LOSS, OPTIMIZERS, assert_same_first_step, attentions, first_step, slot_blocks
from safetensors.torch import save_file
from timm.layers import GroupNorm1
from torch import nn

from timm_ela.layers.attn_layers import ATTN_LAYERS
from timm_ela.models.registry import graft_state_dict

NEUTRAL = [suffix for suffix, layer in ATTN_LAYERS.items() if layer.neutral]
# The kinds of block, and the weights that make up for the layer: basic, bottleneck and universal inverted residual,
# where scale and shift of the norm before the layer are multiplied by the factor; inverted residual, and that with
# timm's own padding 'same', where the norm after the projection counts on activations that are smaller by it.
BEFORE = ('resnet18', 'resnet50', 'mobilenetv4_conv_small_050')
AFTER = ('mobilenetv2_050', 'tf_efficientnet_lite0')
# Where one is enough: a layer for each factor, and a layer for each base.
BY_FACTOR = {layer.neutral.factor: suffix for suffix, layer in ATTN_LAYERS.items() if layer.neutral}.values()
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


def zeroed(model, layer):
    """The parameters that a graft sets to zero, by name."""
    names = ATTN_LAYERS[layer].neutral.zeroed
    return {f'{k}.{name}': m.get_parameter(name) for k, m in attentions(model).items() for name in names}


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
    *((base, layer, 'bn2', {}) for base, layer in (
        ('resnet26', 'ca'), ('resnet50d', 'ela_s'), ('resnext50_32x4d', 'cbam'), ('wide_resnet50_2', 'ela_t'))),
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


@pytest.mark.parametrize(
    ('base', 'layer'), [*((AFTER[0], layer) for layer in NEUTRAL), *((AFTER[1], layer) for layer in BY_FACTOR)])
def test_elsewhere_logits_are_the_plain_models_up_to_rounding(plain, image, base, layer):
    source, images = plain(base), (image, image.contiguous(memory_format=torch.channels_last))
    assert_same_logits(load(f'{base}_{layer}', source.state_dict()), source, *images, exact=False)
    source = deepcopy(source).double()
    model = load(f'{base}_{layer}', source.state_dict(), dtype=torch.float64)
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
@pytest.mark.parametrize(('base', 'layer'), FEW[2:3])
def test_with_the_attention_frozen_five_steps_lead_to_the_plain_models_loss(plain, base, layer, optimizer, lr):
    images, losses = torch.randn(16, 3, 64, 48), []
    model = load(f'{base}_{layer}', plain(base).state_dict())
    for m in attentions(model).values():
        m.requires_grad_(False)
    for net in (deepcopy(plain(base)), model):
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


@pytest.mark.parametrize('kwargs', [
    {'global_pool': 'avgmax', 'num_classes': 1000}, {'act_layer': 'silu'}, {'act_layer': 'relu'},
    {'in_chans': 1}], ids=str)
@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_logits_are_the_same_with_the_options_of_timm(plain, image, base, layer, kwargs):
    state_dict, act = plain(base).state_dict(), kwargs.get('act_layer', '')
    source, model = (load(name, state_dict, **kwargs) for name in (base, f'{base}_{layer}'))
    # ReLU passes a power of two, which SiLU does not; behind a BasicBlock's layer is no activation
    exact = base == 'resnet18' or act == 'relu' or (base in BEFORE and act != 'silu')
    assert_same_logits(model, source, image[:, :kwargs.get('in_chans', 3)], exact=exact)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('layer', NEUTRAL)
def test_a_model_in_half_precision_computes_the_plain_models_bits(plain, image, layer, dtype):
    state_dict = plain('resnet18').state_dict()
    source, model = (load(name, state_dict, dtype=dtype) for name in ('resnet18', f'resnet18_{layer}'))
    assert_same_logits(model, source, image.to(dtype), exact=True)


@pytest.mark.parametrize('layer', NEUTRAL)
def test_loading_weights_takes_no_random_numbers(plain, layer):
    numbers = []
    for pretrained in (False, True):
        torch.manual_seed(0)
        overlay = {'state_dict': plain('resnet18').state_dict()}
        create(f'resnet18_{layer}', pretrained=pretrained, pretrained_cfg_overlay=overlay)
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
    source, factor = plain(base).state_dict(), ATTN_LAYERS[layer].neutral.factor
    before = {k: v.clone() for k, v in source.items()}
    model = create(f'{base}_{layer}')
    model.load_state_dict(graft_state_dict(source, model))  # not through timm's loader, which copies what it is given
    norm = 'before' if 'v4' in base else 'bn2' if base in BEFORE else 'bn3'
    factors = {'weight': factor, 'bias': factor} if base in BEFORE else {
        'running_mean': 1 / factor, 'running_var': 1 / factor ** 2, 'weight': None}
    factors = {k: v for name, v in factors.items() for k in scaled_names(model, norm, [name])}
    assert factors
    state_dict = model.state_dict()
    for k, v in before.items():
        assert torch.equal(source[k], v)  # what the caller holds stays as it was
        if factors.get(k, 1) is None:
            assert not torch.equal(state_dict[k], v) and torch.allclose(state_dict[k], v, rtol=0.1), k
        else:
            assert torch.equal(state_dict[k], v * factors.get(k, 1)), k
    zero = zeroed(model, layer)
    assert not any(p.any() for p in zero.values())
    for k, p in model.named_parameters():
        if '.se.' in k and k not in zero and p.ndim > 1:
            assert p.std() > 0, k  # zero would never learn


@pytest.mark.parametrize(('base', 'layer'), [*(('resnet18', layer) for layer in NEUTRAL), *FEW[1:]])
def test_training_leaves_the_neutral_point_in_the_first_step(plain, image, base, layer):
    model = load(f'{base}_{layer}', plain(base).state_dict()).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image), LABELS).backward()
        optimizer.step()
        for k, p in zeroed(model, layer).items():
            assert p.any(), k
    for k, p in model.named_parameters():
        # behind a weight of zero the first gradient is the second step's; a bias before a norm or softmax never has one
        if '.se.' in k and p.ndim > 1:
            assert p.grad.any(), k


@pytest.mark.parametrize('kwargs', [
    {'num_classes': 7}, {'num_classes': 0}, {'features_only': True}, {'features_only': True, 'output_stride': 8},
    *({'features_only': True, 'out_indices': (2, 4), 'feature_cls': cls} for cls in ('fx', 'getter'))], ids=str)
@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_features_are_the_plain_models_also_below_a_new_head(plain, image, base, layer, kwargs):
    source, model = (load(name, plain(base).state_dict(), **kwargs).eval() for name in (base, f'{base}_{layer}'))
    if 'features_only' in kwargs:
        wanted, found = source(image), model(image)
        assert model.feature_info.channels() == source.feature_info.channels() == [f.shape[1] for f in found]
        assert model.feature_info.reduction() == source.feature_info.reduction()
    else:
        wanted, found = ([net.forward_features(image)] for net in (source, model))
        assert model(image).shape == source(image).shape == (4, kwargs['num_classes'] or source.head_hidden_size)
    for got, want in zip(found, wanted, strict=True):
        assert_same(got, want, exact=base in BEFORE, times=5)


@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_a_model_of_features_takes_a_grafted_state_dict(plain, image, base, layer):
    weights = plain(base).state_dict()
    source, model = load(base, weights, features_only=True), create(f'{base}_{layer}', features_only=True)
    assert not model.load_state_dict(graft_state_dict(weights, model), strict=False).missing_keys
    for got, want in zip(model.eval()(image), source.eval()(image), strict=True):
        assert_same(got, want, exact=base in BEFORE, times=5)


def without_batch_counts(weights):
    """As old versions of PyTorch wrote them."""
    for k in [k for k in weights if k.endswith('num_batches_tracked')]:
        del weights[k]
    return weights


FILES = {  # what is written into each
    'plain.safetensors': dict,
    'plain.pth': lambda weights: weights,
    'old.pth': without_batch_counts,
    # of DistributedDataParallel
    'last.pth.tar': lambda weights: {
        'epoch': 3, 'arch': 'plain', 'state_dict': {f'module.{k}': v for k, v in weights.items()}},
    # of a Lightning module that calls its network `model`
    'last.ckpt': lambda weights: {'epoch': 3, 'state_dict': {f'model.{k}': v for k, v in weights.items()}},
}


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize(('base', 'layer'), FEW[::2])
def test_plain_weights_load_from_a_file(plain, image, tmp_path, base, layer, name):
    source, file = plain(base), tmp_path / name
    write = save_file if file.suffix == '.safetensors' else torch.save
    write(FILES[name](source.state_dict()), file)
    model = create(f'{base}_{layer}', pretrained=True, pretrained_cfg_overlay={'file': str(file)})
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
