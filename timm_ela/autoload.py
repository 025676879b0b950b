"""Registers the models as soon as timm is loaded, without importing it.

PyTorch (2.5 or newer) calls `install` at the end of `import torch` (entry point group `torch.backends` in
pyproject.toml). This file uses the standard library only and never raises: an error would break `import torch` itself.
"""
import importlib
import logging
import sys
import threading
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

_TARGET = 'timm.models'
_FAMILIES = ('attn_resnet', 'attn_efficientnet', 'elsa_swin', 'elsa_volo')
_registering = threading.Lock()
_logger = logging.getLogger(__package__)


def import_families(retry: bool = True) -> None:
    """Imports the families, whose models register themselves with timm; one logged warning names those that fail.

    Another call imports only the families that failed before. If timm was removed from sys.modules and imported again,
    it imports all of them again.

    Args:
        retry: Whether to try again in a new thread if a family fails while other threads are running.
    """
    # another thread is registering, or this thread is, further up its stack
    if not _registering.acquire(blocking=False):
        return
    failed: dict[str, Exception] = {}
    try:
        _forget_another_timm()
        for family in _FAMILIES:
            try:
                importlib.import_module(f'{__package__}.models.{family}')
            except Exception as error:
                # a changed timm can raise anything, and the user's import of timm must go on
                failed[family] = error
    finally:
        _registering.release()
    if failed and retry and threading.active_count() > 1:
        # Another thread may be importing a module of ours and waiting for timm, which this thread loads. A new thread
        # holds no import lock, so it can wait for both.
        threading.Thread(target=import_families, args=(False,), daemon=True).start()
    elif failed:
        causes = '; '.join(dict.fromkeys(f'{type(error).__name__}: {error}'.rstrip('.') for error in failed.values()))
        version = getattr(sys.modules.get('timm'), '__version__', 'of an unknown version')
        # logged, not warned: under python -W error, a warning would make the user's import of timm fail
        _logger.warning(f'With timm {version}, timm_ela did not register {", ".join(failed)}: {causes}.')


def _forget_another_timm() -> None:
    """Removes our modules from sys.modules if they registered the models with a timm that is no longer loaded."""
    registry = sys.modules.get(f'{__package__}.models.registry')
    registered_by = getattr(registry, 'register_model', None)
    if registered_by not in (None, getattr(sys.modules.get(_TARGET), 'register_model', None)):
        for name in list(sys.modules):
            if name.startswith(f'{__package__}.') and name != __name__:
                del sys.modules[name]


class _RegisterAfterTimm(MetaPathFinder):
    """Finds `timm.models` as the other finders do, and registers our models right after it is loaded.

    It stays on sys.meta_path: an import of timm may fail and be repeated, and a notebook may import another version.
    """

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        # Not importlib.util.find_spec: it would wait for a thread that imports timm, and up to Python 3.11 that thread
        # would wait for the import lock that this thread holds here.
        for finder in sys.meta_path[sys.meta_path.index(self) + 1:]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, 'find_spec') else None
            if spec is not None and spec.loader is not None:
                spec.loader = _LoadAndRegister(spec.loader)
                return spec
        return None


class _LoadAndRegister(Loader):
    """Wraps the loader of `timm.models`, which it leaves as it is: a zip archive's loader also loads other modules."""

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
