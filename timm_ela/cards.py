"""Model cards of what a user trained or converted. Those of the backbones: weights_cards/make_cards.py."""
import platform
import shlex
import textwrap
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from . import __version__
from .layers import ATTN_LAYERS
from .registry import MODELS

CITATION = """\
```bibtex
@article{xu2024ela,
  title   = {ELA: Efficient Local Attention for Deep Convolutional Neural Networks},
  author  = {Xu, Wei and Wan, Yi},
  journal = {arXiv preprint arXiv:2403.01123},
  year    = {2024}
}
```"""
PLACEHOLDER = 'hf-hub:OWNER/NAME'  # of a card's repository, until a push knows it
# What of args.yaml says how a run was trained; paths and the like stay at home.
_RECIPE = (
    'dataset', 'train_split', 'val_split', 'model', 'model_kwargs', 'bn_eps', 'bn_momentum', 'pretrained',
    'num_classes', 'img_size', 'input_size', 'in_chans', 'mean', 'std', 'crop_pct', 'gp', 'epochs', 'batch_size',
    'grad_accum_steps', 'opt', 'opt_kwargs', 'opt_betas', 'momentum', 'lr', 'sched', 'sched_on_updates',
    'warmup_epochs', 'warmup_lr', 'min_lr', 'cooldown_epochs', 'weight_decay', 'clip_grad', 'layer_decay',
    'head_init_scale', 'head_init_bias', 'drop', 'drop_path', 'smoothing', 'bce_loss', 'mixup', 'cutmix', 'amp',
    'channels_last', 'model_ema', 'seed',
)
# Arguments that count only with, or only without, another one.
_RECIPE_WITH = {'model_ema': ('model_ema_decay',), 'amp': ('amp_dtype',)}
_RECIPE_WITHOUT = {
    'lr': ('lr_base', 'lr_base_size'),
    'no_aug': ('aa', 'color_jitter', 'hflip', 'vflip', 'scale', 'ratio', 'reprob', 'train_interpolation'),
}


def _usage(architecture: str) -> str:
    comment = f'  # with `pip install timm-ela`, timm knows {architecture} by itself' if architecture in MODELS else ''
    return f"""\
## Use

```python
import timm{comment}

model = timm.create_model('{PLACEHOLDER}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```"""


def card(data: ModelCardData, *sections: str) -> str:
    """A card of front matter and Markdown sections, the empty ones left out."""
    return str(ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(filter(None, sections)) + '\n'))


def card_data(*, ela: bool = True, **kwargs: Any) -> ModelCardData:
    """The front matter that all of our cards share, and what is given."""
    tags = ['timm', 'image-classification', *(['ela'] if ela else [])]
    return ModelCardData(library_name='timm', pipeline_tag='image-classification', tags=tags, **kwargs)


def _command(args: dict[str, Any]) -> str:
    """The call of train.py that the run's arguments amount to."""
    keys = list(_RECIPE)
    keys += [k for flag, more in _RECIPE_WITH.items() if args.get(flag) for k in more]
    keys += [k for flag, more in _RECIPE_WITHOUT.items() for k in (more if not args.get(flag) else (flag,))]
    words = ['train.py', '--data-dir DATA']
    for key in dict.fromkeys(keys):
        value = args.get(key)
        if value is None or value is False or value in ('', [], {}):  # but a zero is not always train.py's default
            continue
        if isinstance(value, dict):
            value = [f'{k}={v}' for k, v in value.items()]
        values = value if isinstance(value, list) else [] if value is True else [value]
        words.append(' '.join([f'--{key.replace("_", "-")}', *(shlex.quote(str(v)) for v in values)]))
    for key in ('pretrained_path', 'initial_checkpoint'):
        if args.get(key):
            words.append(f'--{key.replace("_", "-")} {shlex.quote(Path(args[key]).name)}')
    text = ' '.join(word.replace(' ', '\xa0') for word in words)  # an argument stays in one line with its values
    lines = textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False, subsequent_indent='    ')
    return lines.replace('\n', ' \\\n').replace('\xa0', ' ')


def run_card(
        model: nn.Module,
        args: dict[str, Any],
        metrics: dict[str, float],
        *,
        dataset: str,
        epoch: int | None,
        averaged: bool,
        base_model: str | None,
) -> str:
    """The card of a run of train.py, with what it measured as model-index results.

    Args:
        model: The model with the run's weights.
        args: The run's arguments.
        metrics: Accuracy of these weights in percent, 'top1' and 'top5'; may be empty.
        dataset: Name of the dataset.
        epoch: Epoch of the checkpoint, from 0.
        averaged: Whether the weights are the run's exponential moving average.
        base_model: Hub repository of the plain weights that the run was grafted on.
    """
    arch = model.pretrained_cfg['architecture']
    layer = ATTN_LAYERS[MODELS[arch][1]] if arch in MODELS else None
    ela = layer is not None and layer.is_ela
    names = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy'}
    data = card_data(
        ela=ela,
        license=model.pretrained_cfg.get('license'),
        base_model=base_model,
        model_name=f'{arch} on {dataset}',
        eval_results=[
            EvalResult(
                task_type='image-classification',
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split=args.get('val_split'),
                metric_type='accuracy',
                metric_name=names[key],
                metric_value=value,
            ) for key, value in metrics.items()
        ] or None,
    )
    results = '\n'.join(f'- {names[key]}: {value:.2f} %' for key, value in metrics.items())
    size = ' x '.join(map(str, timm.data.resolve_input_data_config(model, args=args)['input_size'][1:]))
    split = args.get('val_split') or 'validation'
    measured = f'On the {split} split, after epoch {epoch} (the first is 0), at {size} pixels:'
    weights = 'the exponential moving average' if averaged else 'as trained'
    return card(
        data,
        f'# {arch}, trained on {dataset}',
        f'`{arch}`{f" ([{layer.title}]({layer.paper}))" if layer else ""} with {model.num_classes} classes and '
        f'{sum(p.numel() for p in model.parameters()):,} parameters, '
        f'trained with timm\'s `train.py`{f" from `{base_model}`" if base_model else ""}.',
        '## Results',
        f'Weights: {weights}. {measured if metrics else "Their accuracy was not measured."}',
        results,
        '## Recipe',
        f'```bash\n{_command(args)}\n```',
        f'Exported with timm_ela {__version__}, timm {timm.__version__}, torch {torch.__version__}, huggingface_hub '
        f'{huggingface_hub.__version__}, Python {platform.python_version()}.',
        _usage(arch),
        *(('## Citation', CITATION) if ela else ()),
    )


def converted_card(model: nn.Module, source: str, *, grafted: bool) -> str:
    """The card of a converted checkpoint: no accuracy, since none was measured.

    Args:
        model: The model with the weights.
        source: Name of the checkpoint's file.
        grafted: Whether it was a plain model's, and not one with the attention's weights.
    """
    arch = model.pretrained_cfg['architecture']
    backbone, name = MODELS[arch]
    layer = ATTN_LAYERS[name]
    what = (
        f'a checkpoint of plain {backbone}, with the attention at the point where it changes nothing: it computes what '
        'the plain model does. The gates are untrained.' if grafted else 'under timm\'s names.')
    return card(
        card_data(ela=layer.is_ela),
        f'# {arch}, converted from {source}',
        f'`{arch}` ([{layer.title}]({layer.paper})) with the weights of `{source}`, {what}',
        f'```bash\ntrain.py --model {arch} --num-classes {model.num_classes} --initial-checkpoint model.safetensors ...'
        '\n```',
        _usage(arch),
        *(('## Citation', CITATION) if layer.is_ela else ()),
    )
