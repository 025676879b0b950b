"""Times and memory of calls that take turns in one process, on a CPU or a GPU."""
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from random import Random
from time import perf_counter

import numpy as np
import torch
from torch import Tensor, nn

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # PyTorch 2.15 prints a line whenever its profiler starts or stops

WARM_UP = 3  # rounds before the first that counts

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """How all that is compared in one run is called and timed."""

    device: torch.device
    batch_size: int
    repeats: int
    channels_last: bool = False
    amp_dtype: torch.dtype | None = None  # of autocast
    compile: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A random batch (N, *shape), float32 where no dtype is given."""
        x = torch.randn(self.batch_size, *shape, device=self.device, dtype=dtype)
        return x.contiguous(memory_format=self.memory_format)

    def prepare(self, module: nn.Module) -> Callable[..., Tensor]:
        """Moves the module where it is to run, and gives what to call: compiled, under autocast, as is asked for."""
        module.to(device=self.device, memory_format=self.memory_format)
        called = torch.compile(module) if self.compile else module
        return torch.autocast(self.device.type, self.amp_dtype)(called) if self.amp_dtype else called


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without one, a GPU where there is one.

    Raises:
        ValueError: If a GPU is asked for and there is none.
    """
    if name == 'cuda' and not torch.cuda.is_available():
        raise ValueError('There is no CUDA device here for --device cuda; --device cpu works everywhere.')
    device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if device.type == 'cuda':  # as in timm's scripts
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True
    return device


def timed(call: Call, device: torch.device) -> Callable[[], float]:
    """Calls once; the milliseconds are given later, so that a GPU need not be waited for."""
    if device.type == 'cpu':
        start = perf_counter()
        call()
        ms = (perf_counter() - start) * 1e3
        return lambda: ms
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()

    def wait() -> float:
        end.synchronize()
        return begin.elapsed_time(end)

    return wait


def interleave(
        calls: dict[str, Call],
        repeats: int,
        time: Callable[[Call], Callable[[], float]],
) -> dict[str, list[float]]:
    """Milliseconds of each call: every repeat runs each of them once, in an order of its own.

    What ran just before tells on a time, by what it leaves in caches and in the allocator: let it not stay the same.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    draw = Random(0)
    for _ in range(repeats):
        # A GPU has the repeat's work in its queue before the first time is asked for.
        for name, ms in [(name, time(calls[name])) for name in draw.sample(list(calls), len(calls))]:
            times[name].append(ms())
    return times


def peak_mib(call: Call, device: torch.device) -> float:
    """The most that the tensors made in the call take at one time; on a CPU, as PyTorch's profiler counts them."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None
    events = sorted(profile.kineto_results.events(), key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events if event.name() == '[memory]'), default=0) / 2 ** 20


def measure(calls: dict[str, Call], setting: Setting) -> dict[str, dict[str, float]]:
    """Median and quartiles of each call's time, and its peak memory."""
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    measured = {}
    for name, times in interleave(calls, setting.repeats, partial(timed, device=setting.device)).items():
        measured[name] = dict(zip(('q25_ms', 'ms', 'q75_ms'), np.percentile(times, (25, 50, 75)).tolist(), strict=True))
        measured[name]['peak_mib'] = peak_mib(calls[name], setting.device)
    return measured
