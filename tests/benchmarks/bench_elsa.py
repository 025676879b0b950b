"""Compares speed and memory of ELSA's operator on a CPU with other ways to compute it, as a Markdown table.

A ratio is the median over the repeats, with its quartiles. `bench_models.py` times whole models.
"""
import argparse
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from timing import Call, describe, interleave, markdown, peak_mib, ratio
from torch import Tensor

from timm_ela.layers.elsa import banded_attention, elsa

# C, H and W, heads, kernel size, and whether the ghost head has mul: the stages of ELSA-Swin-T, then ELSA-VOLO-D1's
SHAPES = ((96, 56, 3, 7, False), (192, 28, 6, 7, False), (384, 14, 12, 7, False), (192, 28, 6, 5, True))
HEAD = ['C x H x W', 'kernel', 'mul', 'mode', 'timm_ela, ms', 'timm_ela, MiB', 'beside it', 'time', 'memory']


def by_unfold(v: Tensor, attn: Tensor, mul: Tensor | None, add: Tensor, kernel_size: int) -> Tensor:
    """Computes the operator as the authors do without their compiled extension. Arguments and result are NHWC."""
    batch, height, width, channels = v.shape
    heads, offsets = attn.shape[3], kernel_size ** 2
    values = v.permute(0, 3, 1, 2).reshape(batch * heads, channels // heads, height, width)
    values = F.unfold(values, kernel_size, padding=kernel_size // 2)
    values = values.reshape(batch * heads, channels // heads, offsets, -1)
    weights = attn.permute(0, 3, 4, 1, 2).reshape(batch * heads, 1, offsets, -1)

    def ghost(part: Tensor) -> Tensor:
        return part.flatten(1).expand(batch, -1, -1).reshape(batch * heads, -1, offsets, 1)

    filters = ghost(torch.ones_like(add) if mul is None else mul) * weights + ghost(add)
    return (values * filters).sum(2).reshape(batch, channels, height, width).permute(0, 2, 3, 1)


def by_bands(v: Tensor, attn: Tensor, mul: Tensor, add: Tensor, kernel_size: int) -> Tensor:
    """Computes local attention with a banded matrix for each channel, which contains mul. It leaves add out."""
    per_channel = attn.repeat_interleave(v.shape[3] // attn.shape[3], 3) * mul.flatten(1)
    return torch.cat([
        banded_attention(*image, kernel_size) for image in zip(v.split(1), per_channel.split(1), strict=True)])


def backward(call: Call, inputs: list[Tensor | None], upstream: Tensor) -> None:
    torch.autograd.grad(call(), [t for t in inputs if t is not None], upstream, allow_unused=True)


def compare(calls: dict[str, Call], repeats: int) -> list[str]:
    """Returns time and memory of the first call, and their ratios of the second call to the first."""
    first, second = calls
    times, peaks = interleave(calls, repeats), {name: peak_mib(call) for name, call in calls.items()}
    return [
        f'{np.median(times[first]):.1f}', f'{peaks[first]:.0f}', second, ratio(times[second], times[first]),
        f'{peaks[second] / peaks[first]:.1f}']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--batch-size', type=int, default=4)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for channels, size, heads, kernel_size, with_mul in SHAPES:
        v = torch.randn(args.batch_size, size, size, channels)
        attn = torch.randn(args.batch_size, size, size, heads, kernel_size ** 2).softmax(4)
        mul, add = torch.randn(2, channels, kernel_size, kernel_size)
        inputs: list[Tensor | None] = [t.requires_grad_() for t in (v, attn, mul, add)]
        others = {'F.unfold': by_unfold, 'a band a channel': by_bands}
        if not with_mul:
            inputs[2] = None
            del others['a band a channel']
        upstream = torch.randn_like(v)
        label = [f'{channels} x {size} x {size}', f'{kernel_size} x {kernel_size}', 'yes' if with_mul else 'no']
        for name, way in others.items():
            pair = {k: partial(f, *inputs, kernel_size) for k, f in (('timm_ela', elsa), (name, way))}
            with torch.no_grad():
                rows.append([*label, 'forward', *compare(pair, args.repeats)])
            steps: dict[str, Call] = {k: partial(backward, call, inputs, upstream) for k, call in pair.items()}
            rows.append([*label, 'forward + backward', *compare(steps, args.repeats)])
    print(f'Batch {args.batch_size}: {describe(args.repeats)}.\n\n{markdown(HEAD, rows)}')


if __name__ == '__main__':
    main()
