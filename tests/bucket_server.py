"""A storage service on localhost for tests: gcp-storage-emulator, with faults and with what it lacks of the real one.

    python tests/bucket_server.py FOLDER     # keeps its bucket, gs://bucket, in FOLDER, and prints its address

Of the real service it lacks threads, and the condition ifGenerationMatch=0, "only where there is no such object". Both
are added here. A JSON object PUT to /faults names the faults of the requests that follow:

    {"status": 503, "times": 3}            the next three requests are answered with this status
    {"status": 403, "path": "metrics"}     requests whose line has this text in it, until other faults are set
    {"drop": true, "times": 1}             the connection is closed without an answer
    {"seconds": 2.0}                       the answer comes late
    {"method": "POST"}                     only requests of this method
"""

import json
import sys
import threading
import time
from functools import partial
from http import server
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class Faults:
    """The fault that is set, and how often it is to come."""

    def __init__(self):
        self.lock = threading.Lock()
        self.set({})

    def set(self, fault: dict) -> None:
        with self.lock:
            self.fault, self.left = fault, fault.get("times", 10**9) if fault else 0

    def of(self, method: str, path: str) -> dict:
        """Returns the fault of a request, {} where it has none."""
        with self.lock:
            fits = self.fault.get("method", method) == method and self.fault.get("path", "") in unquote(path)
            if not self.left or not fits:
                return {}
            self.left -= 1
            return self.fault


class Handler(RequestHandler):
    """Answers one request after another: the emulator's storage is not made for threads."""

    storage_lock = threading.Lock()
    faults = Faults()

    def __init__(self, storage, *args):
        self._objects = storage
        super().__init__(storage, *args)

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            self.close_connection = True

    def _answer(self, method: str) -> None:
        if self.path == "/faults":
            self.faults.set(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            return self._status(200)
        fault = self.faults.of(method, self.path)
        time.sleep(fault.get("seconds", 0))
        if fault.get("drop"):
            self.close_connection = True
            return None
        if status := fault.get("status"):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return self._status(status)
        with self.storage_lock:
            if self._exists_although_it_must_not():
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                return self._status(412)
            getattr(super(), f"do_{method}")()
        return None

    def _exists_although_it_must_not(self) -> bool:
        query = parse_qs(urlparse(self.path).query)
        if query.get("ifGenerationMatch") != ["0"] or "upload_id" in query:
            return False
        if "name" in query:
            name = query["name"][0]
        else:  # the name is in the body, which the emulator reads again
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.rfile = _Again(body)
            name = json.loads(body[body.index(b"{") : body.index(b"}") + 1])["name"]
        return name in self._objects.objects.get(BUCKET, {})

    def _status(self, status: int) -> None:
        body = json.dumps({"error": {"code": status, "message": f"fault {status}"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def do_DELETE(self):
        self._answer("DELETE")

    def do_PATCH(self):
        self._answer("PATCH")


class _Again:
    """A body that was read, to be read again."""

    def __init__(self, body: bytes):
        self._body = body

    def read(self, size: int) -> bytes:
        self._body, part = self._body[size:], self._body[:size]
        return part

    def close(self) -> None:
        pass


def main() -> None:
    storage = Storage(data_dir=sys.argv[1])
    if BUCKET not in storage.buckets:
        buckets.create_bucket(BUCKET, storage)
    service = server.ThreadingHTTPServer(("localhost", 0), partial(Handler, storage))
    print(f"http://localhost:{service.server_port}", flush=True)
    service.serve_forever()


if __name__ == "__main__":
    main()
