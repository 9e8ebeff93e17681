"""The page of sample.py: what strangers at its door get, what it answers, what a browser shows."""

from __future__ import annotations

import asyncio
import http.client
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
WAYS = [{"name": n, "kind": k, "label": n, "about": f"about {n}", "hint": f"hint {n}"}
        for n, k in (("chat", "chat"), ("eng-kin", "translate"), ("text", "text"))]
FACTS = {"title": f"out/kin {HOSTILE}", "ways": WAYS, "outgrown": TRUNCATED_NOTICE, "new": 64,
         "temperature": 0.8, "top_p": 0.95}


class Asked:
    """A function that answers as a model would, and remembers what it was asked."""

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


class Served:
    """A door in a thread of its own."""

    def __init__(self, patience: float):
        self.asked, self.loop = Asked(), asyncio.new_event_loop()
        self.door = Server(self.asked, FACTS, patience)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = self.do(self.door.listen("127.0.0.1:0"))
        self.port = self.server.sockets[0].getsockname()[1]

    def do(self, what):
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(10)

    def close(self) -> None:
        self.asked.go_on.set()
        self.do(self.end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.door.worker.shutdown()
        self.loop.close()

    async def end(self) -> None:
        """End as asyncio.run does: no connection outlives its loop."""
        self.server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def socket(self) -> socket.socket:
        s = socket.create_connection(("127.0.0.1", self.port), 20)
        s.settimeout(20)
        return s

    def raw(self, request: bytes) -> bytes:
        """All that is said to a request; b"" if the connection is only closed."""
        with self.socket() as s:
            try:
                s.sendall(request)
            except OSError:  # it is closed before we have said all
                pass
            return all_of(s)

    def head(self, first: str = "POST /answer HTTP/1.1", size: int | None = None,
             **changes: str | None) -> bytes:
        """A request's first lines as our page sends them, but for `changes`; None leaves one out.
        """
        lines = {"Host": f"127.0.0.1:{self.port}", "Origin": f"http://127.0.0.1:{self.port}",
                 "Content-Type": "application/json", "X-Token": self.door.token,
                 "Content-Length": None if size is None else str(size)}
        lines |= {k.replace("_", "-"): v for k, v in changes.items()}
        said = [f"{k}: {v}" for k, v in lines.items() if v is not None]
        return "\r\n".join([first, *said, "", ""]).encode()

    def ask(self, question: dict | bytes, **changes: str | None) -> bytes:
        body = question if isinstance(question, bytes) else json.dumps(question).encode()
        return self.raw(self.head(size=len(body), **changes) + body)


def begun(s: socket.socket) -> bytes:
    """The first bytes that come."""
    try:
        return s.recv(65536)
    except ConnectionError:
        return b""


def all_of(s: socket.socket) -> bytes:
    found = b""
    try:
        while more := s.recv(65536):
            found += more
    except ConnectionError:
        pass
    return found


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def lines(answer: bytes) -> list[dict]:
    return [json.loads(x) for x in answer.partition(b"\r\n\r\n")[2].splitlines()]


@pytest.fixture
def served():
    served = Served(patience=0.5)
    yield served
    served.close()


def test_the_page_and_an_answer_are_given_to_who_calls_by_our_name(served):
    for name in ("127.0.0.1", "localhost", "[::1]"):
        page = served.raw(f"GET / HTTP/1.1\r\nHost: {name}:{served.port}\r\n\r\n".encode())
        assert status(page) == 200 and served.door.token.encode() in page
        assert b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n" in page
        found = served.ask({"way": "text", "text": "Inka \u2028 \U0001f600"},
                           Host=f"{name}:{served.port}", Origin=f"http://{name}:{served.port}")
        assert status(found) == 200
        assert lines(found) == [{"text": "Answer to "}, {"text": "Inka \u2028 \U0001f600"},
                                {"end": "eos", "tokens": 3, "seconds": 0.1}]
    assert status(served.ask({"text": "a"}, Origin=None)) == 200  # curl, with the page's token


def test_the_page_asks_nobody_else_and_runs_nothing_but_its_own_script(served):
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


STRANGERS = {  # what differs from what our page sends -> the answer's status
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


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_is_refused(served, what):
    changes, wanted = STRANGERS[what]
    changes = {k: v and v.replace("{port}", str(served.port)) for k, v in changes.items()}
    body = b'{"text": "a"}'
    found = served.raw(served.head(**{"size": len(body), **changes}) + body)
    assert status(found) == wanted and served.asked.questions == []
    assert served.door.token.encode() not in found and b"Traceback" not in found
    assert status(served.ask({"text": "a"})) == 200  # and the door is still there


@pytest.mark.parametrize("first, wanted", [
    ("GET /../../../../etc/passwd HTTP/1.1", 404), ("GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1", 404),
    ("GET //etc/passwd HTTP/1.1", 404), ("GET /web.py HTTP/1.1", 404),
    ("GET /file=/etc/passwd HTTP/1.1", 404), ("GET /?file=/etc/passwd HTTP/1.1", 404),
    ("GET http://127.0.0.1/ HTTP/1.1", 404), ("POST / HTTP/1.1", 404),
    ("GET /answer HTTP/1.1", 405), ("OPTIONS /answer HTTP/1.1", 405), ("HEAD / HTTP/1.1", 404),
    ("PUT /answer HTTP/1.1", 405), ("GET / HTTP/2.0", 400), ("GET /", 400), ("get / HTTP/1.1", 400),
    ("GET  / HTTP/1.1", 400), ("\x16\x03\x01", 400), ("", 400)])
def test_no_path_names_a_file_and_no_other_method_is_known(served, first, wanted):
    found = served.raw(served.head(first, size=2) + b"{}")
    assert status(found) == wanted and b"root:" not in found and served.asked.questions == []
    assert served.door.token.encode() not in found


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"a"', b"[" * 60_000, b"9" * 5000, b"\xff\xfe", b'{"a": "\xe9"}',
    b'{"text": "\\ud800"}', b'{"new": 0}'])
