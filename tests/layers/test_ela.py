"""EfficientLocalAttention computes what its authors' module does, and behaves like any layer of timm and PyTorch."""
import re

import pytest
import timm
import torch
from helpers import DEVICE
from torch.func import functional_call

from timm_ela import VARIANTS, EfficientLocalAttention

SHAPES = {
    'wide': (2, 64, 6, 11),
    'tall': (2, 32, 11, 6),
    'low_than_kernel': (2, 32, 3, 9),
    'narrow_than_kernel': (2, 32, 9, 2),
    'one_row': (2, 64, 1, 8),
    'batch_one': (1, 32, 5, 8),
    'square': (3, 32, 5, 5),
    'mobilenetv2_width': (1, 144, 4, 7),  # 32 groups do not divide it
}


@pytest.mark.usefixtures('either_way')
@pytest.mark.parametrize('shape', SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize('variant', VARIANTS)
def test_output_and_every_gradient_are_the_authors(make, authors, variant, shape):
    m, x = make(shape[1], variant, dtype=torch.float64), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    close = {'rtol': 1e-9, 'atol': 1e-10}

    def compute(net):
        y, gates, inputs = net(x), net.gates(x), (x, *net.parameters())
        return [
            y, *gates, *torch.autograd.grad(y, inputs, upstream),
            *torch.autograd.grad([a.square().sum() for a in gates], inputs)]

    expected = compute(authors(m))
    for training in (True, False):
        for got, want in zip(compute(m.train(training)), expected, strict=True):
            assert want.abs().max() > 1e-3  # a gradient that vanishes would compare equal to anything that vanishes
            torch.testing.assert_close(got, want, **close)
        with torch.no_grad():
            torch.testing.assert_close(m(x), expected[0], **close)  # another path: the second product is in place


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.mark.usefixtures('either_way')
@pytest.mark.parametrize('no_grad', [False, True], ids=['grad', 'no_grad'])
@pytest.mark.parametrize(
    ('dtype', 'autocast'), [*((d, False) for d in TOLERANCE), (torch.float32, True), (torch.bfloat16, True)], ids=str)
def test_dtype_and_memory_format_of_the_input_are_kept(make, authors, dtype, memory_format, autocast, no_grad):
    m = make(32, 's', dtype=torch.float32 if autocast else dtype)
    x = torch.randn(2, 32, 6, 11).to(dtype).to(memory_format=memory_format)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast), torch.set_grad_enabled(not no_grad):
        y, gates = m(x), m.gates(x)
    assert {t.dtype for t in (y, *gates)} == {dtype}  # a wider gate would promote the whole activation
    assert y.stride() == x.stride()
    assert y.requires_grad is not no_grad
    expected = authors(m).double()(x.double())
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
@pytest.mark.parametrize('variant', ['b', 's'])
def test_first_and_second_derivatives_pass_gradcheck(make, variant, memory_format):
    m = make(8, variant, dtype=torch.float64)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    names = [k for k, _ in m.named_parameters()]

    def f(x, *values):
        return functional_call(m, dict(zip(names, values, strict=True)), (x,))

    inputs = (x, *(p.detach().clone().requires_grad_() for p in m.parameters()))
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


@pytest.mark.parametrize(('channels', 'kwargs', 'weight', 'groups'), [
    (64, {'variant': 't'}, (64, 1, 5), 32),
    (64, {'variant': 's'}, (64, 8, 5), 16),
    (960, {'variant': 'l'}, (960, 8, 7), 16),
    (64, {}, (64, 1, 7), 16),
    # where the published groups do not divide the channels: their greatest common divisor
    (144, {'variant': 't'}, (144, 1, 5), 16),
    (7, {'num_groups': 32}, (7, 1, 7), 1),
    (64, {'kernel_size': 3}, (64, 1, 3), 16),
    (64, {'group_size': 4}, (64, 4, 7), 16),
    (64, {'num_groups': 4}, (64, 1, 7), 4),
    (64, {'eps': 0.1}, (64, 1, 7), 16),
], ids=str)
def test_sizes_are_the_papers_and_each_can_be_overridden_alone(channels, kwargs, weight, groups):
    m = EfficientLocalAttention(channels, **kwargs)
    assert m.conv.weight.shape == weight and m.conv.bias is None
    assert m.gn.num_groups == groups and m.gn.eps == kwargs.get('eps', 1e-5)
    assert torch.equal(m.gn.weight, torch.ones(channels)) and torch.equal(m.gn.bias, torch.zeros(channels))


@pytest.mark.parametrize(('call', 'value'), [
    (lambda: EfficientLocalAttention(64, 'x'), "'x'"),
    (lambda: EfficientLocalAttention(0), 'channels of ELA must be positive, got 0'),
    (lambda: EfficientLocalAttention(60, 's'), '60'),
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


@pytest.mark.parametrize(('shape', 'reason'), [
    ((64, 5, 7), 'takes a map (N, C, H, W), got one of shape [64, 5, 7]'),
    ((2, 1, 5, 7), 'has 64 channels, got a map of 1')], ids=str)
def test_a_map_of_another_shape_is_refused(shape, reason):
    m = EfficientLocalAttention(64)
    for call in (m, m.eval(), m.gates):
        with pytest.raises(ValueError, match=re.escape(reason)):
            call(torch.randn(shape))


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('resnet50', {'block_args': {'attn_layer': EfficientLocalAttention}}),
    ('efficientnet_b0', {'se_layer': EfficientLocalAttention})])
def test_timm_builds_it_as_the_attention_layer_of_its_own_models(name, kwargs):
    model = timm.create_model(name, num_classes=3, **kwargs).eval()
    assert sum(isinstance(m, EfficientLocalAttention) for m in model.modules()) == 16
    assert model(torch.randn(1, 3, 64, 48)).shape == (1, 3)
