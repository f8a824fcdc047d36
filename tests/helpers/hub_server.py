"""A small stand-in for the Hugging Face Hub on the loopback device: enough of its HTTP interface to
create, push to and download models."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """`repositories` maps "user/repo" to its files; `requests` lists what was asked, "METHOD
    path"."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str) -> str:
        """Hash that stands for the repository's present files."""
        digest = hashlib.sha1(repository.encode())
        for path, content in sorted(self.repositories[repository].items()):
            digest.update(path.encode() + content)
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def reply(
        self, content: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        parts = self.parts()
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if parts == ["api", "repos", "create"]:
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.reply({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif parts == ["api", "validate-yaml"]:
            self.reply({"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = [file["path"] for file in json.loads(data)["files"]]
            self.reply(
                {
                    "files": [
                        {"path": path, "uploadMode": "regular", "shouldIgnore": False}
                        for path in files
                    ]
                }
            )
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            name = "/".join(parts[2:4])
            for line in map(json.loads, data.splitlines()):
                if line["key"] == "file":
                    self.server.repositories[name][line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
            commit = self.server.commit(name)
            self.reply(
                {
                    "success": True,
                    "commitOid": commit,
                    "commitUrl": f"{self.server.url}/{name}/commit/{commit}",
                }
            )
        else:
            self.reply({"error": "unknown"}, 404)

    def do_GET(self) -> None:
        parts = self.parts()
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api" and (len(parts) == 4 or parts[4] == "revision"):
            siblings = [{"rfilename": path} for path in sorted(files)]
            self.reply(
                {
                    "id": name,
                    "modelId": name,
                    "sha": self.server.commit(name),
                    "siblings": siblings,
                    "tags": [],
                    "private": False,
                }
            )
        elif parts[0] == "api" and parts[4] == "tree":
            blobs = {path: hashlib.sha1(content).hexdigest() for path, content in files.items()}
            self.reply(
                [
                    {"type": "file", "path": path, "oid": oid, "size": len(files[path])}
                    for path, oid in sorted(blobs.items())
                ]
            )
        elif parts[2] == "resolve" and (path := "/".join(parts[4:])) in files:
            tag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.reply(files[path], 200, {"ETag": tag, "X-Repo-Commit": self.server.commit(name)})
        else:
            self.reply(
                {"error": "Entry not found"},
                404,
                {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commit(name)},
            )

    do_HEAD = do_GET

    def parts(self) -> list[str]:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        return path.strip("/").split("/")


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub that answers until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
