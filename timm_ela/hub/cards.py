"""Model cards of what a user trained or converted. weights_cards/make_cards.py writes those of the backbones."""
import shlex
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from .. import __version__
from ..models.registry import MODELS, Model
from .train_run import TrainRun, published_args

# a card's repository until the model is pushed
PLACEHOLDER = 'hf-hub:OWNER/NAME'

CARD = """\
---
{{ card_data }}
---

# {{ cfg.architecture }}, {{ 'trained on' if run else 'converted from' }} {{ source }}

`{{ cfg.architecture }}`{% if row %} ([{{ row.layer.title }}]({{ row.layer.paper.url }})){% endif %} with \
{{ model.num_classes }} classes and {{ '{:,}'.format(params) }} parameters, {{ origin }}. \
Licence: {{ cfg.license or 'not stated' }}.
{% if run %}
## Results

Weights: {{ weights }}. \
{% if not run.metrics %}Their accuracy was not measured.
{% else %}On the {{ split }} split, after epoch {{ run.epoch }} (the first is 0), at {{ size }} pixels:
{% for key, value in run.metrics.items() %}
- Top-{{ key[3:] }} accuracy: {{ '%.2f' % value }} %
{%- endfor %}

To measure it again (a local folder: `--model local-dir:FOLDER`):

```bash
validate.py --data-dir DATA {{ validate_options }}
```
{% endif %}
## Recipe

Epochs: {{ args.epochs }}, batch size: {{ args.batch_size }}, optimizer: {{ args.opt }}. \
[args.yaml](./args.yaml) holds all arguments but `--resume` and those of the machine. To repeat the run (files that it \
names must be in the working directory):

```bash
train.py --config args.yaml --data-dir DATA
```
{% endif %}
Written with timm_ela {{ version }}, timm {{ timm.__version__ }}, torch {{ torch.__version__ }}.

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
    """Says which package a card's model needs."""
    return f'needs the Python package timm_ela ({__version__})'


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
        row=row, cfg=cfg, model=model, params=sum(p.numel() for p in model.parameters()), repository=PLACEHOLDER,
        needs=needs(), citation=citation(row) if row else '', version=__version__, timm=timm, torch=torch)
    return f'{ModelCard.from_template(data, template_str=CARD, **fields)}\n'


def run_card(model: nn.Module, run: TrainRun, dataset: str, base_model: str | None) -> str:
    """Returns the card of a model that a run trained and tested as its cfg says. base_model is its start on the Hub."""
    args, cfg = published_args(run.args), model.pretrained_cfg
    in_chans, *size = cfg['input_size']
    split = args.get('val_split') or 'validation'
    results = [
        EvalResult(
            'image-classification', dataset_type=dataset, dataset_name=dataset, dataset_split=split,
            metric_type='accuracy', metric_name=f'Top-{key[3:]} accuracy', metric_value=value)
        for key, value in run.metrics.items()]
    same = ['dataset', 'class_map', 'input_key', 'target_key', 'input_img_mode', 'model_dtype', 'fast_norm', 'amp']
    validate = {key: args.get(key) for key in same} | dict(
        amp_dtype=args.get('amp') and args.get('amp_dtype'), num_samples=args.get('val_num_samples'),
        in_chans=None if in_chans == 3 else in_chans, split=split, model=PLACEHOLDER, pretrained=True)
    # defaults are left out
    options = [
        f'--{key.replace("_", "-")}' + ('' if value is True else f' {shlex.quote(str(value))}')
        for key, value in validate.items() if value not in (None, False, '')]
    start = base_model or args.get('initial_checkpoint')
    if not start and args.get('pretrained'):
        start = args.get('pretrained_path') or (args['model'] if args['model'].startswith('local-dir:') else None)
    weights = {True: 'the exponential moving average', False: 'as trained', None: 'not known whether averaged'}
    return _fill(
        model, dict(
            base_model=base_model, model_name=f'{cfg["architecture"]} on {dataset}', eval_results=results or None),
        source=dataset, run=run, args=args, split=split, size=' x '.join(map(str, size)),
        origin='trained with timm\'s `train.py`' + (f' from `{start}`' if start else ''),
        weights=weights[run.averaged], validate_options=' '.join(options))


def converted_card(model: nn.Module, source: str, grafted: bool) -> str:
    """Returns the card of a checkpoint that was grafted or renamed, without an accuracy. `source` is its file name."""
    base = MODELS[model.pretrained_cfg['architecture']].base
    origin = f'with the weights of `{source}`, ' + (
        f'a checkpoint of plain {base}. Its attention is neutral: it changes nothing until it is trained'
        if grafted else 'under timm\'s names')
    return _fill(model, {}, source=source, origin=origin)
