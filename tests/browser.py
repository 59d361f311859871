"""Headless Chromium over its debugging pipe: opens a page and tells what a reader and the network would notice.

No package is needed, only the browser; ``CHROMIUM`` is ``None`` where there is none. Requests are recorded, not blocked, so
that a test can say which address a page asked for.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
DESKTOP, PHONE = (1280, 900, False), (390, 844, True)


@dataclass
class Tab:
    """One page in the browser."""

    send: Any
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, path: Path, size: tuple[int, int, bool] = DESKTOP, scheme: str = "light") -> None:
        """Loads a file at a window size; a phone's page is as wide as its screen."""
        width, height, mobile = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.problems.clear()
        self.requests.clear()
        self.send("Page.navigate", wait_for="Page.loadEventFired", url=path.resolve().as_uri())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def pdf(self) -> bytes:
        return base64.b64decode(self.send("Page.printToPDF", printBackground=True)["data"])

    def too_wide(self) -> list[str]:
        """Elements that reach over the page's right edge and are in no container that scrolls."""
        return self.ask(
            """[...document.querySelectorAll('body *')].filter(e => {
                 const box = e.getBoundingClientRect();
                 return box.width > 0 && box.right > innerWidth + 1 && !e.closest('.scroll, svg, pre');
               }).map(e => e.tagName + '.' + e.className).slice(0, 5)"""
        )


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """A running browser with one tab."""
    assert CHROMIUM is not None
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    # the browser reads commands from descriptor 3 and writes to 4
    command = f'exec 3<&{to_read} 4>&{from_write}; exec "$0" "$@"'
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", command, CHROMIUM, *flags, "about:blank"],
        pass_fds=(to_read, from_write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_read)
    os.close(from_write)
    writer, reader = os.fdopen(to_write, "wb", buffering=0), os.fdopen(from_read, "rb")
    try:
        yield _attach(writer, reader)
    finally:
        writer.close()
        process.kill()
        process.wait()
        reader.close()


def _attach(writer: Any, reader: Any) -> Tab:
    numbers = itertools.count(1)
    tab = Tab(send=None)
    session: dict[str, str] = {}

    def send(method: str, wait_for: str = "", **params: Any) -> Any:
        number = next(numbers)
        message = {"id": number, "method": method, "params": params, **session}
        writer.write(json.dumps(message).encode() + b"\0")
        answer, seen = None, not wait_for
        while answer is None or not seen:
            event = json.loads(_message(reader))
            if event.get("id") == number:
                assert "error" not in event, event["error"]
                answer = event["result"]
            seen = seen or event.get("method") == wait_for
            _note(tab, event)
        return answer

    target = send("Target.createTarget", url="about:blank")["targetId"]
    session["sessionId"] = send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        send(f"{domain}.enable")
    tab.send = send
    return tab


def _message(reader: Any) -> bytes:
    out = bytearray()
    while (char := reader.read(1)) != b"\0":
        assert char, "the browser has gone"
        out += char
    return bytes(out)


def _note(tab: Tab, event: dict[str, Any]) -> None:
    params = event.get("params", {})
    match event.get("method"):
        case "Runtime.exceptionThrown":
            tab.problems.append(str(params["exceptionDetails"].get("text")))
        case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
            tab.problems.append(str(params["args"]))
        case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
            tab.problems.append(params["entry"]["text"])
        case "Network.requestWillBeSent":
            tab.requests.append(params["request"]["url"])
