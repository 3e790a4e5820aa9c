"""The part of the Hub's HTTP interface that loading and publishing need, with commits, large files, faults; a client.

Repositories live in memory. Files that end in .safetensors or .png are large (LFS): their content is at an address of
its own, as on the Hub's content network, and goes by its sha256; other files go by git's hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from processes import finish

WRITER, READER = "hf_WriterWriterWriterWriter", "hf_ReaderReaderReaderReader"
LARGE = (".safetensors", ".png")


@dataclass
class Repository:
    """Refs to commits, commits to files."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: Mapping[str, bytes], message: str = "") -> str:
        content = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        sha = hashlib.sha1(f"{ref} {len(self.commits)} {sorted(content)}".encode()).hexdigest()
        self.commits[sha] = content
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))


def large_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def small_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What goes wrong, for the next `times` requests whose "METHOD path" contains `match`.

    `kind`: "drop" (reset before anything is done), "lost" (done, and reset instead of answered), "cut" (reset in the
    middle of the body), "short" (closed in the middle), "less" (half of the body, said
    to be all), "wrong" (other bytes of the same length), "hang" (no reply), or a status, which then has `retry_after`.
    """

    match: str
    kind: str | int
    times: int = 1
    retry_after: str = ""


@dataclass
class Hub:
    """What the tests see of the server."""

    endpoint: str = ""
    content: str = ""  # where large files are: another host to the client, which sends no token there
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    later: dict[str, list[Fault]] = field(default_factory=dict)  # faults from a certain request on
    requests: list[str] = field(default_factory=list)
    collections: dict[str, dict[str, Any]] = field(default_factory=dict)  # by slug
    released: threading.Event = field(default_factory=threading.Event)

    def add(self, repo_id: str, files: Mapping[str, bytes] | Path, ref: str = "main", private: bool = False) -> str:
        """Commit files, or those of a folder; the commit."""
        if isinstance(files, Path):
            files = {str(p.relative_to(files)): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        repository = self.repositories.setdefault(repo_id, Repository(private))
        return repository.commit(ref, files)

    def gets(self, part: str = "") -> list[str]:
        return [r for r in self.requests if r.startswith("GET") and part in r]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer_lost = False
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    # ---- replies ----------------------------------------------------------------------------------------------------

    def hang_up(self) -> None:
        """Reset the connection."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.wfile = open("/dev/null", "wb")  # noqa: SIM115 - the server flushes it

    def reply(self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", fault: str = "") -> None:
        if self.answer_lost:
            return self.hang_up()
        if fault == "less":
            body = body[: len(body) // 2]
        if fault == "wrong":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("cut", "short"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "cut":
                time.sleep(0.05)  # what was sent arrives before the reset discards it
                self.hang_up()
            return
        self.wfile.write(body)

    def reply_json(self, content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.reply(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())

    def refuse(self, status: int, code: str = "", text: str = "", **headers: str) -> None:
        more = {name.replace("_", "-"): value for name, value in headers.items()}
        self.reply_json({"error": text or code}, status, {"X-Error-Code": code, "X-Error-Message": text, **more})

    # ---- requests ---------------------------------------------------------------------------------------------------

    def do_GET(self) -> None:
        hub, url = self.hub, urlparse(self.path)
        hub.requests.append(f"{self.command} {self.path}")
        hub.faults += hub.later.pop(hub.requests[-1], [])
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        fault = next((f for f in hub.faults if f.times and f.match in hub.requests[-1]), None)
        kind: str | int = ""
        if fault:
            fault.times -= 1
            kind = fault.kind
            if kind == "hang":
                hub.released.wait(30)
                self.close_connection = True
                return
            if kind == "drop":
                return self.hang_up()
            self.answer_lost = kind == "lost"
            if isinstance(kind, int):
                return self.refuse(kind, **({"Retry_After": fault.retry_after} if fault.retry_after else {}))
        path, query = unquote(url.path), parse_qs(url.query)
        if found := re.fullmatch(r"/objects/(\w+)", path):
            assert not self.token(), "a token was sent to the content network"
            return self.serve_object(found[1], body, str(kind))
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            return self.resolve(*found.groups(), str(kind))
        self.api(path, query, body)

    do_HEAD = do_POST = do_PUT = do_GET

    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def repository(self, repo_id: str, write: bool = False) -> Repository | None:
        """The repository, or None after a refusal was sent."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and self.token() not in (WRITER, READER)):
            known = self.token() in (WRITER, READER)
            return self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        if write and self.token() != WRITER:
            return self.refuse(403 if self.token() == READER else 401, "", "You may not write here")
        return repository

    def serve_object(self, oid: str, body: bytes, fault: str) -> None:
        if self.command == "PUT":
            if large_hash(body) != oid:
                return self.refuse(400, text="wrong content")
            self.hub.objects[oid] = body
            return self.reply(200)
        content = self.hub.objects[oid]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            start = int(asked[1])
            span = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            return self.reply(206, {"ETag": f'"{oid}"', **span}, content[start:], fault)
        self.reply(200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"}, content, fault)

    def resolve(self, repo_id: str, revision: str, filename: str, fault: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return
        files = repository.files(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        commit = {"X-Repo-Commit": repository.refs.get(revision, revision)}
        if filename not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit["X-Repo-Commit"])
        content = files[filename]
        if filename.endswith(LARGE):
            oid = large_hash(content)
            self.hub.objects[oid] = content
            linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return self.reply(302, {**commit, **linked, "Location": f"{self.hub.content}/objects/{oid}"})
        etag = small_hash(content)
        size = {"Content-Length": str(len(content))}
        self.reply(200, {**commit, **size, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}, content, fault)

    def api(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if path == "/api/validate-yaml":
            return self.reply_json({"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self.reply_json({"name": "me"}) if self.token() else self.refuse(401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo_id = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            if self.token() != WRITER:
                return self.refuse(403 if self.token() == READER else 401, text="You may not create this")
            status = 409 if repo_id in self.hub.repositories else 200
            if status == 200:
                private = asked.get("private") or asked.get("visibility") == "private"
                self.hub.repositories[repo_id] = Repository(bool(private))
                self.hub.add(repo_id, {".gitattributes": b""})
            return self.reply_json({"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id}, status)
        if path.startswith("/api/collections"):
            return self.collection(path.removeprefix("/api/collections").strip("/"), query, body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            for entry in objects:
                if entry["oid"] not in self.hub.objects:
                    href = f"{self.hub.content}/objects/{entry['oid']}"
                    entry["actions"] = {"upload": {"href": href}}
            return self.reply_json({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|preupload|commit|branch)/(.+))?", path):
            return self.models(found[1], found[2] or "revision", found[3] or "main", query, body)
        self.refuse(404, text=f"no such address: {path}")

    def collection(self, slug: str, query: dict[str, list[str]], body: bytes) -> None:
        known = self.hub.collections
        if self.command == "POST" and self.token() != WRITER:
            return self.refuse(403 if self.token() == READER else 401, text="You may not write here")
        if slug.endswith("/items"):
            items = known[slug.removesuffix("/items")]["items"]
            asked = json.loads(body)["item"]
            if asked["id"] in [item["id"] for item in items]:
                return self.refuse(409, text="exists")
            items.append({"_id": f"{len(items):024}", **asked, "position": len(items)})
            return self.reply_json(known[slug.removesuffix("/items")])
        if self.command == "POST":
            asked = json.loads(body)
            slug = f"{asked['namespace']}/{asked['title'].lower()}-{len(known):024}"
            about = {"owner": {"name": asked["namespace"]}, "lastUpdated": "2026-01-01T00:00:00.000Z", "theme": "blue"}
            known[slug] = {**asked, "slug": slug, "items": [], "position": 0, "upvotes": 0, **about}
        if slug:
            return self.reply_json(known[slug]) if slug in known else self.refuse(404)
        mine = [c for c in known.values() if c["namespace"] in query["owner"]]
        listed = [{**c, "items": c["items"][:4]} for c in mine]
        self.reply_json([{key: value for key, value in c.items() if key != "position"} for c in listed])

    def models(self, repo_id: str, what: str, revision: str, query: dict[str, list[str]], body: bytes) -> None:
        repository = self.repository(repo_id, write=what in ("commit", "branch"))
        if repository is None:
            return
        if what == "branch":
            if revision in repository.refs:
                return self.refuse(409, text="exists")
            repository.refs[revision] = repository.refs["main"]
            return self.reply_json({})
        files = repository.files(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha = repository.refs.get(revision, revision)
        if what == "revision":
            siblings: list[dict[str, Any]] = [{"rfilename": name} for name in files]
            for entry, content in zip(siblings, files.values(), strict=True) if query.get("blobs") else ():
                entry |= {"size": len(content), "blobId": small_hash(content)}
                if entry["rfilename"].endswith(LARGE):
                    entry["lfs"] = {"sha256": large_hash(content), "size": len(content), "pointerSize": 130}
            return self.reply_json({"id": repo_id, "sha": sha, "siblings": siblings})
        if what == "preupload":
            asked = [entry["path"] for entry in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in asked}
            return self.reply_json(
                {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
            )
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, sha):
            return self.refuse(412, text="A commit has happened since. Please refresh and try again.")
        content = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                content[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content[value["path"]] = self.hub.objects[value["oid"]]
        answer = {"commitUrl": "", "success": True}
        if query.get("create_pr"):
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            repository.refs[f"refs/pr/{number}"] = sha
            revision = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        oid = repository.commit(revision, content, header["summary"])
        self.reply_json({**answer, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"})


@contextmanager
def serving(handler: Any) -> Iterator[ThreadingHTTPServer]:
    """A server of such requests on this machine while the block lasts."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        try:
            yield server
        finally:
            server.shutdown()


@contextmanager
def serve() -> Iterator[Hub]:
    """A server on this machine while the block lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with serving(handler) as server:
        server.handle_error = lambda *_: None  # type: ignore[method-assign] - clients hang up
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        hub.content = f"http://localhost:{server.server_port}"
        try:
            yield hub
        finally:
            hub.released.set()


def run_client(code: str, home: Path, endpoint: str, **environment: str) -> list[str]:
    """The lines that code prints in a new process: huggingface_hub reads its environment when it is imported."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    process = finish([sys.executable, "-c", code], env={**ours, **settings, **environment}, timeout=600)
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines()
