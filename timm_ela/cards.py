"""Model cards: of a run, of a converted checkpoint, and of each backbone (`make cards`).

The cards of the backbones, in weights_cards/, and the README's table are written from timm's registry alone.
"""
import platform
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_arch_pretrained_cfgs
from torch import nn

from . import __version__
from .catalog import BACKBONES, count, describe, model_names

PAPER = 'https://arxiv.org/abs/2403.01123'
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
    'dataset', 'model', 'model_kwargs', 'bn_eps', 'bn_momentum', 'pretrained', 'num_classes', 'img_size', 'input_size',
    'in_chans', 'mean', 'std', 'crop_pct', 'gp', 'epochs', 'batch_size', 'grad_accum_steps', 'opt', 'opt_kwargs',
    'opt_betas', 'momentum', 'lr', 'sched', 'warmup_epochs', 'warmup_lr', 'min_lr', 'cooldown_epochs', 'weight_decay',
    'clip_grad', 'layer_decay', 'drop', 'drop_path', 'smoothing', 'bce_loss', 'mixup', 'cutmix', 'amp',
    'channels_last', 'model_ema', 'seed',
)
# Arguments that count only with, or only without, another one.
_RECIPE_WITH = {'model_ema': ('model_ema_decay',), 'amp': ('amp_dtype',)}
_RECIPE_WITHOUT = {
    'lr': ('lr_base', 'lr_base_size'),
    'no_aug': ('aa', 'color_jitter', 'hflip', 'vflip', 'scale', 'ratio', 'reprob', 'train_interpolation'),
}


def _table(header: list[str], rows: list[list[str]]) -> str:
    rules = ['---:' if re.fullmatch(r'[\d,.]+', cell) else '---' for cell in rows[0]]  # numbers to the right
    lines = [header, rules, *rows]
    return '\n'.join(f'| {" | ".join(row)} |' for row in lines)


def _usage(architecture: str) -> str:
    ours = architecture in BACKBONES
    comment = f'  # with `pip install timm-ela`, timm knows {architecture} by itself' if ours else ''
    return f"""\
## Use

```python
import timm{comment}

model = timm.create_model('{PLACEHOLDER}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```"""


def _card(data: ModelCardData, *sections: str) -> str:
    return str(ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(filter(None, sections)) + '\n'))


def _card_data(*, ela: bool = True, **kwargs: Any) -> ModelCardData:
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
    ela = arch in BACKBONES
    names = {'top1': 'Top-1 accuracy', 'top5': 'Top-5 accuracy'}
    data = _card_data(
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
    return _card(
        data,
        f'# {arch}, trained on {dataset}',
        f'`{arch}` with {model.num_classes} classes and {sum(p.numel() for p in model.parameters()):,} parameters, '
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


def converted_card(model: nn.Module, source: str) -> str:
    """The card of a plain checkpoint that was grafted: no accuracy, since none was measured."""
    arch = model.pretrained_cfg['architecture']
    return _card(
        _card_data(),
        f'# {arch}, grafted from {source}',
        f'The weights of `{source}`, a checkpoint of plain {BACKBONES[arch]}, with {arch}\'s attention at the point '
        f'where it changes nothing: it computes what the plain model does. The gates are untrained.',
        f'```bash\ntrain.py --model {arch} --num-classes {model.num_classes} --initial-checkpoint model.safetensors ...'
        '\n```',
        _usage(arch),
        '## Citation',
        CITATION,
    )


def backbone_card(backbone: str) -> str:
    """The card of one plain timm model's ELA variants, from the registry."""
    models = [describe(name) for name in model_names() if BACKBONES[name] == backbone]
    params, macs = count(backbone)
    cfgs = {cfg.tag: cfg for cfg in get_arch_pretrained_cfgs(models[0].name).values()}
    default = models[0].tags[0]
    rows = [[f'`{backbone}`', f'{params:,}', f'{macs:,}']]
    rows += [[f'`{m.name}`', f'{m.params:,}', f'{m.macs:,}'] for m in models]
    tags = [[f'`{tag}`', f'`{cfgs[tag].hf_hub_id}`', cfgs[tag].license or 'not stated'] for tag in models[0].tags]
    licenses = sorted({cfg.license for cfg in cfgs.values() if cfg.license})
    name = models[1].name
    return _card(
        _card_data(license=licenses[0] if len(licenses) == 1 else 'other', base_model=[c[1].strip('`') for c in tags]),
        f'# {backbone} with Efficient Local Attention',
        f'ELA gates each feature map by what it holds along its rows and along its columns ([paper]({PAPER})). Four '
        'sizes: t, b, s, l.',
        '## Models',
        _table(['model', 'parameters', 'multiply-adds'], rows),
        'At 224 x 224 pixels and 1000 classes; multiply-adds of convolutions and matrix products, by torch\'s '
        'FlopCounterMode.',
        '## Weights',
        'Each tag grafts the plain weights that timm publishes: the model then computes what the plain one does, bit '
        f'for bit. Default: `{default}`.',
        _table(['tag', 'read from', 'licence'], tags),
        f"""```python
import timm

model = timm.create_model('{name}.{default}', pretrained=True)
```""",
        '## Intended use',
        'Image classification, and features for detection and segmentation (`features_only=True`): fine-tune from a '
        'graft, or train from scratch, with timm\'s `train.py`.',
        '## Limits',
        'The gates of a graft are untrained: its accuracy is the plain model\'s until it is fine-tuned. No accuracy of '
        'these models is claimed here. The licence is that of the weights that are read.',
        '## Citation',
        CITATION,
    )


def models_table() -> str:
    """The README's table of models."""
    rows = []
    for backbone in dict.fromkeys(BACKBONES.values()):
        models = [describe(name) for name in model_names() if BACKBONES[name] == backbone]
        params, macs = count(backbone)
        rows.append([f'`{backbone}`', f'{params / 1e6:.3f}', f'{macs / 1e9:.3f}', '0'])
        rows += [[f'`{m.name}`', f'{m.params / 1e6:.3f}', f'{m.macs / 1e9:.3f}', str(len(m.tags))] for m in models]
    return _table(['model', 'parameters (M)', 'multiply-adds (G)', 'graft tags'], rows)


def write_all(root: Path) -> None:
    """Writes weights_cards/ and the README's table below root."""
    for backbone in dict.fromkeys(BACKBONES.values()):
        (root / 'weights_cards' / f'{backbone}_ela.md').write_text(backbone_card(backbone), encoding='utf-8')
    readme = root / 'README.md'
    before, start, rest = readme.read_text(encoding='utf-8').partition('<!-- models: make cards -->\n')
    _, end, after = rest.partition('<!-- end of models -->')
    readme.write_text(f'{before}{start}{models_table()}\n{end}{after}', encoding='utf-8')


if __name__ == '__main__':
    write_all(Path(sys.argv[1]))
