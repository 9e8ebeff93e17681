"""A real Chromium, driven over the pipe of its debugging protocol: open pages, run JavaScript."""

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

    def __init__(self, requests: Any, responses: Any):
        self.requests, self.responses = requests, responses
        self.number, self.session = 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        self.complaints: list[str] = []  # log entries and exceptions of the page
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        self.number += 1
        session = {"sessionId": self.session} if self.session else {}
        message = {"id": self.number, "method": method, "params": params, **session}
        self.requests.write(json.dumps(message).encode() + b"\0")
        self.requests.flush()
        response = self.next()
        while response.get("id") != self.number:
            if response.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(response["params"])[:500])
            response = self.next()
        assert "error" not in response, response
        return response["result"]

    def next(self) -> dict:
        """The next message: a response, or an event."""
        text = bytearray()
        while not text.endswith(b"\0"):
            assert select.select([self.responses], [], [], 60)[0], "the browser is silent"
            byte = self.responses.read(1)
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

    def run(self, script: str) -> Any:
        response = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                             returnByValue=True)
        assert "exceptionDetails" not in response, response
        return response["result"].get("value")

    def picture(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Chromium, without a window, until the block ends."""
    child_reads, we_write = os.pipe()
    we_read, child_writes = os.pipe()

    def set_descriptors() -> None:  # Chromium reads descriptor 3 and writes 4
        writes, reads = os.dup(child_writes), os.dup(child_reads)
        os.dup2(reads, 3)
        os.dup2(writes, 4)

    process = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
         f"--user-data-dir={profile}", "--no-first-run"],
        preexec_fn=set_descriptors, close_fds=False,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(child_reads)
    os.close(child_writes)
    try:
        with open(we_write, "wb") as requests, open(we_read, "rb", buffering=0) as responses:
            yield Browser(requests, responses)
    finally:
        process.terminate()
        process.wait(20)
