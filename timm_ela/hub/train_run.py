"""Reads what timm's train.py writes: checkpoints, args.yaml, summary.csv, class names. Never runs code from a file."""
import argparse
import csv
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
import yaml
from timm.data import create_dataset, is_img_extension
from timm.data.dataset_factory import _search_split
from timm.data.readers.class_map import load_class_map
from timm.models import load_state_dict
from torch import Tensor

_logger = logging.getLogger(__name__)

# arguments that say where a run read and wrote, how it was resumed, and what it logged
_LOCAL_ARGS = (
    'data', 'data_dir', 'output', 'experiment', 'resume', 'no_resume_opt', 'start_epoch', 'local_rank', 'log_interval',
    'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id')
FILE_ARGS = ('class_map', 'pretrained_path', 'initial_checkpoint')
# what may precede a path, as in local-dir:/home/me/model and hfds//home/me/flowers
_PATH_PREFIX = re.compile(r'local-dir:|\w+/(?=[/\\~.]|\w:)', re.IGNORECASE)


@contextmanager
def errors_name(place: str | Path) -> Iterator[None]:
    """Turns an error that a file's content causes into a ValueError of one line that begins with the file's name."""
    try:
        yield
    except Exception as error:
        # timm raises any type for what it does not expect
        raise ValueError(f'{place}: {" ".join(str(error).split())[:300] or type(error).__name__}') from error


def read_checkpoint(path: str | Path, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a `.safetensors`, `.pth` or `.pth.tar` checkpoint onto the CPU, weights only.

    Returns:
        The weights that timm's `load_state_dict` takes (with `ema`, the averaged ones if the file has them), and the
        whole content of the file, with 'epoch', 'args' and so on.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, corrupt or no checkpoint of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path}.')
    with warnings.catch_warnings():
        # about the pickle protocol
        warnings.simplefilter('ignore')
        try:
            saved: Any = load_state_dict(str(path)) if path.suffix == '.safetensors' else _load_weights_only(path)
        except Exception as error:
            # A broken file makes torch raise one of many types. About code, torch's message is long and advises to
            # run it.
            found = re.search(r'GLOBAL ([\w.]+)', str(error))
            reason = f'holds {found[1]}, and code is never run: save the state_dict alone.' if found else (
                f'is truncated, corrupt or no checkpoint: {str(error).partition(". ")[0]}')
            raise ValueError(f'{path} {reason}') from error
        # content that is no dict has no such attributes
        with suppress(AttributeError):
            state_dict = load_state_dict(str(path), use_ema=ema)
            if state_dict and all(isinstance(value, Tensor) for value in state_dict.values()):
                # Drop the counter of torch's AveragedModel and the auxiliary batch norms of --split-bn: predictions do
                # not use them, and timm's clean_checkpoint.py drops them too.
                return {k: v for k, v in state_dict.items() if k != 'n_averaged' and '.aux_bn.' not in k}, saved
    what = ', '.join(map(repr, list(saved)[:8])) if isinstance(saved, dict) else f'a {type(saved).__name__}'
    raise ValueError(
        f'{path} holds {what or "nothing"}, and no state dict under a name that timm reads (state_dict, model, or '
        'their averages): save the state_dict alone.')


def _load_weights_only(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    # torch.load checks no checksum, and would return other weights than were saved
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise ValueError(f'the checksum of its {name} is wrong')
    # train.py saves its args as a Namespace
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)


@dataclass(frozen=True)
class TrainRun:
    """A run of train.py.

    Attributes:
        args: Arguments in args.yaml.
        state_dict: Weights.
        averaged: Whether the weights are the run's moving average.
        epoch: Epoch of the checkpoint, from 0.
        metrics: Accuracy of the weights in percent, 'top1' and 'top5'; empty if it was not measured.
    """

    args: dict[str, Any]
    state_dict: dict[str, Tensor]
    averaged: bool
    epoch: int | None
    metrics: dict[str, float]

    @classmethod
    def read(cls, run_dir: Path, checkpoint: str = 'model_best.pth.tar', ema: bool = True) -> 'TrainRun':
        """Reads args.yaml, summary.csv and a checkpoint: with `ema`, the averaged weights if train.py tested those.

        Raises:
            FileNotFoundError: If the folder, args.yaml or the checkpoint is missing.
            ValueError: If a file is not what train.py writes.
        """
        args = read_args(run_dir)
        if not (run_dir / checkpoint).is_file():
            if (run_dir / 'config.json').is_file():
                raise FileNotFoundError(f'{run_dir} is an export already: push it, or load it as local-dir:{run_dir}.')
            raise FileNotFoundError(f'{run_dir} has no {checkpoint}: choose another one with --checkpoint NAME.')
        # with --model-ema-force-cpu, train.py tests the raw weights
        on_cpu = bool(args.get('model_ema_force_cpu'))
        state_dict, saved = read_checkpoint(run_dir / checkpoint, ema and not on_cpu)
        measured_on_average = saved.get('state_dict_ema') is not None and not on_cpu
        averaged, epoch = ema and measured_on_average, saved.get('epoch')
        metrics = _read_metrics(run_dir / 'summary.csv', epoch) if averaged == measured_on_average else {}
        run = cls(args, state_dict, averaged, epoch, metrics)
        if metrics and run._validated_on_all():
            _logger.warning(
                f'The data folder has no {run.val_split!r}: train.py measured the accuracy on training images too, '
                'and the card leaves it out.')
            run = replace(run, metrics={})
        return run

    @property
    def val_split(self) -> str:
        """Name of the split that the accuracy was measured on."""
        return str(self.args.get('val_split') or 'validation')

    @property
    def dataset(self) -> str:
        """Name of the dataset, or of the data folder."""
        return Path(str(self.args.get('dataset') or _data_dir(self.args))).name or 'custom'

    def _validated_on_all(self) -> bool:
        """True if the data folder has images but no validation split: timm then takes every image under it."""
        root = '' if self.args.get('dataset') else _data_dir(self.args)
        return root != '' and _search_split(root, self.val_split) == root and any(
            is_img_extension(path.suffix) for path in Path(root).rglob('*'))


