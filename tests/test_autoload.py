"""The hook: who imports what, in which order, and what of it fails.

Every claim is made of a process of its own: a fork (`forks`) of an interpreter that has imported torch and torchvision.
"""
import inspect
import sys
import zipfile

import pytest
import timm
from helpers import ROOT, run

from timm_ela.models.registry import MODELS

NUMBER = sum('_ela_' in name for name in MODELS)
COUNT = 'print(len(timm.list_models("*_ela_*")))'


# The names are there
def test_timm_knows_the_names_unless_pytorchs_switch_turns_the_hook_off(forks):
    code = f'import sys, timm; {COUNT}; print("timm_ela" in sys.modules)'
    assert forks(code).stdout == f'{NUMBER}\nTrue\n'
    assert forks(code, hook=False).stdout == '0\nFalse\n'


@pytest.mark.parametrize('imports', [
    'import timm_ela, timm',
    'import timm, timm_ela',
    'import timm_ela.layers.ela',
    'import timm_ela.models.attn_efficientnet',
    'from timm_ela import plot_attention',
])
def test_an_import_of_ours_registers_where_the_hook_is_off(forks, imports):
    done = forks(f'{imports}; import timm; {COUNT}', hook=False)
    assert done.stdout == f'{NUMBER}\n'
    assert not done.stderr


def test_registering_changes_no_filter_of_warnings_and_again_it_changes_nothing(forks):
    code = '''
        import importlib, timm, warnings
        filters = list(warnings.filters)
        import timm_ela, timm_ela.autoload
        entrypoints = [timm.model_entrypoint(name) for name in timm.list_models('*_ela_*')]
        assert entrypoints and warnings.filters == filters
        timm_ela.autoload.install()
        timm_ela.autoload.import_families()
        importlib.reload(timm_ela.autoload).install()
        importlib.reload(timm_ela)
        assert entrypoints == [timm.model_entrypoint(name) for name in timm.list_models('*_ela_*')]
    '''
    assert not forks(code, hook=False).stderr  # timm would warn: 'Overwriting ... in registry'


def test_the_models_follow_a_timm_that_is_imported_anew(forks):
    done = forks(f'''
        import sys
        import timm, timm_ela
        for dropped, again in [
            (['timm'], 'import timm'),
            (['timm'], 'import timm_ela; timm_ela.install()'),
            (['timm'], 'from timm_ela import EfficientLocalAttention'),
            (['timm', 'timm_ela'], 'import timm_ela'),
        ]:
            for name in [name for name in sys.modules if name.partition('.')[0] in dropped]:
                del sys.modules[name]
            exec(again)
            import timm
            {COUNT}
            model = timm.create_model('resnet18_ela_t', device='meta')
            assert isinstance(model, timm.models.ResNet)
            from timm_ela import EfficientLocalAttention
            assert isinstance(model.layer1[0].se, EfficientLocalAttention)
            assert sum('timm_ela' in type(finder).__module__ for finder in sys.meta_path) == 1
    ''')
    assert done.stdout == f'{NUMBER}\n' * 4
    assert not done.stderr


# What it costs
def test_import_timm_ela_installs_the_hook_by_two_files_and_the_standard_library():
    """As at the end of `import torch`."""
    code = '''
import sys
sys.path.insert(0, sys.argv[1])
import timm_ela
dir(timm_ela), timm_ela.__version__
assert 'timm_ela' in type(sys.meta_path[0]).__module__
print({name for name in sys.modules if name.partition('.')[0] not in sys.stdlib_module_names})
'''
    isolated = [sys.executable, '-I', '-S', '-c', code, ROOT]  # -S: there is no site-packages
    assert eval(run(isolated).stdout) == {'__main__', 'timm_ela', 'timm_ela.autoload'}


def test_timm_models_keeps_its_own_loader():
    assert timm.models.__loader__ is timm.models.__spec__.loader
    assert not type(timm.models.__loader__).__module__.startswith('timm_ela')
    assert 'register_model' in inspect.getsource(timm.models)


# What fails
def test_a_timm_that_does_not_fit_is_imported_with_one_line_about_it_and_another_one_has_the_models(forks, tmp_path):
    """A notebook that upgrades timm. The first is a zip archive, where one loader serves all modules of a folder."""
    with zipfile.ZipFile(tmp_path / 'timm.zip', 'w') as archive:
        archive.writestr('timm/__init__.py', '__version__ = "9.9"\nfrom . import models\n')
        archive.writestr('timm/models/__init__.py', 'import timm.layers\n')
        archive.writestr('timm/layers/__init__.py', 'NOTHING_OF_WHAT_WE_IMPORT = True\n')
    done = forks(f'''
        import sys, warnings
        sys.path.insert(0, sys.argv[1])
        warnings.simplefilter('error')
        import timm
        warnings.resetwarnings()
        print(timm.models.__file__)
        del sys.path[0]
        for name in [name for name in sys.modules if name.partition('.')[0] == 'timm']:
            del sys.modules[name]
        import timm
        {COUNT}
        assert type(timm.create_model('resnet18_triplet').layer1[0].se.cw.conv) is timm.layers.ConvNormAct
    ''', tmp_path / 'timm.zip')
    file, count = done.stdout.splitlines()
    assert 'timm.zip' in file and int(count) == NUMBER
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        'With timm 9.9, timm_ela did not register attn_resnet, attn_efficientnet, elsa_swin, elsa_volo: ImportError: ')
    assert "cannot import name 'create_attn' from" in line
    assert "partially initialized module 'timm.layers'" not in line  # too early: timm had not finished


@pytest.mark.parametrize('spoil, told', [
    ('del timm.models.efficientnet.efficientnet_init_weights', 'ImportError: cannot import name '),
    ('import sys; sys.modules["timm_ela.models.attn_efficientnet"] = None', 'ModuleNotFoundError: import of timm_ela.'),
], ids=['timm', 'package'])
def test_a_family_that_fails_does_not_take_the_others_with_it_and_the_cause_is_named(forks, spoil, told):
    code = f'import timm; {spoil}; import timm_ela; print(*timm.list_models("*_ela_*"))'
    done = forks(code, hook=False)
    assert done.stdout.split() == timm.list_models('*_ela_*', module='attn_resnet')
    (line,) = done.stderr.splitlines()
    assert line.startswith(f'With timm {timm.__version__}, timm_ela did not register attn_efficientnet: {told}')
