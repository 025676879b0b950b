"""What runs a layer: PyTorch's eager mode, or something that records or transforms its operations."""
import torch
from torch.autograd import forward_ad

is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)  # PyTorch 2.5 has none


def is_traced() -> bool:
    """True while operations are recorded: by torch.compile, torch.export, an ONNX export or torch.jit.trace."""
    return torch.compiler.is_compiling() or is_exporting() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """True in torch.func's transforms and forward-mode derivatives, which need the operations of a formula."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
