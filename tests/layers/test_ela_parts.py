"""What is put on a module's convolution or GroupNorm takes effect, as it does on any layer's."""
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from timm_ela import EfficientLocalAttention


def wrap(m):
    m.conv = nn.Sequential(m.conv)


def replace_forward(m):
    """What accelerate's offload does to every module."""
    forward = m.gn.forward
    m.gn.forward = lambda z: forward(z) + 1


PUT_ON = {
    'pruned': lambda m: prune.l1_unstructured(m.conv, 'weight', 0.5),
    'parametrized': lambda m: parametrizations.weight_norm(m.conv),
    'wrapped': wrap,
    'replaced_forward': replace_forward,
    'other_eps': lambda m: setattr(m.gn, 'eps', 10.0),
}


def called(m, x):
    a_h, a_w = (m.gn(m.conv(z)).sigmoid() for z in (x.mean(3), x.mean(2)))
    return x * a_h.unsqueeze(3) * a_w.unsqueeze(2)


@pytest.fixture(params=PUT_ON.values(), ids=PUT_ON)
def changed(request):
    m = EfficientLocalAttention(32)
    request.param(m)
    return m


def test_it_computes_with_its_parts_as_they_are_called(changed):
    x = torch.randn(2, 32, 6, 9)
    for _ in range(2):  # what was computed in the first step must not serve in the second
        y = changed(x)
        torch.testing.assert_close(y, called(changed, x))
        a_h, a_w = changed.gates(x)
        torch.testing.assert_close(x * a_h.unsqueeze(3) * a_w.unsqueeze(2), y)
        y.sum().backward()
        with torch.no_grad():
            for p in changed.parameters():
                p.mul_(2)


@pytest.mark.parametrize('transform', [
    lambda m, x: torch.compile(m, backend='eager', fullgraph=True),
    lambda m, x: torch.jit.trace(m, x),
    lambda m, x: torch.fx.symbolic_trace(m),
    lambda m, x: torch.export.export(m, (x,)).module(),
], ids=['compiled', 'traced', 'symbolically_traced', 'exported'])
@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
def test_it_can_be_transformed_with_them(changed, transform):
    x = torch.randn(2, 32, 6, 9)
    torch.testing.assert_close(transform(changed, x)(x), called(changed, x))


@pytest.mark.parametrize('part', ['conv', 'gn'])
def test_hooks_on_its_parts_see_both_strips_and_may_change_them(part):
    m, x, lengths = EfficientLocalAttention(32), torch.randn(2, 32, 6, 9), []
    m.get_submodule(part).register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[2]))
    m(x)
    assert lengths == [6, 9]
    m.get_submodule(part).register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    torch.testing.assert_close(m(x), x / 4)  # sigmoid(0) twice: GroupNorm of zeros is its shift, zero
