"""The kernels are valid GPU code, where there is no GPU too: Triton compiles for a target it cannot see."""
import os
import re
import subprocess

import pytest
import torch

from timm_ela import triton_op

triton = pytest.importorskip('triton')
knobs = pytest.importorskip('triton.knobs')
GPUTarget = pytest.importorskip('triton.backends.compiler').GPUTarget
ASTSource = triton.compiler.ASTSource
kernels = triton_op.kernels

pytestmark = pytest.mark.skipif(
    triton_op.INTERPRETED or not os.path.exists(knobs.nvidia.cuobjdump.path), reason='needs Triton\'s own compiler')
POINTERS = {torch.float32: '*fp32', torch.float16: '*fp16', torch.bfloat16: '*bf16'}


@pytest.fixture
def launches(monkeypatch):
    """What the operator launches for an x of this shape, forward and backward, without running it."""
    def launches(shape, dtype, memory_format, norm_groups=16):
        found = []
        for name in ('pool', 'strip', 'gate', 'reduce', 'strip_backward', 'expand'):
            monkeypatch.setattr(kernels, f'{name}_kernel', Recorder(getattr(kernels, f'{name}_kernel'), found))
        x = torch.empty(shape, dtype=dtype, device='meta').to(memory_format=memory_format)
        conv, gamma = torch.empty(shape[1], 1, 7, device='meta'), torch.empty(shape[1], device='meta')
        y, gates = triton_op.ela_forward._init_fn(x, conv, gamma, gamma, norm_groups, 1e-5)
        triton_op.ela_backward._init_fn(y, x, conv, gamma, gates, norm_groups, 1e-5, True)
        return found

    return launches


class Recorder:
    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return lambda *args, **constants: self.found.append((self.kernel, args, constants))


def compiled(kernel, args, constants, capability):
    """The kernel's PTX and binary, specialised as Triton does at a call."""
    constants = dict(constants)
    options = {k: constants.pop(k) for k in ('num_warps', 'enable_fp_fusion')}
    signature, hints = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        elif value == 1:
            constants[name] = value
        else:
            signature[name] = 'i32' if isinstance(value, int) else 'fp32'
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            hints[(i,)] = [['tt.divisibility', 16]]
    signature = {name: signature.get(name, 'constexpr') for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options).asm


def resources(cubin, path):
    """Registers, and bytes of them that spill, per thread."""
    path.write_bytes(cubin)
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, '-res-usage', path], check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf'{name}:(\d+)', usage)[1]) for name in ('REG', 'STACK', 'LOCAL'))
    return registers, stack + local


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize(('shape', 'dtype', 'capability'), [
    ((256, 256, 56, 56), torch.bfloat16, 90),
    ((256, 2048, 7, 7), torch.float32, 80),
    ((256, 96, 112, 112), torch.float16, 90),
], ids=str)
def test_every_kernel_fits_its_registers_and_reads_by_16_bytes(
        launches, tmp_path, monkeypatch, shape, dtype, capability, memory_format):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    found = launches(shape, dtype, memory_format)
    assert len(found) == 6
    for kernel, args, constants in found:
        asm = compiled(kernel, args, constants, capability)
        registers, spilled = resources(asm['cubin'], tmp_path / 'cubin')
        assert registers < 255 and spilled <= 32, kernel.__name__  # compilers differ by a few bytes
        over_maps = any(isinstance(a, torch.Tensor) and a.shape == shape for a in args)
        if over_maps and (memory_format == torch.channels_last or shape[3] % 8 == 0):
            assert re.search(r'ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global', asm['ptx']), kernel.__name__
            assert 'ld.global.b16' not in asm['ptx'], kernel.__name__


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'nhwc'])
@pytest.mark.parametrize('shape', [(2, 16, 1, 5), (2, 1, 5, 1), (2, 1, 1, 1), (2, 16, 3, 8)], ids=str)
def test_every_kernel_compiles_where_sizes_are_one_and_therefore_constants(
        launches, tmp_path, monkeypatch, shape, memory_format):
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    for kernel, args, constants in launches(shape, torch.float32, memory_format, norm_groups=1):
        assert compiled(kernel, args, constants, 80)['cubin']
