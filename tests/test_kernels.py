"""The kernels compute the formula: on a GPU, and in Triton's interpreter in a process of its own."""
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run
from kernel_cases import EPS, INTERPRETED, LAYOUTS, make, new_memory_is_nan, pick_device, results  # noqa: F401

from timm_ela.fused import ela_reference

triton_op = pytest.importorskip('timm_ela.triton_op')
pytest.importorskip('triton')


@pytest.mark.skipif(INTERPRETED, reason='this is that process')
@pytest.mark.parametrize('name', ['test_kernels.py', 'test_triton_op.py'])
def test_what_runs_on_a_gpu_passes_in_the_interpreter_too(name):
    done = run(
        [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', Path(__file__).with_name(name)],
        env={'TRITON_INTERPRET': 1, 'CUDA_VISIBLE_DEVICES': ''}, cwd=ROOT, exit_code=None)
    assert done.returncode == 0, done.stdout
    assert ' passed' in done.stdout and 'no GPU' not in done.stdout


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
        shape, group_size, norm_groups, kernel_size, layout):
    inputs = make(shape, group_size, kernel_size, layout=layout)
    y, dx, *_ = check(inputs, norm_groups)
    if 1 not in shape[2:]:
        assert y.stride() == dx.stride() == inputs[0].stride()


@pytest.mark.parametrize('param_dtype', ['float32', 'same'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(('group_size', 'shape'), [(1, (2, 32, 7, 13)), (8, (2, 32, 13, 7))])
def test_half_precision_errs_at_most_twice_as_much_as_the_plain_path(
        shape, group_size, dtype, layout, param_dtype):
    check(make(shape, group_size, 5, dtype, layout, dtype if param_dtype == 'same' else torch.float32), 2)


@pytest.mark.skipif(INTERPRETED, reason='too large for the interpreter')
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('shape', [
    (2, 64, 200, 304), (8, 256, 56, 56), (8, 2048, 7, 7), (4, 96, 112, 112), (1, 960, 14, 14), (1, 32, 5, 1024)])
def test_shapes_of_real_networks(shape, dtype, layout):
    check(make(shape, 1, 7, dtype, layout), 16)


VIEWS = {
    'rows_and_columns': lambda x: x[:, :, 1::2, 3:],
    'channels_of_nhwc': lambda x: x.to(memory_format=torch.channels_last)[:, 4:20],
    'transposed': lambda x: x.transpose(2, 3),
    'one_image_for_all': lambda x: x[:1].expand(3, -1, -1, -1),
    'one_channel_for_all': lambda x: x[:, :1].expand(-1, 16, -1, -1),
}


@pytest.mark.parametrize('view', VIEWS.values(), ids=VIEWS)
def test_views_give_what_their_copies_give(view):
    x = view(torch.randn(2, 32, 5, 8, device=pick_device())).detach()
    inputs = [x.requires_grad_(), *make((1, x.shape[1], 1, 1))[1:]]
    y, dx, *_ = check(inputs, 2)
    assert y.stride(1) == dx.stride(1) == (1 if x.stride(1) == 1 else y.shape[2] * y.shape[3])


def test_an_upstream_gradient_of_any_layout_is_taken():
    inputs = make((2, 16, 5, 4))
    y = triton_op.ela_triton(*inputs, 2, EPS)
    for upstream in (torch.ones((), device=y.device).expand_as(y), torch.randn_like(y).contiguous()):
        got = torch.autograd.grad(y, inputs, upstream, retain_graph=True)
        want = torch.autograd.grad(y, inputs, upstream.clone(memory_format=torch.channels_last), retain_graph=True)
        assert all(map(torch.equal, got, want))


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('group_size', [1, 8])
def test_a_second_run_gives_the_same_bits(group_size, layout):
    shape = (2, 16, 9, 8) if INTERPRETED else (16, 256, 56, 56)
    inputs = make(shape, group_size, 5, torch.bfloat16, layout)
    upstream = torch.randn_like(inputs[0])
    first, second = (results(triton_op.ela_triton, inputs, 2, upstream) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize('group_size', [1, 8])
def test_x_is_read_and_written_no_more_often_than_said(monkeypatch, group_size):
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
def test_gradients_can_be_differentiated(frozen, dtype):
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


def test_second_derivatives_of_one_layer_applied_twice():
    x, *params = make((2, 16, 5, 4))

    def second(function):
        y = function(function(x, *params, 2, EPS), *params, 2, EPS)  # x of the second depends on the weights
        grads = torch.autograd.grad(y.square().sum(), [x, *params], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *params])

    torch.testing.assert_close(second(triton_op.ela_triton), second(ela_reference), rtol=1e-3, atol=1e-4)