def test_what_is_no_question_is_refused(served, body):
    found = served.ask(body)
    assert status(found) == 400 and b"Traceback" not in found
    assert status(served.ask({"text": "a"})) == 200


def memory() -> float:
    """Pages that this process holds, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_ten_megabytes_are_refused_unread(served):
    before = memory()
    for _ in range(5):
        assert status(served.ask(b"[" + b" " * 10_000_000 + b"]")) == 413
    assert memory() - before < 50 and served.asked.questions == []


def test_who_speaks_too_slowly_is_cut_off(served):
    with served.socket() as s:  # a byte now and then does not prolong it
        for byte in served.head(size=2):
            try:
                s.send(bytes([byte]))
            except OSError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("it listened to the end")
        assert status(all_of(s)) in (0, 408)
    found = served.raw(served.head(size=100) + b"{")  # and of its body the rest never comes
    assert status(found) == 408
    with served.socket() as s:
        assert status(all_of(s)) == 408  # it says nothing at all
    assert served.asked.questions == []


def test_who_takes_nothing_of_an_answer_ends_it(served):
    body = b'{"text": "long"}'
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", served.port))
        s.sendall(served.head(size=len(body)) + body)
        assert served.asked.ended.wait(20)


def test_who_goes_away_ends_the_answer_and_the_next_is_answered(served):
    body = b'{"text": "long"}'
    with served.socket() as s:
        s.sendall(served.head(size=len(body)) + body)
        assert s.recv(100)
        assert not served.asked.ended.is_set()
    assert served.asked.ended.wait(20)
    assert lines(served.ask({"text": "a"}))[-1]["end"] == "eos"


def test_of_a_hundred_questions_at_once_four_are_taken(served):
    body = b'{"text": "wait"}'
    sockets = [served.socket() for _ in range(100)]
    try:
        for s in sockets:
            s.sendall(served.head(size=len(body)) + body)
        first = [begun(s) for s in sockets]  # of each, while no answer goes on
        served.asked.go_on.set()
        found = [a + all_of(s) for a, s in zip(first, sockets, strict=True)]
    finally:
        for s in sockets:
            s.close()
    codes = [status(x) for x in found]
    assert set(codes) <= {200, 429} and codes.count(200) == 4
    assert all(lines(x)[-1]["end"] == "eos" for x in found if status(x) == 200)
    assert len(served.asked.questions) == 4  # who finds the door full costs nothing
    assert lines(served.ask({"text": "a"}))[-1]["end"] == "eos"


def test_idle_connections_do_not_keep_the_door_shut(served):
    sockets = [served.socket() for _ in range(100)]
    try:
        time.sleep(1.5)  # longer than its patience
        assert status(served.ask({"text": "a"})) == 200
    finally:
        for s in sockets:
            s.close()


def test_a_fault_while_answering_is_said_and_the_page_goes_on(served, capfd):
    found = served.ask({"text": "fail"})
    assert status(found) == 200 and "its terminal shows the traceback" in lines(found)[-1]["error"]
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert lines(served.ask({"text": "a"}))[-1]["end"] == "eos"


@pytest.mark.parametrize("address", ["8000", "127.0.0.1", "127.0.0.1:x", "0.0.0.0:8000", ":8000",
                                     "[::]:8000", "127.0.0.1:99999", "192.0.2.1:8000", "taken"])
def test_an_address_that_cannot_be_had_is_one_line(served, address):
    address = f"127.0.0.1:{served.port}" if address == "taken" else address
    with pytest.raises(UserError, match="--address") as e:
        asyncio.run(Server(Asked(), FACTS).listen(address))
    assert e.value.code == 2 and "\n" not in str(e.value)


TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> Path:
    """A tiny model that was taught to converse and to translate."""
    folder = tiny.folder(tmp_path_factory.mktemp("taught") / "model", seed=2)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "prompt.json").write_text(json.dumps({"translate": [{
        "name": "x", "text": "{source}: {text}\n{target}:",
        "languages": {"eng": "English", "kin": "Kinyarwanda"}}]}))
    return folder


def sampled(folder: Path, *more: str) -> str:
    """What sample.py answers elsewhere."""
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--model", folder, "--dtype", "fp32",
                           "--device", "cpu", "--max-new-tokens", "12", *more], text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_of_a_model_answers_as_sample_py_does_and_ends_with_ctrl_c(taught, tmp_path):
    run = [sys.executable, ROOT / "sample.py", "--model", taught, "--web", "--address",
           "127.0.0.1:0", "--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "12",
           "--beams", "2"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # as at a terminal
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as running:
        try:
            port = None
            while port is None:
                assert running.poll() is None
                found = re.search(r"http://127\.0\.0\.1:(\d+)", running.stderr.readline())
                port = found and int(found[1])

            def get(method: str, path: str, body: str | None = None, token: str = "") -> bytes:
                to = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                to.request(method, path, body, {"Content-Type": "application/json",
                                                "X-Token": token})
                return to.getresponse().read()

            facts = json.loads(re.search(r'id="facts">(.*?)</script>',
                                         get("GET", "/").decode())[1])
            assert [x["name"] for x in facts["ways"]] == ["eng-kin", "kin-eng", "chat", "text"]

            def answer(**question) -> str:
                found = get("POST", "/answer", json.dumps(question), facts["token"])
                rows = [json.loads(x) for x in found.splitlines()]
                assert rows[-1]["end"] in ("eos", "stop", "length"), found
                return "".join(x.get("text", "") for x in rows)

            said = [{"role": "user", "content": "Muraho"}, {"role": "assistant", "content": "Ego"},
                    {"role": "user", "content": "Amakuru?"}]
            drawn = {"temperature": 1.2, "seed": 7, "top_p": 0.9}
            text = answer(way="text", text="Inka", **drawn)
            chat = answer(way="chat", messages=said, temperature=0.0)
            lines = answer(way="eng-kin", text="The water\n\nOur cows").split("\n")
            long = get("POST", "/answer", json.dumps(
                {"way": "chat", "messages": [*said[:2] * 30, said[2]]}), facts["token"])
            assert json.loads(long.splitlines()[0]) == {"note": TRUNCATED_NOTICE}
            running.send_signal(signal.SIGINT)
            assert running.wait(30) == 130
        finally:
            running.kill()
    assert "Inka" + text + "\n" == sampled(taught, "--prompt", "Inka", "--temperature", "1.2",
                                           "--seed", "7", "--top-p", "0.9")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    assert chat == json.loads(sampled(taught, "--file", str(tmp_path / "chat.jsonl"),
                                      "--temperature", "0", "--json"))["text"].lstrip()
    wanted = sampled(taught, "--translate", "eng-kin", "--beams", "2", "--prompt", "The water",
                     "Our cows").split("\n")
    assert [x.strip() for x in lines] == [wanted[0], "", wanted[1]]


def test_ctrl_c_ends_an_answer_that_is_being_made_and_says_nothing_of_it():
    program = """if True:
        import asyncio, sys, time
        from runtime import console as log
        from serving.server import serve

        def reply(question):
            while True:
                time.sleep(0.2)
                yield {"text": "a"}

        facts = {"title": "x", "ways": []}
        sys.exit(log.run(lambda: asyncio.run(serve("127.0.0.1:0", reply, facts))))
    """
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE,
                          text=True, preexec_fn=heard) as running:
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


def test_a_page_translates_as_translate_does_and_draws_the_rest(taught):
    formats = PromptFormat.load_all([taught], Tokenizer.open(taught))
    answerer = Answerer(Settings(web=True), taught, None, formats["text"], {1}, None)
    found = page_configs(answerer, formats)
    assert {name: x.sampling.temperature for name, x in found.items()} == {
        "eng-kin": 0.0, "kin-eng": 0.0, "chat": 0.8, "text": 0.8}


def test_a_base_offers_only_to_go_on(tmp_path):
    folder = tiny.folder(tmp_path / "base")
    assert list(PromptFormat.load_all([folder], Tokenizer.open(folder))) == ["text"]


@pytest.mark.parametrize("question", [
    {}, {"way": "text"}, {"way": "kin-eng", "text": "a"}, {"way": ["text"], "text": "a"},
    {"way": "text", "text": 1}, {"way": "text", "text": "a", "new": 0},
    {"way": "text", "text": "a", "new": 65}, {"way": "text", "text": "a", "new": True},
    {"way": "text", "text": "a", "new": 1e300}, {"way": "text", "text": "a", "temperature": -1},
    {"way": "text", "text": "a", "temperature": float("nan")},
    {"way": "text", "text": "a", "top_p": 2}, {"way": "text", "text": "a", "model": "/etc"},
    {"way": "chat", "text": "a"}, {"way": "chat", "messages": []},
    {"way": "chat", "messages": ["a"]}, {"way": "chat", "messages": [{"role": "x"}]},
    {"way": "chat", "messages": [{"role": "user", "content": 3}]}])
def test_a_question_that_the_page_does_not_offer_is_refused(taught, question):
    tokenizer = Tokenizer.open(taught)
    formats = PromptFormat.load_all([taught], tokenizer)
    configs = {k: GenerationConfig(formats[k], SamplingParams(64, 0.8), NO_STOPPING_CRITERIA)
               for k in ("chat", "text")}
    with pytest.raises(UserError):
        make_replier(tiny.ours(tiny.peer(seed=2)), configs)(question)


def test_a_question_is_tokenised_once(taught):
    tokenizer, read = Tokenizer.open(taught), []

    class Recording(PromptFormat):
        def encode(self, prompt):
            read.append(prompt)
            return super().encode(prompt)

    formats = Recording.load_all([taught], tokenizer)
    reply = make_replier(tiny.ours(tiny.peer(seed=2)), {
        k: GenerationConfig(formats[k], SamplingParams(2, 0), NO_STOPPING_CRITERIA)
        for k in ("chat", "text", "eng-kin")})
    said = [{"role": "user", "content": "Muraho"}]
    for question, asked in (({"way": "text", "text": "a\nb"}, ["a\nb"]),
                            ({"way": "chat", "messages": said}, [said]),
                            ({"way": "eng-kin", "text": "a\n \nb"}, ["a", "b"])):
        read.clear()
        assert list(reply(question))[-1]["tokens"] == 2 * len(asked) and read == asked


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 40])
def test_a_conversation_forgets_as_little_as_must_be(taught, n):
    prompt_format = PromptFormat.load([taught], Tokenizer.open(taught))
    said = [{"role": ("user", "assistant")[i % 2], "content": "a" * (i * 7 % 11 + 1)}
            for i in range(n)]
    rests = [said[i:] for i in range(0, n, 2)]
    for room in (0, 10, 60, 200, 10_000):
        wanted = next((x for x in rests if len(prompt_format.encode(x)) <= room), rests[-1])
        assert prompt_format.truncate_conversation(said, room) == (
            wanted, prompt_format.encode(wanted))


@pytest.mark.browser
@pytest.mark.skipif(not browser.CHROMIUM, reason="no chromium here to open the page")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_asks_shows_stops_and_runs_nothing_that_is_said(tmp_path, width):
    served = Served(patience=5)
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
            messages = served.asked.questions[-1]["messages"]
            assert [x["role"] for x in messages] == ["user", "assistant", "user"]
            assert messages[0]["content"] == HOSTILE
            assert HOSTILE in tab.run("document.querySelector('.asked').textContent")
            assert tab.run("document.title") == FACTS["title"]  # not taken
            for _ in range(5):  # a conversation that outgrows what a question may hold
                ask_for("Amazi ni meza. " * 1000)
                tab.run(idle)
            messages = served.asked.questions[-1]["messages"]
            assert len(messages) < 9 and messages[0]["role"] == "user"
            assert len(served.asked.questions) == 7
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
                           for x in ("asked", "answer"))
            assert left == right if width > 600 else left < right  # beside it, or under it

            tab.run("document.querySelector('[data-name=text]').click()")
            tab.run("document.getElementById('temperature').value = 0.65; "
                    "document.getElementById('top_p').value = 0.92")  # of no step of the fields
            ask_for("Umwana")
            tab.run(idle)
            question = served.asked.questions[-1]
            assert (question["temperature"], question["top_p"]) == (0.65, 0.92)
            ask_for("slow")
            tab.run("new Promise(r => {const look = () => document.querySelector('.busy')"
                    "?.textContent ? r() : setTimeout(look, 20); look()})")
            assert tab.run("document.getElementById('go').textContent") == "Stop"
            tab.run("document.getElementById('go').click()")
            tab.run(idle)
            assert served.asked.ended.wait(20)
            assert tab.run("[...document.querySelectorAll('.foot')].at(-1).textContent"
                           ".includes('stopped')")
            ask_for("fail")
            tab.run(idle)
            assert "terminal" in tab.run("document.querySelector('.foot.bad').textContent")
            assert tab.run("document.getElementById('text').value") == "fail"  # to ask once more
            assert not tab.complaints, tab.complaints
    finally:
        served.close()
