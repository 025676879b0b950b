"""Registers the models as soon as timm is there, without importing it.

PyTorch (2.5 or newer) calls `install` at the end of `import torch`: entry point group `torch.backends` in
pyproject.toml. Standard library only, and nothing here raises: an error would break `import torch` itself.
"""
import importlib
import sys
import warnings
from _thread import allocate_lock, start_new_thread
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

_TARGET = 'timm.models'
_FAMILIES = ('attn_resnet', 'attn_efficientnet', 'elsa_swin', 'elsa_volo')
_KNOWN_TIMM = ('1.0.31',)  # versions that passed the tests: make compat
_registering = allocate_lock()


def import_families(retry: bool = True) -> None:
    """Imports the families, whose models register themselves with timm; one warning names those that fail.

    What is registered stays as it is, so that calling again does what an earlier call could not. Where timm was dropped
    from sys.modules and imported anew, all is imported anew.

    Args:
        retry: Whether to leave what fails to a new thread if there are other threads.
    """
    if not _registering.acquire(blocking=False):  # further up in this thread, or another thread is at it
        return
    failed = []
    try:
        # An import of timm.models that was interrupted leaves timm's registry, and with it what we registered.
        registry = sys.modules.get(f'{__package__}.models.registry')
        registered_by = getattr(registry, 'register_model', None)
        if registered_by not in (None, getattr(sys.modules.get(_TARGET), 'register_model', None)):
            for name in list(sys.modules):
                if name.startswith(f'{__package__}.') and name != __name__:
                    del sys.modules[name]
        for name in _FAMILIES:
            module = f'{__package__}.models.{name}'
            try:
                importlib.import_module(module)
            except Exception as error:  # a changed timm can raise anything, and timm's own import must go on
                failed.append(f'{module} is not registered: {type(error).__name__}: {error}')
    finally:
        _registering.release()
    if failed and retry and len(sys._current_frames()) > 1:
        # A thread that imports a module of ours may wait for timm, which this one loads. A new one holds no import's
        # lock, and can wait for both.
        start_new_thread(import_families, (False,))
    elif failed:
        version = getattr(sys.modules.get('timm'), '__version__', 'unknown')
        known = f'This is timm {version}; known to work: {", ".join(_KNOWN_TIMM)}.'
        message = '. '.join([*(text.rstrip('.') for text in failed), known])
        try:
            warnings.warn(message, stacklevel=2)
        except Warning:  # with python -W error, the warning would make timm's import fail
            print(message, file=sys.stderr)
        ours = [module for name, module in list(sys.modules.items()) if name.partition('.')[0] == __package__]
        if not any(getattr(getattr(module, '__spec__', None), '_initializing', False) for module in ours):
            sys.modules.pop(__package__, None)  # so that `import timm_ela` tries again


class _RegisterAfterTimm(MetaPathFinder):
    """Finds `timm.models` as the other finders do, and registers our models right after it has run.

    It stays: an import of timm may fail and be tried again, and a notebook may drop timm and import another version.
    """

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        # importlib.util.find_spec would wait for a thread that imports timm, and up to Python 3.11 that thread would
        # wait for the import lock that this one holds here.
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1:] if self in finders else finders:
            spec = finder.find_spec(name, path, target) if hasattr(finder, 'find_spec') else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _LoadAndRegister(spec.loader)
                return spec
        return None


class _LoadAndRegister(Loader):
    """Takes a loader's place for one import. The loader is not patched: a zip archive's also loads other modules."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        import_families()


def install() -> None:
    """Registers what is not registered if `timm.models` is loaded, and right after it loads. Never raises."""
    if not any(type(finder).__name__ == _RegisterAfterTimm.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterTimm())
    if _TARGET in sys.modules:
        import_families()
