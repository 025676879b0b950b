"""Times of calls that take turns in one process, and how they are told."""
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from random import Random
from time import perf_counter

import numpy as np
import timm
import torch

import timm_ela

Call = Callable[[], object]


def interleave(calls: Mapping[str, Call], repeats: int, warm_up: int = 2) -> dict[str, np.ndarray]:
    """Milliseconds of each call: every repeat runs each of them once.

    The order is shuffled: caches and the allocator favour whoever follows whom.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    draw = Random(0)
    for _ in range(warm_up + repeats):
        for name in draw.sample(list(calls), len(calls)):
            start = perf_counter()
            calls[name]()
            times[name].append((perf_counter() - start) * 1e3)
    return {name: np.array(values[warm_up:]) for name, values in times.items()}


def ratio(times: np.ndarray, plain: np.ndarray, most: float = 0.2) -> str:
    """Median and quartiles of the ratio within a repeat, unless they are further apart than `most` of the median."""
    q25, q50, q75 = np.percentile(times / plain, (25, 50, 75))
    if q75 - q25 > most * q50:
        return f'spread too large ({q25:.2f} to {q75:.2f})'
    return f'{q50:.2f} ({q25:.2f} to {q75:.2f})'


def describe(repeats: int) -> str:
    """Hardware, versions, the command and the repeats, as a paragraph."""
    info = Path('/proc/cpuinfo')  # where `platform` knows no name
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    hardware = names[0] if names else platform.processor() or platform.machine()
    return (
        f'{hardware}, {torch.get_num_threads()} threads; Python {platform.python_version()}, PyTorch '
        f'{torch.__version__}, timm {timm.__version__}, timm_ela {timm_ela.__version__}; {repeats} interleaved '
        f'repeats, medians; `python {shlex.join(sys.argv)}`')


def markdown(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    head = list(head)
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in (head, ['---'] * len(head), *rows))
