"""Weights of a plain timm model, loaded into its ELA model, compute what they did before, to the bit."""
import dataclasses
import json
import logging
from collections import OrderedDict

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import nn

from timm_ela import EfficientLocalAttention
from timm_ela.graft import graft_cfgs, graft_state_dict

RESNETS = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152')
MOBILENETS = ('mobilenetv2_050', 'mobilenetv2_100', 'mobilenetv2_110d', 'mobilenetv2_120d', 'mobilenetv2_140')
FEW = ('resnet18', 'resnet50', 'mobilenetv2_050')  # the three kinds of block
BACKBONES = [(base, 'tbsl'[i % 4]) for i, base in enumerate(RESNETS + MOBILENETS)]
VARIANTS = [(base, variant) for base in (FEW[0], FEW[2]) for variant in 'tbsl']
SCALED = {  # what follows ELA, or feeds it, in the blocks that have it
    'resnet18': ('bn2.weight', 'bn2.bias'),
    'resnet50': ('conv3.weight',),
    'mobilenetv2_050': ('conv_pwl.weight',),
}


def ela_name(base, variant='b'):
    return f'{base.removesuffix("_100")}_ela_{variant}'


def attentions(model):
    return {k: m for k, m in model.named_modules() if isinstance(m, EfficientLocalAttention)}


def load(name, state_dict, **kwargs):
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict}, **kwargs)


def skeleton(name):
    return timm.create_model(name, device='meta').state_dict()


@pytest.fixture
def plain(randomize):
    """Makes a plain model whose every weight matters: as if trained, where a fresh ResNet hides its blocks."""
    return lambda base, **kwargs: randomize(timm.create_model(base, **kwargs)).eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 48)


def assert_same_logits(model, plain, *images):
    plain.eval()
    model.eval()
    with torch.no_grad():
        for x in images:
            logits = plain(x)
            assert logits.isfinite().all() and (logits[0] - logits[1]).abs().max() > 1e-3
            assert torch.equal(model(x), logits)


@pytest.mark.parametrize(('base', 'variant'), sorted({*BACKBONES, *VARIANTS}))
def test_logits_equal_the_plain_models_to_the_bit(plain, image, base, variant):
    source = plain(base)
    model = load(ela_name(base, variant), source.state_dict())
    assert_same_logits(model, source, image, image.to(memory_format=torch.channels_last))


@pytest.mark.parametrize('kwargs', [
    {'output_stride': 8}, {'global_pool': 'avgmax'}, {'act_layer': 'silu'}, {'in_chans': 1}], ids=str)
@pytest.mark.parametrize('base', FEW)
def test_logits_are_equal_with_the_options_of_timm(plain, image, base, kwargs):
    if kwargs == {'global_pool': 'avgmax'}:
        kwargs = {**kwargs, 'num_classes': 1000}
    state_dict = plain(base).state_dict()
    source, model = (load(name, state_dict, **kwargs) for name in (base, ela_name(base)))
    assert_same_logits(model, source, image[:, :kwargs.get('in_chans', 3)])


@pytest.mark.parametrize('base', FEW)
def test_logits_are_equal_in_half_precision_and_from_half_precision_files(plain, image, base):
    state_dict = {k: v.half() if v.is_floating_point() else v for k, v in plain(base).state_dict().items()}
    source, model = load(base, state_dict), load(ela_name(base), state_dict)
    assert_same_logits(model, source, image)
    with torch.autocast('cpu', torch.bfloat16):
        assert_same_logits(model, source, image)
    assert_same_logits(model.bfloat16(), source.bfloat16(), image.bfloat16())


@pytest.mark.parametrize('base', FEW)
def test_only_what_follows_the_gates_is_scaled_and_by_four(plain, base):
    source = plain(base).state_dict()
    before = {k: v.clone() for k, v in source.items()}
    model = timm.create_model(ela_name(base))
    model.load_state_dict(graft_state_dict(source, model))  # not through timm's loader, which copies what it is given
    scaled = {f'{k.removesuffix("se")}{weight}' for k in attentions(model) for weight in SCALED[base]}
    state_dict = model.state_dict()
    for k, v in before.items():
        assert torch.equal(state_dict[k], v * 4 if k in scaled else v), k
        assert torch.equal(source[k], v)  # what the caller holds stays as it was
    assert len(scaled) == len(attentions(model)) * len(SCALED[base])
    for m in attentions(model).values():
        assert not m.gn.weight.any() and not m.gn.bias.any()
        assert m.conv.weight.std() > 0  # zero would never learn


