"""The fused operator computes the formula: on a GPU, and in Triton's interpreter in a process of its own."""
import os
import sys

import pytest
import torch
from helpers import ROOT, run
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from timm_ela import EfficientLocalAttention, set_fused
from timm_ela.fused import ela_reference

triton_op = pytest.importorskip('timm_ela.triton_op')
pytest.importorskip('triton')

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
LAYOUTS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
EPS = 1e-5


@pytest.mark.skipif(INTERPRETED, reason='this is that process')
def test_the_rest_of_this_file_passes_in_the_interpreter():
    done = run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', __file__],
        env={'TRITON_INTERPRET': 1, 'CUDA_VISIBLE_DEVICES': ''}, cwd=ROOT, exit_code=None)
    assert done.returncode == 0, done.stdout
    assert ' passed' in done.stdout and 'no GPU' not in done.stdout


def test_without_triton_nothing_fails_and_nothing_is_supported():
    run([sys.executable, '-c', WITHOUT_TRITON], cwd=ROOT)


WITHOUT_TRITON = """
import sys
sys.modules['triton'] = None
import torch
from timm_ela import triton_op
assert triton_op.kernels is None
assert not triton_op.supported(torch.ones(2, 4, 5, 6), torch.ones(4, 1, 3), torch.ones(4), torch.ones(4), 2)
"""


@pytest.fixture
def device():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip('no GPU: the interpreter runs it, in a process of its own')
    return 'cpu' if INTERPRETED else 'cuda'


@pytest.fixture(autouse=True)
def _new_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills it, as documented
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.zeros(1).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make(device):
    """x and the three parameters, each value exact in the dtype of x."""
    def make(shape, group_size=1, kernel_size=5, dtype=torch.float32, layout='nhwc', param_dtype=torch.float32):
        x = torch.randn(shape, device=device).to(dtype).to(memory_format=LAYOUTS[layout])
        sizes = (shape[1], group_size, kernel_size), shape[1], shape[1]
        params = (torch.randn(size, device=device).to(dtype).to(param_dtype) for size in sizes)
        return [t.requires_grad_() for t in (x, *params)]

    return make


def results(function, inputs, norm_groups, upstream):
    """Output and every gradient, in float64."""
    y = function(*inputs, norm_groups, EPS)
    grads = torch.autograd.grad(y, inputs, upstream.to(y.dtype))
    return [t.detach().double() for t in (y, *grads)]


def check(inputs, norm_groups):
    """The fused path's errors are at most twice the plain path's in the dtype of x, the formula in float64 being right.

    Returns:
        The fused path's output and gradients, as they are.
    """
    assert triton_op.supported(*inputs, norm_groups)
    x = inputs[0]
    upstream = torch.randn_like(x)
    exact = results(ela_reference, [t.detach().double().requires_grad_() for t in inputs], norm_groups, upstream)
    plain = results(ela_reference, [t.detach().to(x.dtype).requires_grad_() for t in inputs], norm_groups, upstream)
    y = triton_op.ela_triton(*inputs, norm_groups, EPS)
    fused = [y, *torch.autograd.grad(y, inputs, upstream)]
    for tensor, like in zip(fused, (x, *inputs), strict=True):
        assert (tensor.dtype, tensor.shape) == (like.dtype, like.shape)
    for name, f, p, e in zip(('y', 'x', 'conv', 'gamma', 'beta'), fused, plain, exact, strict=True):
        rounding = 16 * torch.finfo(torch.float32).eps * e.abs().max()
        error = (f.double() - e).abs().max()
        assert error <= 2 * (p - e).abs().max() + rounding, name  # false for NaN too
    return fused


