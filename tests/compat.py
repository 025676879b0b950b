"""The lowest and the highest versions that pyproject.toml admits, and transformers 4, each set in its own environment.

    python tests/compat.py [--keep] [NAME ...]    without a name: every row of VERSIONS

An environment, .venv-compat-NAME, takes about 6 GB. It lies there for as long as its tests run, or with --keep until
pyproject.toml or its row changes. A Python that is not installed here is a row that fails, with that reason.
"""
import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# name -> Python, requirements. A newer version is the one that the package index gives on the day.
VERSIONS = {
    'lowest': ('3.10', ['torch==2.5', 'timm==1.0.26', 'huggingface_hub==0.34']),
    'highest': ('3.13', ['torch', 'timm', 'huggingface_hub']),
    # beside what needs huggingface_hub below 1.0
    'transformers4': ('3.11', ['torch', 'timm', 'huggingface_hub<1', 'transformers<5', 'accelerate']),
}
TESTS = ['layers', 'models', 'hub/test_push.py', 'test_autoload.py']
TESTS_OF = {'transformers4': ['hub', 'ecosystem/test_libraries.py']}
# PyTorch 2.5 exports no dynamic height and width of a plain ResNet either, and no batch norm to ONNX. It exports by
# dynamo, where ELA's form for phones is not taken, and its torch.fx cannot trace its pruning. timm 1.0.26 saves no
# arguments of a model by itself, makes no new head for a pruned EfficientNet, and gives a Swin no window that is not
# square. PyTorch 2.5 keeps another tensor of Shuffle Attention's group norm for the backward pass.
DESELECTED = {
    'lowest': 'not exports_with_any_height_and_width and not (elsa_volo and exports) '
              'and not (attn_layers and (exported and not ela_ or onnxruntime)) '
              'and not only_operators_that_phones_have and not (pruned and transformed) '
              'and not saved_model_keeps_its_slot and not (test_models and compiles_as_one_graph) '
              'and not does_what_timms_swin_does and not (memory_of_training and _sa)',
    'transformers4': 'hub or libraries_that_compare_the_shapes'}
REPORT = '''
import sys, huggingface_hub, timm, torch
print('Python', sys.version.split()[0], *(f'{m.__name__} {m.__version__}' for m in (torch, timm, huggingface_hub)))
'''


def install(name: str, env: Path) -> bool:
    """Makes one row's environment, unless it is there already. Returns whether it is there."""
    python, requirements = VERSIONS[name]
    made_from, stamp = '\n'.join([*requirements, (ROOT / 'pyproject.toml').read_text()]), env / 'made-from.txt'
    if stamp.exists() and stamp.read_text() == made_from:
        return True
    interpreter = shutil.which(f'python{python}')
    if not interpreter:
        print(f'{name}: there is no python{python} here')
        return False
    shutil.rmtree(env, ignore_errors=True)
    packages = ['--editable', f'{ROOT}[test]', *requirements]
    if run(interpreter, '-m', 'venv', env) and run(env / 'bin/python', '-m', 'pip', 'install', '--quiet', *packages):
        stamp.write_text(made_from)
    return stamp.exists()


def run(*command: str | Path) -> bool:
    return subprocess.run(command, cwd=ROOT).returncode == 0


def check(name: str, keep: bool) -> bool:
    """Installs one row's versions and runs the tests with them."""
    env = ROOT / f'.venv-compat-{name}'
    tests = [ROOT / 'tests' / test for test in TESTS_OF.get(name, TESTS)]
    try:
        return install(name, env) and run(env / 'bin/python', '-c', REPORT) and run(
            env / 'bin/python', '-m', 'pytest', '-n', '2', '--dist', 'loadfile', '-k', DESELECTED.get(name, ''), *tests)
    finally:
        if not keep:
            shutil.rmtree(env, ignore_errors=True)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('names', nargs='*', default=list(VERSIONS))
    parser.add_argument('--keep', action='store_true')
    args = parser.parse_args()
    results = {name: check(name, args.keep) for name in args.names}
    print(*(f'{name}: {"passed" if passed else "FAILED"}' for name, passed in results.items()), sep='\n')
    sys.exit(not all(results.values()))
