"""What a user gets from the package index: a wheel that carries the package, its licence and its hook, and no more."""
import shutil
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from compat import VERSIONS
from helpers import ROOT, run, run_python

from timm_ela import __version__

FILES = {
    *(str(path.relative_to(ROOT)) for path in (ROOT / 'timm_ela').rglob('*.py')),
    'timm_ela/py.typed', 'timm_ela/models/counts.csv'}


@pytest.fixture(scope='module')
def wheel(tmp_path_factory) -> Path:
    """Built from the source distribution, and that from a copy: no earlier build's leftovers come in."""
    folder = tmp_path_factory.mktemp('packaging')
    for name in ('LICENSE', 'README.md', 'pyproject.toml'):
        shutil.copy(ROOT / name, folder / name)
    for name in ('timm_ela', 'tests', 'weights_cards'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    run([sys.executable, '-m', 'build', '--no-isolation', folder])
    return next(folder.glob('dist/*.whl'))


def test_the_wheel_holds_the_package_its_licence_and_the_versions_that_make_compat_tests(wheel):
    info = f'timm_ela-{__version__}.dist-info'
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f'{info}/METADATA').decode()
    assert {name for name in names if not name.startswith(info)} == FILES
    assert f'{info}/licenses/LICENSE' in names
    python, pinned = VERSIONS['lowest']
    assert f'Requires-Python: >={python}\n' in metadata
    assert all(f'Requires-Dist: {pin.replace("==", ">=")}\n' in metadata for pin in pinned)


def test_make_alone_lists_the_targets_and_does_nothing():
    if not shutil.which('make'):
        pytest.skip('there is no make')
    phony = [line for line in (ROOT / 'Makefile').read_text().splitlines() if line.startswith('.PHONY: ')]
    targets = [name for line in phony for name in line.split()[1:] if name != 'help']
    lines = run(['make', '--no-print-directory'], cwd=ROOT).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [['make', name] for name in targets]


def test_the_wheel_brings_the_hook_and_the_command(wheel, tmp_path):
    run([sys.executable, '-m', 'pip', 'install', '--no-index', '--no-deps', '--target', tmp_path, wheel])
    env = {'PYTHONPATH': tmp_path}
    code = 'import sys, timm; print(timm.is_model("resnet18_ela_b"), sys.modules["timm_ela"].__file__)'
    assert run_python(code, env=env).stdout == f'True {tmp_path / "timm_ela" / "__init__.py"}\n'
    assert run([tmp_path / 'bin' / 'timm-ela', '--version'], env=env).stdout == f'{__version__}\n'