CASES = {  # shape, channels per group of the convolution, GroupNorm groups, kernel size
    'one_value': ((3, 16, 1, 1), 1, 4, 5),
    'one_row': ((2, 16, 1, 13), 1, 4, 7),
    'one_column': ((2, 16, 63, 1), 1, 2, 7),
    'low_than_kernel': ((1, 32, 2, 5), 1, 4, 7),
    'small': ((5, 16, 7, 7), 1, 2, 7),
    'odd_channels': ((2, 18, 13, 5), 1, 3, 5),  # no 16-byte vectors
    'few_channels': ((2, 3, 9, 8), 1, 3, 3),
    'many_channels': ((1, 256, 5, 3), 1, 2, 3),
    'many_tiles': ((1, 16, 200, 304), 1, 2, 3),
    'one_tap': ((2, 16, 6, 11), 1, 4, 1),
    'grouped': ((2, 32, 6, 11), 8, 4, 5),
    'grouped_across_norm_groups': ((2, 32, 5, 9), 8, 16, 7),
    'group_of_many_values': ((1, 64, 3, 130), 1, 1, 5),  # no kernel holds it
}


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize(('shape', 'group_size', 'norm_groups', 'kernel_size'), CASES.values(), ids=CASES)
def test_output_and_every_gradient_are_those_of_the_formula(
        make, shape, group_size, norm_groups, kernel_size, layout):
    inputs = make(shape, group_size, kernel_size, layout=layout)
    y, dx, *_ = check(inputs, norm_groups)
    if 1 not in shape[2:]:
        assert y.stride() == dx.stride() == inputs[0].stride()


@pytest.mark.parametrize('param_dtype', ['float32', 'same'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(('group_size', 'shape'), [(1, (2, 32, 7, 13)), (8, (2, 32, 13, 7))])
def test_half_precision_errs_at_most_twice_as_much_as_the_plain_path(
        make, shape, group_size, dtype, layout, param_dtype):
    check(make(shape, group_size, 5, dtype, layout, dtype if param_dtype == 'same' else torch.float32), 2)


@pytest.mark.skipif(INTERPRETED, reason='too large for the interpreter')
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', [
    (2, 64, 200, 304), (8, 256, 56, 56), (8, 2048, 7, 7), (4, 96, 112, 112), (1, 960, 14, 14), (1, 32, 5, 1024)])
def test_shapes_of_real_networks(make, shape, dtype, layout):
    check(make(shape, 1, 7, dtype, layout), 16)


VIEWS = {
    'rows_and_columns': lambda x: x[:, :, 1::2, 3:],
    'channels_of_nhwc': lambda x: x.to(memory_format=torch.channels_last)[:, 4:20],
    'transposed': lambda x: x.transpose(2, 3),
    'one_image_for_all': lambda x: x[:1].expand(3, -1, -1, -1),
    'one_channel_for_all': lambda x: x[:, :1].expand(-1, 16, -1, -1),
}


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_views_give_what_their_copies_give(make, device, view):
    x = view(torch.randn(2, 32, 5, 8, device=device)).detach()
    inputs = [x.requires_grad_(), *make((1, x.shape[1], 1, 1))[1:]]
    y, dx, *_ = check(inputs, 2)
    assert y.stride(1) == dx.stride(1) == (1 if x.stride(1) == 1 else y.shape[2] * y.shape[3])


def test_an_upstream_gradient_of_any_layout_is_taken(make):
    inputs = make((2, 16, 5, 4))
    y = triton_op.ela_triton(*inputs, 2, EPS)
    for upstream in (torch.ones((), device=y.device).expand_as(y), torch.randn_like(y).contiguous()):
        got = torch.autograd.grad(y, inputs, upstream, retain_graph=True)
        want = torch.autograd.grad(y, inputs, upstream.clone(memory_format=torch.channels_last), retain_graph=True)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('group_size', [1, 8])
