"""A small Hugging Face Hub on 127.0.0.1, so that the tests push and pull with the real, unmodified clients.

It answers what huggingface_hub (1.33 and 2.4) asks in a push and a pull of a model: create, delete, preupload, LFS,
commit, resolve, model info and tree, with tokens, private repositories and the Hub's own error headers. It shows that
the client side works; the real Hub's quotas and metadata rules it does not show.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

OWNER, READER, OTHER = 'hf_owner', 'hf_reader', 'hf_other'  # the tokens
USERS = {OWNER: ('owner', True), READER: ('owner', False), OTHER: ('other', True)}  # token -> (namespace, may write)
LARGE = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt')  # what the Hub's default .gitattributes sends to LFS
ROUTES = []


class Refusal(Exception):
    """An HTTP error; `code` is what huggingface_hub makes its own exceptions of (X-Error-Code)."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        self.status, self.body = status, {'error': message, **body}
        self.headers = {'X-Error-Message': message} | ({'X-Error-Code': code} if code else {})


@dataclass
class File:
    path: Path
    etag: str  # of a large file its sha256, else the name that git gives it


@dataclass
class Repo:
    private: bool
    files: dict[str, File]  # of `main`; earlier commits are not kept
    pushes: list[str] = field(default_factory=list)  # titles of the commits that clients made, oldest first

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.files, self.pushes)).encode()).hexdigest()


