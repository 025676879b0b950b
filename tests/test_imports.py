"""Imports go one way: layers <- models <- hub <- cli. All are statements, which tools find that run nothing."""
import re
from modulefinder import ModuleFinder

import pytest
from helpers import ROOT

PACKAGE = ROOT / 'timm_ela'
ORDER = ('layers', 'models', 'hub', 'cli')  # a part may import itself and those before it


@pytest.mark.parametrize('part', ORDER[:-1])
def test_a_part_imports_only_what_comes_before_it(part):
    text = '\n'.join(file.read_text(encoding='utf-8') for file in (PACKAGE / part).glob('*.py'))
    imports = re.findall(r'^ *from \.\.(.*) import (.*)', text, re.MULTILINE)
    assert imports
    words = {word for line in imports for word in re.findall(r'\w+', ' '.join(line))}
    assert not words & set(ORDER[ORDER.index(part) + 1:])


def test_a_tool_that_reads_imports_finds_all_modules():
    """As PyInstaller does."""
    modules = {'.'.join(file.relative_to(ROOT).with_suffix('').parts) for file in PACKAGE.rglob('*.py')}
    finder = ModuleFinder([str(ROOT)])
    finder.import_hook('timm_ela.__main__')
    found = {name for name in finder.modules if name.partition('.')[0] == 'timm_ela'}
    assert found == {name.removesuffix('.__init__') for name in modules}
