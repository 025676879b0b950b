"""Our models do all that timm's own do, beyond what timm's tests ask of them, which test_conformance.py runs."""
import inspect
from functools import partial

import pytest
import timm
import torch
from helpers import assert_every_gradient, attentions, skeleton, slot_blocks
from timm.models import group_parameters, model_entrypoint

from timm_ela import EfficientLocalAttention
from timm_ela.models.registry import MODELS

# The kinds of block: basic, bottleneck, inverted residual, that with timm's own padding 'same', universal.
FEW = (
    'resnet18_ela_b', 'resnet50_ca', 'mobilenetv2_050_ela_s', 'tf_efficientnet_lite0_ela_t',
    'mobilenetv4_conv_small_050_ela_l')


@pytest.fixture
def build(randomize):
    def build(name, **kwargs):
        return randomize(timm.create_model(name, **{'num_classes': 5, **kwargs})).eval()

    return build


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 48)


def test_timm_lists_our_models_and_in_modules_of_our_own():
    assert {n for n in timm.list_models() if model_entrypoint(n).__module__.startswith('timm_ela.')} == set(MODELS)
    modules = {model_entrypoint(n).__module__.rpartition('.')[2] for n in MODELS}
    assert {n for module in modules for n in timm.list_models(module=module)} == set(MODELS)


def test_entry_points_look_like_those_of_timm():
    for name, model in MODELS.items():
        entrypoint = model_entrypoint(name)
        module = inspect.getmodule(entrypoint)
        assert entrypoint.__name__ == name
        assert model.base in entrypoint.__doc__ and model.layer.title in entrypoint.__doc__
        assert getattr(module, name) is entrypoint and name in module.__all__
        assert inspect.signature(entrypoint).parameters['pretrained'].default is False


def test_timms_name_of_width_1_leads_to_ours():
    with pytest.warns(UserWarning, match='name mobilenetv2_100_ela_b to current mobilenetv2_ela_b'):
        cfg = timm.create_model('mobilenetv2_100_ela_b', device='meta').pretrained_cfg
    assert (cfg['architecture'], cfg['tag']) == ('mobilenetv2_ela_b', 'graft_ra_in1k')
    assert 'mobilenetv2_100_ela_b' not in timm.list_models()


@pytest.mark.parametrize('layer', ['ca', 'se', 'gc', 'sp'])
def test_the_convolutions_of_a_layer_are_drawn_as_those_of_timms_efficientnets(layer):
    drawn = {}
    for m in attentions(timm.create_model(f'mobilenetv2_110d_{layer}')).values():
        for name, conv in m.named_modules():
            if isinstance(conv, torch.nn.Conv2d):
                std = (2 / (conv.out_channels * conv.weight[0, 0].numel())) ** 0.5
                drawn.setdefault(name, []).append(conv.weight.flatten() / std)
                assert conv.bias is None or not conv.bias.any()
    assert drawn
    for name, weights in drawn.items():
        assert abs(torch.cat(weights).std() - 1) < 0.05, name


@pytest.mark.parametrize(('name', 'slot', 'before', 'after'), [
    # act2 takes the sum, which is made in place on the layer's output
    ('resnet18_ela_b', {'attn_slot': 'inner'}, 'bn2', 'act2'),
    ('resnet50_ca', {}, 'act2', 'conv3'),
    ('resnet50_ela_s', {'attn_slot': 'output'}, 'bn3', 'act3'),
    # timm's bn2 holds the ReLU6
    ('mobilenetv2_050_se', {}, 'bn2', 'conv_pwl'),
    ('tf_efficientnet_lite0_ela_t', {}, 'bn2', 'conv_pwl'),
    # blocks without dw_mid have an Identity there
    ('mobilenetv4_conv_small_ca', {}, 'dw_mid', 'pw_proj'),
])
def test_the_layer_runs_once_in_each_block_between_its_neighbours(build, image, name, slot, before, after):
    model, came, went = build(name, **slot), {}, {}

    def note(module, args, output):
        assert module not in came
        came[module], went[module] = args[0], output

    blocks = slot_blocks(model).values()
    for block in blocks:
        for child in (block.get_submodule(before), block.se, block.get_submodule(after)):
            child.register_forward_hook(note)
    with torch.no_grad():
        model(image)
    assert len(came) == 3 * len(blocks)
    for block in blocks:
        assert came[block.se] is went[block.get_submodule(before)]
        assert came[block.get_submodule(after)] is went[block.se]


