"""EfficientLocalAttention computes the paper's formula, and behaves like any layer of timm and PyTorch."""
import copy

import pytest
import timm
import torch
from helpers import DEVICE
from timm.layers import create_attn
from torch.func import functional_call

from timm_ela import VARIANTS, EfficientLocalAttention

PAPER = {  # kernel size, channels per group of the convolution, GroupNorm groups
    't': (5, 1, 32),
    'b': (7, 1, 16),
    's': (5, 8, 16),
    'l': (7, 8, 16),
}


def literal_ela(x, weight, gamma, beta, num_groups, eps=1e-5):
    """The formula, one group of channels and one tap at a time, sharing nothing with the package."""
    n, channels, height, width = x.shape
    _, group_size, taps = weight.shape
    share = channels // num_groups

    def gate(z):
        length = z.shape[2]
        zeros = z.new_zeros(n, channels, taps // 2)
        padded = torch.cat([zeros, z, zeros], dim=2)
        convolved = torch.cat([
            sum(weight[g:g + group_size, :, t] @ padded[:, g:g + group_size, t:t + length] for t in range(taps))
            for g in range(0, channels, group_size)], dim=1)
        normed = []
        for part in convolved.split(share, dim=1):
            mean = part.sum(dim=(1, 2), keepdim=True) / (share * length)
            var = ((part - mean) ** 2).sum(dim=(1, 2), keepdim=True) / (share * length)
            normed.append((part - mean) / (var + eps) ** 0.5)
        return 1 / (1 + torch.exp(-(torch.cat(normed, dim=1) * gamma.view(1, -1, 1) + beta.view(1, -1, 1))))

    a_h = gate(sum(x[:, :, :, w] for w in range(width)) / width)
    a_w = gate(sum(x[:, :, h, :] for h in range(height)) / height)
    return x * a_h.view(n, channels, height, 1) * a_w.view(n, channels, 1, width), a_h, a_w


def literal_of(m, x):
    return literal_ela(x, m.conv.weight, m.gn.weight, m.gn.bias, m.gn.num_groups, m.gn.eps)


SHAPES = {
    'wide': (2, 64, 6, 11),
    'tall': (2, 32, 11, 6),
    'low_than_kernel': (2, 32, 3, 9),
    'narrow_than_kernel': (2, 32, 9, 2),
    'one_row': (2, 64, 1, 8),
    'batch_one': (1, 32, 5, 8),
    'mobilenetv2_width': (1, 144, 4, 7),  # 32 groups do not divide it
}


@pytest.mark.usefixtures('either_way')
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize('variant', VARIANTS)
def test_output_and_every_gradient_are_those_of_the_formula(make, variant, shape):
    m = make(shape[1], variant, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = (x, m.conv.weight, m.gn.weight, m.gn.bias)
    y, (expected, a_h, a_w) = m(x), literal_of(m, x)
    upstream = torch.randn_like(y)
    grads, expected_grads = (torch.autograd.grad(out, inputs, upstream) for out in (y, expected))
    close = {'rtol': 1e-9, 'atol': 1e-10}
    torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(m.gates(x), (a_h, a_w), **close)
    for got, want in zip(grads, expected_grads, strict=True):
        assert want.abs().max() > 1e-3  # a gradient that vanishes would compare equal to anything that vanishes
        torch.testing.assert_close(got, want, **close)
    with torch.no_grad():
        torch.testing.assert_close(m(x), expected, **close)  # another path: the second product is in place


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.mark.usefixtures('either_way')
@pytest.mark.parametrize('no_grad', [False, True], ids=['grad', 'no_grad'])
@pytest.mark.parametrize(
    ('dtype', 'autocast'), [*((d, False) for d in TOLERANCE), (torch.float32, True), (torch.bfloat16, True)], ids=str)
def test_dtype_and_memory_format_of_the_input_are_kept(make, dtype, memory_format, autocast, no_grad):
    m = make(32, 's', dtype=torch.float32 if autocast else dtype)
    x = torch.randn(2, 32, 6, 11).to(dtype).to(memory_format=memory_format)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast), torch.set_grad_enabled(not no_grad):
        y, gates = m(x), m.gates(x)
    assert {t.dtype for t in (y, *gates)} == {dtype}  # a wider gate would promote the whole activation
    assert y.stride() == x.stride()
    assert y.requires_grad is not no_grad
    expected = literal_of(copy.deepcopy(m).double(), x.double())[0]
    tolerance = TOLERANCE[torch.bfloat16 if autocast else dtype]
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


VIEWS = {
    'rows_and_columns': lambda x: x[:, :, 1::2, 3:],
    'channels': lambda x: x[:, 16:48],
    'channels_of_nhwc': lambda x: x.to(memory_format=torch.channels_last)[:, 16:48],
    'rows_of_nhwc': lambda x: x.to(memory_format=torch.channels_last)[:, :, 2:, 1:],
    'transposed': lambda x: x.transpose(2, 3),
    'one_image_for_all': lambda x: x[:1].expand(3, -1, -1, -1),
    'one_channel_for_all': lambda x: x[:, :1].expand(-1, 32, -1, -1),
    'one_column_for_all': lambda x: x[..., :1].expand(-1, -1, -1, 5),
}


@pytest.mark.parametrize('no_grad', [False, True], ids=['grad', 'no_grad'])
@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_views_give_what_their_copies_give_and_are_not_written_to(make, view, no_grad):
    base = torch.randn(2, 64, 7, 9).requires_grad_()
    before, m = base.detach().clone(), make(view(base).shape[1], 's')
    with torch.set_grad_enabled(not no_grad):
        y, expected = m(view(base)), m(view(base).clone(memory_format=torch.contiguous_format))
    torch.testing.assert_close(y, expected)
    if not no_grad:
        torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), base) for t in (y, expected)))
    assert torch.equal(base, before)


