"""Model cards of what a user trained or converted. Those of the backbones: weights_cards/make_cards.py."""
import platform
import shlex
import textwrap
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_model_args
from torch import nn

from .. import __version__
from ..models.registry import MODELS, Model
from .train_run import TrainRun

PLACEHOLDER = 'hf-hub:OWNER/NAME'  # of a card's repository, until a push knows it
# The arguments in args.yaml that say how a run was trained; paths, what is logged and where it ran are left out.
_RECIPE = (
    'dataset', 'class_map', 'input_key', 'target_key', 'train_split', 'val_split', 'train_num_samples', 'model',
    'model_kwargs', 'bn_eps', 'bn_momentum', 'sync_bn', 'split_bn', 'pretrained', 'num_classes', 'img_size',
    'input_size', 'in_chans', 'input_img_mode', 'mean', 'std', 'crop_pct', 'interpolation', 'gp', 'fast_norm',
    'model_dtype', 'train_img_sizes', 'naflex_loader', 'epochs', 'epoch_repeats', 'batch_size', 'grad_accum_steps',
    'opt', 'opt_kwargs', 'opt_betas', 'opt_eps', 'momentum', 'lr', 'sched', 'sched_on_updates', 'lr_cycle_limit',
    'lr_k_decay', 'lr_noise', 'warmup_epochs', 'warmup_lr', 'warmup_prefix', 'min_lr', 'cooldown_epochs',
    'weight_decay', 'clip_grad', 'layer_decay', 'head_init_scale', 'head_init_bias', 'drop', 'drop_connect',
    'drop_path', 'drop_block', 'smoothing', 'bce_loss', 'jsd_loss', 'aug_repeats', 'aug_splits', 'mixup', 'cutmix',
    'cutmix_minmax', 'kd_model_name', 'amp', 'channels_last', 'model_ema', 'seed', 'pretrained_path',
    'initial_checkpoint',
)
# Values with which an argument changes nothing: it is left out. Unless it says otherwise, an empty text is one.
_NEUTRAL = {
    'epoch_repeats': 0, 'lr_cycle_limit': 1, 'lr_k_decay': 1, 'aug_repeats': 0, 'aug_splits': 0,
    'train_split': None, 'val_split': None, 'train_interpolation': None,
}
_LOCAL = 'local-dir:'
# Arguments that count only with another one, or only without it.
_MIX = ('mixup_prob', 'mixup_switch_prob', 'mixup_mode', 'mixup_off_epoch')
_RECIPE_WITH: dict[str, tuple[str, ...]] = {
    'amp': ('amp_dtype',),
    'bce_loss': ('bce_sum', 'bce_target_thresh', 'bce_pos_weight'),
    'clip_grad': ('clip_mode',),
    'cutmix': _MIX,
    'cutmix_minmax': _MIX,
    'kd_model_name': (
        'kd_distill_type', 'kd_loss_type', 'kd_temperature', 'kd_student_feature_dim', 'kd_teacher_feature_dim',
        'kd_token_distill_type', 'distill_loss_weight', 'task_loss_weight'),
    'layer_decay': ('layer_decay_min_scale', 'layer_decay_no_opt_scale'),
    'lr_noise': ('lr_noise_pct', 'lr_noise_std'),
    'mixup': _MIX,
    'model_ema': ('model_ema_decay', 'model_ema_warmup'),
    'naflex_loader': (
        'naflex_train_seq_lens', 'naflex_max_seq_len', 'naflex_patch_sizes', 'naflex_patch_size_probs',
        'naflex_loss_scale', 'naflex_patchify_channels_first'),
    'reprob': ('remode', 'recount', 'resplit'),
    'train_img_sizes': (
        'train_batch_sizes', 'train_size_probs', 'train_size_schedule', 'train_size_schedule_spread',
        'train_size_random_mix', 'train_batches_per_epoch', 'variable_batch_loss_scale'),
}
_RECIPE_WITHOUT = {
    'lr': ('lr_base', 'lr_base_size', 'lr_base_scale'),
    'no_aug': (
        'train_crop_mode', 'aa', 'color_jitter', 'color_jitter_prob', 'grayscale_prob', 'gaussian_blur_prob', 'hflip',
        'vflip', 'scale', 'ratio', 'reprob', 'train_interpolation'),
}
_RECIPE_OF_SCHED: dict[Any, tuple[str, ...]] = {
    'step': ('decay_epochs', 'decay_rate'),
    'multistep': ('decay_milestones', 'decay_rate'),
    'plateau': ('patience_epochs', 'decay_rate'),
    'poly': ('decay_rate',),
}


