"""A small part of the Hugging Face Hub's HTTP API on this machine: repositories, commits, LFS uploads and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_test"
GATED, MISSING = "someone/gated", "someone/never-made"


@dataclass
class Repository:
    """Files of the one branch, by path."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def commit(self) -> str:
        """A name of 40 hexadecimal digits."""
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server's state: repositories, uploaded large files by SHA-256, and every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub() -> Iterator[Hub]:
    """A running server."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """The requests that huggingface_hub makes for a push and a download."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing: pytest's output stays readable."""

    def _answer(self, content: object = None, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if path.startswith("/large/"):
            self.server.large[path.removeprefix("/large/")] = body
            self._answer()
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif path.startswith("/api/models/"):
            self._model(path.removeprefix("/api/models/"), body)
        else:
            self._file(path)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _create(self, asked: dict) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid username or password."}, 401)
            return
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not name.startswith("me/"):
            self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            return
        known = name in self.server.repositories
        private = bool(asked.get("private")) or asked.get("visibility") == "private"  # until 1.0, and since
        self.server.repositories.setdefault(name, Repository(private))
        self._answer({"url": f"{self.server.url}/{name}", "name": name}, 409 if known else 200)

    def _batch(self, asked: dict) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/large/{each['oid']}"}}}
            for each in asked["objects"]
        ]
        self._answer({"transfer": "basic", "objects": objects})

    def _model(self, path: str, body: bytes) -> None:
        name = "/".join(path.split("/")[:2])
        action, _, rest = path.removeprefix(name).lstrip("/").partition("/")
        if not (repository := self._repository(name)):
            return
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            self._answer({"files": files})
        elif action == "commit":
            self._commit(name, repository, [json.loads(line) for line in body.splitlines() if line.strip()])
        elif action == "tree":
            tree = [{"type": "file", "path": path, "size": len(content), "oid": _sha1(content)}
                    for path, content in sorted(repository.files.items())]  # fmt: skip
            self._answer(tree)
        elif action in ("", "revision"):
            if rest not in ("", "main", repository.commit):
                self._answer({"error": "no revision"}, 404, X_Error_Code="RevisionNotFound")
                return
            files = [{"rfilename": path} for path in sorted(repository.files)]
            self._answer({"id": name, "modelId": name, "sha": repository.commit, "private": repository.private,
                          "tags": [], "downloads": 0, "likes": 0, "siblings": files})  # fmt: skip
        else:
            self._answer({"error": f"no such request {path}"}, 404)

    def _commit(self, name: str, repository: Repository, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        commit = repository.commit
        self._answer({"success": True, "commitOid": commit, "commitUrl": f"{self.server.url}/{name}/commit/{commit}"})

    def _file(self, path: str) -> None:
        name, _, rest = path.lstrip("/").partition("/resolve/")
        if not (repository := self._repository(name)):
            return
        content = repository.files.get(rest.partition("/")[2])
        if content is None:
            self._answer({"error": "no such file"}, 404, X_Error_Code="EntryNotFound")
            return
        self._answer(content, ETag=f'"{_sha1(content)}"', X_Repo_Commit=repository.commit, Accept_Ranges="bytes")

    def _repository(self, name: str) -> Repository | None:
        if name == GATED:
            self._answer({"error": "gated"}, 403, X_Error_Code="GatedRepo")
        elif (repository := self.server.repositories.get(name)) is None:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        else:
            return repository
        return None


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
