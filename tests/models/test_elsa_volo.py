"""ELSA-VOLO: timm's VOLO in all it does, with ELSA in the Outlookers."""
import pytest
import timm
import torch
from helpers import assert_every_gradient
from timm.models.volo import Outlooker
from torch import nn

from timm_ela.layers.elsa import EnhancedLocalSelfAttention

NAME, PLAIN = 'elsa_volo_d1', 'volo_d1_224'
SIZE = (64, 48)


def elsas(model):
    return [m for m in model.modules() if isinstance(m, EnhancedLocalSelfAttention)]


def build(name=NAME, **kwargs):
    """D1 for small images; of each stage the first block alone, as timm's entry points have a fixed depth."""
    model = timm.create_model(name, **{'img_size': SIZE, 'num_classes': 5, **kwargs})
    for i in (0, 2, 3, 4):
        model.network[i] = model.network[i][:1]
    return model.eval()


@pytest.fixture
def image():
    return torch.randn(2, 3, *SIZE)


@pytest.mark.parametrize(('name', 'count', 'plain', 'blocks'), [
    ('elsa_volo_d1', 26_672_168, 26_632_040, 4),
    ('elsa_volo_d2', 58_721_248, 58_678_336, 6),
    ('elsa_volo_d3', 86_382_288, 86_325_072, 8),
    ('elsa_volo_d4', 192_722_672, 192_961_520, 8),
    ('elsa_volo_d5', 295_097_312, 295_455_584, 12),
])
def test_it_is_timms_volo_but_for_the_attention_of_its_outlookers(name, count, plain, blocks):
    model, theirs = (timm.create_model(n, device='meta') for n in (name, name.removeprefix('elsa_') + '_224'))
    assert [sum(p.numel() for p in m.parameters()) for m in (model, theirs)] == [count, plain]
    ours, outlookers = ([m for m in net.modules() if isinstance(m, Outlooker)] for net in (model, theirs))
    assert len(ours) == len(outlookers) == len(elsas(model)) == blocks
    for block, outlooker in zip(ours, outlookers, strict=True):
        attn = block.attn
        assert attn.num_heads == outlooker.attn.num_heads
        assert (attn.kernel_size, attn.lam, attn.gamma, attn.scale, attn.attn[0].weight.shape[1]) == (5, 1, 1, 1, 8)
        assert attn.pre_proj.bias is None
        block.attn = outlooker.attn
    assert str(model) == str(theirs)


def test_where_the_attention_gives_nothing_the_logits_are_the_plain_models(image, randomize):
    model, plain = build(), randomize(build(PLAIN))
    for m in (model, plain):
        m.network[0][0].attn.requires_grad_(False)
    for layer in (model.network[0][0].attn.post_proj, plain.network[0][0].attn.proj):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    shared = {k: v for k, v in plain.state_dict().items() if not k.startswith('network.0.0.attn.')}
    missing = model.load_state_dict(shared, strict=False).missing_keys
    assert missing and all(k.startswith('network.0.0.attn.') for k in missing)
    assert torch.equal(model(image), plain(image))
    nn.init.normal_(model.network[0][0].attn.post_proj.weight)
    assert not torch.equal(model(image), plain(image))


def test_options_reach_elsa():
    options = dict(elsa_kernel=3, group_width=4, lam=0, gamma=0.5, qkv_bias=True, attn_drop_rate=0.1)
    model = build(**options, dtype=torch.bfloat16, device='meta')
    attn, = elsas(model)
    assert (attn.kernel_size, attn.lam, attn.gamma, attn.attn_drop.p) == (3, 0, 0.5, 0.1)
    assert attn.attn[0].weight.shape == (128, 4, 3, 3) and attn.ghost_head.shape == (1, 192, 3, 3)
    assert attn.pre_proj.bias is not None
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, 'meta')}


def test_weights_begin_as_timms_do():
    attn, = elsas(build())
    assert attn.post_proj.weight.std().item() == pytest.approx(0.02, rel=0.2) and not attn.post_proj.bias.any()
    mul, add = attn.ghost_head
    assert mul.std().item() == pytest.approx(1, rel=0.1) and add.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize('lam', [1, 0])
def test_a_step_of_training_reaches_every_parameter_and_checkpointing_keeps_it(image, lam):
    assert_every_gradient(build(lam=lam, drop_path_rate=0), image)


@pytest.mark.parametrize('kwargs', [{}, {'out_indices': (0, 2)}], ids=str)
def test_features_are_the_intermediates_of_the_whole_model(image, kwargs):
    whole = timm.create_model(NAME, img_size=SIZE).eval()
    backbone = timm.create_model(NAME, img_size=SIZE, features_only=True, **kwargs).eval()
    plain = timm.create_model(PLAIN, img_size=SIZE, features_only=True, device='meta', **kwargs)
    state = {f'model.{k}': v for k, v in whole.state_dict().items()}
    assert not backbone.load_state_dict(state, strict=False).missing_keys
    features = backbone(image)
    expected = whole.forward_intermediates(image, indices=kwargs.get('out_indices', 3), intermediates_only=True)
    assert backbone.feature_info.channels() == plain.feature_info.channels() == [f.shape[1] for f in features]
    assert backbone.feature_info.reduction() == plain.feature_info.reduction()
    assert all(torch.equal(*maps) for maps in zip(features, expected, strict=True))


def test_a_saved_model_comes_back(image, tmp_path):
    model = timm.create_model(NAME, img_size=SIZE, num_classes=5, elsa_kernel=3).eval()
    timm.models.save_for_hf(
        model, tmp_path, model_args=dict(img_size=SIZE, elsa_kernel=3), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(image), model(image))


def test_it_compiles_as_one_graph_and_scripts(image):
    model = build()
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(image), model(image))
    scriptable = build(scriptable=True)
    torch.testing.assert_close(torch.jit.script(scriptable)(image), scriptable(image))


def test_it_exports_with_any_batch(image):
    model = build()
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=8)},))
    assert len(program.graph.nodes) < 500
    x = torch.cat([image, image[:1]])
    torch.testing.assert_close(program.module()(x), model(x))
