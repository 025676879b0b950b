"""`make cards`: writes counts.csv, a model card for each backbone, the index of the cards, and the README's picture."""
import csv
import re
from pathlib import Path

import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from timm.models import get_arch_pretrained_cfgs
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from timm_ela.hub.cards import card_data, citation, needs
from timm_ela.layers.attn_layers import ATTN_LAYERS, ELSA, ELSA_VOLO
from timm_ela.models.registry import MODELS, Counts, Model, read_counts
from timm_ela.observe import observe
from timm_ela.plot import draw

ROOT = Path(__file__).resolve().parents[1]
BASES = list(dict.fromkeys(model.base for model in MODELS.values() if model.layer.tag != 'elsa'))
ELSA_MODELS = [model for model in MODELS.values() if model.layer.tag == 'elsa']
# of scikit-image, CC0 or in the public domain
PHOTOGRAPHS = {'chelsea': 'A cat', 'coffee': 'A cup of coffee', 'rocket': 'A rocket'}
# options that differ between the models, from the authors' README
ELSA_RECIPES = {
    'elsa_swin_tiny': '--drop-path 0.1', 'elsa_swin_small': '--drop-path 0.3',
    'elsa_swin_base': '--drop-path 0.5 --model-ema'}


def measure(name: str) -> Counts:
    """Counts parameters, multiply-adds and saved bytes of a timm model without allocating its weights."""
    model = timm.create_model(name, num_classes=1000, device='meta')
    # two images, since batch norm cannot train on one value of a channel
    images = torch.empty(2, 3, 224, 224, device='meta')
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        model.eval()(images)
    weights = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    saved = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # the output keeps the saved tensors alive, so that no storage takes the place of another
        output = model.train()(images)  # noqa: F841
    kept = sum(size for storage, size in saved.items() if storage not in weights)
    return Counts(
        sum(p.numel() for p in model.parameters()), flops.get_total_flops() // 2 // len(images), kept // len(images))


def write_counts(path: Path) -> None:
    """Writes the costs of the plain models and of ours, one line each."""
    # count before opening the file, which the package reads: an interrupt would leave it incomplete
    rows = [[name, *measure(name)] for name in (*BASES, *(m.base for m in ELSA_MODELS), *MODELS)]
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerows([['name', *Counts._fields], *rows])


def card(data: ModelCardData, *sections: str) -> str:
    """Returns a card of front matter and Markdown sections."""
    return str(ModelCard(f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(sections) + '\n'))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, with columns of numbers aligned to the right."""
    rules = ['---:' if re.fullmatch(r'[\d,.]+', cell) else '---' for cell in rows[0]]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (header, rules, *rows))


def costs(name: str) -> list[str]:
    """Returns a model's cells: parameters, multiply-adds, and MiB that a training step keeps for each image."""
    counts = read_counts()[name]
    return [f'{counts.params:,}', f'{counts.macs:,}', f'{counts.saved / 2 ** 20:.1f}']


def backbone_card(base: str) -> str:
    """Returns the card of one plain timm model with each attention layer."""
    models = [model for model in MODELS.values() if model.base == base]
    grafted = [model for model in models if model.layer.neutral]
    rows = [[f'`{base}`', 'none', *costs(base)]]
    for model in models:
        rows.append([f'`{model.name}`', f'[{model.layer.title}]({model.layer.paper.url})', *costs(model.name)])
    cfgs = list(get_arch_pretrained_cfgs(grafted[0].name).values())
    licenses = sorted({cfg.license or 'not stated' for cfg in cfgs})
    without = [model.layer.title for model in models if model not in grafted]
    return card(
        card_data(
            'ela',
            license=licenses[0] if len(licenses) == 1 else 'other',
            license_name='see-the-table-of-tags' if len(licenses) > 1 else None,
            base_model=[cfg.hf_hub_id for cfg in cfgs],
        ),
        f'# {base} with Efficient Local Attention, and with the layers that ELA is compared with',
        'ELA multiplies a feature map by two gates, one computed from the means of its rows and one from the means of '
        f'its columns ([paper]({models[0].layer.paper.url})). ELA has four sizes: t, b, s, l. The other layers stand '
        'in the same place, for comparison.' + (
            ' The attention that the hybrid MobileNetV4 has by itself is in other blocks, and stays.'
            if 'hybrid' in base else ''),
        '## Models',
        table(['model', 'attention', 'parameters', 'multiply-adds', 'memory of training (MiB)'], rows),
        'At 224 x 224 pixels with 1000 classes. Multiply-adds are those of convolutions and matrix products, by '
        'torch\'s FlopCounterMode; element-wise products are not counted. The memory is what a training step in '
        'float32 keeps for its backward pass, for each image. Strip Pooling adds about 7 C^2 parameters a block.',
        '## Weights',
        'Each tag is a graft: timm\'s weights of the plain model, and attention that changes nothing until it is '
        'trained. The grafted model computes what the plain model does (ResNets and MobileNetV4 bit for bit, others up '
        'to rounding) '
        f'and trains as it does. The default is `{cfgs[0].tag}`.'
        + (f' There are none for {" and ".join(without)}: these layers cannot be set to change nothing.'
           if without else ''),
        table(
            ['tag', 'read from', 'licence'],
            [[f'`{cfg.tag}`', f'`{cfg.hf_hub_id}`', cfg.license or 'not stated'] for cfg in cfgs]),
        f"""```python
# {needs()}
import timm

model = timm.create_model('{grafted[1].name}.{cfgs[0].tag}', pretrained=True)
```""",
        '## Intended use',
        'Image classification, and features for detection and segmentation (`features_only=True`): fine-tune from a '
        'graft, or train from scratch, with timm\'s `train.py`.',
        '## Limits',
        'The attention of a graft is untrained: the model has the plain model\'s accuracy until it is fine-tuned. No '
        'accuracy of these models is claimed here. The licence is that of the plain model\'s weights.',
        citation(*models),
    )


def elsa_card(model: Model) -> str:
    """Returns the card of an ELSA-Swin or an ELSA-VOLO."""
    rows = [[f'`{name}`', *costs(name)[:2]] for name in (model.name, model.base)]
    what, macs, *rest = elsa_volo_texts() if model.layer is ELSA_VOLO else elsa_swin_texts(model)
    return card(
        card_data('elsa'),
        f'# {model.name}',
        what,
        '## Models',
        table(['model', 'parameters', 'multiply-adds'], rows),
        'At 224 x 224 pixels with 1000 classes. Multiply-adds are those of convolutions and matrix products as they '
        f'are computed, by torch\'s FlopCounterMode; those of ELSA {macs}.',
        *rest,
        citation(model),
    )


def elsa_swin_texts(model: Model) -> list[str]:
    """Returns what an ELSA-Swin is, what its multiply-adds count, and the rest of its card."""
    return [
        f'A Swin Transformer with Enhanced Local Self-Attention ([paper]({ELSA.paper.url})), not window attention, in '
        'its first three stages: attention in a 7 x 7 neighbourhood around each position, whose weights come from the '
        'product of queries and keys, plus a depthwise convolution.',
        'include the zeros of its banded matrices',
        '## Weights',
        f'There are none on the Hub: {ELSA.no_weights} The logits are those of the authors\' code.',
        f'```bash\ntimm-ela convert {model.name}.pth --model {model.name} OUT\n```',
        '## Recipe',
        'The authors\', for 8 GPUs:',
        f"""```bash
torchrun --nproc-per-node 8 train.py --data-dir IMAGENET --model {model.name} \\
    --epochs 300 --batch-size 128 --opt adamw --lr 1e-3 --sched cosine --weight-decay 0.05 \\
    --warmup-epochs 20 --warmup-lr 1e-6 --min-lr 1e-5 --aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 \\
    --remode pixel --reprob 0.25 --clip-grad 5.0 --amp {ELSA_RECIPES[model.name]}
```""",
    ]


def elsa_volo_texts() -> list[str]:
    """Returns what an ELSA-VOLO is, what its multiply-adds count, and the rest of its card."""
    return [
        f'A VOLO whose Outlookers, the blocks of its first stage, have Enhanced Local Self-Attention ([paper]('
        f'{ELSA.paper.url})) in place of outlook attention: attention in a 5 x 5 neighbourhood around each position, '
        'whose weights come from the product of queries and keys, with a factor and a summand for each channel. **This '
        'is a reading of the paper and not the authors\' model.** The reading rests on the abstract, which names '
        'ELSA-VOLO-D1 to D5 and calls ELSA a drop-in without architecture modification, and on the authors\' '
        'ELSABlock, which has the signature and the defaults of VOLO\'s Outlooker.',
        'leave out the element-wise products of its local attention',
        '## Weights',
        f'There are none: {ELSA_VOLO.no_weights} No accuracy is claimed here.',
        '## Options',
        'The kernel (5), the exponent and the factor of the ghost head (1 and 1) and the groups of the convolution (8 '
        'channels) are the defaults of the authors\' classes, which they may not have used in VOLO. `elsa_kernel`, '
        '`lam`, `gamma` and `group_width` change them (in `train.py`: `--model-kwargs lam=0`). With `lam=0`, as in '
        'ELSA-Swin, the model is faster.',
    ]


def names_by_suffix(base: str) -> dict[str, str]:
    """Returns the names of a backbone's models by their suffixes, such as 'ela_b'."""
    return {model.layer.suffix: model.name for model in MODELS.values() if model.base == base}


def index_page() -> str:
    """Returns the index of the cards: sizes of the models in millions of parameters, and what each layer costs."""
    counts = read_counts()
    sizes = [layer for layer in ATTN_LAYERS.values() if layer.tag == 'ela']
    rows = []
    for base in BASES:
        names = names_by_suffix(base)
        rows.append([
            f'[`{names["ela_b"].removesuffix("_ela_b")}`]({base}.md)',
            *(f'{counts[name].params / 1e6:.3f}' for name in (base, *(names[layer.suffix] for layer in sizes)))])
    layers = []
    for layer in ATTN_LAYERS.values():
        cells = [f'`_{layer.suffix}`', f'[{layer.title}]({layer.paper.url})']
        for base in ('resnet50', 'mobilenetv2_100', 'mobilenetv4_conv_small'):
            plain, ours = counts[base], counts[names_by_suffix(base)[layer.suffix]]
            cells += [f'{ours.params - plain.params:,}', f'{ours.saved / plain.saved:.3f}']
        layers.append(cells)
    elsa = [
        [f'[`{model.name}`]({model.name}.md)',
         *(f'{counts[name].params / 1e6:.3f}' for name in (model.base, model.name))] for model in ELSA_MODELS]
    return '\n\n'.join([
        '# Models',
        'A name is a prefix and a suffix: `resnet50` + `_ela_b`. Parameters in millions with 1000 classes; the card of '
        'a backbone has all layers, multiply-adds, memory and tags.',
        table(['prefix', 'plain', *(f'`_{layer.suffix}`' for layer in sizes)], rows),
        '## Layers',
        'What a layer adds: parameters, and the memory that a training step in float32 at 224 px keeps for its '
        'backward pass, as a multiple of the plain model\'s.',
        table(['suffix', 'layer', 'ResNet-50', 'memory', 'MobileNetV2', 'memory', 'MobileNetV4 conv small', 'memory'],
              layers),
        '## ELSA',
        table(['model', 'plain Swin or VOLO', 'with ELSA'], elsa)]) + '\n'


def write_all(folder: Path) -> None:
    """Writes the cards and their index into a folder."""
    pages = {**{base: backbone_card(base) for base in BASES}, **{model.name: elsa_card(model) for model in ELSA_MODELS}}
    for name, page in {**pages, 'README': index_page()}.items():
        (folder / f'{name}.md').write_text(page, encoding='utf-8')


def write_picture(path: Path) -> None:
    """Draws what the trained model makes of three photographs."""
    from skimage import data

    folder = ROOT / 'weights_cards' / 'tf_efficientnet_lite0_ela_b.cifar10'
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    seen = [observe(Image.fromarray(getattr(data, name)()), model, stages=[2, 3], topk=3) for name in PHOTOGRAPHS]
    draw(seen, list(PHOTOGRAPHS.values()), columns=5).savefig(path, dpi=120, pil_kwargs={'quality': 80})


if __name__ == '__main__':
    write_counts(ROOT / 'timm_ela' / 'models' / 'counts.csv')
    write_all(ROOT / 'weights_cards')
    write_picture(ROOT / 'weights_cards' / 'photographs.webp')
