"""The path that costs less computes what the plain formula does, and keeps what it promises of memory."""
import copy

import pytest
import torch
from helpers import FullSize, run_python
from timm.layers import create_attn
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import timm_ela
from timm_ela import EfficientLocalAttention
from timm_ela.layers import ela_functional


@pytest.fixture
def plainly():
    """Calls with the fused path off, and on again after."""
    def plainly(f):
        timm_ela.set_fused(False)
        try:
            return f()
        finally:
            timm_ela.set_fused(True)

    return plainly


def forward_and_gradients(m, x, upstream):
    x = x.detach().requires_grad_()
    y = m(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *m.parameters()], upstream)]


def test_inference_allocates_the_output_and_nothing_else_of_its_size(make, memory_format):
    m, x = make(64), torch.randn(2, 64, 12, 20).to(memory_format=memory_format)
    with torch.no_grad(), FullSize(x.numel()) as full:
        m(x)
    assert len(full.storages) == 1


def test_training_saves_nothing_of_full_size_but_its_input(make, memory_format, plainly):
    m, x = make(64), torch.randn(2, 64, 12, 20).to(memory_format=memory_format).requires_grad_()

    def saved():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            m(x)
        return {t.untyped_storage().data_ptr() for t in kept if t.numel() >= x.numel()}

    assert saved() == {x.untyped_storage().data_ptr()}
    assert len(plainly(saved)) == 2  # the first product, too


def test_a_training_step_allocates_the_output_the_gradient_and_one_product(make, memory_format):
    m, x = make(64), torch.randn(2, 64, 12, 20).to(memory_format=memory_format).requires_grad_()
    upstream = torch.randn_like(x)
    with FullSize(x.numel()) as full:
        torch.autograd.grad(m(x), [x, *m.parameters()], upstream)
    assert len(full.storages) == 3


SIZES = [(1, 5), (5, 1), (7, 13), (13, 7), (1, 63), (63, 7), (25, 38), (9, 9)]


def check_exactness(m, x, upstream, plainly):
    """The output's error and each gradient's are at most twice the plain formula's in the same dtype."""
    exact = plainly(lambda: forward_and_gradients(copy.deepcopy(m).double(), x.double(), upstream.double()))
    plain = plainly(lambda: forward_and_gradients(m, x, upstream))
    for got, eager, want in zip(forward_and_gradients(m, x, upstream), plain, exact, strict=True):
        assert got.dtype == x.dtype
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (got, eager))
        assert error <= max(2 * allowed, 2e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('variant', ['b', 's'])
def test_output_and_gradients_are_as_exact_as_the_plain_formulas(make, plainly, variant, size, dtype, memory_format):
    x, upstream = (torch.randn(3, 48, *size).to(memory_format=memory_format, dtype=dtype) for _ in range(2))
    check_exactness(make(48, variant).to(dtype), x, upstream, plainly)


@pytest.mark.parametrize('variant', ['b', 'l'])
def test_strips_shorter_than_the_kernel_are_as_exact_too(make, plainly, variant, memory_format):
    x = torch.randn(2, 48, 2, 3).to(memory_format=memory_format)
    check_exactness(make(48, variant), x, torch.randn_like(x), plainly)


def test_small_gradients_in_half_precision_are_as_exact_as_the_plain_formulas(make, plainly, memory_format):
    x, upstream = (torch.randn(3, 48, 112, 112).to(memory_format=memory_format) for _ in range(2))
    check_exactness(make(48).half(), x.half(), (3e-4 * upstream).half(), plainly)  # their means would be subnormal


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('variant', ['b', 's'])
def test_under_autocast_the_gradients_are_as_exact_as_the_plain_formulas(make, plainly, variant, dtype, memory_format):
    m, (x, upstream) = make(48, variant), torch.randn(2, 3, 48, 7, 13).to(dtype)
    x, upstream = (t.to(memory_format=memory_format) for t in (x, upstream))

    def under_autocast():
        leaf = x.clone().requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            y = m(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *m.parameters()], upstream)]  # outside, as is usual

    exact = plainly(lambda: forward_and_gradients(m, x.float(), upstream.float()))
    for got, eager, want in zip(under_autocast(), plainly(under_autocast), exact, strict=True):
        assert got.dtype == eager.dtype
        error, allowed = ((t - want).norm() / want.norm() for t in (got, eager))
        assert error <= 2 * allowed


