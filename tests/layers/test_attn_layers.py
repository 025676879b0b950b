"""ELA and the layers that it is compared with compute their papers' formulas, forward and every gradient."""
import copy
import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from timm_ela import ATTN_LAYERS

# The papers' formulas. x (N, C, H, W); p: the layer's parameters and buffers, by their names in timm.


def ela(x, p, training, groups=16):
    groups = math.gcd(groups, x.shape[1])

    def gate(z):  # (N, C, L): one convolution and one group norm for both strips
        n, c, length = z.shape
        width, kernel = p['conv.weight'].shape[1:]
        z = F.pad(z, (kernel // 2, kernel // 2)).unfold(2, kernel, 1).reshape(n, -1, width, length, kernel)
        z = torch.einsum('ngilk,goik->ngol', z, p['conv.weight'].reshape(-1, width, width, kernel))
        z = z.reshape(n, groups, -1)
        z = (z - z.mean(2, keepdim=True)) / (z.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        z = z.reshape(n, c, length) * p['gn.weight'][:, None] + p['gn.bias'][:, None]
        return 1 / (1 + (-z).exp())
    return x * gate(x.mean(3))[:, :, :, None] * gate(x.mean(2))[:, :, None, :]


def linear(z, p, name):  # a 1x1 convolution over (N, C, L)
    z = torch.einsum('ncl,oc->nol', z, p[f'{name}.weight'].flatten(1))
    return z + p[f'{name}.bias'][:, None] if f'{name}.bias' in p else z


def batch_norm(z, p, name, training):  # (N, C, L)
    mean, var = p[f'{name}.running_mean'], p[f'{name}.running_var']
    if training:
        mean, var = z.mean((0, 2)), z.var((0, 2), unbiased=False)
    z = (z - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    return z * p[f'{name}.weight'][:, None] + p[f'{name}.bias'][:, None]


def ca(x, p, training):
    f = linear(torch.cat([x.mean(3), x.mean(2)], 2), p, 'conv1')
    f = batch_norm(f, p, 'bn1', training)
    f = f * (f + 3).clamp(0, 6) / 6  # h-swish
    g_h, g_w = linear(f[:, :, :x.shape[2]], p, 'conv_h'), linear(f[:, :, x.shape[2]:], p, 'conv_w')
    return x * torch.sigmoid(g_h)[:, :, :, None] * torch.sigmoid(g_w)[:, :, None, :]


def eca(x, p, training):
    w = p['conv.weight'].flatten()
    y = F.pad(x.mean((2, 3)), (len(w) // 2, len(w) // 2)).unfold(1, len(w), 1)  # k neighbouring channels
    return x * torch.sigmoid(y @ w)[:, :, None, None]


def se(x, p, training):
    s = torch.sigmoid(linear(linear(x.mean((2, 3))[:, :, None], p, 'fc1').clamp(min=0), p, 'fc2'))
    return x * s[:, :, :, None]


def cbam(x, p, training):
    def mlp(z):
        return linear(linear(z[:, :, None], p, 'channel.fc1').clamp(min=0), p, 'channel.fc2')
    x = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.flatten(2).max(2)[0]))[:, :, :, None]
    pools = torch.stack([x.mean(1), x.max(1)[0]], 1)
    m = F.unfold(pools, 7, padding=3).transpose(1, 2) @ p['spatial.conv.conv.weight'].flatten()
    m = batch_norm(m[:, None], p, 'spatial.conv.bn', training)
    return x * torch.sigmoid(m).reshape(len(x), 1, *x.shape[2:])


def gc(x, p, training):
    n, c, height, width = x.shape
    z = x.flatten(2)  # (N, C, HW)
    weights = (linear(z, p, 'conv_attn')).softmax(2)  # (N, 1, HW)
    context = linear((z * weights).sum(2, keepdim=True), p, 'mlp_add.fc1')  # (N, C / 16, 1)
    context = (context - context.mean(1, keepdim=True)) / (context.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    context = context * p['mlp_add.norm.weight'][:, None] + p['mlp_add.norm.bias'][:, None]
    return x + linear(context.clamp(min=0), p, 'mlp_add.fc2')[:, :, :, None]


FORMULAS = {
    'ela_t': partial(ela, groups=32), 'ela_b': ela, 'ela_s': ela, 'ela_l': ela,
    'ca': ca, 'eca': eca, 'se': se, 'cbam': cbam, 'gc': gc,
}


def parameters(name: str, c: int) -> int:
    """Parameters of a layer on c channels, from the papers."""
    if name.startswith('ela'):
        kernel, group = {'t': (5, 1), 'b': (7, 1), 's': (5, 8), 'l': (7, 8)}[name[-1]]
        return c * group * kernel + 2 * c
    if name == 'eca':  # the odd number nearest to log2(C) / 2 + 1 / 2; of two, the greater, as in the authors' code
        return min(range(3, 11, 2), key=lambda k: (abs(k - (math.log2(c) + 1) / 2), -k))
    r = max(8, c // 32) if name == 'ca' else c // 16
    return {
        'ca': c * r + r + 2 * r + 2 * (r * c + c),
        'se': 2 * c * r + r + c,
        'cbam': 2 * c * r + 2 * 7 * 7 + 2,
        'gc': c + 1 + 2 * c * r + r + c + 2 * r,
    }[name]


# A bias before a batch norm (in training) or a softmax changes nothing.
WITHOUT_GRADIENT = {('ca', 'conv1.bias'), ('gc', 'conv_attn.bias')}


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


@pytest.mark.parametrize('name', FORMULAS)
def test_both_memory_formats_give_the_same_and_keep_theirs(make, name):
    layer, x = make(name).eval(), torch.randn(2, 48, 6, 11)
    y, last = layer(x), layer(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, y)
    assert y.is_contiguous() and last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('name', FORMULAS)
def test_under_autocast_the_output_is_near_the_formula_in_float64(make, name):
    layer, x = make(name).eval(), torch.randn(2, 48, 6, 11)
    p = {k: v.double() for k, v in layer.state_dict().items()}
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        y = layer(x.clone())
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
    (y * torch.randn_like(y)).sum().backward()
    moved = [k for k in neutral.zeroed if layer.get_parameter(k).grad.any()]
    assert moved
    with torch.no_grad():
        for p in layer.parameters():
            p -= p.grad if p.grad is not None else 0
    assert not torch.equal(layer(x) * neutral.factor, x)


def test_a_layer_without_a_neutral_point_says_why_in_one_line():
    for layer in ATTN_LAYERS.values():
        assert bool(layer.neutral) != bool(layer.no_weights) and '\n' not in layer.no_weights


@pytest.mark.parametrize('name', FORMULAS)
def test_a_paper_is_cited_in_full(name):
    layer = ATTN_LAYERS[name]
    assert layer.suffix == name and layer.tag == name.partition('_')[0] and layer.title
    assert re.fullmatch(r'https://arxiv\.org/abs/\d{4}\.\d{4,5}', layer.paper.url)
    fields = dict(re.findall(r'^  (\w+) += \{(.+)\},?$', layer.paper.bibtex, re.MULTILINE))
    assert fields.keys() == {'title', 'author', 'journal', 'year'} and layer.paper.arxiv in fields['journal']
    assert layer.paper.bibtex.startswith('@article{') and layer.paper.bibtex.count('{') == layer.paper.bibtex.count('}')


def test_no_two_papers_have_the_same_key():
    papers = {layer.paper for layer in ATTN_LAYERS.values()}
    assert len({paper.bibtex.partition(',')[0] for paper in papers}) == len(papers)


def exported(layer, x):
    sizes = {0: torch.export.Dim('n'), 2: torch.export.Dim('h', min=2), 3: torch.export.Dim('w', min=2)}
    return torch.export.export(layer, (x,), dynamic_shapes=(sizes,)).module()


WAYS = {
    'compiled': lambda layer, x: torch.compile(layer, backend='eager', fullgraph=True),
    'exported': exported,
    'scripted': lambda layer, x: torch.jit.script(layer),
    'symbolically_traced': lambda layer, x: torch.fx.symbolic_trace(layer),
    'copied': lambda layer, x: copy.deepcopy(layer),
}


@pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning', 'ignore:.torch.jit:FutureWarning')
@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', [name for name in FORMULAS if not name.startswith('ela')])  # ELA's: test_ela.py
def test_transformed_layers_compute_the_same_at_other_sizes_too(make, name, way):
    torch._dynamo.reset()
    layer = make(name).eval()
    other = WAYS[way](layer, torch.randn(2, 48, 6, 11))
    for shape in ((2, 48, 6, 11), (3, 48, 9, 4)):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize('name', FORMULAS)
def test_onnxruntime_computes_the_same(make, name, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    layer, x = make(name).eval(), torch.randn(2, 48, 6, 11)
    torch.onnx.export(layer, (x,), tmp_path / 'layer.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'layer.onnx', providers=['CPUExecutionProvider'])
    y, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x).detach(), rtol=1e-4, atol=1e-4)
