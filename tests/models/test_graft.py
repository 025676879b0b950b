"""Weights of a plain timm model, loaded into a model of ours, compute what they did before, and train as they did."""
import json
import logging
from collections import OrderedDict
from copy import deepcopy
from functools import cache

import pytest
import timm
import torch
from helpers import DEVICE, LOSS, OPTIMIZERS, assert_same_first_step, attentions, first_step, load
from safetensors.torch import save_file
from timm.layers import GroupNorm1
from torch import nn

from timm_ela.layers.attn_layers import ATTN_LAYERS
from timm_ela.models.registry import graft_state_dict

NEUTRAL = [suffix for suffix, layer in ATTN_LAYERS.items() if layer.neutral]
WITH_FACTOR = [suffix for suffix in NEUTRAL if ATTN_LAYERS[suffix].neutral.factor > 1]
# The kinds of block, and the weights that make up for the layer: basic and bottleneck, where scale and shift of the
# norm before the layer are multiplied by the factor; inverted residual, and that with timm's own padding 'same', where
# the norm behind the projection counts on activations that are smaller by it.
BEFORE = {'resnet18': ('bn2.weight', 'bn2.bias'), 'resnet50': ('bn2.weight', 'bn2.bias')}
BEHIND = ('mobilenetv2_050', 'tf_efficientnet_lite0')
BASES = (*BEFORE, *BEHIND)
# A layer for each base, so that all kinds of layer come up where one is enough.
FEW = [('resnet18', 'cbam'), ('resnet50', 'se'), ('mobilenetv2_050', 'ca'), ('tf_efficientnet_lite0', 'ela_b')]
OUTPUT = {'attn_slot': 'output'}
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5}  # of logits, relative, where the bits are not the same


@pytest.fixture(scope='module')
def plain(randomize):
    """Plain models whose every weight matters: as if trained, where a fresh ResNet hides its blocks. Do not change."""
    @cache
    def plain(base, **kwargs):
        torch.manual_seed(0)
        return randomize(timm.create_model(base, **kwargs)).eval()

    return plain


@pytest.fixture
def image():
    return torch.randn(4, 3, 64, 48)


def scaled_names(model, scaled):
    return {f'{k.removesuffix("se")}{weight}' for k in attentions(model) for weight in scaled}


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


def assert_trains_on_the_same_bits(source, model, layer, scaled, image):
    """Asserts that logits, buffers and gradients are equal in training."""
    factor = ATTN_LAYERS[layer].neutral.factor
    logits, before = [], {k: v.clone() for k, v in source.named_buffers()}
    for net in (source.train(), model.train()):
        torch.manual_seed(1)
        logits.append(net(image))
        nn.functional.cross_entropy(logits[-1], torch.tensor([3, 5, 0, 2])).backward()
    assert torch.equal(*logits)
    buffers, params = dict(model.named_buffers()), dict(model.named_parameters())
    for k, v in source.named_buffers():
        assert torch.equal(buffers[k], v), k
        assert not torch.equal(v, before[k]), k
    for k, p in source.named_parameters():
        assert torch.equal(params[k].grad * factor if k in scaled else params[k].grad, p.grad), k


@pytest.mark.parametrize('layer', NEUTRAL)
@pytest.mark.parametrize('base', BASES)
def test_logits_are_the_plain_models_to_the_bit_in_resnets_and_up_to_rounding_elsewhere(plain, image, base, layer):
    source, images = plain(base), (image, image.contiguous(memory_format=torch.channels_last))
    model = load(f'{base}_{layer}', source.state_dict())
    assert_same_logits(model, source, *images, exact=base in BEFORE)
    if base in BEHIND:
        source = deepcopy(source).double()
        model = load(f'{base}_{layer}', source.state_dict(), dtype=torch.float64)
        assert_same_logits(model, source, image.double(), exact=False)


@pytest.mark.parametrize('layer', NEUTRAL)
@pytest.mark.parametrize('base', BEFORE)
def test_a_resnets_training_step_is_the_plain_models_to_the_bit(plain, image, base, layer):
    source = deepcopy(plain(base))
    model = load(f'{base}_{layer}', source.state_dict())
    assert_trains_on_the_same_bits(source, model, layer, scaled_names(model, BEFORE[base]), image)


@pytest.mark.parametrize(('base', 'layer'), [
    ('resnet26', 'ca'), ('resnet50d', 'ela_s'), ('resnext50_32x4d', 'cbam'), ('wide_resnet50_2', 'ela_t')])
def test_every_kind_of_resnet_is_grafted_to_the_bit(plain, image, base, layer):
    source = deepcopy(plain(base))
    model = load(f'{base}_{layer}', source.state_dict())
    assert_same_logits(model, source, image, exact=True)
    assert_trains_on_the_same_bits(source, model, layer, scaled_names(model, BEFORE['resnet50']), image)


