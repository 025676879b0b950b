"""Registers the models as soon as timm is there, without importing it.

PyTorch (2.5 or newer) calls `install` at the end of `import torch`: entry point group `torch.backends` in
pyproject.toml. Standard library only, and nothing here raises: an error would break `import torch` itself.
"""
import importlib.util
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

_TARGET = 'timm.models'
_MODEL_MODULES = ('attn_resnet', 'attn_mobilenetv2')
_IMPORTED_BY_THEM = tuple(f'{__package__}.{name}' for name in ('blocks', 'graft', 'layers', 'registry', 'remap'))
_KNOWN_TIMM = ('1.0.31',)  # versions that passed the tests: make compat
_installed = False


def register_models() -> None:
    """Imports the modules whose entry points register themselves with timm; what fails is told in one warning."""
    failed = []
    for name in _MODEL_MODULES:
        try:
            importlib.import_module(f'{__package__}.{name}')
        except Exception as error:  # whatever a changed timm raises, timm itself must go on
            failed.append(f'{__package__}.{name} is not registered: {type(error).__name__}: {error}')
    if failed:
        version = getattr(sys.modules.get('timm'), '__version__', 'unknown')
        known = f'This is timm {version}; known to work: {", ".join(_KNOWN_TIMM)}.'
        message = '. '.join([*(text.rstrip('.') for text in failed), known])
        try:
            warnings.warn(message, stacklevel=2)
        except Warning:  # python -W error: it must not take timm's import with it
            print(message, file=sys.stderr)


class _RegisterAfterTimm(MetaPathFinder):
    """Finds `timm.models` as the other finders do and registers our models right after it has run.

    A module of ours that registering needs has timm imported before it, not from within: half loaded it would fail.
    """

    _searching = False

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name in _IMPORTED_BY_THEM and _TARGET not in sys.modules:
            importlib.import_module(_TARGET)
            return importlib.util.spec_from_loader(name, _Loaded(sys.modules[name])) if name in sys.modules else None
        if name != _TARGET or self._searching:
            return None
        self._searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadAndRegister(spec.loader, self)
        return spec


class _LoadAndRegister(Loader):
    """Stands in for a loader once. It is not patched: a zip archive's loader, for one, serves other modules too."""

    def __init__(self, loader: Loader, finder: _RegisterAfterTimm) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:  # kept until timm.models has loaded: its import may fail and be tried again
            sys.meta_path.remove(self._finder)
        register_models()


class _Loaded(Loader):
    """Gives a module that was loaded while it was looked for."""

    def __init__(self, module) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec):
        return self._module

    def exec_module(self, module) -> None:
        module.__spec__ = self._spec


def install() -> None:
    """Registers the models now if `timm.models` is loaded, otherwise right after it loads. Idempotent, never raises."""
    global _installed
    if _installed:
        return
    _installed = True
    if _TARGET in sys.modules:
        register_models()
    else:
        sys.meta_path.insert(0, _RegisterAfterTimm())
