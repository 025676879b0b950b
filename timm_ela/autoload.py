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
_FAMILIES = ('attn_resnet', 'attn_efficientnet', 'elsa_swin')
_KNOWN_TIMM = ('1.0.31',)  # versions that passed the tests: make compat
_installed = False


def register_models() -> None:
    """Imports the families, whose models register themselves with timm; one warning names those that fail."""
    failed = []
    for name in _FAMILIES:
        module = f'{__package__}.models.{name}'
        try:
            importlib.import_module(module)
        except Exception as error:  # a changed timm can raise anything, and timm's own import must go on
            failed.append(f'{module} is not registered: {type(error).__name__}: {error}')
    if failed:
        version = getattr(sys.modules.get('timm'), '__version__', 'unknown')
        known = f'This is timm {version}; known to work: {", ".join(_KNOWN_TIMM)}.'
        message = '. '.join([*(text.rstrip('.') for text in failed), known])
        try:
            warnings.warn(message, stacklevel=2)
        except Warning:  # with python -W error, the warning would make timm's import fail
            print(message, file=sys.stderr)


class _RegisterAfterTimm(MetaPathFinder):
    """Finds `timm.models` as the other finders do, and registers our models right after it has run."""

    _searching = False

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
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
    """Takes a loader's place for one import. The loader is not patched: a zip archive's also loads other modules."""

    def __init__(self, loader: Loader, finder: _RegisterAfterTimm) -> None:
        self._loader = loader
        self._finder = finder

    def create_module(self, spec: ModuleSpec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:  # kept until now: an import of timm may fail and be tried again
            sys.meta_path.remove(self._finder)
        register_models()


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