@pytest.mark.parametrize('kwargs', [{}, {'drop_path_rate': 0.4, 'drop_rate': 0.3}], ids=['plain', 'drop'])
@pytest.mark.parametrize('base', FEW)
def test_a_training_step_is_the_plain_models_in_logits_buffers_and_gradients(plain, image, base, kwargs):
    state_dict = plain(base).state_dict()
    source, model = (load(name, state_dict, **kwargs).train() for name in (base, ela_name(base)))
    logits = []
    for net in (source, model):
        torch.manual_seed(1)
        logits.append(net(image))
        nn.functional.cross_entropy(logits[-1], torch.tensor([3, 5])).backward()
    assert torch.equal(*logits)
    buffers = dict(model.named_buffers())
    for k, v in source.named_buffers():
        assert torch.equal(buffers[k], v), k
        assert not torch.equal(v, state_dict[k]), k
    scaled = {f'{k.removesuffix("se")}{weight}' for k in attentions(model) for weight in SCALED[base]}
    params = dict(model.named_parameters())
    for k, p in source.named_parameters():
        assert torch.equal(params[k].grad * 4 if k in scaled else params[k].grad, p.grad), k


@pytest.mark.parametrize('kwargs', [{}, {'out_indices': (2, 4)}], ids=['all', 'some'])
@pytest.mark.parametrize('base', FEW)
def test_features_are_the_plain_models(plain, image, base, kwargs):
    state_dict = plain(base).state_dict()
    source, model = (
        load(name, state_dict, features_only=True, **kwargs).eval() for name in (base, ela_name(base, 's')))
    assert attentions(model)
    for got, want in zip(model(image), source(image), strict=True):
        assert want.std() > 0 and torch.equal(got, want)


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


@pytest.mark.parametrize('base', FEW[::2])
@pytest.mark.parametrize('write', [write_safetensors, write_pth, write_training_checkpoint])
def test_plain_weights_load_from_a_file(plain, image, tmp_path, base, write):
    source = plain(base)
    file = str(write(tmp_path, source.state_dict()))
    model = timm.create_model(ela_name(base), pretrained=True, pretrained_cfg_overlay={'file': file})
    assert_same_logits(model, source, image)


@pytest.mark.parametrize('base', FEW[::2])
def test_plain_weights_load_from_a_folder(plain, image, tmp_path, base):
    source = plain(base, num_classes=7)
    save_file(source.state_dict(), tmp_path / 'model.safetensors')
    cfg = {k: source.pretrained_cfg[k] for k in ('input_size', 'first_conv', 'classifier')}
    (tmp_path / 'config.json').write_text(json.dumps({
        'architecture': ela_name(base), 'num_classes': 7, 'pretrained_cfg': {**cfg, 'num_classes': 7}}))
    assert_same_logits(timm.create_model(f'local-dir:{tmp_path}', pretrained=True), source, image)


@pytest.mark.parametrize('base', FEW)
def test_another_number_of_classes_gets_a_new_head_on_the_same_features(plain, image, base):
    source = plain(base)
    model = load(ela_name(base), source.state_dict(), num_classes=7).eval()
    assert torch.equal(model.forward_features(image), source.forward_features(image))
    assert model(image).shape == (2, 7)
    assert load(ela_name(base), source.state_dict(), num_classes=0)(image).shape == (2, source.num_features)


@pytest.mark.parametrize('num_classes', [1000, 7])
@pytest.mark.parametrize('base', FEW)
def test_a_complete_ela_checkpoint_passes_untouched_and_in_silence(plain, image, caplog, base, num_classes):
    source = plain(ela_name(base, 'l'))
    state_dict = source.state_dict()
    assert graft_state_dict(state_dict, source) is state_dict
    model = load(ela_name(base, 'l'), dict(state_dict), num_classes=num_classes).eval()
    assert torch.equal(model.forward_features(image), source.forward_features(image))
    assert not [r for r in caplog.records if r.name.startswith('timm_ela') or r.levelno >= logging.WARNING]


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}, {'features_only': True}], ids=str)
@pytest.mark.parametrize('base', FEW)
def test_a_graft_is_said_in_one_line_once(plain, caplog, base, kwargs):
    load(ela_name(base), plain(base).state_dict(), **kwargs)
    record, = (r for r in caplog.records if r.name.startswith('timm_ela'))
    assert record.levelno == logging.WARNING
    assert ela_name(base) in record.getMessage() and '\n' not in record.getMessage()


WAYS_TO_LOAD = pytest.mark.parametrize(
    'kwargs', [{'num_classes': 1000}, {'num_classes': 7}, {'features_only': True}], ids=str)