@pytest.mark.usefixtures('either_way')
@pytest.mark.parametrize('size', [(3, 4), (3, 3)], ids=str)
@pytest.mark.parametrize('variant', ['b', 's'])
def test_first_and_second_derivatives_pass_gradcheck(make, variant, size, memory_format):
    m = make(8, variant, dtype=torch.float64)
    x = torch.randn(2, 8, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    names = [k for k, _ in m.named_parameters()]

    def f(x, *values):
        return functional_call(m, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in m.parameters()))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_variants_are_those_of_the_paper():
    assert {k: (v['kernel_size'], v['group_size'], v['num_groups']) for k, v in VARIANTS.items()} == PAPER


@pytest.mark.parametrize('channels', [32, 64, 144, 960])
@pytest.mark.parametrize('variant', PAPER)
def test_layers_have_the_sizes_of_the_paper(variant, channels):
    kernel_size, group_size, num_groups = PAPER[variant]
    m = EfficientLocalAttention(channels, variant)
    assert m.conv.weight.shape == (channels, group_size, kernel_size)
    assert m.conv.bias is None
    if channels % num_groups == 0:
        assert m.gn.num_groups == num_groups
    assert m.gn.eps == 1e-5
    assert torch.equal(m.gn.weight, torch.ones(channels)) and torch.equal(m.gn.bias, torch.zeros(channels))


@pytest.mark.parametrize(('channels', 'num_groups', 'used'), [(144, 32, 16), (144, 16, 16), (24, 16, 8), (7, 32, 1)])
def test_where_the_published_groups_do_not_divide_the_channels_their_gcd_is_used(channels, num_groups, used):
    assert EfficientLocalAttention(channels, num_groups=num_groups).gn.num_groups == used


def test_the_default_variant_is_base():
    default, base = EfficientLocalAttention(64), EfficientLocalAttention(64, 'b')
    assert (default.conv.weight.shape, default.gn.num_groups) == (base.conv.weight.shape, base.gn.num_groups)


OVERRIDES = [
    ({'kernel_size': 3}, (3, 1, 16, 1e-5)),
    ({'group_size': 4}, (7, 4, 16, 1e-5)),
    ({'num_groups': 4}, (7, 1, 4, 1e-5)),
    ({'eps': 0.1}, (7, 1, 16, 0.1)),
]


