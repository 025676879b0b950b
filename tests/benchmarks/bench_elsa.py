"""Speed and memory of ELSA on this machine's CPU, as Markdown tables: `python tests/benchmarks/bench_elsa.py`.

The operator stands beside the authors' own CPU path (F.unfold), models beside plain ones. Ratios are medians of those
within a repeat, with their quartiles. A training step is forward, cross entropy and backward, without an optimizer.
"""
import argparse
from functools import partial

import numpy as np
import timm
import torch
import torch.nn.functional as F
from bench_models import infer, train
from timing import Call, describe, interleave, markdown, ratio
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from timm_ela.layers.elsa import banded_attention, elsa

# C, H and W, heads, kernel size, and whether the ghost head multiplies: the stages of ELSA-Swin-T, that of ELSA-VOLO-D1
SHAPES = ((96, 56, 3, 7, False), (192, 28, 6, 7, False), (384, 14, 12, 7, False), (192, 28, 6, 5, True))
MODELS = {'swin_tiny_patch4_window7_224': 'elsa_swin_tiny', 'volo_d1_224': 'elsa_volo_d1'}

HEAD = ['first', 'second', 'first, ms', 'second by first', 'first, MiB', 'second, MiB']


def by_unfold(v: Tensor, attn: Tensor, mul: Tensor | None, add: Tensor, kernel_size: int) -> Tensor:
    """The operator as the authors have it without their extension; arguments and result are NHWC."""
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
    """Local attention with a band for each channel, which holds mul; what is added is left out."""
    per_channel = attn.repeat_interleave(v.shape[3] // attn.shape[3], 3) * mul.flatten(1)
    return torch.cat([
        banded_attention(*image, kernel_size) for image in zip(v.split(1), per_channel.split(1), strict=True)])


def backward(call: Call, inputs: list[Tensor | None], upstream: Tensor) -> None:
    torch.autograd.grad(call(), [t for t in inputs if t is not None], upstream, allow_unused=True)


def peak_mib(call: Call) -> float:
    """The most that the call's tensors hold at once, in MiB beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            most = max(most, held)
    return most / 2 ** 20


def compare(label: list[str], calls: dict[str, Call], repeats: int) -> list[str]:
    """A row: the first call's time in milliseconds, the ratio of the second's, and their memory."""
    (first, times), (second, others) = interleave(calls, repeats).items()
    memory = [f'{peak_mib(calls[name]):.0f}' for name in (first, second)]
    return [*label, first, second, f'{np.median(times):.1f}', ratio(others, times), *memory]


def operator(batch_size: int, repeats: int) -> str:
    """The table of the operator."""
    rows = []
    for channels, size, heads, kernel_size, with_mul in SHAPES:
        v = torch.randn(batch_size, size, size, channels)
        attn, upstream = torch.randn(batch_size, size, size, heads, kernel_size ** 2).softmax(4), torch.randn_like(v)
        mul, add = torch.randn(2, channels, kernel_size, kernel_size)
        inputs: list[Tensor | None] = [t.requires_grad_() for t in (v, attn, mul, add)]
        ways = {'timm_ela': elsa, 'F.unfold': by_unfold, 'a band a channel': by_bands}
        if not with_mul:
            inputs[2] = None
            del ways['a band a channel']
        label = [f'{channels} x {size} x {size}', f'{kernel_size} x {kernel_size}', 'yes' if with_mul else 'no']
        for other in list(ways)[1:]:
            pair = {name: partial(ways[name], *inputs, kernel_size) for name in ('timm_ela', other)}
            with torch.no_grad():
                rows.append(compare([*label, 'forward'], pair, repeats))
            steps: dict[str, Call] = {name: partial(backward, call, inputs, upstream) for name, call in pair.items()}
            rows.append(compare([*label, 'forward + backward'], steps, repeats))
    return markdown(['C x H x W', 'kernel', 'mul', 'mode', *HEAD], rows)


def models(batch_size: int, repeats: int) -> str:
    """The table of the models."""
    rows = []
    x, labels = torch.randn(batch_size, 3, 224, 224), torch.randint(1000, (batch_size,))
    for names in MODELS.items():
        pair = {name: timm.create_model(name).eval() for name in names}
        rows.append(compare(['inference'], {n: partial(infer, m, x) for n, m in pair.items()}, repeats))
        for model in pair.values():
            model.train()
        rows.append(compare(['training'], {n: partial(train, m, x, labels) for n, m in pair.items()}, repeats))
    return markdown(['mode', *HEAD], rows)


PARTS = {'operator': operator, 'models': models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='tables')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f'Batch {args.batch_size}: {describe(args.repeats)}.')
    for part in args.parts:
        print(f'\n{PARTS[part](args.batch_size, args.repeats)}', flush=True)


if __name__ == '__main__':
    main()
