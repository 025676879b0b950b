"""Shared by the tests: models and their attention slots, and commands in processes of their own.

What is imported first, and in which environment, is what the tests with processes of their own test.
"""
import io
import json
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from statistics import median

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import InvertedResidual, UniversalInvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
DEVICE = os.environ.get('TIMM_ELA_DEVICE', 'cpu')  # of the tests in layers/ and models/
on_cpu = pytest.mark.skipif(DEVICE != 'cpu', reason=f'TIMM_ELA_DEVICE is {DEVICE}: the test is for the CPU')
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


class Forks(subprocess.Popen):
    """An interpreter that has imported torch and torchvision, and runs each code in a fork of itself.

    A fork imports timm in a fifth of the time that a fresh interpreter takes.
    """

    CODE = '''
import json, os, signal, sys
import torch, torchvision
for line in sys.stdin:
    code, out, err, *sys.argv[1:] = json.loads(line)
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
for number, path in ((1, out), (2, err)):
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
# A hang fails.
signal.alarm(120)
exec(code, {'__name__': '__main__'})
sys.stdout.flush()
# Taking all modules down would take as long as importing timm.
os._exit(0)
'''

    def __init__(self, env: Mapping[str, object], folder: Path) -> None:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        super().__init__([sys.executable, '-c', self.CODE], env=environment(env), cwd=sys.prefix, **pipes)
        self.folder = folder

    def run(self, code: str, *args: object, exit_code: int = 0) -> subprocess.CompletedProcess:
        """Runs code with sys.argv[1:] == args, and gives what `run_python` gives."""
        files = [self.folder / name for name in ('stdout', 'stderr')]
        for file in files:
            file.unlink(missing_ok=True)
        self.stdin.write(json.dumps([textwrap.dedent(code), *map(str, [*files, *args])]) + '\n')
        self.stdin.flush()
        done = subprocess.CompletedProcess(code, int(self.stdout.readline()), *(file.read_text() for file in files))
        assert done.returncode == exit_code, f'exit code {done.returncode} of: {code}\n{done.stdout}\n{done.stderr}'
        return done


@cache
def skeleton(name: str) -> nn.Module:
    """A model without memory for its weights, shared by all tests: do not change it."""
    return timm.create_model(name, device='meta')


def load(name: str, state_dict: Mapping[str, object], **kwargs) -> nn.Module:
    """Builds a model with these weights by timm's way for pretrained weights, our checkpoint filters included."""
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'state_dict': state_dict}, **kwargs)


def slot_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks, by name, that have a place for an attention layer, in a plain model or one of ours."""
    # the last two expand, and DepthwiseSeparableConv does not
    classes = (BasicBlock, Bottleneck, InvertedResidual, UniversalInvertedResidual)
    return {name: m for name, m in model.named_modules() if isinstance(m, classes)}


def slot_widths(plain: nn.Module, slot: str = 'inner') -> list[int]:
    """Channels of the slot in each of a plain model's blocks."""
    widths = []
    for block in slot_blocks(plain).values():
        if isinstance(block, BasicBlock):
            widths.append(block.conv2.out_channels)
        else:
            names = {Bottleneck: 'conv3', InvertedResidual: 'conv_pwl', UniversalInvertedResidual: 'pw_proj.conv'}
            last = block.get_submodule(names[type(block)])
            widths.append(last.in_channels if slot == 'inner' else last.out_channels)
    return widths


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """The attention layers of one of our models, by name."""
    return {f'{name}.se': block.se for name, block in slot_blocks(model).items()}


OPTIMIZERS = {
    'sgd': partial(torch.optim.SGD, lr=0.01, momentum=0.9), 'adamw': partial(torch.optim.AdamW, lr=1e-3)}
# How far training from a graft may be from the plain model's: of each weight, of their median, and of the loss.
STEP, MEDIAN_STEP, LOSS = 0.15, 0.02, 0.02