@pytest.mark.parametrize(('base', 'scaled'), [
    ('resnet18', ('bn2.weight', 'bn2.bias')), ('resnet50', ('bn3.weight', 'bn3.bias'))])
def test_the_output_slot_computes_and_trains_on_the_same_bits(plain, image, base, scaled):
    source = deepcopy(plain(base))
    model = load(f'{base}_cbam', source.state_dict(), **OUTPUT)
    assert_same_logits(model, source, image, exact=True)
    assert_trains_on_the_same_bits(source, model, 'cbam', scaled_names(model, scaled), image)


@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_random_depth_and_dropout_drop_the_same(plain, image, base, layer):
    rates = {'drop_path_rate': 0.4, 'drop_rate': 0.3}
    state_dict = plain(base).state_dict()
    source, model = (load(name, state_dict, **rates) for name in (base, f'{base}_{layer}'))
    if base in BEFORE:
        assert_trains_on_the_same_bits(source, model, layer, scaled_names(model, BEFORE[base]), image)
    else:
        losses = [first_step(net, image, torch.tensor([3, 5, 0, 2]), 'sgd')[0] for net in (source, model)]
        assert losses[1] == pytest.approx(losses[0], rel=LOSS)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
@pytest.mark.parametrize('layer', WITH_FACTOR)
@pytest.mark.parametrize('base', BASES[:3])  # test_pretrained.py has Lite, whose eps needs statistics of real weights
def test_every_convolution_and_the_head_take_the_plain_models_first_step(plain, image, base, layer, optimizer):
    source = deepcopy(plain(base))
    model = load(f'{base}_{layer}', source.state_dict())
    assert_same_first_step(model, source, image, torch.tensor([3, 5, 0, 2]), optimizer)


# Small steps: random weights and labels make the loss of large ones chaotic.
@pytest.mark.parametrize(('optimizer', 'lr'), [('sgd', 5e-4), ('adamw', 5e-5)])
@pytest.mark.parametrize(('base', 'layer'), FEW[:3])
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
    {'output_stride': 8}, {'global_pool': 'avgmax', 'num_classes': 1000}, {'act_layer': 'silu'}, {'act_layer': 'relu'},
    {'in_chans': 1}], ids=str)
@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_logits_are_the_same_with_the_options_of_timm(plain, image, base, layer, kwargs):
    state_dict, act = plain(base).state_dict(), kwargs.get('act_layer', '')
    source, model = (load(name, state_dict, **kwargs) for name in (base, f'{base}_{layer}'))
    # ReLU passes a power of two, which SiLU does not; behind a BasicBlock's layer is no activation
    exact = base == 'resnet18' or act == 'relu' or (base == 'resnet50' and act != 'silu')
    assert_same_logits(model, source, image[:, :kwargs.get('in_chans', 3)], exact=exact)


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
    source = randomize(timm.create_model('resnet18', **kwargs))
    assert_same_logits(load('resnet18_ela_b', source.state_dict(), **kwargs), source, image, exact=True)
    source = timm.create_model('mobilenetv2_050', **kwargs)
    with pytest.raises(RuntimeError, match="it has no 'blocks.1.0.bn3.running_mean', which must make up for the att"):
        load('mobilenetv2_050_ela_b', source.state_dict(), **kwargs)


@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_only_the_norm_beside_the_layer_is_changed_and_the_rest_of_the_layer_is_random(plain, base, layer):
    source, factor = plain(base).state_dict(), ATTN_LAYERS[layer].neutral.factor
    before = {k: v.clone() for k, v in source.items()}
    model = timm.create_model(f'{base}_{layer}')
    model.load_state_dict(graft_state_dict(source, model))  # not through timm's loader, which copies what it is given
    if base in BEFORE:
        factors = dict.fromkeys(scaled_names(model, BEFORE[base]), factor)
    else:
        factors = dict.fromkeys(scaled_names(model, ('bn3.running_mean',)), 1 / factor)
        factors |= dict.fromkeys(scaled_names(model, ('bn3.running_var',)), 1 / factor ** 2)
    scales = scaled_names(model, () if base in BEFORE else ('bn3.weight',))
    state_dict = model.state_dict()
    for k, v in before.items():
        assert torch.equal(source[k], v)  # what the caller holds stays as it was
        if k in scales:
            assert not torch.equal(state_dict[k], v) and torch.allclose(state_dict[k], v, rtol=0.1), k
        else:
            assert torch.equal(state_dict[k], v * factors.get(k, 1)), k
    assert len(factors) == 2 * len(attentions(model))
    zero = zeroed(model, layer)
    assert not any(p.any() for p in zero.values())
    for k, p in model.named_parameters():
        if '.se.' in k and k not in zero and p.ndim > 1:
            assert p.std() > 0, k  # zero would never learn


