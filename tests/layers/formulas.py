"""Each attention layer's formula and parameter count, written out from its paper; ELA's formula by its authors' module.

A formula takes x (N, C, H, W), the layer's parameters and buffers by name (p), and whether it trains.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from helpers import AuthorsELA
from torch.func import functional_call


def ela(x, p, training, groups=16):
    channels, width, kernel = p['conv.weight'].shape
    theirs = AuthorsELA(channels, kernel, channels // width, math.gcd(groups, channels))
    return functional_call(theirs.to(x), p, x)


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


def gc(x, p, training):
    n, c, height, width = x.shape
    z = x.flatten(2)  # (N, C, HW)
    weights = (linear(z, p, 'conv_attn')).softmax(2)  # (N, 1, HW)
    context = linear((z * weights).sum(2, keepdim=True), p, 'mlp_add.fc1')  # (N, C / 16, 1)
    context = (context - context.mean(1, keepdim=True)) / (context.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    context = context * p['mlp_add.norm.weight'][:, None] + p['mlp_add.norm.bias'][:, None]
    return x + linear(context.clamp(min=0), p, 'mlp_add.fc2')[:, :, :, None]


def triplet(x, p, training):
    n, c, height, width = x.shape
    y = 0
    # (name, order of the dimensions with the pooled one second)
    for name, order in (('cw', (0, 2, 1, 3)), ('hc', (0, 3, 2, 1)), ('hw', (0, 1, 2, 3))):
        z = x.permute(order)
        pools = torch.stack([z.amax(1), z.mean(1)], 1)
        m = F.unfold(pools, 7, padding=3).transpose(1, 2) @ p[f'{name}.conv.conv.weight'].flatten()
        m = batch_norm(m[:, None], p, f'{name}.conv.bn', training)
        gated = z * torch.sigmoid(m).reshape(n, 1, *z.shape[2:])
        y = y + gated.permute(order)  # each order is its own inverse
    return y / 3


def sa(x, p, training):
    n, c, height, width = x.shape
    half = p['cweight'].numel()
    flat = {k: v.flatten() for k, v in p.items()}
    channels = []
    for g in range(c // (2 * half)):
        for i in range(half):
            z = x[:, 2 * half * g + i]
            channels.append(z * torch.sigmoid(flat['cweight'][i] * z.mean((1, 2), keepdim=True) + flat['cbias'][i]))
        for i in range(half):
            z = x[:, 2 * half * g + half + i]
            normed = (z - z.mean((1, 2), keepdim=True)) / (z.var((1, 2), unbiased=False, keepdim=True) + 1e-5).sqrt()
            normed = normed * flat['gn.weight'][i] + flat['gn.bias'][i]
            channels.append(z * torch.sigmoid(flat['sweight'][i] * normed + flat['sbias'][i]))
    return torch.stack([channels[i // 2 + (i % 2) * (c // 2)] for i in range(c)], 1)


def sp(x, p, training):
    def strip(z, name):  # (N, C, L)
        w = p[f'conv{name}.weight'].flatten(2)
        z = torch.einsum('nclk,ock->nol', F.pad(z, (1, 1)).unfold(2, 3, 1), w)
        return batch_norm(z, p, f'bn{name}', training)
    s = strip(x.mean(3), '1')[:, :, :, None] + strip(x.mean(2), '2')[:, :, None, :]
    return x * torch.sigmoid(linear(s.clamp(min=0).flatten(2), p, 'conv3')).reshape(x.shape)


FORMULAS = {
    'ela_t': partial(ela, groups=32), 'ela_b': ela, 'ela_s': ela, 'ela_l': ela,
    'ca': ca, 'eca': eca, 'se': se, 'cbam': cbam, 'gc': gc, 'triplet': triplet, 'sa': sa, 'sp': sp,
}


def parameters(name: str, c: int) -> int:
    """Parameters of a layer on c channels, from the papers."""
    if name.startswith('ela'):
        kernel, group = {'t': (5, 1), 'b': (7, 1), 's': (5, 8), 'l': (7, 8)}[name[-1]]
        return c * group * kernel + 2 * c
    if name == 'eca':  # the odd number nearest to log2(C) / 2 + 1 / 2; of two, the greater, as in the authors' code
        return min(range(3, 11, 2), key=lambda k: (abs(k - (math.log2(c) + 1) / 2), -k))
    groups = max(g for g in range(1, 65) if c % (2 * g) == 0)
    r = max(8, c // 32) if name == 'ca' else c // 16
    return {
        'ca': c * r + r + 2 * r + 2 * (r * c + c),
        'se': 2 * c * r + r + c,
        'cbam': 2 * c * r + 2 * 7 * 7 + 2,
        'gc': c + 1 + 2 * c * r + r + c + 2 * r,
        'triplet': 300,
        'sa': 3 * c // groups,
        'sp': 7 * c * c + 5 * c,
    }[name]
