"""A headless Chromium, spoken to in its own protocol over a pipe: no driver, no port.

https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import json
import os
import shutil
import subprocess
from itertools import count
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
CHROMIUM = CHROMIUM or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-extensions --disable-background-networking --disable-component-update "
    "--hide-scrollbars --remote-debugging-pipe about:blank"
).split()
PATIENCE = 120  # seconds for an answer, on a machine that has much else to do


class Browser:
    """One tab. ``complaints`` are the console's errors and exceptions, ``asked`` its requests."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        line = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self.process = subprocess.Popen(
            ["bash", "-c", line, CHROMIUM, f"--user-data-dir={profile}", *FLAGS],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.numbers, self.rest = count(1), b""
        self.session: str | None = None
        self.complaints: list[str] = []
        self.asked: list[str] = []
        [tab] = [t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=tab["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params):
        """One command; its result."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self.rest:
            piece = os.read(self.into, 1 << 20)
            assert piece, "the browser has gone"
            self.rest += piece
        raw, _, self.rest = self.rest.partition(b"\0")
        said = json.loads(raw)
        match said.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(said["params"]["exceptionDetails"]))
            case "Log.entryAdded" | "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(said["params"]))
            case "Network.requestWillBeSent":
                self.asked.append(said["params"]["request"]["url"])
        return said

    def open(self, path: Path) -> None:
        """Show a file, until it says that it is no longer busy."""
        self.complaints, self.asked = [], []
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.js(
            "new Promise(done => { const look = () => "
            "document.querySelector('main')?.getAttribute('aria-busy') === 'false'"
            " ? done() : setTimeout(look, 20); look(); })"
        )

    def js(self, code: str):
        """What an expression comes to, in the page."""
        said = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def click(self, selector: str) -> None:
        """The middle of an element's first line, as a mouse does it."""
        x, y = self.js(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getClientRects()[0];"
            f" return [r.left + r.width / 2, r.top + r.height / 2] }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def colours(self, scheme: str) -> None:
        """Prefer light or dark."""
        wish = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=wish)

    def screenshot(self, width: int, height: int) -> bytes:
        """A PNG of the window."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self.into)
        os.close(self.out)
