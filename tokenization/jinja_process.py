"""The program of the process that renders chat templates. It imports jinja2 and nothing of ours.

A chat template is a program by a stranger. Jinja's sandbox keeps it away from Python's internals.
This process bounds what it uses: memory (RLIMIT_AS), CPU time of a conversation (ITIMER_PROF, which
counts the CPU time of this process and no waiting), and the length of its output. It cannot open a
file or a socket (RLIMIT_NOFILE), and it ends when the process that started it ends.

`tokenization/template_renderer.py` starts this file, sends requests and reads answers.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from datetime import date, datetime
from typing import Any, ClassVar

PR_SET_PDEATHSIG = 1  # prctl(2)
MAX_PRODUCT = 1 << 26  # of the sizes of the two sides of `*`
MAX_ERROR_CHARS = 200
FRAME_LENGTH = struct.Struct(">I")  # stands before each frame
# Modules that jinja2 and Python import only where they use them. Later no file can be opened.
LATE_IMPORTS = ("encodings.ascii", "encodings.idna", "encodings.latin_1",
                "encodings.unicode_escape", "encodings.utf_16", "html", "jinja2.constants",
                "jinja2.debug", "jinja2.ext", "jinja2.sandbox", "linecache", "pprint", "textwrap",
                "unicodedata")


class OutputLimitError(Exception):
    """The template writes more characters than it may."""


def main(parent: int, packages: str, cpu_seconds: float, memory_bytes: int,
         max_chars: int) -> None:
    """Answer requests from stdin until it is closed. `packages` is the folder that holds jinja2."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides, and closes the pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends this process, also inside a C function
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent ended before prctl
            return
    import_jinja(packages)
    limit_resources(memory_bytes)
    renderer = Renderer(cpu_seconds, max_chars)
    write_frame(b"{}")  # ready
    while True:
        try:
            request = read_frame()
            if request is None:
                return
            answer = renderer.answer(request)
        except MemoryError:
            write_frame(b'{"limit": "memory"}')
            return
        write_frame(answer)


def import_jinja(packages: str) -> None:
    """Import jinja2 and markupsafe from a folder; its other packages cannot be imported later."""
    sys.path.append(packages)
    for name in LATE_IMPORTS:
        __import__(name)
    sys.path.remove(packages)
    time.localtime()  # reads the file of the time zone


