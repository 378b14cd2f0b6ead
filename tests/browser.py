"""A headless Chromium, driven by its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from urllib.request import Request, urlopen

from websockets.sync.client import connect


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
SWITCHES += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]


class Browser:
    """A page of a browser, as a context; what it asks for and complains of is kept.

    Args:
        width, height (`int`): of the window, in pixels.
    """

    def __init__(self, width=1200, height=900):
        self.size = width, height
        self.requests, self.complaints = [], []

    def __enter__(self):
        with ExitStack() as opened:
            folder = opened.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
            command = [CHROMIUM, *SWITCHES, f"--user-data-dir={folder}", "about:blank"]
            process = opened.enter_context(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
            opened.callback(process.terminate)
            line = next(line for line in process.stderr if line.startswith("DevTools listening on "))
            with urlopen(Request(f"http://{line.split('/')[2]}/json/new", method="PUT")) as answer:
                address = json.load(answer)["webSocketDebuggerUrl"]
            self.socket = opened.enter_context(connect(address, max_size=None))
            self.opened = opened.pop_all()
        self.number = 0
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")
        self.resize(*self.size)
        return self

    def __exit__(self, *_):
        self.opened.close()

    def call(self, method, **params):
        """Calls a method of the protocol, and notes the events that come before its result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._note(message.get("method"), message.get("params", {}))

    def _note(self, event, params):
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.complaints.append(str(params["args"]))
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def resize(self, width, height):
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, script):
        """What a line of JavaScript gives."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script, seconds=60):
        """Waits until a line of JavaScript gives something true."""
        end = time.monotonic() + seconds
        while not self.run(f"!!({script})"):
            assert time.monotonic() < end, (
                f"{script} did not come; the page says: {self.run('document.body.innerText')}"
            )
            time.sleep(0.1)

    def click(self, selector):
        """A click of the mouse in the middle of an element."""
        element = f"document.querySelector({selector!r})"
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def write(self, selector, text):
        """Replaces the text of a field."""
        self.click(selector)
        self.run(f"document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text) if text else self.key("Backspace")

    def key(self, name):
        codes = {"Backspace": 8, "Enter": 13}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, windowsVirtualKeyCode=codes[name])

    def choose_files(self, selector, *paths):
        """What a person chooses in the dialogue of a file field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def screenshot(self, path):
        """The whole page as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
