"""A small Hugging Face Hub on 127.0.0.1, so that the tests push and pull with the real, unmodified clients.

It answers what huggingface_hub (1.33 and 2.4) asks in a push and a pull of a model: create, preupload, LFS, commit,
resolve, model info and tree, with tokens, private repositories and the Hub's own error headers. Repositories lie on
disk as in git: `<owner>/<name>/repo.json` holds the list of commits, a folder per commit the files, and a large file is
there as its LFS pointer. It shows that the client side works; the real Hub's quotas and metadata rules it does not show.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

OWNER, READER, OTHER = 'hf_owner', 'hf_reader', 'hf_other'  # the tokens
USERS = {OWNER: ('owner', True), READER: ('owner', False), OTHER: ('other', True)}  # token -> (namespace, may write)
LARGE = ('.safetensors', '.bin', '.pt', '.pth', '.ckpt')  # what the Hub's default .gitattributes sends to LFS
POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n'
ROUTES = []


class Refusal(Exception):
    """An HTTP error; `code` is what huggingface_hub makes its own exceptions of (X-Error-Code)."""

    def __init__(self, status: int, message: str, code: str | None = None, **body):
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass
class Fault:
    """What goes wrong where `route`, a regular expression, is found in 'METHOD /path': see Hub.fail."""
    route: str
    how: int | str
    times: float


@dataclass
class File:
    """A file of a commit: the bytes on disk, and their name and size for the client."""
    path: Path
    etag: str
    size: int
    large: bool


class Hub:
    """The server and its repositories; a context manager.

    Args:
        root: Folder for the repositories and the large files.
        xet: Take large files by Xet, into a store under root that client and server share (`local://`).
    """

    def __init__(self, root: Path, xet: bool = False):
        self.root, self.xet = Path(root), xet
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # 'METHOD /path', in order
        self.lock, self.port = threading.Lock(), 0
        (self.root / 'lfs').mkdir(parents=True, exist_ok=True)
        (self.root / 'xet').mkdir(exist_ok=True)

    def __enter__(self) -> 'Hub':
        self.server = ThreadingHTTPServer(('127.0.0.1', self.port), partial(Request, self))
        self.port = self.server.server_port  # entered again, it comes back where it was
        self.url = f'http://127.0.0.1:{self.port}'
        threading.Thread(target=partial(self.server.serve_forever, poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()  # from here on connections are refused

    def fail(self, route: str, how: int | str, times: float = float('inf')):
        """Makes matching requests go wrong, `times` times; `faults.clear()` makes all well again.

        Args:
            route: A regular expression, searched in 'METHOD /path'.
            how: A status to answer with; 'cut' breaks the connection halfway through the request's body, or through the
                answer's; 'short' answers with half the body and an honest length; 'lost' does what was asked, then
                breaks the connection in place of an answer.
            times: How often.
        """
        self.faults.append(Fault(route, how, times))

    def add_repo(self, repo: str, files: dict[str, Path | bytes], private: bool = False):
        """Puts a repository on disk as if it had been pushed."""
        content = {name: data if isinstance(data, bytes) else Path(data).read_bytes() for name, data in files.items()}
        self.create(repo, private)
        self.commit(repo, 'Add model', {name: self.store(data) if name.endswith(LARGE) else data
                                        for name, data in content.items()})

    def files(self, repo: str, revision: str = 'main') -> dict[str, File]:
        """The files of one commit, by name."""
        snapshot = self.root / repo / self.resolve(repo, revision)
        return {path.relative_to(snapshot).as_posix(): self.file(path)
                for path in sorted(snapshot.rglob('*')) if path.is_file()}

    def commits(self, repo: str) -> list[str]:
        """Titles of the commits, oldest first, without the one in which the Hub creates a repository."""
        return [title for _, title in self.info(repo)['commits'][1:]] if self.exists(repo) else []

    def exists(self, repo: str) -> bool:
        return (self.root / repo / 'repo.json').exists()

    def info(self, repo: str) -> dict:
        return json.loads((self.root / repo / 'repo.json').read_text())

    def resolve(self, repo: str, revision: str) -> str:
        shas = [sha for sha, _ in self.info(repo)['commits']]
        if revision != 'main' and revision not in shas:
            raise Refusal(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return shas[-1] if revision == 'main' else revision

    def create(self, repo: str, private: bool):
        (self.root / repo).mkdir(parents=True)
        (self.root / repo / 'repo.json').write_text(json.dumps({'private': private, 'commits': []}))
        self.commit(repo, 'initial commit', {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'})

    def store(self, data: bytes) -> bytes:
        """Keeps a large file; returns its pointer."""
        oid = hashlib.sha256(data).hexdigest()
        (self.root / 'lfs' / oid).write_bytes(data)
        return POINTER.format(oid=oid, size=len(data)).encode()

    def commit(self, repo: str, title: str, changes: dict[str, bytes | None]) -> str:
        """Adds a commit, all of it or nothing: it is there once repo.json names it."""
        with self.lock:
            info, folder = self.info(repo), self.root / repo
            parent = info['commits'][-1][0] if info['commits'] else ''
            tree = {path.relative_to(folder / parent).as_posix(): path.read_bytes()
                    for path in (folder / parent).rglob('*') if parent and path.is_file()} | changes
            sha = hashlib.sha1(repr((parent, title, sorted(tree.items(), key=str))).encode()).hexdigest()
            for name, data in tree.items():
                if data is not None:  # None: deleted
                    (folder / sha / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / sha / name).write_bytes(data)
            info['commits'].append((sha, title))
            (folder / 'new.json').write_text(json.dumps(info))
            os.replace(folder / 'new.json', folder / 'repo.json')
            return sha

    def file(self, path: Path) -> File:
        data = path.read_bytes()
        if pointer := re.fullmatch(POINTER.format(oid='(.*)', size='(.*)'), data.decode(errors='replace')):
            return File(self.root / 'lfs' / pointer[1], pointer[1], int(pointer[2]), True)
        return File(path, hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest(), len(data), False)  # as git has it

    def xet_hash(self, oid: str) -> str | None:
        """The name under which the Xet store holds the file with this sha256, read in the shards (xet-core, mdb_shard).

        After a 48-byte header come 48-byte records. Each file is a head (hash, flags, number of segments), its segments,
        as many verification records if flag 31 is set, and a record with its sha256 if flag 30 is; ff..ff ends the list.
        """
        words = range(0, 32, 8)  # a hash is four little-endian words, printed one by one
        for shard in (self.root / 'xet').rglob('*.mdb'):
            data, at = shard.read_bytes(), 48
            while data[at:at + 32] != b'\xff' * 32:
                flags, segments = (int.from_bytes(data[at + i:at + i + 4], 'little') for i in (32, 36))
                end = at + 48 * (1 + segments * (1 + (flags >> 31 & 1)))
                name, sha = (b''.join(data[start + i:start + i + 8][::-1] for i in words).hex() for start in (at, end))
                if flags >> 30 & 1 and sha == oid:
                    return name
                at = end + 48 * (flags >> 30 & 1)
        return None


def route(methods: str, pattern: str):
    """Registers what answers requests to a path; named groups are arguments."""
    pattern = pattern.replace('{repo}', r'(?P<repo>[\w.-]+/[\w.-]+)').replace('{revision}', r'(?P<revision>[^/]+)')
    return lambda function: ROUTES.append((methods.split(), re.compile(pattern), function)) or function


class Request(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def __init__(self, hub: Hub, *args):
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = unquote(self.path.partition('?')[0])
        self.hub.requests.append(f'{self.command} {path}')
        faults = [f for f in self.hub.faults if f.times > 0 and re.search(f.route, self.hub.requests[-1])]
        self.fault = faults[0].how if faults else None
        if faults:
            faults[0].times -= 1
        length = int(self.headers.get('Content-Length', 0))
        if length and self.fault == 'cut':
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self.rfile.read(length)
        self.user, self.may_write = None, False
        try:
            if isinstance(self.fault, int):
                raise Refusal(self.fault, 'Out of order.')
            if token := self.headers.get('Authorization', '').removeprefix('Bearer '):
                if token not in USERS:
                    raise Refusal(401, 'Invalid credentials in Authorization header')
                self.user, self.may_write = USERS[token]
            for methods, pattern, function in ROUTES:
                if self.command in methods and (match := pattern.fullmatch(path)):
                    if 'repo' in match.groupdict():
                        self.check_readable(match['repo'])
                    function(self, **match.groupdict())
                    break
            else:
                raise Refusal(404, f'No such route: {path}')
        except Refusal as refusal:
            headers = {'X-Error-Message': refusal.message} | ({'X-Error-Code': refusal.code} if refusal.code else {})
            self.answer({'error': refusal.message, **refusal.body}, headers, refusal.status)

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self, body: bytes | dict | list = b'', headers: dict[str, str] | None = None, status: int = 200):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        data = data[:len(data) // 2] if self.fault == 'short' and self.command == 'GET' else data
        self.close_connection |= self.fault in ('cut', 'lost')
        if self.fault == 'lost':
            return
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data[:len(data) // 2] if self.fault == 'cut' else data)

    def check_readable(self, repo: str):
        if not self.hub.exists(repo) or self.hub.info(repo)['private'] and self.user != repo.split('/')[0]:
            # 401 becomes RepositoryNotFoundError by itself only under https, so here too the code says it
            raise Refusal(404 if self.user else 401, 'Repository not found', 'RepoNotFound')

    def check_writable(self, owner: str):
        if self.user is None:
            raise Refusal(401, 'Invalid username or password.')
        if self.user != owner or not self.may_write:
            raise Refusal(403, f'You do not have the right to write to the namespace "{owner}"')

    @route('GET', '/api/whoami-v2')
    def whoami(self):
        if self.user is None:
            raise Refusal(401, 'Invalid username or password.')
        role = 'write' if self.may_write else 'read'
        self.answer({'type': 'user', 'name': self.user, 'orgs': [], 'auth': {'accessToken': {'role': role}}})

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self):
        has_metadata = json.loads(self.body)['content'].startswith('---\n')
        warnings = [] if has_metadata else [{'message': 'empty or missing yaml metadata in repo card'}]
        self.answer({'errors': [], 'warnings': warnings})

    @route('POST', '/api/repos/create')
    def create(self):
        wanted = json.loads(self.body)
        owner = wanted.get('organization') or self.user
        self.check_writable(owner)
        repo = f'{owner}/{wanted["name"]}'
        if self.hub.exists(repo):
            raise Refusal(409, 'You already created this model repo', url=f'{self.hub.url}/{repo}')
        self.hub.create(repo, wanted.get('private') or wanted.get('visibility') == 'private')
        self.answer({'url': f'{self.hub.url}/{repo}'})

    @route('POST', '/api/models/{repo}/preupload/{revision}')
    def preupload(self, repo: str, revision: str):
        self.check_writable(repo.split('/')[0])
        there = self.hub.files(repo, revision)
        self.answer({'files': [
            {'path': path, 'uploadMode': 'lfs' if path.endswith(LARGE) else 'regular', 'shouldIgnore': False,
             'oid': there[path].etag if path in there else None}
            for path in (wanted['path'] for wanted in json.loads(self.body)['files'])]})

    @route('POST', '/{repo}.git/info/lfs/objects/batch')
    def lfs_batch(self, repo: str):
        self.check_writable(repo.split('/')[0])
        objects = json.loads(self.body)['objects']
        for item in objects:
            if not (self.hub.root / 'lfs' / item['oid']).exists():
                item['actions'] = {'upload': {'href': f'{self.hub.url}/lfs/{item["oid"]}'}}
        self.answer({'transfer': 'basic', 'objects': objects})

    @route('PUT', '/lfs/(?P<oid>[0-9a-f]{64})')
    def lfs_put(self, oid: str):  # like a signed URL of the real one, it asks for no token
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, 'The content does not match its sha256')
        self.hub.store(self.body)
        self.answer()

    @route('POST', '/api/models/{repo}/commit/{revision}')
    def commit(self, repo: str, revision: str):
        self.check_writable(repo.split('/')[0])
        title, changes = '', {}
        for key, value in ((line['key'], line['value']) for line in map(json.loads, self.body.splitlines())):
            if key == 'header':
                title = value['summary']
            elif key == 'file':
                changes[value['path']] = base64.b64decode(value['content'])
            elif key == 'lfsFile':
                if not (self.hub.root / 'lfs' / value['oid']).exists() and not self.hub.xet_hash(value['oid']):
                    raise Refusal(400, f'{value["path"]} was never uploaded')
                changes[value['path']] = POINTER.format(**value).encode()
            elif key == 'deletedFile':
                changes[value['path']] = None
        sha = self.hub.commit(repo, title, changes)
        self.answer({'success': True, 'commitOid': sha, 'commitUrl': f'{self.hub.url}/{repo}/commit/{sha}'})

    @route('HEAD GET', '/{repo}/resolve/{revision}/(?P<path>.+)')
    def download(self, repo: str, revision: str, path: str):
        sha = self.hub.resolve(repo, revision)
        file = self.hub.files(repo, sha).get(path)
        headers = {'X-Repo-Commit': sha, 'Accept-Ranges': 'bytes'}
        if file is None:
            return self.answer({'error': 'Entry not found'}, {**headers, 'X-Error-Code': 'EntryNotFound'}, 404)
        headers['ETag'] = f'"{file.etag}"'
        if not file.path.exists():  # it lies in the Xet store, where the client fetches it itself
            refresh = f'{self.hub.url}/api/models/{repo}/xet-read-token/{sha}'
            headers |= {'X-Linked-Size': str(file.size), 'X-Xet-Hash': self.hub.xet_hash(file.etag),
                        'X-Xet-Refresh-Route': refresh}
            return self.answer(b'', headers)
        data = file.path.read_bytes()
        start = int((re.match(r'bytes=(\d+)-', self.headers.get('Range', '')) or ['', 0])[1])
        if start:
            headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
        self.answer(data[start:], headers, 206 if start else 200)

    @route('GET', '/api/models/{repo}(/revision/{revision})?')
    def model_info(self, repo: str, revision: str | None):
        sha = self.hub.resolve(repo, revision or 'main')
        self.answer({'id': repo, 'modelId': repo, 'sha': sha, 'private': self.hub.info(repo)['private'], 'tags': [],
                     'siblings': [{'rfilename': name} for name in self.hub.files(repo, sha)]})

    @route('GET', '/api/models/{repo}/tree/{revision}')
    def tree(self, repo: str, revision: str):
        self.answer([{'type': 'file', 'path': name, 'size': file.size, 'oid': file.etag}
                     | ({'lfs': {'oid': file.etag, 'size': file.size, 'pointerSize': 134}} if file.large else {})
                     for name, file in self.hub.files(repo, revision).items()])

    @route('GET', '/api/models/{repo}/xet-(?P<access>read|write)-token/{revision}')
    def xet_token(self, repo: str, access: str, revision: str):
        if access == 'write':
            self.check_writable(repo.split('/')[0])
        if not self.hub.xet:
            raise Refusal(404, 'This Hub has no Xet store')
        token = {'accessToken': 'xet', 'exp': 2 ** 32, 'casUrl': f'local://{self.hub.root / "xet"}'}
        self.answer(token, {'X-Xet-Cas-Url': token['casUrl'], 'X-Xet-Access-Token': token['accessToken'],
                            'X-Xet-Token-Expiration': str(token['exp'])})
