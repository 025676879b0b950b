"""The forty models are timm's own ResNets and MobileNetV2s with ELA in its slot, and take every option theirs take."""
import inspect
from functools import cache, partial

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import group_parameters, model_entrypoint
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from timm_ela import EfficientLocalAttention

RESNETS = ('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152')
MOBILENETS = ('mobilenetv2_050', 'mobilenetv2_100', 'mobilenetv2_110d', 'mobilenetv2_120d', 'mobilenetv2_140')
SIZES = {'t': (5, 1), 'b': (7, 1), 's': (5, 8), 'l': (7, 8)}  # kernel size, channels per group
BASES = {
    f'{base.removesuffix("_100")}_ela_{variant}': (base, variant) for base in RESNETS + MOBILENETS for variant in SIZES}
FEW = ('resnet18_ela_b', 'resnet50_ela_s', 'mobilenetv2_050_ela_t')  # the three kinds of block

# 1000 classes: plain, then what each variant adds
PARAMETERS = {
    'resnet18': (11_689_512, {'t': 13_440, 'b': 17_280, 's': 80_640, 'l': 111_360}),
    'resnet50': (25_557_032, {'t': 26_432, 'b': 33_984, 's': 158_592, 'l': 219_008}),
    'resnet101': (44_549_160, {'t': 56_896, 'b': 73_152, 's': 341_376, 'l': 471_424}),
    'mobilenetv2_100': (3_504_872, {'t': 49_728, 'b': 63_936, 's': 298_368, 'l': 412_032}),
}


@cache
def skeleton(name):
    return timm.create_model(name, device='meta')


def attentions(model):
    return [m for m in model.modules() if isinstance(m, EfficientLocalAttention)]


def count(model):
    return sum(p.numel() for p in model.parameters())


def slot_widths(plain):
    """Width of ELA's slot in each block of a plain model that has one."""
    for m in plain.modules():
        if isinstance(m, BasicBlock):
            yield m.bn2.num_features
        elif isinstance(m, Bottleneck):
            yield m.conv3.in_channels
        elif isinstance(m, InvertedResidual):  # the blocks that expand; DepthwiseSeparableConv is another class
            yield m.conv_pwl.in_channels


@pytest.fixture
def build(randomize):
    def build(name, **kwargs):
        return randomize(timm.create_model(name, **{'num_classes': 5, **kwargs})).eval()

    return build


@pytest.fixture
def image():
    return torch.randn(2, 3, 64, 48)


def test_there_are_forty_models_and_timm_lists_them():
    assert len(BASES) == 40
    ours = {n for n in timm.list_models() if model_entrypoint(n).__module__.startswith('timm_ela.')}
    assert {n for n in ours if '_ela_' in n} == set(BASES)
    assert set(timm.list_models('*_ela_[tbsl]')) == set(BASES)


@pytest.mark.parametrize('family', ['resnet', 'mobilenetv2'])
def test_modules_of_timm_keep_their_lists_and_ours_have_their_own(family):
    assert set(timm.list_models('*_ela_*', module=f'attn_{family}')) == {n for n in BASES if n.startswith(family)}
    for theirs in ('resnet', 'efficientnet', 'mobilenetv3', 'sknet'):
        assert not set(timm.list_models(module=theirs)) & set(BASES)


@pytest.mark.parametrize('name', BASES)
def test_entry_points_look_like_those_of_timm(name):
    base, variant = BASES[name]
    entrypoint = model_entrypoint(name)
    assert entrypoint.__name__ == name
    assert base in entrypoint.__doc__ and f'ELA-{variant.upper()}' in entrypoint.__doc__
    module = inspect.getmodule(entrypoint)
    assert module.__name__.startswith('timm_ela.attn_')
    assert getattr(module, name) is entrypoint and name in module.__all__
    assert inspect.signature(entrypoint).parameters['pretrained'].default is False


@pytest.mark.parametrize('name', BASES)
def test_parameters_are_the_plain_ones_plus_the_formula(name):
    base, variant = BASES[name]
    kernel_size, group_size = SIZES[variant]
    plain, model = skeleton(base), skeleton(name)
    added = sum(c * group_size * kernel_size + 2 * c for c in slot_widths(plain))
    assert count(model) == count(plain) + added
    if base in PARAMETERS:
        assert (count(plain), added) == (PARAMETERS[base][0], PARAMETERS[base][1][variant])


