"""Registers the models as soon as timm is loaded, without importing it.

PyTorch (2.5 or newer) calls `install` at the end of `import torch` (entry point group `torch.backends` in
pyproject.toml). This file uses the standard library only and never raises: an error would break `import torch` itself.
"""
import importlib
import sys
import warnings
from _thread import allocate_lock, start_new_thread
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

_TARGET = 'timm.models'
_FAMILIES = ('attn_resnet', 'attn_efficientnet', 'elsa_swin', 'elsa_volo')
# versions that passed `make compat`
_KNOWN_TIMM = ('1.0.31',)
_registering = allocate_lock()


def import_families(retry: bool = True) -> None:
    """Imports the families, whose models register themselves with timm; one warning names the families that fail.

    Another call imports only the families that failed before. If timm was removed from sys.modules and imported again,
    it imports all of them again.

    Args:
        retry: Whether to try again in a new thread if a family fails while other threads are running.
    """
    # this thread, further up its stack, or another thread is registering already
    if not _registering.acquire(blocking=False):
        return
    failed = []
    try:
        # Compare a function of timm's registry, not timm.models: an interrupted import of timm.models removes that
        # module, but leaves the registry and the models in it.
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
            except Exception as error:
                # a changed timm can raise anything, and the user's import of timm must go on
                failed.append(f'{module} is not registered: {type(error).__name__}: {error}')
    finally:
        _registering.release()
    if failed and retry and len(sys._current_frames()) > 1:
        # Another thread may be importing a module of ours and waiting for timm, which this thread loads. A new thread
        # holds no import lock, so it can wait for both.
        start_new_thread(import_families, (False,))
    elif failed:
        version = getattr(sys.modules.get('timm'), '__version__', 'unknown')
        known = f'This is timm {version}; known to work: {", ".join(_KNOWN_TIMM)}.'
        message = '. '.join([*(text.rstrip('.') for text in failed), known])
        try:
            warnings.warn(message, stacklevel=2)
        except Warning:
            # with python -W error, the warning would make the user's import of timm fail
            print(message, file=sys.stderr)
        ours = [module for name, module in list(sys.modules.items()) if name.partition('.')[0] == __package__]
        if not any(getattr(getattr(module, '__spec__', None), '_initializing', False) for module in ours):
            # `import timm_ela` then tries again
            sys.modules.pop(__package__, None)


class _RegisterAfterTimm(MetaPathFinder):
    """Finds `timm.models` as the other finders do, and registers our models right after it is loaded.

    It stays on sys.meta_path: an import of timm may fail and be repeated, and a notebook may import another version.
    """

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        # Not importlib.util.find_spec: it would wait for a thread that imports timm, and up to Python 3.11 that thread
        # would wait for the import lock that this thread holds here.
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1:] if self in finders else finders:
            spec = finder.find_spec(name, path, target) if hasattr(finder, 'find_spec') else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _LoadAndRegister(spec.loader)
                return spec
        return None


class _LoadAndRegister(Loader):
    """Wraps a loader for one import. It does not patch the loader: that of a zip archive also loads other modules."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec):
        return self._loader.create_module(spec)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        import_families()


def install() -> None:
    """Registers the models if `timm.models` is loaded, and right after every later import of it. Never raises."""
    if not any(type(finder).__name__ == _RegisterAfterTimm.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterTimm())
    if _TARGET in sys.modules:
        import_families()
