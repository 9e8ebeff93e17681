"""A real browser, driven over a pipe as its own tools are: open a page, run a line in it, look."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")


class Browser:
    """One tab. `run` evaluates JavaScript in it, waiting for promises."""

    def __init__(self, asks: Any, tells: Any):
        self.asks, self.tells, self.number, self.session = asks, tells, 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.number, "method": method, "params": params, **session}
        self.asks.write(json.dumps(message).encode() + b"\0")
        self.asks.flush()
        while (said := self.next()).get("id") != self.number:
            if said.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(said["params"])[:500])
        assert "error" not in said, said
        return said["result"]

    def next(self) -> dict:
        """What it says next; an answer, or an event."""
        text = bytearray()
        while not text.endswith(b"\0"):
            assert select.select([self.tells], [], [], 60)[0], "the browser says nothing"
            byte = self.tells.read(1)
            assert byte, "the browser has ended"
            text += byte
        return json.loads(text[:-1])

    def open(self, url: str, width: int, height: int = 900, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.run("new Promise(r => document.readyState === 'complete' ? r() : "
                 "addEventListener('load', r))")

    def run(self, line: str) -> Any:
        done = self.call("Runtime.evaluate", expression=line, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Chromium, without a window, until the block ends."""
    out, asks = os.pipe()
    tells, back = os.pipe()

    def place() -> None:  # it reads descriptor 3 and writes 4
        spare = os.dup(back), os.dup(out)
        os.dup2(spare[1], 3)
        os.dup2(spare[0], 4)

    running = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
         f"--user-data-dir={profile}", "--no-first-run"], preexec_fn=place, close_fds=False,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(out)
    os.close(back)
    try:
        with open(asks, "wb") as to, open(tells, "rb", buffering=0) as of:
            yield Browser(to, of)
    finally:
        running.terminate()
        running.wait(20)