@pytest.mark.parametrize(('base', 'layer'), [*(('resnet18', layer) for layer in NEUTRAL), *FEW[1:]])
def test_training_leaves_the_neutral_point_in_the_first_step(plain, image, base, layer):
    model = load(f'{base}_{layer}', plain(base).state_dict(), num_classes=3).train()
    inputs, outputs = {}, {}

    def keep(module, args, output):
        inputs.setdefault(module, args[0].detach().clone())
        outputs.setdefault(module, output.detach().clone())

    for m in attentions(model).values():
        m.register_forward_hook(keep)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image), torch.tensor([0, 2, 1, 2])).backward()
        optimizer.step()

    step()
    for k, p in zeroed(model, layer).items():
        assert p.any(), k
    with torch.no_grad():
        for k, m in attentions(model).items():
            assert not torch.equal(m(inputs[m]), outputs[m]), k
    step()
    for k, p in model.named_parameters():
        # behind a weight of zero the first gradient is the second step's; a bias before a norm or softmax never has one
        if '.se.' in k and p.ndim > 1:
            assert p.grad.any(), k


@pytest.mark.parametrize('kwargs', [{}, {'out_indices': (2, 4), 'feature_cls': 'fx'}], ids=['all', 'fx'])
@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_features_are_the_plain_models(plain, image, base, layer, kwargs):
    state_dict = plain(base).state_dict()
    source, model = (
        load(name, state_dict, features_only=True, **kwargs).eval() for name in (base, f'{base}_{layer}'))
    for got, want in zip(model(image), source(image), strict=True):
        assert_same(got, want, exact=base in BEFORE, times=5)


def write_safetensors(folder, state_dict):
    save_file(state_dict, folder / 'plain.safetensors')
    return folder / 'plain.safetensors'


def write_pth(folder, state_dict):
    torch.save(state_dict, folder / 'plain.pth')
    return folder / 'plain.pth'


def write_training_checkpoint(folder, state_dict):
    state_dict = {f'module.{k}': v for k, v in state_dict.items()}  # as DistributedDataParallel writes them
    torch.save({'epoch': 3, 'arch': 'plain', 'state_dict': state_dict}, folder / 'last.pth.tar')
    return folder / 'last.pth.tar'


def write_lightning_checkpoint(folder, state_dict):
    state_dict = {f'model.{k}': v for k, v in state_dict.items()}  # a module that calls its network `model`
    torch.save({'epoch': 3, 'state_dict': state_dict}, folder / 'last.ckpt')
    return folder / 'last.ckpt'


@pytest.mark.parametrize(('base', 'layer'), FEW[::2])
@pytest.mark.parametrize(
    'write', [write_safetensors, write_pth, write_training_checkpoint, write_lightning_checkpoint])
def test_plain_weights_load_from_a_file(plain, image, tmp_path, base, layer, write):
    source = plain(base)
    file = str(write(tmp_path, source.state_dict()))
    model = timm.create_model(f'{base}_{layer}', pretrained=True, pretrained_cfg_overlay={'file': file})
    assert_same_logits(model, source, image, exact=base in BEFORE)


@pytest.mark.parametrize(('base', 'layer'), FEW[::2])
def test_plain_weights_load_from_a_folder(plain, image, tmp_path, base, layer):
    source = plain(base, num_classes=7)
    save_file(source.state_dict(), tmp_path / 'model.safetensors')
    cfg = {k: source.pretrained_cfg[k] for k in ('input_size', 'first_conv', 'classifier')}
    (tmp_path / 'config.json').write_text(json.dumps({
        'architecture': f'{base}_{layer}', 'num_classes': 7, 'pretrained_cfg': {**cfg, 'num_classes': 7}}))
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    with torch.no_grad():
        assert_same(model.eval()(image), source(image), exact=base in BEFORE, times=5)


@pytest.mark.parametrize(('base', 'layer'), FEW)
def test_another_number_of_classes_gets_a_new_head_on_the_same_features(plain, image, base, layer):
    source = plain(base)
    model = load(f'{base}_{layer}', source.state_dict(), num_classes=7).eval()
    with torch.no_grad():
        assert_same(model.forward_features(image), source.forward_features(image), exact=base in BEFORE, times=5)
    assert model(image).shape == (4, 7)
    headless = load(f'{base}_{layer}', source.state_dict(), num_classes=0)
    assert headless(image).shape == (4, source.num_features)


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


def test_an_old_checkpoint_without_num_batches_tracked_loads(plain, image):
    source = plain('resnet18')
    old = OrderedDict((k, v) for k, v in source.state_dict().items() if not k.endswith('num_batches_tracked'))
    old._metadata = source.state_dict()._metadata
    assert_same_logits(load('resnet18_ca', old), source, image, exact=True)
