import pytest
import timm
from folders import MODEL


@pytest.fixture
def new_model(randomize):
    """A model with random weights, batch norm statistics and gates: 7 classes and 3 channels unless told otherwise."""
    return lambda name=MODEL, **kwargs: randomize(timm.create_model(name, **{'num_classes': 7, **kwargs}))
