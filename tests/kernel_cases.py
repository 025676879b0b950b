"""What the tests of the Triton kernels share: inputs on a GPU, or for Triton's interpreter."""
import os

import pytest
import torch

INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
LAYOUTS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}
EPS = 1e-5


def pick_device():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip('no GPU: the interpreter runs it, in a process of its own')
    return 'cpu' if INTERPRETED else 'cuda'


@pytest.fixture(autouse=True)
def new_memory_is_nan(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)  # what is compared with is exact
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills it, as documented
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.zeros(1).new_empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(shape, group_size=1, kernel_size=5, dtype=torch.float32, layout='nhwc', param_dtype=torch.float32):
    """x and the three parameters, each value exact in the dtype of x."""
    device = pick_device()
    x = torch.randn(shape, device=device).to(dtype).to(memory_format=LAYOUTS[layout])
    sizes = (shape[1], group_size, kernel_size), shape[1], shape[1]
    params = (torch.randn(size, device=device).to(dtype).to(param_dtype) for size in sizes)
    return [t.requires_grad_() for t in (x, *params)]


def results(function, inputs, norm_groups, upstream):
    """Output and every gradient, in float64."""
    y = function(*inputs, norm_groups, EPS)
    grads = torch.autograd.grad(y, inputs, upstream.to(y.dtype))
    return [t.detach().double() for t in (y, *grads)]
