"""Push to the Hub and pull from it: huggingface_hub and timm, unmodified, against a server on loopback (hub_server.py).

What is huggingface_hub's alone, such as retries, caches and Xet, is not tested here.
"""
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
import yaml
from folders import MODEL, give_equal_logits, have_equal_weights
from hub_server import Hub, Repo
from huggingface_hub import constants, file_download
from safetensors.torch import load_file
from timm.models import save_for_hf

from timm_ela.cli import main


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub; huggingface_hub reads its settings when it is imported, so they are changed where it keeps them."""
    with Hub() as hub:
        template = hub.url + '/{repo_id}/resolve/{revision}/{filename}'
        for name, value in (
                ('ENDPOINT', hub.url), ('HUGGINGFACE_CO_URL_TEMPLATE', template), ('HF_HUB_CACHE', tmp_path / 'cache'),
                ('HF_HUB_OFFLINE', False)):
            monkeypatch.setattr(constants, name, value)
        # where huggingface_hub below 1.0 keeps it
        monkeypatch.setattr(file_download, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
        monkeypatch.setenv('NO_PROXY', '127.0.0.1')
        monkeypatch.setenv('HF_TOKEN', 'hf_owner')
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


def pull(name: str) -> torch.nn.Module:
    return timm.create_model(name, pretrained=True)


# Push and pull
def test_three_files_are_pushed_in_one_commit_and_what_is_pulled_is_what_was_pushed(hub, push, folder):
    assert (folder / 'pytorch_model.bin').exists()
    printed = push(folder)
    repo = hub.repos['owner/model']
    assert repo.files.keys() == {'README.md', 'config.json', 'model.safetensors'} and repo.commits == 1
    assert repo.files['README.md'].endswith(b'It is hf-hub:owner/model.\n')
    pushed = timm.create_model(MODEL, num_classes=7)
    pushed.load_state_dict(load_file(folder / 'model.safetensors'))
    assert printed.startswith(f'Wrote {hub.url}/owner/model/commit/{repo.sha}. ')
    pulled = eval(printed.partition('Load it with: ')[2], {'timm': timm})
    assert have_equal_weights(pushed, pulled) and give_equal_logits(pushed, pulled)


def test_what_an_earlier_push_left_goes_in_the_same_commit_and_the_owners_files_stay(hub, push, folder, write_run):
    mine = {'notes.md': b'mine', 'old/args.yaml': b'mine'}
    repo = hub.repos['owner/model'] = Repo(mine)
    push(write_run(timm.create_model(MODEL, num_classes=3)))
    ours = {'README.md', 'args.yaml', 'config.json', 'model.safetensors'}
    assert repo.files.keys() == {*ours, *mine} and b'70.50 %' in repo.files['README.md']
    push(folder)  # without a recipe
    assert repo.files.keys() == {*ours, *mine} - {'args.yaml'} and repo.commits == 2


def test_args_beside_a_model_are_published_without_what_is_local(hub, push, folder):
    args = {'model': MODEL, 'data_dir': '/home/me', 'class_map': '/my/a.txt'}
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    push(folder)
    assert yaml.safe_load(hub.repos['owner/model'].files['args.yaml']) == {'model': MODEL, 'class_map': 'a.txt'}


def test_timms_weights_are_pulled_and_grafted_and_nothing_else_is_asked_for(hub, randomize, tmp_path):
    plain = randomize(timm.create_model('resnet18'))
    save_for_hf(plain, tmp_path, safe_serialization=True)
    hub.repos['timm/resnet18.a1_in1k'] = Repo({'model.safetensors': (tmp_path / 'model.safetensors').read_bytes()})
    for name in ('resnet18_ela_b', 'resnet18_ela_b.graft_a1_in1k'):
        assert give_equal_logits(plain, pull(name))
    assert not [request for request in hub.requests if '/timm/resnet18.a1_in1k/' not in request]


# Who may do what
@pytest.mark.parametrize('args, default, private', [
    ((), False, False), ((), True, True), (('--private',), False, True)])
def test_a_new_repository_is_private_if_asked_for_or_as_its_owner_has_set(hub, push, folder, args, default, private):
    hub.private_by_default = default
    push(folder, *args)
    assert hub.repos['owner/model'].private == private


def test_a_public_repository_is_not_taken_for_private(hub, push, folder):
    repo = hub.repos['owner/model'] = Repo({})
    assert 'public' in push(folder, '--private', fails=True)
    assert repo.commits == 0


def test_a_push_without_a_token_says_so(hub, push, folder, monkeypatch):
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', 'none')
    assert 'HF_TOKEN' in push(folder, fails=True) and not hub.requests


# When the line is bad
def test_a_push_to_no_hub_says_so(hub, push, folder, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:1')
    line = push(folder, fails=True)
    assert 'owner/model' in line and 'refused' in line and '\n' not in line


@pytest.mark.parametrize('fault, status', [
    ('POST /api/repos/create', 500), ('POST .*/preupload/', 403), ('POST .*/commit/', 403)])
def test_a_push_broken_off_publishes_nothing_and_can_be_repeated(hub, push, folder, fault, status):
    repo = hub.repos['owner/model'] = Repo({'README.md': b'mine'})
    hub.faults[fault] = status
    line = push(folder, fails=True)
    assert f'owner/model on {hub.url}: ' in line and str(status) in line and 'all files were uploaded, or none' in line
    assert repo.files == {'README.md': b'mine'}
    hub.faults.clear()
    push(folder)
    assert repo.commits == 1
