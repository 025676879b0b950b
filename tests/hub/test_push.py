"""Push to the Hub and pull from it: huggingface_hub and timm, unmodified, against a server on loopback (hub_server.py).

huggingface_hub reads its settings when it is imported, so clients are processes of their own: one that imports timm,
never timm_ela, and pulls; one that runs our command; each with a cache folder per test.
"""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import OTHER, OWNER, READER, Hub
from timm.models import save_for_hf

MODEL, PLAIN = 'mobilenetv2_050_ela_t', 'mobilenetv2_050'  # the smallest
CLASSES, DATA = 7, {'input_size': [3, 96, 128], 'mean': [0.1, 0.2, 0.3], 'std': [0.4, 0.5, 0.6]}
CONFIG = {'architecture': MODEL, 'num_classes': CLASSES, **DATA}
CLIENT = '''
import contextlib, io, json, os, signal, sys
import timm, torch
from safetensors.torch import load_file

def pull(name, **kwargs):
    return timm.create_model(name, pretrained=True, cache_dir=cache, **kwargs).eval()

def command(*args):
    from timm_ela.cli import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(args) or 0
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()

replies, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    code, cache, os.environ['HF_TOKEN'] = json.loads(line)
    signal.alarm(300)  # no test waits for ever
    try:
        exec(code)
        reply = {'result': result}
    except Exception as error:
        reply = {'error': f'{type(error).__name__}: {error}'}
    signal.alarm(0)
    print(json.dumps(reply), file=replies, flush=True)
'''


def environment(url: str, home: Path, **extra: str) -> dict[str, str]:
    """The environment of a client: this Hub, an empty cache, no setting of the machine's own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'HUGGING', 'XET_'))}
    return {**kept, 'NO_PROXY': '127.0.0.1', 'OMP_NUM_THREADS': '1', 'HF_ENDPOINT': url, 'HF_HOME': str(home),
            'HF_HUB_DISABLE_XET': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', **extra}


class Client(subprocess.Popen):
    """A process that has imported timm and runs one piece of code after another; it leaves its answer in `result`."""

    def __init__(self, url: str, home: Path, **extra: str):
        pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
        super().__init__([sys.executable, '-c', CLIENT], env=environment(url, home, **extra), **pipes)

    def run(self, code: str, cache: Path, token: str = '', wanted: str = 'result'):
        self.stdin.write(json.dumps((code, str(cache), token)) + '\n')
        self.stdin.flush()
        reply = json.loads(self.stdout.readline())
        assert wanted in reply, reply
        return reply[wanted]

    def error(self, code: str, cache: Path, token: str = '') -> str:
        """The exception that the code must end with."""
        return self.run(code, cache, token, 'error')

    def push(self, folder: Path, *args: str, token: str = OWNER) -> subprocess.CompletedProcess:
        """Runs `timm_ela push FOLDER owner/model` in this process."""
        code = f"result = command('push', '{folder}', 'owner/model', *{args})"
        return subprocess.CompletedProcess(args, *self.run(code, folder, token))


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


@pytest.fixture(scope='module')
def pusher(port, tmp_path_factory):
    with Client(f'http://127.0.0.1:{port}', tmp_path_factory.mktemp('pusher')) as client:
        yield client


@pytest.fixture
def hub(port, tmp_path):
    with Hub(tmp_path / 'hub', port) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path, randomize) -> Path:
    """A folder of three files to push: random weights for 7 classes, non-square input, mean and std; and a pickle."""
    model = randomize(timm.create_model(MODEL, num_classes=CLASSES))
    save_for_hf(model, tmp_path / 'folder', data_config=DATA, safe_serialization='both')
    (tmp_path / 'folder' / 'README.md').write_text('---\nlibrary_name: timm\n---\n# A model\n')
    return tmp_path / 'folder'


@pytest.fixture
def published(hub, folder) -> Path:
    """The same folder, with a repository that holds it."""
    hub.add_repo('owner/model', {name: folder / name for name in ('config.json', 'model.safetensors')})
    return folder


@pytest.fixture
def plain_weights(tmp_path, randomize):
    """Writes random weights of a plain timm model, as timm's own repositories hold them."""
    def write(name: str) -> dict[str, Path]:
        save_for_hf(randomize(timm.create_model(name)), tmp_path / name, safe_serialization=True)
        return {'model.safetensors': tmp_path / name / 'model.safetensors'}
    return write


