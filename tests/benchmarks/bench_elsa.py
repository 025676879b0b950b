"""Speed and memory of ELSA on this machine's CPU, as Markdown tables: `python tests/benchmarks/bench_elsa.py`.

The operator stands beside the authors' own CPU path (F.unfold), ELSA-Swin-T beside Swin-T: medians of repeats in which
each takes its turn, batch 4, 224 pixels, 2 threads. Times are wall time and CPU time (of both threads), which a busy
machine disturbs less.
"""
import argparse
import statistics
from collections.abc import Callable
from time import perf_counter, process_time

import timm
import torch
import torch.nn.functional as F
from timing import describe
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from timm_ela.layers.elsa import elsa

SHAPES = ((96, 56, 3), (192, 28, 6), (384, 14, 12))  # C, H and W, heads
BATCH = 4
MODELS = ('swin_tiny_patch4_window7_224', 'elsa_swin_tiny')


def by_unfold(v: Tensor, attn: Tensor, add: Tensor) -> Tensor:
    """The operator as the authors have it without their extension; arguments and result are NHWC."""
    batch, height, width, channels = v.shape
    heads = attn.shape[3]
    values = v.permute(0, 3, 1, 2).reshape(batch * heads, channels // heads, height, width)
    values = F.unfold(values, 7, padding=3).reshape(batch * heads, channels // heads, 49, -1)
    weights = attn.permute(0, 3, 4, 1, 2).reshape(batch * heads, 1, 49, -1)
    ghost = add.flatten(1).expand(batch, -1, -1).reshape(batch * heads, -1, 49, 1)
    filters = torch.ones_like(ghost) * weights + ghost
    return (values * filters).sum(2).reshape(batch, channels, height, width).permute(0, 2, 3, 1)


def medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Wall time and CPU time of each call in milliseconds."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            wall, cpu = perf_counter(), process_time()
            call()
            if repeat:  # the first warms up
                times[name].append((1e3 * (perf_counter() - wall), 1e3 * (process_time() - cpu)))
    return {name: tuple(map(statistics.median, zip(*pairs, strict=True))) for name, pairs in times.items()}


def peak_mib(call: Callable[[], object]) -> float:
    """The most that the call's tensors hold at once, in MiB beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            most = max(most, held)
    return most / 2 ** 20


def row(*cells: object) -> None:
    texts = [f'{cell:.1f}' if isinstance(cell, float) else str(cell) for cell in cells]
    print(f'| {" | ".join(texts)} |', flush=True)


def compare(label: tuple[str, ...], calls: dict[str, Callable[[], object]], repeats: int, less: bool) -> None:
    """Prints a row of the two calls' times and their ratio: the first by the second, or the other way round."""
    first, second = medians(calls, repeats).values()
    ratios = [a / b if less else b / a for a, b in zip(first, second, strict=True)]
    row(*label, *first, *second, *(f'{ratio:.2f}' for ratio in ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f'Batch {BATCH}, wall time and CPU time in milliseconds: {describe(args.repeats)}.\n')

    row('C x H x W', 'layout', 'mode', 'F.unfold, wall', 'CPU', 'timm_ela, wall', 'CPU', 'speed-up, wall', 'CPU')
    row(*['---'] * 3, *['---:'] * 6)
    for channels, size, heads in SHAPES:
        for layout in ('NCHW', 'NHWC'):
            v = torch.randn(BATCH, size, size, channels)
            if layout == 'NCHW':
                v = v.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
            attn, upstream = torch.randn(BATCH, size, size, heads, 49).softmax(4), torch.randn_like(v)
            inputs = [t.requires_grad_() for t in (v, attn, torch.randn(channels, 7, 7))]
            ways = {
                'F.unfold': lambda inputs=inputs: by_unfold(*inputs),
                'ours': lambda inputs=inputs: elsa(*inputs[:2], None, inputs[2], 7)}
            steps = {
                name: lambda way=way, inputs=inputs, upstream=upstream: torch.autograd.grad(way(), inputs, upstream)
                for name, way in ways.items()}
            shape = f'{channels} x {size} x {size}'
            with torch.no_grad():
                compare((shape, layout, 'forward'), ways, args.repeats, True)
            compare((shape, layout, 'forward + backward'), steps, args.repeats, True)

    print()
    row('mode', 'Swin-T, wall', 'CPU', 'ELSA-Swin-T, wall', 'CPU', 'ratio, wall', 'CPU')
    row('---', *['---:'] * 6)
    models = {name: timm.create_model(name) for name in MODELS}
    x, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,))
    with torch.inference_mode():
        compare(('inference',), {n: lambda m=m: m.eval()(x) for n, m in models.items()}, args.repeats, False)

    def step(model: torch.nn.Module) -> None:
        model.train().zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()

    calls = {name: lambda model=model: step(model) for name, model in models.items()}
    compare(('training',), calls, args.repeats, False)
    plain, ours = (peak_mib(call) for call in calls.values())
    print(f'\nPeak memory of a training step, gradients included: Swin-T {plain:.0f} MiB, ELSA-Swin-T {ours:.0f} MiB, '
          f'{ours / plain:.2f} times.')


if __name__ == '__main__':
    main()
