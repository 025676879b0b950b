"""ELSA-VOLO: timm's VOLO in all it does, with ELSA in the Outlookers."""
import io
import logging

import onnxruntime
import pytest
import timm
import torch
from helpers import load, skeleton
from timm.models.volo import Outlooker
from torch import nn

from timm_ela.hub.publish import convert_checkpoint
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
    differing = {k for k, v in model.default_cfg.items() if v != theirs.default_cfg.get(k)}
    assert differing == {'architecture'}


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
    with pytest.raises(ValueError, match='positive odd kernel_size, got 4'):
        build(elsa_kernel=4)


def test_weights_begin_as_timms_do():
    attn, = elsas(build())
    assert attn.post_proj.weight.std().item() == pytest.approx(0.02, rel=0.2) and not attn.post_proj.bias.any()
    mul, add = attn.ghost_head
    assert mul.std().item() == pytest.approx(1, rel=0.1) and add.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize('lam', [1, 0])
def test_a_step_of_training_reaches_every_parameter_and_checkpointing_keeps_it(image, lam):
    model, gradients = build(lam=lam, drop_path_rate=0).train(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    for k, g in gradients[0].items():
        assert g.abs().max() > 0, k
        torch.testing.assert_close(gradients[1][k], g)
    before = model.network[0][0].attn.ghost_head.clone()
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    assert (model.network[0][0].attn.ghost_head != before).all()


def test_one_image_has_the_logits_that_it_has_in_a_batch(image):
    model = build()
    torch.testing.assert_close(model(image[:1]), model(image)[:1], rtol=1e-4, atol=1e-5)


def test_mixed_tokens_and_the_head_of_tokens_are_timms(image):
    model, plain = (build(name, use_mix_token=True).train() for name in (NAME, PLAIN))
    (logits, tokens, box), theirs = model.forward_train(image), plain.forward_train(image)
    assert (logits.shape, tokens.shape, len(box)) == (theirs[0].shape, theirs[1].shape, 4)
    assert model.eval()(image).shape == (2, 5)
    assert build(use_aux_head=False).aux_head is None


def test_it_takes_the_sizes_and_heads_that_timms_volo_takes(image):
    model = build(in_chans=1)
    assert model(image[:, :1]).shape == (2, 5)
    model.reset_classifier(3)
    assert model(image[:, :1]).shape == (2, 3)
    assert model.forward_features(image[:, :1]).shape == (2, 4 * 3 + 1, 384)
    assert build(num_classes=0, global_pool='avg')(image).shape == (2, 384)
    for img_size in (32, (40, 72)):  # the second with maps of 5 x 9, which are halved to 2 x 4
        size = (img_size,) * 2 if isinstance(img_size, int) else img_size
        assert build(img_size=img_size)(torch.randn(1, 3, *size)).shape == (1, 5)
    assert model.no_weight_decay() == {'pos_embed', 'cls_token'}


@pytest.mark.parametrize('out_indices', [None, (0, 2)])
def test_features_are_the_intermediates_of_the_whole_model(image, out_indices):
    kwargs = {} if out_indices is None else dict(out_indices=out_indices)
    whole = timm.create_model(NAME, img_size=SIZE).eval()
    backbone = timm.create_model(NAME, img_size=SIZE, features_only=True, **kwargs).eval()
    plain = timm.create_model(PLAIN, img_size=SIZE, features_only=True, device='meta', **kwargs)
    state = {f'model.{k}': v for k, v in whole.state_dict().items()}
    assert not backbone.load_state_dict(state, strict=False).missing_keys
    features = backbone(image)
    expected = whole.forward_intermediates(image, indices=out_indices or 3, intermediates_only=True)
    assert backbone.feature_info.channels() == plain.feature_info.channels() == [f.shape[1] for f in features]
    assert backbone.feature_info.reduction() == plain.feature_info.reduction()
    for got, want in zip(features, expected, strict=True):
        assert torch.equal(got, want)


def test_a_saved_model_comes_back(image, tmp_path):
    model = timm.create_model(NAME, img_size=SIZE, num_classes=5, elsa_kernel=3).eval()
    timm.models.save_for_hf(
        model, tmp_path, model_args=dict(img_size=SIZE, elsa_kernel=3), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(image), model(image))
    new_head = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=7)
    assert torch.equal(new_head.network[0][3].attn.ghost_head, model.network[0][3].attn.ghost_head)
    features = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, features_only=True).eval()
    assert torch.equal(features(image)[-1], model.forward_intermediates(image, intermediates_only=True)[-1])


def test_pretrained_says_that_there_are_no_weights_and_why():
    with pytest.raises(RuntimeError, match='no pretrained weights for elsa_volo_d5: its authors released no ELSA-VOLO'):
        timm.create_model('elsa_volo_d5', pretrained=True)
    assert not timm.list_pretrained('elsa_volo*')


@pytest.mark.parametrize('kwargs', [{}, {'num_classes': 7}, {'features_only': True}], ids=str)
@pytest.mark.parametrize(('other', 'reason'), [
    (PLAIN, "lacks 32 weights, first 'network.0.0.attn.ghost_head'"),
    ('elsa_volo_d2', "has 76 unexpected weights, first 'network.0.4.norm1.weight'"),
    ('size', r"'pos_embed' is \(1, 4, 3, 384\) in the checkpoint and \(1, 14, 14, 384\) in the model"),
])
def test_other_weights_are_refused_in_a_line(other, reason, kwargs):
    source = timm.create_model(NAME, img_size=SIZE, device='meta') if other == 'size' else skeleton(other)
    with pytest.raises(RuntimeError, match=f'not those of elsa_volo_d1: .*{reason}') as error:
        load(NAME, source.state_dict(), device='meta', **kwargs)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('key', ['head.weight', 'aux_head.bias'])
def test_a_head_may_be_missing_only_where_it_is_made_anew(key):
    state_dict = {k: v for k, v in skeleton(NAME).state_dict().items() if k != key}
    for kwargs in ({'num_classes': 7}, {'num_classes': 0}, {'features_only': True}):
        load(NAME, state_dict, device='meta', **kwargs)
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{key}"'):
        load(NAME, state_dict, device='meta')


@pytest.mark.parametrize(('other', 'reason'), [
    (PLAIN, 'lacks 32 weights'), (NAME, f'is a checkpoint of {NAME} already')])
def test_convert_refuses_what_it_cannot_make_anything_of(other, reason, tmp_path, caplog):
    torch.save({'state_dict': timm.create_model(other, num_classes=3).state_dict()}, tmp_path / 'volo.pth')
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=reason):
        convert_checkpoint(tmp_path / 'volo.pth', NAME, tmp_path / 'out')
    assert 'classifier' not in caplog.text and not (tmp_path / 'out').exists()


def test_it_compiles_as_one_graph_and_scripts(image):
    torch._dynamo.reset()
    model = build()
    torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(image), model(image))
    scriptable = build(scriptable=True)
    torch.testing.assert_close(torch.jit.script(scriptable)(image), scriptable(image))


def test_it_exports_and_runs_in_onnxruntime(image):
    model = build()
    expected = model(image).detach()
    program = torch.export.export(model, (image,), dynamic_shapes=({0: torch.export.Dim('batch', min=1, max=8)},))
    assert len(program.graph.nodes) < 500
    x = torch.cat([image, image[:1]])
    torch.testing.assert_close(program.module()(x), model(x))
    file = io.BytesIO()
    torch.onnx.export(program, (), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    out, = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-3, atol=1e-4)
