"""Push to the Hub and pull from it: huggingface_hub and timm, unmodified, against a server on loopback (hub_server.py).

What is huggingface_hub's alone, such as retries, caches and Xet, is not tested here.
"""
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import yaml
from folders import MODEL
from helpers import run_python
from hub_server import TOKEN, Hub
from huggingface_hub import constants
from timm.models import save_for_hf

from timm_ela.cli import main

PULL = '''
import sys
import timm, torch
from safetensors.torch import load_file

def pull(name):
    return timm.create_model(name, pretrained=True).eval()

x = torch.randn(2, 3, 96, 128)
'''


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub; huggingface_hub reads its settings when it is imported, so they are changed where it keeps them."""
    with Hub(tmp_path / 'hub') as hub:
        for name, value in (('ENDPOINT', hub.url), ('HF_HUB_OFFLINE', False), ('HF_HUB_DISABLE_XET', True)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        yield hub


@pytest.fixture
def push(capsys) -> Callable[..., str]:
    """Runs `timm-ela push FOLDER owner/model`: gives what it prints, or its error, which is one line below progress."""
    def push(folder: Path, *args: str, fails: bool = False) -> str:
        with pytest.raises(SystemExit, match='2') if fails else nullcontext():
            main(['push', str(folder), 'owner/model', *args])
        out, err = capsys.readouterr()
        return err.replace('\r', '\n').partition('timm-ela push: error: ')[2].removesuffix('\n') if fails else out
    return push


@pytest.fixture
def folder(tmp_path, randomize) -> Path:
    """A folder of three files to push, with random weights for 7 classes; and a pickle."""
    save_for_hf(randomize(timm.create_model(MODEL, num_classes=7)), tmp_path / 'folder', safe_serialization='both')
    (tmp_path / 'folder' / 'README.md').write_text('---\nlibrary_name: timm\n---\nIt is hf-hub:OWNER/NAME.\n')
    return tmp_path / 'folder'


def pull(hub: Hub, code: str, *args: object) -> str:
    env = {'HF_ENDPOINT': hub.url, 'HF_HOME': hub.root / 'home', 'HF_HUB_OFFLINE': 0, 'HF_HUB_DISABLE_XET': 1,
           'HF_HUB_DISABLE_TELEMETRY': 1}
    return run_python(PULL + code, *args, env=env).stdout


# Push and pull
def test_three_files_are_pushed_in_one_commit_and_what_is_pulled_is_what_was_pushed(hub, push, folder):
    assert (folder / 'pytorch_model.bin').exists()
    assert f'{hub.url}/owner/model' in push(folder)
    pushed = hub.files('owner/model')
    assert pushed.keys() == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}
    assert pushed['README.md'].endswith(b'It is hf-hub:owner/model.\n') and hub.repos['owner/model'].commits == 1
    assert pull(hub, f'''
model, pulled = timm.create_model('{MODEL}', num_classes=7).eval(), pull('hf-hub:owner/model')
model.load_state_dict(load_file(sys.argv[1]))
a, b = model.state_dict(), pulled.state_dict()
print(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), torch.equal(model(x), pulled(x)))
''', folder / 'model.safetensors') == 'True True\n'


def test_what_an_earlier_push_left_goes_in_the_same_commit_and_the_owners_files_stay(hub, push, folder, write_run):
    mine = {'notes.md': b'mine', 'old/args.yaml': b'mine'}
    hub.add_repo('owner/model', mine)
    push(write_run(timm.create_model(MODEL, num_classes=3)))
    ours = {'README.md', 'args.yaml', 'config.json', 'model.safetensors'}
    assert hub.files('owner/model').keys() == {'.gitattributes', *ours, *mine}
    assert b'70.50 %' in hub.files('owner/model')['README.md']
    push(folder)  # without a recipe
    assert hub.files('owner/model').keys() == {'.gitattributes', *ours, *mine} - {'args.yaml'}
    assert hub.repos['owner/model'].commits == 2


def test_args_beside_a_model_are_published_without_what_is_local(hub, push, folder):
    args = {'model': MODEL, 'data_dir': '/home/me', 'class_map': '/my/a.txt'}
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    push(folder)
    assert yaml.safe_load(hub.files('owner/model')['args.yaml']) == {'model': MODEL, 'class_map': 'a.txt'}


def test_timms_weights_are_pulled_and_grafted_and_nothing_else_is_asked_for(hub, randomize, tmp_path):
    save_for_hf(randomize(timm.create_model('resnet18')), tmp_path, safe_serialization=True)
    hub.add_repo('timm/resnet18.a1_in1k', {'model.safetensors': tmp_path / 'model.safetensors'})
    assert pull(hub, '''
logits = pull('resnet18')(x)
print([torch.equal(pull(name)(x), logits) for name in ('resnet18_ela_b', 'resnet18_ela_b.graft_a1_in1k')])
''') == '[True, True]\n'
    assert not [request for request in hub.requests if '/timm/resnet18.a1_in1k/' not in request]


# Who may do what
@pytest.mark.parametrize('args, default, private', [
    ((), False, False), ((), True, True), (('--private',), False, True)])
def test_a_new_repository_is_private_if_asked_for_or_as_its_owner_has_set(hub, push, folder, args, default, private):
    hub.private_by_default = default
    push(folder, *args)
    assert hub.repos['owner/model'].private == private


def test_a_public_repository_is_not_taken_for_private(hub, push, folder):
    hub.add_repo('owner/model', {})
    assert 'public' in push(folder, '--private', fails=True)
    assert hub.repos['owner/model'].commits == 0


def test_a_push_without_a_token_says_so(hub, push, folder, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', 'none')
    assert 'HF_TOKEN' in push(folder, fails=True) and not hub.requests


# When the line is bad
def test_a_push_to_no_hub_says_so(hub, push, folder):
    hub.stop()
    line = push(folder, fails=True)
    assert 'owner/model' in line and 'refused' in line and '\n' not in line


@pytest.mark.parametrize('files', [None, {'README.md': b'mine'}], ids=['new', 'used'])
@pytest.mark.parametrize('fault, status', [
    ('POST /api/repos/create', 500), ('PUT /lfs', 403), ('POST .*/commit/', 403)])
def test_a_push_broken_off_publishes_nothing_and_can_be_repeated(hub, push, folder, fault, status, files):
    if files is not None:
        hub.add_repo('owner/model', files)
    hub.faults[fault] = status
    line = push(folder, fails=True)
    assert f'owner/model on {hub.url}: ' in line and str(status) in line and 'all files were uploaded, or none' in line
    after = hub.files('owner/model') if 'owner/model' in hub.repos else {}
    assert {name: data for name, data in after.items() if name != '.gitattributes'} == (files or {})
    hub.faults.clear()
    push(folder)
    assert hub.repos['owner/model'].commits == 1
