"""Push to the Hub and pull from it: huggingface_hub and timm, unmodified, against a server on loopback (hub_server.py).

huggingface_hub reads its settings when it is imported, so the client is a process of its own. What is huggingface_hub's
alone, such as its cache, offline mode and Xet, is not tested here.
"""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from hub_server import OTHER, OWNER, READER, Hub
from timm.models import save_for_hf

MODEL, PLAIN = 'mobilenetv2_050_ela_t', 'mobilenetv2_050'  # the smallest
CONFIG = {'architecture': MODEL, 'num_classes': 7, 'input_size': [3, 96, 128], 'mean': [0.1, 0.2, 0.3]}
CLIENT = '''
import contextlib, io, json, os, signal, sys
import timm, torch
from safetensors.torch import load_file

def pull(name, **kwargs):
    return timm.create_model(name, pretrained=True, cache_dir=cache, **kwargs).eval()

def push(*args):
    from timm_ela.cli import main
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(['push', *args])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()

replies, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    code, cache, os.environ['HF_TOKEN'] = json.loads(line)
    signal.alarm(300)  # no test waits for ever
    try:
        exec(code)
    except Exception as error:
        result = f'{type(error).__name__}: {error}'
    signal.alarm(0)
    print(json.dumps(result), file=replies, flush=True)
'''


class Client(subprocess.Popen):
    """A process that runs one piece of code after another, each of which leaves its answer in `result`."""

    def __init__(self, url: str, home: Path):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'XET_'))}
        env = {**kept, 'NO_PROXY': '127.0.0.1', 'OMP_NUM_THREADS': '1', 'HF_ENDPOINT': url, 'HF_HOME': str(home),
               'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1'}
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
        super().__init__([sys.executable, '-c', CLIENT], env=env, **pipes)

    def run(self, code: str, cache: Path, token: str = ''):
        self.stdin.write(json.dumps((code, str(cache), token)) + '\n')
        self.stdin.flush()
        return json.loads(self.stdout.readline())

    def push(self, folder: Path, *args: str) -> str:
        """Runs `timm-ela push FOLDER owner/model`, which must succeed; returns what it prints."""
        code, out, err = self.run(f"result = push('{folder}', 'owner/model', *{args})", folder, OWNER)
        assert code == 0, err
        return out

    def refused(self, folder: Path, *args: str, token: str = OWNER) -> str:
        """The same, which must fail; returns the one line that it says, below the client's progress and retries."""
        code, _, err = self.run(f"result = push('{folder}', 'owner/model', *{args})", folder, token)
        assert code == 2 and 'Traceback' not in err, err
        [line] = [line for line in err.splitlines() if line.startswith('timm-ela push: error: ')]
        return line


