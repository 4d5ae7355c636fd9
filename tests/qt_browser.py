"""Qt's Chromium as a program that is driven over a DevTools pipe, where no browser is installed; see `chromium`.

Qt has a DevTools port but no pipe, so messages go between file descriptors 3 and 4 and the port's socket of one page.
What asks for the page is answered here, because the page is there from the start.
"""

import json
import os
import socket
import sys
import threading
import time
import urllib.request

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]
os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_REMOTE_DEBUGGING"] = f"127.0.0.1:{PORT}"
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu --disable-dev-shm-usage --remote-allow-origins=*"

from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication
from websockets.sync.client import connect

if "--check" in sys.argv:  # everything is there
    sys.exit()

MADE = {"Target.createTarget": {"targetId": "page"}, "Target.attachToTarget": {"sessionId": "page"}}


def page_socket() -> str:
    """Returns the address of the page's socket, once Qt listens."""
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/json") as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
        except OSError:
            pages = []
        if pages:
            return pages[0]["webSocketDebuggerUrl"]
        time.sleep(0.05)


def write(message: str) -> None:
    data = message.encode() + b"\0"
    while data:
        data = data[os.write(4, data) :]


def serve() -> None:
    """Carries messages in both directions until the browser is closed or the pipe ends."""
    buffer = b""
    with connect(page_socket(), max_size=None) as page:
        threading.Thread(target=lambda: [write(message) for message in page], daemon=True).start()
        while data := os.read(3, 1 << 20):
            *messages, buffer = (buffer + data).split(b"\0")
            for message in map(json.loads, messages):
                message.pop("sessionId", None)
                if message["method"] == "Browser.close":
                    write(json.dumps({"id": message["id"], "result": {}}))
                    os._exit(0)
                if message["method"] in MADE:
                    write(json.dumps({"id": message["id"], "result": MADE[message["method"]]}))
                else:
                    page.send(json.dumps(message))
    os._exit(0)


application = QApplication(sys.argv[:1])
view = QWebEngineView()
view.setHtml("")
view.show()
threading.Thread(target=serve, daemon=True).start()
sys.exit(application.exec())