@pytest.mark.parametrize('name', BASES)
def test_plain_weights_keep_names_order_and_shapes_and_ela_is_called_se(name):
    plain, model = skeleton(BASES[name][0]).state_dict(), skeleton(name).state_dict()
    assert [(k, v.shape) for k, v in model.items() if '.se.' not in k] == [(k, v.shape) for k, v in plain.items()]
    own = [k for k in model if '.se.' in k]
    assert {k.partition('.se.')[2] for k in own} == {'conv.weight', 'gn.weight', 'gn.bias'}
    assert len(own) == 3 * len(attentions(skeleton(name)))


@pytest.mark.parametrize('name', BASES)
def test_every_block_that_has_the_slot_has_ela_of_its_width_and_variant(name):
    base, variant = BASES[name]
    kernel_size, group_size = SIZES[variant]
    assert [(*m.conv.weight.shape, m.gn.num_channels) for m in attentions(skeleton(name))] == \
        [(c, group_size, kernel_size, c) for c in slot_widths(skeleton(base))]


@pytest.mark.parametrize(('name', 'blocks'), [
    ('resnet18_ela_b', 8), ('resnet34_ela_b', 16), ('resnet50_ela_b', 16), ('resnet101_ela_b', 33),
    ('resnet152_ela_b', 50), ('mobilenetv2_ela_b', 16), ('mobilenetv2_140_ela_b', 16)])
def test_number_of_attention_modules(name, blocks):
    assert len(attentions(skeleton(name))) == blocks


@pytest.mark.parametrize(('name', 'before', 'after'), [
    ('resnet18_ela_b', 'bn2', 'act2'),  # act2 takes the sum, which is made in place on ELA's output
    ('resnet50_ela_s', 'act2', 'conv3'),
    ('mobilenetv2_050_ela_t', 'bn2', 'conv_pwl'),  # timm's bn2 holds the ReLU6
])
def test_ela_runs_once_in_each_block_between_its_neighbours(build, image, name, before, after):
    model, came, went = build(name), {}, {}

    def note(module, args, output):
        assert module not in came
        came[module], went[module] = args[0], output

    blocks = [m for m in model.modules() if isinstance(getattr(m, 'se', None), EfficientLocalAttention)]
    for block in blocks:
        for child in (block.get_submodule(before), block.se, block.get_submodule(after)):
            child.register_forward_hook(note)
    model(image)
    assert len(came) == 3 * len(blocks) and len(blocks) == len(attentions(model))
    for block in blocks:
        assert came[block.se] is went[block.get_submodule(before)]
        assert came[block.get_submodule(after)] is went[block.se]


@pytest.mark.parametrize('name', FEW)
def test_logits_depend_on_the_gates(build, image, name):
    model = build(name)
    logits = model(image)
    for m in attentions(model):
        nn.init.zeros_(m.gn.weight)
    assert (model(image) - logits).abs().max() > 1e-2 * logits.abs().max()


@pytest.mark.parametrize('name', FEW)
def test_classes_and_channels_can_be_chosen_and_reset(build, name):
    model = build(name, num_classes=7, in_chans=1, global_pool='max')
    x = torch.randn(2, 1, 64, 48)
    assert model(x).shape == (2, 7)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


@pytest.mark.parametrize('name', FEW)
def test_forward_is_features_then_head(build, image, name):
    model = build(name)
    features = model.forward_features(image)
    assert features.shape == (2, model.num_features, 2, 2)
    assert torch.equal(model.forward_head(features), model(image))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize('kwargs', [{}, {'out_indices': (1, 3)}, {'out_indices': (2, 4), 'feature_cls': 'getter'}],
                         ids=['all', 'some', 'getter'])
