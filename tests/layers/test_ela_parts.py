"""What is put on a module, on its convolution or on its GroupNorm takes effect, as it does on any layer's."""
import copy

import pytest
import torch
from helpers import WAYS, exported
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune

from timm_ela import EfficientLocalAttention


class LowRank(nn.Module):
    """What LoRA puts in the place of a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.down, self.up = nn.Conv1d(32, 4, 1, bias=False), nn.Conv1d(4, 32, 1, bias=False)

    def forward(self, z):
        return self.base_layer(z) + self.up(self.down(z))


def offloaded(m):
    """What accelerate's offload does to every module."""
    forward = m.gn.forward
    m.gn.forward = lambda z: forward(z) + 1


PUT_ON = {
    'dense': lambda m: setattr(m, 'conv', nn.Conv1d(32, 32, 3, padding=1)),
    'set_bias': lambda m: setattr(m.conv, 'bias', nn.Parameter(torch.randn(32))),
    'set_dilation': lambda m: vars(m.conv).update(dilation=(2,), padding=(6,)),
    'set_padding_mode': lambda m: nn.Conv1d.__init__(
        m.conv, 32, 32, 7, padding=3, groups=32, bias=False, padding_mode='circular'),
    'set_norm_without_weights': lambda m: m.gn.__init__(8, 32, affine=False),
    'batch_norm': lambda m: setattr(m, 'gn', nn.BatchNorm1d(32)),
    'other_eps': lambda m: setattr(m.gn, 'eps', 10.0),
    'other_groups': lambda m: setattr(m.gn, 'num_groups', 4),
    'low_rank': lambda m: setattr(m, 'conv', LowRank(m.conv)),
    'pruned': lambda m: prune.l1_unstructured(m.conv, 'weight', 0.5),
    'weight_norm': lambda m: parametrizations.weight_norm(m.conv),
    'offloaded': offloaded,
}


@pytest.fixture(params=PUT_ON.values(), ids=PUT_ON)
def changed(request, randomize):
    m = EfficientLocalAttention(32)
    request.param(m)
    return randomize(m)


def plainly(part, z):
    """The part as it is called, ours by the forward of PyTorch's class."""
    for ours in (nn.Conv1d, nn.GroupNorm):
        if isinstance(part, ours) and 'forward' not in vars(part) and not part._forward_pre_hooks:
            return ours.forward(part, z)
    return part(z)


def formula(m, x):
    a_h, a_w = (plainly(m.gn, plainly(m.conv, z)).sigmoid() for z in (x.mean(3), x.mean(2)))
    return x * a_h.unsqueeze(3) * a_w.unsqueeze(2)


def test_it_computes_with_its_parts_as_they_are_called(changed, memory_format):
    x = torch.randn(2, 32, 6, 9).to(memory_format=memory_format).requires_grad_()
    for _ in range(2):  # what was computed in the first step must not serve in the second
        y, expected = changed(x), formula(changed, x)
        torch.testing.assert_close(y, expected)
        a_h, a_w = changed.gates(x)
        torch.testing.assert_close(x * a_h.unsqueeze(3) * a_w.unsqueeze(2), y)
        leaves, upstream = [t for t in (x, *changed.parameters()) if t.requires_grad], torch.randn_like(x)
        grads = (torch.autograd.grad(t, leaves, upstream, retain_graph=True) for t in (y, expected))
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for p in changed.parameters():
                p.mul_(2)
            changed.eval()
            for either in (x, x[..., :6]):  # the second is square
                torch.testing.assert_close(changed(either), formula(changed, either))


@pytest.mark.parametrize('way', [WAYS['compiled'], WAYS['traced'], WAYS['symbolically_traced'], exported])
@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning', 'ignore::torch.jit.TracerWarning')
def test_it_can_be_transformed_with_them(changed, way):
    x = torch.randn(2, 32, 6, 9)
    torch.testing.assert_close(way(changed.eval(), x)(x), formula(changed, x))


@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
@pytest.mark.parametrize('name', [
    'dense', 'set_bias', 'set_dilation', 'set_norm_without_weights', 'other_eps'])
def test_it_can_be_scripted_with_them(name, make):
    m, x = make(32), torch.randn(2, 32, 6, 9)
    PUT_ON[name](m)
    torch.testing.assert_close(torch.jit.script(m)(x), formula(m, x))


@pytest.mark.parametrize('part', ['conv', 'gn'])
def test_hooks_on_its_parts_see_both_strips_and_may_change_them(part):
    m, x, seen = EfficientLocalAttention(32), torch.randn(2, 32, 6, 9), []
    m.get_submodule(part).register_forward_pre_hook(lambda _, inputs: seen.append([*inputs[0].shape]))
    m(x)
    m.eval()(x)
    # square: both are one batch, but not in training, where a part may depend on the whole batch
    m(x[..., :6])
    m.train()(x[..., :6])
    assert seen == [*2 * [[2, 32, 6], [2, 32, 9]], [4, 32, 6], [2, 32, 6], [2, 32, 6]]
    m.get_submodule(part).register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    torch.testing.assert_close(m(x), x / 4)  # sigmoid(0) twice: GroupNorm of zeros is its shift, zero


MODES = {'grad': torch.enable_grad, 'no_grad': torch.no_grad, 'inference': torch.inference_mode}


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('mode', MODES.values(), ids=MODES)
@pytest.mark.parametrize('register', [
    nn.Module.register_forward_hook, lambda m, hook: register_module_forward_hook(hook),
    nn.Module.register_forward_pre_hook, lambda m, hook: register_module_forward_pre_hook(hook),
], ids=['own', 'global', 'own_before', 'global_before'])
def test_a_hook_sees_the_values_of_the_formula(make, register, mode, inplace, memory_format):
    m, seen = make(32, inplace=inplace).eval(), {}
    handle = register(m, lambda module, args, *output: seen.update({module: (args[0], *output)}))
    with mode():
        x = torch.randn(2, 32, 6, 9).to(memory_format=memory_format)
        before = x.clone()
        y = m(x)
        handle.remove()
        assert torch.equal(x, before)
        torch.testing.assert_close(y, formula(m, before))
        assert seen[m][0] is x and all(output is y for output in seen[m][1:])
        for part in seen.keys() - {m}:
            for output in seen[part][1:]:
                torch.testing.assert_close(output, plainly(part, seen[part][0]))
    assert len(seen) in (1, 3)  # the module, or its parts as well


def test_backward_hooks_see_the_gradients_of_the_formula(make):
    m, seen, x = make(32), {}, torch.randn(2, 32, 6, 9).requires_grad_()
    for name, part in m.named_modules():
        part.register_full_backward_hook(lambda _, *grads, name=name: seen.setdefault(name, []).append(grads))
    upstream = torch.randn_like(x)
    m(x).backward(upstream)
    x_grad, x.grad = x.grad, None
    formula(copy.deepcopy(m), x).backward(upstream)
    torch.testing.assert_close(x_grad, x.grad)
    assert {name: len(calls) for name, calls in seen.items()} == {'': 1, 'conv': 2, 'gn': 2}
    torch.testing.assert_close(seen[''][0], ((x.grad,), (upstream,)))
