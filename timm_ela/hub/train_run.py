"""Reads what timm's train.py leaves: checkpoints, args.yaml, summary.csv, class names. Never runs a pickle."""
import argparse
import csv
import logging
import math
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from timm.data import create_dataset
from timm.data.dataset_factory import _search_split
from timm.data.readers.class_map import load_class_map
from timm.models import clean_state_dict
from torch import Tensor

_logger = logging.getLogger(__name__)

_TYPES: dict[type, tuple[str, ...]] = {  # of the arguments in args.yaml that are more than printed
    str: ('train_split', 'val_split', 'gp', 'interpolation', 'crop_mode', 'amp_dtype'),
    Path: ('dataset', 'data_dir', 'data', 'class_map', 'pretrained_path', 'initial_checkpoint'),
    int: ('num_classes', 'in_chans', 'img_size'),
    float: ('bn_eps', 'bn_momentum', 'crop_pct'),
    bool: ('pretrained', 'model_ema', 'model_ema_force_cpu', 'amp'),
    list: ('input_size', 'mean', 'std'),
    dict: ('model_kwargs',),
}
_CALLED = {str: 'a line of text', Path: 'a text', float: 'a number', list: 'a list of numbers', dict: 'a dict of names'}


def printable(text: str) -> str:
    """The text with blanks for line breaks and whatever else cannot be printed."""
    return ''.join(c if c.isprintable() else ' ' for c in text).strip()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a `.safetensors`, `.pth` or `.pth.tar` checkpoint onto the CPU, weights only.

    Returns:
        The checkpoint's dict, with the weights under 'state_dict', and under 'state_dict_ema' if it holds an average.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, corrupt or no checkpoint of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path}.')
    broken = 'is truncated, corrupt or no checkpoint'
    try:
        checkpoint: Any = load_file(path) if path.suffix == '.safetensors' else _load_weights_only(path)
    except pickle.UnpicklingError as error:  # torch's own words are many, and advise to run the pickle's code
        found = re.search(r'GLOBAL ([\w.]+)', str(error))
        what = f'holds {found[1]}, and code is never run: save the state_dict alone' if found else broken
        raise ValueError(f'{path} {what}.') from error
    except Exception as error:  # a broken file makes torch raise one of many types
        raise ValueError(f'{path} {broken}: {str(error).partition(". ")[0]}') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, not a dict of weights.')
    if 'state_dict' not in checkpoint:
        checkpoint = {'state_dict': checkpoint.get('model', checkpoint)}
    if checkpoint.get('state_dict_ema') is None:  # train.py writes the key in any case
        checkpoint.pop('state_dict_ema', None)
    for key in {'state_dict', 'state_dict_ema'} & checkpoint.keys():
        if not _is_state_dict(checkpoint[key]):
            raise ValueError(f'{path} holds no state dict under {key!r}.')
        checkpoint[key] = clean_state_dict(checkpoint[key])
    return checkpoint


def _load_weights_only(path: Path) -> Any:
    if zipfile.is_zipfile(path):  # torch.load checks no checksum, and would give other weights than were saved
        with zipfile.ZipFile(path) as archive:
            if (name := archive.testzip()) is not None:
                raise ValueError(f'the checksum of its {name} is wrong')
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():  # train.py stores its args
        warnings.simplefilter('ignore')  # of the pickle protocol
        return torch.load(path, map_location='cpu', weights_only=True)