def needs() -> str:
    """Says what loads a card's model, and how to install it if the package's metadata has an address."""
    text = f'needs the Python package timm_ela ({__version__})'
    with suppress(PackageNotFoundError):
        addresses = dict(url.split(', ') for url in metadata('timm-ela').get_all('Project-URL', []))
        text += f': pip install git+{addresses["Repository"]}' if 'Repository' in addresses else ''
    return text


def card(data: ModelCardData, *sections: str) -> str:
    """Returns a card of front matter and Markdown sections; empty sections are left out."""
    return str(ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(filter(None, sections)) + '\n'))


def card_data(tag: str | None = None, **kwargs: Any) -> ModelCardData:
    """Returns the front matter that all cards share, with the layer's tag and what else is given."""
    tags = ['timm', 'image-classification', *([tag] if tag else [])]
    return ModelCardData(library_name='timm', pipeline_tag='image-classification', tags=tags, **kwargs)


def citation(*models: Model) -> str:
    """Returns the section that cites the papers of the models' layers."""
    papers = dict.fromkeys(model.layer.paper.bibtex for model in models)
    return '## Citation\n\n```bibtex\n' + '\n\n'.join(papers) + '\n```' if papers else ''


def _usage(model: Model | None) -> str:
    install = f'# {needs()}\n' if model else ''
    return f"""\
## Use

```python
{install}import timm

model = timm.create_model('{PLACEHOLDER}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```"""


def _license(model: nn.Module) -> str:
    return f'Licence: {model.pretrained_cfg.get("license") or "not stated"}.'


def _words(args: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """Options of a command line, each with its values. Of a path, the name alone is told."""
    words = []
    for key in dict.fromkeys(keys):
        value: Any = args.get(key)
        # a zero counts, where it is not neutral: it may differ from the default
        if value is None or value is False or value in ([], {}) or value == _NEUTRAL.get(key, ''):
            continue
        if isinstance(value, dict):
            value = [f'{k}={v}' for k, v in value.items()]
        if key in ('class_map', 'pretrained_path', 'initial_checkpoint'):
            value = Path(value).name
        elif key == 'model' and value.startswith(_LOCAL):
            value = _LOCAL + Path(value.removeprefix(_LOCAL)).name
        values = value if isinstance(value, list) else [] if value is True else [value]
        words.append(' '.join([f'--{key.replace("_", "-")}', *(shlex.quote(str(v)) for v in values)]))
    return words


def _command(args: dict[str, Any]) -> str:
    """Returns the train.py command line of a run."""
    keys = list(_RECIPE)
    keys += [k for flag, more in _RECIPE_WITH.items() if args.get(flag) for k in more]
    keys += [k for flag, more in _RECIPE_WITHOUT.items() for k in (more if not args.get(flag) else (flag,))]
    keys += _RECIPE_OF_SCHED.get(args.get('sched'), ())
    keys += ('lr_cycle_mul', 'lr_cycle_decay') if args.get('lr_cycle_limit', 1) != 1 else ()
    words = ['train.py', '--data-dir DATA', *_words(args, keys)]
    text = ' '.join(word.replace(' ', '\xa0') for word in words)  # keeps an argument and its values in one line
    lines = textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False, subsequent_indent='    ')
    return lines.replace('\n', ' \\\n').replace('\xa0', ' ')


def _validate_command(run: TrainRun, channels: int) -> str:
    """Returns the validate.py command line that measures the card's numbers on inputs of so many channels."""
    args = {**run.args, 'num_samples': run.args.get('val_num_samples')}
    # the model's config says the rest, but validate.py takes 3 channels whatever it says
    args['in_chans'] = None if channels == 3 else channels
    keys = ['dataset', 'class_map', 'input_key', 'target_key', 'input_img_mode', 'num_samples', 'in_chans',
            'model_dtype', 'fast_norm', 'amp']
    if args.get('amp'):
        keys += _RECIPE_WITH['amp']
    return ' '.join([
        'validate.py --data-dir DATA', *_words(args, keys), f'--split {run.val_split}', f'--model {PLACEHOLDER}',
        '--pretrained'])


