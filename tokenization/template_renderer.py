"""Renders chat templates in a process of its own, which has limits (`jinja_process.py`).

The process is a fresh interpreter that imports jinja2 only. It starts at the first rendering and
stays for the whole command. After a rendering that reached a limit, the next rendering starts a new
process. Requests and answers are frames of JSON in pipes, of bounded length.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.console import FLAGS, UserError

PROGRAM = Path(__file__).parent / "jinja_process.py"
FRAME_LENGTH = struct.Struct(">I")  # stands before each frame
MAX_JSON_BYTES = 6  # of a character in a JSON string: \u0000
READ_BYTES = 1 << 16
# Of the messages of the conversations that are sent together: few switches between two processes,
# each of which waits for a free core.
MAX_BATCH_CHARS = 500_000
# Variables of the environment that Python needs to start, and the time zone.
ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


@dataclass(frozen=True)
class RenderingLimits:
    """What a chat template may use: CPU seconds for one conversation (all its renderings), bytes of
    address space, and characters of one rendering."""

    cpu_seconds: float = 10.0
    memory_bytes: int = 512 << 20
    max_chars: int = 1 << 24


@dataclass(frozen=True)
class Request:
    """A conversation to render; for each i of `prompts` also messages[:i] are rendered, with the
    generation prompt."""

    messages: Sequence[Any]
    add_generation_prompt: bool = False
    prompts: Sequence[int] = ()


@dataclass(frozen=True)
class Rendering:
    """A conversation as a template wrote it.

    `prompt_lengths`: the length of each prompt that was asked for, in characters; -1 as the last
    one if the text does not begin with that prompt. `error`: why the text, or the next prompt,
    could not be rendered.
    """

    text: str = ""
    prompt_lengths: Sequence[int] = ()
    error: str = ""


class TemplateRenderer:
    """Renders templates within limits. May be used by several threads, and after a fork."""

    def __init__(self, limits: RenderingLimits):
        self.limits = limits
        self.max_frame_bytes = MAX_JSON_BYTES * limits.max_chars + READ_BYTES
        self.lock = threading.Lock()
        self.process: _Process | None = None
        self.source = ""  # of the template that the process has

    def render(self, source: str, variables: Mapping[str, Any], request: Request) -> Rendering:
        """Render one conversation with a template and its variables."""
        return self.render_all(source, variables, [request])[0]

    def render_all(self, source: str, variables: Mapping[str, Any],
                   requests: Iterable[Request]) -> list[Rendering]:
        """Render conversations, in order, up to the first one with an error. One by one they would
        need more time: each exchange switches between two processes."""
        renderings: list[Rendering] = []
        with self.lock:
            for batch in _batches(requests):
                answers = self._exchange(source, variables, batch)
                while len(answers) < len(batch) and not (answers and answers[-1].error):
                    # the batch reached a limit, perhaps as a whole
                    answers += self._exchange(source, variables, [batch[len(answers)]])
                renderings += answers
                if answers[-1].error:
                    break
        return renderings

    def _exchange(self, source: str, variables: Mapping[str, Any],
                  batch: Sequence[Request]) -> list[Rendering]:
        """The renderings of a batch, or of its first conversations: up to the first error, or as
        many as one answer may hold. Of one conversation, its rendering is always returned."""
        fields = {"variables": variables, "conversations": [vars(request) for request in batch]}
        process = self._running_process()
        if source != self.source:
            fields["source"] = self.source = source
        answer = None
        try:
            process.write(_to_json(fields))
            answer = process.read(self.max_frame_bytes)
        finally:
            if answer is None or "limit" in answer:  # also if this was interrupted
                self._end_process()
        if answer is not None and "limit" not in answer:
            return [Rendering(**rendering) for rendering in answer["renderings"]]
        if len(batch) > 1:
            return []
        if answer is None:
            return [Rendering(error=self._describe_end(process.wait()))]
        return [Rendering(error=self._describe_limit(answer["limit"]))]

    def _end_process(self) -> None:
        if self.process:
            self.process.kill()
        self.process = None

    def close(self) -> None:
        """End the process; the next rendering starts another one."""
        with self.lock:
            self._end_process()

    def _running_process(self) -> _Process:
        """The process, started if there is none, if it has ended, or if this is a fork."""
        if self.process is None or not self.process.is_running():
            self.process, self.source = _Process(self.limits), ""
            if self.process.read(READ_BYTES) is None:
                code, self.process = self.process.wait(), None
                raise UserError("the process that renders chat templates cannot start (exit code "
                                f"{code}); check this Python and its jinja2", FLAGS)
        return self.process

    def _describe_limit(self, limit: str) -> str:
        if limit == "memory":
            return (f"needs more than {self.limits.memory_bytes >> 20:,} MB of memory; use another "
                    "template")
        return f"writes more than {self.limits.max_chars:,} characters; use another template"

    def _describe_end(self, code: int) -> str:
        if code == -signal.SIGPROF:
            return (f"needs more than {self.limits.cpu_seconds:g} s of CPU time for one "
                    "conversation; use another template")
        if code == -signal.SIGKILL:
            return ("the process that renders it was killed; if memory is short, end other "
                    "programs, and try again")
        if code < 0:
            return (f"crashes the process that renders it ({signal.Signals(-code).name}); use "
                    "another template")
        return "ends the process that renders it; use another template"


@functools.cache
def shared_renderer(limits: RenderingLimits) -> TemplateRenderer:
    """The renderer of this process with these limits."""
    return TemplateRenderer(limits)


class _Process:
    """The process that renders, with a pipe to it and a pipe from it."""

    def __init__(self, limits: RenderingLimits):
        spec = importlib.util.find_spec("jinja2")
        if spec is None or spec.origin is None:
            raise UserError("chat templates need jinja2; install requirements.txt", FLAGS)
        packages = Path(spec.origin).parents[1]
        command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(PROGRAM), str(os.getpid()),
                   str(packages), str(limits.cpu_seconds), str(limits.memory_bytes),
                   str(limits.max_chars)]
        self.owner = os.getpid()
        self.buffer = bytearray()  # what was read of the next frames
        started: Future[subprocess.Popen] = Future()
        self.thread = threading.Thread(target=_start_and_wait, args=(command, started), daemon=True)
        self.thread.start()
        try:
            self.popen = started.result()
        except OSError as e:
            raise UserError("the process that renders chat templates cannot start "
                            f"({e.strerror}); end other programs, and try again", FLAGS) from None

    def is_running(self) -> bool:
        """Whether it belongs to this process and has not ended."""
        return self.owner == os.getpid() and self.popen.returncode is None

    def write(self, content: bytes) -> None:
        """Send a frame. A process that has ended is noticed by `read`."""
        rest = memoryview(FRAME_LENGTH.pack(len(content)) + content)
        try:
            while rest:
                rest = rest[os.write(self.popen.stdin.fileno(), rest):]
        except BrokenPipeError:
            pass

    def read(self, max_bytes: int) -> dict[str, Any] | None:
        """The next frame; None if the process ends before. {"limit": "output"} in place of a frame
        that is longer than `max_bytes`."""
        head = FRAME_LENGTH.size
        if not self._fill(head):
            return None
        size = head + FRAME_LENGTH.unpack_from(self.buffer)[0]
        if size > max_bytes:
            return {"limit": "output"}
        if not self._fill(size):
            return None
        frame = self.buffer[head:size]
        del self.buffer[:size]
        return json.loads(frame)

    def _fill(self, n_bytes: int) -> bool:
        """Read until the buffer holds `n_bytes`; whether it does before the process ends."""
        while len(self.buffer) < n_bytes:
            content = os.read(self.popen.stdout.fileno(), READ_BYTES)
            if not content:
                return False
            self.buffer += content
        return True

    def kill(self) -> None:
        """End it and close the pipes."""
        self.popen.kill()
        self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended; negative: the number of a signal."""
        self.thread.join()
        self.popen.stdin.close()
        self.popen.stdout.close()
        return self.popen.returncode


def _batches(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Requests in batches of about MAX_BATCH_CHARS."""
    batch: list[Request] = []
    n_chars = 0
    for request in requests:
        batch.append(request)
        n_chars += sum(len(message["content"]) for message in request.messages)
        if n_chars >= MAX_BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _to_json(fields: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except (TypeError, ValueError, RecursionError) as e:
        raise UserError(f"a message cannot be given to a chat template ({e}); expected texts, "
                        "numbers, lists and objects") from None


def _start_and_wait(command: Sequence[str], started: Future[subprocess.Popen]) -> None:
    """Start the process and wait until it ends, so that it leaves no zombie.

    This thread lives as long as the process: Linux sends PR_SET_PDEATHSIG when the *thread* that
    started a process ends.
    """
    variables = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    try:
        process = subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
                                   env=variables)
    except OSError as e:
        started.set_exception(e)
        return
    started.set_result(process)
    process.wait()

