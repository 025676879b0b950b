"""ELSA against the authors' block: the formula is written out here with F.unfold."""
import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, FullSize, in_onnxruntime, on_cpu
from torch.autograd import gradcheck, gradgradcheck

from timm_ela.layers.elsa import EnhancedLocalSelfAttention, elsa, local_attention


def unfolded(v, attn, mul, add, kernel_size):
    """out[c, n] = sum over k of (mul[c, k] * attn[g(c), k, n] + add[c, k]) * v[c, n + k], all NHWC."""
    batch, height, width, channels = v.shape
    heads = attn.shape[3]
    values = F.unfold(v.permute(0, 3, 1, 2), kernel_size, padding=kernel_size // 2)
    values = values.reshape(batch, heads, channels // heads, kernel_size ** 2, height * width)
    weights = attn.reshape(batch, height * width, heads, 1, kernel_size ** 2).permute(0, 2, 3, 4, 1)
    if mul is not None:
        weights = weights * mul.reshape(heads, channels // heads, kernel_size ** 2, 1)
    if add is not None:
        weights = weights + add.reshape(heads, channels // heads, kernel_size ** 2, 1)
    return (values * weights).sum(3).reshape(batch, channels, height, width).permute(0, 2, 3, 1)


def authors_forward(m, x):
    """The authors' forward pass of a module with our parameters, stride 1."""
    y = F.conv2d(x.permute(0, 3, 1, 2), m.pre_proj.weight, m.pre_proj.bias)
    d = m.attn[0].weight.shape[0]
    q, k, v = y.split((d, d, y.shape[1] - 2 * d), 1)
    first, _, last = m.attn
    h = F.conv2d(q * k * m.scale, first.weight, first.bias, 1, first.padding, first.dilation, first.groups)
    h = F.conv2d(F.gelu(h), last.weight, last.bias)
    h = h.unflatten(1, (m.num_heads, -1)).softmax(2).permute(0, 3, 4, 1, 2)
    mul = add = None
    if m.lam and m.gamma:
        mul, add = m.ghost_head[0, 0] ** m.lam, m.ghost_head[1, 0] * m.gamma
    elif m.gamma:
        add = m.ghost_head[0] * m.gamma
    elif m.lam:
        mul = m.ghost_head[0] ** m.lam
    return m.post_proj(unfolded(v.permute(0, 2, 3, 1), h, mul, add, m.kernel_size))


def make_args(size, kernel_size=5, heads=3, width=4, dtype=torch.float64):
    shape = (heads * width, kernel_size, kernel_size)
    v = torch.randn(2, *size, heads * width, dtype=dtype)
    attn = torch.rand(2, *size, heads, kernel_size ** 2, dtype=dtype)
    return [t.requires_grad_() for t in (v, attn, torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype))]


@pytest.mark.parametrize('nchw', [False, True])
@pytest.mark.usefixtures('either_way')
@pytest.mark.parametrize('ghost', ['none', 'mul', 'add', 'both'])
@pytest.mark.parametrize('size', [(1, 1), (5, 1), (7, 7), (13, 6), (20, 31)])
def test_the_operator_and_its_gradients_are_the_formulas(size, ghost, nchw):
    v, attn, mul, add = make_args(size)
    mul, add = mul if ghost in ('mul', 'both') else None, add if ghost in ('add', 'both') else None
    inputs = [t for t in (v, attn, mul, add) if t is not None]
    passed = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) if nchw else v
    expected, out = unfolded(v, attn, mul, add, 5), elsa(passed, attn, mul, add, 5)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for grad, of_formula in zip(
            torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, of_formula, rtol=0, atol=1e-11)
    if add is None:
        torch.testing.assert_close(local_attention(v, attn, mul, 5), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('with_mul', [False, True])
def test_first_and_second_derivatives_are_those_of_the_operator(with_mul):
    v, attn, mul, add = make_args((2, 3), kernel_size=3, heads=2, width=2)
    args = (v[:1].detach().requires_grad_(), attn[:1].detach().requires_grad_(), mul if with_mul else None, add)

    def call(v, attn, mul, add):
        return elsa(v, attn, mul, add, 3)

    assert gradcheck(call, args) and gradgradcheck(call, args, fast_mode=True)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('with_mul', [False, True])
def test_low_precision_is_as_exact_as_the_formula_in_it(dtype, with_mul):
    v, attn, mul, add = (t.detach().to(dtype) for t in make_args((9, 12)))
    mul = mul if with_mul else None
    exact = unfolded(*(t if t is None else t.float() for t in (v, attn, mul, add)), 5)
    out = elsa(v, attn, mul, add, 5)
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= 2 * (unfolded(v, attn, mul, add, 5) - exact).abs().max()


@pytest.mark.parametrize('options', [
    {}, {'lam': 0}, {'gamma': 0}, {'lam': 0, 'gamma': 0}, {'lam': 2, 'gamma': 0.5},
    {'lam': 0, 'kernel_size': 7, 'qk_scale': 1, 'qkv_bias': True, 'group_width': 4},
], ids=str)
def test_the_module_is_the_authors(options):
    module = EnhancedLocalSelfAttention(24, 3, **options).double()
    x = torch.randn(2, 9, 12, 24, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    out, expected = module(x), authors_forward(module, x)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for grad, of_authors in zip(
            torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(grad, of_authors, rtol=0, atol=1e-11)


def test_parameters_have_the_authors_names_and_shapes():
    shapes = {k: tuple(v.shape) for k, v in EnhancedLocalSelfAttention(96, 3, qkv_bias=True).named_parameters()}
    assert shapes == {
        'ghost_head': (2, 1, 96, 5, 5), 'pre_proj.weight': (224, 96, 1, 1), 'pre_proj.bias': (224,),
        'attn.0.weight': (64, 8, 5, 5), 'attn.0.bias': (64,), 'attn.2.weight': (75, 64, 1, 1), 'attn.2.bias': (75,),
        'post_proj.weight': (96, 96), 'post_proj.bias': (96,)}
    assert EnhancedLocalSelfAttention(96, 3, 7, lam=0).ghost_head.shape == (1, 96, 7, 7)
    assert EnhancedLocalSelfAttention(128, 4).pre_proj.weight.shape[0] == 2 * 88 + 128  # 84 rounded up to 8s


@pytest.mark.parametrize('with_mul', [False, True])
def test_nothing_of_the_size_of_all_neighbourhoods_is_made_or_kept(with_mul):
    v, attn, mul, add = make_args((28, 21), kernel_size=7, heads=2, width=16, dtype=torch.float32)
    kept = []
    limit = FullSize(v.numel() * 49 // 4)
    with limit, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        elsa(v, attn, mul if with_mul else None, add, 7).sum().backward()
    assert not limit.count
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(storages.values()) < 4 * (v.nbytes + attn.nbytes)


@pytest.mark.parametrize('options', [{}, {'lam': 0}], ids=str)
def test_scripted_traced_transformed_and_cast_it_is_the_same(options):
    module, x = EnhancedLocalSelfAttention(24, 3, **options).eval(), torch.randn(2, 9, 12, 24)
    expected = module(x)
    graph = torch.fx.symbolic_trace(module)
    for called in (
            torch.jit.script(module), torch.jit.trace(module, x), graph, torch.jit.script(graph),
            torch.func.vmap(lambda image: module(image[None])[0])):
        torch.testing.assert_close(called(x), expected)
    tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))[1]
    step = (module.double()((x + 1e-5).double()) - module((x - 1e-5).double())) / 2e-5
    torch.testing.assert_close(tangent.double(), step, rtol=1e-3, atol=1e-3)
    module.float()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = module(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.05)


@on_cpu
@pytest.mark.parametrize(('options', 'nodes'), [({'kernel_size': 7, 'lam': 0}, 100), ({}, 300)], ids=str)
def test_exported_it_is_few_operations_and_runs_in_onnxruntime(options, nodes):
    module, x = EnhancedLocalSelfAttention(24, 3, **options).eval(), torch.randn(2, 9, 12, 24)
    program = torch.export.export(module, (x,))
    assert len(program.graph.nodes) < nodes
    torch.testing.assert_close(program.module()(x), module(x))
    torch.testing.assert_close(in_onnxruntime(module, x), module(x).detach(), rtol=1e-4, atol=1e-5)


def test_it_says_what_it_cannot_be():
    with pytest.raises(ValueError, match='positive odd kernel_size, got 4'):
        EnhancedLocalSelfAttention(24, 3, 4)
    with pytest.raises(ValueError, match='multiple of num_heads=5, got 24'):
        EnhancedLocalSelfAttention(24, 5)
    with pytest.raises(ValueError, match=r'integer lam, got 0\.5'):
        EnhancedLocalSelfAttention(24, 3, lam=0.5)


def test_dropout_is_of_the_attention_and_of_the_output():
    module, x = EnhancedLocalSelfAttention(24, 3, attn_drop=0.5, proj_drop=0.5), torch.randn(1, 6, 5, 24)
    assert not torch.equal(module(x), module(x))
    assert (module(x) == 0).float().mean() == pytest.approx(0.5, abs=0.15)
    module.eval()
    assert torch.equal(module(x), module(x))