def pulls_equal(folder: Path) -> str:
    """Code: whether the Hub gives what the folder holds, down to the last bit of the logits, with the data settings."""
    return f'''
model, pulled = timm.create_model('{MODEL}', num_classes={CLASSES}).eval(), pull('hf-hub:owner/model')
model.load_state_dict(load_file('{folder}/model.safetensors'))
x, (a, b) = torch.randn(2, 3, 96, 128), (model.state_dict(), pulled.state_dict())
cfg = json.loads(json.dumps(pulled.pretrained_cfg))
assert {{k: cfg[k] for k in {CONFIG}}} == {CONFIG}, cfg
result = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and torch.equal(model(x), pulled(x))'''


def error_line(run: subprocess.CompletedProcess) -> str:
    """The one line that a failed push says, below what the client reports of its progress and retries."""
    assert run.returncode == 2, run.stderr
    assert 'Traceback' not in run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith('timm-ela push: error: ')]
    assert len(lines) == 1, run.stderr
    return lines[0]


# Push and pull
def test_timm_knows_the_models_without_an_import(client, tmp_path):
    assert client.run("result = [timm.is_model('resnet18_ela_b'), 'timm_ela.cli' in sys.modules]", tmp_path) == [
        True, False]


def test_what_is_pushed_is_what_is_pulled(hub, client, pusher, folder, tmp_path):
    run = pusher.push(folder)
    assert run.returncode == 0, run.stderr
    assert f'{hub.url}/owner/model' in run.stdout
    assert client.run(pulls_equal(folder), tmp_path)


def test_a_run_of_training_is_pushed_as_it_is(hub, client, pusher, folder, tmp_path):
    weights = torch.load(folder / 'pytorch_model.bin')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'args.yaml').write_text(yaml.safe_dump({'model': MODEL, 'num_classes': CLASSES, **DATA}))
    (tmp_path / 'run' / 'summary.csv').write_text('epoch,eval_top1,eval_top5\n0,12.5,50.0\n1,62.5,99.0\n')
    torch.save({'epoch': 1, 'arch': MODEL, 'state_dict': weights}, tmp_path / 'run' / 'model_best.pth.tar')
    run = pusher.push(tmp_path / 'run')
    assert run.returncode == 0, run.stderr
    assert client.run(pulls_equal(folder), tmp_path)
    assert set(hub.files('owner/model')) == {
        '.gitattributes', 'README.md', 'args.yaml', 'config.json', 'model.safetensors'}
    assert b'62.5' in hub.files('owner/model')['README.md']


def test_args_beside_a_model_are_published_without_what_is_local(hub, pusher, folder):
    args = {'model': MODEL, 'data_dir': '/home/me', 'class_map': '/my/a.txt'}
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    assert pusher.push(folder).returncode == 0
    assert yaml.safe_load(hub.files('owner/model')['args.yaml']) == {'model': MODEL, 'class_map': 'a.txt'}


def test_a_folder_that_timm_grafts_as_it_loads_is_pushed(hub, pusher, folder):
    save_for_hf(timm.create_model(PLAIN), folder, safe_serialization=True)
    config = folder / 'config.json'
    config.write_text(config.read_text().replace(PLAIN, MODEL))
    assert pusher.push(folder).returncode == 0


def test_a_push_is_one_commit_without_pickles(hub, pusher, folder):
    assert (folder / 'pytorch_model.bin').exists()
    assert pusher.push(folder).returncode == 0
    assert len(hub.pushes('owner/model')) == 1
    assert set(hub.files('owner/model')) == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}
    assert hub.files('owner/model')['model.safetensors'] == (folder / 'model.safetensors').read_bytes()


@pytest.mark.parametrize('private', [False, True])
def test_without_private_a_new_repository_is_as_its_owner_has_set(hub, pusher, folder, private):
    hub.private_by_default = private
    assert pusher.push(folder).returncode == 0
    assert hub.repos['owner/model'].private == private


# Who may do what
def test_a_private_repository_is_its_owners(hub, client, pusher, folder, tmp_path):
    assert pusher.push(folder, '--private').returncode == 0
    assert hub.repos['owner/model'].private
    for token in ('', OTHER):
        assert 'RepositoryNotFoundError' in client.error(pulls_equal(folder), tmp_path, token)
    assert client.run(pulls_equal(folder), tmp_path, OWNER)


def test_a_public_repository_is_not_taken_for_private(hub, pusher, folder):
    hub.add_repo('owner/model', {})
    assert 'public' in error_line(pusher.push(folder, '--private'))
    assert hub.pushes('owner/model') == []


