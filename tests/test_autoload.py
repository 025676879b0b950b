"""The hook: who imports what, in which order, and what of it fails.

Every claim is made of a process of its own: a fresh interpreter, or a fork (`forks`) of one that has imported torch
and torchvision, where the claim is about what comes later.
"""
import inspect
import json
import pickle
import re
import shutil
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import timm
from helpers import AUTOLOAD_OFF, ROOT, run, run_python

from timm_ela import ATTN_LAYERS
from timm_ela.models.registry import MODELS

NUMBER = sum('_ela_' in name for name in MODELS)
COUNT = 'print(len(timm.list_models("*_ela_*")))'
MODULES = [
    '.'.join(file.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
    for file in sorted((ROOT / 'timm_ela').rglob('*.py')) if file.stem != '__main__']
TIMM_ELA = Path(sysconfig.get_path('scripts')) / 'timm-ela'


def our_warnings(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if 'is not registered: ' in line]


# The names are there
def test_timm_knows_the_names_without_an_import_of_ours():
    assert run_python(f'import timm; {COUNT}').stdout == f'{NUMBER}\n'


def test_pytorchs_switch_turns_the_hook_off(forks):
    done = forks(f'import sys, timm; {COUNT}; print("timm_ela" in sys.modules)', hook=False)
    assert done.stdout == '0\nFalse\n'


@pytest.mark.parametrize('imports', [
    'import timm_ela, timm',
    'import timm, timm_ela',
    'import timm_ela.models.attn_efficientnet, timm',
    'from timm_ela import EfficientLocalAttention; import timm',
])
def test_an_import_of_ours_registers_where_the_hook_is_off(forks, imports):
    done = forks(f'{imports}; {COUNT}', hook=False)
    assert done.stdout == f'{NUMBER}\n'
    assert not done.stderr


@pytest.mark.parametrize('module', MODULES)
def test_any_module_of_ours_may_be_the_first_that_is_imported(forks, module):
    done = forks(f'''
        import importlib, sys
        module = importlib.import_module({module!r})
        import timm
        print(len(timm.list_models('*_ela_*')), module is sys.modules[module.__name__],
              module.__spec__.origin == module.__file__)
    ''')
    assert done.stdout == f'{NUMBER} True True\n'
    assert not our_warnings(done.stderr)


def test_registering_again_changes_nothing(forks):
    code = '''
        import importlib, timm, timm_ela, timm_ela.autoload
        entrypoints = [timm.model_entrypoint(name) for name in timm.list_models('*_ela_*')]
        timm_ela.autoload.install()
        timm_ela.autoload.import_families()
        importlib.reload(timm_ela.autoload).install()
        importlib.reload(timm_ela)
        assert entrypoints == [timm.model_entrypoint(name) for name in timm.list_models('*_ela_*')]
    '''
    assert not forks(code).stderr  # timm would warn: 'Overwriting ... in registry'


AGAIN = '''
    import sys
    import timm, timm_ela
    for _ in range(2):
        for name in [name for name in sys.modules if name.partition('.')[0] in {dropped}]:
            del sys.modules[name]
        {again}
        import timm
        {count}
        model = timm.create_model('resnet18_ela_t', device='meta')
        assert isinstance(model, timm.models.ResNet)
        from timm_ela import EfficientLocalAttention
        assert isinstance(model.layer1[0].se, EfficientLocalAttention)
        assert sum('timm_ela' in type(finder).__module__ for finder in sys.meta_path) == 1
'''


@pytest.mark.parametrize('hook', [True, False])
@pytest.mark.parametrize(('dropped', 'again'), [
    (('timm',), ''),
    (('timm',), 'import timm_ela; timm_ela.install()'),
    (('timm',), 'from timm_ela import EfficientLocalAttention'),
    (('timm', 'timm_ela'), 'import timm_ela'),
])
def test_the_models_follow_a_timm_that_is_imported_anew(forks, dropped, again, hook):
    done = forks(AGAIN.format(dropped=dropped, again=again, count=COUNT), hook=hook)
    assert done.stdout == f'{NUMBER}\n' * 2
    assert not done.stderr


def test_a_pickled_model_needs_no_hook(forks, tmp_path):
    """As it comes to a spawned process, or out of torch.save(model)."""
    path = tmp_path / 'model.pickle'
    path.write_bytes(pickle.dumps(timm.create_model('resnet18_ela_t')))
    code = f'import pickle, sys; model = pickle.load(open(sys.argv[1], "rb")); import timm; {COUNT}'
    assert forks(code, path, hook=False).stdout == f'{NUMBER}\n'


# What it costs
def test_import_torch_loads_two_small_files_of_ours_and_no_timm():
    code = 'import json, sys, torch; print(json.dumps(list(sys.modules)))'
    with_hook, without = (set(json.loads(run_python(code, env=env).stdout)) for env in ({}, AUTOLOAD_OFF))
    added = {name for name in with_hook - without if name.partition('.')[0] not in sys.stdlib_module_names}
    assert added == {'timm_ela', 'timm_ela.autoload'}
    assert 'timm' not in with_hook


def test_import_timm_ela_installs_the_hook_and_needs_the_standard_library_only():
    code = '''
import sys
sys.path.insert(0, sys.argv[1])
import timm_ela
dir(timm_ela), timm_ela.__version__
assert 'timm_ela' in type(sys.meta_path[0]).__module__
print({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)
'''
    isolated = [sys.executable, '-I', '-S', '-c', code, ROOT]  # -S: there is no site-packages
    assert eval(run(isolated).stdout) == {'__main__', 'timm_ela'}


def test_timm_models_keeps_its_own_loader():
    assert timm.models.__loader__ is timm.models.__spec__.loader
    assert not type(timm.models.__loader__).__module__.startswith('timm_ela')
    assert 'register_model' in inspect.getsource(timm.models)


# What fails
def write_timm(path: Path, models: str) -> Path:
    """A package named timm with another package of that level, and these contents of timm/models/__init__.py.

    Code imports it if `sys.path` begins with the path: `FROM_PATH`.
    """
    with zipfile.ZipFile(path.with_suffix('.zip'), 'w') as archive:
        archive.writestr('timm/__init__.py', '__version__ = "9.9"\nfrom . import models\n')
        archive.writestr('timm/models/__init__.py', models)
        archive.writestr('timm/layers/__init__.py', 'NOTHING_OF_WHAT_WE_IMPORT = True\n')
    if path.suffix != '.zip':
        shutil.unpack_archive(path.with_suffix('.zip'), path)
    return path


FROM_PATH = 'import sys; sys.path.insert(0, sys.argv[1]); '


def test_a_broken_timm_keeps_its_own_message(forks, tmp_path):
    path = write_timm(tmp_path / 'timm', 'raise RuntimeError("broken by its authors")\n')
    done = forks(f'{FROM_PATH} import timm', path, exit_code=1)
    assert done.stderr.splitlines()[-1] == 'RuntimeError: broken by its authors'
    assert not our_warnings(done.stderr)


@pytest.mark.parametrize('where', ['folder', 'archive.zip'])  # one loader serves all modules of an archive's folder
def test_where_registering_fails_timm_goes_on_with_one_warning_that_says_what_failed(forks, tmp_path, where):
    path = write_timm(tmp_path / where, 'import timm.layers\n')
    done = forks(f'{FROM_PATH} import timm; print(timm.models.__file__)', path)
    assert where in done.stdout
    warned = our_warnings(done.stderr)
    assert len(warned) == 1
    assert 'timm_ela.models.attn_resnet is not registered: ImportError: cannot import name' in warned[0]
    assert 'timm_ela.models.attn_efficientnet is not registered: ImportError: cannot import name' in warned[0]
    table = (ROOT / 'tests' / 'ecosystem' / 'README.md').read_text(encoding='utf-8')
    known = dict.fromkeys(re.findall(r'^\| (?:lowest|highest) \|(?: \S+ \|){2} (\S+) \|', table, re.MULTILINE))
    assert f'This is timm 9.9; known to work: {", ".join(known)}.' in warned[0]
    assert 'partially initialized module \'timm.layers\'' not in done.stderr  # too early: timm had not finished


def test_after_a_timm_that_failed_one_that_works_has_the_models(forks, tmp_path):
    """A notebook that upgrades timm."""
    path = write_timm(tmp_path / 'timm', 'import timm.layers\n')
    code = f'''
        import sys
        sys.path.insert(0, sys.argv[1])
        import timm
        del sys.path[0]
        for name in [name for name in sys.modules if name.partition('.')[0] == 'timm']:
            del sys.modules[name]
        import timm
        {COUNT}
        assert type(timm.create_model('resnet18_triplet').layer1[0].se.cw.conv) is timm.layers.ConvNormAct
    '''
    done = forks(code, path)
    assert done.stdout == f'{NUMBER}\n'
    assert len(our_warnings(done.stderr)) == 1


def test_where_warnings_are_errors_timm_goes_on_all_the_same(forks, tmp_path):
    path = write_timm(tmp_path / 'timm', 'import timm.layers\n')
    code = 'import warnings; warnings.simplefilter("error"); import timm; print(timm.__version__)'
    done = forks(FROM_PATH + code, path)
    assert done.stdout == '9.9\n'
    assert 'timm_ela.models.attn_resnet is not registered' in done.stderr


def test_a_module_that_fails_does_not_take_the_other_with_it(forks):
    code = '''
        import timm
        del timm.models.efficientnet.efficientnet_init_weights
        import timm_ela
        print(*timm.list_models('*_ela_*'))
    '''
    done = forks(code, hook=False)
    names = done.stdout.split()
    assert names == timm.list_models('*_ela_*', module='attn_resnet')
    assert len(our_warnings(done.stderr)) == 1
    assert 'timm_ela.models.attn_efficientnet' in done.stderr
    assert 'efficientnet_init_weights' in done.stderr


# timm-ela run: the models in any script, where the hook is off
SCRIPT = '''
import json, os, sys
import timm
from beside import HERE
print(json.dumps([__name__, sys.argv, HERE, os.getcwd(), len(timm.list_models('*_ela_*'))]))
{ending}'''


@pytest.mark.parametrize('command, ending, exit_code, error', [
    ([TIMM_ELA], 'sys.exit(7)', 7, []),
    ([sys.executable, '-m', 'timm_ela'], 'raise KeyError("its own")', 1, ["KeyError: 'its own'"]),
], ids=['timm-ela', '-m'])
def test_run_is_python_with_the_models_registered(tmp_path, command, ending, exit_code, error):
    script = tmp_path / 'script.py'
    script.write_text(SCRIPT.format(ending=ending))
    (tmp_path / 'beside.py').write_text('HERE = True')
    args = ['a folder', '--model', 'resnet18_ela_t', '--help', '--debug', '-h', '--', '--version']
    done = run([*command, 'run', script, *args], env=AUTOLOAD_OFF, cwd=sys.prefix, exit_code=exit_code)
    name, argv, here, cwd, count = json.loads(done.stdout)
    assert name == '__main__'
    assert argv == [str(script), *args]
    assert here  # a module beside the script, which python would find
    assert Path(cwd).samefile(sys.prefix)
    assert count == NUMBER
    assert done.stderr.splitlines()[-1:] == error
    assert not error or f'"{script}", line 6' in done.stderr


# torchrun: timm's ResNets start with the last batch norm of a block at zero: nothing would reach the attention.
SMALL = dict(layers=(1, 1, 1, 1), channels=(32, 64, 128, 256), zero_init_last=False)
EVERY_LAYER = [
    *((f'resnet18_{layer}', SMALL) for layer in ATTN_LAYERS), ('mobilenetv2_050_ela_t', {}),
    ('elsa_swin_tiny', dict(depths=(1, 1, 1, 1), embed_dim=24, img_size=(64, 96)))]
DDP_SCRIPT = '''
import copy, json, sys
import timm, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group('gloo')
rank, ranks = dist.get_rank(), dist.get_world_size()
assert ranks == 2
for name, kwargs in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).double().eval()  # batch statistics differ by rank
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    x, target = torch.randn(2 * ranks, 3, 64, 96, dtype=torch.float64), torch.randint(5, (2 * ranks,))

    alone = copy.deepcopy(model)
    torch.nn.functional.cross_entropy(alone(x), target).backward()
    together = DistributedDataParallel(model)
    part = slice(2 * rank, 2 * rank + 2)
    torch.nn.functional.cross_entropy(together(x[part]), target[part]).backward()
    for (key, p), q in zip(alone.named_parameters(), model.parameters()):
        # This bias of GC shifts a softmax: its gradient is rounding.
        assert q.grad.abs().sum() > 0 or key.endswith('conv_attn.bias'), key
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-12, msg=lambda m: f'{name}, {key}: {m}')

dist.barrier()  # a process that leaves while the other one still talks to it makes gloo abort that one
dist.destroy_process_group()
'''


def test_distributed_gradients_are_those_of_one_process_on_the_joined_batch(tmp_path):
    (tmp_path / 'ddp.py').write_text(DDP_SCRIPT)
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    run([*torchrun, tmp_path / 'ddp.py', json.dumps(EVERY_LAYER)])
