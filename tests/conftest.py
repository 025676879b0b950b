import argparse
import subprocess
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import AUTOLOAD_OFF, DEVICE, Forks
from PIL import Image
from timm.utils import CheckpointSaver, ModelEmaV3, update_summary
from torch import nn


@pytest.fixture(scope='session', autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope='module', autouse=True)
def _nothing_compiled():
    torch.compiler.reset()  # otherwise many tests of one process reach the limit of recompilations


@pytest.fixture(scope='module', autouse=True)
def _device(request):
    """Runs the tests of layers and models on TIMM_ELA_DEVICE; all others are about what does not depend on it."""
    if DEVICE == 'cpu' or request.path.parent.name not in ('layers', 'models'):
        yield
        return
    # TF32 rounds to 10 bits; an algorithm that is chosen by its time can differ between two equal models
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def forks(tmp_path_factory) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs code where torch is imported and timm is not, in a process of its own; `hook` is that of PyTorch."""
    interpreters = {}

    def run(code: str, *args: object, hook: bool = True, exit_code: int = 0) -> subprocess.CompletedProcess:
        if hook not in interpreters:
            interpreters[hook] = Forks({} if hook else AUTOLOAD_OFF, tmp_path_factory.mktemp('forks'))
        return interpreters[hook].run(code, *args, exit_code=exit_code)

    yield run
    for interpreter in interpreters.values():
        interpreter.kill()
        interpreter.communicate()


@pytest.fixture(scope='session')
def randomize():
    """Moves norms, and whatever else starts at zero, away from initial values, where mistakes cannot be seen.

    A fresh ResNet's last batch norm of each block is zero, and hides all that comes before it; running statistics
    that are not those of the activations let a deep network's signal die out, so they are taken from one batch.
    """
    def randomize(model: nn.Module) -> nn.Module:
        norms, training = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)], model.training
        with torch.no_grad():
            for m in norms:
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
            for m in model.modules():
                if isinstance(m, nn.GroupNorm) and m.affine:
                    m.weight.normal_()
                    m.bias.normal_()
            for p in model.parameters():
                if not p.any():
                    p.normal_(0, 0.3)
            if norms and hasattr(model, 'in_chans'):
                momenta = [m.momentum for m in norms]
                for m in norms:
                    m.momentum = 1
                model.train()(torch.randn(4, model.in_chans, 64, 48))
                for m, momentum in zip(norms, momenta, strict=True):
                    m.momentum = momentum
        return model.train(training)

    return randomize


@pytest.fixture
def image() -> Image.Image:
    """A wide picture without symmetries."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 13, 3), dtype=np.uint8)).resize((260, 140))


@pytest.fixture
def write_run(tmp_path) -> Callable[..., Path]:
    """Writes a run's folder by timm's own code, as train.py does: args.yaml, summary.csv and three epochs' checkpoints.

    Called with the model, the average of its weights if the run kept one, and what differs from train_args.yaml. The
    best is epoch 1, top-1 70.5 and top-5 95.25: `model_best.pth.tar` holds the model's weights.
    """
    def write(model: nn.Module, average: nn.Module | None = None, /, **changes) -> Path:
        folder = tmp_path / 'run'
        folder.mkdir()
        args = yaml.safe_load((Path(__file__).parent / 'hub' / 'train_args.yaml').read_text())
        args |= {'model': model.pretrained_cfg['architecture'], 'num_classes': model.num_classes}
        args |= {'model_ema': average is not None, **changes}
        (folder / 'args.yaml').write_text(yaml.safe_dump(args, default_flow_style=False))
        saver = CheckpointSaver(
            model, torch.optim.SGD(model.parameters(), 0.1), args=argparse.Namespace(**args, prefetcher=True),
            model_ema=average and ModelEmaV3(average), checkpoint_dir=folder, recovery_dir=folder)
        worse, best = deepcopy(model), None
        nn.init.zeros_(worse.get_classifier().bias)
        for epoch, top1 in enumerate((50.0, 70.5, 60.0)):
            metrics = {'loss': 1.5, 'top1': top1, 'top5': top1 + 24.75}
            update_summary(epoch, {'loss': 2.0}, metrics, folder / 'summary.csv', lr=0.1, write_header=best is None)
            saver.model = model if epoch == 1 else worse
            best, _ = saver.save_checkpoint(epoch, top1)
        return folder

    return write


@pytest.fixture
def train_run(write_run) -> Path:
    """The folder of a run of the smallest model, with 3 classes."""
    return write_run(timm.create_model('mobilenetv2_050_ela_t', num_classes=3))