def test_gates_that_are_all_but_open_keep_the_bits_of_their_gradients(memory_format):
    x, upstream = torch.randn(2, 2, 16, 9, 12)
    x, upstream = (t.to(memory_format=memory_format).bfloat16() for t in (x, upstream))
    logits = [(torch.randn(2, 16, length) + 6).requires_grad_() for length in (9, 12)]  # CUDA's autocast: float32

    def plain(x, logits_h, logits_w):
        a_h, a_w = logits_h.sigmoid().to(x.dtype), logits_w.sigmoid().to(x.dtype)
        return x * a_h.unsqueeze(3) * a_w.unsqueeze(2)

    def gradients(gated, dtype, *inputs):
        return torch.autograd.grad(gated(x.to(dtype), *inputs), inputs, upstream.to(dtype))

    exact = gradients(plain, torch.float64, *(t.double() for t in logits))
    found = [gradients(gated, x.dtype, *logits) for gated in (ela_functional._Gate.apply, plain)]
    for got, eager, want in zip(*found, exact, strict=True):
        error, allowed = ((t - want).norm() / want.norm() for t in (got, eager))
        assert error <= 2 * allowed


def test_neither_the_input_nor_the_upstream_gradient_is_written_to(make, memory_format):
    m, x, upstream = make(32), *(torch.randn(2, 32, 6, 11).to(memory_format=memory_format) for _ in range(2))
    before = x.clone(), upstream.clone()
    y = m(x.requires_grad_())
    first = torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
    kept = first.clone()
    again = torch.autograd.grad(y, x, upstream)[0]
    assert torch.equal(x, before[0]) and torch.equal(upstream, before[1])
    assert torch.equal(first, kept) and torch.equal(again, kept)


def test_an_input_that_goes_elsewhere_too_gets_both_gradients(make, plainly):
    m, x = make(32), torch.randn(2, 32, 6, 11)

    def gradient():
        leaf = x.clone().requires_grad_()
        inner = leaf * 2
        inner.retain_grad()
        (m(inner) + inner.sigmoid()).square().sum().backward()
        return leaf.grad, inner.grad

    torch.testing.assert_close(gradient(), plainly(gradient))


@pytest.mark.parametrize('frozen', ['input', 'parameters'])
def test_what_needs_no_gradient_may_be_frozen(make, plainly, frozen):
    m, x = make(32), torch.randn(2, 32, 6, 11)
    for p in m.parameters():
        p.requires_grad_(frozen == 'input')
    x.requires_grad_(frozen == 'parameters')
    wanted = list(m.parameters()) if frozen == 'input' else [x]

    def gradients():
        return torch.autograd.grad(m(x).square().sum(), wanted)

    torch.testing.assert_close(gradients(), plainly(gradients))


def test_under_activation_checkpointing_the_gradients_are_the_same_bits(make, memory_format):
    m, x = make(32, 's'), torch.randn(2, 32, 6, 11).to(memory_format=memory_format)
    upstream = torch.randn_like(x)
    kept = forward_and_gradients(m, x, upstream)
    x = x.requires_grad_()
    y = checkpoint(m, x, use_reentrant=False)
    recomputed = [y, *torch.autograd.grad(y, [x, *m.parameters()], upstream)]
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_forward_mode_derivatives_are_those_of_the_formula(make):
    m = make(16, dtype=torch.float64)
    x, direction = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(m(forward_ad.make_dual(x, direction))).tangent
    step = 1e-6
    torch.testing.assert_close(got, (m(x + step * direction) - m(x - step * direction)) / (2 * step))


def net(memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), EfficientLocalAttention(16),
        nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), EfficientLocalAttention(32, 's'),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    return model.to(memory_format=memory_format)


