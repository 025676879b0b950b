"""Commands in processes of their own, and the slots of timm's blocks."""
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from timm.models._efficientnet_blocks import InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

ROOT = Path(__file__).parents[1]
AUTOLOAD_OFF = {'TORCH_DEVICE_BACKEND_AUTOLOAD': '0'}  # PyTorch's own switch


def environment(changes: Mapping[str, object] | None = None) -> dict[str, str]:
    """This process's environment without what would change the meaning of a test, then with the changes."""
    leaks = ('PYTEST_', 'PYTHON', 'TORCH', 'TIMM', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_')
    env = {k: v for k, v in os.environ.items() if not k.startswith(leaks)}
    return {**env, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', **{k: str(v) for k, v in (changes or {}).items()}}


def run(
        command: Sequence[object],
        env: Mapping[str, object] | None = None,
        cwd: str | Path | None = None,
        timeout: float = 600,
        exit_code: int | None = 0,
) -> subprocess.CompletedProcess:
    """Runs a command to its end and keeps its output.

    Args:
        command: Program and arguments.
        env: Changes to `environment()`.
        cwd: Working directory; by default the interpreter's own folder, where no checkout can be imported from.
        timeout: Seconds.
        exit_code: Expected exit code, None for any.

    Returns:
        The process with `stdout` and `stderr` as text.
    """
    done = subprocess.run(
        [str(part) for part in command], env=environment(env), cwd=cwd or sys.prefix, timeout=timeout,
        capture_output=True, text=True)
    assert exit_code in (None, done.returncode), (
        f'exit code {done.returncode} of: {" ".join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}')
    return done


def run_python(code: str, *args: object, **kwargs) -> subprocess.CompletedProcess:
    """Runs code in a fresh interpreter, with sys.argv[1:] == args; other arguments as in `run`."""
    return run([sys.executable, '-c', code, *args], **kwargs)


def slot_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, plain or ours, that have the slot: DepthwiseSeparableConv is another class."""
    return [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck | InvertedResidual)]


def slot_width(block: nn.Module, slot: str = 'inner') -> int:
    """Channels of a block's slot."""
    last = next(getattr(block, name) for name in ('conv_pwl', 'conv3', 'conv2') if hasattr(block, name))
    return last.out_channels if slot == 'output' or isinstance(block, BasicBlock) else last.in_channels