def test_a_second_run_gives_the_same_bits(make, group_size, layout):
    shape = (2, 16, 9, 8) if INTERPRETED else (16, 256, 56, 56)
    inputs = make(shape, group_size, 5, torch.bfloat16, layout)
    upstream = torch.randn_like(inputs[0])
    first, second = (results(triton_op.ela_triton, inputs, 2, upstream) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize('group_size', [1, 8])
def test_x_is_read_and_written_no_more_often_than_said(make, monkeypatch, group_size):
    launched, launch = [], triton_op._launch_maps

    def recorded(kernel, *args, **kwargs):
        launched.append(kernel.__name__)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(triton_op, '_launch_maps', recorded)
    x, *params = make((2, 16, 5, 4), group_size)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = triton_op.ela_triton(x, *params, 2, EPS)
    assert launched == ['pool_kernel', 'gate_kernel']
    assert sorted(t.numel() for t in saved) == sorted([*map(torch.numel, (x, *params)), 2 * 16 * (5 + 4)])
    y.sum().backward()
    assert launched[2:] == ['reduce_kernel', 'expand_kernel']
    triton_op.ela_triton(x.detach(), *params, 2, EPS).sum().backward()
    assert launched[4:] == ['pool_kernel', 'gate_kernel', 'reduce_kernel']  # no gradient of x, no pass for it
    triton_op.ela_triton(x, *(p.detach() for p in params), 2, EPS).sum().backward()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('frozen', [(), (0,), (1, 3)])
def test_gradients_can_be_differentiated(make, frozen, dtype):
    inputs = make((2, 16, 5, 4), dtype=dtype)
    for i in frozen:
        inputs[i].requires_grad_(False)
    wanted = [t for t in inputs if t.requires_grad]
    upstream = torch.randn_like(inputs[0]).requires_grad_()
    weights = [torch.randn_like(t) for t in wanted]

    def second(function, *args):
        y = function(*args, 2, EPS).to(dtype)
        grads = torch.autograd.grad(y, wanted, upstream, create_graph=True)
        return torch.autograd.grad(sum((g * w).sum() for g, w in zip(grads, weights, strict=True)), [*wanted, upstream])

    got, want = second(triton_op.ela_triton, *inputs), second(ela_reference, *(t.float() for t in inputs))
    torch.testing.assert_close(got, want)


def test_second_derivatives_of_one_layer_applied_twice(make):
    x, *params = make((2, 16, 5, 4))

    def second(function):
        y = function(function(x, *params, 2, EPS), *params, 2, EPS)  # x of the second depends on the weights
        grads = torch.autograd.grad(y.square().sum(), [x, *params], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *params])

    torch.testing.assert_close(second(triton_op.ela_triton), second(ela_reference), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('group_size', [1, 8])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_operators_are_registered_as_pytorch_wants_them(make, layout, group_size):
    inputs = make((1, 16, 3, 4), group_size, 3, layout=layout)
    torch.library.opcheck(triton_op.ela_forward, (*inputs, 2, EPS))
    x, *params = (t.detach() for t in inputs)
    gates = triton_op.ela_forward(x, *params, 2, EPS)[1]
    for needs_dx in (True, False):
        torch.library.opcheck(triton_op.ela_backward, (x, x, *params[:2], gates, 2, EPS, needs_dx))


@pytest.mark.parametrize(('shape', 'channels'), [((2, 32, 1, 1), 16), ((2, 32, 3, 1), 16), ((2, 32, 1, 3), 1)])
def test_strides_are_told_truly_where_sizes_of_one_make_them_ambiguous(make, device, shape, channels):
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)[:, :channels]
    inputs = x, *(p.detach() for p in make((1, channels, 1, 1))[1:])
    torch.library.opcheck(triton_op.ela_forward, (*inputs, 1, EPS), test_utils='test_faketensor')


@pytest.mark.parametrize('layout', LAYOUTS)
def test_compiled_whole_and_checkpointed_it_gives_the_same_bits(make, layout):
    def f(*args):
        return triton_op.ela_triton(*args) if triton_op.supported(*args[:-1]) else None

    compiled = torch.compile(f, fullgraph=True, backend='aot_eager' if INTERPRETED else 'inductor', dynamic=True)
    for height, width in ((3, 5), (6, 4)):
        inputs = make((2, 8, height, width), kernel_size=3, layout=layout)
        upstream = torch.randn_like(inputs[0])
        want = results(triton_op.ela_triton, inputs, 2, upstream)
        for way in (compiled, lambda *args: checkpoint(triton_op.ela_triton, *args, use_reentrant=False)):
            got = results(way, inputs, 2, upstream)
            assert all(map(torch.equal, got, want))
        with torch.no_grad():
            assert compiled(*inputs, 2, EPS).stride() == inputs[0].stride()