@pytest.mark.parametrize(('override', 'sizes'), OVERRIDES, ids=lambda v: next(iter(v), '') if type(v) is dict else '')
def test_each_size_can_be_overridden_alone_and_is_used(make, override, sizes):
    m = make(32, 'b', **override, dtype=torch.float64)
    assert (*m.conv.weight.shape[:0:-1], m.gn.num_groups, m.gn.eps) == sizes
    x = torch.randn(2, 32, 5, 8, dtype=torch.float64)
    expected = literal_ela(x, m.conv.weight, m.gn.weight, m.gn.bias, *sizes[2:])[0]
    torch.testing.assert_close(m(x), expected, rtol=1e-9, atol=1e-10)


def test_device_and_dtype_reach_every_parameter():
    m = EfficientLocalAttention(64, device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in m.parameters()} == {('meta', torch.bfloat16)}


@pytest.mark.parametrize(('call', 'value'), [
    (lambda: EfficientLocalAttention(64, 'x'), "'x'"),
    (lambda: EfficientLocalAttention(64, ''), "''"),
    (lambda: EfficientLocalAttention(60, 's'), '60'),
    (lambda: EfficientLocalAttention(20, 'l'), '20'),
    (lambda: EfficientLocalAttention(64, kernel_size=4), '4'),
    (lambda: EfficientLocalAttention(64, kernel_size=-1), '-1'),
    (lambda: EfficientLocalAttention(64, group_size=0), '0'),
    (lambda: EfficientLocalAttention(64, num_groups=0), '0'),
])
def test_errors_are_one_line_and_name_the_value(call, value):
    with pytest.raises(ValueError) as error:
        call()
    assert value in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('shape', [(1, 16, 1, 5), (1, 16, 5, 1), (1, 16, 1, 1)])
def test_group_norm_says_itself_that_a_group_holds_a_single_value(shape):
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        EfficientLocalAttention(16, 'b').eval()(torch.randn(shape))


@pytest.mark.parametrize('variant', PAPER)
def test_weights_of_the_authors_module_load_as_they_are(make, authors, variant):
    theirs = authors(make(64, variant))
    assert set(theirs.state_dict()) == {'conv.weight', 'gn.weight', 'gn.bias'}
    ours = EfficientLocalAttention(64, variant)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 64, 6, 11)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize('shape', [(2, 64, 5), (64, 5, 5), (2, 32, 5, 7), (2, 1, 5, 7), (2, 64, 5, 7, 3)], ids=str)
def test_an_input_of_another_shape_is_refused(shape):
    for call in (EfficientLocalAttention(64), EfficientLocalAttention(64).gates):
        with pytest.raises((RuntimeError, IndexError, ValueError)):
            call(torch.randn(shape))


@pytest.mark.parametrize('name', ['conv.weight', 'gn.weight', 'gn.bias'])
def test_mixed_dtypes_are_refused(name):
    m = EfficientLocalAttention(32)
    m.get_parameter(name).data = m.get_parameter(name).data.half()
    with pytest.raises(RuntimeError):
        m(torch.randn(2, 32, 5, 5))


def test_timm_builds_it_as_an_attention_layer_of_its_own_resnet():
    model = timm.create_model('resnet50', block_args={'attn_layer': EfficientLocalAttention}, num_classes=3).eval()
    assert [m.gn.num_channels for m in model.modules() if isinstance(m, EfficientLocalAttention)] == \
        [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 3)
    assert isinstance(create_attn(EfficientLocalAttention, 64), EfficientLocalAttention)


def test_timm_builds_it_as_the_attention_layer_of_an_efficientnet():
    model = timm.create_model('efficientnet_b0', se_layer=EfficientLocalAttention, num_classes=3).eval()
    assert sum(isinstance(m, EfficientLocalAttention) for m in model.modules()) == 16
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 3)


def test_timms_layer_of_the_same_name_is_left_as_it_is():
    assert type(create_attn('ela', 32)).__module__.startswith('timm.')
