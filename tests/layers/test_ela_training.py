"""What ELA costs in memory, and that its gradients are as exact as those of the authors' module."""
import copy

import pytest
import torch
from helpers import DEVICE, on_cpu
from torch import nn
from torch.autograd import forward_ad
from torch.profiler import ProfilerActivity, profile


def forward_and_gradients(m, x, upstream):
    x = x.detach().requires_grad_()
    y = m(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *m.parameters()], upstream)]


def allocations(m, x, upstream=None):
    """Of at least the size of x: in inference, or in a step of training."""
    # the profiler holds no tensor: PyTorch adds in place only to what nothing else holds
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with torch.set_grad_enabled(upstream is not None):
            y = m(x)
        if upstream is not None:
            torch.autograd.grad(y, [x, *m.parameters()], upstream)
    return sum(event.self_cpu_memory_usage >= x.nbytes for event in profiled.events())


@on_cpu
def test_inference_allocates_the_output_and_a_step_its_gradient_and_one_product_too(make, memory_format):
    m, (x, upstream) = make(64), torch.randn(2, 2, 64, 12, 20)
    x, upstream = (t.to(memory_format=memory_format) for t in (x, upstream))
    assert allocations(m, x) == 1
    assert allocations(m, x.requires_grad_(), upstream) == 3


def test_training_saves_nothing_of_full_size_but_its_input(make, authors, memory_format):
    m, x = make(64), torch.randn(2, 64, 12, 20).to(memory_format=memory_format).requires_grad_()

    def saved(m):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            m(x)
        return {t.untyped_storage().data_ptr() for t in kept if t.numel() >= x.numel()}

    assert saved(m) == {x.untyped_storage().data_ptr()}
    assert len(saved(authors(m))) == 2  # the first product, too


def check_exactness(m, theirs, x, upstream, least=0.0, run=forward_and_gradients):
    """The output's error and each gradient's are at most twice those of the authors' module in the same dtype."""
    exact = forward_and_gradients(copy.deepcopy(theirs).double(), x.double(), upstream.double())
    for got, plain, want in zip(run(m, x, upstream), run(theirs, x, upstream), exact, strict=True):
        assert got.dtype == plain.dtype
        error, allowed = ((t.double() - want).norm() / want.norm() for t in (got, plain))
        assert error <= max(2 * allowed, least)


SIZES = [(1, 5), (5, 1), (7, 13), (13, 7), (1, 63), (63, 7), (25, 38), (9, 9)]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('variant', ['b', 's'])
def test_output_and_gradients_are_as_exact_as_the_authors(make, authors, variant, size, dtype, memory_format):
    x, upstream = (torch.randn(3, 48, *size).to(memory_format=memory_format, dtype=dtype) for _ in range(2))
    m = make(48, variant).to(dtype)
    check_exactness(m, authors(m), x, upstream, least=2e-6)


def test_small_gradients_in_half_precision_are_as_exact_as_the_authors(make, authors, memory_format):
    x, upstream = (torch.randn(3, 48, 112, 112).to(memory_format=memory_format).half() for _ in range(2))
    m = make(48).half()
    check_exactness(m, authors(m), x, 3e-4 * upstream, least=2e-6)  # their means would be subnormal


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('variant', ['b', 's'])
def test_under_autocast_the_gradients_are_as_exact_as_the_authors(make, authors, variant, dtype, memory_format):
    m, (x, upstream) = make(48, variant), torch.randn(2, 3, 48, 7, 13).to(dtype)
    x, upstream = (t.to(memory_format=memory_format) for t in (x, upstream))

    def under_autocast(m, x, upstream):
        leaf = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16):
            y = m(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, *m.parameters()], upstream)]  # outside, as is usual

    check_exactness(m, authors(m), x, upstream, run=under_autocast)


class Wide(nn.Module):
    """Logits that are all but open, in float32, as GroupNorm gives them under CUDA's autocast."""

    def forward(self, z):
        return z.float() * 9 + 6


def test_gates_that_are_all_but_open_keep_the_bits_of_their_gradients(make, authors, memory_format):
    m = make(16, dtype=torch.bfloat16)
    theirs = authors(m)
    m.gn = theirs.gn = Wide()
    x, upstream = (t.to(memory_format=memory_format).bfloat16() for t in torch.randn(2, 2, 16, 9, 12))
    check_exactness(m, theirs, x, upstream)


def test_neither_the_input_nor_the_upstream_gradient_is_written_to(make, memory_format):
    m, x, upstream = make(32), *(torch.randn(2, 32, 6, 11).to(memory_format=memory_format) for _ in range(2))
    before = x.clone(), upstream.clone()
    y = m(x.requires_grad_())
    first = torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
    kept = first.clone()
    again = torch.autograd.grad(y, x, upstream)[0]
    assert torch.equal(x, before[0]) and torch.equal(upstream, before[1])
    assert torch.equal(first, kept) and torch.equal(again, kept)


def test_a_hook_on_the_autograd_node_may_keep_the_gradient_that_it_gets(make, memory_format):
    x, seen = torch.randn(2, 32, 6, 11).to(memory_format=memory_format).requires_grad_(), []
    y = make(32)(x * 1)
    y.grad_fn.register_hook(lambda inputs, outputs: seen.extend((inputs[0], inputs[0].clone())))
    y.square().sum().backward()
    assert torch.equal(*seen)


def test_an_input_that_goes_elsewhere_too_gets_both_gradients(make, authors):
    m, x = make(32), torch.randn(2, 32, 6, 11)

    def gradient(m):
        leaf = x.clone().requires_grad_()
        inner = leaf * 2
        inner.retain_grad()
        (m(inner) + inner.sigmoid()).square().sum().backward()
        return leaf.grad, inner.grad

    torch.testing.assert_close(gradient(m), gradient(authors(m)))


@pytest.mark.parametrize('frozen', ['input', 'parameters', 'conv.weight', 'gn.bias'])
def test_what_needs_no_gradient_may_be_frozen(make, authors, frozen):
    m, x = make(32), torch.randn(2, 32, 6, 11)

    def gradients(m):
        leaf = x.clone().requires_grad_(frozen != 'input')
        for k, p in m.named_parameters():
            p.requires_grad_(frozen not in ('parameters', k))
        return torch.autograd.grad(m(leaf).square().sum(), [t for t in (leaf, *m.parameters()) if t.requires_grad])

    torch.testing.assert_close(gradients(m), gradients(authors(m)))


def test_forward_mode_derivatives_are_those_of_the_formula(make):
    m = make(16, dtype=torch.float64)
    x, direction = torch.randn(2, 2, 16, 5, 7, dtype=torch.float64)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(m(forward_ad.make_dual(x, direction))).tangent
    step = 1e-6
    torch.testing.assert_close(got, (m(x + step * direction) - m(x - step * direction)) / (2 * step))


def test_an_empty_batch_gives_an_empty_output_and_no_gradient(make, memory_format):
    m, x = make(32), torch.randn(0, 32, 6, 11).to(memory_format=memory_format).requires_grad_()
    y = m(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in m.parameters())