@pytest.mark.parametrize('group_size', [1, 8])
def test_saved_tensors_may_come_back_in_another_layout(make, group_size):
    inputs = make((2, 16, 5, 11), group_size)  # C = H + W: the shape does not tell the layout
    upstream = torch.randn_like(inputs[0])
    want = results(triton_op.ela_triton, inputs, 2, upstream)
    for changed in ((4,), (3,), (3, 4)):  # x has 4 dimensions, the gates 3
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, changed=changed: t.contiguous() if t.ndim in changed else t, lambda t: t):
            got = results(triton_op.ela_triton, inputs, 2, upstream)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('group_size', [1, 8])
def test_autocast_changes_nothing(make, device, group_size):
    inputs = make((2, 16, 5, 4), group_size, dtype=torch.bfloat16)
    upstream = torch.randn_like(inputs[0])
    want = results(triton_op.ela_triton, inputs, 2, upstream)
    with torch.autocast(device, torch.bfloat16):
        got = results(triton_op.ela_triton, inputs, 2, upstream)
    assert all(map(torch.equal, got, want))


class Distributed(torch.Tensor):
    pass


def test_what_it_does_not_support_is_left_to_the_plain_path(make):
    inputs = x, *params = make((2, 16, 5, 4))
    assert triton_op.supported(*inputs, 2)
    assert not torch.vmap(lambda x: x + (1 if triton_op.supported(x, *params, 2) else 0))(x[None]).ne(x[None]).any()
    for other in (x.double(), x[0], x[:0], x[..., :0], x.to('meta'), x[..., :1].expand(-1, -1, -1, 1025)):
        assert not triton_op.supported(other, *params, 2)
    assert not triton_op.supported(x.detach().as_subclass(Distributed), *params, 2)
    with forward_ad.dual_level():
        assert not triton_op.supported(x, *params, 2)
    assert not triton_op.supported(x, params[0].double(), *params[1:], 2)
    assert not triton_op.supported(x, params[0].to('meta'), *params[1:], 2)
    alone = x[:1, :, :1]  # with 16 groups, each holds one value of a column's strip
    assert triton_op.supported(alone, *params, 8) and not triton_op.supported(alone, *params, 16)
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        ela_reference(alone, *params, 16)


@pytest.fixture
def experimental():
    """Switches the kernels on and off."""
    yield lambda on: set_fused(experimental=on)
    set_fused()


def test_the_module_takes_it_only_where_it_is_asked_for(device, monkeypatch, experimental):
    calls, fused = [], triton_op.ela_triton
    monkeypatch.setattr(triton_op, 'ela_triton', lambda *args: calls.append(1) or fused(*args))
    m, x = EfficientLocalAttention(16).to(device), torch.randn(2, 16, 5, 7, device=device)
    lean = m(x)
    assert not calls
    experimental(True)
    torch.testing.assert_close(m(x), lean)
    assert len(calls) == 1
    m.double()(x.double())  # not supported: as if it were off
    assert len(calls) == 1


@pytest.mark.skipif(INTERPRETED, reason='too slow for the interpreter')
def test_fifty_steps_of_training_end_where_the_other_path_ends(device, experimental):
    def train():
        torch.manual_seed(0)
        m, head = EfficientLocalAttention(16, num_groups=2).to(device), torch.nn.Linear(16, 2).to(device)
        optimizer = torch.optim.SGD([*m.parameters(), *head.parameters()], lr=0.5, momentum=0.9)
        x, target = torch.randn(2, 16, 5, 7, device=device), torch.arange(2, device=device)
        for _ in range(50):
            loss = torch.nn.functional.cross_entropy(head(m(x).square().mean((2, 3))), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return torch.stack([loss.detach(), *(p.detach().norm() for p in m.parameters())])

    lean = train()
    experimental(True)
    assert lean[0] < 0.3
    torch.testing.assert_close(train(), lean, rtol=1e-3, atol=1e-4)