@pytest.mark.parametrize('name', FEW)
def test_features_only_gives_the_intermediates_of_the_whole_model(build, image, name, kwargs):
    whole = build(name)
    backbone = timm.create_model(name, features_only=True, **kwargs).eval()
    state = whole.state_dict()
    if 'feature_cls' in kwargs:
        state = {f'model.{k}': v for k, v in state.items()}
    backbone.load_state_dict(state, strict=False)
    indices = kwargs.get('out_indices', (0, 1, 2, 3, 4))
    final, expected = whole.forward_intermediates(image, indices=list(indices))
    features = backbone(image)
    info = timm.create_model(BASES[name][0], features_only=True, device='meta', **kwargs).feature_info
    assert backbone.feature_info.channels() == info.channels() == [f.shape[1] for f in features]
    assert backbone.feature_info.reduction() == info.reduction()
    for got, want in zip(features, expected, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(final, whole.forward_features(image))


@pytest.mark.parametrize('stride', [8, 16])
@pytest.mark.parametrize('name', FEW)
def test_output_stride(build, image, name, stride):
    model = build(name, output_stride=stride)
    assert model.forward_features(image).shape[2:] == (64 // stride, 48 // stride)
    assert len(attentions(model)) == len(attentions(skeleton(name)))


@pytest.mark.parametrize('name', FEW)
def test_drop_path_reaches_the_blocks_of_the_plain_model(build, image, name):
    model, plain = (timm.create_model(n, drop_path_rate=0.3, device='meta') for n in (name, BASES[name][0]))
    rates = [[(k, m.drop_prob) for k, m in net.named_modules() if isinstance(m, DropPath)] for net in (model, plain)]
    assert rates[0] == rates[1] and rates[0]
    model = build(name, drop_path_rate=0.5).train()
    assert not torch.equal(model(image), model(image))


@pytest.mark.parametrize('name', FEW)
def test_gradients_with_checkpointing_are_the_same(build, image, name):
    model = build(name).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    for k, g in gradients[0].items():
        assert g.abs().max() > 0, k
        torch.testing.assert_close(gradients[1][k], g, msg=lambda m, k=k: f'{k}: {m}')


@pytest.mark.parametrize('coarse', [False, True])
@pytest.mark.parametrize('name', FEW)
def test_group_matcher_puts_ela_with_its_block(name, coarse):
    model = skeleton(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert set(groups) == {k for k, _ in model.named_parameters()}
    for k in groups:
        if '.se.' in k:
            block = k.partition('.se.')[0]
            assert {groups[other] for other in groups if other.startswith(f'{block}.conv')} == {groups[k]}


@pytest.mark.parametrize('name', FEW[:2])
def test_block_args_are_merged_and_win(name):
    assert len(attentions(timm.create_model(name, block_args={}, device='meta'))) == len(attentions(skeleton(name)))
    layer = partial(EfficientLocalAttention, variant='l', kernel_size=3)
    model = timm.create_model(name, block_args={'attn_layer': layer}, device='meta')
    assert {m.conv.weight.shape[1:] for m in attentions(model)} == {(8, 3)}


@pytest.mark.parametrize('name', FEW)
def test_activation_can_be_chosen(name):
    model = timm.create_model(name, act_layer='silu', device='meta')
    kinds = {type(m) for m in model.modules()}
    assert nn.SiLU in kinds and not kinds & {nn.ReLU, nn.ReLU6}


def test_batch_norm_settings_of_mobilenetv2():
    model = timm.create_model('mobilenetv2_ela_s', bn_momentum=0.3, bn_eps=1e-2, device='meta')
    assert {(m.momentum, m.eps) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {(0.3, 1e-2)}


@pytest.mark.parametrize('name', FEW)
def test_dtype_reaches_every_parameter(name):
    assert {p.dtype for p in timm.create_model(name, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.fixture
def build_shallow(build):
    """Few blocks, where the time goes into tracing."""
    def build_shallow(name, **kwargs):
        if name.startswith('resnet'):
            return build(name, layers=(1, 1, 1, 1), **kwargs)
        rows = [['ds_r1_k3_s1_c16'], ['ir_r2_k3_s2_e6_c24_se0.25']]
        return build(name, block_args=decode_arch_def(rows), **kwargs)

    return build_shallow


@pytest.mark.parametrize('name', FEW)
def test_compiles_as_one_graph(build_shallow, image, name):
    model = build_shallow(name)
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(image), model(image))


@pytest.mark.parametrize('name', FEW)
@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
def test_scripts(build_shallow, image, name):
    model = build_shallow(name, scriptable=True)
    torch.testing.assert_close(torch.jit.script(model)(image), model(image))


@pytest.mark.parametrize('name', FEW)
def test_exports_with_any_height_and_width_to_a_program_and_to_onnx(build_shallow, image, name, tmp_path):
    model = build_shallow(name)
    assert attentions(model)
    sides = {i: torch.export.Dim(side, min=33, max=512) for i, side in ((2, 'h'), (3, 'w'))}
    program = torch.export.export(model, (image,), dynamic_shapes=(sides,))
    targets = [n.target for n in program.graph.nodes if n.op == 'call_function']
    assert {t.namespace for t in targets if isinstance(t, torch._ops.OpOverload)} == {'aten'}  # loads without us
    module, images = program.module(), (image, torch.randn(2, 3, 41, 80))
    for x in images:
        torch.testing.assert_close(module(x), model(x))

    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    torch.onnx.export(program, (), tmp_path / 'model.onnx', dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    for x in images:
        logits, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-4, atol=1e-4)
