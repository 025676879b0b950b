"""In place, the layer gives the same, and never writes into what others may read."""
import copy
import re
from functools import partial

import pytest
import timm
import torch
from helpers import FullSize, attentions, compiled, exported

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


def inner_map(model, x):
    """The map before the second layer's gate, as a hook there keeps it, and as it was."""
    name, layer = list(attentions(model).items())[1]
    block, kept = model.get_submodule(name.rpartition('.')[0]), []
    before = block.bn2 if hasattr(block, 'conv_pw') else block.bn2 if not hasattr(block, 'conv3') else block.act2
    before.register_forward_hook(lambda _, args, output: kept.extend((output, output.clone())))
    with torch.no_grad():
        model.eval()(x)
    return kept


def switch_off(name):
    model = timm.create_model(name)
    for m in model.modules():
        m.inplace = False
    return model


WAYS_OFF = {
    'inplace': partial(switch_off, 'mobilenetv2_050_ela_b'),
    'block_args': lambda: timm.create_model(
        'resnet50_ela_b', block_args=dict(attn_layer=partial(EfficientLocalAttention, variant='b'))),
}


@pytest.mark.parametrize('create', WAYS_OFF.values(), ids=WAYS_OFF)
def test_in_place_can_be_switched_off_for_a_model(create):
    model, x = create(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(*inner_map(model, x))
    name = model.pretrained_cfg['architecture']
    with pytest.raises(AssertionError):  # otherwise, a reference to a map within a block sees it gated
        torch.testing.assert_close(*inner_map(timm.create_model(name), x))


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
