"""What a user gets from the package index: a wheel that carries the package, its licence and its hook, and no more."""
import re
import shutil
import site
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from compat import VERSIONS
from helpers import ROOT, run

from timm_ela import __version__
from timm_ela.models.registry import MODELS

SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / 'timm_ela').rglob('*.py')}
DATA = {'timm_ela/py.typed', 'timm_ela/models/counts.csv'}


@pytest.fixture(scope='module')
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """Wheel and source distribution, built from a copy: no earlier build's leftovers come in."""
    tmp_path = tmp_path_factory.mktemp('packaging')
    for name in ('LICENSE', 'README.md', 'pyproject.toml'):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ('timm_ela', 'tests', 'weights_cards'):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    run([sys.executable, '-m', 'build', '--no-isolation', tmp_path])
    (wheel,), (source,) = (list((tmp_path / 'dist').glob(pattern)) for pattern in ('*.whl', '*.tar.gz'))
    return wheel, source


@pytest.fixture
def clean_python(tmp_path) -> Path:
    """The interpreter of an environment with all that this one has except timm_ela, by links."""
    builder = venv.EnvBuilder(symlinks=True)
    builder.create(tmp_path / 'env')
    (purelib,) = (tmp_path / 'env' / 'lib').glob('python*/site-packages')
    for folder in reversed(site.getsitepackages()):
        for path in Path(folder).glob('*'):
            link = purelib / path.name
            if 'timm_ela' not in path.name and path.name != '__pycache__' and not link.is_symlink():
                link.symlink_to(path)
    return tmp_path / 'env' / 'bin' / 'python'


def test_wheel_and_source_hold_the_package_its_licence_and_its_entry_points(distributions):
    info = f'timm_ela-{__version__}.dist-info'
    with zipfile.ZipFile(distributions[0]) as wheel:
        names = set(wheel.namelist())
        entry_points = wheel.read(f'{info}/entry_points.txt').decode()
    assert {name for name in names if not name.startswith(info)} == SOURCES | DATA
    assert f'{info}/licenses/LICENSE' in names
    assert entry_points.split() == [
        '[console_scripts]', 'timm-ela', '=', 'timm_ela.cli:main',
        '[torch.backends]', 'timm_ela', '=', 'timm_ela.autoload:install']
    with tarfile.open(distributions[1]) as source:
        names = {name.partition('/')[2] for name in source.getnames()}
    assert names >= SOURCES | DATA | {'pyproject.toml', 'README.md', 'LICENSE'}
    done = run([sys.executable, '-m', 'twine', '--no-color', 'check', '--strict', *distributions])
    assert done.stdout.count('PASSED') == 2


def test_the_wheel_alone_brings_hook_and_command_and_uninstalls_without_a_trace(distributions, clean_python):
    def files() -> set[Path]:
        return {path for path in clean_python.parents[1].rglob('*') if not path.parent.is_symlink()}

    count = [clean_python, '-c', 'import sys, timm; print(len(timm.list_models("*_ela_*")), "timm_ela" in sys.modules)']
    assert run(count).stdout == '0 False\n'
    before = files()
    run([clean_python, '-m', 'pip', 'install', '--no-index', '--no-deps', distributions[0]])
    assert run(count).stdout == f'{sum("_ela_" in name for name in MODELS)} True\n'
    assert run([clean_python.parent / 'timm-ela', '--version']).stdout == f'{__version__}\n'
    assert files() > before
    run([clean_python, '-m', 'pip', 'uninstall', '--yes', 'timm-ela'])
    assert files() == before
    assert run(count).stdout == '0 False\n'


def test_metadata_and_readme_name_the_versions_that_make_compat_tests():
    python, pinned = VERSIONS['lowest']
    pins = dict(requirement.split('==') for requirement in pinned)
    bounds = dict(re.findall(r'^([\w-]+)>=([\d.]+)$', '\n'.join(requires('timm-ela')), re.MULTILINE))
    assert {name: bounds[name].split('.') for name in pins} == {
        name: version.split('.')[:len(bounds[name].split('.'))] for name, version in pins.items()}
    table = (ROOT / 'tests' / 'ecosystem' / 'README.md').read_text()
    rows = re.findall(r'^\| (?:lowest|highest) \| (.*) \|$', table, re.MULTILINE)
    assert rows[0].split(' | ') == [python, *pins.values()]
    assert rows[1].split(' | ')[0] == VERSIONS['highest'][0]