def start_command(arch: str, num_classes: int, weights: str | Path, model_args: Mapping[str, Any]) -> str:
    """Returns the train.py command line that begins with converted weights.

    Args:
        arch: Name of the model.
        num_classes: Classes of the weights, 0 if they have no classifier.
        weights: File of the weights.
        model_args: What else the model was made with, as timm's `get_model_args` or a config.json gives it.
    """
    names = {'in_chans': 'in_chans', 'global_pool': 'gp', 'bn_eps': 'bn_eps', 'bn_momentum': 'bn_momentum'}
    defaults = {'in_chans': 3, 'global_pool': 'avg', 'num_classes': num_classes}
    changed = {k: v for k, v in model_args.items() if v is not None and v != defaults.get(k)}
    options = {names[k]: v for k, v in changed.items() if k in names}
    options['model_kwargs'] = {k: v for k, v in changed.items() if k not in names}
    start = '--initial-checkpoint' if num_classes else '--pretrained --pretrained-path'
    begin = f'train.py --model {arch} --num-classes {num_classes or "N"}'
    return ' '.join([begin, *_words(options, options), f'{start} {weights} ...'])


def run_card(model: nn.Module, run: TrainRun, base_model: str | None) -> str:
    """Returns the card of a run of train.py, with its accuracy as model-index results.

    Args:
        model: Model with the run's weights.
        run: The run.
        base_model: Hub repository of the plain weights that the run was grafted on.
    """
    arch = model.pretrained_cfg['architecture']
    row = MODELS.get(arch)
    names = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy'}
    data = card_data(
        row.layer.tag if row else None,
        license=model.pretrained_cfg.get('license'),
        base_model=base_model,
        model_name=f'{arch} on {run.dataset}',
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=run.dataset,
                dataset_name=run.dataset,
                dataset_split=run.args.get('val_split'),
                metric_type='accuracy',
                metric_name=names[key],
                metric_value=value,
            ) for key, value in run.metrics.items()
        ] or None,
    )
    channels, *sides = timm.data.resolve_input_data_config(model, args=run.args)['input_size']
    size, validate = ' x '.join(map(str, sides)), _validate_command(run, channels)
    measured = f'On the {run.val_split} split, after epoch {run.epoch} (the first is 0), at {size} pixels:'
    weights = 'the exponential moving average' if run.averaged else 'as trained'
    return card(
        data,
        f'# {arch}, trained on {run.dataset}',
        f'`{arch}`{f" ([{row.layer.title}]({row.layer.paper.url}))" if row else ""} with {model.num_classes} classes '
        f'and {sum(p.numel() for p in model.parameters()):,} parameters, '
        f'trained with timm\'s `train.py`{f" from `{base_model}`" if base_model else ""}. {_license(model)}',
        '## Results',
        f'Weights: {weights}. {measured if run.metrics else "Their accuracy was not measured."}',
        '\n'.join(f'- {names[key]}: {value:.2f} %' for key, value in run.metrics.items()),
        f'To measure it again (a local folder: `--model local-dir:FOLDER`):\n\n```bash\n{validate}\n```'
        if run.metrics else '',
        '## Recipe',
        f'```bash\n{_command(run.args)}\n```',
        f'Exported with timm_ela {__version__}, timm {timm.__version__}, torch {torch.__version__}, huggingface_hub '
        f'{huggingface_hub.__version__}, Python {platform.python_version()}.',
        _usage(row),
        citation(row) if row else '',
    )


def converted_card(model: nn.Module, source: str, grafted: bool) -> str:
    """Returns the card of a converted checkpoint. It states no accuracy, since none was measured.

    Args:
        model: Model with the weights.
        source: Name of the checkpoint's file.
        grafted: True if the checkpoint was a plain model's, without the attention's weights.
    """
    row = MODELS[model.pretrained_cfg['architecture']]
    what = (
        f'a checkpoint of plain {row.base}. Its attention is neutral: it changes nothing until it is trained.'
        if grafted else 'under timm\'s names.')
    return card(
        card_data(row.layer.tag),
        f'# {row.name}, converted from {source}',
        f'`{row.name}` ([{row.layer.title}]({row.layer.paper.url})) with the weights of `{source}`, {what} '
        f'{_license(model)}',
        '## Train',
        f'```bash\n{start_command(row.name, model.num_classes, "model.safetensors", get_model_args(model))}\n```',
        _usage(row),
        citation(row),
    )
