"""Headless Chromium, driven by its DevTools protocol over a pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
EXECUTABLE = next(filter(None, map(shutil.which, NAMES)), None)
Size = tuple[int, int]


class Browser:
    """One page in a browser of its own. `complaints` collects what it says on its console that is a warning or worse,
    and exceptions of scripts.
    """

    def __init__(self, *, size: Size = (1280, 900)) -> None:
        if EXECUTABLE is None:
            raise RuntimeError(f"no browser: none of {', '.join(NAMES)} is on PATH")
        self.complaints: list[str] = []
        self._profile = tempfile.TemporaryDirectory(prefix="robodual-browser-")
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}", "--disable-gpu"]
        options += ["--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")
        self._process = subprocess.Popen(
            [EXECUTABLE, *options, "about:blank"],
            preexec_fn=lambda: _place(read, write),
            pass_fds=(3, 4),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(read)
        os.close(write)
        self._pending = b""
        self._count = 0
        self._session: str | None = None
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Accessibility"):
                self.call(f"{domain}.enable")
            self.resize(size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def call(self, method: str, **params: Any) -> Any:
        """The result of one command of the protocol; events that come before it are looked at."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._hear(answer)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.until("document.readyState == 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def until(self, script: str, seconds: float = 60) -> None:
        """Returns once the expression is true."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({script})"):
            assert time.monotonic() < deadline, f"never came true: {script}\n{self.text('body')}"
            time.sleep(0.05)

    def type(self, selector: str, text: str) -> None:
        """Types into a field, and Enter."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
            )

    def click(self, selector: str) -> None:
        """Clicks the middle of an element with the mouse."""
        script = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        x, y = self.evaluate(script)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, size: Size, *, phone: bool = False) -> None:
        width, height = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)

    def prefer(self, scheme: str) -> None:
        """Has the page shown in the scheme "light" or "dark"."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self) -> bytes:
        """The whole page as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def nameless(self) -> list[str]:
        """What a person can operate or look at, and a screen reader finds no name for."""
        named = {"button", "textbox", "checkbox", "image", "link", "heading", "navigation"}
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        seen = [node for node in nodes if not node["ignored"] and node["role"]["value"] in named]
        return [str(node) for node in seen if not node.get("name", {}).get("value")]

    def _receive(self, seconds: float = 60) -> Any:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._read], [], [], seconds)
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                raise RuntimeError(f"the browser says nothing; its status: {self._process.poll()}")
            self._pending += part
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)

    def _hear(self, event: Any) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['source']}: {params['entry']['text']}")


def _place(read: int, write: int) -> None:
    """Puts the pipe's ends where the browser looks for them: 3 to read from, 4 to write to."""
    read, write = (os.dup(end) for end in (read, write))
    while min(read, write) < 5:
        read, write = os.dup(read), os.dup(write)
    os.dup2(read, 3)
    os.dup2(write, 4)
