"""Imports go one way: layers <- models <- hub <- cli. All are statements, which tools find that run nothing."""
import ast
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / 'timm_ela'
ORDER = ('layers', 'models', 'hub', 'cli')  # a part may import itself and those before it


def imported_parts(file: Path) -> set[str]:
    """The parts of the package that a file imports from, at any depth of its code."""
    folders = file.relative_to(PACKAGE).parts[:-1]
    parts = set()
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.ImportFrom) and node.level:
            path = [*folders[:len(folders) - node.level + 1], *(node.module or '').split('.')]
            parts |= {name for name in ([path[0]] if path[0] else [alias.name for alias in node.names]) if name}
    return parts & set(ORDER)


@pytest.mark.parametrize('part', ORDER)
def test_a_part_imports_only_what_comes_before_it(part):
    files = [PACKAGE / 'cli.py'] if part == 'cli' else sorted((PACKAGE / part).glob('*.py'))
    found = {file.name: imported_parts(file) for file in files}
    assert any(found.values())
    allowed = set(ORDER[:ORDER.index(part) + 1])
    assert {name: parts - allowed for name, parts in found.items() if parts - allowed} == {}


@pytest.mark.parametrize('module, without', [
    ('timm_ela', ('timm_ela.hub', 'timm_ela.cli', 'timm_ela.__main__')), ('timm_ela.__main__', ())])
def test_a_tool_that_reads_imports_finds_all_modules(module, without):
    """As PyInstaller does; hub is what the command line needs."""
    modules = {'.'.join(file.relative_to(ROOT).with_suffix('').parts) for file in PACKAGE.rglob('*.py')}
    modules = {name.removesuffix('.__init__') for name in modules}
    finder = ModuleFinder([str(ROOT)])
    finder.import_hook(module)
    found = {name for name in finder.modules if name.partition('.')[0] == 'timm_ela'}
    assert found == {name for name in modules if not name.startswith(without or ' ')}
