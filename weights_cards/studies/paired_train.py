"""Runs timm's unmodified train.py so that all models of one seed see the same images in the same order.

    python paired_train.py train.py --seed 0 ...

train.py seeds the generator, draws the model's weights from it, and then the order of the images and what augmentation
does to them. A model with more weights leaves the generator elsewhere, and would see other batches. Here the generator
is seeded once more, right after the model is made.
"""
import runpy
import sys
from pathlib import Path

import timm.models
from timm.utils import random_seed

create_model = timm.models.create_model
seed = int(sys.argv[sys.argv.index('--seed') + 1])


def create_and_seed(*args, **kwargs):
    """timm's create_model, which leaves the generators as if it had drawn nothing."""
    model = create_model(*args, **kwargs)
    random_seed(seed)
    return model


timm.models.create_model = create_and_seed
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path[0] = str(Path(script).resolve().parent)
runpy.run_path(script, run_name='__main__')