def _is_state_dict(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


@dataclass(frozen=True)
class TrainRun:
    """A run of train.py."""

    args: dict[str, Any]  # args.yaml
    state_dict: dict[str, Tensor]
    averaged: bool  # True if the weights are the run's moving average
    epoch: int | None  # of the checkpoint, from 0
    metrics: dict[str, float]  # accuracy of these weights in percent, 'top1' and 'top5'; empty if it was not measured

    @classmethod
    def read(cls, run_dir: Path, checkpoint: str = 'model_best.pth.tar', ema: bool = True) -> 'TrainRun':
        """Reads the folder of a run.

        Args:
            run_dir: Folder with args.yaml, summary.csv and the checkpoint.
            checkpoint: Name of the checkpoint in run_dir.
            ema: Whether to take the moving average if the metrics are those of one.

        Raises:
            FileNotFoundError: If the folder, args.yaml or the checkpoint is missing.
            ValueError: If args.yaml or the checkpoint is not what train.py writes.
        """
        args = _read_args(run_dir)
        if not (run_dir / checkpoint).is_file():
            raise FileNotFoundError(f'{run_dir} has no {checkpoint}: --checkpoint NAME takes another one.')
        saved = read_checkpoint(run_dir / checkpoint)
        # With the average on the CPU, train.py measures the raw weights.
        measured_on_average = 'state_dict_ema' in saved and not args.get('model_ema_force_cpu')
        averaged = ema and measured_on_average
        epoch = saved.get('epoch')
        metrics = _read_metrics(run_dir, epoch) if averaged == measured_on_average else {}
        if metrics and _validated_on_all(args):
            _logger.warning(
                f'The data folder has no {_val_split(args)!r}: train.py measured the accuracy on training images '
                'too, and it is left out.')
            metrics = {}
        return cls(
            args=args,
            state_dict=saved['state_dict_ema' if averaged else 'state_dict'],
            averaged=averaged,
            epoch=epoch,
            metrics=metrics,
        )

    @property
    def val_split(self) -> str:
        """Name of the split that the accuracy was measured on."""
        return _val_split(self.args)

    @property
    def dataset(self) -> str:
        """Name of the dataset, or of the data folder; line breaks and the like are blanks."""
        args = self.args
        name = Path(args.get('dataset') or args.get('data_dir') or args.get('data') or '').name
        return printable(name) or 'custom'


def _val_split(args: dict[str, Any]) -> str:
    return args.get('val_split') or 'validation'


def _validated_on_all(args: dict[str, Any]) -> bool:
    """True if the data folder lacks the validation split: timm then takes every image under it."""
    root = Path(args.get('data_dir') or args.get('data') or '')
    if args.get('dataset') or root == Path() or not root.is_dir():
        return False
    return Path(_search_split(str(root), _val_split(args))) == root


def _read_args(run_dir: Path) -> dict[str, Any]:
    if not run_dir.is_dir():
        is_file = run_dir.is_file()
        raise FileNotFoundError(
            f'{run_dir} is a file: give the folder of the run.' if is_file else f'There is no folder {run_dir}.')
    path = run_dir / 'args.yaml'
    if not path.is_file():
        raise FileNotFoundError(f'{run_dir} has no args.yaml: it must be the output folder of a run of train.py.')
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not valid YAML: {error}') from error
    if not isinstance(args, dict) or not isinstance(args.get('model'), str):
        raise ValueError(f'{path} names no model: it must be the args.yaml that train.py wrote.')
    check_args(args, path)
    return args


def check_args(args: dict[str, Any], where: Path) -> None:
    """Raises ValueError if an argument of train.py is not of its type, or has a line break.

    Args:
        args: The arguments; what is absent or None is right.
        where: File that they were read from.
    """
    for kind, keys in _TYPES.items():
        for key in keys:
            value = args.get(key)
            if value is not None and not _fits(value, kind):
                raise ValueError(f'{where}: {key} is {value!r}, and must be {_CALLED.get(kind, kind.__name__)}.')


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # for Python, also an int
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    if kind is list:
        return isinstance(value, (list, tuple)) and all(_fits(v, float) for v in value)
    if kind is dict:
        return isinstance(value, dict) and all(isinstance(k, str) for k in value)
    if kind is str:
        return isinstance(value, str) and value.isprintable()
    return isinstance(value, str if kind is Path else kind)


def _read_metrics(run_dir: Path, epoch: int | None) -> dict[str, float]:
    """Top-1 and top-5 of an epoch, in percent.

    Raises:
        ValueError: If summary.csv is not a table with commas, or a value is not from 0 to 100.
    """
    path = run_dir / 'summary.csv'
    if epoch is None or not path.is_file():
        return {}
    last = None
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            table = csv.DictReader(file, skipinitialspace=True)
            for row in table:
                if row.get('epoch') == str(epoch):
                    # A resumed run may list an epoch twice: the last one is the one that was saved.
                    last = table.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f'{path} is not the UTF-8 text with commas that train.py writes: {error}') from error
    columns = table.fieldnames
    if columns is None:
        return {}
    wanted = ['epoch', *(['eval_top1', 'eval_top5'] if 'eval_loss' in columns else [])]
    if absent := [column for column in wanted if column not in columns]:
        raise ValueError(f'{path} has no column {absent[0]}: it must be a table with commas, as train.py writes it.')
    if last is None:
        _logger.warning(f'{path} has no row of epoch {epoch}: the card will state no accuracy.')
        return {}
    line, row = last
    if None in row or None in row.values():
        raise ValueError(f'{path}, line {line}: not as many values as columns; decimals take a point.')
    metrics = {}
    for key in ('top1', 'top5'):
        text = row.get(f'eval_{key}') or 'nan'
        try:
            value = float(text)
        except ValueError as error:
            raise ValueError(f'{path}, line {line}: eval_{key} is {text!r}, not a number.') from error
        if not math.isnan(value):
            if not 0 <= value <= 100:
                raise ValueError(f'{path}, line {line}: eval_{key} is {text}, not a percentage from 0 to 100.')
            metrics[key] = value
    return metrics


def read_class_names(args: dict[str, Any]) -> list[str]:
    """The class names of a run's class map or data folder, in the head's order; empty where neither can be read."""
    root = args.get('data_dir') or args.get('data')
    class_map = args.get('class_map') or ''
    class_to_idx = {}
    try:
        if root and Path(root).exists() and not args.get('dataset'):  # folders and tars: only these are read from paths
            dataset = create_dataset('', root, split=args.get('train_split') or 'train', class_map=class_map)
            class_to_idx = dataset.reader.class_to_idx
        elif class_map and Path(class_map).exists():
            class_to_idx = load_class_map(class_map)
    except (AssertionError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        _logger.warning(f'The class names of the run cannot be read (any more): {error}')
    names = sorted(class_to_idx, key=class_to_idx.__getitem__)
    return names if sorted(class_to_idx.values()) == list(range(len(names))) else []


def read_names_file(path: str | Path) -> list[str]:
    """The class names of a text file, one a line.

    Raises:
        ValueError: If it is not a text file.
    """
    try:
        lines = Path(path).read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not a UTF-8 text file with one class name a line: {error}') from error
    return [line.strip() for line in lines if line.strip()]