def test_a_missing_repository_is_named(hub, client, tmp_path):
    error = client.error("pull('hf-hub:owner/nothing')", tmp_path, OWNER)
    assert 'RepositoryNotFoundError' in error and 'owner/nothing' in error


@pytest.mark.parametrize('token, reason', [
    ('', 'HF_TOKEN'), ('hf_wrong', 'Invalid credentials'), (READER, 'rights'), (OTHER, 'rights')])
def test_a_push_without_the_right_to_it_says_so(hub, pusher, folder, token, reason):
    assert reason in error_line(pusher.push(folder, token=token))
    assert 'owner/model' not in hub.repos
    hub.add_repo('owner/model', {'README.md': b'mine'})
    assert reason in error_line(pusher.push(folder, token=token))
    assert hub.files('owner/model')['README.md'] == b'mine'


def test_the_command_ends_with_code_2_and_one_line_or_a_traceback(hub, folder):
    command = [sys.executable, '-m', 'timm_ela', 'push', folder, 'owner/model']
    env = environment(hub.url, folder / 'home', HF_TOKEN=OTHER)
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.stderr.strip() == error_line(run) and run.stdout == ''
    run = subprocess.run([*command, '--debug'], env=env, capture_output=True, text=True)
    assert run.returncode != 0 and 'Traceback' in run.stderr and 'HfHubHTTPError' in run.stderr


# When the line is bad
def test_a_truncated_download_is_an_error(hub, client, published, tmp_path):
    hub.fail('GET .*model.safetensors', 'short')
    assert 'Consistency check failed' in client.error(pulls_equal(published), tmp_path)


def test_a_download_goes_on_where_it_was_cut(hub, client, published, tmp_path):
    hub.fail('GET .*model.safetensors', 'cut', times=1)
    assert client.run(pulls_equal(published), tmp_path)
    assert sum('GET' in r and 'model.safetensors' in r for r in hub.requests) == 2


def test_a_warm_cache_needs_no_hub(hub, client, published, tmp_path):
    assert client.run(pulls_equal(published), tmp_path)
    hub.stop()  # connections are refused
    assert client.run(pulls_equal(published), tmp_path)


def test_offline_means_not_one_request(hub, client, plain_weights, tmp_path):
    hub.add_repo(f'timm/{PLAIN}.lamb_in1k', plain_weights(PLAIN))
    code = f"result = pull('{MODEL}').conv_stem.weight.sum().item()"
    pulled, seen = client.run(code, tmp_path), len(hub.requests)
    with Client(hub.url, tmp_path / 'home', HF_HUB_OFFLINE='1') as offline:
        assert offline.run(code, tmp_path) == pulled
        assert 'LocalEntryNotFoundError' in offline.error(code, tmp_path / 'cold')
    assert seen and len(hub.requests) == seen


def test_a_push_to_no_hub_says_so(hub, pusher, folder):
    hub.stop()
    line = error_line(pusher.push(folder))
    assert 'owner/model' in line and 'refused' in line


FAULTS = pytest.mark.parametrize('faults, reason', [
    ([('POST /api/repos/create', 500)], '500'),
    ([('PUT /lfs', 'cut', 1), ('PUT /lfs', 403)], '403'),  # a cut alone is tried again for 23 seconds
    ([('POST .*/commit/', 'cut')], 'disconnected'),
    ([('POST .*/commit/', 403)], '403'),
], ids=['down', 'upload cut', 'commit cut', 'commit refused'])


@FAULTS
def test_a_push_broken_off_leaves_no_repository_and_can_be_repeated(hub, pusher, folder, faults, reason):
    for fault in faults:
        hub.fail(*fault)
    line = error_line(pusher.push(folder))
    assert 'owner/model' in line and reason in line and 'as it was before, or complete' in line
    assert hub.repos == {}
    hub.faults.clear()
    assert pusher.push(folder).returncode == 0
    assert len(hub.pushes('owner/model')) == 1


@FAULTS
@pytest.mark.parametrize('files', [{}, {'README.md': b'mine'}], ids=['empty', 'used'])
def test_a_push_broken_off_leaves_a_repository_that_existed_as_it_was(hub, pusher, folder, faults, reason, files):
    hub.add_repo('owner/model', files)
    before = hub.files('owner/model')
    for fault in faults:
        hub.fail(*fault)
    assert reason in error_line(pusher.push(folder))
    assert hub.files('owner/model') == before
    assert not [request for request in hub.requests if request.startswith('DELETE')]


