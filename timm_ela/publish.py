"""A run of train.py, or a plain checkpoint -> a folder of weights, config and card -> a Hub repository."""
import json
import logging
import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from timm.models import get_arch_name, save_for_hf
from torch import Tensor, nn

from .cards import PLACEHOLDER, converted_card, run_card
from .catalog import BACKBONES
from .checkpoint import read_args, read_checkpoint, read_class_names, read_metrics
from .graft import GRAFT, graft_state_dict
from .remap import remap_state_dict

_logger = logging.getLogger(__name__)

FILES = ('model.safetensors', 'config.json', 'README.md')  # all that a folder holds and a push uploads


@contextmanager
def _new_folder(out_dir: Path, source: Path, force: bool) -> Iterator[Path]:
    """Yields a temporary folder that becomes out_dir when all has gone well, so that nothing is left half-written."""
    if out_dir.resolve() in (source.resolve(), *source.resolve().parents):
        raise FileExistsError(f'{out_dir} holds {source}, which must stay: choose another folder.')
    if out_dir.exists() and not out_dir.is_dir():
        raise FileExistsError(f'{out_dir} is a file: choose a folder.')
    if not force and out_dir.is_dir() and any(out_dir.iterdir()):
        raise FileExistsError(f'{out_dir} exists and is not empty: choose another folder, or --force replaces it.')
    beside = next(parent for parent in out_dir.absolute().parents if parent.is_dir())
    with TemporaryDirectory(dir=beside, prefix=f'.{out_dir.name}-') as temporary:
        folder = Path(temporary, 'new')
        folder.mkdir()
        yield folder
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        if out_dir.exists():
            out_dir.rename(Path(temporary, 'old'))
        folder.rename(out_dir)


def _create_model(name: str, state_dict: dict[str, Tensor], args: dict[str, Any]) -> nn.Module:
    """Creates the model whose weights these are: classes and input channels are read from the weights themselves."""
    if ':' not in name and not timm.is_model(get_arch_name(name)):
        raise ValueError(f'timm {timm.__version__} knows no model {name!r}: `timm-ela list` shows ours.')
    kwargs = {'global_pool': args.get('gp'), 'bn_eps': args.get('bn_eps'), 'bn_momentum': args.get('bn_momentum')}
    kwargs = {k: v for k, v in kwargs.items() if v is not None} | dict(args.get('model_kwargs') or {})
    cfg = timm.create_model(name, device='meta', **kwargs).pretrained_cfg
    for key, part, axis in (('num_classes', 'classifier', 0), ('in_chans', 'first_conv', 1)):
        layers = cfg.get(part)  # some of timm's models have several heads
        weight = state_dict.get(f'{layers if isinstance(layers, str) else next(iter(layers or ()), None)}.weight')
        if weight is not None and weight.ndim > axis:
            kwargs[key] = weight.shape[axis]
    model = timm.create_model(name, **kwargs)
    if get_arch_name(name) not in BACKBONES and model.pretrained_cfg['architecture'] not in BACKBONES:
        _logger.warning(f'{name} is a model of timm, not one of timm_ela: written all the same.')
    return model


