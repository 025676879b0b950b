"""What the tests of ELA share."""
import pytest
import torch
from torch import nn

from timm_ela import EfficientLocalAttention
from timm_ela.layers import ela, elsa

FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def memory_format(request):
    return request.param


@pytest.fixture(params=['as_it_is', 'as_on_no_cpu'])
def either_way(request, monkeypatch):
    """Runs a test twice: also by the expressions that are left where a layer does not run on a CPU."""
    if request.param == 'as_on_no_cpu':
        for module in (ela, elsa):
            monkeypatch.setattr(module, 'is_on_cpu', lambda x: False)


@pytest.fixture
def make(randomize):
    def make(*args, **kwargs):
        return randomize(EfficientLocalAttention(*args, **kwargs))

    return make


class AuthorsELA(nn.Module):
    """As the authors write it: PyTorch's operations, one after the other."""

    def __init__(self, channels, kernel_size, groups, num_groups):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False)
        self.gn = nn.GroupNorm(num_groups, channels)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        b, c, h, w = x.size()
        x_h = torch.mean(x, dim=3, keepdim=True).view(b, c, h)
        x_w = torch.mean(x, dim=2, keepdim=True).view(b, c, w)
        x_h = self.sigmoid(self.gn(self.conv(x_h))).view(b, c, h, 1)
        x_w = self.sigmoid(self.gn(self.conv(x_w))).view(b, c, 1, w)
        return x * x_h.to(x.dtype) * x_w.to(x.dtype)


@pytest.fixture
def authors():
    """The authors' module with the weights of one of ours."""
    def authors(m):
        channels, group_size, kernel_size = m.conv.weight.shape
        theirs = AuthorsELA(channels, kernel_size, channels // group_size, m.gn.num_groups).to(m.conv.weight)
        theirs.load_state_dict(m.state_dict())
        return theirs

    return authors
