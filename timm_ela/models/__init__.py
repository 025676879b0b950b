"""Models: timm's backbones with an attention layer in every block.

timm is imported before anything of ours, and our models are registered right after it has loaded (see autoload.py).
Define nothing here: registering imports this package's modules while this file is still running.
"""
import timm.models  # noqa: F401

from ..autoload import install

install()