def first_step(net: nn.Module, x: Tensor, y: Tensor, optimizer: str) -> tuple[float, dict[str, float]]:
    """Loss before a step of training, and by how much, relatively, the step changes each convolution and the head."""
    net.train()
    before = {k: p.detach().clone() for k, p in net.named_parameters() if p.ndim > 1 and '.se.' not in k}
    learner = OPTIMIZERS[optimizer](net.parameters())
    torch.manual_seed(1)
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    learner.step()
    after = dict(net.named_parameters())
    return loss.item(), {k: ((after[k].detach() - v).norm() / v.norm()).item() for k, v in before.items()}


def assert_same_first_step(model: nn.Module, plain: nn.Module, x: Tensor, y: Tensor, optimizer: str) -> None:
    """Asserts that a step changes each convolution and the head of a model as it changes the plain model's."""
    (loss, steps), (plain_loss, plain_steps) = (first_step(net, x, y, optimizer) for net in (model, plain))
    assert abs(loss / plain_loss - 1) < LOSS
    ratios = {k: steps[k] / v for k, v in plain_steps.items()}
    assert len(ratios) > 20
    assert not {k: v for k, v in ratios.items() if abs(v - 1) > STEP}
    assert abs(median(ratios.values()) - 1) < MEDIAN_STEP


def assert_every_gradient(model: nn.Module, x: Tensor) -> None:
    """Asserts that a step of training reaches every parameter, and that checkpointing keeps the gradients."""
    gradients = []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    for k, g in gradients[0].items():
        assert g.abs().max() > 0, k
        torch.testing.assert_close(gradients[1][k], g, msg=lambda m, k=k: f'{k}: {m}')


class FullSize(TorchDispatchMode):
    """Counts the allocations of at least this many elements. It keeps none: PyTorch would not add to it in place."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.count += t.untyped_storage().nbytes() >= self.numel * t.element_size()
        return out


class AuthorsELA(nn.Module):
    """ELA as its authors write it: PyTorch's operations, one after the other."""

    def __init__(self, channels, kernel_size, groups, num_groups, eps=1e-5):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.gn = nn.GroupNorm(num_groups, channels, eps)
        self.sigmoid = nn.Sigmoid()

    def gates(self, x):
        return [self.sigmoid(self.gn(self.conv(torch.mean(x, dim=dim)))).to(x.dtype) for dim in (3, 2)]

    def forward(self, x):
        x_h, x_w = self.gates(x)
        return x * x_h.unsqueeze(3) * x_w.unsqueeze(2)


def compiled(m, x):
    torch.compiler.reset()  # tests compile the same forward in many ways: PyTorch limits how often
    return torch.compile(m, backend='eager', fullgraph=True)


def exported(m, x, **sizes):
    """Exported with these dimensions of x (N, C, H, W) free, such as n=0."""
    # PyTorch 2.5 asks for a bound
    dynamic_shapes = ({i: torch.export.Dim(k, min=1 if k == 'n' else 2, max=2 ** 16) for k, i in sizes.items()},)
    program = torch.export.export(m, (x,), dynamic_shapes=dynamic_shapes)
    calls = [n.target for n in program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert {t.namespace for t in calls} == {'aten'}  # what is exported must load where this package is not
    return program.module()


# How PyTorch transforms a layer, given an input.
WAYS = {
    'scripted': lambda m, x: torch.jit.script(m),
    'traced': lambda m, x: torch.jit.trace(m, x),
    'symbolically_traced': lambda m, x: torch.fx.symbolic_trace(m),
    'symbolically_traced_and_scripted': lambda m, x: torch.jit.script(torch.fx.symbolic_trace(m)),
    'compiled': compiled,
    'exported': lambda m, x: exported(m, x, n=0, h=2, w=3),
    'pickled': lambda m, x: pickle.loads(pickle.dumps(m)),
}


def in_onnxruntime(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output for x, by onnxruntime."""
    onnxruntime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    file = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
