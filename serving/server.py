"""The web page of sample.py: one page of HTML, and answers that stream to it.

Threat model: any website that is open in the user's browser can send requests to localhost, also
under a name of its own (DNS rebinding). Therefore the Host header must be one of our names, a
question must carry the token of this process, which only our page knows, and no path names a file.
Bytes, seconds, connections and waiting questions are limited. The page shows the model's text as
text, never as markup.

The server knows nothing of models: a handler turns a question into the parts of an answer.
Questions are answered one at a time, in a thread. If the client disconnects, its answer ends (a
beam search when its line is done).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import secrets
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from runtime.console import FLAGS, UserError, info

Handler = Callable[[Mapping[str, Any]], Iterator[Mapping[str, Any]]]

MAX_HEAD, MAX_BODY = 16 << 10, 64 << 10  # bytes of a request before its body, and of its body
TIMEOUT = 30.0  # seconds for a whole request to arrive, and for each part of an answer to be read
LINGER = 1.0  # seconds in which a refused client may finish sending, so that it reads the refusal
MAX_CONNECTIONS = 64  # at once
MAX_QUESTIONS = 4  # at once, the one that is being answered included
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
FOLDER = Path(__file__).parent


class HTTPError(Exception):
    """A refused request: an HTTP status, and the reason in one line."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = HTTPStatus(status)


