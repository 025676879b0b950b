"""`make cards`: writes a model card for each backbone, and the README's table of models, from timm's registry."""
import re
from pathlib import Path

from timm.models import get_arch_pretrained_cfgs

from timm_ela.cards import CITATION, card, card_data
from timm_ela.catalog import count, describe
from timm_ela.layers import ATTN_LAYERS, ELA_PAPER
from timm_ela.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
START, END = '<!-- models: make cards -->\n', '<!-- end of models -->'
BACKBONES = dict.fromkeys(backbone for backbone, _ in MODELS.values())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, columns of numbers aligned to the right."""
    rules = ['---:' if re.fullmatch(r'[\d,.]+', cell) else '---' for cell in rows[0]]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (header, rules, *rows))


def backbone_card(backbone: str) -> str:
    """The card of one plain timm model with each attention layer."""
    models = [describe(name) for name, (base, _) in MODELS.items() if base == backbone]
    ela, *_ = names = [m.name for m in models]
    params, macs = count(backbone)
    rows = [[f'`{backbone}`', 'none', f'{params:,}', f'{macs:,}']]
    for m in models:
        layer = ATTN_LAYERS[MODELS[m.name][1]]
        rows.append([f'`{m.name}`', f'[{layer.title}]({layer.paper})', f'{m.params:,}', f'{m.macs:,}'])
    cfgs = get_arch_pretrained_cfgs(ela).values()
    licenses = sorted({cfg.license or 'not stated' for cfg in cfgs})
    default = models[0].tags[0]
    return card(
        card_data(
            license=licenses[0] if len(licenses) == 1 else 'other',
            license_name='see-the-table-of-tags' if len(licenses) > 1 else None,
            base_model=[cfg.hf_hub_id for cfg in cfgs],
        ),
        f'# {backbone} with Efficient Local Attention, and with what it is compared to',
        f'ELA gates each feature map by what it holds along its rows and along its columns ([paper]({ELA_PAPER})), in '
        'four sizes: t, b, s, l. The other layers sit in the same slot, for comparison.',
        '## Models',
        table(['model', 'attention', 'parameters', 'multiply-adds'], rows),
        'At 224 x 224 pixels and 1000 classes; multiply-adds of convolutions and matrix products, by torch\'s '
        'FlopCounterMode.',
        '## Weights',
        'Each tag grafts the plain weights that timm publishes onto an ELA model, which then computes what the plain '
        f'one does, bit for bit. Default: `{default}`. The other layers have no weights.',
        table(
            ['tag', 'read from', 'licence'],
            [[f'`{cfg.tag}`', f'`{cfg.hf_hub_id}`', cfg.license or 'not stated'] for cfg in cfgs]),
        f"""```python
import timm

model = timm.create_model('{names[1]}.{default}', pretrained=True)
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
    """The README's table: a backbone a line, an attention layer a column, parameters in millions."""
    rows: dict[str, list[str]] = {}
    for name, (backbone, layer) in MODELS.items():
        row = rows.setdefault(
            name.removesuffix(f'_{layer}'), [f'`{backbone}`', f'{count(backbone)[0] / 1e6:.3f}'])
        row.append(f'{describe(name).params / 1e6:.3f}')
    header = ['prefix', 'plain timm model', 'plain', *(f'`_{layer}`' for layer in ATTN_LAYERS)]
    return table(header, [[f'`{prefix}`', *row] for prefix, row in rows.items()])


def write_all(root: Path) -> None:
    """Writes the cards and the table below the project's root."""
    for backbone in BACKBONES:
        (root / 'weights_cards' / f'{backbone}.md').write_text(backbone_card(backbone), encoding='utf-8')
    readme = root / 'README.md'
    before, rest = readme.read_text(encoding='utf-8').split(START)
    readme.write_text(f'{before}{START}{models_table()}\n{END}{rest.split(END)[1]}', encoding='utf-8')


if __name__ == '__main__':
    write_all(ROOT)
