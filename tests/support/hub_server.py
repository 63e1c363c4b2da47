"""
A small Hub on 127.0.0.1: as much of its protocol as the official client needs to create, fill and read repositories.

Files above `LARGE` go through LFS, as on the Hub. A commit is seen whole or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


LARGE = 10_000
OWNER, TOKEN = "tester", "hf_tester"
GUEST_TOKEN = "hf_guest"  # of somebody who may read what is public, and write nowhere

# A file as (oid of its large content or None, its small content).
Blob = tuple[str | None, bytes]


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # name to commit
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, Blob]] | None:
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class Hub(ThreadingHTTPServer):
    """The server and what it stores. `on_upload` is called with the number of each large upload, before it is read."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.uploads: list[str] = []  # oids that were sent, complete or not
        self.requests: list[str] = []
        self.on_upload: Callable[[int], None] = lambda number: None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>.+)", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>.+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>.+)", "branch"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>.+)", "commit"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/large/(?P<oid>[0-9a-f]{64})", "upload"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
    )

    def route(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{method} {path}")
        self.data = self.body() if method == "POST" else b""  # read in any case: the connection is used again
        for route_method, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and route_method == ("GET" if method == "HEAD" else method):
                getattr(self, name)(**{key: unquote(value or "") for key, value in match.groupdict().items()})
                return
        self.fail(404, "EntryNotFound", f"no route for {method} {path}")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply(self, value: Any) -> None:
        self.send(200, json.dumps(value).encode(), Content_Type="application/json")

    def fail(self, status: int, code: str, message: str = "") -> None:
        self.send(status, json.dumps({"error": message or code}).encode(), X_Error_Code=code, X_Error_Message=message)

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def refuse(self) -> None:
        """A write: of somebody unknown, or of somebody known without the right to it."""
        if self.headers.get("Authorization") == f"Bearer {GUEST_TOKEN}":
            self.fail(403, "Forbidden", "You have no right to write")
        else:
            self.fail(401, "Unauthorized", "Invalid credentials")

    def find(self, repo: str) -> Repository | None:
        """The repository, if it exists and the client may know."""
        found = self.server.repositories.get(repo)
        if found is None or (found.private and not self.is_owner):
            self.fail(404 if self.is_owner else 401, "RepoNotFound", "Repository not found")
            return None
        return found

    def find_files(self, repo: str, revision: str) -> tuple[str, dict[str, Blob]] | None:
        found = self.find(repo)
        if found is None:
            return None
        files = found.at(revision or "main")
        if files is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return files

    def whoami(self) -> None:
        if self.is_owner:
            self.reply({"type": "user", "name": OWNER, "orgs": [], "auth": {}})
        else:
            self.fail(401, "Unauthorized", "Invalid credentials")

    def validate_yaml(self) -> None:
        self.reply({"errors": [], "warnings": []})

    def create(self) -> None:
        wanted = json.loads(self.data)
        if not self.is_owner:
            self.refuse()
            return
        repo = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
        if repo in self.server.repositories:
            body = {"error": "exists", "url": f"{self.server.endpoint}/{repo}", "name": repo}
            self.send(409, json.dumps(body).encode(), Content_Type="application/json")
            return
        repository = Repository(private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
        repository.commit("main", {})
        self.server.repositories[repo] = repository
        self.reply({"url": f"{self.server.endpoint}/{repo}", "name": repo})

    def info(self, repo: str, revision: str = "") -> None:
        found = self.find_files(repo, revision)
        if found:
            siblings = [{"rfilename": name} for name in found[1]]
            self.reply(
                {"id": repo, "modelId": repo, "sha": found[0], "siblings": siblings, "tags": [], "private": False}
            )

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        found = self.find_files(repo, revision)
        if not found:
            return
        inside = [name for name in found[1] if name.startswith(folder[1:])]
        entries = [{"type": "file", "path": name, "oid": "0", "size": self.size(found[1][name])} for name in inside]
        if not entries and folder:
            self.fail(404, "EntryNotFound", f"{folder} does not exist")
        else:
            self.reply(entries)

    def size(self, blob: Blob) -> int:
        return len(self.content(blob))

    def content(self, blob: Blob) -> bytes:
        return blob[1] if blob[0] is None else self.server.large[blob[0]]

    def branch(self, repo: str, branch: str) -> None:
        found = self.find(repo)
        if found:
            found.branches.setdefault(branch, found.branches["main"])
            self.reply({})

    def preupload(self, repo: str, revision: str) -> None:
        files = json.loads(self.data)["files"]
        if self.find_files(repo, revision):
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["size"] > LARGE else "regular"} for file in files
            ]
            self.reply({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})

    def batch(self, repo: str) -> None:
        wanted = json.loads(self.data)["objects"]
        if not self.find(repo):
            return
        objects = []
        for entry in wanted:
            upload = {"upload": {"href": f"{self.server.endpoint}/large/{entry['oid']}", "header": {}}}
            held = entry["oid"] in self.server.large
            objects.append({"oid": entry["oid"], "size": entry["size"], **({} if held else {"actions": upload})})
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        self.server.uploads.append(oid)
        self.server.on_upload(len(self.server.uploads))
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            self.fail(400, "BadRequest", "incomplete")
            return
        self.server.large[oid] = content
        self.send(200)

    def commit(self, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.data.splitlines()]
        found, current = self.find(repo), self.find_files(repo, revision)
        if not found or not current:
            return
        if not self.is_owner:
            self.refuse()
            return
        files = dict(current[1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (None, base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                files[value["path"]] = (value["oid"], b"")
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = found.commit(revision, files)
        self.reply({"commitUrl": f"{self.server.endpoint}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def file(self, repo: str, revision: str, path: str) -> None:
        found = self.find_files(repo, revision)
        if not found:
            return
        sha, files = found
        if path not in files:
            self.fail(404, "EntryNotFound", f"{path} does not exist")
            return
        content = self.content(files[path])
        etag = files[path][0] or hashlib.sha1(content).hexdigest()
        self.send(200, content, ETag=f'"{etag}"', X_Repo_Commit=sha, Accept_Ranges="none")


@contextmanager
def serve() -> Iterator[Hub]:
    """A running Hub."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
