"""ELA and the layers that it is compared with compute their papers' formulas, forward and every gradient."""
import itertools
import math
import re

import pytest
import torch
from formulas import FORMULAS, parameters
from helpers import DEVICE, WAYS, in_onnxruntime, on_cpu
from torch import nn

from timm_ela import ATTN_LAYERS

# A bias before a batch norm (in training) or a softmax changes nothing.
WITHOUT_GRADIENT = {('ca', 'conv1.bias'), ('gc', 'conv_attn.bias')}
# Whose transforms and exports are asked for: the others are timm's modules, and ELA-T and L differ in sizes alone.
OURS = ('ela_b', 'ela_s', 'triplet', 'sa', 'sp')


def test_each_layer_has_its_formula():
    assert FORMULAS.keys() == ATTN_LAYERS.keys()


@pytest.fixture
def make(randomize):
    def make(name, channels=48, **kwargs):
        return randomize(ATTN_LAYERS[name].create(channels, act_layer=nn.ReLU6, **kwargs))

    return make


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', [(5, 9), (1, 7), (6, 2)], ids=str)
@pytest.mark.parametrize('name', FORMULAS)
def test_forward_and_gradients_are_the_papers(make, name, size, training):
    layer = make(name, dtype=torch.float64).train(training)
    p = {k: v.clone() for k, v in layer.state_dict().items()}
    p |= {k: v.detach().clone().requires_grad_() for k, v in layer.named_parameters()}
    x, upstream = torch.randn(2, 3, 48, *size, dtype=torch.float64)
    x.requires_grad_()
    y, want = layer(x), FORMULAS[name](x, p, training)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-11)
    names = [k for k, _ in layer.named_parameters()]
    got = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    expected = torch.autograd.grad(want, [x, *(p[k] for k in names)], upstream)
    for k, a, b in zip(['x', *names], got, expected, strict=True):
        if (name, k) not in WITHOUT_GRADIENT:
            assert b.abs().max() > 1e-4, k  # a gradient that vanishes would equal any other that does
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m, k=k: f'{k}: {m}')


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('name', FORMULAS)
def test_small_maps_and_batches_give_the_formula_in_the_memory_format_of_the_input(make, name, memory_format):
    channels = 256 if name == 'sa' else 64  # at 256, its groups hold four channels
    layer = make(name, channels, dtype=torch.float64).eval()
    for n, size in itertools.product((1, 2), ((1, 1), (1, 5), (5, 1), (2, 3))):
        x = torch.randn(n, channels, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
        y, want = layer(x), FORMULAS[name](x, layer.state_dict(), training=False)
        torch.testing.assert_close(y, want, rtol=0, atol=1e-11)
        if name != 'sa':  # a shuffle by reshaping gives contiguous maps
            assert y.is_contiguous(memory_format=memory_format)
        upstream = torch.randn_like(y)
        torch.testing.assert_close(
            *(torch.autograd.grad(t, x, upstream) for t in (y, want)), rtol=0, atol=1e-10, msg=f'{n, size}')


@pytest.mark.parametrize('name', FORMULAS)
def test_in_channels_last_gradients_have_the_strides_of_their_parameters(make, name):
    """Otherwise DistributedDataParallel warns and copies."""
    layer = make(name, channels=256).to(memory_format=torch.channels_last)
    for n in (1, 2):
        layer.zero_grad()
        layer(torch.randn(n, 256, 5, 7).to(memory_format=torch.channels_last)).square().mean().backward()
        assert {k: p.grad.stride() for k, p in layer.named_parameters()} == {
            k: p.stride() for k, p in layer.named_parameters()}


@pytest.mark.parametrize('name', FORMULAS)
def test_under_autocast_the_output_is_near_the_formula_in_float64(make, name):
    layer, x = make(name).eval(), torch.randn(2, 48, 6, 11)
    p = {k: v.double() for k, v in layer.state_dict().items()}
    with torch.autocast(DEVICE, torch.bfloat16), torch.no_grad():
        y = layer(x.clone())  # ELA's rows gate in place
    torch.testing.assert_close(y.double(), FORMULAS[name](x.double(), p, False), rtol=0.1, atol=0.1)


@pytest.mark.parametrize('channels', [48, 64, 96, 144, 960])
@pytest.mark.parametrize('name', FORMULAS)
def test_parameters_are_counted_by_hand(name, channels):
    layer = ATTN_LAYERS[name].create(channels, device='meta', dtype=torch.bfloat16)
    assert sum(p.numel() for p in layer.parameters()) == parameters(name, channels)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {('meta', torch.bfloat16)}


@pytest.mark.parametrize('name', [name for name, layer in ATTN_LAYERS.items() if layer.neutral])
@pytest.mark.parametrize('training', [True, False])
def test_at_its_neutral_point_a_layer_divides_by_its_factor_and_gradients_leave_it(make, name, training):
    layer, neutral, x = make(name).train(training), ATTN_LAYERS[name].neutral, torch.randn(3, 48, 6, 11)
    with torch.no_grad():
        for k in neutral.zeroed:
            layer.get_parameter(k).zero_()
    y = layer(x)
    assert torch.equal(y * neutral.factor, x) and math.log2(neutral.factor).is_integer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (layer(x) * torch.randn_like(y)).sum().backward()
        assert all(layer.get_parameter(k).grad.any() for k in neutral.zeroed)
        optimizer.step()
    for k, p in layer.named_parameters():
        # behind a weight of zero, the first gradient is the second step's
        assert p.grad.any() or (name, k) in WITHOUT_GRADIENT, k


@pytest.mark.parametrize('name', FORMULAS)
def test_a_paper_is_cited_in_full(name):
    layer = ATTN_LAYERS[name]
    assert re.fullmatch(r'https://arxiv\.org/abs/\d{4}\.\d{4,5}', layer.paper.url)
    fields = dict(re.findall(r'^  (\w+) += \{(.+)\},?$', layer.paper.bibtex, re.MULTILINE))
    assert fields.keys() == {'title', 'author', 'journal', 'year'} and layer.paper.arxiv in fields['journal']
    assert layer.paper.bibtex.startswith('@article{') and layer.paper.bibtex.count('{') == layer.paper.bibtex.count('}')


def test_no_two_papers_have_the_same_key():
    papers = {layer.paper for layer in ATTN_LAYERS.values()}
    assert len({paper.bibtex.partition(',')[0] for paper in papers}) == len(papers)


def test_the_sizes_of_the_rivals_are_checked():
    assert [ATTN_LAYERS['sa'].create(c).groups for c in (128, 144, 96, 64, 1024)] == [64, 36, 48, 32, 64]
    with pytest.raises(ValueError, match='even number of them, got 15'):
        ATTN_LAYERS['sa'].create(15)


def norm(name, width):
    sizes = {'weight': (width,), 'bias': (width,), 'running_mean': (width,), 'running_var': (width,)}
    return {f'{name}.{k}': size for k, size in (sizes | {'num_batches_tracked': ()}).items()}


AUTHORS = {  # parameters and buffers of the authors' modules of 256 channels
    'triplet': {k: v for branch in ('cw', 'hc', 'hw') for k, v in (
        {f'{branch}.conv.conv.weight': (1, 2, 7, 7)} | norm(f'{branch}.conv.bn', 1)).items()},
    'sa': {**dict.fromkeys(('cweight', 'cbias', 'sweight', 'sbias'), (1, 2, 1, 1)),
           'gn.weight': (2,), 'gn.bias': (2,)},
    'sp': {'conv1.weight': (256, 256, 3, 1), 'conv2.weight': (256, 256, 1, 3), 'conv3.weight': (256, 256, 1, 1),
           'conv3.bias': (256,), **norm('bn1', 256), **norm('bn2', 256)},
}


@pytest.mark.parametrize('name', AUTHORS)
def test_weights_of_the_authors_modules_load(name):
    weights = {k: torch.randn(shape) if shape else torch.tensor(1) for k, shape in AUTHORS[name].items()}
    layer = ATTN_LAYERS[name].create(256)
    layer.load_state_dict(weights)
    for k, v in layer.state_dict().items():
        assert torch.equal(v.view_as(weights[k]), weights[k])


@pytest.mark.parametrize('name', FORMULAS)
def test_a_state_dict_holds_each_weight_in_its_own_shape(name):
    """transformers, accelerate and FSDP compare the two."""
    layer = ATTN_LAYERS[name].create(256)
    shapes = {k: v.shape for k, v in itertools.chain(layer.named_parameters(), layer.named_buffers())}
    assert {k: v.shape for k, v in layer.state_dict().items()} == shapes


@pytest.mark.parametrize('name', FORMULAS)
def test_each_part_resets_its_own_weights(name):
    """FSDP makes a layer on the meta device, and calls reset_parameters of each module that holds weights."""
    layer = ATTN_LAYERS[name].create(256, device='meta').to_empty(device=DEVICE)
    for v in layer.state_dict().values():
        v.fill_(-9)
    for module in reversed([*layer.modules()]):
        if hasattr(module, 'reset_parameters') or next(module.parameters(recurse=False), None) is not None:
            module.reset_parameters()
    new, other = (ATTN_LAYERS[name].create(256).state_dict() for _ in range(2))
    for k, v in layer.state_dict().items():
        assert torch.equal(v, new[k]) if torch.equal(new[k], other[k]) else v.abs().max() < 9, k


@pytest.mark.filterwarnings(
    'ignore:.torch.jit:DeprecationWarning', 'ignore:.torch.jit:FutureWarning', 'ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', OURS)
def test_transformed_layers_compute_the_same_at_other_sizes_too(make, name, way):
    layer = make(name).eval()
    # in eager mode, ELA takes both strips of a square map at once
    other = WAYS[way](layer, torch.randn(2, 48, 8, 8))
    for shape, recorded in itertools.product(((2, 48, 6, 11), (3, 48, 9, 4), (1, 48, 5, 5)), (False, True)):
        x = torch.randn(shape)
        with torch.set_grad_enabled(recorded):
            torch.testing.assert_close(other(x.clone()), layer(x))  # ELA's rows gate in place


@pytest.mark.parametrize('name', FORMULAS)
def test_an_export_has_no_operator_that_phones_lack(make, name):
    layer, x = make(name).eval(), torch.randn(1, 48, 6, 11)
    program = torch.export.export(layer, (x,))
    calls = [n for n in program.graph.nodes if n.op == 'call_function']
    assert not [n for n in calls if 'movedim' in n.target.__name__]  # CoreML has none, nor a rank above 5
    assert all(v.ndim <= 5 for n in calls for v in [n.meta.get('val')] if isinstance(v, torch.Tensor))
    torch.testing.assert_close(program.module()(x), layer(x.clone()))


@on_cpu
@pytest.mark.parametrize('name', OURS)
def test_onnxruntime_computes_the_same(make, name):
    layer, x = make(name).eval(), torch.randn(2, 48, 6, 11)
    torch.testing.assert_close(in_onnxruntime(layer, x), layer(x).detach(), rtol=1e-4, atol=1e-4)
