"""weights_cards/ and timm's registry say the same; `make cards` writes the cards and their index."""
import re
import sys
from pathlib import Path

import pytest
import timm
from huggingface_hub import ModelCard
from timm.models import get_arch_pretrained_cfgs

from timm_ela.layers.attn_layers import ELSA_VOLO
from timm_ela.models.registry import MODELS

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'weights_cards'))
import make_cards as cards  # noqa: E402  not of the package

BASES = {name: model.base for name, model in MODELS.items() if model.layer.tag != 'elsa'}
ELSA_CARDS = {f'{model.name}.md': model for model in cards.ELSA_MODELS}
CARDS = {f'{base}.md': base for base in cards.BASES}


def text(name: str) -> str:
    return (ROOT / 'weights_cards' / name).read_text(encoding='utf-8')


def table(markdown: str, header: str) -> list[list[str]]:
    """The rows of the table whose header begins so, without the marks of code."""
    lines = markdown.split(f'| {header}', 1)[1].split('\n\n')[0].splitlines()[2:]
    return [[cell.strip(' `') for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]


def test_make_cards_writes_the_cards_and_their_index_and_nothing_else(tmp_path):
    cards.write_all(tmp_path)
    written = {path.name: path.read_text(encoding='utf-8') for path in tmp_path.iterdir()}
    names = {path.name for path in (ROOT / 'weights_cards').glob('*.md')}
    assert written.keys() == {'README.md', *CARDS, *ELSA_CARDS} == names
    assert [name for name in written if written[name] != text(name)] == []


def test_the_index_links_every_card():
    assert set(re.findall(r'\]\(([\w.]+)\)', text('README.md'))) == {*CARDS, *ELSA_CARDS}


@pytest.mark.parametrize('name', ELSA_CARDS)
def test_a_card_of_elsa_is_valid_and_says_whose_model_it_is(name):
    card = ModelCard.load(ROOT / 'weights_cards' / name)
    assert card.data.library_name == 'timm' and 'elsa' in card.data.tags and '2112.12786' in card.text
    reading = ELSA_CARDS[name].layer is ELSA_VOLO
    assert ("a reading of the paper and not the authors' model" in card.text) == reading
    assert (f'timm-ela convert {ELSA_CARDS[name].name}.pth' in card.text) != reading


def test_the_registry_and_the_cards_have_the_same_names():
    names = {n for n in timm.list_models() if timm.models.model_entrypoint(n).__module__.startswith('timm_ela.')}
    assert names == set(MODELS)
    in_cards = [row[0] for name in CARDS for row in table(text(name), 'model |')]
    assert sorted(in_cards) == sorted({*BASES, *BASES.values()})


def test_no_file_names_an_address_of_the_package_that_is_not_in_pyproject():
    """An address that nobody owns is one that anybody may take, and serve what he likes."""
    files = [path for folder in ('timm_ela', 'tests', 'weights_cards') for path in (ROOT / folder).rglob('*')]
    files += [*ROOT.glob('*.*'), ROOT / 'Makefile', ROOT / '.ci' / 'run']
    texts = {path: path.read_text(encoding='utf-8', errors='replace') for path in files if path.is_file()}
    owned = set(re.findall(r'"(https://.*?)"', texts[ROOT / 'pyproject.toml']))
    address = re.compile(r'(?<=git\+)https?://[\w./-]+|https?://[\w./-]*timm[-_]ela[\w./-]*')
    named = {path: set(address.findall(text)) - owned for path, text in texts.items()}
    assert {path: found for path, found in named.items() if found} == {}


@pytest.mark.parametrize('name', CARDS)
def test_a_card_is_a_valid_model_card_with_the_tags_that_timm_serves_for_the_plain_model(name):
    card = ModelCard.load(ROOT / 'weights_cards' / name)
    plain = [cfg for cfg in get_arch_pretrained_cfgs(CARDS[name]).values() if cfg.hf_hub_id]
    assert table(card.text, 'tag |') == [
        [f'graft_{cfg.tag}', cfg.hf_hub_id, cfg.license or 'not stated'] for cfg in plain]
    assert f'The default is `graft_{timm.get_pretrained_cfg(CARDS[name]).tag}`' in card.text
    assert 'ela' in card.data.tags
    assert card.data.base_model == [cfg.hf_hub_id for cfg in plain]
    licenses = {cfg.license or 'not stated' for cfg in plain}
    assert card.data.license == (licenses.pop() if len(licenses) == 1 else 'other')
    blocks = re.findall(r'```python\n(.*?)```', card.text, re.DOTALL)
    models = re.findall(r"create_model\('([^']+)'", ''.join(blocks))
    assert models and {BASES[model.partition('.')[0]] for model in models} == {CARDS[name]}
    assert all(model in get_arch_pretrained_cfgs(model.partition('.')[0]) for model in models)
