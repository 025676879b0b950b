"""Runs timm's unmodified train.py so that all models of one seed see the same images in the same order.

    python paired_train.py train.py --seed 0 ...

train.py seeds the generator, draws the model's weights from it, and then the order of the images and what augmentation
does to them. A model with more weights leaves the generator elsewhere, and would see other batches. Here the generator
is seeded again at the start of each epoch, and the loader's workers, which take their seeds from it, start anew. So
arms of one seed are pairs, also where a run was cut off and resumed.
"""
import runpy
import sys
from pathlib import Path

import timm.data
from timm.utils import random_seed

create_loader = timm.data.create_loader
seed = int(sys.argv[sys.argv.index('--seed') + 1])


def create_paired_loader(dataset, *args, is_training=False, **kwargs):
    """timm's create_loader, with a sampler that seeds when train.py announces an epoch."""
    loader = create_loader(dataset, *args, is_training=is_training, **{**kwargs, 'persistent_workers': False})
    if is_training:
        # No two epochs of a study's seeds share a number.
        loader.sampler.set_epoch = lambda epoch: random_seed(1000 * seed + epoch)
    return loader


timm.data.create_loader = create_paired_loader
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path[0] = str(Path(script).resolve().parent)
runpy.run_path(script, run_name='__main__')