def test_fifty_steps_of_training_end_where_the_plain_formula_ends(memory_format, plainly):
    def train():
        model = net(memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x, target = torch.randn(16, 3, 24, 20).to(memory_format=memory_format), torch.arange(16) % 4
        losses = []
        for _ in range(50):
            loss = nn.functional.cross_entropy(model(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return torch.tensor(losses)

    losses, expected = train(), plainly(train)
    assert expected[-1] < 0.2 * expected[0]
    torch.testing.assert_close(losses[:10], expected[:10], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[-1], expected[-1], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize('size', [(6, 11), (6, 6)], ids=str)
def test_an_empty_batch_gives_an_empty_output_and_no_gradient(make, size, memory_format):
    m, x = make(32), torch.randn(0, 32, *size).to(memory_format=memory_format).requires_grad_()
    y = m(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in m.parameters())


@pytest.mark.parametrize('name', ['conv.weight', 'gn.weight', 'gn.bias'])
@pytest.mark.parametrize(('other', 'named'), [('meta', 'cpu'), (torch.float16, 'torch.float32')], ids=str)
def test_mixed_devices_and_dtypes_are_named_in_one_line(name, other, named):
    m = EfficientLocalAttention(32)
    layer, _, parameter = name.partition('.')
    setattr(getattr(m, layer), parameter, nn.Parameter(m.get_parameter(name).to(other)))
    for call in (m, m.gates):
        with pytest.raises(ValueError, match=f'ELA expects {name} .*{named}.*{other}') as error:
            call(torch.randn(2, 32, 5, 5))
        assert '\n' not in str(error.value)


@pytest.mark.parametrize('dtype', [torch.float64, torch.int64], ids=str)
def test_dtypes_that_autocast_leaves_alone_are_named_under_autocast_too(dtype):
    with torch.autocast('cpu', torch.bfloat16), pytest.raises(ValueError, match=f'{dtype}, got torch.float32'):
        EfficientLocalAttention(32)(torch.ones(2, 32, 5, 5, dtype=dtype))


def test_mixed_dtypes_are_named_on_a_device_without_autocast_too():
    m = EfficientLocalAttention(32, device='meta')
    with pytest.raises(ValueError, match='torch.float16, got torch.float32'):
        m(torch.ones(2, 32, 5, 5, dtype=torch.float16, device='meta'))


@pytest.fixture
def formula_calls(monkeypatch):
    calls, formula = [], ela_functional.ela_reference
    monkeypatch.setattr(ela_functional, 'ela_reference', lambda *args: calls.append(1) or formula(*args))
    return calls


def test_set_fused_chooses_the_formula_and_back(make, plainly, formula_calls):
    m, x = make(32), torch.randn(2, 32, 6, 11)
    torch.testing.assert_close(m(x), plainly(lambda: m(x)))
    assert len(formula_calls) == 1


@pytest.mark.parametrize(('value', 'expected'), [('0', True), ('1', False), (None, False)])
def test_the_environment_chooses_before_the_first_import(value, expected):
    code = '''
import timm
import torch
from timm_ela import EfficientLocalAttention
from timm_ela.layers import ela_functional
def formula(*args):
    print('formula')
    return args[0]
ela_functional.ela_reference = formula
EfficientLocalAttention(32)(torch.randn(2, 32, 5, 5))
'''
    done = run_python(code, env={} if value is None else {'TIMM_ELA_FUSED': value})
    assert ('formula' in done.stdout) is expected


def test_a_choice_that_is_none_is_named_and_the_usual_one_taken():
    code = 'from timm_ela.layers import ela_functional; assert ela_functional._FUSED is True'
    done = run_python(code, env={'TIMM_ELA_FUSED': 'yes'})
    assert done.stderr.strip().endswith('TIMM_ELA_FUSED=yes is neither 0 nor 1: taken as 1.')


def test_timms_layer_of_the_same_name_is_left_as_it_is():
    assert type(create_attn('ela', 32)).__module__.startswith('timm.')
