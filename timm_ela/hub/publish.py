"""Writes a run of train.py, or a checkpoint, as a folder of weights, config and card that timm loads."""
import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
from timm.data.model_config import resolve_input_data_config
from timm.models import get_arch_name, get_deprecated_models, get_pretrained_cfg, save_for_hf
from torch import Tensor, nn

from ..models.registry import GRAFT, MODELS, WEIGHTS_INFO
from ..models.weights import check_weights
from .cards import converted_card, run_card
from .train_run import TrainRun, errors_name, read_checkpoint, read_class_names, write_args

_logger = logging.getLogger(__name__)

# the files of a checkpoint's folder, and those of a run's: a push uploads nothing else
FILES = ('model.safetensors', 'config.json', 'README.md')
ALL_FILES = (*FILES, 'args.yaml')
# a folder in out_dir while that is written
_UNFINISHED = '.timm-ela-unfinished'


@contextmanager
def _new_folder(out_dir: Path, sources: Iterable[str | Path | None], force: bool) -> Iterator[Path]:
    """Yields a folder whose files move into out_dir if nothing fails, so that nothing is left half-written.

    The folder is inside out_dir, which may be a mount point, the current folder, or the only writable place. Its fixed
    name keeps other commands out of out_dir.
    """
    if (out_dir.exists() or out_dir.is_symlink()) and not out_dir.is_dir():
        raise FileExistsError(f'{out_dir} is a file or a broken link: choose a folder.')
    for source in [Path(source) for source in sources if source]:
        if out_dir.resolve() in (source.resolve(), *source.resolve().parents):
            raise FileExistsError(f'{out_dir} holds {source}, which could be overwritten: choose another folder.')
    made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
    unfinished, ours = out_dir / _UNFINISHED, True
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.mkdir()
        except FileExistsError as error:
            ours = False
            raise FileExistsError(
                f'{out_dir} is being written by another command; if none is running, delete {unfinished}.') from error
        # before the work, and after it
        _check_free(out_dir, force)
        yield unfinished
        _check_free(out_dir, force)
        _move(unfinished, out_dir)
    finally:
        if ours:
            shutil.rmtree(unfinished, ignore_errors=True)
        # a folder that is not empty stays
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _check_free(out_dir: Path, force: bool) -> None:
    """Raises FileExistsError if out_dir holds anything or, with `force`, anything but an export."""
    # the root of a disk has a folder lost+found
    found = {path.name for path in out_dir.iterdir()} - {_UNFINISHED, 'lost+found'}
    others = {name for name in found if name not in ALL_FILES or not (out_dir / name).is_file()}
    if found and not force:
        raise FileExistsError(
            f'{out_dir} is not empty, it holds {min(found)}: choose another folder, or --force replaces an export.')
    if others or (found and not found >= set(FILES)):
        raise FileExistsError(
            f'{out_dir} holds {min(others or found)} and is no export: --force replaces {", ".join(ALL_FILES)} alone.')


def _move(folder: Path, out_dir: Path) -> None:
    """Moves an export's files into out_dir. If that is interrupted, the files that they replace are moved back."""
    moves = [(out_dir / name, folder / f'old-{name}') for name in ALL_FILES if (out_dir / name).exists()]
    moves += [(folder / name, out_dir / name) for name in ALL_FILES if (folder / name).exists()]
    try:
        for source, target in moves:
            source.rename(target)
    except BaseException:
        for source, target in reversed(moves):
            if target.exists() and not source.exists():
                target.rename(source)
        raise


def check_finite(state_dict: dict[str, Tensor]) -> None:
    """Raises ValueError if a weight is NaN or infinite, with the first key."""
    for k, v in state_dict.items():
        # isfinite does not take 8-bit floats
        if not (v.float() if v.element_size() == 1 else v).isfinite().all():
            raise ValueError(f'The weights are not finite: {k!r} holds NaN or infinity.')


def _create_args(args: dict[str, Any]) -> dict[str, Any]:
    """Returns what train.py passes to create_model for its arguments, as far as it shapes the model."""
    in_chans = args.get('in_chans') or (args.get('input_size') or [None])[0]
    return dict(
        num_classes=args.get('num_classes'), in_chans=in_chans, global_pool=args.get('gp'), bn_eps=args.get('bn_eps'),
        bn_momentum=args.get('bn_momentum'), **(args.get('model_kwargs') or {}))


def _classes_and_channels(state_dict: dict[str, Tensor], name: str) -> dict[str, int]:
    """Returns num_classes and in_chans of weights of one of our models; 0 classes if there is no classifier."""
    cfg = get_pretrained_cfg(name)
    parts = (part if isinstance(part, str) else part[0] for part in (cfg.first_conv, cfg.classifier))
    stem, head = (state_dict.get(f'{part}.weight') for part in parts)
    return dict(num_classes=0 if head is None else len(head), in_chans=3 if stem is None else stem.shape[1])