def _data_dir(args: dict[str, Any]) -> str:
    return str(args.get('data_dir') or args.get('data') or '')


def read_args(run_dir: Path) -> dict[str, Any]:
    """Reads the arguments in a folder's args.yaml.

    Raises:
        FileNotFoundError: If there is no args.yaml.
        ValueError: If train.py did not write it.
    """
    path = run_dir / 'args.yaml'
    if not path.is_file():
        runs = [file.parent for file in run_dir.glob('*/args.yaml')]
        newest = f', such as {max(runs, key=lambda run: run.stat().st_mtime)}' if runs else ''
        raise FileNotFoundError(f'There is no {path}: give the output folder of a run of train.py{newest}.')
    with errors_name(path):
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
        if not isinstance(args, dict) or not isinstance(args.get('model'), str):
            raise ValueError('it names no model, so it is not what train.py wrote.')
    return args


def published_args(args: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments that repeat a run elsewhere: without local ones, and with file names instead of paths."""
    return {k: _without_folder(v, k in FILE_ARGS) for k, v in args.items() if k not in _LOCAL_ARGS}


def _without_folder(value: Any, is_path: bool = False) -> Any:
    if isinstance(value, dict):
        return {k: _without_folder(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folder(v) for v in value]
    if not isinstance(value, str):
        return value
    prefix = match[0] if (match := _PATH_PREFIX.match(value)) else ''
    # a PureWindowsPath takes both kinds of slashes
    path = PureWindowsPath(value.removeprefix(prefix))
    return prefix + path.name if is_path or prefix or path.anchor or value.startswith(('~', '.')) else value


def write_args(args: dict[str, Any], path: Path) -> None:
    """Writes the args.yaml that is published, as train.py would."""
    path.write_text(yaml.safe_dump(published_args(args), allow_unicode=True), encoding='utf-8')


def _read_metrics(path: Path, epoch: int | None) -> dict[str, float]:
    """Reads the top-1 and top-5 accuracy of an epoch from summary.csv, in percent."""
    if epoch is None or not path.is_file():
        return {}
    rows = csv.DictReader(path.read_text(encoding='utf-8', errors='replace').splitlines())
    # a resumed run may list an epoch twice: the last row is that of the checkpoint
    row = {row.get('epoch'): row for row in rows}.get(str(epoch))
    if row is None:
        _logger.warning(f'{path} has no row of epoch {epoch}: the card will state no accuracy.')
        return {}
    with errors_name(path):
        texts = {key: row.get(f'eval_{key}') for key in ('top1', 'top5')}
        metrics = {key: float(text) for key, text in texts.items() if text not in (None, '', 'nan')}
        for key, value in metrics.items():
            if not 0 <= value <= 100:
                raise ValueError(f'eval_{key} of epoch {epoch} is {value}, not a percentage from 0 to 100.')
    return metrics


def read_class_names(args: dict[str, Any], num_classes: int, file: str | Path | None) -> list[str] | None:
    """Reads class names in the head's order, from a file or from a run's class map or data folder. None if unknown.

    Raises:
        ValueError: If the file does not have one class name per line for each output of the head.
    """
    if file is not None:
        with errors_name(file):
            names = [line.strip() for line in Path(file).read_text('utf-8-sig').splitlines() if line.strip()]
        if len(names) != num_classes:
            raise ValueError(f'{file} holds {len(names)} class names, the head has {num_classes} outputs.')
        return names
    root, class_map, class_to_idx = _data_dir(args), args.get('class_map') or '', {}
    try:
        # without --dataset, timm reads a folder or a tar from the path
        if root and Path(root).exists() and not args.get('dataset'):
            dataset = create_dataset('', root, split=args.get('train_split') or 'train', class_map=class_map)
            class_to_idx = dataset.reader.class_to_idx
        elif class_map and Path(class_map).exists():
            class_to_idx = load_class_map(class_map)
    except (AssertionError, OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        _logger.warning(f'The class names of the run cannot be read: {error}')
    if sorted(class_to_idx.values()) == list(range(num_classes)):
        return sorted(class_to_idx, key=class_to_idx.__getitem__)
    _logger.warning(f'No class names are written: give {num_classes} with --class-names FILE.')
    return None
