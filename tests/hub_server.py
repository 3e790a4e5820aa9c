"""The part of the Hub's HTTP interface that downloads need, served from a folder: `OWNER/NAME/FILE`."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (endpoint, requests so far); files are found below `root`, on the branches `main` and `v2`."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            parts = self.path.partition("?")[0].strip("/").split("/")
            if len(parts) != 5 or parts[2] != "resolve":
                return self._reply(404, {"X-Error-Code": "RepoNotFound"}, json.dumps({"error": "no"}).encode())
            owner, name, _, revision, filename = parts
            file = root / owner / name / filename
            if not file.parent.is_dir():
                return self._reply(404, {"X-Error-Code": "RepoNotFound"})
            if revision not in ("main", "v2", COMMIT):
                return self._reply(404, {"X-Error-Code": "RevisionNotFound"})
            if not file.is_file():
                return self._reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            body = file.read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            self._reply(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, body)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
