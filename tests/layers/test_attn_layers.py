"""Coordinate Attention, ECA, SE and CBAM beside ELA: the papers' formulas, both slots, what timm's models can do."""
import math
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg
from timm.models._efficientnet_blocks import InvertedResidual
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from timm_ela.layers import create_attn_layer
from timm_ela.registry import MODELS

LAYERS = ('ela_t', 'ela_b', 'ela_s', 'ela_l', 'ca', 'eca', 'se', 'cbam')
RIVALS = LAYERS[4:]
SLOTS = ('inner', 'output')
# Parameters with 1000 classes in the default slot: of the plain model, then what each of LAYERS adds.
PARAMETERS = {
    'resnet18': (11_689_512, 13_440, 17_280, 80_640, 111_360, 74_736, 36, 89_080, 87_840),
    'resnet34': (21_797_672, 26_432, 33_984, 158_592, 219_008, 135_496, 74, 161_196, 158_784),
    'resnet50': (25_557_032, 26_432, 33_984, 158_592, 219_008, 135_496, 74, 161_196, 158_784),
    'resnet101': (44_549_160, 56_896, 73_152, 341_376, 471_424, 249_056, 159, 305_084, 299_748),
    'resnet152': (60_192_808, 83_776, 107_712, 502_656, 694_144, 349_304, 244, 423_852, 416_136),
    'mobilenetv2': (3_504_872, 49_728, 63_936, 298_368, 412_032, 445_776, 78, 571_452, 565_504),
    'mobilenetv2_050': (1_968_680, 25_200, 32_400, 151_200, 208_800, 126_888, 68, 145_809, 143_584),
    'mobilenetv2_110d': (4_516_520, 71_232, 91_584, 427_392, 590_208, 697_155, 103, 907_068, 898_356),
    'mobilenetv2_120d': (5_831_144, 97_440, 125_280, 584_640, 807_360, 1_038_621, 125, 1_351_686, 1_339_396),
    'mobilenetv2_140': (6_108_776, 69_888, 89_856, 419_328, 579_072, 849_924, 80, 1_119_984, 1_110_976),
}
# The module after which the layer is.
AFTER = {
    BasicBlock: {'inner': 'bn2', 'output': 'bn2'},
    Bottleneck: {'inner': 'act2', 'output': 'bn3'},
    InvertedResidual: {'inner': 'bn2', 'output': 'bn3'},  # timm's batch norms hold the activation
}


def plain_name(backbone: str) -> str:
    return 'mobilenetv2_100' if backbone == 'mobilenetv2' else backbone


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, tuple(AFTER))]


def widths(block: nn.Module) -> dict[str, int]:
    """Channels of each slot."""
    last = next(getattr(block, k) for k in ('conv_pwl', 'conv3', 'conv2') if hasattr(block, k))
    inner = last.out_channels if isinstance(block, BasicBlock) else last.in_channels
    return {'inner': inner, 'output': last.out_channels}


def randomise(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.2)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0, 0.2)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    return model


def small(name: str, **kwargs) -> nn.Module:
    """A ResNet of four narrow blocks, or a MobileNetV2 of three blocks, with random batch norm statistics."""
    rows = decode_arch_def([['ds_r1_k3_s1_c16'], ['ir_r2_k3_s2_e6_c24']])
    few = dict(layers=(1, 1, 1, 1), channels=(32, 32, 64, 64)) if name.startswith('resnet') else dict(block_args=rows)
    return randomise(timm.create_model(name, num_classes=7, **few, **kwargs))


# The papers' formulas. x (N, C, H, W); p: the layer's parameters and buffers, by their names in timm.


