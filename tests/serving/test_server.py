"""The page of sample.py: which requests are refused, what it answers, what a browser shows."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import sample
from helpers import browser, tiny
from inference.prompt_format import TRUNCATED_NOTICE, GenerationConfig, PromptFormat
from inference.sampling import NO_STOPPING_CRITERIA, SamplingParams
from runtime.console import UserError
from runtime.paths import ROOT
from sample import Answerer, Settings, page_configs
from serving.replies import make_replier
from serving.server import Server
from tokenization.tokenizer import Tokenizer

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=alert(1)>&amp;\u2028"
FORMATS = [{"name": n, "kind": k, "label": n, "about": f"about {n}", "hint": f"hint {n}"}
        for n, k in (("chat", "chat"), ("eng-kin", "translate"), ("text", "text"))]
FACTS = {"title": f"out/kin {HOSTILE}", "formats": FORMATS, "truncated": TRUNCATED_NOTICE,
         "new": 64, "temperature": 0.8, "top_p": 0.95}


class FakeModel:
    """A handler that answers as a model would, and remembers the questions."""

    def __init__(self):
        self.questions: list[dict] = []
        self.go_on, self.ended, self.made = threading.Event(), threading.Event(), 0

    def __call__(self, question: dict) -> Iterator[dict]:
        self.questions.append(question)
        if question.get("new") == 0:
            raise UserError("0 tokens: expected 1 or more")
        return self.parts(str(question.get("text", question.get("messages"))))

    def parts(self, text: str) -> Iterator[dict]:
        try:
            if text == "fail":
                raise ZeroDivisionError
            if text == "long":
                while True:
                    self.made += 1
                    yield {"text": "a" * 1000}
            while text == "slow":
                yield {"text": "a "}
                time.sleep(0.05)
            if text == "wait":
                self.go_on.wait(30)
            yield {"text": "Answer to "}
            yield {"text": text}
            yield {"end": "eos", "tokens": 3, "seconds": 0.1}
        finally:
            self.ended.set()


class ServerThread:
    """A server in a thread of its own."""

    def __init__(self, timeout: float):
        self.model, self.loop = FakeModel(), asyncio.new_event_loop()
        self.server = Server(self.model, FACTS, timeout)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.listener = self.do(self.server.listen("127.0.0.1:0"))
        self.port = self.listener.sockets[0].getsockname()[1]

    def do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def close(self) -> None:
        self.model.go_on.set()
        self.do(self.end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.server.worker.shutdown()
        self.loop.close()

    async def end(self) -> None:
        """End as asyncio.run does: no connection outlives its loop."""
        self.listener.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def socket(self) -> socket.socket:
        s = socket.create_connection(("127.0.0.1", self.port), 20)
        s.settimeout(20)
        return s

    def raw(self, request: bytes) -> bytes:
        """The whole response to a request; b"" if the connection is only closed."""
        with self.socket() as s:
            try:
                s.sendall(request)
            except OSError:  # closed before we have sent everything
                pass
            return read_all(s)

    def head(self, first: str = "POST /answer HTTP/1.1", size: int | None = None,
             **changes: str | None) -> bytes:
        """A request's first lines as our page sends them, but for `changes`; None leaves one out.
        """
        lines = {"Host": f"127.0.0.1:{self.port}", "Origin": f"http://127.0.0.1:{self.port}",
                 "Content-Type": "application/json", "X-Token": self.server.token,
                 "Content-Length": None if size is None else str(size)}
        lines |= {k.replace("_", "-"): v for k, v in changes.items()}
        headers = [f"{k}: {v}" for k, v in lines.items() if v is not None]
        return "\r\n".join([first, *headers, "", ""]).encode()

    def ask(self, question: dict | bytes, **changes: str | None) -> bytes:
        body = question if isinstance(question, bytes) else json.dumps(question).encode()
        return self.raw(self.head(size=len(body), **changes) + body)


def first_bytes(s: socket.socket) -> bytes:
    """The first bytes that arrive."""
    try:
        return s.recv(65536)
    except ConnectionError:
        return b""


def read_all(s: socket.socket) -> bytes:
    """Everything that arrives until the connection is closed."""
    response = b""
    try:
        while chunk := s.recv(65536):
            response += chunk
    except ConnectionError:
        pass
    return response


def status(response: bytes) -> int:
    """The HTTP status; 0 without a response."""
    return int(response.split(b" ", 2)[1]) if response.startswith(b"HTTP/1.1 ") else 0


def lines(response: bytes) -> list[dict]:
    return [json.loads(x) for x in response.partition(b"\r\n\r\n")[2].splitlines()]


@pytest.fixture
def served():
    served = ServerThread(timeout=0.5)
    yield served
    served.close()


def test_the_page_and_an_answer_are_served_under_our_names(served):
    for name in ("127.0.0.1", "localhost", "[::1]"):
        page = served.raw(f"GET / HTTP/1.1\r\nHost: {name}:{served.port}\r\n\r\n".encode())
        assert status(page) == 200 and served.server.token.encode() in page
        assert b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n" in page
        response = served.ask({"format": "text", "text": "Inka \u2028 \U0001f600"},
                           Host=f"{name}:{served.port}", Origin=f"http://{name}:{served.port}")
        assert status(response) == 200
        assert lines(response) == [{"text": "Answer to "}, {"text": "Inka \u2028 \U0001f600"},
                                {"end": "eos", "tokens": 3, "seconds": 0.1}]
    assert status(served.ask({"text": "a"}, Origin=None)) == 200  # curl, with the page's token


def test_the_page_loads_nothing_else_and_runs_only_its_own_script(served):
    head, _, page = served.raw(
        f"GET / HTTP/1.1\r\nHost: localhost:{served.port}\r\n\r\n".encode()).decode().partition(
            "\r\n\r\n")
    assert "default-src 'none'" in head and "frame-ancestors 'none'" in head
    assert "'unsafe-inline'" not in head and "nosniff" in head and "no-store" in head
    assert not re.findall(r"https?://", page)
    assert re.findall(r"(?:src|href)=\"[^\"]*\"", page) == ['href="data:,"']
    assert "innerHTML" not in page and page.count("<script") == 2 and "<img" not in page
    facts = re.search(r'id="facts">(.*?)</script>', page)[1]
    assert json.loads(facts)["title"] == FACTS["title"]


FOREIGN_REQUESTS = {  # what differs from our page's request -> the status of the response
    "a foreign host": ({"Host": "evil.example:{port}"}, 403),
    "a name rebound to us": ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
    "a rebound name with our port": ({"Host": "a.example:{port}",
                                      "Origin": "http://a.example:{port}"}, 403),
    "our name without the port": ({"Host": "127.0.0.1"}, 403),
    "another port": ({"Host": "127.0.0.1:80"}, 403),
    "our name and more": ({"Host": "127.0.0.1:{port}.evil.example"}, 403),
    "our name in a userinfo": ({"Host": "127.0.0.1:{port}@evil.example"}, 403),
    "another spelling of our name": ({"Host": "127.1:{port}"}, 403),
    "our number as one": ({"Host": "2130706433:{port}"}, 403),
    "any address": ({"Host": "0.0.0.0:{port}"}, 403),
    "no host": ({"Host": None}, 403),
    "an empty host": ({"Host": ""}, 403),
    "two hosts": ({"Host": "127.0.0.1:{port}\r\nHost: evil.example"}, 400),
    "blanks without end": ({"X-Odd": " " * 15_000 + "\0"}, 400),
    "a foreign origin": ({"Origin": "https://evil.example"}, 403),
    "a null origin": ({"Origin": "null"}, 403),
    "an empty origin": ({"Origin": ""}, 403),
    "an origin of another port": ({"Origin": "http://127.0.0.1:1"}, 403),
    "an origin that begins as ours": ({"Origin": "http://127.0.0.1:{port}.evil.example"}, 403),
    "our other name as origin": ({"Origin": "http://localhost:{port}"}, 403),
    "our origin by another scheme": ({"Origin": "https://127.0.0.1:{port}"}, 403),
    "no token": ({"X_Token": None}, 403),
    "another token": ({"X_Token": "A" * 43}, 403),
    "a token that is not ASCII": ({"X_Token": "\u00e9"}, 403),
    "a form": ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
    "a plain text": ({"Content_Type": "text/plain"}, 415),
    "no kind": ({"Content_Type": None}, 415),
    "no length": ({"Content_Length": None}, 411),
    "a negative length": ({"Content_Length": "-1"}, 411),
    "a length that is no number": ({"Content_Length": "\u0663"}, 411),
    "two lengths": ({"Content_Length": "2\r\nContent-Length: 3"}, 400),
    "chunks": ({"Transfer_Encoding": "chunked"}, 411),
    "a length beyond all": ({"Content_Length": "9" * 18}, 413),
    "a folded line": ({"X-Odd": "a\r\n b"}, 400),
    "a line without a name": ({"X-Odd": "a\r\n: b"}, 400),
    "a line end alone": ({"X-Odd": "a\nHost: evil.example"}, 400),
    "a NUL": ({"X-Odd": "a\0b"}, 400),
    "a head without end": ({"X-Odd": "a" * 20_000}, 431)}


@pytest.mark.parametrize("what", FOREIGN_REQUESTS)
def test_a_request_that_is_not_from_our_page_is_refused(served, what):
    changes, expected = FOREIGN_REQUESTS[what]
    changes = {k: v and v.replace("{port}", str(served.port)) for k, v in changes.items()}
    body = b'{"text": "a"}'
    response = served.raw(served.head(**{"size": len(body), **changes}) + body)
    assert status(response) == expected and served.model.questions == []
    assert served.server.token.encode() not in response and b"Traceback" not in response
    assert status(served.ask({"text": "a"})) == 200  # and the server still answers


@pytest.mark.parametrize("first, expected", [
    ("GET /../../../../etc/passwd HTTP/1.1", 404), ("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1", 404),
    ("GET //etc/passwd HTTP/1.1", 404), ("GET /web.py HTTP/1.1", 404),
    ("GET /file=/etc/passwd HTTP/1.1", 404), ("GET /?file=/etc/passwd HTTP/1.1", 404),
    ("GET http://127.0.0.1/ HTTP/1.1", 404), ("POST / HTTP/1.1", 404),
    ("GET /answer HTTP/1.1", 405), ("OPTIONS /answer HTTP/1.1", 405), ("HEAD / HTTP/1.1", 404),
    ("PUT /answer HTTP/1.1", 405), ("GET / HTTP/2.0", 400), ("GET /", 400), ("get / HTTP/1.1", 400),
    ("GET  / HTTP/1.1", 400), ("\x16\x03\x01", 400), ("", 400)])
def test_no_path_names_a_file_and_no_other_method_is_known(served, first, expected):
    response = served.raw(served.head(first, size=2) + b"{}")
    assert status(response) == expected and b"root:" not in response
    assert served.model.questions == []
    assert served.server.token.encode() not in response


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"a"', b"[" * 60_000, b"9" * 5000, b"\xff\xfe", b'{"a": "\xe9"}',
    b'{"text": "\\ud800"}', b'{"new": 0}'])
def test_a_body_that_is_not_a_question_is_refused(served, body):
    response = served.ask(body)
    assert status(response) == 400 and b"Traceback" not in response
    assert status(served.ask({"text": "a"})) == 200


def memory() -> float:
    """Resident memory of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_ten_megabytes_are_refused_without_being_read(served):
    start = memory()
    for _ in range(5):
        assert status(served.ask(b"[" + b" " * 10_000_000 + b"]")) == 413
    assert memory() - start < 50 and served.model.questions == []