def limit_resources(memory_bytes: int) -> None:
    """Bound the address space; allow no further file, socket, process or core dump."""
    limits = {resource.RLIMIT_AS: memory_bytes, resource.RLIMIT_NOFILE: 3, resource.RLIMIT_NPROC: 0,
              resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        hard_limit = resource.getrlimit(kind)[1]
        if hard_limit != resource.RLIM_INFINITY:
            limit = min(limit, hard_limit)
        try:
            resource.setrlimit(kind, (limit, limit))
        except (OSError, ValueError):  # macOS refuses RLIMIT_AS
            if sys.platform == "linux":
                raise


def read_frame() -> bytes | None:
    """The next frame of stdin; None at its end."""
    head = read_exactly(FRAME_LENGTH.size)
    if head is None:
        return None
    return read_exactly(FRAME_LENGTH.unpack(head)[0])


def read_exactly(n_bytes: int) -> bytes | None:
    """`n_bytes` bytes of stdin; None if it ends before."""
    content = bytearray()
    while len(content) < n_bytes:
        part = os.read(0, n_bytes - len(content))
        if not part:
            return None
        content += part
    return bytes(content)


def write_frame(content: bytes) -> None:
    """Write a frame to stdout."""
    rest = memoryview(FRAME_LENGTH.pack(len(content)) + content)
    while rest:
        rest = rest[os.write(1, rest):]


class Renderer:
    """Answers requests with the template that was sent last."""

    def __init__(self, cpu_seconds: float, max_chars: int):
        self.cpu_seconds, self.max_chars = cpu_seconds, max_chars
        self.source = ""
        self.template: Any = None  # compiled from the source
        self.date = ""  # for strftime_now; "": today

    def answer(self, request: bytes) -> bytes:
        """Render the conversations of a request: {"renderings": [...]}, in JSON.

        There are fewer renderings than conversations if one has an error, or if they are long.
        """
        fields = json.loads(request)
        if "source" in fields:
            self.source, self.template = fields["source"], None
        self.date = str(fields["variables"].get("date_string", ""))
        renderings, n_chars = [], 0
        for conversation in fields["conversations"]:
            signal.setitimer(signal.ITIMER_PROF, self.cpu_seconds)
            rendering = self.render_conversation(fields["variables"], **conversation)
            signal.setitimer(signal.ITIMER_PROF, 0)
            n_chars += len(rendering.get("text", ""))
            if renderings and n_chars > self.max_chars:
                break
            renderings.append(rendering)
            if "error" in rendering:
                break
        return json.dumps({"renderings": renderings}, ensure_ascii=False).encode()

    def render_conversation(self, variables: dict[str, Any], messages: list[Any],
                            add_generation_prompt: bool, prompts: list[int]) -> dict[str, Any]:
        """Render a conversation, and for each i of `prompts` messages[:i] with the generation
        prompt: {"text", "prompt_lengths", "error"}.

        `prompt_lengths` holds the length of each prompt, or -1 as the last item if the text does
        not begin with that prompt. With an "error", what was rendered before it is there.
        """
        import jinja2

        rendering: dict[str, Any] = {}
        try:
            if self.template is None:
                self.template = compile_template(self.source, self.strftime_now)
            text = self.render(variables, messages, add_generation_prompt)
            text.encode()  # refuses half of a surrogate pair
            rendering |= {"text": text, "prompt_lengths": []}
            for i in prompts:
                prompt = self.render(variables, messages[:i], True)
                if not text.startswith(prompt):
                    rendering["prompt_lengths"].append(-1)
                    break
                rendering["prompt_lengths"].append(len(prompt))
        except MemoryError:
            raise
        except OutputLimitError:
            rendering["error"] = f"writes without end (more than {self.max_chars:,} characters)"
        except UnicodeEncodeError as e:
            rendering["error"] = f"writes half a character ({first_words(e, 160)})"
        except jinja2.TemplateError as e:
            rendering["error"] = first_words(e, MAX_ERROR_CHARS)
        except Exception as e:
            rendering["error"] = f"{type(e).__name__} in the template ({first_words(e, 160)})"
        return rendering

    def render(self, variables: dict[str, Any], messages: list[Any], generate: bool) -> str:
        """A conversation as the template writes it."""
        parts, length = [], 0
        for part in self.template.generate(**variables, messages=messages,
                                           add_generation_prompt=generate):
            parts.append(part)
            length += len(part)
            if length > self.max_chars:
                raise OutputLimitError
        return "".join(parts)

    def strftime_now(self, pattern: str) -> str:
        """Today's date in a pattern. If `date_string` is given: that date in the pattern if it is
        YYYY-MM-DD, else the given text itself."""
        if not self.date:
            return datetime.now().strftime(pattern)
        try:
            return date.fromisoformat(self.date).strftime(pattern)
        except ValueError:
            return self.date


def first_words(error: Exception, n_chars: int) -> str:
    """The beginning of an error's message, on one line."""
    text = str(error)[: 20 * n_chars].encode("utf-8", "backslashreplace").decode()
    return " ".join(text.split())[:n_chars]


def compile_template(source: str, strftime_now: Callable[[str], str]) -> Any:
    """Compile a template in an environment like that of transformers."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around an assistant's message; its content is written, as in transformers."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    class Environment(ImmutableSandboxedEnvironment):
        """A sandbox in which `*` and `**` refuse large results before they compute them."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
            if sizes[0] * sizes[1] > MAX_PRODUCT or (operator == "**" and max(sizes) > 64):
                raise jinja2.TemplateError(f"{operator} that makes too much")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True,
                              extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(source)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
