"""Reads what timm's train.py writes: checkpoints (without running code), args.yaml, summary.csv, class names."""
import argparse
import csv
import logging
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
from safetensors.torch import load_file
from timm.data import create_dataset
from torch import Tensor

from ..models.weights import unwrap

_logger = logging.getLogger(__name__)

# arguments that say where a run read and wrote, how it was resumed, and what it logged
_LOCAL_ARGS = (
    'data', 'data_dir', 'output', 'experiment', 'resume', 'no_resume_opt', 'start_epoch', 'local_rank', 'log_interval',
    'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id')
# names, such as hfds/timm/flowers. In all other arguments, text with a slash is a path.
_NAME_ARGS = ('dataset', 'train_split', 'val_split', 'model', 'kd_model_name', 'hf_hub_id')
# a name with a local path, such as local-dir:/home/me/model and hfds//home/me/flowers: matches what precedes the path
_LOCAL_NAME = re.compile(r'local-dir:|(\w+/)?(?=[/\\~.]|\w:)', re.IGNORECASE)


@contextmanager
def errors_name(place: str | Path) -> Iterator[None]:
    """Turns an error that a file's content causes into a ValueError of one line that begins with the file's name."""
    try:
        yield
    except Exception as error:
        # timm raises any type for what it does not expect
        raise ValueError(f'{place}: {" ".join(str(error).split())[:300] or type(error).__name__}') from error


def read_checkpoint(path: Path, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a `.safetensors`, `.pth` or `.pth.tar` checkpoint onto the CPU, weights only.

    Returns:
        The weights that timm's `load_state_dict` takes (with `ema`, the averaged ones if the file has them), and the
        whole content of the file, with 'epoch', 'args' and so on.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, corrupt or no checkpoint of weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path}.')
    try:
        saved: Any = load_file(path) if path.suffix == '.safetensors' else _load_weights_only(path)
    except Exception as error:
        # A broken file makes torch raise one of many types. About code, torch's message is long and advises to run it.
        found = re.search(r'GLOBAL ([\w.]+)', str(error))
        reason = f'holds {found[1]}, and code is never run: save the state_dict alone.' if found else (
            f'is truncated, corrupt or no checkpoint: {str(error).partition(". ")[0]}')
        raise ValueError(f'{path} {reason}') from error
    # content that is no dict has no such attributes
    with suppress(AttributeError):
        averages = [saved.get(name) for name in ('state_dict_ema', 'model_ema') if ema]
        state_dict = unwrap(next(filter(None, averages), saved))
        if state_dict and all(isinstance(value, Tensor) for value in state_dict.values()):
            # Drop the counter of torch's AveragedModel and the auxiliary batch norms of --split-bn: predictions do not
            # use them, and timm's clean_checkpoint.py drops them too.
            return {k: v for k, v in state_dict.items() if k != 'n_averaged' and '.aux_bn.' not in k}, saved
    what = ', '.join(map(repr, list(saved)[:8])) if isinstance(saved, dict) else f'a {type(saved).__name__}'
    raise ValueError(
        f'{path} holds {what or "nothing"}, and no state dict under a name that timm reads (state_dict, model, or '
        'their averages): save the state_dict alone.')


def _load_weights_only(path: Path) -> Any:
    # torch.load checks no checksum, and would return other weights than were saved
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise ValueError(f'the checksum of its {name} is wrong')
    # train.py saves its args as a Namespace
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        # about the pickle protocol
        warnings.simplefilter('ignore')
        return torch.load(path, map_location='cpu', weights_only=True)


