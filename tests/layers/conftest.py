"""What the tests of ELA share."""
import pytest
import torch
from helpers import AuthorsELA

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
            monkeypatch.setattr(module, 'runs_on_cpu', lambda x: False)


@pytest.fixture
def make(randomize):
    def make(*args, **kwargs):
        return randomize(EfficientLocalAttention(*args, **kwargs))

    return make


@pytest.fixture
def authors():
    """The authors' module with the weights of one of ours."""
    def authors(m):
        channels, group_size, kernel_size = m.conv.weight.shape
        theirs = AuthorsELA(channels, kernel_size, channels // group_size, m.gn.num_groups, m.gn.eps).to(m.conv.weight)
        theirs.load_state_dict(m.state_dict())
        return theirs

    return authors
