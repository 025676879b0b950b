"""A run of train.py, or a checkpoint -> a folder of weights, config and card, which timm loads."""
import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import timm
from timm.models import get_arch_name, get_pretrained_cfg, save_for_hf
from torch import Tensor, nn

from ..models.registry import GRAFT, MODELS, family
from ..models.weights import difference
from .cards import converted_card, run_card
from .train_run import TrainRun, check_args, printable, read_checkpoint, read_class_names, read_names_file

_logger = logging.getLogger(__name__)

FILES = ('model.safetensors', 'config.json', 'README.md')  # all that a folder holds and a push uploads
_UNFINISHED = '.timm-ela-unfinished'  # a folder in out_dir while it is written
# Settings of the weights that a run began with. train.py measures at the training size.
_LABELS = ('label_names', 'label_descriptions')
_STALE = (*_LABELS, 'test_input_size', 'test_crop_pct', 'test_pool_size')
_OF_SOURCE = ('license', 'origin_url', 'paper_ids', 'paper_name', 'description')


@contextmanager
def _new_folder(out_dir: Path, sources: Iterable[Path], force: bool) -> Iterator[Path]:
    """Yields a folder whose files move into out_dir if nothing fails, so that nothing is left half-written.

    It lies in out_dir, which may be a mount point, the current folder, or all that may be written; its name keeps
    others out of out_dir.
    """
    if (out_dir.exists() or out_dir.is_symlink()) and not out_dir.is_dir():
        raise FileExistsError(f'{out_dir} is a file or a broken link: choose a folder.')
    for source in sources:
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
        _check_free(out_dir, force)  # before the work, and after it
        yield unfinished
        _check_free(out_dir, force)
        _move(unfinished, out_dir)
    finally:
        if ours:
            shutil.rmtree(unfinished, ignore_errors=True)
        with suppress(OSError):  # what is not empty stays
            for folder in made:
                folder.rmdir()


def _check_free(out_dir: Path, force: bool) -> None:
    """Raises FileExistsError if out_dir holds anything, or with force, anything but an export."""
    found = sorted({path.name for path in out_dir.iterdir()} - {_UNFINISHED, 'lost+found'})  # the latter: of a disk
    if found and not force:
        raise FileExistsError(
            f'{out_dir} is not empty, it holds {found[0]}: choose another folder, or --force replaces an export.')
    others = [name for name in found if name not in FILES or not (out_dir / name).is_file()]
    if others or len(found) not in (0, len(FILES)):
        raise FileExistsError(
            f'{out_dir} holds {[*others, *found][0]} and is no export: --force replaces {", ".join(FILES)} alone.')


def _move(folder: Path, out_dir: Path) -> None:
    """Moves the files of an export, and those that it replaces back if that is cut off."""
    moves = [(out_dir / name, folder / f'old-{name}') for name in FILES if (out_dir / name).exists()]
    moves += [(folder / name, out_dir / name) for name in FILES]
    try:
        for source, target in moves:
            source.rename(target)
    except BaseException:
        for source, target in reversed(moves):
            if target.exists() and not source.exists():
                target.rename(source)
        raise


def _check_line(**texts: str | None) -> None:
    for name, text in texts.items():
        if text is not None and not (text.strip() and text.isprintable()):
            raise ValueError(f'The {name} is {text!r}: it must be a line of printable characters.')


def _model_kwargs(args: dict[str, Any]) -> dict[str, Any]:
    """What train.py passes to create_model for these arguments."""
    kwargs = {
        'num_classes': args.get('num_classes'),
        'in_chans': args.get('in_chans') or (args.get('input_size') or [None])[0],
        'global_pool': args.get('gp'),
        'bn_eps': args.get('bn_eps'),
        'bn_momentum': args.get('bn_momentum'),
    }
    return {k: v for k, v in kwargs.items() if v is not None} | dict(args.get('model_kwargs') or {})


