"""Writes a run of train.py, or a checkpoint, as a folder of weights, config and card that timm loads."""
import inspect
import json
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from timm.data import resolve_data_config
from timm.models import get_arch_name, get_deprecated_models, save_for_hf
from torch import Tensor, nn

from ..models.registry import GRAFT, MODELS, WEIGHTS_INFO
from ..models.weights import check_weights
from .cards import converted_card, run_card
from .train_run import TrainRun, errors_name, read_checkpoint, read_class_names, write_args

# the files of a checkpoint's folder, and those of a run's: a push uploads nothing else
FILES = ('model.safetensors', 'config.json', 'README.md')
ALL_FILES = (*FILES, 'args.yaml')


@contextmanager
def _new_folder(out_dir: Path, force: bool) -> Iterator[Path]:
    """Yields a folder whose files move into out_dir if nothing fails, so that nothing is left half-written.

    That folder is in out_dir, which may be a mount point or the only writable place, or where out_dir will be.
    """
    found = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    if found and not (force and set(FILES) <= found <= set(ALL_FILES)):
        raise FileExistsError(
            f'{out_dir} holds {min(found.difference(ALL_FILES) or found)}: choose another folder. --force replaces an '
            f'export, that is {", ".join(ALL_FILES)}, and nothing else.')
    place = next(folder for folder in (out_dir, *out_dir.parents) if folder.exists())
    with TemporaryDirectory(prefix='.timm-ela-', dir=place) as temporary:
        yield Path(temporary)
        out_dir.mkdir(parents=True, exist_ok=True)
        # the weights first: Windows does not replace them where another program has them open
        for name in ALL_FILES:
            if Path(temporary, name).exists():
                Path(temporary, name).replace(out_dir / name)
            else:
                (out_dir / name).unlink(missing_ok=True)


def check_finite(state_dict: dict[str, Tensor]) -> None:
    """Raises ValueError if a weight is NaN or infinite, with the first key."""
    for k, v in state_dict.items():
        # isfinite does not take 8-bit floats
        if not v.float().isfinite().all():
            raise ValueError(f'The weights are not finite: {k!r} holds NaN or infinity.')


def _check_tag(tag: str | None) -> None:
    if tag and not re.fullmatch(r'[\w.-]+', tag):
        raise ValueError(f'The tag {tag!r} cannot stand in MODEL.TAG: it may have letters, digits, "_", "-" and ".".')


def _create_args(args: dict[str, Any]) -> dict[str, Any]:
    """Returns what train.py passes to create_model for its arguments, as far as it shapes the model."""
    create_args = dict(
        num_classes=args.get('num_classes'), in_chans=args.get('in_chans') or (args.get('input_size') or [3])[0],
        global_pool=args.get('gp'), bn_eps=args.get('bn_eps'), bn_momentum=args.get('bn_momentum'),
        **(args.get('model_kwargs') or {}))
    return {k: v for k, v in create_args.items() if v is not None}


def _classes_and_channels(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, int]:
    """Returns num_classes and in_chans of weights of a model; 0 classes if there is no classifier."""
    parts = (model.pretrained_cfg[key] for key in ('first_conv', 'classifier'))
    # VOLO has two classifiers
    names = (part if isinstance(part, str) else part[0] for part in parts)
    stem, head = (state_dict.get(f'{name}.weight') for name in names)
    return dict(num_classes=0 if head is None else len(head), in_chans=3 if stem is None else stem.shape[1])


def _load(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    state_dict = check_weights(state_dict, model)
    with errors_name(f'The weights are not those of {model.pretrained_cfg["architecture"]}'):
        model.load_state_dict(state_dict)
    # after loading, since a float64 may be too large for a float32
    check_finite(model.state_dict())


def _set_cfg(
        model: nn.Module, in_chans: int, args: dict[str, Any], tag: str, license: str | None,
        from_cfg: bool = False) -> None:
    """Makes a model's cfg, which describes the weights of its tag, one of other weights.

    Args:
        args: Arguments of the run of train.py, which say how it saw its images; empty if there was none.
        from_cfg: Whether the run began with the weights that the cfg describes.
    """
    cfg = model.pretrained_cfg
    data_config = resolve_data_config(args, model=model)
    data_config['input_size'] = (in_chans, *data_config['input_size'][1:])
    for key in ('mean', 'std'):
        # timm's loader too takes the average of values that are not as many as the channels
        if len(data_config[key]) != in_chans:
            data_config[key] = (sum(data_config[key]) / len(data_config[key]),) * in_chans
    untrue = ['label_names', 'label_descriptions', *(() if from_cfg else WEIGHTS_INFO)]
    if args:
        # a run tests at its own size
        untrue += ['test_input_size', 'test_crop_pct']
    if data_config['input_size'][1:] != tuple(cfg['input_size'][1:]):
        untrue.append('pool_size')
    for key in untrue:
        cfg.pop(key, None)
    cfg.update(data_config, tag=tag, license=license or cfg.get('license'))


def _write(
        folder: Path, model: nn.Module, create_args: dict[str, Any], label_names: list[str] | None, card: str) -> None:
    # arguments of create_model itself, such as pretrained_cfg_overlay, are no part of the architecture
    model_args = {k: v for k, v in create_args.items() if k not in inspect.signature(timm.create_model).parameters}
    save_for_hf(
        model, folder, model_config={'label_names': label_names}, model_args=model_args, safe_serialization=True)
    # the config has num_classes beside model_args, and transformers fails when both have it
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    config['model_args'].pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2) + '\n')
    # safetensors makes its file readable by its owner only
    shutil.copymode(path, folder / 'model.safetensors')
    (folder / 'README.md').write_text(card, encoding='utf-8')


