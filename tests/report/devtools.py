"""Chromium through its DevTools pipe: real key presses, computed styles, media, and the tree of a screen reader."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.report.browser import OPTIONS, executable

KEYS = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class Browser:
    """One page in a running browser."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._number, self._waiting, self._session = 0, b"", None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __call__(self, method: str, **params: Any) -> Any:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> Any:
        while b"\0" not in self._waiting:
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has gone"
            self._waiting += part
        first, _, self._waiting = self._waiting.partition(b"\0")
        return json.loads(first)

    def open(self, page: Path, fragment: str = "", *, width: int = 1400, height: int = 1000) -> None:
        """Load a page and wait until its script ran."""
        self("Emulation.setFocusEmulationEnabled", enabled=True)
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=page.resolve().as_uri() + (f"#{fragment}" if fragment else ""))
        self.wait()

    def wait(self) -> None:
        """Wait until the page's script ran."""
        self.until("Boolean(document.documentElement?.dataset.ready)")

    def until(self, condition: str, seconds: float = 30) -> None:
        """Wait until an expression on the page is true."""
        end = time.monotonic() + seconds
        while not self.js(condition):
            assert time.monotonic() < end, f"`{condition}` did not become true"
            time.sleep(0.02)

    def media(self, **features: str) -> None:
        """Emulate media features, written with underscores, or `media="print"`."""
        kind = features.pop("media", "")
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self("Emulation.setEmulatedMedia", media=kind, features=named)

    def js(self, expression: str) -> Any:
        """Return the value of an expression on the page."""
        found = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key."""
        code: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
        text = {"text": "\r"} if key == "Enter" else {}
        self("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        self("Input.dispatchKeyEvent", type="keyUp", **code)

    def type(self, text: str) -> None:
        """Type into the focused field."""
        self("Input.insertText", text=text)

    def reader(self) -> list[tuple[str, str]]:
        """Return role and name of everything that a screen reader is told of, in its order."""
        nodes = self("Accessibility.getFullAXTree")["nodes"]
        return [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")]

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """Write a picture of the window, or of the whole page."""
        data = self("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def browser() -> Iterator[Browser]:
    """Start a browser; it ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        to_read, write = os.pipe()
        read, to_write = os.pipe()
        options = [one for one in OPTIONS if "virtual-time" not in one]
        command = [executable(), *options, "--remote-debugging-pipe", f"--user-data-dir={profile}"]

        def place() -> None:  # the pipe is to be at the descriptors 3 and 4
            os.dup2(os.dup(to_read), 3)
            os.dup2(os.dup(to_write), 4)

        environment = {**os.environ, "HOME": profile}
        process = subprocess.Popen(
            command,
            preexec_fn=place,
            close_fds=False,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        try:
            yield Browser(write, read)
        finally:
            process.terminate()
            process.wait(30)
            os.close(write)
            os.close(read)