def test_an_unknown_slot_is_refused():
    with pytest.raises(ValueError, match="Unknown attn_slot 'middle': it is one of 'inner', 'output'"):
        timm.create_model('resnet18_se', attn_slot='middle')


@pytest.mark.parametrize('name', FEW)
def test_every_parameter_has_a_gradient_and_checkpointing_keeps_it(build, image, name):
    assert_every_gradient(build(name), image)


@pytest.mark.parametrize('name', ['resnet18_ela_b', 'resnet50_ela_s'])
def test_block_args_are_merged_and_win(name):
    shapes = {k: v.shape for k, v in skeleton(name).state_dict().items()}
    merged = timm.create_model(name, block_args={}, device='meta')
    assert {k: v.shape for k, v in merged.state_dict().items()} == shapes
    layer = partial(EfficientLocalAttention, variant='l', kernel_size=3)
    model = timm.create_model(name, block_args={'attn_layer': layer}, device='meta')
    assert {m.conv.weight.shape[1:] for m in attentions(model).values()} == {(8, 3)}


@pytest.mark.parametrize('coarse', [False, True])
@pytest.mark.parametrize('name', FEW)
def test_group_matcher_puts_the_layer_with_its_block(name, coarse):
    model = skeleton(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {k for k, _ in model.named_parameters()}
    for k in groups:
        if '.se.' in k:
            block = k.partition('.se.')[0]
            others = [other for other in groups if other.startswith(f'{block}.') and '.se.' not in other]
            assert {groups[other] for other in others} == {groups[k]}


def test_resnet50_se_in_the_output_slot_is_timms_seresnet50(randomize, image):
    theirs = randomize(timm.create_model('seresnet50')).eval()
    ours = timm.create_model('resnet50_se', attn_slot='output').eval()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(image), theirs(image))


@pytest.mark.parametrize('name', ['resnet50_ela_b', 'mobilenetv2_050_ca', 'mobilenetv4_conv_small_050_cbam'])
def test_zero_init_attn_trains_from_what_the_plain_model_computes(name, image):
    model = timm.create_model(name, zero_init_attn=True).train()
    plain = timm.create_model(MODELS[name].base).train()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if '.se.' not in k})
    torch.testing.assert_close(model(image), plain(image), rtol=1e-2, atol=1e-2)
    # as published, gates vary with noise
    with pytest.raises(AssertionError):
        torch.testing.assert_close(timm.create_model(name).train()(image), plain(image), rtol=1e-2, atol=1e-2)


def test_zero_init_attn_leaves_trained_weights():
    weights = {'state_dict': timm.create_model('resnet18_ela_b').state_dict()}
    model = timm.create_model('resnet18_ela_b', zero_init_attn=True, pretrained=True, pretrained_cfg_overlay=weights)
    assert torch.equal(model.layer1[0].se.gn.weight, weights['state_dict']['layer1.0.se.gn.weight'])


@pytest.mark.parametrize('name', ['resnet18_triplet', 'resnet18_sa', 'elsa_swin_tiny'])
def test_zero_init_attn_needs_a_neutral_point(name):
    with pytest.raises(ValueError, match=f'zero_init_attn is not for {name}'):
        timm.create_model(name, zero_init_attn=True, device='meta')


def test_a_saved_model_keeps_its_slot(build, image, tmp_path):
    model = build('resnet50_ela_b', attn_slot='output')
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(image), model(image))


@pytest.fixture
def build_shallow(build):
    """Few blocks, where the time goes into tracing."""
    def build_shallow(name):
        if name.startswith('resnet'):
            return build(name, layers=(1, 1, 1, 1))
        model = build(name)
        model.prune_intermediate_layers([1])  # keeps what the second feature map needs, without a head
        model.reset_classifier(5, 'avg')
        return model

    return build_shallow


@pytest.mark.parametrize('name', FEW[:2])
def test_compiles_as_one_graph(build_shallow, image, name):
    model = build_shallow(name)
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(image), model(image))


@pytest.mark.parametrize('name', FEW)
def test_exports_with_any_height_and_width(build_shallow, image, name):
    model = build_shallow(name)
    sides = {i: torch.export.Dim(side, min=33, max=512) for i, side in ((2, 'h'), (3, 'w'))}
    program = torch.export.export(model, (image,), dynamic_shapes=(sides,))
    targets = [n.target for n in program.graph.nodes if n.op == 'call_function']
    # the program loads where timm_ela is not installed
    assert 'timm_ela' not in {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)}
    for x in (image, torch.randn(2, 3, 41, 80)):
        torch.testing.assert_close(program.module()(x), model(x))
