"""What the tests of ELA share."""
import pytest
import torch

from timm_ela import EfficientLocalAttention

FORMATS = {'nchw': torch.contiguous_format, 'nhwc': torch.channels_last}


@pytest.fixture(params=FORMATS.values(), ids=FORMATS)
def memory_format(request):
    return request.param


@pytest.fixture
def make(randomize):
    def make(*args, **kwargs):
        return randomize(EfficientLocalAttention(*args, **kwargs))

    return make
