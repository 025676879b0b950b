"""The lowest and the highest versions that pyproject.toml admits, each set in an environment of its own.

    python tests/compat.py [NAME ...]    without a name: every row of VERSIONS

An environment lies in .venv-compat/ for as long as its tests run: it takes about 6 GB. A Python that is not installed
here is a row that fails, with that reason.
"""
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# name -> Python, requirements. A newer version is the one that the package index gives on the day.
VERSIONS = {
    'lowest': ('3.10', ['torch==2.5', 'timm==1.0.31', 'huggingface_hub==1.33']),
    'highest': ('3.13', ['torch', 'timm', 'huggingface_hub']),
}
TESTS = ['layers', 'models', 'hub/test_push.py', 'test_autoload.py']
# PyTorch 2.5 exports no dynamic height and width of a plain ResNet either, and no batch norm to ONNX. It exports by
# dynamo, where ELA's form for phones is not taken, and its torch.fx cannot trace its pruning.
DESELECTED = {
    'lowest': 'not exports_with_any_height_and_width and not (elsa_volo and onnxruntime) '
              'and not (attn_layers and (exported and not ela_ or onnxruntime)) '
              'and not only_operators_that_phones_have and not (pruned and transformed)'}
REPORT = '''
import sys, huggingface_hub, timm, torch
print('Python', sys.version.split()[0], *(f'{m.__name__} {m.__version__}' for m in (torch, timm, huggingface_hub)))
'''


def check(name: str) -> bool:
    """Installs one row's versions and runs the tests with them."""
    python, requirements = VERSIONS[name]
    env = ROOT / '.venv-compat' / name
    interpreter = shutil.which(f'python{python}')
    if not interpreter:
        print(f'{name}: there is no python{python} here')
        return False
    shutil.rmtree(env, ignore_errors=True)
    try:
        for command in (
            [interpreter, '-m', 'venv', env],
            [env / 'bin/python', '-m', 'pip', 'install', '--quiet', '--editable', f'{ROOT}[test]', *requirements],
            [env / 'bin/python', '-c', REPORT],
            [env / 'bin/python', '-m', 'pytest', '-n', '2', '--dist', 'loadfile', '-k', DESELECTED.get(name, ''),
             *(ROOT / 'tests' / test for test in TESTS)],
        ):
            if subprocess.run(command, cwd=ROOT).returncode:
                return False
        return True
    finally:
        shutil.rmtree(env, ignore_errors=True)


if __name__ == '__main__':
    results = {name: check(name) for name in sys.argv[1:] or VERSIONS}
    print(*(f'{name}: {"passed" if passed else "FAILED"}' for name, passed in results.items()), sep='\n')
    sys.exit(not all(results.values()))