class Hub:
    """The server and its repositories; a context manager.

    Args:
        root: Folder for the contents of files.
        port: Where to listen; 0 takes a free one.
    """

    def __init__(self, root: Path, port: int = 0):
        self.root, self.port = root, port
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # 'METHOD /path', in order
        self.faults: list[dict] = []
        self.private_by_default = False  # what an organization may set
        root.mkdir(exist_ok=True)

    def __enter__(self) -> 'Hub':
        self.server = ThreadingHTTPServer(('127.0.0.1', self.port), partial(Request, self))
        self.url = f'http://127.0.0.1:{self.server.server_port}'
        threading.Thread(target=partial(self.server.serve_forever, poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()  # from here on connections are refused

    def fail(self, route: str, how: int | str, times: float = float('inf')):
        """Makes requests go wrong, `times` times; `faults.clear()` makes all well again.

        Args:
            route: A regular expression, searched in 'METHOD /path'.
            how: A status to answer with; 'cut' breaks the connection halfway through the request's body; 'lost' does
                what was asked, then breaks the connection in place of an answer.
        """
        self.faults.append({'route': route, 'how': how, 'times': times})

    def fault(self, request: str) -> int | str | None:
        for fault in self.faults:
            if fault['times'] > 0 and re.search(fault['route'], request):
                fault['times'] -= 1
                return fault['how']
        return None

    def add_repo(self, name: str, files: dict[str, Path | bytes], private: bool = False):
        """Puts a repository there as if it had been pushed."""
        files = {'.gitattributes': b'*.safetensors filter=lfs\n', **files}
        self.repos[name] = Repo(private, {
            path: self.store(data if isinstance(data, bytes) else Path(data).read_bytes(), path.endswith(LARGE))
            for path, data in files.items()})

    def files(self, name: str) -> dict[str, bytes]:
        return {path: file.path.read_bytes() for path, file in self.repos[name].files.items()}

    def store(self, data: bytes, large: bool) -> File:
        sha256 = hashlib.sha256(data).hexdigest()
        (self.root / sha256).write_bytes(data)
        etag = sha256 if large else hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()
        return File(self.root / sha256, etag)


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
        path, length = unquote(self.path.partition('?')[0]), int(self.headers.get('Content-Length', 0))
        self.hub.requests.append(f'{self.command} {path}')
        self.fault = self.hub.fault(self.hub.requests[-1])
        if length and self.fault == 'cut':
            self.rfile.read(length // 2)
            return
        self.body = self.rfile.read(length)
        try:
            if isinstance(self.fault, int):
                raise Refusal(self.fault, 'Out of order.')
            token = self.headers.get('Authorization', '').removeprefix('Bearer ')
            if token and token not in USERS:
                raise Refusal(401, 'Invalid credentials in Authorization header')
            self.user, self.may_write = USERS.get(token, (None, False))
            for methods, pattern, function in ROUTES:
                if self.command in methods and (match := pattern.fullmatch(path)):
                    if 'repo' in match.groupdict():
                        self.check_readable(match['repo'])
                    return function(self, **match.groupdict())
            raise Refusal(404, f'No such route: {path}')
        except Refusal as refusal:
            self.answer(refusal.body, refusal.headers, refusal.status)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self, body: bytes | dict | list = b'', headers: dict[str, str] | None = None, status: int = 200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self.fault == 'lost':
            return
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def check_readable(self, repo: str):
        if repo not in self.hub.repos or self.hub.repos[repo].private and self.user != repo.split('/')[0]:
            # the client makes RepositoryNotFoundError of a 401 by itself only under https, so the code is needed here
            raise Refusal(404 if self.user else 401, 'Repository not found', 'RepoNotFound')

    def check_writable(self, repo: str):
        if self.user is None:
            raise Refusal(401, 'Invalid username or password.')
        if self.user != repo.split('/')[0] or not self.may_write:
            raise Refusal(403, f'You do not have the rights to write to {repo}')

    def named_repo(self, wanted: dict) -> str:
        return f'{wanted.get("organization") or self.user}/{wanted["name"]}'

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self):
        self.answer({'errors': [], 'warnings': []})

    @route('POST', '/api/repos/create')
    def create(self):
        wanted = json.loads(self.body)
        repo = self.named_repo(wanted)
        self.check_writable(repo)
        if repo in self.hub.repos:
            raise Refusal(409, 'You already created this model repo', url=f'{self.hub.url}/{repo}')
        asked = wanted.get('private', {'private': True, 'public': False}.get(wanted.get('visibility')))
        self.hub.add_repo(repo, {}, private=self.hub.private_by_default if asked is None else asked)
        self.answer({'url': f'{self.hub.url}/{repo}'})

    @route('DELETE', '/api/repos/delete')
    def delete(self):
        repo = self.named_repo(json.loads(self.body))
        self.check_readable(repo)
        self.check_writable(repo)
        del self.hub.repos[repo]
        self.answer()

    @route('POST', '/api/models/{repo}/preupload/[^/]+')
    def preupload(self, repo: str):
        self.check_writable(repo)
        there = self.hub.repos[repo].files
        self.answer({'files': [
            {'path': path, 'uploadMode': 'lfs' if path.endswith(LARGE) else 'regular', 'shouldIgnore': False,
             'oid': there[path].etag if path in there else None}
            for path in (file['path'] for file in json.loads(self.body)['files'])]})

    @route('POST', '/{repo}.git/info/lfs/objects/batch')
    def lfs_batch(self, repo: str):
        self.check_writable(repo)
        objects = json.loads(self.body)['objects']
        for item in objects:
            if not (self.hub.root / item['oid']).exists():
                item['actions'] = {'upload': {'href': f'{self.hub.url}/lfs/{item["oid"]}'}}
        self.answer({'transfer': 'basic', 'objects': objects})

    @route('PUT', '/lfs/(?P<oid>[0-9a-f]{64})')
    def lfs_put(self, oid: str):  # like a signed URL of the real one, it asks for no token
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, 'The content does not match its sha256')
        self.hub.store(self.body, large=True)
        self.answer()

    @route('POST', '/api/models/{repo}/commit/[^/]+')
    def commit(self, repo: str):
        self.check_writable(repo)
        title, changes = '', {}
        for key, value in ((line['key'], line['value']) for line in map(json.loads, self.body.splitlines())):
            if key == 'header':
                title = value['summary']
            elif key == 'file':
                changes[value['path']] = self.hub.store(base64.b64decode(value['content']), large=False)
            elif key == 'lfsFile':
                changes[value['path']] = file = File(self.hub.root / value['oid'], value['oid'])
                if not file.path.exists():
                    raise Refusal(400, f'{value["path"]} was never uploaded')
        self.hub.repos[repo].files |= changes  # all of them or none
        self.hub.repos[repo].pushes.append(title)
        sha = self.hub.repos[repo].sha
        self.answer({'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.url}/{repo}/commit/{sha}'})

    @route('HEAD GET', '/{repo}/resolve/[^/]+/(?P<path>.+)')
    def download(self, repo: str, path: str):
        file = self.hub.repos[repo].files.get(path)
        if file is None:
            raise Refusal(404, 'Entry not found', 'EntryNotFound')
        self.answer(file.path.read_bytes(), {'X-Repo-Commit': self.hub.repos[repo].sha, 'ETag': f'"{file.etag}"'})

    @route('GET', '/api/models/{repo}(?:/revision/[^/]+)?')
    def model_info(self, repo: str):
        there = self.hub.repos[repo]
        self.answer({'id': repo, 'sha': there.sha, 'private': there.private, 'tags': [],
                     'siblings': [{'rfilename': path} for path in there.files]})

    @route('GET', '/api/models/{repo}/tree/[^/]+')
    def tree(self, repo: str):
        self.answer([
            {'type': 'file', 'path': path, 'size': file.path.stat().st_size, 'oid': file.etag}
            for path, file in self.hub.repos[repo].files.items()])
