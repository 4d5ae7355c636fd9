"""A stand-in of the Hugging Face hub's HTTP API on localhost: making, reading and committing to a repository."""

import base64
import contextlib
import http.server
import json
import threading
from urllib.parse import unquote, urlparse


class Hub:
    """The repositories by name, each with `private` and `files` (bytes by path); what was asked; what it refuses."""

    def __init__(self):
        self.repositories = {}
        self.requests = []  # (method, path, authorization)
        self.refused = {}  # status by what the path ends with
        self.url = ""


@contextlib.contextmanager
def serving(monkeypatch, token="hf_secret_token"):
    """Runs a Hub, and points huggingface_hub to it with `token`; None for none."""
    from huggingface_hub import constants

    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        for end, status in self.hub.refused.items():
            if path.endswith(end):
                return self._send(status, {"error": f"refused {self.headers.get('Authorization')}"})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if "/resolve/main/" in path:
            name, _, file = path[1:].partition("/resolve/main/")
            return self._file(self.hub.repositories[name]["files"].get(file))
        name = path.removeprefix("/api/models/").partition("/preupload")[0]
        name = name.partition("/commit/main")[0]
        if path.endswith("/preupload/main"):
            asked = json.loads(body)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return self._send(200, {"files": files})
        if path.endswith("/commit/main"):
            return self._commit(name, body)
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if "/tree/" in path:
            files = self.hub.repositories[name.partition("/tree/")[0]]["files"]
            return self._send(200, [{"type": "file", "path": x, "size": 1, "oid": "b" * 40} for x in files])
        if name in self.hub.repositories:
            repository = self.hub.repositories[name]
            files = [{"rfilename": file} for file in repository["files"]]
            about = {"id": name, "sha": "c" * 40, "tags": [], "downloads": 0, "likes": 0}
            return self._send(200, about | {"private": repository["private"], "siblings": files})
        return self._send(404, {"error": f"nothing at {path}"})

    def _create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            return self._send(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        self.hub.repositories[name] = {"private": asked["visibility"] == "private", "files": {".gitattributes": b""}}
        return self._send(200, {"url": f"{self.hub.url}/{name}"})

    def _commit(self, name, body):
        files = self.hub.repositories[name]["files"]
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            if line["key"] == "deletedFile":
                files.pop(line["value"]["path"])
        return self._send(200, {"commitOid": "a" * 40, "commitUrl": f"{self.hub.url}/{name}/commit/{'a' * 40}"})

    def _file(self, content):
        if content is None:
            return self._send(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
        return self._send(200, content, {"ETag": f'"{hash(content)}"', "X-Repo-Commit": "c" * 40})

    def _send(self, status, answer, headers=None):
        out = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(out))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(out)

    do_GET = do_HEAD = do_POST = _answer

    def log_message(self, *_):
        pass
