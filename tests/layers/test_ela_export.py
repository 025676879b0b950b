"""What is compiled, and what is exported at a fixed size, are other writings of the same formula."""
import pytest
import torch

from timm_ela.layers import ela_functional


@pytest.mark.parametrize('shape', [(2, 32, 7, 13), (1, 32, 13, 7), (3, 32, 2, 3), (2, 32, 1, 5), (2, 48, 9, 9)])
@pytest.mark.parametrize('variant', ['b', 's'])
@pytest.mark.parametrize('writing', ['_ela_compiled', '_ela_exported'])
def test_another_writing_equals_the_formula_with_every_gradient(make, writing, variant, shape, memory_format):
    m = make(shape[1], variant, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=memory_format)
    upstream = torch.randn_like(x)

    def gradients(f):
        leaves = [t.detach().requires_grad_() for t in (x, m.conv.weight, m.gn.weight, m.gn.bias)]
        y = f(*leaves, m.gn.num_groups, 1e-3)
        return [y, *torch.autograd.grad(y, leaves, upstream)]

    found, expected = (gradients(f) for f in (getattr(ela_functional, writing), ela_functional.ela_reference))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('shape', [(1, 16, 1, 5), (2, 16, 1, 5)], ids=str)
def test_an_export_at_length_1_does_what_eager_does(make, shape):
    m, x = make(16).eval(), torch.randn(shape)  # 16 groups of one channel
    if shape[0] == 1:
        with pytest.raises(Exception, match='Expected more than 1 value per channel'):
            torch.export.export(m, (x,))
    else:
        torch.testing.assert_close(torch.export.export(m, (x,)).module()(x), m(x))


@pytest.mark.parametrize('size', [(6, 11), (7, 7)], ids=str)
def test_an_export_of_fixed_size_takes_any_batch(make, size):
    m, batch = make(32).eval(), torch.export.Dim('batch')
    program = torch.export.export(m, (torch.randn(2, 32, *size),), dynamic_shapes=({0: batch},))
    for n in (1, 5):
        x = torch.randn(n, 32, *size)
        torch.testing.assert_close(program.module()(x), m(x))
