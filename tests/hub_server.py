"""A small Hugging Face Hub on 127.0.0.1, so that the tests push and pull with the real, unmodified clients.

It answers what huggingface_hub (0.34 to 2.4) asks in a push and a pull of a model, and every file travels within its
commit. Uploads to LFS or Xet, rights, quotas and rules for metadata are between huggingface_hub and the real Hub.
"""
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


@dataclass
class Repo:
    files: dict[str, bytes]  # of `main`; earlier commits are not kept
    private: bool = False
    commits: int = 0  # that clients made

    @property
    def sha(self) -> str:
        return f'{self.commits:040x}'


class Hub(ThreadingHTTPServer):
    """The server and its repositories; a context manager."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Request)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []  # 'METHOD /path', in order
        self.faults: dict[str, int] = {}  # what is found in 'METHOD /path', as a regular expression -> status
        self.private_by_default = False  # what an organization may set

    def __enter__(self) -> 'Hub':
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Request(BaseHTTPRequestHandler):
    """One request; a connection serves no second one, so none outlives the server."""

    server: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        line = f'{self.command} {unquote(self.path.partition("?")[0])}'
        self.server.requests.append(line)
        self.body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        for fault, status in self.server.faults.items():
            if re.search(fault, line):
                return self.answer({'error': 'Out of order'}, status)
        for pattern, function in ROUTES.items():
            match = re.fullmatch(pattern.replace('REPO', r'([\w.-]+/[\w.-]+)'), line)
            if match and (not match.groups() or match[1] in self.server.repos):
                return function(self, *match.groups())
        self.refuse('RepoNotFound')

    do_HEAD = do_POST = do_GET

    def answer(self, body: bytes | dict | list, status: int = 200, headers: dict[str, str] | None = None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {'Content-Length': str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def refuse(self, code: str):
        """Answers that something is not there; huggingface_hub makes an exception of its own of the code."""
        self.answer({'error': code}, 404, {'X-Error-Code': code})

    def validate_yaml(self):
        self.answer({'errors': [], 'warnings': []})

    def create(self):
        wanted = json.loads(self.body)
        name = f'{wanted["organization"]}/{wanted["name"]}'
        exists = name in self.server.repos
        if not exists:
            asked = wanted.get('private', wanted.get('visibility'))  # huggingface_hub 0.34 says `private`
            private = self.server.private_by_default if asked is None else asked in (True, 'private')
            self.server.repos[name] = Repo({}, private)
        self.answer({'url': f'{self.server.url}/{name}'}, 409 if exists else 200)

    def preupload(self, name: str):
        paths = [file['path'] for file in json.loads(self.body)['files']]
        self.answer({'files': [{'path': path, 'uploadMode': 'regular', 'shouldIgnore': False} for path in paths]})

    def commit(self, name: str):
        repo = self.server.repos[name]
        files = dict(repo.files)
        for line in map(json.loads, self.body.splitlines()):
            value = line['value']
            if line['key'] == 'file':
                files[value['path']] = base64.b64decode(value['content'])
            elif line['key'] == 'deletedFile':
                del files[value['path']]
        repo.files = files  # all changes or none
        repo.commits += 1
        self.answer({'commitOid': repo.sha, 'commitUrl': f'{self.server.url}/{name}/commit/{repo.sha}'})

    def download(self, name: str, path: str):
        repo = self.server.repos[name]
        if path not in repo.files:
            return self.refuse('EntryNotFound')
        digest = hashlib.sha256(repo.files[path]).hexdigest()
        self.answer(repo.files[path], headers={'X-Repo-Commit': repo.sha, 'ETag': f'"{digest}"'})

    def tree(self, name: str):
        repo = self.server.repos[name]
        self.answer([{'type': 'file', 'path': path, 'size': len(data), 'oid': ''} for path, data in repo.files.items()])

    def model_info(self, name: str):
        repo = self.server.repos[name]
        self.answer({'id': name, 'sha': repo.sha, 'private': repo.private})


ROUTES = {
    'POST /api/validate-yaml': Request.validate_yaml,
    'POST /api/repos/create': Request.create,
    'POST /api/models/REPO/preupload/[^/]+': Request.preupload,
    'POST /api/models/REPO/commit/[^/]+': Request.commit,
    'GET /api/models/REPO/tree/[^/]+': Request.tree,
    'GET /api/models/REPO(?:/revision/[^/]+)?': Request.model_info,
    '(?:GET|HEAD) /REPO/resolve/[^/]+/(.+)': Request.download,
}
