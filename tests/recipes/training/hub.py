"""A stand-in for the hub: who is logged in, repositories, uploads; what it is sent it keeps in memory."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USER = {
    "name": "me", "type": "user", "orgs": [],
    "auth": {"type": "access_token", "accessToken": {"displayName": "a token", "role": "write"}},
}  # fmt: skip


class Hub(ThreadingHTTPServer):
    """`repositories`: of each, what was committed: (message, {path: content})."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.unknown: list[str] = []  # requests that it has no answer to
        self.refuses = False  # what is committed

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def hub():
    """One that answers."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Asked(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._say({"/api/whoami-v2": USER}.get(self.path))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind, *place = self.path.removeprefix("/api/").split("/")
        if kind == "repos":
            name = f"me/{json.loads(body)['name']}"
            self.server.repositories.setdefault(name, [])
            self._say({"url": f"{self.server.address}/{name}", "name": name, "id": name})
        elif kind == "validate-yaml":
            self._say({"errors": [], "warnings": []})
        elif kind == "models" and place[2] == "preupload":
            files = json.loads(body)["files"]
            answer = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._say({"files": [{"path": file["path"], **answer} for file in files]})
        elif kind == "models" and place[2] == "commit" and self.server.refuses:
            self._say({"error": "its storage is full"}, 403)
        elif kind == "models" and place[2] == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            message = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            name, files = "/".join(place[:2]), {}
            for line in lines:
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commits = self.server.repositories[name]
            commits.append((message, files))
            oid = f"{len(commits):040d}"
            self._say({"commitUrl": f"{self.server.address}/{name}/commit/{oid}", "commitOid": oid})
        else:
            self._say(None)

    def _say(self, answer: Any, status: int = 200) -> None:
        if answer is None:
            self.server.unknown.append(f"{self.command} {self.path}")
            status = 404
        text = json.dumps(answer or {"error": "not found"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