def ela(x, p, training, groups):
    def gate(z):  # (N, C, L): one convolution and one group norm for both strips
        n, c, length = z.shape
        width, kernel = p['conv.weight'].shape[1:]
        z = F.pad(z, (kernel // 2, kernel // 2)).unfold(2, kernel, 1).reshape(n, -1, width, length, kernel)
        z = torch.einsum('ngilk,goik->ngol', z, p['conv.weight'].reshape(-1, width, width, kernel))
        z = z.reshape(n, groups, -1)
        z = (z - z.mean(2, keepdim=True)) / (z.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        z = z.reshape(n, c, length) * p['gn.weight'][:, None] + p['gn.bias'][:, None]
        return 1 / (1 + (-z).exp())
    return x * gate(x.mean(3))[:, :, :, None] * gate(x.mean(2))[:, :, None, :]


def linear(z, p, name):  # a 1x1 convolution over (N, C, L)
    z = torch.einsum('ncl,oc->nol', z, p[f'{name}.weight'].flatten(1))
    return z + p[f'{name}.bias'][:, None] if f'{name}.bias' in p else z


def batch_norm(z, p, name, training):  # (N, C, L)
    mean, var = p[f'{name}.running_mean'], p[f'{name}.running_var']
    if training:
        mean, var = z.mean((0, 2)), z.var((0, 2), unbiased=False)
    z = (z - mean[:, None]) / (var[:, None] + 1e-5).sqrt()
    return z * p[f'{name}.weight'][:, None] + p[f'{name}.bias'][:, None]


def ca(x, p, training):
    f = linear(torch.cat([x.mean(3), x.mean(2)], 2), p, 'conv1')
    f = batch_norm(f, p, 'bn1', training)
    f = f * (f + 3).clamp(0, 6) / 6  # h-swish
    g_h, g_w = linear(f[:, :, :x.shape[2]], p, 'conv_h'), linear(f[:, :, x.shape[2]:], p, 'conv_w')
    return x * torch.sigmoid(g_h)[:, :, :, None] * torch.sigmoid(g_w)[:, :, None, :]


def eca(x, p, training):
    w = p['conv.weight'].flatten()
    y = F.pad(x.mean((2, 3)), (len(w) // 2, len(w) // 2)).unfold(1, len(w), 1)  # k neighbouring channels
    return x * torch.sigmoid(y @ w)[:, :, None, None]


def se(x, p, training):
    s = torch.sigmoid(linear(linear(x.mean((2, 3))[:, :, None], p, 'fc1').clamp(min=0), p, 'fc2'))
    return x * s[:, :, :, None]


def cbam(x, p, training):
    def mlp(z):
        return linear(linear(z[:, :, None], p, 'channel.fc1').clamp(min=0), p, 'channel.fc2')
    x = x * torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.flatten(2).max(2)[0]))[:, :, :, None]
    pools = torch.stack([x.mean(1), x.max(1)[0]], 1)
    m = F.unfold(pools, 7, padding=3).transpose(1, 2) @ p['spatial.conv.conv.weight'].flatten()
    m = batch_norm(m[:, None], p, 'spatial.conv.bn', training)
    return x * torch.sigmoid(m).reshape(len(x), 1, *x.shape[2:])


def formula(name: str, layer: nn.Module, x: torch.Tensor, p: dict[str, torch.Tensor]) -> torch.Tensor:
    if name.startswith('ela'):
        return ela(x, p, layer.training, groups=math.gcd(32 if name == 'ela_t' else 16, x.shape[1]))
    return {'ca': ca, 'eca': eca, 'se': se, 'cbam': cbam}[name](x, p, layer.training)


def added(name: str, c: int) -> int:
    """Parameters of one layer on c channels."""
    if name.startswith('ela'):
        kernel, group = {'t': (5, 1), 'b': (7, 1), 's': (5, 8), 'l': (7, 8)}[name[-1]]
        return c * group * kernel + 2 * c
    if name == 'eca':  # the odd number nearest to log2(C) / 2 + 1 / 2; of two, the greater, as in the authors' code
        return min(range(3, 11, 2), key=lambda k: (abs(k - (math.log2(c) + 1) / 2), -k))
    r = max(8, c // 32) if name == 'ca' else c // 16
    return {'ca': c * r + r + 2 * r + 2 * (r * c + c), 'se': 2 * c * r + r + c, 'cbam': 2 * c * r + 2 * 7 * 7 + 2}[name]


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('size', [(5, 9), (1, 7), (6, 2)])
@pytest.mark.parametrize('name', LAYERS)
def test_forward_and_gradients_are_the_papers(name, size, training):
    layer = randomise(create_attn_layer(name, 48, act_layer=nn.ReLU6, dtype=torch.float64)).train(training)
    p = {k: v.clone() for k, v in layer.state_dict().items()}
    p.update({k: v.detach().clone().requires_grad_() for k, v in layer.named_parameters()})
    x = torch.randn(3, 48, *size, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y, want = layer(x), formula(name, layer, x2, p)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    want.backward(upstream)
    torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=1e-11)
    for k, v in layer.named_parameters():
        assert v.grad.abs().sum() > 0, k
        torch.testing.assert_close(v.grad, p[k].grad, rtol=0, atol=1e-11)


def test_all_names_are_registered_in_modules_of_their_own():
    names = {f'{backbone}_{layer}': (plain_name(backbone), layer) for backbone in PARAMETERS for layer in LAYERS}
    assert names == MODELS and len(names) == 80
    assert set(names) == set(timm.list_models(module='attn_resnet') + timm.list_models(module='attn_mobilenetv2'))
    for name, entrypoint in ((name, timm.model_entrypoint(name)) for name in names):
        assert entrypoint is getattr(sys.modules[entrypoint.__module__], name) and entrypoint.__name__ == name


@pytest.mark.parametrize('backbone', PARAMETERS)
def test_parameters_and_places(backbone):
    plain, *adds = PARAMETERS[backbone]
    base = timm.create_model(plain_name(backbone), device='meta')
    assert sum(p.numel() for p in base.parameters()) == plain
    slots = [widths(block) for block in blocks(base)]
    deep = {'resnet18': 8, 'resnet101': 33, 'resnet152': 50, 'mobilenetv2_110d': 21, 'mobilenetv2_120d': 25}
    assert len(slots) == deep.get(backbone, 16)
    for name, expected in zip(LAYERS, adds, strict=True):
        for slot in SLOTS if backbone in ('resnet50', 'mobilenetv2') else SLOTS[:1]:
            model = timm.create_model(f'{backbone}_{name}', attn_slot=slot, device='meta')
            total = sum(added(name, w[slot]) for w in slots)
            assert sum(p.numel() for p in model.parameters()) == plain + total
            assert total == expected or slot == 'output'
            kind = type(create_attn_layer(name, 16, device='meta'))
            assert [type(b.se) for b in blocks(model)] == [kind] * len(slots)
            assert [k for k in model.state_dict() if '.se.' not in k] == list(base.state_dict())


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('slot', SLOTS)
@pytest.mark.parametrize('name', ['ela_s', *RIVALS])
@pytest.mark.parametrize('backbone', ['resnet18', 'resnet50', 'mobilenetv2'])
def test_a_model_has_the_papers_layer_in_its_slot(backbone, name, slot, training):
    model = small(f'{backbone}_{name}', attn_slot=slot).double().train(training)
    seen = []
    for block in blocks(model):
        after = block.get_submodule(next(v[slot] for cls, v in AFTER.items() if isinstance(block, cls)))
        after.register_forward_hook(lambda _, args, y: seen.append(y.clone()))
        block.se.register_forward_hook(lambda layer, args, y: seen.append((layer, args[0].clone(), y.clone())))
    with torch.no_grad():
        model(torch.randn(2, 3, 65, 47, dtype=torch.float64))
        assert len(seen) == 2 * len(blocks(model))
        for out, (layer, x, y) in zip(seen[::2], seen[1::2], strict=True):
            assert torch.equal(out, x)
            torch.testing.assert_close(y, formula(name, layer, x, layer.state_dict()), rtol=0, atol=1e-12)


def test_resnet50_se_in_the_output_slot_is_timms_seresnet50():
    theirs = randomise(timm.create_model('seresnet50')).eval()
    ours = timm.create_model('resnet50_se', attn_slot='output').eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 65, 47)
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize('slot', SLOTS)
@pytest.mark.parametrize('name', ['resnet18', 'resnet50', 'mobilenetv2_050'])
def test_a_graft_is_exact_in_either_slot(name, slot):
    plain = randomise(timm.create_model(name, num_classes=1000))
    overlay = {'state_dict': plain.state_dict()}
    model = timm.create_model(f'{name}_ela_s', pretrained=True, pretrained_cfg_overlay=overlay, attn_slot=slot)
    x = torch.randn(2, 3, 65, 47)
    with torch.no_grad():
        for training in (True, False):
            assert torch.equal(model.train(training)(x), plain.train(training)(x))
        taken = dict(pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
        maps = timm.create_model(name, **taken).eval()(x)
        for kwargs in ({}, {'feature_cls': 'fx'}):
            ours = timm.create_model(f'{name}_ela_s', attn_slot=slot, **kwargs, **taken).eval()(x)
            assert all(torch.equal(a, b) for a, b in zip(ours, maps, strict=True))


@pytest.mark.parametrize('name', ['resnet18_ca', 'resnet50_se', 'mobilenetv2_050_cbam'])
def test_only_ela_is_grafted(name):
    plain = timm.create_model(plain_name(name.rpartition('_')[0])).state_dict()
    for kwargs in ({}, {'num_classes': 7}, {'features_only': True}):
        with pytest.raises(RuntimeError, match=rf'{name} lacks \d+ of \d+ attention weights, first .* all of them\.$'):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': plain}, **kwargs)


@pytest.mark.parametrize('name', [f'{backbone}_{layer}' for backbone in PARAMETERS for layer in RIVALS])
def test_without_pretrained_weights_the_settings_are_the_plain_models(name):
    cfg, plain = get_pretrained_cfg(name), get_pretrained_cfg(plain_name(name.rpartition('_')[0]))
    for key in ('mean', 'std', 'input_size', 'test_input_size', 'crop_pct', 'first_conv', 'classifier'):
        assert getattr(cfg, key) == getattr(plain, key), key
    assert not cfg.has_weights and cfg.tag is None and cfg.license is None and cfg.architecture == name
    assert name not in timm.list_models(pretrained=True)
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {name}'):
        timm.create_model(name, pretrained=True, device='meta')


def test_an_unknown_slot_is_refused():
    for name in ('resnet18_se', 'mobilenetv2_ela_b'):
        with pytest.raises(ValueError, match="'middle': it is one of 'inner', 'output'"):
            timm.create_model(name, attn_slot='middle')


@pytest.mark.parametrize('name', ['resnet50_ela_b', 'mobilenetv2_050_ca'])
def test_a_saved_model_keeps_its_slot(tmp_path, name):
    model = randomise(timm.create_model(name, attn_slot='output', num_classes=7))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again, x = timm.create_model(f'local-dir:{tmp_path}', pretrained=True), torch.randn(2, 3, 65, 47)
    assert torch.equal(again.train()(x), model.train()(x))


# All of timm's layers here compile, export and script: there is no row of exceptions.
@pytest.mark.filterwarnings('ignore:.torch.jit:DeprecationWarning', 'ignore:.torch.jit:FutureWarning')
@pytest.mark.parametrize('layer', RIVALS)
@pytest.mark.parametrize(('backbone', 'slot'), [('resnet50', 'inner'), ('mobilenetv2', 'output')])
def test_compiles_exports_and_scripts(backbone, layer, slot):
    torch._dynamo.reset()
    model, x = small(f'{backbone}_{layer}', attn_slot=slot).eval(), torch.randn(2, 3, 65, 47)
    with torch.no_grad():
        y = model(x)
        sides = {2: torch.export.Dim('h', min=33, max=512), 3: torch.export.Dim('w', min=33, max=512)}
        for other in (
            torch.compile(model, backend='eager', fullgraph=True),
            torch.export.export(model, (x,), dynamic_shapes=(sides,)).module(),
            torch.jit.script(model),
        ):
            torch.testing.assert_close(other(x), y)


@pytest.mark.parametrize('name', ['resnet18_ca', 'mobilenetv2_050_eca'])
def test_timms_options(name):
    model = timm.create_model(name, attn_slot='output', in_chans=1, num_classes=3, drop_path_rate=0.1, output_stride=16)
    model.set_grad_checkpointing()
    model(torch.randn(2, 1, 65, 47)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.forward_features(torch.randn(1, 1, 64, 96)).shape[2:] == (4, 6)
