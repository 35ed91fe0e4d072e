"""A headless Chromium, driven through pipes by the DevTools protocol: no driver, no port, nothing else to install."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
REPORT_READY = "document.documentElement?.dataset.ready === 'yes'"
_FLAGS = (
    "--headless",
    "--no-sandbox",  # root in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# The protocol wants descriptors 3 and 4; a wrapper moves them there, so that this process needs no fork of its own.
_MOVE = (
    "import os, sys\n"
    "high = [os.dup(os.dup(os.dup(int(fd)))) for fd in sys.argv[1:3]]\n"
    "high = [os.dup2(fd, 60 + i) for i, fd in enumerate(high)]\n"
    "os.dup2(high[0], 3), os.dup2(high[1], 4)\n"
    "os.execvp(sys.argv[3], sys.argv[3:])\n"
)


def find_browser() -> str | None:
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page. ``problems``: errors on the console; ``requests``: all that left the page."""

    def __init__(self) -> None:
        program = find_browser()
        assert program is not None, f"none of {', '.join(BROWSERS)} on PATH"
        self._folder = tempfile.TemporaryDirectory(prefix="fastfs-browser-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name, "log.txt")
        child_in, self._out = os.pipe()
        self._in, child_out = os.pipe()
        command = [program, *_FLAGS, f"--user-data-dir={self._folder.name}/profile", "about:blank"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _MOVE, str(child_in), str(child_out), *command],
                pass_fds=(child_in, child_out),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        os.close(child_in)
        os.close(child_out)
        self._ids = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self.problems: list[str] = []
        self.requests: list[str] = []
        try:
            target = self.call("Target.createTarget", url="about:blank", timeout=60)["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        try:
            self._process.wait(10)  # it ends when its pipe does
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        self._folder.cleanup()

    def call(self, method: str, *, timeout: float = 60, **parameters: Any) -> dict[str, Any]:
        number = next(self._ids)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + timeout
        while True:
            answer = self._read(end)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _read(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise TimeoutError(f"no answer of the browser: {self._log.read_text(errors='replace')[-2000:]}")
            chunk = os.read(self._in, 1 << 20)
            if not chunk:
                raise RuntimeError(f"the browser ended: {self._log.read_text(errors='replace')[-2000:]}")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, about: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description") or details["text"])
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.problems.append(
                f"{about['type']}: {[arg.get('value', arg.get('description')) for arg in about['args']]}"
            )
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{about['entry']['source']}: {about['entry']['text']}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])

    def evaluate(self, script: str, timeout: float = 60) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, timeout=timeout
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, timeout: float = 60) -> None:
        end = time.monotonic() + timeout
        while not self.evaluate(script):
            assert time.monotonic() < end, f"still not true after {timeout} s: {script}"
            time.sleep(0.05)

    def size(self, width: int, height: int, *, dark: bool = False, mobile: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path, timeout: float = 90, *, ready: str = REPORT_READY) -> float:
        """Load a page; seconds until the script says that it is ready."""
        start = time.monotonic()
        self.call("Page.navigate", url=page.resolve().as_uri(), timeout=timeout)
        self.wait_for(ready, timeout)
        return time.monotonic() - start

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, file: Path, *, full: bool = True) -> None:
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        file.write_bytes(base64.b64decode(answer["data"]))