class Request(NamedTuple):
    """A request without its body; names of headers in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]


def parse_request(head: bytes) -> Request:
    """Parse the lines before a body; HTTPError 400 if they are not exactly HTTP/1."""
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    request = re.fullmatch(r"([A-Z]+) (\S+) HTTP/1\.[01]", first)
    matches = [re.fullmatch(r"([!#$%&'*+.^_`|~\w-]+):([^\r\n\0]*)", line, re.ASCII)
               for line in lines]
    headers = {match[1].lower(): match[2].strip(" \t") for match in matches if match}
    if not request or len(headers) < len(lines):  # a malformed or repeated header
        raise HTTPError(400, "this is not HTTP")
    return Request(request[1], request[2], headers)


class Page:
    """The page's files, put together into one self-contained response."""

    def __init__(self, folder: Path = FOLDER):
        self.html, self.style, self.script = (
            (folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))

    def render(self, facts: Mapping[str, Any]) -> str:
        """The page with the facts that its script reads; no fact can end the script element."""
        text = json.dumps(facts).replace("<", "\\u003c")
        parts = {"{style}": self.style, "{script}": self.script, "{facts}": text}
        return re.sub(r"\{(?:style|script|facts)\}", lambda m: parts[m[0]], self.html)

    def security_policy(self) -> str:
        """A Content-Security-Policy that allows this style and this script, and nothing else."""
        style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                         for text in (self.style, self.script))
        return (f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
                "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                "frame-ancestors 'none'")


class Server:
    """Serves the page to clients that use our name, and answers to clients that have the page."""

    def __init__(self, handler: Handler, facts: Mapping[str, Any], timeout: float = TIMEOUT):
        self.handler, self.facts, self.timeout = handler, facts, timeout
        self.token = secrets.token_urlsafe(32)
        self.names: set[str] = set()  # allowed values of the Host header
        self.n_connections = 0
        self.jobs: set[asyncio.Future] = set()  # questions that are answered, or wait
        self.worker = ThreadPoolExecutor(1)
        self.page = Page()
        self.common_headers = {
            "Content-Security-Policy": self.page.security_policy(),
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin",
            "Connection": "close"}

    async def listen(self, address: str) -> asyncio.Server:
        """Start listening; UserError if the address is not usable."""
        host, _, port = address.rpartition(":")
        valid_port = re.fullmatch(r"\d{1,5}", port) and int(port) <= 65535
        if not valid_port or host in ("", "0.0.0.0", "[::]"):
            raise UserError(f"--address {address}: expected one address of this machine and a "
                            "port, as in 127.0.0.1:8000", FLAGS)
        try:
            server = await asyncio.start_server(self.handle_connection, host.strip("[]"), int(port),
                                                limit=MAX_HEAD)
        except OSError as e:
            raise UserError(f"--address {address}: {e.strerror or e}. If another page is there, "
                            "name another port", FLAGS) from None
        port_number = server.sockets[0].getsockname()[1]
        hosts = LOOPBACK if host in LOOPBACK else (host,)
        self.names = {f"{name}:{port_number}" for name in hosts}
        if port_number == 80:  # browsers leave out the default port
            self.names |= set(hosts)
        if host not in LOOPBACK:
            info(f"{host} can be reached from other machines: everybody who reaches it can use the "
                "model")
        info(f"open http://{host}:{port_number} in a browser; Ctrl-C ends")
        return server

    async def handle_connection(self, reader: asyncio.StreamReader,
                                writer: asyncio.StreamWriter) -> None:
        """Serve one request, then close the connection."""
        self.n_connections += 1
        writer.transport.set_write_buffer_limits(0)  # drained means: handed to the system
        try:
            try:
                await self.handle_request(reader, writer)
            except TimeoutError:
                raise HTTPError(408, "too slow") from None
            except asyncio.LimitOverrunError:
                raise HTTPError(431, f"more than {MAX_HEAD} bytes before the body") from None
        except HTTPError as e:
            await self.refuse(e, reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):  # the client left, or we shut down
            pass
        finally:
            self.n_connections -= 1
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()
            else:
                writer.close()

    async def handle_request(self, reader: asyncio.StreamReader,
                             writer: asyncio.StreamWriter) -> None:
        """Read, check and answer a request; HTTPError at the first fault."""
        if self.n_connections > MAX_CONNECTIONS:
            raise HTTPError(429, "too many connections; try again later")
        async with asyncio.timeout(self.timeout) as deadline:
            request = parse_request(await reader.readuntil(b"\r\n\r\n"))
            host, origin = request.headers.get("host"), request.headers.get("origin")
            if host not in self.names or origin not in (None, f"http://{host}"):
                raise HTTPError(403, "requested under another name, or by another site")
            if (request.method, request.path) == ("GET", "/"):
                deadline.reschedule(None)
                await self.send_page(writer)
                return
            if request.path != "/answer":
                raise HTTPError(404, "there is nothing here; the page is at /")
            if request.method != "POST":
                raise HTTPError(405, "a question must be a POST")
            question = await self.read_question(request, reader)
        if len(self.jobs) >= MAX_QUESTIONS:
            raise HTTPError(429, f"{MAX_QUESTIONS} questions are waiting; try again later")
        try:
            parts = self.handler(question)
        except UserError as e:
            raise HTTPError(400, str(e)) from None
        await self.send_answer(parts, reader, writer)

    async def read_question(self, request: Request,
                            reader: asyncio.StreamReader) -> Mapping[str, Any]:
        """The JSON object in the body of a POST that our page has sent."""
        token = request.headers.get("x-token", "").encode("latin-1")
        if not hmac.compare_digest(token, self.token.encode()):
            raise HTTPError(403, "this page is from an earlier start; reload it")
        if request.headers.get("content-type") != "application/json":
            raise HTTPError(415, "a question must be application/json")
        size = request.headers.get("content-length", "")
        if "transfer-encoding" in request.headers or not re.fullmatch(r"[0-9]{1,18}", size):
            raise HTTPError(411, "a question must state its length")
        if int(size) > MAX_BODY:
            raise HTTPError(413, f"a question has at most {MAX_BODY} bytes")
        try:
            question = json.loads(await reader.readexactly(int(size)))
            if not isinstance(question, dict):
                raise ValueError
            json.dumps(question, ensure_ascii=False).encode()  # refuses half characters
        except (ValueError, RecursionError):
            raise HTTPError(400, "a question must be a JSON object, in UTF-8") from None
        return question

    async def send_page(self, writer: asyncio.StreamWriter) -> None:
        """Send the page, with the token and the largest size of a question."""
        facts = {**self.facts, "token": self.token, "max_bytes": MAX_BODY}
        page = self.page.render(facts).encode()
        await self.send(writer, self.response_head(200, "text/html", len(page)) + page)

    async def send_answer(self, parts: Iterator[Mapping[str, Any]], reader: asyncio.StreamReader,
                          writer: asyncio.StreamWriter) -> None:
        """Send the parts of an answer as they are made, a JSON object a line, while the client is
        connected."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue = asyncio.Queue()  # parts; None: the end
        disconnected = threading.Event()

        def emit(part: Mapping[str, Any] | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: we shut down, and nobody listens
                loop.call_soon_threadsafe(queue.put_nowait, part)

        job = loop.run_in_executor(self.worker, produce, parts, emit, disconnected)
        self.jobs.add(job)
        job.add_done_callback(self.jobs.discard)
        # a browser sends nothing after its question, so the next event is that it closes
        disconnect_watcher = asyncio.create_task(reader.read(1))
        disconnect_watcher.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            await self.send(writer, self.response_head(200, "application/x-ndjson"))
            while (part := await queue.get()) is not None:
                line = json.dumps(part, ensure_ascii=False) + "\n"
                await self.send(writer, line.encode())
        except TimeoutError:  # the client reads nothing any more
            writer.transport.abort()
        finally:
            disconnected.set()
            disconnect_watcher.cancel()
            await asyncio.wait({job})  # its last `emit` needs a running loop

    async def refuse(self, error: HTTPError, reader: asyncio.StreamReader,
                     writer: asyncio.StreamWriter) -> None:
        """Send the reason, and let the client finish sending: if we closed at once, it might never
        read the reason."""
        body = f"{error}\n".encode()
        try:
            await self.send(writer, self.response_head(error.status, "text/plain", len(body))
                            + body)
            if self.n_connections <= MAX_CONNECTIONS:
                writer.write_eof()
                async with asyncio.timeout(min(LINGER, self.timeout)):
                    while await reader.read(MAX_HEAD):
                        pass
        except (OSError, TimeoutError):
            pass

    async def send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Write, and wait until the system has the data; TimeoutError if that takes too long."""
        writer.write(data)
        async with asyncio.timeout(self.timeout):
            await writer.drain()

    def response_head(self, status: int, kind: str, size: int | None = None) -> bytes:
        """The lines before a body of `size` bytes; None: the connection's end ends the body."""
        headers = {"Content-Type": f"{kind}; charset=utf-8", **self.common_headers}
        if size is not None:
            headers["Content-Length"] = str(size)
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}\r\n{lines}\r\n".encode()


def produce(parts: Iterator[Mapping[str, Any]], emit: Callable[[Any], None],
            disconnected: threading.Event) -> None:
    """Make the parts of an answer in the worker thread, up to an error or a disconnect."""
    try:
        while not disconnected.is_set():
            part = next(parts, None)
            if part is None:
                break
            emit(part)
    except UserError as e:
        emit({"error": str(e)})
    except Exception:  # one answer fails, with a traceback; the server goes on
        traceback.print_exc()
        emit({"error": "sample.py failed; its terminal shows the traceback"})
    finally:
        parts.close()
        emit(None)


async def serve(address: str, handler: Handler, facts: Mapping[str, Any]) -> None:
    """Serve until interrupted."""
    server = await Server(handler, facts).listen(address)
    try:  # serve_forever, when interrupted, would wait until every answer is complete
        await asyncio.get_running_loop().create_future()
    finally:
        server.close()
