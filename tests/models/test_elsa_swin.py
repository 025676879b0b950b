"""ELSA-Swin: timm's Swin in all it does, and the authors' checkpoints."""
import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import load
from timm.models.swin_transformer import window_partition, window_reverse
from torch import nn

from timm_ela.hub.publish import convert_checkpoint
from timm_ela.layers.elsa import EnhancedLocalSelfAttention
from timm_ela.models.registry import MODELS

NAME = 'elsa_swin_tiny'
SMALL = dict(embed_dim=24, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 2))


@pytest.mark.parametrize(('name', 'count'), [
    ('elsa_swin_tiny', 29_140_978), ('elsa_swin_small', 52_874_626), ('elsa_swin_base', 92_682_464)])
def test_parameters_are_the_authors(name, count):
    assert sum(p.numel() for p in timm.create_model(name, device='meta').parameters()) == count


def authors_checkpoint(model):
    """Random weights of the model in the authors' layout, made by their rules and not by ours."""
    last, theirs = len(model.layers) - 1, {}
    for k, v in model.state_dict().items():
        v = v + 0.1 * torch.randn_like(v)
        if '.downsample.' in k:
            stage = int(k.split('.')[1])
            k = k.replace(f'layers.{stage}.', f'layers.{stage - 1}.')
        k = k.replace('head.fc.', 'head.')
        if k.startswith(f'layers.{last}.'):
            k = k.replace('.attn.proj.', '.attn.post_proj.').replace('.attn.qkv.', '.attn.pre_proj.')
            if k.endswith('relative_position_bias_table'):
                k, v = k.replace('relative_position_bias_table', 'rb'), torch.randn(v.shape[1], v.shape[0]).to(v)
                theirs[k.replace('.rb', '.relative_id')] = torch.zeros(49 * 49, dtype=torch.long)
        theirs[k] = v
    return theirs


def window_attention(x, state, prefix, heads, window, mask):
    """The authors' attention of windows (n, window ** 2, C): v, q and k in this order, offsets from query to key."""
    n, area, channels = x.shape
    feat = F.linear(x, state[prefix + 'pre_proj.weight'], state[prefix + 'pre_proj.bias'])
    v, q, k = feat.reshape(n, area, 3, heads, -1).permute(2, 0, 3, 1, 4)
    at = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing='ij')).flatten(1)
    offset = at[:, None, :] - at[:, :, None] + window - 1  # (2, query, key)
    bias = state[prefix + 'rb'][:, offset[0] * (2 * window - 1) + offset[1]]
    attn = q @ k.transpose(-2, -1) * (channels // heads) ** -0.5 + bias
    if mask is not None:
        attn = (attn.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    x = (attn.softmax(-1) @ v).transpose(1, 2).reshape(n, area, channels)
    return F.linear(x, state[prefix + 'post_proj.weight'], state[prefix + 'post_proj.bias'])


def authors_logits(model, state, x):
    """Logits of the authors' network, from their checkpoint."""
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'])

    def linear(x, name):
        return F.linear(x, state[f'{name}.weight'], state.get(f'{name}.bias'))

    x = F.conv2d(x, state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], 4).permute(0, 2, 3, 1)
    x = norm(x, 'patch_embed.norm')
    for i, stage in enumerate(model.layers):
        for j, block in enumerate(stage.blocks):
            at, own = f'layers.{i}.blocks.{j}.', block.attn
            y = norm(x, at + 'norm1')
            if i < len(model.layers) - 1:
                attn = EnhancedLocalSelfAttention(
                    y.shape[-1], own.num_heads, 7, qkv_bias=True, qk_scale=1, group_width=4, lam=0).double()
                attn.load_state_dict({k.removeprefix(at + 'attn.'): v for k, v in state.items() if at + 'attn.' in k})
                y = attn(y)  # the authors', by tests/layers/test_elsa.py
            else:
                size, shift = y.shape[1:3], block.shift_size[0]
                y = window_partition(y.roll((-shift, -shift), (1, 2)), (7, 7)).flatten(1, 2)
                y = window_attention(y, state, at + 'attn.', own.num_heads, 7, block.attn_mask)
                y = window_reverse(y.unflatten(1, (7, 7)), (7, 7), *size).roll((shift, shift), (1, 2))
            x = x + y
            x = x + linear(F.gelu(linear(norm(x, at + 'norm2'), at + 'mlp.fc1')), at + 'mlp.fc2')
        if i < len(model.layers) - 1:
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = linear(norm(x, f'layers.{i}.downsample.norm'), f'layers.{i}.downsample.reduction')
    return linear(norm(x, 'norm').mean((1, 2)), 'head')


@pytest.mark.parametrize('img_size', [224, 448])  # one window, and four with a shift
def test_logits_of_the_authors_checkpoint_are_theirs(img_size):
    model = timm.create_model(NAME, num_classes=10, img_size=img_size, **SMALL).double().eval()
    theirs = authors_checkpoint(model)
    x = torch.randn(1, 3, img_size, img_size, dtype=torch.float64)
    wrapped = {'state_dict': {f'module.{k}': v for k, v in theirs.items()}}
    with torch.no_grad():
        expected = authors_logits(model, theirs, x)
        model.load_state_dict(MODELS[NAME].rename_state_dict(wrapped, model))
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-9)


