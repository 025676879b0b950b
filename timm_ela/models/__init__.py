"""Models: timm's backbones with an attention layer in every block.

timm is imported before anything of ours, and registers our models right after it has loaded (see autoload.py). Define
nothing below that import: registering imports this package's modules while the import is still running.
"""
import timm.models  # noqa: F401
