"""Runs timm's unmodified train.py so that all models with the same seed see the same images in the same order.

    python paired_train.py train.py --seed 0 ...

train.py seeds a random generator, and draws from it the model's weights, then the order of the images and their
augmentation. A model with more weights draws more numbers, so it would see other batches. This script seeds the
generator again at the start of each epoch, and restarts the loader's workers, which take their seeds from it. Runs with
the same seed are therefore pairs, even if one was interrupted and resumed.
"""
import argparse
import runpy
import sys
from pathlib import Path

import timm.data
from timm.utils import random_seed

create_loader = timm.data.create_loader
parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument('--seed', type=int, required=True)
seed = parser.parse_known_args()[0].seed


def create_paired_loader(dataset, *args, is_training=False, **kwargs):
    """timm's create_loader, with a sampler that seeds the generator when train.py calls its set_epoch."""
    loader = create_loader(dataset, *args, is_training=is_training, **{**kwargs, 'persistent_workers': False})
    if is_training:
        # a study has fewer than 1000 epochs, so each epoch of each seed has a number of its own
        loader.sampler.set_epoch = lambda epoch: random_seed(1000 * seed + epoch)
    return loader


timm.data.create_loader = create_paired_loader
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path[0] = str(Path(script).resolve().parent)
runpy.run_path(script, run_name='__main__')
