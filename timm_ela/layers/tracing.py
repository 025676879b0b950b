"""Functions that tell what runs a layer: eager mode, or something that records or transforms its operations.

TorchScript cannot compile these functions: check torch.jit.is_scripting() before calling them.
"""
import torch
from torch.autograd import forward_ad

# PyTorch 2.5 has no is_exporting
is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


@torch.jit.unused
def is_tracing() -> bool:
    """True while operations are recorded: by torch.compile, torch.export, an ONNX export or torch.jit.trace."""
    return torch.compiler.is_compiling() or is_exporting() or torch.jit.is_tracing()


@torch.jit.unused
def is_in_transform() -> bool:
    """True in torch.func's transforms and forward-mode derivatives, which need plain PyTorch operations."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@torch.jit.unused
def runs_on_cpu(x: torch.Tensor) -> bool:
    """True if eager mode computes x on a CPU, where the cost of an operation depends on the memory format."""
    return x.device.type == 'cpu' and not is_tracing() and not is_in_transform()


@torch.jit.unused
def is_fixed_size_export(x: torch.Tensor) -> bool:
    """True in an export with fixed channels, height and width. False in dynamo, where dynamic sizes look fixed too."""
    return (is_exporting() and not torch.compiler.is_dynamo_compiling()
            and all(isinstance(size, int) for size in x.shape[1:]))


@torch.jit.unused
def is_onnx_export() -> bool:
    """True in an ONNX export with torch.onnx.export(dynamo=True)."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


@torch.jit.unused
def have_same_size(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True in eager mode and in torch.compile for equal sizes. False in other graphs, which may run on other sizes."""
    return isinstance(a, torch.Tensor) and not (is_exporting() or torch.jit.is_tracing()) and a.shape == b.shape


@torch.jit.unused
def needs_backward(tensors: list[torch.Tensor]) -> bool:
    """True if a backward pass may follow what eager mode computes from these tensors."""
    return (not is_tracing() and not is_in_transform()
            and torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
