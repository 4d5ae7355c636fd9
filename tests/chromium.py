"""A headless Chromium for tests of pages, driven over its DevTools pipe.

`browser()` finds Debian's or Google's browser, or else Qt's (the extra `pages`), or None. Messages are JSON ended by a
NUL byte, written to the browser's file descriptor 3 and read from its 4 (--remote-debugging-pipe).
"""

import base64
import contextlib
import functools
import importlib.util
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# --no-sandbox: in a container there is mostly no user namespace for it. The rest keeps the browser off the network.
ARGUMENTS = """
    --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-extensions
    --disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe
"""
# Descriptors 3 and 4 must be the pipe's ends; a preexec_fn would fork a process that may have threads.
START = """
import os, sys
read, write = map(os.dup, map(int, sys.argv[1:3]))
os.dup2(read, 3)
os.dup2(write, 4)
os.set_inheritable(3, True)  # which dup2 leaves as it was where it has nothing to do
os.set_inheritable(4, True)
os.execvp(sys.argv[3], sys.argv[3:])
"""


@functools.cache
def browser() -> list[str] | None:
    """Returns the command that starts a browser, without its arguments."""
    if path := next((path for path in map(shutil.which, NAMES) if path), None):
        return [path]
    qt = [sys.executable, str(Path(__file__).with_name("qt_browser.py"))]
    if not all(map(importlib.util.find_spec, ("PySide6", "websockets"))):
        return None
    # It may lack its part with the browser, or a library of the system.
    return qt if subprocess.run([*qt, "--check"], capture_output=True).returncode == 0 else None


class Page:
    """One tab. `errors` are exceptions and console errors, `requests` the addresses that were asked for."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._buffer = read, write, b""
        self._id, self._session = 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []

    def attach(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, timeout: float = 60, **params: object) -> dict:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + timeout
        while True:
            answer = self._next(until, method)
            if answer.get("id") == self._id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._event(answer)

    def _next(self, until: float, waiting_for: str) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0, until - time.monotonic()))
            assert ready, f"{waiting_for}: no answer in time"
            data = os.read(self._read, 1 << 20)
            assert data, f"{waiting_for}: the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _event(self, event: dict) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(params["entry"]))
        elif method == "Page.javascriptDialogOpening":
            self.errors.append("a dialog opened")

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def run(self, script: str) -> object:
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str, timeout: float = 60) -> None:
        """Returns when a JavaScript expression is true."""
        until = time.monotonic() + timeout
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < until, f"never became true: {condition}"
            time.sleep(0.02)

    def look(self, width: int, height: int, dark: bool = False) -> None:
        """Sets the size of the window and the wish for light or dark."""
        mobile = width < 700
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, whole: bool = False) -> None:
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def opened(profile: Path) -> Iterator[Page]:
    """A page in a browser with this folder as its profile; the browser ends with the context."""
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    command = [sys.executable, "-c", START, str(to_read), str(from_write), *browser(), *ARGUMENTS.split()]
    command.append(f"--user-data-dir={profile}")
    with open(profile.with_suffix(".log"), "wb") as log:
        pipe = (to_read, from_write)
        process = subprocess.Popen(command, pass_fds=pipe, stdout=log, stderr=log, start_new_session=True)
    os.close(to_read)
    os.close(from_write)
    try:
        page = Page(from_read, to_write)
        page.attach()
        yield page
        page._session = None
        page.call("Browser.close")
        process.wait(timeout=20)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(to_write)
        os.close(from_read)
