"""A package index on 127.0.0.1 for tests: real sockets, real files, and the ways in which networks fail."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from clbench.index import PinnedFile


@dataclass
class IndexServer:
    """What the server has, how it misbehaves, and what it was asked for.

    ``failures``: path -> statuses of its next answers; 0 closes the connection without an answer.
    ``truncate``: file name -> how many of its next answers end halfway.
    """

    endpoint: str = ""
    pep691: bool = False
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    failures: dict[str, list[int]] = field(default_factory=dict)
    truncate: dict[str, int] = field(default_factory=dict)
    declare_length: bool = True
    retry_after: str | None = None
    uploaded: dict[str, tuple[str, str]] = field(default_factory=dict)
    """File name -> version and day of upload, for the index's JSON about projects."""
    asked: Counter[str] = field(default_factory=Counter)

    def add(self, project: str, filename: str, data: bytes) -> PinnedFile:
        """Offer a file and return its pin."""
        self.files[filename] = (project, data)
        digest = hashlib.sha256(data).hexdigest()
        return PinnedFile(project=project, filename=filename, sha256=digest, n_bytes=len(data))

    def page(self, project: str) -> tuple[str, bytes] | None:
        """Return the content type and bytes of a project's page."""
        names = [name for name, (owner, _) in self.files.items() if owner == project]
        if not names:
            return None
        if self.pep691:
            listed = [{"filename": n, "url": f"/files/{n}", "hashes": {}} for n in names]
            page = {"meta": {"api-version": "1.0"}, "name": project, "files": listed}
            return "application/vnd.pypi.simple.v1+json", json.dumps(page).encode()
        links = "".join(f'<a href="/files/{n}">{n}</a><br>' for n in names)
        return "text/html", f"<!DOCTYPE html><html><body>{links}</body></html>".encode()

    def about(self, project: str) -> tuple[str, bytes] | None:
        """Return the content type and bytes of the JSON about a project."""
        releases: dict[str, list[dict[str, object]]] = {}
        for name, (owner, data) in self.files.items():
            if owner == project and name in self.uploaded:
                version, day = self.uploaded[name]
                digests = {"sha256": hashlib.sha256(data).hexdigest()}
                file = {"filename": name, "packagetype": "sdist", "size": len(data), "digests": digests}
                releases.setdefault(version, []).append({**file, "upload_time": f"{day}T12:00:00"})
        return ("application/json", json.dumps({"releases": releases}).encode()) if releases else None


@contextmanager
def index_server() -> Iterator[IndexServer]:
    """Run a server on a free port until the block ends."""
    state = IndexServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked[self.path] += 1
            if waiting := state.failures.get(self.path):
                return self.fail(waiting.pop(0))
            kind, _, name = self.path.strip("/").partition("/")
            pages = {"simple": state.page, "pypi": state.about}
            if kind in pages and (page := pages[kind](name.removesuffix("/json"))):
                self.answer(*page)
            elif kind == "files" and name in state.files:
                self.answer("application/octet-stream", state.files[name][1], name)
            else:
                self.fail(404)

        def fail(self, status: int) -> None:
            if status == 0:
                self.close_connection = True
                return
            self.send_response(status)
            if state.retry_after:
                self.send_header("Retry-After", state.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, content_type: str, data: bytes, name: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            if state.declare_length:
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if state.truncate.get(name, 0):
                state.truncate[name] -= 1
                data = data[: len(data) // 2]
            self.wfile.write(data)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.endpoint = f"http://127.0.0.1:{server.server_port}/simple/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
