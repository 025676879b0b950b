"""Model cards of what a user trained or converted. weights_cards/make_cards.py writes those of the backbones."""
import platform
import shlex
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .. import __version__
from ..models.registry import MODELS, Model
from .train_run import FILE_ARGS, TrainRun, published_args

# a card's repository until the model is pushed
PLACEHOLDER = 'hf-hub:OWNER/NAME'

CARD = """\
---
{{ card_data }}
---

# {{ name }}, {{ 'trained on' if run else 'converted from' }} {{ source }}

`{{ name }}`{% if row %} ([{{ row.layer.title }}]({{ row.layer.paper.url }})){% endif %} with \
{{ model.num_classes }} classes and {{ '{:,}'.format(params) }} parameters, {{ origin }}. \
Licence: {{ model.pretrained_cfg.license or 'not stated' }}.
{% if run %}
## Results

Weights: {{ 'the exponential moving average' if run.averaged else 'as trained' }}. \
{% if not run.metrics %}Their accuracy was not measured.
{% else %}On the {{ run.val_split }} split, after epoch {{ run.epoch }} (the first is 0), at {{ size }} pixels:
{% for key, value in run.metrics.items() %}
- Top-{{ key[3:] }} accuracy: {{ '%.2f' % value }} %
{%- endfor %}

To measure it again (a local folder: `--model local-dir:FOLDER`):

```bash
validate.py --data-dir DATA {{ validate_options }}
```
{% endif %}
## Recipe

- Epochs: {{ args.epochs }}
- Batch size: {{ args.batch_size }}{% if args.grad_accum_steps != 1 %} x {{ args.grad_accum_steps }}{% endif %}
- Optimizer: {{ args.opt }}
- Learning rate: {{ args.lr or '%s for a batch of %s' % (args.lr_base, args.lr_base_size) }}
- Schedule: {{ args.sched }}
- Image size: {{ args.train_img_sizes | join(', ') if args.train_img_sizes else size }}
- Augmentation: {{ augmentation | join(', ') or 'none' }}
- Seed: {{ args.seed }}

[args.yaml](./args.yaml) holds all arguments. To repeat the run:

```bash
train.py --config args.yaml --data-dir DATA{{ files and ' ' ~ files }}
```
{% if files %}
The command names files or folders that are not published here.
{% endif %}{% else %}
## Train

```bash
{{ train_command }}
```
{% endif %}
Written with timm_ela {{ version }}, timm {{ timm.__version__ }}, torch {{ torch.__version__ }}, \
huggingface_hub {{ huggingface_hub.__version__ }}, Python {{ python }}.

## Use

```python
{% if row %}# {{ needs }}
{% endif %}import timm

model = timm.create_model('{{ repository }}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```
{% if row %}
{{ citation }}{% endif %}"""


def needs() -> str:
    """Says which package a card's model needs, and how to install it if the package's metadata has an address."""
    text = f'needs the Python package timm_ela ({__version__})'
    with suppress(PackageNotFoundError):
        addresses = dict(url.split(', ') for url in metadata('timm-ela').get_all('Project-URL', []))
        text += f': pip install git+{addresses["Repository"]}' if 'Repository' in addresses else ''
    return text


def card_data(tag: str | None = None, **kwargs: Any) -> ModelCardData:
    """Returns a card's front matter: the fields that all cards share, the layer's tag, and the given fields."""
    tags = ['timm', 'image-classification', *([tag] if tag else [])]
    return ModelCardData(library_name='timm', pipeline_tag='image-classification', tags=tags, **kwargs)


def citation(*models: Model) -> str:
    """Returns the section that cites the papers of the models' layers."""
    papers = dict.fromkeys(model.layer.paper.bibtex for model in models)
    return '## Citation\n\n```bibtex\n' + '\n\n'.join(papers) + '\n```'


def _fill(model: nn.Module, front_matter: dict[str, Any], **fields: Any) -> str:
    cfg = model.pretrained_cfg
    row = MODELS.get(cfg['architecture'])
    data = card_data(row.layer.tag if row else None, license=cfg.get('license'), **front_matter)
    fields |= dict(
        name=cfg['architecture'], row=row, model=model, params=sum(p.numel() for p in model.parameters()),
        needs=needs(), repository=PLACEHOLDER, citation=citation(row) if row else '', version=__version__, timm=timm,
        torch=torch, huggingface_hub=huggingface_hub, python=platform.python_version())
    return f'{ModelCard.from_template(data, template_str=CARD, **fields)}\n'


def _options(values: dict[str, Any]) -> str:
    """Returns options for timm's scripts, without their defaults: for in_chans that is 3, whatever the model has."""
    return ' '.join(
        f'--{key.replace("_", "-")}' + ('' if value is True else f' {shlex.quote(str(value))}')
        for key, value in values.items() if value not in (None, False, '') and (key, value) != ('in_chans', 3))


def train_command(name: str, num_classes: int, in_chans: int) -> str:
    """Returns a train.py command line that starts from a model. `name` is timm's, such as 'local-dir:FOLDER'."""
    return 'train.py --data-dir DATA ' + _options(dict(
        model=name, pretrained=True, num_classes=None if num_classes else 'N', in_chans=in_chans))


def run_card(
        model: nn.Module, run: TrainRun, dataset: str, input_size: tuple[int, int, int], base_model: str | None) -> str:
    """Returns the card of a model that a run trained and tested at input_size. base_model is its start on the Hub."""
    args, name = published_args(run.args), model.pretrained_cfg['architecture']
    results = [
        EvalResult(
            'image-classification', dataset_type=dataset, dataset_name=dataset, dataset_split=run.val_split,
            metric_type='accuracy', metric_name=f'Top-{key[3:]} accuracy', metric_value=value)
        for key, value in run.metrics.items()]
    same = ['dataset', 'class_map', 'input_key', 'target_key', 'input_img_mode', 'model_dtype', 'fast_norm', 'amp']
    validate = {key: args.get(key) for key in same} | dict(
        amp_dtype=args.get('amp') and args.get('amp_dtype'), num_samples=args.get('val_num_samples'),
        in_chans=input_size[0], split=run.val_split, model=PLACEHOLDER, pretrained=True)
    # --no-aug switches off the transforms, but not mixup and cutmix
    transforms = () if args.get('no_aug') else ('scale', 'ratio', 'hflip', 'vflip', 'color_jitter', 'aa', 'reprob')
    return _fill(
        model, dict(base_model=base_model, model_name=f'{name} on {dataset}', eval_results=results or None),
        source=dataset, run=run, args=args, size=' x '.join(map(str, input_size[1:])),
        origin='trained with timm\'s `train.py`' + (f' from `{base_model}`' if base_model else ''),
        validate_options=_options(validate),
        augmentation=[f'{k} {args[k]}' for k in (*transforms, 'mixup', 'cutmix', 'cutmix_minmax') if args.get(k)],
        files=_options({k: v for k, v in args.items() if k in FILE_ARGS or str(v).startswith('local-dir:')}))


def converted_card(model: nn.Module, source: str, grafted: bool) -> str:
    """Returns the card of a checkpoint that was grafted or renamed, without an accuracy. `source` is its file name."""
    base = MODELS[model.pretrained_cfg['architecture']].base
    origin = f'with the weights of `{source}`, ' + (
        f'a checkpoint of plain {base}. Its attention is neutral: it changes nothing until it is trained'
        if grafted else 'under timm\'s names')
    command = train_command(PLACEHOLDER, model.num_classes, model.in_chans)
    return _fill(model, {}, source=source, origin=origin, train_command=command)
