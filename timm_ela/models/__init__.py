"""Models: timm's backbones with attention layers.

timm is imported before any module of this package, and our models are registered right after it (see autoload.py).
Define nothing here: the registration imports this package's modules while this file is still running.
"""
import timm.models  # noqa: F401

from ..autoload import install

install()
