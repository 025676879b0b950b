"""Reads what timm's train.py leaves: checkpoints, args.yaml, summary.csv, class names. Never runs a pickle."""
import argparse
import csv
import pickle
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map
from timm.models import clean_state_dict
from torch import Tensor


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a `.safetensors`, `.pth` or `.pth.tar` checkpoint onto the CPU, weights only.

    Returns:
        The checkpoint's dict, with the weights under 'state_dict' (and 'state_dict_ema' where it holds an average).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, corrupt or no checkpoint of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'There is no checkpoint {path}.')
    try:
        if path.suffix == '.safetensors':
            checkpoint: Any = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # train.py stores its args as one
                checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(f'{path} is truncated, corrupt or no checkpoint: {error}') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'{path} holds a {type(checkpoint).__name__}, not a dict of weights.')
    if 'state_dict' not in checkpoint:
        checkpoint = {'state_dict': checkpoint.get('model', checkpoint)}
    for key in ('state_dict', 'state_dict_ema'):
        if checkpoint.get(key) is not None:
            checkpoint[key] = clean_state_dict(checkpoint[key])
            if not checkpoint[key] or not all(isinstance(v, Tensor) for v in checkpoint[key].values()):
                raise ValueError(f'{path} holds no state dict under {key!r}.')
    return checkpoint


def read_args(run_dir: Path) -> dict[str, Any]:
    """Reads a run's args.yaml.

    Raises:
        FileNotFoundError: If the run has none.
        ValueError: If it is not what train.py writes.
    """
    path = run_dir / 'args.yaml'
    if not path.is_file():
        raise FileNotFoundError(f'{run_dir} has no args.yaml: it must be the output folder of a run of train.py.')
    try:
        args = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f'{path} is not valid YAML: {error}') from error
    if not isinstance(args, dict) or not isinstance(args.get('model'), str):
        raise ValueError(f'{path} names no model: it must be the args.yaml that train.py wrote.')
    return args


def read_metrics(run_dir: Path, epoch: int | None) -> dict[str, float]:
    """The metrics of one epoch in a run's summary.csv, in percent; empty where it has none."""
    path = run_dir / 'summary.csv'
    if epoch is None or not path.is_file():
        return {}
    with path.open(newline='') as file:
        rows = [row for row in csv.DictReader(file) if row.get('epoch') == str(epoch)]
    if not rows:
        return {}
    # A resumed run may list an epoch twice: the last one is the one that was saved.
    return {key: float(rows[-1][f'eval_{key}']) for key in ('top1', 'top5') if rows[-1].get(f'eval_{key}')}


def read_class_names(args: dict[str, Any], num_classes: int, file: str | Path | None = None) -> list[str] | None:
    """Class names in the head's order: from a file with one name a line, else from the run's class map or data folder.

    Args:
        args: The run's arguments.
        num_classes: Outputs of the head.
        file: Text file that takes precedence over what the run says.

    Returns:
        The names, or None where neither class map nor folder exists (any more) or they do not number num_classes.

    Raises:
        ValueError: If the file does not hold num_classes names.
    """
    if file is not None:
        names = [line.strip() for line in Path(file).read_text(encoding='utf-8').splitlines() if line.strip()]
        if len(names) != num_classes:
            raise ValueError(f'{file} holds {len(names)} class names, the head has {num_classes} outputs.')
        return names
    root = args.get('data_dir') or args.get('data')
    class_map = args.get('class_map') or ''
    class_to_idx = {}
    if root and Path(root).exists() and not args.get('dataset'):  # folders and tars: no other kind is read from a path
        dataset = create_dataset('', root, split=args.get('train_split') or 'train', class_map=class_map)
        class_to_idx = dataset.reader.class_to_idx
    elif class_map and Path(class_map).exists():
        class_to_idx = load_class_map(class_map)
    names = sorted(class_to_idx, key=class_to_idx.__getitem__)
    return names if sorted(class_to_idx.values()) == list(range(num_classes)) else None
