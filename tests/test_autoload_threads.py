"""The hook under threads, and after a registration that was cut off.

A claim is made of a fresh interpreter where threads import torch too, and else of a fork of one that has (`forks`).
"""
import pytest
import timm
from helpers import run_python

from timm_ela.models.registry import MODELS

NUMBER = sum('_ela_' in name for name in MODELS)
STATEMENTS = [
    'import timm; timm.create_model("resnet18", device="meta")',
    'from timm.data import create_transform',
    'import timm',
    'import timm.models',
    'import timm_ela',
    'from timm_ela import EfficientLocalAttention',
]
OF_OURS = ['import timm_ela.models.attn_resnet', 'import timm_ela.layers.ela', 'import timm_ela.models.registry']

# timm and torchvision fail in some of the threads, with or without us: their modules import each other.
THREADS = '''
import sys, threading, time
if {interval}:
    sys.setswitchinterval({interval})
statements = {statements!r}
barrier = threading.Barrier(8)
def work(i):
    barrier.wait()
    try:
        exec(statements[({turn} + i) % len(statements)], {{}})
    except (ImportError, AttributeError, KeyError, RuntimeError) as error:  # _DeadlockError is a RuntimeError
        print(error, file=sys.stderr)
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
import timm
end = time.monotonic() + {patience}
while (count := len(timm.list_models('*_ela_*'))) != {number} and time.monotonic() < end:
    time.sleep(0.1)
print(count)
'''


@pytest.mark.parametrize(('statements', 'turn', 'interval', 'patience', 'fresh'), [
    (STATEMENTS, 0, None, 0, False),
    *((STATEMENTS, turn, 1e-5, 0, False) for turn in (0, 2, 4)),
    # Where they import torch too.
    (STATEMENTS, 2, 1e-5, 0, True),
    # Modules of ours wait for timm: the models are there a moment later.
    *(([*STATEMENTS, *OF_OURS], turn, 1e-5, 60, False) for turn in (0, 3, 6)),
])
def test_threads_that_import_timm_end_and_the_models_are_there(forks, statements, turn, interval, patience, fresh):
    code = THREADS.format(interval=interval, statements=statements, turn=turn, patience=patience, number=NUMBER)
    done = run_python(code, timeout=120) if fresh else forks(code)  # a hang fails
    assert done.stdout == f'{NUMBER}\n'
    assert 'Not registered' not in done.stderr


def test_every_thread_that_has_imported_timm_knows_the_models(forks):
    statement = f'import timm; assert len(timm.list_models("*_ela_*")) == {NUMBER}'
    done = forks(THREADS.format(interval=None, statements=[statement], turn=0, patience=0, number=NUMBER))
    assert not done.stderr


def test_a_family_whose_import_fails_in_another_thread_is_imported_here(forks):
    """An import statement would wait for the other thread, and then take what it left for the module."""
    assert forks('''
        import importlib, sys, threading, time
        import timm, timm_ela
        name = 'timm_ela.models.elsa_swin'
        loader = sys.modules.pop(name).__loader__
        started = threading.Event()
        def fail(self, module):
            del type(loader).exec_module
            started.set()
            time.sleep(1)
            raise ImportError('as timm is not loaded yet')
        type(loader).exec_module = fail
        threading.Thread(target=importlib.import_module, args=(name,)).start()
        started.wait()
        timm_ela.install()
        print(name in sys.modules)
    ''').stdout == 'True\n'


# Cut off
OURS = 'timm_ela.models.attn_efficientnet'
FAILS_ONCE = '''
import sys
class FailsOnce:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            raise {error}('once')
sys.meta_path.insert(0, FailsOnce())
try:
    import timm
    print(len(timm.list_models('*_ela_*')))
except {error}:
    print('raised')
{again}
import timm
print(len(timm.list_models('*_ela_*')))
from timm_ela import ATTN_LAYERS, VARIANTS
'''


@pytest.mark.parametrize(('module', 'error', 'again'), [
    (OURS, 'KeyboardInterrupt', 'import timm'),
    (OURS, 'KeyboardInterrupt', 'import timm_ela.models.registry'),
    ('timm.models.vision_transformer', 'ImportError', 'import timm'),
])
def test_an_interrupted_registration_is_completed_by_the_next_import(forks, module, error, again):
    done = forks(FAILS_ONCE.format(module=module, error=error, again=again))
    assert done.stdout == f'raised\n{NUMBER}\n'
    assert not done.stderr


def test_a_family_that_failed_is_registered_when_it_is_tried_again(forks):
    again = 'import timm_ela; timm_ela.install()'
    done = forks(FAILS_ONCE.format(module=OURS, error='ImportError', again=again))
    before, after = map(int, done.stdout.split())
    assert 0 < before < after == NUMBER
    (line,) = done.stderr.splitlines()
    assert line == f'With timm {timm.__version__}, timm_ela did not register attn_efficientnet: ImportError: once.'
