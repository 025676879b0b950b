"""In place, the layer gives the same, and never writes into what others may read."""
import copy
import re

import pytest
import timm
import torch
from helpers import FullSize, compiled, exported

from timm_ela import EfficientLocalAttention


def out_of_place(m):
    same = copy.deepcopy(m)
    same.inplace = False
    return same


def recorded(m, x):
    with torch.enable_grad():
        return m(x).detach()  # its parameters require gradients


def put_around(m, x):
    forward = m.forward
    m.forward = lambda x: forward(x)
    return m(x)


NEVER_IN_PLACE = {
    'training': lambda m, x: m.train()(x),
    'default': lambda m, x: out_of_place(m)(x),
    'view': lambda m, x: m(x[:]),
    'channels': lambda m, x: m(torch.cat([x, x], 1).chunk(2, 1)[0]),
    'requires_grad': lambda m, x: m(x.requires_grad_()),
    'recorded': recorded,
    'forward_put_around': put_around,
    'traced_by_fx': lambda m, x: torch.fx.symbolic_trace(m)(x),
    'compiled': lambda m, x: compiled(m, x)(x),
    'exported': lambda m, x: exported(m, x)(x),
}


@pytest.mark.parametrize('call', NEVER_IN_PLACE.values(), ids=NEVER_IN_PLACE)
def test_what_others_may_read_is_never_written_to(make, call, memory_format):
    m, x = make(32, inplace=True).eval(), torch.randn(2, 32, 6, 11).to(memory_format=memory_format)
    before, expected = x.clone(), out_of_place(m)(x).detach()
    with torch.no_grad():
        y = call(m, x)
    assert torch.equal(x, before)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_in_place_it_allocates_nothing_of_full_size_and_gives_the_same_bits(make, mode, memory_format):
    m = make(32, inplace=True).eval()
    x = torch.randn(2, 32, 6, 11).to(memory_format=memory_format)
    with mode():
        x, expected = x.clone(), out_of_place(m)(x)
        with FullSize(x.numel()) as full:
            y = m(x)
    assert y is x and not full.count
    assert torch.equal(y, expected)


def test_in_place_can_be_switched_off_for_a_model():
    model, x = timm.create_model('mobilenetv2_050_ela_b').eval(), torch.randn(1, 3, 64, 64)
    kept = []
    # the norm before a layer
    model.blocks[1][0].bn2.register_forward_hook(lambda _, args, output: kept.append((output, output.clone())))
    with torch.no_grad():
        model(x)
        for m in model.modules():
            m.inplace = False
        model(x)
    (gated, before), (now, then) = kept
    assert not torch.equal(gated, before) and torch.equal(now, then)


@pytest.mark.parametrize('feature_cls', [None, 'getter', 'hook', 'fx'])
@pytest.mark.parametrize('name', ['mobilenetv2_050_ela_b', 'resnet18_ela_b', 'resnet50_ela_b'])
def test_features_are_the_same_in_place(name, feature_cls):
    kwargs = {'feature_cls': feature_cls} if feature_cls else {}
    features, whole = timm.create_model(name, features_only=True, **kwargs).eval(), timm.create_model(name).eval()
    state = {re.sub('^(model|body|graph_module)[.]', '', k): v for k, v in features.state_dict().items()}
    assert any('.se.gn.' in k for k in state)
    assert not whole.load_state_dict(state, strict=False).unexpected_keys
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, in_place = features(x), whole.forward_intermediates(x, intermediates_only=True)
        layers = [m for m in whole.modules() if isinstance(m, EfficientLocalAttention)]
        assert layers and all(m.inplace for m in layers)
        for m in layers:
            m.inplace = False
        expected = whole.forward_intermediates(x, intermediates_only=True)
    for a, b, c in zip(found, in_place, expected, strict=True):
        assert torch.equal(a, c) and torch.equal(b, c)