def _load(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:  # torch names every key
        own = model.state_dict()
        wrong = [k for k, v in own.items() if k not in state_dict or state_dict[k].shape != v.shape]
        foreign = [k for k in state_dict if k not in own]
        raise RuntimeError(
            f'The weights are not those of {model.pretrained_cfg["architecture"]}: {len(wrong)} are missing or of '
            f'another shape, {len(foreign)} are foreign, first {(wrong + foreign)[0]!r}.') from error


def _class_names(args: dict[str, Any], model: nn.Module, file: str | Path | None) -> list[str] | None:
    names = read_class_names(args, model.num_classes, file)
    if names is None:
        _logger.warning('No class names are written: neither the class map nor the data folder of the run gives '
                        f'{model.num_classes} of them. --class-names FILE does.')
    return names


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
    # The head's size stands at the top level; transformers would pass this copy to timm a second time, and fail.
    config['model_args'].pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2) + '\n')
    shutil.copymode(path, folder / 'model.safetensors')  # safetensors lets only its owner read it
    (folder / 'README.md').write_text(card, encoding='utf-8')


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
        out_dir: Folder to write; it appears only when it is complete.
        tag: The weights' tag; by default the dataset's name.
        ema: False takes the raw weights of a run that kept an average, and gives no accuracy for them.
        class_names: Text file with one class name a line.
        checkpoint: Name of the checkpoint in run_dir.
        license: Licence of the weights, such as 'apache-2.0'; by default that of the graft the run began with.
        force: Whether to replace an out_dir that is not empty.

    Returns:
        out_dir.

    Raises:
        FileNotFoundError: If run_dir lacks args.yaml or the checkpoint.
        FileExistsError: If out_dir is not empty.
        ValueError: If the checkpoint cannot be read, or class names and head differ in number.
        RuntimeError: If the weights are not those of the run's model.
    """
    run_dir, out_dir = Path(run_dir), Path(out_dir)
    with _new_folder(out_dir, run_dir, force) as folder:
        args = read_args(run_dir)
        if not (run_dir / checkpoint).is_file():
            raise FileNotFoundError(f'{run_dir} has no {checkpoint}: --checkpoint NAME takes another one.')
        saved = read_checkpoint(run_dir / checkpoint)
        averaged = saved.get('state_dict_ema') is not None
        measured_on_average = averaged and not args.get('model_ema_force_cpu')  # train.py evaluates no EMA on the CPU
        use_average = ema and measured_on_average
        state_dict = saved['state_dict_ema' if use_average else 'state_dict']
        metrics = read_metrics(run_dir, saved.get('epoch')) if use_average == measured_on_average else {}

        model = _create_model(args['model'], state_dict, args)
        _load(model, state_dict)
        cfg = model.pretrained_cfg
        other_start = args.get('pretrained_path') or args.get('initial_checkpoint')
        grafted = bool(args.get('pretrained') and not other_start and cfg.get('hf_hub_id'))
        # The cfg is that of the weights that the run began with, if it did; train.py measures at the training size.
        stale = ('label_names', 'label_descriptions', 'test_input_size', 'test_crop_pct', 'test_pool_size')
        for key in stale if grafted else (*stale, 'license', 'origin_url', 'paper_ids', 'paper_name', 'description'):
            cfg.pop(key, None)
        if license:
            cfg['license'] = license
        names = _class_names(args, model, class_names)
        dataset = Path(args.get('dataset') or args.get('data_dir') or args.get('data') or '').name or 'custom'
        card = run_card(
            model, args, metrics, dataset=dataset, epoch=saved.get('epoch'), averaged=use_average,
            base_model=cfg['hf_hub_id'].partition('@')[0] if grafted else None)
        _write(folder, model, args, tag or dataset.lower().replace(' ', '_'), names, card)
    return out_dir


def convert_checkpoint(
        checkpoint: str | Path,
        model_name: str,
        out_dir: str | Path,
        *,
        tag: str | None = None,
        ema: bool = True,
        class_names: str | Path | None = None,
        force: bool = False,
) -> Path:
    """Makes a plain model's checkpoint, or an author's, a folder with a complete checkpoint of ours, head included.

    Args:
        checkpoint: A `.pth.tar` of train.py, a `.pth` or a `.safetensors` of the plain timm model, or one that the
            authors of ELA or of Coordinate Attention released (see remap.py).
        model_name: The model of ours that it is for, such as 'resnet50_ela_b'.
        out_dir: Folder to write, as `export_run` does.
        tag: The weights' tag.
        ema: Whether to take the averaged weights where the checkpoint has them.
        class_names: Text file with one class name a line.
        force: Whether to replace an out_dir that is not empty.

    Returns:
        out_dir.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        FileExistsError: If out_dir is not empty.
        ValueError: If the checkpoint cannot be read or the model is not one of ours.
        RuntimeError: If the checkpoint is of another architecture, or has ELA weights already.
    """
    checkpoint, out_dir = Path(checkpoint), Path(out_dir)
    if get_arch_name(model_name) not in BACKBONES:
        raise ValueError(f'{model_name!r} is not a model of timm_ela: `timm-ela list` shows them.')
    with _new_folder(out_dir, checkpoint, force) as folder:
        saved = read_checkpoint(checkpoint)
        state_dict = saved['state_dict_ema' if ema and saved.get('state_dict_ema') is not None else 'state_dict']
        original, state_dict = state_dict, remap_state_dict(state_dict, timm.create_model(model_name, device='meta'))
        # A run of train.py: its input size, mean and std.
        args = vars(saved['args']) if isinstance(saved.get('args'), Namespace) else {}
        model = _create_model(model_name, state_dict, args)
        complete = graft_state_dict(state_dict, model)
        if complete is original:
            raise RuntimeError(
                f'{checkpoint} has the attention\'s weights already: load it as it is, or `timm-ela export` its run.')
        _load(model, complete)
        for key in ('license', 'origin_url', 'paper_ids', 'label_names'):  # the default tag's, not this checkpoint's
            model.pretrained_cfg.pop(key, None)
        names = _class_names(args, model, class_names)
        grafted = complete is not state_dict
        card = converted_card(model, checkpoint.name, grafted=grafted)
        _write(folder, model, args, tag or (f'{GRAFT}custom' if grafted else 'custom'), names, card)
    return out_dir


def push_folder(folder: str | Path, repo_id: str, *, private: bool = False, **export: Any) -> str:
    """Uploads a folder that `export_run` wrote, or a run, which it exports first, in one commit.

    Args:
        folder: The folder, or a run of train.py.
        repo_id: 'OWNER/NAME' on the Hub; created where it does not exist.
        private: Whether the repository is private.
        **export: Arguments of `export_run`, for a run.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: If the folder lacks one of the three files.
        ValueError: If repo_id is not OWNER/NAME, or arguments of `export_run` come with an exported folder.
        PermissionError: If there is no token, or private is asked of a repository that is public.
        RuntimeError: If the Hub refuses or breaks off: the repository is as it was then, for a commit is atomic.
    """
    folder = Path(folder)
    validate_repo_id(repo_id)
    if '/' not in repo_id:
        raise ValueError(f'{repo_id!r} has no owner: it must be OWNER/NAME.')
    if get_token() is None:
        raise PermissionError('There is no Hugging Face token: run `hf auth login`, or set HF_TOKEN.')
    if (folder / 'args.yaml').is_file() and not (folder / 'config.json').is_file():
        with TemporaryDirectory() as temporary:
            return push_folder(export_run(folder, Path(temporary, 'export'), **export), repo_id, private=private)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f'{folder} has no {name}: push a folder that `timm-ela export` wrote, or a run.')
    if export:
        raise ValueError(f'{folder} is exported already, so {", ".join(export)} cannot be set: give them to export.')

    api = HfApi(library_name='timm_ela')
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        public = private and not api.model_info(repo_id).private
        if not public:
            with TemporaryDirectory() as temporary:
                for name in FILES:
                    shutil.copy(folder / name, temporary)
                card = Path(temporary, 'README.md')  # names the repository that it stands in
                text = card.read_text(encoding='utf-8').replace(PLACEHOLDER, f'hf-hub:{repo_id}')
                card.write_text(text, encoding='utf-8')
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=temporary, commit_message='Upload with timm_ela')
            return commit.commit_url
    except Exception as error:  # the Hub's errors, its HTTP client's and its Xet store's have no common base
        reasons = dict.fromkeys(str(e) for e in (error, error.__cause__) if e)  # the cause may say the same
        reason = ' '.join(' '.join(reasons).split()).rstrip('.')
        raise RuntimeError(
            f'{repo_id} on {api.endpoint}: {reason}. The repository is as it was before, or complete: run the same '
            'command again, which uploads only what is missing.') from error
    raise PermissionError(f'{repo_id} exists and is public: make it private on the Hub first, or drop --private.')