def _ends_of(state_dict: dict[str, Tensor], name: str) -> dict[str, int]:
    """Classes and input channels of the weights of one of our models; no classes without a classifier."""
    cfg = get_pretrained_cfg(name)
    ends = {}
    for key, part, axis in (('num_classes', cfg.classifier, 0), ('in_chans', cfg.first_conv, 1)):
        weight = state_dict.get(f'{part}.weight')
        if weight is not None and weight.ndim > axis:
            ends[key] = weight.shape[axis]
    if not any(k.startswith(f'{cfg.classifier}.') for k in state_dict):
        ends['num_classes'] = 0
        _logger.warning('The checkpoint has no classifier: the model is written without one.')
    return ends


def _load(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    if reason := difference(state_dict, model):
        raise RuntimeError(f'The weights are not those of {model.pretrained_cfg["architecture"]}: {reason}.')
    model.load_state_dict(state_dict, strict=False)
    check_finite(model.state_dict())  # a float64 may be too large for a float32


def check_finite(state_dict: dict[str, Tensor]) -> None:
    """Raises ValueError if a weight is NaN or infinite, with the first key."""
    for k, v in state_dict.items():
        if not (v.float() if v.element_size() == 1 else v).isfinite().all():  # 8-bit floats cannot be asked
            raise ValueError(f'The weights are not finite: {k!r} holds NaN or infinity.')


def _class_names(args: dict[str, Any], model: nn.Module, file: str | Path | None) -> list[str] | None:
    if file is not None:
        names = read_names_file(file)
        if len(names) != model.num_classes:
            raise ValueError(f'{file} holds {len(names)} class names, the head has {model.num_classes} outputs.')
        return names
    found = read_class_names(args)  # walks the data folder
    if len(found) == model.num_classes:
        return found
    why = f': neither the class map nor the data folder of the run gives {model.num_classes} of them' if args else ''
    _logger.warning(f'No class names are written{why}. --class-names FILE gives them.')
    return None


def _write(
        folder: Path,
        model: nn.Module,
        args: dict[str, Any],
        tag: str,
        class_names: list[str] | None,
        card: str,
) -> None:
    save_for_hf(
        model,
        folder,
        model_config={'pretrained_cfg': {'tag': tag}, 'label_names': class_names},
        safe_serialization=True,
        data_config=args,
    )
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    # The head's size stands at the top level. transformers would pass this copy to timm as well, and fail.
    config['model_args'].pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2) + '\n')
    shutil.copymode(path, folder / 'model.safetensors')  # safetensors lets only its owner read it
    (folder / 'README.md').write_text(card, encoding='utf-8')
    if not model.pretrained_cfg.get('license'):
        _logger.warning('The card says "Licence: not stated": --license states one.')


def export_run(
        run_dir: str | Path,
        out_dir: str | Path,
        *,
        tag: str | None = None,
        ema: bool = True,
        class_names: str | Path | None = None,
        checkpoint: str = 'model_best.pth.tar',
        license: str | None = None,
        force: bool = False,
) -> Path:
    """Makes a run of timm's train.py a folder of model.safetensors, config.json and README.md.

    The weights are those that the metrics in summary.csv were measured on.

    Args:
        run_dir: Folder with args.yaml, summary.csv and the checkpoint.
        out_dir: Folder to write; its files appear only when all are complete.
        tag: The weights' tag; by default the dataset's name.
        ema: False takes the raw weights of a run that kept an average, and gives no accuracy for them.
        class_names: Text file with one class name a line.
        checkpoint: Name of the checkpoint in run_dir.
        license: Licence of the weights, such as 'apache-2.0'; by default that of the graft that the run began with.
        force: Whether to replace the export that out_dir holds.

    Returns:
        out_dir.

    Raises:
        FileNotFoundError: If run_dir, its args.yaml or the checkpoint does not exist.
        FileExistsError: If out_dir holds anything but, with force, an export.
        ValueError: If a file of the run cannot be read or holds what cannot be, such as weights that are not finite, or
            class names and head differ in number.
        RuntimeError: If the weights are not those of the run's model.
    """
    _check_line(tag=tag, license=license)
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    sources = [run_dir, *run_dir.glob('*'), *([Path(class_names)] if class_names else [])]
    with _new_folder(out_dir, sources, force) as folder:
        run = TrainRun.read(run_dir, checkpoint, ema)
        name = run.args['model']
        if ':' not in name and not timm.is_model(get_arch_name(name)):
            raise ValueError(f'timm {timm.__version__} knows no model {name!r}: `timm-ela list` shows ours.')
        model = timm.create_model(name, **_model_kwargs(run.args))
        _load(model, run.state_dict)

        cfg = model.pretrained_cfg
        if cfg['architecture'] not in MODELS:
            _logger.warning(f'{name} is a model of timm, not one of timm_ela: written all the same.')
        other_start = run.args.get('pretrained_path') or run.args.get('initial_checkpoint')
        from_cfg = bool(run.args.get('pretrained') and not other_start)  # the run began with the weights of cfg
        for key in _STALE if from_cfg else _STALE + _OF_SOURCE:
            cfg.pop(key, None)
        if license:
            cfg['license'] = license
        names = _class_names(run.args, model, class_names)
        base = cfg.get('hf_hub_id') if from_cfg else None
        card = run_card(model, run, base.partition('@')[0] if base else None)
        _write(folder, model, run.args, tag or run.dataset.lower().replace(' ', '_'), names, card)
    return out_dir


