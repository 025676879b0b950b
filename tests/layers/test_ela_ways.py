"""Exported, exportable and under vmap ELA computes the same; test_attn_layers.py has the ways of every layer."""
import pytest
import torch
from helpers import exported
from torch.func import functional_call, grad, vmap

from timm_ela import EfficientLocalAttention

pytestmark = pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning', 'ignore::torch.jit.TracerWarning')


FIXED = [(2, 32, 7, 13), (1, 32, 13, 7), (3, 32, 2, 3), (2, 16, 1, 5)]


@pytest.mark.parametrize('shape', FIXED, ids=str)
@pytest.mark.parametrize('variant', ['b', 's'])
def test_an_export_of_fixed_size_equals_the_module_with_every_gradient(make, authors, variant, shape, memory_format):
    m = make(shape[1], variant, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=memory_format)
    upstream = torch.randn_like(x)

    def gradients(f):
        leaf = x.detach().requires_grad_()
        y = f(leaf)
        return [y, *torch.autograd.grad(y, [leaf, *f.parameters()], upstream)]

    for got, want in zip(gradients(exported(m, x)), gradients(authors(m)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_an_export_of_fixed_size_has_only_operators_that_phones_have():
    program = torch.export.export(EfficientLocalAttention(32), (torch.randn(1, 32, 6, 9),)).run_decompositions()
    calls = {n: n.target.__name__ for n in program.graph.nodes if n.op == 'call_function'}
    assert set(calls.values()) <= {
        '_assert_tensor_metadata.default', '_to_copy.default', 'add.Tensor', 'avg_pool2d.default',
        'convolution.default', 'div.Tensor', 'mean.dim', 'mul.Tensor', 'sigmoid.default', 'sqrt.default', 'sub.Tensor',
        'unsqueeze.default', 'view.default'}
    for n in (n for n, name in calls.items() if name == 'mean.dim'):
        assert n.args[0].meta['val'].ndim == 4 and n.args[1:] == ([2, 3], True)
    for n in (n for n, name in calls.items() if name == 'unsqueeze.default'):
        assert n.args[0].op == 'placeholder'  # a runtime folds what is computed from weights alone


def test_an_export_refuses_a_single_value_in_a_group_as_eager_does(make):
    with pytest.raises(Exception, match='Expected more than 1 value per channel'):
        torch.export.export(make(16).eval(), (torch.randn(1, 16, 1, 5),))


def test_an_export_of_fixed_size_takes_any_batch(make):
    m = make(32).eval()
    program = exported(m, torch.randn(2, 32, 6, 11), n=0)
    for n in (1, 5):
        x = torch.randn(n, 32, 6, 11)
        torch.testing.assert_close(program(x), m(x))


def test_gradients_of_each_sample_run_under_vmap(make):
    m = make(16, 'b')
    params = {k: p.detach() for k, p in m.named_parameters()}
    x = torch.randn(3, 1, 16, 6, 5)

    def loss(p, x):
        return functional_call(m, p, (x,)).square().sum()

    together = vmap(grad(loss), in_dims=(None, 0))(params, x)
    for i in range(3):
        for k, g in grad(loss)(params, x[i]).items():
            torch.testing.assert_close(together[k][i], g)