def export_run(
        run_dir: str | Path, out_dir: str | Path, *, tag: str | None = None, dataset: str | None = None,
        ema: bool = True, class_names: str | Path | None = None, checkpoint: str = 'model_best.pth.tar',
        license: str | None = None, force: bool = False) -> Path:
    """Writes a run of timm's train.py as a folder of model.safetensors, config.json, README.md and args.yaml.

    By default the weights are those that the metrics in summary.csv were measured on. args.yaml holds the run's
    arguments without local paths: `train.py --config args.yaml --data-dir DATA` repeats the run.

    Args:
        run_dir: Folder with args.yaml, summary.csv and the checkpoint.
        out_dir: Folder to write; its files appear only when all are complete.
        tag: The weights' tag; by default the dataset's name.
        dataset: Name of the dataset for the card; by default that of the run, or of its data folder.
        ema: False takes the raw weights of a run that kept an average, and gives no accuracy for them.
        class_names: Text file with one class name per line.
        checkpoint: Name of the checkpoint in run_dir.
        license: Licence of the weights, such as 'apache-2.0'; by default that of the weights that the run began with.
        force: Whether to replace the export that out_dir holds.

    Returns:
        out_dir.

    Raises:
        FileNotFoundError: If run_dir, its args.yaml or the checkpoint does not exist.
        FileExistsError: If out_dir holds anything or, with `force`, anything but an export.
        ValueError: If a file cannot be read or has invalid content, such as weights that are not finite or that have
            other shapes than the model's.
        RuntimeError: If the weights are not those of the run's model.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    _check_tag(tag)
    with _new_folder(out_dir, force) as folder:
        run = TrainRun.read(run_dir, checkpoint, ema)
        dataset = dataset or run.dataset
        tag = tag or re.sub(r'[^\w.-]+', '_', dataset.lower())
        other_start = run.args.get('pretrained_path') or run.args.get('initial_checkpoint')
        from_cfg = bool(run.args.get('pretrained') and not other_start)
        with errors_name(run_dir / 'args.yaml'):
            create_args = _create_args(run.args)
            model = timm.create_model(run.args['model'], **create_args)
            _set_cfg(model, create_args['in_chans'], run.args, tag, license, from_cfg)
        _load(model, run.state_dict)

        base = (model.pretrained_cfg.get('hf_hub_id') or '') if from_cfg else ''
        card = run_card(model, run, dataset, base.partition('@')[0] or None)
        _write(folder, model, create_args, read_class_names(run.args, model.num_classes, class_names), card)
        write_args(run.args, folder / 'args.yaml')
    return out_dir


def convert_checkpoint(
        checkpoint: str | Path, model_name: str, out_dir: str | Path, *, tag: str | None = None, ema: bool = True,
        class_names: str | Path | None = None, license: str | None = None, force: bool = False) -> Path:
    """Grafts a plain model's checkpoint, or renames an author's, and writes it as a folder that timm loads.

    The folder holds all weights of the model, and the head if the checkpoint has one.

    Args:
        checkpoint: A `.pth.tar` of train.py, a `.pth` or a `.safetensors` of the plain timm model, or one in a layout
            that the model's family knows, such as its authors'.
        model_name: The model of ours that will hold the weights, such as 'resnet50_ela_b'.
        ema: Whether to take the averaged weights where the checkpoint has them.

    The other arguments, the result and the errors are those of `export_run`. By default, the tag is 'graft_custom' or
    'custom'. It also raises ValueError if model_name is no model of timm_ela, and RuntimeError if the checkpoint is one
    of the model already.
    """
    checkpoint, out_dir = Path(checkpoint), Path(out_dir)
    _check_tag(tag)
    arch = get_arch_name(model_name)
    # another name of the model, such as mobilenetv2_100_ela_b
    arch = get_deprecated_models().get(arch, arch)
    if arch not in MODELS:
        raise ValueError(f'{model_name!r} is not a model of timm_ela: `timm-ela list` shows them.')
    with _new_folder(out_dir, force) as folder:
        found, saved = read_checkpoint(checkpoint, ema)
        # train.py saves its weights as state_dict, beside args with the input size, mean and std
        args = vars(saved['args']) if 'state_dict' in saved and isinstance(saved.get('args'), Namespace) else {}
        with errors_name(checkpoint):
            create_args = _create_args(args)
            # to rename the weights, their names and order in the model are enough
            skeleton = timm.create_model(model_name, device='meta', **create_args)
        renamed = MODELS[arch].rename_state_dict(found, skeleton)
        create_args |= _classes_and_channels(renamed, skeleton)
        model = timm.create_model(model_name, **create_args)
        weights = MODELS[arch].checkpoint_filter_fn(renamed, model)
        grafted = len(weights) > len(renamed)
        if not grafted and renamed.keys() == found.keys():
            raise RuntimeError(
                f'{checkpoint} is a checkpoint of {arch} already: load it as it is, or put it into the folder RUN of '
                f'its run, and `timm-ela export RUN {out_dir} --checkpoint {checkpoint.name}`.')
        _load(model, weights)
        with errors_name(checkpoint):
            _set_cfg(model, create_args['in_chans'], args, tag or (f'{GRAFT}custom' if grafted else 'custom'), license)
        card = converted_card(model, checkpoint.name, grafted)
        _write(folder, model, create_args, read_class_names(args, model.num_classes, class_names), card)
    return out_dir
