"""timm's own model tests, unmodified, over our models: `tests/test_models.py` of the installed timm's source.

    python tests/conformance.py [any pytest option, such as -n 2, -k resnet18_ela, --hub]

The distribution comes from the package index, once per version. This file is also the pytest plugin that shows timm's
tests our models in place of timm's.
"""
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CACHE = ROOT / '.cache'


class Unavailable(RuntimeError):
    """The source distribution cannot be had; the message says why."""


def fetch_timm_tests() -> Path:
    """Unpacks the tests of the installed timm under `.cache/`, where they stay.

    Returns:
        Folder with timm's `tests` and `pyproject.toml`. Its package is left behind: the installed one is tested.

    Raises:
        Unavailable: If the package index does not give the distribution.
    """
    name = f'timm-{version("timm")}'
    folder = CACHE / name
    if folder.exists():
        return folder
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        requirement = name.replace('-', '==')
        command = [
            sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', 'timm', '-d', scratch, requirement]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ['no message'])[-1]
            raise Unavailable(f'pip download of {requirement} (source) failed: {reason}')
        with tarfile.open(Path(scratch, f'{name}.tar.gz')) as tar:
            wanted = (f'{name}/tests/', f'{name}/pyproject.toml')
            tar.extractall(scratch, [m for m in tar.getmembers() if m.name.startswith(wanted)], filter='data')
        # renamed when complete
        Path(scratch, name).rename(folder)
    return folder


def main(args: list[str]) -> int:
    """Runs timm's tests of our models with these pytest options; returns pytest's exit code."""
    tests = fetch_timm_tests()
    # Where processes share the cores (-n 2), threads that wait for each other cost several times the work.
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    return pytest.main([
        '-p', 'conformance', '-p', 'no:cacheprovider', '-c', str(tests / 'pyproject.toml'),
        str(tests / 'tests' / 'test_models.py'), *args])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--hub', action='store_true', help='also the tests that download pretrained weights')


def pytest_configure(config: pytest.Config) -> None:
    import timm  # here, so that the installed package wins over whatever the tests put on sys.path

    from timm_ela.models.registry import MODELS

    if not config.pluginmanager.hasplugin('timeout'):
        config.addinivalue_line('markers', 'timeout: of pytest-timeout, which is not installed')
    list_models = timm.list_models

    def list_our_models(*args, module='', **kwargs) -> list[str]:
        """timm's tests select timm's models, by modules such as 'resnet' and by lists of patterns such as 'volo_*'."""
        ours = set(MODELS)
        for key in {'filter', 'exclude_filters'} & kwargs.keys():
            kwargs[key] = [*kwargs[key], *(f'elsa_{pattern}' for pattern in kwargs[key])]
        return [name for name in list_models(*args, **kwargs) if name.partition('.')[0] in ours]

    timm.list_models = list_our_models


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what timm's tests ask of models that they name themselves, and what needs the Hub."""
    import timm

    ours = set(timm.list_models())

    def is_wanted(item: pytest.Item) -> bool:
        params = item.callspec.params if hasattr(item, 'callspec') else {}
        is_ours = str(params.get('model_name')).partition('.')[0] in ours
        return is_ours and ('pretrained' not in item.originalname or config.getoption('--hub'))

    wanted = [item for item in items if is_wanted(item)]
    config.hook.pytest_deselected(items=[item for item in items if not is_wanted(item)])
    items[:] = wanted


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except Unavailable as error:
        sys.exit(str(error))
