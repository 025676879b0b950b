import pytest
import torch
from torch import nn

from timm_ela import EfficientLocalAttention


@pytest.fixture(scope='session', autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def randomize():
    """Moves batch norms and ELA gates away from their initial values, where mistakes cannot be seen.

    A fresh ResNet's last batch norm of each block is zero, and it hides all that comes before it; a fresh GroupNorm is
    the identity.
    """

    def randomize(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.weight.uniform_(0.3, 0.8)
                    m.bias.normal_(0, 0.2)
                    m.running_mean.normal_(0, 0.2)
                    m.running_var.uniform_(0.5, 2)
                elif isinstance(m, EfficientLocalAttention):
                    m.gn.weight.normal_()
                    m.gn.bias.normal_()
        return model

    return randomize
