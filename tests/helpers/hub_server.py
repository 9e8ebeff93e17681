"""A hub on this machine: a real HTTP server that speaks what a download needs of the protocol.

Repositories are given as {"models/org/name": {"main": commit, commit: {file: bytes}}}. What is
asked for is kept in `asked`. Names make trouble: a repository called `gated` wants an accepted
licence, `private` a token, `slow` waits before each file, `broken` breaks off in the middle of a
file the first time, `down` answers 503.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_secretsecretsecretsecret"


class Hub:
    """The server; `url` is what HF_ENDPOINT is set to."""

    def __init__(self, repositories: dict[str, dict[str, Any]]):
        self.repositories, self.asked, self.broken = repositories, [], set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {m[1] for x in self.asked if (m := re.search(r"^GET .*/resolve/[^/]+/(.+)$", x))}

    def answer(self, ask: BaseHTTPRequestHandler, body: bool) -> None:
        path = ask.path.partition("?")[0]
        self.asked.append(f"{ask.command} {path}")
        api = re.fullmatch(r"/api/(models|datasets)/([\w-]+/[\w-]+)(?:/(revision|tree)/([\w.-]+))?",
                           path)
        get = re.fullmatch(r"/(datasets/)?([\w-]+/[\w-]+)/resolve/([\w.-]+)/(.+)", path)
        if not (api or get):
            return self.send(ask, 404, b"")
        if api:
            kind, name, revision = api[1], api[2], api[4] or "main"
        else:
            kind, name, revision = "datasets" if get[1] else "models", get[2], get[3]
        repository = self.repositories.get(f"{kind}/{name}")
        allowed = ask.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name.endswith("/down"):
            return self.send(ask, 503, b"")
        if repository is None or (name.endswith("/private") and not allowed):
            return self.send(ask, 401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = repository.get(revision, revision)
        if type(commit) is not str or commit not in repository:
            commit = revision
        if type(repository.get(commit)) is not dict:
            return self.send(ask, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository[commit]
        if api:
            listed = [{"type": "file", "path": k, "size": len(v), "oid": blob(v)}
                      for k, v in files.items()]
            listing = listed if api[3] == "tree" else {
                "id": name, "sha": commit, "siblings": [{"rfilename": k} for k in files],
                "private": False, "gated": False, "downloads": 0, "likes": 0, "tags": []}
            return self.send(ask, 200, json.dumps(listing).encode(),
                             {"Content-Type": "application/json"})
        if name.endswith("/gated"):
            return self.send(ask, 403, b"", {"X-Error-Code": "GatedRepo"})
        if get[4] not in files:
            return self.send(ask, 404, b"", {"X-Error-Code": "EntryNotFound"})
        data, headers = files[get[4]], {"X-Repo-Commit": commit, "ETag": f'"{blob(files[get[4]])}"'}
        if name.endswith("/slow"):
            time.sleep(0.5)
        begin = int((ask.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cut = name.endswith("/broken") and body and len(data) > 1000 and get[4] not in self.broken
        if cut:
            self.broken.add(get[4])
        self.send(ask, 206 if begin else 200, data[begin:], headers, body, cut)

    def send(self, ask: BaseHTTPRequestHandler, status: int, data: bytes,
             headers: dict[str, str] | None = None, body: bool = True, cut: bool = False) -> None:
        ask.send_response(status)
        for k, v in {**(headers or {}), "Content-Length": str(len(data))}.items():
            ask.send_header(k, v)
        ask.end_headers()
        if body:
            ask.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            ask.close_connection = True


def blob(data: bytes) -> str:
    """A file's id, as git makes it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