def test_a_repository_that_cannot_be_deleted_again_is_named(hub, pusher, folder):
    hub.fail('POST .*/commit/', 403)
    hub.fail('DELETE', 403)
    line = error_line(pusher.push(folder))
    assert 'was created and may be empty' in line and 'as it was before' not in line
    assert hub.pushes('owner/model') == [] and 'owner/model' in hub.repos


@pytest.mark.parametrize('created', [True, False])
def test_an_interrupted_push_leaves_what_was_there_before(hub, pusher, folder, created):
    if not created:
        hub.add_repo('owner/model', {'README.md': b'mine'})
    code, out, err = pusher.run(f"""
from huggingface_hub import HfApi
upload, HfApi.upload_folder = HfApi.upload_folder, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
result = command('push', '{folder}', 'owner/model')
HfApi.upload_folder = upload""", folder, OWNER)
    assert code == 2 and err.endswith('error: interrupted; the repository is as it was before, or complete\n')
    assert hub.repos == {} if created else hub.files('owner/model')['README.md'] == b'mine'


def test_a_push_whose_answer_is_lost_is_kept_and_not_pushed_twice(hub, pusher, folder):
    hub.fail('POST .*/commit/', 'lost', times=1)
    assert 'or complete' in error_line(pusher.push(folder))
    assert len(hub.pushes('owner/model')) == 1
    assert pusher.push(folder).returncode == 0
    assert len(hub.pushes('owner/model')) == 1


# Grafted weights
@pytest.mark.parametrize('plain, ela, tag', [('resnet18', 'resnet18_ela_b', 'a1_in1k'), (PLAIN, MODEL, 'lamb_in1k')])
def test_timms_weights_graft_onto_the_same_function(hub, client, plain_weights, tmp_path, plain, ela, tag):
    hub.add_repo(f'timm/{plain}.{tag}', plain_weights(plain))
    assert client.run(f'''
exact = {plain == 'resnet18'}
def same(got, want):  # rounding grows to 5e-5 in sixteen blocks of random weights and statistics
    return torch.equal(got, want) if exact else bool((got - want).abs().max() <= 1e-4 * want.abs().max())

x, gray = torch.randn(2, 3, 96, 128), torch.randn(2, 1, 96, 128)
plain, ela, tagged = pull('{plain}'), pull('{ela}'), pull('{ela}.graft_{tag}')
result = {{'logits': same(ela(x), plain(x)), 'tag': torch.equal(tagged(x), ela(x))}}
plain, ela = pull('{plain}', num_classes=7), pull('{ela}', num_classes=7)
result['num_classes'] = same(ela.forward_features(x), plain.forward_features(x)) and ela(x).shape == (2, 7)
result['in_chans'] = same(pull('{ela}', in_chans=1)(gray), pull('{plain}', in_chans=1)(gray))
features = pull('{ela}', features_only=True)(x), pull('{plain}', features_only=True)(x)
result['features_only'] = len(features[0]) == 5 and all(map(same, *features))
''', tmp_path) == dict.fromkeys(('logits', 'tag', 'num_classes', 'in_chans', 'features_only'), True)
    assert not [request for request in hub.requests if f'/timm/{plain}.{tag}/' not in request]


# Xet
def test_push_and_pull_by_xet(folder, tmp_path):
    """Large files as users send them: Xet, here into a store on disk that the server names by `local://`."""
    xet = {'HF_HUB_DISABLE_XET': '0', 'HF_XET_CACHE': str(tmp_path / 'xet')}
    with Hub(tmp_path / 'hub', xet=True) as hub:
        hub.add_repo('owner/probe', {})
        probe = 'from huggingface_hub import HfApi;' \
                'HfApi().upload_file(path_or_fileobj=b"1" * 999, path_in_repo="probe.bin", repo_id="owner/probe")'
        env = environment(hub.url, tmp_path / 'home', HF_TOKEN=OWNER, **xet)
        tried = subprocess.run([sys.executable, '-c', probe], env=env, capture_output=True, text=True)
        if tried.returncode:
            pytest.skip(f'hf_xet takes no local:// store: {tried.stderr.strip().splitlines()[-1]}')
        with Client(hub.url, tmp_path / 'home', **xet) as client:
            run = client.push(folder)
            assert run.returncode == 0, run.stderr
            assert client.run(pulls_equal(folder), tmp_path)
        assert not [request for request in hub.requests if '/lfs/' in request]
        assert [request for request in hub.requests if 'xet-read-token' in request]