@WAYS_TO_LOAD
@pytest.mark.parametrize(('name', 'pattern', 'lacks', 'first'), [
    ('resnet18_ela_b', 'layer2.', '6 of 24', 'layer2.0.se.conv.weight'),
    ('resnet50_ela_t', 'layer4.2.se.gn.bias', '1 of 48', 'layer4.2.se.gn.bias'),
    ('mobilenetv2_050_ela_s', '.gn.', '32 of 48', 'blocks.1.0.se.gn.weight'),
])
def test_a_checkpoint_with_some_of_the_ela_weights_is_refused(name, pattern, lacks, first, kwargs):
    state_dict = {k: v for k, v in skeleton(name).items() if not ('.se.' in k and pattern in k)}
    with pytest.raises(RuntimeError, match=f'{name} lacks {lacks} ELA weights, first {first!r}'):
        load(name, state_dict, device='meta', **kwargs)


@WAYS_TO_LOAD
@pytest.mark.parametrize(('name', 'other', 'reason'), [
    ('resnet18_ela_b', 'resnet34', "foreign 96 weights, first 'layer1.2.conv1.weight'"),
    ('resnet34_ela_b', 'resnet18', "lacks 80 weights, first 'layer1.2.conv1.weight'"),
    ('resnet50_ela_b', 'resnet101', "foreign 306 weights, first 'layer3.6.conv1.weight'"),
    ('resnet50_ela_b', 'wide_resnet50_2', "'layer1.0.conv1.weight' is (128, 64, 1, 1) in the checkpoint"),
    ('resnet50_ela_b', 'resnet50d', "lacks 16 weights, first 'layer1.0.downsample.0.weight'"),
    ('resnet50_ela_b', 'seresnet50', "'layer1.0.se.fc1.weight'"),
    ('resnet50_ela_b', 'resnet18', 'lacks'),
    ('mobilenetv2_050_ela_b', 'mobilenetv2_100', "'bn1.weight' is (32,) in the checkpoint and (16,) in the model"),
    ('mobilenetv2_ela_b', 'mobilenetv2_110d', 'foreign'),
    ('mobilenetv2_ela_b', 'resnet18', 'lacks'),
])
def test_a_checkpoint_of_another_architecture_is_refused(name, other, reason, kwargs):
    with pytest.raises(RuntimeError) as error:
        load(name, skeleton(other), device='meta', **kwargs)
    message = str(error.value)
    assert message.startswith(f'Cannot graft onto {name}: ') and '\n' not in message
    assert reason in message


def test_an_old_checkpoint_without_num_batches_tracked_loads(plain, image):
    source = plain('resnet18')
    old = OrderedDict((k, v) for k, v in source.state_dict().items() if not k.endswith('num_batches_tracked'))
    old._metadata = source.state_dict()._metadata
    assert_same_logits(load('resnet18_ela_b', old), source, image)


@pytest.mark.parametrize('variant', 'tbsl')
@pytest.mark.parametrize('base', RESNETS + MOBILENETS)
def test_every_tag_of_the_plain_model_has_its_graft_with_the_same_settings(base, variant):
    name = ela_name(base, variant)
    theirs, ours = get_arch_pretrained_cfgs(base), get_arch_pretrained_cfgs(name)
    assert list(ours) == [f'{name}.graft_{cfg.tag}' for cfg in theirs.values() if cfg.hf_hub_id] and ours
    for cfg in ours.values():
        plain_cfg = theirs[f'{base}.{cfg.tag.removeprefix("graft_")}']
        assert cfg.hf_hub_id == f'timm/{base}.{plain_cfg.tag}'
        same = [{k: v for k, v in dataclasses.asdict(c).items() if k not in ('architecture', 'tag', 'url')}
                for c in (cfg, plain_cfg)]
        assert same[0] == same[1]
        assert (cfg.architecture, cfg.url) == (name, None)
    assert get_pretrained_cfg(name).tag == f'graft_{get_pretrained_cfg(base).tag}'
    assert set(timm.list_pretrained(f'{name}.*')) == set(ours)
    assert timm.is_model_pretrained(name)


def test_a_plain_model_without_weights_on_the_hub_has_no_graft():
    assert get_arch_pretrained_cfgs('mobilenetv2_035')
    assert graft_cfgs('any', 'mobilenetv2_035') == {}


@pytest.mark.parametrize('base', FEW)
def test_training_moves_the_gates_in_the_first_step_and_the_convolutions_in_the_second(plain, image, base):
    model = load(ela_name(base), plain(base).state_dict(), num_classes=3).train()
    gates = attentions(model)
    start = {k: m.conv.weight.clone() for k, m in gates.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(image), torch.tensor([0, 2])).backward()
        optimizer.step()

    step()
    for k, m in gates.items():
        assert m.gn.weight.any() and m.gn.bias.any(), k
        assert torch.equal(m.conv.weight, start[k]), k  # behind a GroupNorm of weight zero there is no gradient yet
    step()
    for k, m in gates.items():
        assert not torch.equal(m.conv.weight, start[k]), k
