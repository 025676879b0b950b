"""README.md of this folder, block by block, in fresh interpreters that do not import timm_ela."""
import re
import sys
import textwrap
from pathlib import Path

import pytest
import timm
from helpers import run
from hub_server import Hub, Repo
from timm.models import save_for_hf

from timm_ela.hub.publish import export_run

CLASSES = ['ant', 'bee', 'cat']
PLAIN = ('resnet50', 'mobilenetv2_100')  # whose weights the blocks ask for
# Line and line break in one write: the processes of torchrun share an unbuffered pipe.
PASSED = r'import sys; sys.stdout.write("passed\n")'
BEFORE = 'import torch; torch.set_num_threads(1); torch.manual_seed(0)'


def readme_block(title: str) -> str:
    """The Python block under this heading of README.md."""
    text = Path(__file__).with_name('README.md').read_text(encoding='utf-8')
    (section,) = re.findall(rf'^##+ {re.escape(title)}\n(.*?)^##', text, re.DOTALL | re.MULTILINE)
    (code,) = re.findall(r'```python\n(.*?)```', section, re.DOTALL)
    assert ('timm_ela' in code) == (title == 'YOLO with ELA as a row')
    return code


@pytest.fixture(scope='session')
def hub(tmp_path_factory, randomize):
    """A Hub on loopback that serves random weights in the place of timm's."""
    root = tmp_path_factory.mktemp('hub')
    with Hub() as hub:
        for name in PLAIN:
            model = randomize(timm.create_model(name))
            save_for_hf(model, root / name, safe_serialization=True)
            files = {file: (root / name / file).read_bytes() for file in ('config.json', 'model.safetensors')}
            hub.repos[f'timm/{name}.{model.pretrained_cfg["tag"]}'] = Repo(files)
        yield hub


@pytest.fixture
def write_my_model(tmp_path, write_run, randomize):
    """Writes 'my-model' into the working directory: what `timm-ela export` makes of a run of train.py."""

    def write(name: str = 'resnet18_ela_b') -> None:
        run_dir = write_run(randomize(timm.create_model(name, num_classes=len(CLASSES))), img_size=96)
        (run_dir / 'names.txt').write_text('\n'.join(CLASSES))
        export_run(run_dir, tmp_path / 'my-model', class_names=run_dir / 'names.txt')

    return write


@pytest.fixture
def execute(hub, tmp_path):
    """Executes code in a fresh interpreter, or in several, after a block of the README where a title is given."""

    def execute(code: str, title: str | None = None, processes: int = 1) -> list[str]:
        parts = [BEFORE, readme_block(title) if title else '', textwrap.dedent(code), PASSED]
        env = {
            'HF_ENDPOINT': hub.url, 'HF_HOME': tmp_path / 'hf', 'HF_HUB_OFFLINE': '0', 'HF_HUB_DISABLE_XET': '1',
            'NO_PROXY': '127.0.0.1', 'OMP_NUM_THREADS': '1', 'TORCHINDUCTOR_COMPILE_THREADS': '1',
            'CUDA_VISIBLE_DEVICES': '', 'ACCELERATE_USE_CPU': 'true',
            'YOLO_OFFLINE': '1', 'YOLO_AUTOINSTALL': '0', 'YOLO_CONFIG_DIR': tmp_path / 'ultralytics',
        }
        (tmp_path / 'block.py').write_text('\n'.join(parts))
        launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', processes] * (processes > 1)
        command = [sys.executable, *launch, tmp_path / 'block.py']
        lines = run(command, env=env, cwd=tmp_path, timeout=900).stdout.splitlines()
        assert lines[-1] == 'passed'
        return lines[:-1]

    return execute