@dataclass(frozen=True)
class TrainRun:
    """A run of train.py.

    Attributes:
        args: Arguments in args.yaml.
        state_dict: Weights.
        averaged: Whether the weights are the run's moving average; None if the checkpoint does not say.
        epoch: Epoch of the checkpoint, from 0; None if the checkpoint does not say.
        metrics: Accuracy of the weights in percent, 'top1' and 'top5'; empty if it was not measured.
    """

    args: dict[str, Any]
    state_dict: dict[str, Tensor]
    averaged: bool | None
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
            raise FileNotFoundError(f'{run_dir} has no {checkpoint}: choose another one with --checkpoint NAME.')
        # with --model-ema-force-cpu, train.py tests the raw weights
        tests_average = not args.get('model_ema_force_cpu')
        state_dict, saved = read_checkpoint(run_dir / checkpoint, ema and tests_average)
        if 'state_dict' not in saved:
            # avg_checkpoints.py and clean_checkpoint.py write such a file
            return cls(args, state_dict, None, None, {})
        has_average = tests_average and saved.get('state_dict_ema') is not None
        run = cls(args, state_dict, ema and has_average, saved.get('epoch'), {})
        if run.averaged != has_average or run._validated_on_all():
            return run
        return replace(run, metrics=_read_metrics(run_dir / 'summary.csv', run.epoch))

    @property
    def dataset(self) -> str:
        """Name of the dataset, or of the data folder."""
        return Path(str(self.args.get('dataset') or _data_dir(self.args))).name or 'custom'

    def _validated_on_all(self) -> bool:
        """True if the data folder has no validation split: timm then takes every image under it, and this warns."""
        split = self.args.get('val_split') or 'validation'
        reader = _open_data(self.args, split)
        if reader is None or reader.root != _data_dir(self.args):
            return False
        _logger.warning(
            f'The data folder has no {split!r}: train.py measured the accuracy on training images too, '
            'and the card leaves it out.')
        return True


def _data_dir(args: dict[str, Any]) -> str:
    return str(args.get('data_dir') or args.get('data') or '')


def _open_data(args: dict[str, Any], split: str) -> Any:
    """Returns timm's reader of the images of a run. None if they are not in a folder or tar that is still there."""
    root = _data_dir(args)
    if args.get('dataset') or not root or not Path(root).exists():
        return None
    try:
        return create_dataset('', root, split=split, class_map=args.get('class_map') or '').reader
    except Exception as error:
        # timm raises any type for what it does not expect
        _logger.warning(f'The data of the run cannot be read: {error}')
        return None


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
    return {k: _without_folder(k, v) for k, v in args.items() if k not in _LOCAL_ARGS}


def _without_folder(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_folder(k, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folder(key, v) for v in value]
    if not isinstance(value, str):
        return value
    prefix = ''
    if key in _NAME_ARGS:
        match = _LOCAL_NAME.match(value)
        if match is None:
            return value
        prefix = match[0]
    # a PureWindowsPath takes both kinds of slashes
    return prefix + PureWindowsPath(value.removeprefix(prefix)).name


def write_args(args: dict[str, Any], path: Path) -> None:
    """Writes the args.yaml that is published, as train.py would."""
    path.write_text(yaml.safe_dump(published_args(args), allow_unicode=True), encoding='utf-8')


def _read_metrics(path: Path, epoch: int | None) -> dict[str, float]:
    """Reads the top-1 and top-5 accuracy of an epoch from summary.csv, in percent."""
    if not path.is_file():
        return {}
    rows = csv.DictReader(path.read_text(encoding='utf-8', errors='replace').splitlines())
    # a resumed run may list an epoch twice: the last row is that of the checkpoint
    row = {row.get('epoch'): row for row in rows}.get(str(epoch), {})
    with errors_name(path):
        return {key: float(row[f'eval_{key}']) for key in ('top1', 'top5') if row.get(f'eval_{key}')}


def read_class_names(args: dict[str, Any], num_classes: int, file: str | Path | None) -> list[str] | None:
    """Reads class names in the head's order, from a file or from a run's data folder. None if unknown.

    Raises:
        ValueError: If the file does not have one class name per line for each output of the head.
    """
    if file is not None:
        with errors_name(file):
            names = [line.strip() for line in Path(file).read_text('utf-8-sig').splitlines() if line.strip()]
        if len(names) != num_classes:
            raise ValueError(f'{file} holds {len(names)} class names, the head has {num_classes} outputs.')
        return names
    reader = _open_data(args, args.get('train_split') or 'train')
    class_to_idx = reader.class_to_idx if reader else {}
    if sorted(class_to_idx.values()) == list(range(num_classes)):
        return sorted(class_to_idx, key=class_to_idx.__getitem__)
    _logger.warning(f'No class names are written: give {num_classes} with --class-names FILE.')
    return None