@pytest.fixture(scope='module')
def port() -> int:
    """Where every Hub of this module listens, one after another: a client keeps the address it began with."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


@pytest.fixture(scope='module')
def client(port, tmp_path_factory):
    with Client(f'http://127.0.0.1:{port}', tmp_path_factory.mktemp('client')) as client:
        yield client


@pytest.fixture
def hub(port, tmp_path):
    with Hub(tmp_path / 'hub', port) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path, randomize) -> Path:
    """A folder of three files to push: random weights for 7 classes, non-square input, mean and std; and a pickle."""
    model = randomize(timm.create_model(MODEL, num_classes=7))
    save_for_hf(model, tmp_path / 'folder', data_config=CONFIG, safe_serialization='both')
    (tmp_path / 'folder' / 'README.md').write_text('---\nlibrary_name: timm\n---\nIt is hf-hub:OWNER/NAME.\n')
    return tmp_path / 'folder'


# Push and pull
def test_what_is_pushed_is_what_is_pulled(hub, client, folder, tmp_path):
    assert f'{hub.url}/owner/model' in client.push(folder)
    config, same_weights, same_logits = client.run(f'''
model, pulled = timm.create_model('{MODEL}', num_classes=7).eval(), pull('hf-hub:owner/model')
model.load_state_dict(load_file('{folder}/model.safetensors'))
x, (a, b) = torch.randn(2, 3, 96, 128), (model.state_dict(), pulled.state_dict())
same_weights = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
result = pulled.pretrained_cfg, same_weights, torch.equal(model(x), pulled(x))''', tmp_path)
    assert config.items() >= CONFIG.items()
    assert same_weights and same_logits


def test_a_push_is_one_commit_of_three_files_with_the_repositorys_name_in_the_card(hub, client, folder):
    assert (folder / 'pytorch_model.bin').exists()
    client.push(folder)
    assert len(hub.repos['owner/model'].pushes) == 1
    pushed = hub.files('owner/model')
    assert pushed.keys() == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}
    assert pushed['model.safetensors'] == (folder / 'model.safetensors').read_bytes()
    assert pushed['README.md'].endswith(b'It is hf-hub:owner/model.\n')


def test_a_run_of_training_is_pushed_as_it_is(hub, client, write_run):
    client.push(write_run(timm.create_model(MODEL, num_classes=7)))
    pushed = hub.files('owner/model')
    assert pushed.keys() == {'.gitattributes', 'README.md', 'args.yaml', 'config.json', 'model.safetensors'}
    assert b'70.50 %' in pushed['README.md']


def test_args_beside_a_model_are_published_without_what_is_local(hub, client, folder):
    args = {'model': MODEL, 'data_dir': '/home/me', 'class_map': '/my/a.txt'}
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    client.push(folder)
    assert yaml.safe_load(hub.files('owner/model')['args.yaml']) == {'model': MODEL, 'class_map': 'a.txt'}


def test_a_folder_that_timm_grafts_as_it_loads_is_pushed(hub, client, folder):
    save_for_hf(timm.create_model(PLAIN), folder, safe_serialization=True)
    config = folder / 'config.json'
    config.write_text(config.read_text().replace(PLAIN, MODEL))
    client.push(folder)


def test_timms_weights_are_pulled_and_grafted_and_nothing_else_is_asked_for(hub, client, randomize, tmp_path):
    save_for_hf(randomize(timm.create_model('resnet18')), tmp_path, safe_serialization=True)
    hub.add_repo('timm/resnet18.a1_in1k', {'model.safetensors': tmp_path / 'model.safetensors'})
    assert client.run('''
x = torch.randn(2, 3, 96, 128)
logits = pull('resnet18')(x)
result = [torch.equal(pull(name)(x), logits) for name in ('resnet18_ela_b', 'resnet18_ela_b.graft_a1_in1k')]
''', tmp_path / 'cache') == [True, True]
    assert not [request for request in hub.requests if '/timm/resnet18.a1_in1k/' not in request]


# Who may do what
@pytest.mark.parametrize('args, default, private', [
    ((), False, False), ((), True, True), (('--private',), False, True)])
def test_a_new_repository_is_private_if_asked_for_or_as_its_owner_has_set(hub, client, folder, args, default, private):
    hub.private_by_default = default
    client.push(folder, *args)
    assert hub.repos['owner/model'].private == private


def test_a_public_repository_is_not_taken_for_private(hub, client, folder):
    hub.add_repo('owner/model', {})
    assert 'public' in client.refused(folder, '--private')
    assert hub.repos['owner/model'].pushes == []


@pytest.mark.parametrize('token, reason', [
    ('', 'HF_TOKEN'), ('hf_wrong', 'Invalid credentials'), (READER, 'rights'), (OTHER, 'rights')])
def test_a_push_without_the_right_to_it_says_so(hub, client, folder, token, reason):
    assert reason in client.refused(folder, token=token)
    assert 'owner/model' not in hub.repos
    hub.add_repo('owner/model', {'README.md': b'mine'})
    assert reason in client.refused(folder, token=token)
    assert hub.files('owner/model')['README.md'] == b'mine'


# When the line is bad
def test_a_push_to_no_hub_says_so(hub, client, folder):
    hub.stop()
    line = client.refused(folder)
    assert 'owner/model' in line and 'refused' in line


@pytest.mark.parametrize('files', [None, {}, {'README.md': b'mine'}], ids=['new', 'empty', 'used'])
@pytest.mark.parametrize('faults, reason', [
    ([('POST /api/repos/create', 500)], '500'),
    ([('PUT /lfs', 'cut', 1), ('PUT /lfs', 403)], '403'),  # a cut alone is tried again for 23 seconds
    ([('POST .*/commit/', 'cut')], 'disconnected'),
    ([('POST .*/commit/', 403)], '403'),
], ids=['down', 'upload cut', 'commit cut', 'commit refused'])
def test_a_push_broken_off_leaves_all_as_it_was_and_can_be_repeated(hub, client, folder, faults, reason, files):
    if files is not None:
        hub.add_repo('owner/model', files)
    before = {name: hub.files(name) for name in hub.repos}
    for fault in faults:
        hub.fail(*fault)
    line = client.refused(folder)
    assert 'owner/model' in line and reason in line and 'unchanged, unless the upload was already complete' in line
    assert {name: hub.files(name) for name in hub.repos} == before
    assert files is None or not [request for request in hub.requests if request.startswith('DELETE')]
    hub.faults.clear()
    client.push(folder)
    assert len(hub.repos['owner/model'].pushes) == 1


def test_a_repository_that_cannot_be_deleted_again_is_named(hub, client, folder):
    hub.fail('POST .*/commit/', 403)
    hub.fail('DELETE', 403)
    line = client.refused(folder)
    assert 'was created and may be empty' in line and 'unchanged' not in line
    assert hub.repos['owner/model'].pushes == []


@pytest.mark.parametrize('created', [True, False])
def test_an_interrupted_push_leaves_what_was_there_before(hub, client, folder, created):
    if not created:
        hub.add_repo('owner/model', {'README.md': b'mine'})
    code, out, err = client.run(f"""
from huggingface_hub import HfApi
upload, HfApi.upload_folder = HfApi.upload_folder, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
result = push('{folder}', 'owner/model')
HfApi.upload_folder = upload""", folder, OWNER)
    told = 'error: interrupted; the repository is unchanged, unless the upload was already complete\n'
    assert code == 2 and err.endswith(told)
    assert hub.repos == {} if created else hub.files('owner/model')['README.md'] == b'mine'


def test_a_push_whose_answer_is_lost_is_kept_and_not_pushed_twice(hub, client, folder):
    hub.fail('POST .*/commit/', 'lost', times=1)
    assert 'unless the upload was already complete' in client.refused(folder)
    assert len(hub.repos['owner/model'].pushes) == 1
    client.push(folder)
    assert len(hub.repos['owner/model'].pushes) == 1
