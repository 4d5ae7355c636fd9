"""A storage service on localhost for tests: gcp-storage-emulator, with faults and with what it lacks of the real one.

    python tests/bucket_server.py FOLDER     # keeps its bucket, gs://bucket, in FOLDER, and prints its address

Of the real service it lacks threads, conditions on an object's generation, by which locks are taken and which
tensorstore relies on, the header that says the generation of what is downloaded, and that nothing is stored of an
upload whose client is gone. They are added here. A JSON object PUT to /faults names the faults of the requests that
follow:

    {"status": 503, "times": 3}            the next three requests are answered with this status
    {"status": 403, "path": "metrics"}     requests whose line has this text in it, until other faults are set
    {"drop": true, "times": 1}             the connection is closed without an answer
    {"seconds": 2.0}                       the second half of the request is read late, and so the answer comes late
    {"method": "POST"}                     only requests of this method
    {"every": 100, "kinds": [...]}         every hundredth request has one of these faults, in turn

GET /faults answers how many requests with the fault were read by half ("begun"), and how many of them are over
("ended").
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
            self.fault, self.left, self.requests = fault, fault.get("times", 10**9) if fault else 0, 0
            self.met = {"begun": 0, "ended": 0}

    def note(self, what: str) -> None:
        with self.lock:
            self.met[what] += 1

    def of(self, method: str, path: str) -> dict:
        """Returns the fault of a request, {} where it has none."""
        with self.lock:
            self.requests += 1
            if every := self.fault.get("every"):
                turn, rest = divmod(self.requests, every)
                return {} if rest else self.fault["kinds"][turn % len(self.fault["kinds"])]
            fits = self.fault.get("method", method) == method and self.fault.get("path", "") in unquote(path)
            if not self.left or not fits:
                return {}
            self.left -= 1
            return self.fault


class Objects(Storage):
    """The emulator's storage without what makes each request take longer than the last: a file of all that there is,
    written anew with every object, and deleted objects that are kept."""

    def _write_config_to_file(self) -> None:
        pass

    def _bucket_soft_delete_retention_seconds(self, bucket_name: str) -> int:
        return 0


class Service(server.ThreadingHTTPServer):
    request_queue_size = 128  # connections that wait: a checkpoint opens dozens at once, and 5 is the default


class Handler(RequestHandler):
    """Answers one request after another: the emulator's storage is not made for threads."""

    storage_lock = threading.Lock()
    faults = Faults()

    def __init__(self, storage, *args):
        self._objects, self._generation = storage, None
        super().__init__(storage, *args)

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            self.close_connection = True

    def _answer(self, method: str) -> None:
        if self.path == "/faults":
            if method == "GET":
                return self._json(200, self.faults.met)
            self.faults.set(json.loads(self.rfile.read(self._length)))
            return self._status(200)
        fault = self.faults.of(method, self.path)
        try:
            return self._answer_with(fault, method)
        finally:
            if fault:
                self.faults.note("ended")

    def _answer_with(self, fault: dict, method: str) -> None:
        body = self.rfile.read(self._length // 2)
        if fault:
            self.faults.note("begun")
        time.sleep(fault.get("seconds", 0))
        body += self.rfile.read(self._length - len(body))
        if fault.get("drop") or len(body) < self._length:
            self.close_connection = True
            return None
        if status := fault.get("status"):
            return self._status(status)
        if body:
            self.rfile = _Again(body)
        with self.storage_lock:
            if status := self._refusal(method, body):
                return self._status(status)
            getattr(super(), f"do_{method}")()
        return None

    @property
    def _length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def _refusal(self, method: str, body: bytes) -> int:
        """Returns 412 or 304 where the generation of the object is not that of the request's condition, else 0."""
        url = urlparse(self.path)
        query = parse_qs(url.query)
        self._generation = None  # of what is downloaded
        matches, differs = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
        if not (matches or differs or method == "GET"):
            return 0
        if "name" in query:
            name = query["name"][0]
        elif method == "POST" and not url.path.partition("/o/")[2]:  # it is in the body
            name = json.loads(body[body.index(b"{") : body.index(b"}") + 1])["name"]
        else:
            name = unquote(url.path.partition("/o/")[2])
        generation = self._objects.objects.get(BUCKET, {}).get(name, {}).get("generation", "0")
        if "upload_id" not in query and matches and matches[0] != generation:
            return 412
        if differs and differs[0] == generation:
            return 304
        if query.get("alt") == ["media"] and generation != "0":
            self._generation = generation
        return 0

    def end_headers(self):
        if self._generation:
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    def _status(self, status: int) -> None:
        self._json(status, {"error": {"code": status, "message": "refused"}})

    def _json(self, status: int, content: dict) -> None:
        body = b"" if status == 304 else json.dumps(content).encode()
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
    storage = Objects(data_dir=sys.argv[1])
    if BUCKET not in storage.buckets:
        buckets.create_bucket(BUCKET, storage)
    service = Service(("localhost", 0), partial(Handler, storage))
    print(f"http://localhost:{service.server_port}", flush=True)
    service.serve_forever()


if __name__ == "__main__":
    main()