def test_convert_takes_the_backbone_of_a_detector(tmp_path, caplog):
    theirs = authors_checkpoint(timm.create_model(NAME))
    detector = {f'backbone.{k.replace("norm.", "norm3.") if k.startswith("norm.") else k}': v
                for k, v in theirs.items() if not k.startswith('head.')}
    detector |= {'backbone.norm0.weight': torch.ones(96), 'neck.convs.0.weight': torch.ones(3)}
    torch.save({'state_dict': detector}, tmp_path / 'detector.pth')
    with caplog.at_level(logging.WARNING):
        out = convert_checkpoint(tmp_path / 'detector.pth', NAME, tmp_path / 'out')
    assert 'has no classifier' in caplog.text
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert model.num_classes == 0
    assert torch.equal(model.norm.weight, theirs['norm.weight'])


@pytest.mark.parametrize('size', [
    dict(img_size=192), dict(img_size=(128, 256)), dict(img_size=256, window_size=8),
    dict(img_size=192, dynamic_img_size=True)], ids=str)
def test_pretrained_weights_fit_other_sizes_as_those_of_timms_swin_do(size):
    plain = timm.create_model('swin_tiny_patch4_window7_224', **SMALL)
    model = timm.create_model(NAME, **SMALL)
    swin_state, state = plain.state_dict(), model.state_dict()
    tables = [k for k in state if k.endswith('relative_position_bias_table')]
    assert len(tables) == 2
    for k in tables:
        swin_state[k] = state[k] = torch.randn_like(state[k])

    expected = load('swin_tiny_patch4_window7_224', swin_state, **SMALL, **size)
    found = load(NAME, state, **SMALL, **size).eval()
    for k in tables:
        assert found.state_dict()[k].shape != state[k].shape
        assert torch.equal(found.state_dict()[k], expected.state_dict()[k])
    height, width = (size['img_size'],) * 2 if isinstance(size['img_size'], int) else size['img_size']
    assert found(torch.randn(1, 3, height, width)).isfinite().all()


def test_it_does_what_timms_swin_does():
    model = timm.create_model(NAME, img_size=(64, 96), in_chans=2, num_classes=5, drop_path_rate=0.2, **SMALL)
    x = torch.randn(2, 2, 64, 96)
    model.set_grad_checkpointing()
    assert model(x).shape == (2, 5)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().set_input_size((96, 64))
    assert model(x.transpose(2, 3)).shape == (2, 5)
    dynamic = timm.create_model(NAME, dynamic_img_size=True, features_only=True, **SMALL)
    assert [tuple(m.shape[1:]) for m in dynamic(torch.randn(1, 3, 76, 56))] == [
        (19, 14, 24), (10, 7, 48), (5, 4, 96), (3, 2, 192)]
    half = timm.create_model(NAME, dtype=torch.bfloat16, **SMALL)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_weights_begin_as_timms_do():
    model = timm.create_model(NAME, **SMALL)
    attn = model.layers[0].blocks[0].attn
    assert isinstance(attn.post_proj, nn.Linear) and attn.post_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert not attn.post_proj.bias.any()
    assert attn.ghost_head.std().item() == pytest.approx(0.02, rel=0.2)
