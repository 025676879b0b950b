"""A small Hugging Face Hub on 127.0.0.1, so that the tests push and pull with the real, unmodified clients.

It answers what huggingface_hub (0.34 to 2.4) asks in a push and a pull of a model: create, preupload, LFS, commit,
resolve, model info and tree, with the Hub's own error headers. It shows that the client side works; the real Hub's
rights, quotas and metadata rules it does not show.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = 'hf_owner'  # who has it may write
LARGE = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt')  # what the Hub's default .gitattributes sends to LFS
ROUTES = []


class Refusal(Exception):
    """An HTTP error; `code` is what huggingface_hub makes its own exceptions of (X-Error-Code)."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        self.status, self.body = status, {'error': message, **body}
        self.headers = {'X-Error-Message': message} | ({'X-Error-Code': code} if code else {})


@dataclass
class Repo:
    private: bool
    files: dict[str, Path]  # of `main`: where their contents are, under their sha256; earlier commits are not kept
    commits: int = 0  # that clients made

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.files, self.commits)).encode()).hexdigest()


class Hub:
    """The server and its repositories, whose files lie in the folder `root`; a context manager."""

    def __init__(self, root: Path):
        self.root = root
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # 'METHOD /path', in order
        self.faults: dict[str, int] = {}  # what is found in 'METHOD /path', as a regular expression -> status
        self.private_by_default = False  # what an organization may set
        root.mkdir(exist_ok=True)

    def __enter__(self) -> 'Hub':
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Request, self))
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=partial(self.server.serve_forever, poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()  # from here on connections are refused

    def add_repo(self, name: str, files: dict[str, Path | bytes], private: bool = False):
        """Puts a repository there as if it had been pushed."""
        files = {'.gitattributes': b'*.safetensors filter=lfs\n', **files}
        self.repos[name] = Repo(private, {
            path: self.store(data if isinstance(data, bytes) else Path(data).read_bytes())
            for path, data in files.items()})

    def files(self, name: str) -> dict[str, bytes]:
        return {path: file.read_bytes() for path, file in self.repos[name].files.items()}

    def store(self, data: bytes) -> Path:
        file = self.root / hashlib.sha256(data).hexdigest()
        file.write_bytes(data)
        return file


def route(methods: str, pattern: str):
    """Registers what answers requests to a path; named groups are its arguments."""
    pattern = pattern.replace('{repo}', r'(?P<repo>[\w.-]+/[\w.-]+)')
    return lambda function: ROUTES.append((methods.split(), re.compile(pattern), function)) or function


class Request(BaseHTTPRequestHandler):
    """One request; a connection serves no second one, so none outlives the server."""

    def __init__(self, hub: Hub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(self.path.partition('?')[0])
        self.hub.requests.append(f'{self.command} {path}')
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        try:
            for fault, status in self.hub.faults.items():
                if re.search(fault, self.hub.requests[-1]):
                    raise Refusal(status, 'Out of order.')
            for methods, pattern, function in ROUTES:
                if self.command in methods and (match := pattern.fullmatch(path)):
                    if 'repo' in match.groupdict() and match['repo'] not in self.hub.repos:
                        raise Refusal(404, 'Repository not found', 'RepoNotFound')
                    return function(self, **match.groupdict())
            raise Refusal(404, f'No such route: {path}')
        except Refusal as refusal:
            self.answer(refusal.body, refusal.headers, refusal.status)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, body: bytes | dict | list = b'', headers: dict[str, str] | None = None, status: int = 200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def check_writable(self):
        if self.headers.get('Authorization') != f'Bearer {TOKEN}':
            raise Refusal(401, 'Invalid username or password.')

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self):
        self.answer({'errors': [], 'warnings': []})

    @route('POST', '/api/repos/create')
    def create(self):
        self.check_writable()
        wanted = json.loads(self.body)
        repo = f'{wanted["organization"]}/{wanted["name"]}'
        if repo in self.hub.repos:
            raise Refusal(409, 'You already created this model repo', url=f'{self.hub.url}/{repo}')
        asked = wanted.get('private', {'private': True, 'public': False}.get(wanted.get('visibility')))
        self.hub.add_repo(repo, {}, private=self.hub.private_by_default if asked is None else asked)
        self.answer({'url': f'{self.hub.url}/{repo}'})

    @route('POST', '/api/models/{repo}/preupload/[^/]+')
    def preupload(self, repo: str):
        self.check_writable()
        self.answer({'files': [
            {'path': path, 'uploadMode': 'lfs' if path.endswith(LARGE) else 'regular', 'shouldIgnore': False}
            for path in (file['path'] for file in json.loads(self.body)['files'])]})

    @route('POST', '/{repo}.git/info/lfs/objects/batch')
    def lfs_batch(self, repo: str):
        self.check_writable()
        objects = json.loads(self.body)['objects']
        for item in objects:
            if not (self.hub.root / item['oid']).exists():
                item['actions'] = {'upload': {'href': f'{self.hub.url}/lfs/{item["oid"]}'}}
        self.answer({'transfer': 'basic', 'objects': objects})

    @route('PUT', '/lfs/(?P<oid>[0-9a-f]{64})')
    def lfs_put(self, oid: str):  # like a signed URL of the real one, it asks for no token
        if self.hub.store(self.body).name != oid:
            raise Refusal(400, 'The content does not match its sha256')
        self.answer()

    @route('POST', '/api/models/{repo}/commit/[^/]+')
    def commit(self, repo: str):
        self.check_writable()
        there = self.hub.repos[repo]
        files = dict(there.files)
        for key, value in ((line['key'], line['value']) for line in map(json.loads, self.body.splitlines())):
            if key == 'file':
                files[value['path']] = self.hub.store(base64.b64decode(value['content']))
            elif key == 'lfsFile':
                files[value['path']] = file = self.hub.root / value['oid']
                if not file.exists():
                    raise Refusal(400, f'{value["path"]} was never uploaded')
            elif key == 'deletedFile':
                del files[value['path']]
        there.files = files  # all changes or none
        there.commits += 1
        self.answer({
            'success': True, 'commitOid': there.sha, 'commitUrl': f'{self.hub.url}/{repo}/commit/{there.sha}'})

    @route('HEAD GET', '/{repo}/resolve/[^/]+/(?P<path>.+)')
    def download(self, repo: str, path: str):
        file = self.hub.repos[repo].files.get(path)
        if file is None:
            raise Refusal(404, 'Entry not found', 'EntryNotFound')
        self.answer(file.read_bytes(), {'X-Repo-Commit': self.hub.repos[repo].sha, 'ETag': f'"{file.name}"'})

    @route('GET', '/api/models/{repo}(?:/revision/[^/]+)?')
    def model_info(self, repo: str):
        there = self.hub.repos[repo]
        self.answer({'id': repo, 'sha': there.sha, 'private': there.private, 'tags': [],
                     'siblings': [{'rfilename': path} for path in there.files]})

    @route('GET', '/api/models/{repo}/tree/[^/]+')
    def tree(self, repo: str):
        self.answer([
            {'type': 'file', 'path': path, 'size': file.stat().st_size, 'oid': file.name}
            for path, file in self.hub.repos[repo].files.items()])