def convert_checkpoint(
        checkpoint: str | Path,
        model_name: str,
        out_dir: str | Path,
        *,
        tag: str | None = None,
        ema: bool = True,
        class_names: str | Path | None = None,
        license: str | None = None,
        force: bool = False,
) -> Path:
    """Makes a plain model's checkpoint, or its authors', a folder with a complete checkpoint of ours, head included.

    Args:
        checkpoint: A `.pth.tar` of train.py, a `.pth` or a `.safetensors` of the plain timm model, or one in a layout
            that the model's family knows, such as its authors'.
        model_name: The model of ours that it is for, such as 'resnet50_ela_b'.
        out_dir: Folder to write, as `export_run` does.
        tag: The weights' tag.
        ema: Whether to take the averaged weights where the checkpoint has them.
        class_names: Text file with one class name a line.
        license: Licence of the weights, such as 'apache-2.0'.
        force: Whether to replace the export that out_dir holds.

    Returns:
        out_dir.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If out_dir holds anything but, with force, an export.
        ValueError: If the checkpoint cannot be read, its weights are not finite, or the model is not one of ours.
        RuntimeError: If the checkpoint is of another architecture, or one of the model itself already.
    """
    _check_line(tag=tag, license=license)
    checkpoint, out_dir = Path(checkpoint), Path(out_dir)
    arch = get_arch_name(model_name)
    if arch not in MODELS:
        raise ValueError(f'{model_name!r} is not a model of timm_ela: `timm-ela list` shows them.')
    with _new_folder(out_dir, [checkpoint, *([Path(class_names)] if class_names else [])], force) as folder:
        saved = read_checkpoint(checkpoint)
        original = saved['state_dict_ema' if ema and 'state_dict_ema' in saved else 'state_dict']
        # A run of train.py says its input size, mean and std.
        args = vars(saved['args']) if isinstance(saved.get('args'), Namespace) else {}
        check_args(args, checkpoint)
        kwargs = _model_kwargs(args)
        skeleton = timm.create_model(model_name, device='meta', **kwargs)  # names and places of the weights
        state_dict = family(arch).rename_state_dict(original, skeleton)
        model = timm.create_model(model_name, **{**kwargs, **_ends_of(state_dict, arch)})
        complete = family(arch).checkpoint_filter_fn(state_dict, model)
        grafted = len(complete) > len(state_dict)
        if not grafted and state_dict.keys() == original.keys():
            raise RuntimeError(
                f'{checkpoint} is a checkpoint of {arch} already: load it as it is, or `timm-ela export` its run.')
        _load(model, complete)

        cfg = model.pretrained_cfg
        for key in _STALE + _OF_SOURCE if args else _LABELS + _OF_SOURCE:  # the default tag's, not this checkpoint's
            cfg.pop(key, None)
        if license:
            cfg['license'] = license
        names = _class_names(args, model, class_names)
        card = converted_card(model, printable(checkpoint.name), grafted)
        _write(folder, model, args, tag or (f'{GRAFT}custom' if grafted else 'custom'), names, card)
    return out_dir