def _load(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    model.load_state_dict(check_weights(state_dict, model))
    # after loading, since a float64 may be too large for a float32
    check_finite(model.state_dict())


def _describe_weights(cfg: dict[str, Any], license: str | None, keep: bool) -> None:
    """Removes from a model's cfg what is not true of its new weights. With `keep`, training began with the cfg's."""
    for key in ('label_names', 'label_descriptions', *(() if keep else WEIGHTS_INFO)):
        cfg.pop(key, None)
    cfg['license'] = license or cfg.get('license')
    if not cfg['license']:
        _logger.warning('The card says "Licence: not stated": set one with --license.')


def _write(folder: Path, model: nn.Module, data_config: dict[str, Any] | None, card: str, **config: Any) -> None:
    save_for_hf(model, folder, model_config=config, safe_serialization=True, data_config=data_config)
    # timm also writes num_classes into model_args, and transformers fails when both are there
    path = folder / 'config.json'
    written = json.loads(path.read_text())
    written['model_args'].pop('num_classes', None)
    path.write_text(json.dumps(written, indent=2) + '\n')
    # safetensors makes its file readable by its owner only
    shutil.copymode(path, folder / 'model.safetensors')
    # a file name in the card may not be valid UTF-8
    (folder / 'README.md').write_text(card, encoding='utf-8', errors='replace')


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
        ValueError: If a file cannot be read or has invalid content, such as weights that are not finite.
        RuntimeError: If the weights are not those of the run's model.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    with _new_folder(out_dir, [run_dir, *run_dir.glob('*'), class_names], force) as folder:
        run = TrainRun.read(run_dir, checkpoint, ema)
        dataset = dataset or run.dataset
        with errors_name(run_dir / 'args.yaml'):
            model = timm.create_model(run.args['model'], **_create_args(run.args))
            data_config = resolve_input_data_config(model, run.args)
        _load(model, run.state_dict)

        cfg = model.pretrained_cfg
        if cfg['architecture'] not in MODELS:
            _logger.warning(f'{cfg["architecture"]} is a model of timm, not one of timm_ela: it is written anyway.')
        other_start = run.args.get('pretrained_path') or run.args.get('initial_checkpoint')
        # whether the run began with the weights that cfg describes
        from_cfg = bool(run.args.get('pretrained') and not other_start)
        _describe_weights(cfg, license, keep=from_cfg)
        base = (cfg.get('hf_hub_id') or '') if from_cfg else ''
        card = run_card(model, run, dataset, data_config['input_size'], base.partition('@')[0] or None)
        # timm drops the plain weights' test sizes, since data_config has the run's
        _write(
            folder, model, data_config, card, label_names=read_class_names(run.args, model.num_classes, class_names),
            pretrained_cfg={'tag': tag or dataset.lower().replace(' ', '_')})
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
    arch = get_arch_name(model_name)
    # another name of the model, such as mobilenetv2_100_ela_b
    arch = get_deprecated_models().get(arch, arch)
    if arch not in MODELS:
        raise ValueError(f'{model_name!r} is not a model of timm_ela: `timm-ela list` shows them.')
    with _new_folder(out_dir, [checkpoint, class_names], force) as folder:
        original, saved = read_checkpoint(checkpoint, ema)
        # train.py saves its weights as state_dict, beside args with the input size, mean and std
        args = vars(saved['args']) if 'state_dict' in saved and isinstance(saved.get('args'), Namespace) else {}
        # to rename the weights, their names and order in the model are enough
        with errors_name(checkpoint):
            skeleton = timm.create_model(model_name, device='meta', **_create_args(args))
        state_dict = MODELS[arch].rename_state_dict(original, skeleton)
        with errors_name(checkpoint):
            model = timm.create_model(model_name, **{**_create_args(args), **_classes_and_channels(state_dict, arch)})
            data_config = resolve_input_data_config(model, args) if args else None
        complete = MODELS[arch].checkpoint_filter_fn(state_dict, model)
        if model.num_classes == 0:
            _logger.warning('The checkpoint has no classifier: the model is written without one.')
        grafted = len(complete) > len(state_dict)
        if not grafted and state_dict.keys() == original.keys():
            raise RuntimeError(
                f'{checkpoint} is a checkpoint of {arch} already: load it as it is, or `timm-ela export` its run.')
        _load(model, complete)

        # the cfg describes the default tag's weights, not these
        _describe_weights(model.pretrained_cfg, license, keep=False)
        card = converted_card(model, checkpoint.name, grafted)
        _write(
            folder, model, data_config, card, label_names=read_class_names(args, model.num_classes, class_names),
            pretrained_cfg={'tag': tag or (f'{GRAFT}custom' if grafted else 'custom')})
    return out_dir
