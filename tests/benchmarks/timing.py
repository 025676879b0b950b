"""Times calls that take turns in one process, and formats the results."""
import platform
import shlex
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np
import timm
import torch
from torch.profiler import ProfilerActivity, profile

import timm_ela
from timm_ela.models.registry import MODELS

BASES = list(dict.fromkeys(model.base for model in MODELS.values()))
Call = Callable[[], object]


def names_of(base: str, layers: Container[str]) -> list[str]:
    """Returns the plain model, and those of ours with these layers, or with ELSA, in its place."""
    ours = [model for model in MODELS.values() if model.base == base]
    return [base, *(model.name for model in ours if model.layer.suffix in layers or model.layer.tag == 'elsa')]


def milliseconds(call: Call, device: str = 'cpu') -> float:
    """Returns the time of a call: by the host's clock, or on a GPU between two events in its stream."""
    if device == 'cpu':
        start = perf_counter()
        call()
        return (perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_mib(call: Call, device: str = 'cpu') -> float:
    """Returns the peak memory of the call's tensors in MiB, without what was allocated before."""
    if device != 'cpu':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == '[memory]':
            held += event.nbytes()
            most = max(most, held)
    return most / 2 ** 20


def interleave(
        calls: Mapping[str, Call],
        repeats: int,
        warm_up: int = 2,
        device: str = 'cpu',
) -> dict[str, np.ndarray]:
    """Returns the milliseconds of each call. Every repeat runs each call once.

    The order is shuffled, since a call's time depends on what the call before it left in caches and the allocator.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    draw = Random(0)
    for _ in range(warm_up + repeats):
        for name in draw.sample(list(calls), len(calls)):
            times[name].append(milliseconds(calls[name], device))
    return {name: np.array(values[warm_up:]) for name, values in times.items()}


def ratio(times: np.ndarray, plain: np.ndarray, most: float = 0.2) -> str:
    """Returns median and quartiles of the ratio, unless the quartiles are further apart than `most` of the median."""
    q25, q50, q75 = np.percentile(times / plain, (25, 50, 75))
    if q75 - q25 > most * q50:
        return f'spread too large ({q25:.2f} to {q75:.2f})'
    return f'{q50:.2f} ({q25:.2f} to {q75:.2f})'


def hardware(device: str = 'cpu') -> str:
    """Returns the name of the CPU, or of the GPU with CUDA's version."""
    if device != 'cpu':
        return f'{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}'
    # on Linux, `platform` does not know the processor's name
    info = Path('/proc/cpuinfo')
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def describe(repeats: int, device: str = 'cpu') -> str:
    """Returns hardware, versions, the command and the number of repeats, in one line."""
    threads = f', {torch.get_num_threads()} threads' if device == 'cpu' else ''
    return (
        f'{hardware(device)}{threads}; Python {platform.python_version()}, PyTorch '
        f'{torch.__version__}, timm {timm.__version__}, timm_ela {timm_ela.__version__}; {repeats} interleaved '
        f'repeats, medians; `python {shlex.join(sys.argv)}`')


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Returns a Markdown table."""
    head = list(head)
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in (head, ['---'] * len(head), *rows))