def test_a_client_that_sends_too_slowly_is_cut_off(served):
    with served.socket() as s:  # single bytes do not extend the timeout
        for byte in served.head(size=2):
            try:
                s.send(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the server read to the end")
        assert status(read_all(s)) in (0, 408)
    response = served.raw(served.head(size=100) + b"{")  # the rest of the body never arrives
    assert status(response) == 408
    with served.socket() as s:
        assert status(read_all(s)) == 408  # nothing is sent at all
    assert served.model.questions == []


def test_a_client_that_reads_nothing_ends_its_answer(served):
    body = b'{"text": "long"}'
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", served.port))
        s.sendall(served.head(size=len(body)) + body)
        assert served.model.ended.wait(20)


def test_a_client_that_disconnects_ends_its_answer_and_the_next_is_answered(served):
    body = b'{"text": "long"}'
    with served.socket() as s:
        s.sendall(served.head(size=len(body)) + body)
        assert s.recv(100)
        assert not served.model.ended.is_set()
    assert served.model.ended.wait(20)
    assert lines(served.ask({"text": "a"}))[-1]["end"] == "eos"


def test_of_a_hundred_simultaneous_questions_four_are_accepted(served):
    body = b'{"text": "wait"}'
    sockets = [served.socket() for _ in range(100)]
    try:
        for s in sockets:
            s.sendall(served.head(size=len(body)) + body)
        first = [first_bytes(s) for s in sockets]  # of each, while no answer continues
        served.model.go_on.set()
        response = [a + read_all(s) for a, s in zip(first, sockets, strict=True)]
    finally:
        for s in sockets:
            s.close()
    codes = [status(x) for x in response]
    assert set(codes) <= {200, 429} and codes.count(200) == 4
    assert all(lines(x)[-1]["end"] == "eos" for x in response if status(x) == 200)
    assert len(served.model.questions) == 4  # a refused question costs nothing
    assert lines(served.ask({"text": "a"}))[-1]["end"] == "eos"


def test_idle_connections_do_not_block_others(served):
    sockets = [served.socket() for _ in range(100)]
    try:
        time.sleep(1.5)  # longer than its timeout
        assert status(served.ask({"text": "a"})) == 200
    finally:
        for s in sockets:
            s.close()


def test_an_error_in_an_answer_is_reported_and_the_server_continues(served, capfd):
    response = served.ask({"text": "fail"})
    assert status(response) == 200
    assert "its terminal shows the traceback" in lines(response)[-1]["error"]
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert lines(served.ask({"text": "a"}))[-1]["end"] == "eos"


@pytest.mark.parametrize("address", ["8000", "127.0.0.1", "127.0.0.1:x", "0.0.0.0:8000", ":8000",
                                     "[::]:8000", "127.0.0.1:99999", "192.0.2.1:8000", "taken"])
def test_an_address_that_cannot_be_used_is_one_line(served, address):
    address = f"127.0.0.1:{served.port}" if address == "taken" else address
    with pytest.raises(UserError, match="--address") as e:
        asyncio.run(Server(FakeModel(), FACTS).listen(address))
    assert e.value.code == 2 and "\n" not in str(e.value)


TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A tiny model with a chat template and a translation prompt."""
    folder = tiny.folder(tmp_path_factory.mktemp("trained") / "model", seed=2)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "prompt.json").write_text(json.dumps({"translate": [{
        "name": "x", "text": "{source}: {text}\n{target}:",
        "languages": {"eng": "English", "kin": "Kinyarwanda"}}]}))
    return folder


def run_sample(folder: Path, **values) -> str:
    """What sample.py prints, run in this process."""
    settings = Settings(model=str(folder), dtype="fp32", device="cpu", max_new_tokens=12, **values)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        sample.main(settings)
    return printed.getvalue()


def test_the_page_of_a_model_answers_as_sample_py_does_and_ends_with_ctrl_c(trained, tmp_path):
    run = [sys.executable, ROOT / "sample.py", "--model", trained, "--web", "--address",
           "127.0.0.1:0", "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "12",
           "--beams", "2"]
    allow_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # as in a terminal
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True,
                          preexec_fn=allow_interrupt) as running:
        try:
            port = None
            while port is None:
                assert running.poll() is None
                match = re.search(r"http://127\.0\.0\.1:(\d+)", running.stderr.readline())
                port = match and int(match[1])

            def get(method: str, path: str, body: str | None = None, token: str = "") -> bytes:
                to = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                to.request(method, path, body, {"Content-Type": "application/json",
                                                "X-Token": token})
                return to.getresponse().read()

            facts = json.loads(re.search(r'id="facts">(.*?)</script>',
                                         get("GET", "/").decode())[1])
            assert [x["name"] for x in facts["formats"]] == ["eng-kin", "kin-eng", "chat", "text"]

            def answer(**question) -> str:
                response = get("POST", "/answer", json.dumps(question), facts["token"])
                rows = [json.loads(x) for x in response.splitlines()]
                assert rows[-1]["end"] in ("eos", "stop", "length"), response
                return "".join(x.get("text", "") for x in rows)

            messages = [{"role": "user", "content": "Muraho"},
                        {"role": "assistant", "content": "Ego"},
                        {"role": "user", "content": "Amakuru?"}]
            sampling = {"temperature": 1.2, "seed": 7, "top_p": 0.9}
            text = answer(format="text", text="Inka", **sampling)
            chat = answer(format="chat", messages=messages, temperature=0.0)
            lines = answer(format="eng-kin", text="The water\n\nOur cows").split("\n")
            long = get("POST", "/answer", json.dumps(
                {"format": "chat", "messages": [*messages[:2] * 30, messages[2]]}), facts["token"])
            assert json.loads(long.splitlines()[0]) == {"note": TRUNCATED_NOTICE}
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 130
        finally:
            running.kill()
    assert "Inka" + text + "\n" == run_sample(trained, prompt=["Inka"], **sampling)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    row = json.loads(run_sample(trained, file=str(tmp_path / "chat.jsonl"), temperature=0.0,
                                json=True))
    assert chat == row["text"].lstrip()
    expected = run_sample(trained, translate="eng-kin", beams=2,
                          prompt=["The water", "Our cows"]).split("\n")
    assert [x.strip() for x in lines] == [expected[0], "", expected[1]]


def test_ctrl_c_ends_an_answer_without_a_traceback():
    program = """if True:
        import asyncio, sys, time
        from runtime import console
        from serving.server import serve

        def reply(question):
            while True:
                time.sleep(0.2)
                yield {"text": "a"}

        facts = {"title": "x", "formats": []}
        sys.exit(console.run(lambda: asyncio.run(serve("127.0.0.1:0", reply, facts))))
    """
    allow_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE,
                          text=True, preexec_fn=allow_interrupt) as running:
        try:
            port = int(re.search(r":(\d+) in", running.stderr.readline())[1])
            to = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            to.request("GET", "/")
            page = to.getresponse().read().decode()
            token = json.loads(re.search(r'id="facts">(.*?)</script>', page)[1])["token"]
            to = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            to.request("POST", "/answer", "{}",
                       {"Content-Type": "application/json", "X-Token": token})
            assert to.getresponse().readline() == b'{"text": "a"}\n'
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 130
            assert running.stderr.read() == "interrupted\n"
        finally:
            running.kill()


def test_a_page_translates_greedily_and_samples_everything_else(trained):
    formats = PromptFormat.load_all([trained], Tokenizer.open(trained))
    answerer = Answerer(Settings(web=True), trained, None, formats["text"], {1}, None)
    configs = page_configs(answerer, formats)
    assert {name: x.sampling.temperature for name, x in configs.items()} == {
        "eng-kin": 0.0, "kin-eng": 0.0, "chat": 0.8, "text": 0.8}


def test_a_base_model_offers_only_to_continue_a_text(tmp_path):
    folder = tiny.folder(tmp_path / "base")
    assert list(PromptFormat.load_all([folder], Tokenizer.open(folder))) == ["text"]


@pytest.mark.parametrize("question", [
    {}, {"format": "text"}, {"format": "kin-eng", "text": "a"}, {"format": ["text"], "text": "a"},
    {"format": "text", "text": 1}, {"format": "text", "text": "a", "new": 0},
    {"format": "text", "text": "a", "new": 65}, {"format": "text", "text": "a", "new": True},
    {"format": "text", "text": "a", "new": 1e300},
    {"format": "text", "text": "a", "temperature": -1},
    {"format": "text", "text": "a", "temperature": float("nan")},
    {"format": "text", "text": "a", "top_p": 2}, {"format": "text", "text": "a", "model": "/etc"},
    {"format": "chat", "text": "a"}, {"format": "chat", "messages": []},
    {"format": "chat", "messages": ["a"]}, {"format": "chat", "messages": [{"role": "x"}]},
    {"format": "chat", "messages": [{"role": "user", "content": 3}]}])
def test_a_question_that_the_page_does_not_offer_is_refused(trained, question):
    tokenizer = Tokenizer.open(trained)
    formats = PromptFormat.load_all([trained], tokenizer)
    configs = {k: GenerationConfig(formats[k], SamplingParams(64, 0.8), NO_STOPPING_CRITERIA)
               for k in ("chat", "text")}
    with pytest.raises(UserError):
        make_replier(tiny.ours(tiny.peer(seed=2)), configs)(question)


def test_a_question_is_tokenised_once(trained):
    tokenizer, read = Tokenizer.open(trained), []

    class Recording(PromptFormat):
        def encode(self, prompt):
            read.append(prompt)
            return super().encode(prompt)

    formats = Recording.load_all([trained], tokenizer)
    reply = make_replier(tiny.ours(tiny.peer(seed=2)), {
        k: GenerationConfig(formats[k], SamplingParams(2, 0), NO_STOPPING_CRITERIA)
        for k in ("chat", "text", "eng-kin")})
    messages = [{"role": "user", "content": "Muraho"}]
    for question, prompts in (({"format": "text", "text": "a\nb"}, ["a\nb"]),
                              ({"format": "chat", "messages": messages}, [messages]),
                              ({"format": "eng-kin", "text": "a\n \nb"}, ["a", "b"])):
        read.clear()
        assert list(reply(question))[-1]["tokens"] == 2 * len(prompts) and read == prompts


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 40])
def test_a_conversation_loses_as_few_messages_as_possible(trained, n):
    prompt_format = PromptFormat.load([trained], Tokenizer.open(trained))
    messages = [{"role": ("user", "assistant")[i % 2], "content": "a" * (i * 7 % 11 + 1)}
            for i in range(n)]
    rests = [messages[i:] for i in range(0, n, 2)]
    for room in (0, 10, 60, 200, 10_000):
        expected = next((x for x in rests if len(prompt_format.encode(x)) <= room), rests[-1])
        assert prompt_format.truncate_conversation(messages, room) == (
            expected, prompt_format.encode(expected))


@pytest.mark.browser
@pytest.mark.skipif(not browser.CHROMIUM, reason="no chromium here to open the page")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_asks_shows_and_stops_and_runs_nothing_that_the_model_writes(tmp_path, width):
    served = ServerThread(timeout=5)
    try:
        with browser.browser(tmp_path / "profile") as tab:
            tab.open(f"http://127.0.0.1:{served.port}/", width)
            assert tab.run("document.title") == FACTS["title"]
            assert tab.run("document.getElementById('empty').textContent") == "about chat"

            def ask_for(text: str) -> None:
                tab.run(f"document.getElementById('text').value = {json.dumps(text)}; "
                        "document.getElementById('go').click()")

            idle = ("new Promise(r => {const look = () => document.querySelector('.busy') ? "
                    "setTimeout(look, 20) : r(); look()})")
            answers = "[...document.querySelectorAll('.answer')].map(x => x.textContent)"
            ask_for(HOSTILE)
            tab.run(idle)
            ask_for("Muraho " + "ubwenegihugu" * 40)
            tab.run(idle)
            messages = served.model.questions[-1]["messages"]
            assert [x["role"] for x in messages] == ["user", "assistant", "user"]
            assert messages[0]["content"] == HOSTILE
            assert HOSTILE in tab.run("document.querySelector('.prompt').textContent")
            assert tab.run("document.title") == FACTS["title"]  # not taken
            for _ in range(5):  # a conversation that outgrows what a question may hold
                ask_for("Amazi ni meza. " * 1000)
                tab.run(idle)
            messages = served.model.questions[-1]["messages"]
            assert len(messages) < 9 and messages[0]["role"] == "user"
            assert len(served.model.questions) == 7
            assert tab.run("document.querySelectorAll('.foot.bad').length") == 0
            last = tab.run("[...document.querySelectorAll('.foot')].at(-1).textContent")
            assert last.startswith(TRUNCATED_NOTICE)
            assert tab.run("document.querySelectorAll('#log img, #log script').length") == 0
            assert tab.run("document.documentElement.scrollWidth") <= width
            assert tab.run("Math.round(document.querySelector('form').getBoundingClientRect()"
                           ".bottom)") <= 900  # what is typed into is on the screen

            tab.run("document.querySelector('[data-name=eng-kin]').click()")
            assert tab.run("document.querySelectorAll('.turn').length") == 0
            ask_for("The water is good.")
            tab.run(idle)
            assert tab.run(answers) == ["Answer to The water is good."]
            left, right = (tab.run(f"document.querySelector('.{x}').getBoundingClientRect().top")
                           for x in ("prompt", "answer"))
            assert left == right if width > 600 else left < right  # beside it, or under it

            tab.run("document.querySelector('[data-name=text]').click()")
            tab.run("document.getElementById('temperature').value = 0.65; "
                    "document.getElementById('top_p').value = 0.92")  # of no step of the fields
            ask_for("Umwana")
            tab.run(idle)
            question = served.model.questions[-1]
            assert (question["temperature"], question["top_p"]) == (0.65, 0.92)
            ask_for("slow")
            tab.run("new Promise(r => {const look = () => document.querySelector('.busy')"
                    "?.textContent ? r() : setTimeout(look, 20); look()})")
            assert tab.run("document.getElementById('go').textContent") == "Stop"
            tab.run("document.getElementById('go').click()")
            tab.run(idle)
            assert served.model.ended.wait(20)
            assert tab.run("[...document.querySelectorAll('.foot')].at(-1).textContent"
                           ".includes('stopped')")
            ask_for("fail")
            tab.run(idle)
            assert "terminal" in tab.run("document.querySelector('.foot.bad').textContent")
            assert tab.run("document.getElementById('text').value") == "fail"  # to ask once more
            assert not tab.complaints, tab.complaints
    finally:
        served.close()
