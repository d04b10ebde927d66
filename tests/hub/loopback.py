"""A Hub on 127.0.0.1: enough of the HTTP API to push and pull models, through LFS or through Xet's local storage.

Repositories have real revisions: a commit is a whole tree of files, so that "nothing half-published" can be looked at.
Faults are injected with :meth:`LoopbackHub.fail`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LARGE = (".safetensors", ".bin", ".png")


@dataclass
class File:
    """A file of a revision; ``content`` is None where it went to Xet storage."""

    oid: str
    size: int
    large: bool
    content: bytes | None


@dataclass
class Repo:
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, File]:
        return self.commits[self.branches[revision]]

    def commit(self, branch: str, files: dict[str, File]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{time.time_ns()}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid


@dataclass
class Fault:
    part: str
    status: int
    times: int


@dataclass
class Visit:
    part: str
    before: Callable[[], None] | None
    drop: bool


class Reply(Exception):
    """Ends a request with a status, a body and headers."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        super().__init__(status)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        if not isinstance(body, bytes):
            self.headers["Content-Type"] = "application/json"


def missing(code: str) -> Reply:
    return Reply(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)


class LoopbackHub:
    """Use as a context manager. ``xet``: folder for Xet storage; without it large files take the LFS way."""

    def __init__(self, xet: Path | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.visits: list[Visit] = []
        self.xet = xet
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *unused: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, part: str, status: int, times: int = 1) -> None:
        """Answer the next ``times`` requests whose path contains ``part`` with ``status``."""
        self.faults.append(Fault(part, status, times))

    def visit(self, part: str, before: Callable[[], None] | None = None, drop: bool = False) -> None:
        """Call ``before`` at the next request whose path contains ``part``; ``drop``: do it, but never answer."""
        self.visits.append(Visit(part, before, drop))

    def visited(self, path: str) -> Visit | None:
        with self.lock:
            found = next((visit for visit in self.visits if visit.part in path), None)
            if found is not None:
                self.visits.remove(found)
        return found

    def count(self, method: str, part: str) -> int:
        return sum(m == method and part in path for m, path in self.log)

    def xet_hashes(self) -> dict[str, str]:
        """sha256 to Xet hash of every file in the local storage, from the shard files that the client wrote there."""
        found: dict[str, str] = {}
        for shard in Path(self.xet or "").rglob("*.mdb"):
            raw, at, record = shard.read_bytes(), 48, 48
            while at + record <= len(raw) and raw[at : at + 32] != b"\xff" * 32:
                flags, entries = struct.unpack_from("<II", raw, at + 32)
                name = _hash_text(raw[at : at + 32])
                at += record * (1 + entries * (2 if flags >> 31 else 1))
                if flags >> 30 & 1:
                    found[_hash_text(raw[at : at + 32])] = name
                    at += record
        return found

    # -- the API: pattern of the path, method, what to do ------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes, headers: Any) -> Reply:
        with self.lock:
            self.log.append((method, path))
            for fault in self.faults:
                if fault.times and fault.part in path:
                    fault.times -= 1
                    return Reply(fault.status, b"injected")
            for pattern, verb, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method in verb:
                    try:
                        if action is not LoopbackHub.lfs_put:  # its address is secret enough, as on the real Hub
                            self.authorize(method, match.groupdict().get("repo"), headers)
                        at = {**match.groupdict(), **{key: value[0] for key, value in query.items()}}
                        return action(self, at, body, headers)
                    except Reply as reply:
                        return reply
            return missing("NotFound")

    def authorize(self, method: str, name: str | None, headers: Any) -> None:
        known = headers.get("Authorization") == f"Bearer {TOKEN}"
        if method in ("POST", "PUT") and not known:
            raise Reply(401, {"error": "Unauthorized"})
        if name in self.repos and self.repos[name].private and not known:
            raise missing("RepoNotFound")

    def find(self, at: dict[str, str]) -> tuple[Repo, str]:
        if at["repo"] not in self.repos:
            raise missing("RepoNotFound")
        repo = self.repos[at["repo"]]
        oid = repo.resolve(at.get("revision") or "main")
        if oid is None:
            raise missing("RevisionNotFound")
        return repo, oid

    def whoami(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        return Reply(200, {"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token"}})

    def validate(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        return Reply(200, {"warnings": [], "errors": []})

    def create(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        asked = json.loads(body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        if name in self.repos:
            return Reply(409, {"error": "You already created this model repo", **answer})
        self.repos[name] = Repo(bool(asked.get("private")) or asked.get("visibility") == "private")
        self.repos[name].commit("main", {".gitattributes": File(hashlib.sha1(b"").hexdigest(), 0, False, b"")})
        return Reply(200, answer)

    def preupload(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        repo, oid = self.find(at)
        files = [
            {
                "path": asked["path"],
                "uploadMode": "lfs" if asked["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": repo.commits[oid][asked["path"]].oid if asked["path"] in repo.commits[oid] else None,
            }
            for asked in json.loads(body)["files"]
        ]
        return Reply(200, {"files": files})

    def lfs_batch(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        objects = []
        for asked in json.loads(body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.blobs:
                upload, verify = f"{self.url}/lfs/{asked['oid']}", f"{self.url}/lfs-verify"
                entry["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(entry)
        return Reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        if hashlib.sha256(body).hexdigest() != at["oid"]:
            return Reply(400, b"the content is not that of the oid")
        self.blobs[at["oid"]] = body
        return Reply(200, b"", ETag=at["oid"])

    def lfs_verify(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        asked = json.loads(body)
        return Reply(200 if len(self.blobs.get(asked["oid"], b"")) == asked["size"] else 400, {})

    def xet_token(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        self.find({"repo": at["repo"]})  # for a pull request the client names the revision "None"
        if self.xet is None:
            return missing("RevisionNotFound")
        url, until = f"local://{self.xet}", str(int(time.time()) + 3600)
        answer = {"casUrl": url, "exp": int(until), "accessToken": "xet"}
        return Reply(200, answer, X_Xet_Cas_Url=url, X_Xet_Access_Token="xet", X_Xet_Token_Expiration=until)

    def commit(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        repo, parent = self.find(at)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        asked = next(line["value"] for line in lines if line["key"] == "header")
        if asked.get("parentCommit") not in (None, parent):
            return Reply(412, {"error": "A commit has happened since."})
        files = dict(repo.commits[parent])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                name = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                files[value["path"]] = File(name, len(content), False, content)
            elif line["key"] == "lfsFile":
                there = value["oid"] in (self.blobs if self.xet is None else self.xet_hashes())
                if not there:
                    return Reply(400, {"error": f"{value['path']}: its content was never uploaded"})
                files[value["path"]] = File(value["oid"], value["size"], True, self.blobs.get(value["oid"]))
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        pull_request = at.get("create_pr") == "1"
        oid = repo.commit("refs/pr/1" if pull_request else at["revision"], files)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{at['repo']}/commit/{oid}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.url}/{at['repo']}/discussions/1"
        return Reply(200, answer)

    def branch(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        repo, oid = self.find({"repo": at["repo"]})
        if at["revision"] in repo.branches:
            return Reply(409, {"error": "Reference already exists"})
        repo.branches[at["revision"]] = oid
        return Reply(201, {})

    def info(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        repo, oid = self.find(at)
        answer: dict[str, Any] = {
            "id": at["repo"],
            "modelId": at["repo"],
            "sha": oid,
            "private": repo.private,
            "tags": [],
        }
        answer["siblings"] = [{"rfilename": name} for name in repo.commits[oid]]
        card = repo.commits[oid].get("README.md")
        if (
            card is not None
            and card.content is not None
            and (found := re.search(rb"license: *\"?([\w.-]+)", card.content))
        ):
            answer["cardData"] = {"license": found[1].decode()}
        return Reply(200, answer)

    def tree(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        repo, oid = self.find(at)
        entries = []
        for name, file in repo.commits[oid].items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": file.size, "oid": file.oid}
            if file.large:
                entry["lfs"] = {"oid": file.oid, "size": file.size, "pointerSize": 130}
            entries.append(entry)
        return Reply(200, entries)

    def resolve(self, at: dict[str, str], body: bytes, headers: Any) -> Reply:
        repo, oid = self.find(at)
        file = repo.commits[oid].get(at["file"])
        if file is None:
            return Reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
        answer = {"ETag": f'"{file.oid}"', "X_Repo_Commit": oid}
        if file.large:
            answer |= {"X_Linked_Etag": f'"{file.oid}"', "X_Linked_Size": str(file.size)}
            if self.xet is not None and (name := self.xet_hashes().get(file.oid)):
                answer["X_Xet_Hash"] = name
                answer["X_Xet_Refresh_Route"] = f"{self.url}/api/models/{at['repo']}/xet-read-token/{oid}"
        content = file.content or b""
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range") or "")
        if span:
            first, last = int(span[1]), int(span[2] or len(content) - 1)
            answer["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return Reply(206, content[first : last + 1], **answer)
        return Reply(200, content, **answer)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", ("GET",), LoopbackHub.whoami),
    (r"/api/validate-yaml", ("POST",), LoopbackHub.validate),
    (r"/api/repos/create", ("POST",), LoopbackHub.create),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", ("POST",), LoopbackHub.lfs_batch),
    (r"/lfs/(?P<oid>\w+)", ("PUT",), LoopbackHub.lfs_put),
    (r"/lfs-verify", ("POST",), LoopbackHub.lfs_verify),
    (rf"/api/models/{_REPO}/xet-(?:read|write)-token/{_REVISION}", ("GET",), LoopbackHub.xet_token),
    (rf"/api/models/{_REPO}/preupload/{_REVISION}", ("POST",), LoopbackHub.preupload),
    (rf"/api/models/{_REPO}/commit/{_REVISION}", ("POST",), LoopbackHub.commit),
    (rf"/api/models/{_REPO}/branch/{_REVISION}", ("POST",), LoopbackHub.branch),
    (rf"/api/models/{_REPO}/tree/{_REVISION}(?:/.*)?", ("GET",), LoopbackHub.tree),
    (rf"/api/models/{_REPO}(?:/revision/{_REVISION})?", ("GET",), LoopbackHub.info),
    (rf"/{_REPO}/resolve/{_REVISION}/(?P<file>.+)", ("GET", "HEAD"), LoopbackHub.resolve),
]


def _hash_text(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *unused: object) -> None:
            pass

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def handle_any(self) -> None:
            address = urlsplit(self.path)
            body = self.read_body()
            visit = hub.visited(address.path)
            if visit and visit.before:
                visit.before()
            reply = hub.answer(self.command, unquote(address.path), parse_qs(address.query), body, self.headers)
            if visit and visit.drop:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(reply.body)

        do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    return Handler
