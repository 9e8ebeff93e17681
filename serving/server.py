"""A page to ask a model from a browser: one page of HTML, and answers as they come.

The one idea: whoever knocks is a stranger, though it be from this machine, for every site that a
browser has open can reach a local door, under a name of its own too. So the name it was called by
(`Host`) must be ours; a question must come from our own page, which alone knows this start's token;
no path names a file; and all is bounded: bytes, seconds, connections, questions that wait. What a
model says is text to the page, never markup.

It knows nothing of models: `reply` makes an answer's parts of a question. One question is answered
at a time, in a thread of its own; who goes away ends the answer (a search, when its line is done).
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
from http import HTTPStatus
from typing import Any, NamedTuple

from runtime.console import FLAGS, UserError, say

Reply = Callable[[Mapping[str, Any]], Iterator[Mapping[str, Any]]]

HEAD, BODY = 16 << 10, 64 << 10  # bytes of a request before its body, and of its body
PATIENCE = 30.0  # seconds for a whole request to come, and for each part of an answer to be taken
LINGER = 1.0  # seconds in which who is refused may finish speaking, or the refusal is never read
OPEN = 64  # connections at once
WAITING = 4  # questions at once, the one that is being answered among them
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5d6b7a; --line: #d9dfe5; --paper: #fff; --card: #f3f6f8;
  --mine: #e3f0e9; --accent: #16704a; --on: #fff; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ee; --soft: #9aa7b4; --line: #323c46; --paper: #12171c;
  --card: #1a2128; --mine: #1d3329; --accent: #5fc992; --on: #0d1a13; --bad: #f08a80; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
html { height: 100%; } body { margin: 0; height: 100dvh; display: flex; flex-direction: column; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
header, #log, form { width: 100%; max-width: 52rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: .8rem; display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; padding-bottom: .8rem; }
h1 { font-size: 1rem; margin: 0; flex: 1 1 12rem; }
nav { display: flex; gap: .25rem; background: var(--card); border-radius: 10px; padding: .25rem; }
button, input, textarea { font: inherit; color: inherit; }
button { border: 0; background: none; border-radius: 8px; padding: .35rem .8rem; cursor: pointer; white-space: nowrap; }
nav button { color: var(--soft); } nav [aria-selected=true] { background: var(--paper); color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; } textarea:focus-visible { outline: 0; }
main { flex: 1; overflow-y: auto; border-top: 1px solid var(--line); }
#log { padding-top: 1rem; padding-bottom: 1rem; display: flex; flex-direction: column; gap: 1rem; min-height: 100%; }
#empty { margin: auto; color: var(--soft); text-align: center; max-width: 26rem; }
.said { white-space: pre-wrap; margin: 0; border-radius: 12px; padding: .6rem .9rem; min-height: 2.7rem; }
.asked { background: var(--mine); } .answer { background: var(--card); }
.chat { display: flex; flex-direction: column; gap: .6rem; align-items: flex-start; }
.chat .said { max-width: 88%; } .chat .asked { align-self: flex-end; }
.translate { display: grid; gap: .4rem .6rem; grid-template-columns: 1fr 1fr; } .translate .foot { grid-column: 1 / -1; }
.text .both { background: var(--card); border-radius: 12px; padding: .6rem .9rem; }
.text .said { display: inline; background: none; padding: 0; } .text .asked { color: var(--soft); }
.foot { color: var(--soft); font-size: .8rem; margin: .2rem .2rem 0; } .foot.bad { color: var(--bad); }
.busy::after { content: ""; display: inline-block; width: .55em; height: 1em; vertical-align: -.15em; background: var(--accent);
  animation: blink 1s steps(2) infinite; } @keyframes blink { 50% { opacity: 0; } }
form { padding-top: .7rem; padding-bottom: max(.8rem, env(safe-area-inset-bottom)); }
.box { border: 1px solid var(--line); border-radius: 14px; padding: .5rem; background: var(--paper); }
.box:focus-within { border-color: var(--accent); }
textarea { display: block; width: 100%; border: 0; resize: none; background: none; padding: .2rem .4rem;
  min-height: 3.4rem; max-height: 40dvh; }
.row { display: flex; align-items: center; gap: .3rem; margin-top: .4rem; } .row button { color: var(--soft); } .row .gap { flex: 1; }
.row #go { background: var(--accent); color: var(--on); font-weight: 600; padding: .4rem 1.1rem; min-width: 5rem; }
#more { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.5rem, 1fr)); gap: .5rem .8rem; padding: .5rem .4rem; }
#more label { color: var(--soft); font-size: .8rem; }
input { width: 100%; border: 1px solid var(--line); border-radius: 8px; padding: .3rem .5rem; background: var(--paper); }
@media (max-width: 34rem) { .translate { grid-template-columns: 1fr; } .row button { padding: .4rem .5rem; }
  nav { width: 100%; display: grid; grid-template-columns: 1fr 1fr; } nav button { padding: .4rem .2rem; font-size: .9rem; } }
"""
SCRIPT = """
"use strict";
const $ = id => document.getElementById(id), facts = JSON.parse($("facts").textContent);
let way = null, said = [], kept = [], running = null;  // messages, exchanges, what can stop the answer

function put(parent, tag, kind, text) {  // everything that is shown goes through textContent
  const x = document.createElement(tag);
  x.className = kind; x.textContent = text; parent.append(x);
  return x;
}
function choose(next) {
  if (running) return;
  if (way && (way.kind === "chat" || next.kind === "chat")) clear();
  way = next;
  for (const x of $("ways").children) x.setAttribute("aria-selected", x.dataset.name === way.name);
  $("empty").textContent = way.about;
  $("text").placeholder = way.hint;
  for (const x of document.querySelectorAll(".draws")) x.hidden = way.kind === "translate";
  $("text").focus();
}
function clear() {
  said = []; kept = [];
  for (const x of document.querySelectorAll(".turn")) x.remove();
  change();
}
function change() {  // what the controls look like now
  $("empty").hidden = Boolean(document.querySelector(".turn"));
  $("go").textContent = running ? "Stop" : way && way.kind === "translate" ? "Translate" : "Send";
  for (const x of $("ways").children) x.disabled = Boolean(running);
  $("clear").disabled = Boolean(running); $("save").disabled = Boolean(running) || !kept.length;
}
function grow() {
  $("text").style.height = "auto";
  $("text").style.height = $("text").scrollHeight + "px";
}
async function ask(text) {
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  const question = {way: way.name, seed, new: Number($("new").value)};
  if (way.kind !== "translate") Object.assign(question,
    {temperature: Number($("temperature").value), top_p: Number($("top_p").value)});
  if (way.kind === "chat") question.messages = [...said, {role: "user", content: text}];
  else question.text = text;
  while (way.kind === "chat" && question.messages.length > 2 &&
    new Blob([JSON.stringify(question)]).size > facts.most) question.messages.splice(0, 2);
  const turn = put($("log"), "section", "turn " + way.kind, "");
  const both = way.kind === "text" ? put(turn, "div", "both", "") : turn;
  put(both, "p", "said asked", text);
  const shown = put(both, "p", "said answer busy", ""), foot = put(turn, "p", "foot", "");
  const main = document.querySelector("main");
  turn.scrollIntoView({block: "nearest"});
  let end = null;
  const notes = way.kind === "chat" && question.messages.length <= said.length ? [facts.outgrown] : [];
  const take = part => {
    const near = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
    if (part.text) shown.append(part.text);  // a text node
    if (part.note) notes.push(part.note);
    if (part.error) throw new Error(part.error);
    if (part.end) end = part;
    if (near) main.scrollTop = main.scrollHeight;
  };
  running = new AbortController(); change();
  try {
    const answer = await fetch("answer", {method: "POST", signal: running.signal, body: JSON.stringify(question),
      headers: {"Content-Type": "application/json", "X-Token": facts.token}});
    if (!answer.ok) throw new Error(await answer.text());
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "";;) {
      const {value, done} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\\n");
      rest = lines.pop();
      lines.forEach(line => take(JSON.parse(line)));
    }
    if (!end) throw new Error("the answer broke off; is sample.py still running?");
    notes.push(`${end.tokens} tokens in ${end.seconds} s`);
    if (way.kind !== "translate") notes.push(`seed ${seed}`);
    if (end.end === "length") notes.push("as many tokens as were asked for");
  } catch (e) {
    const stopped = e.name === "AbortError";
    foot.classList.toggle("bad", !stopped);
    notes.push(stopped ? "stopped" : e instanceof TypeError ? "no answer; is sample.py still running?" : e.message);
  }
  running = null;
  shown.classList.remove("busy");
  foot.textContent = notes.join(" · ");
  const answer = shown.textContent;
  if (answer || end) {
    said.push({role: "user", content: text}, {role: "assistant", content: answer.trim()});
    kept.push({way: way.name, prompt: text, text: answer});
  } else if (!$("text").value) { $("text").value = text; grow(); }  // nothing is lost to a fault
  turn.scrollIntoView({block: "end"});
  change();
}
$("form").addEventListener("submit", e => {
  e.preventDefault();
  if (running) return running.abort();
  const text = $("text").value;
  if (!text.trim() && way.kind !== "text") return;
  $("text").value = ""; grow();
  ask(text);
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", e => {
  if (e.key !== "Enter" || e.shiftKey || e.isComposing || matchMedia("(pointer: coarse)").matches) return;
  e.preventDefault();
  if (!running) $("form").requestSubmit();
});
$("settings").addEventListener("click", () => {
  $("more").hidden = !$("more").hidden;
  $("settings").setAttribute("aria-expanded", !$("more").hidden);
});
$("clear").addEventListener("click", clear);
$("save").addEventListener("click", () => {  // a conversation as `prepare.py chat` reads it
  const rows = way.kind === "chat" ? [{messages: said}] : kept;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([rows.map(x => JSON.stringify(x) + "\\n").join("")]));
  link.download = way.kind === "chat" ? "talk.jsonl" : "answers.jsonl";
  link.click();
});
document.title = facts.title; $("title").textContent = facts.title;
for (const x of facts.ways) {
  const button = put($("ways"), "button", "", x.label);
  button.type = "button"; button.dataset.name = x.name; button.setAttribute("role", "tab");
  button.addEventListener("click", () => { choose(x); change(); });
}
$("ways").hidden = facts.ways.length < 2;
for (const name of ["new", "temperature", "top_p"]) $(name).value = facts[name];
$("new").max = facts.new;
choose(facts.ways[0]); change();
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title></title><style>{style}</style></head><body>
<header><h1 id="title"></h1><nav id="ways" role="tablist" aria-label="What to ask for"></nav></header>
<main><div id="log" aria-live="polite"><p id="empty"></p></div></main>
<form id="form" novalidate><div class="box"><textarea id="text" aria-label="Text" maxlength="20000" dir="auto"></textarea>
<div id="more" hidden><label>most tokens<input id="new" type="number" min="1" step="1"></label>
<label class="draws">temperature<input id="temperature" type="number" min="0" step="0.1"></label>
<label class="draws">top-p<input id="top_p" type="number" min="0.05" max="1" step="0.05"></label>
<label class="draws">seed<input id="seed" type="number" min="0" step="1" placeholder="another each time"></label></div>
<div class="row"><button id="settings" type="button" aria-expanded="false" aria-controls="more">Settings</button>
<button id="clear" type="button">Clear</button><button id="save" type="button">Save</button><span class="gap"></span>
<button id="go">Send</button></div></div></form>
<script type="application/json" id="facts">{facts}</script><script>{script}</script></body></html>
"""


class Refused(Exception):
    """A request that gets no answer: an HTTP status, and why in one line."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = HTTPStatus(status)


class Request(NamedTuple):
    """What was asked for; names of headers in small letters."""

    method: str
    path: str
    headers: Mapping[str, str]


def parsed(head: bytes) -> Request:
    """A request's first lines; Refused (400) if they are not exactly what HTTP/1 says."""
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    words = re.fullmatch(r"([A-Z]+) (\S+) HTTP/1\.[01]", first)
    found = [re.fullmatch(r"([!#$%&'*+.^_`|~\w-]+):([^\r\n\0]*)", x, re.ASCII) for x in lines]
    headers = {x[1].lower(): x[2].strip(" \t") for x in found if x}
    if not words or len(headers) < len(lines):  # a header said twice is none
        raise Refused(400, "this is not HTTP")
    return Request(words[1], words[2], headers)


class Door:
    """Who may ask what: a page for who calls us by our name, answers for who has the page."""

    def __init__(self, reply: Reply, facts: Mapping[str, Any], patience: float = PATIENCE):
        self.reply, self.facts, self.patience = reply, facts, patience
        self.token = secrets.token_urlsafe(32)
        self.names: set[str] = set()  # what `Host` may be
        self.open, self.asked = 0, set()
        self.worker = ThreadPoolExecutor(1)
        own = {k: base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()
               for k, x in (("style", STYLE), ("script", SCRIPT))}
        policy = (f"default-src 'none'; script-src 'sha256-{own['script']}'; style-src "
                  f"'sha256-{own['style']}'; connect-src 'self'; img-src data:; base-uri 'none'; "
                  "form-action 'none'; frame-ancestors 'none'")
        self.always = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff",
                       "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
                       "Cross-Origin-Resource-Policy": "same-origin", "Connection": "close"}

    async def listen(self, address: str) -> asyncio.Server:
        """Begin; UserError if the address cannot be had."""
        host, _, port = address.rpartition(":")
        if not re.fullmatch(r"\d{1,5}", port) or int(port) > 65535 or host in ("", "0.0.0.0", "[::]"):
            raise UserError(f"--address {address}: expected one address of this machine and a "
                            "port, as in 127.0.0.1:8000", FLAGS)
        try:
            server = await asyncio.start_server(self.meet, host.strip("[]"), int(port), limit=HEAD)
        except OSError as e:
            raise UserError(f"--address {address}: {e.strerror or e}; is another page there? Name "
                            "another port", FLAGS) from None
        number = server.sockets[0].getsockname()[1]
        own = LOOPBACK if host in LOOPBACK else (host,)
        self.names = {f"{x}:{number}" for x in own} | set(own if number == 80 else ())
        if host not in LOOPBACK:
            say(f"{host} is no address of this machine alone: all who reach it can ask the model")
        say(f"open http://{host}:{number} in a browser; Ctrl-C ends")
        return server

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection: one request, one answer, no other."""
        self.open += 1
        writer.transport.set_write_buffer_limits(0)  # what is drained is with the system
        try:
            try:
                await self.admit(reader, writer)
            except TimeoutError:
                raise Refused(408, "too slow") from None
            except asyncio.LimitOverrunError:
                raise Refused(431, f"more than {HEAD} bytes before the body") from None
        except Refused as e:
            await self.refuse(e, reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):  # it went away, or we end
            pass
        finally:
            self.open -= 1
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a request, look it over, answer it; Refused at the first thing that is wrong."""
        if self.open > OPEN:
            raise Refused(429, "too many connections; try again later")
        async with asyncio.timeout(self.patience) as until:
            request = parsed(await reader.readuntil(b"\r\n\r\n"))
            host, origin = (request.headers.get(x) for x in ("host", "origin"))
            if host not in self.names or origin not in (None, f"http://{host}"):
                raise Refused(403, "asked for under another name, or by another site")
            if (request.method, request.path) == ("GET", "/"):
                until.reschedule(None)
                page = self.page().encode()
                return await self.send(writer, self.head(200, "text/html", len(page)) + page)
            if request.path != "/answer":
                raise Refused(404, "there is nothing here; the page is at /")
            if request.method != "POST":
                raise Refused(405, "a question is a POST")
            question = await self.question(request, reader)
        if len(self.asked) >= WAITING:
            raise Refused(429, f"{WAITING} questions wait already; try again later")
        try:
            parts = self.reply(question)
        except UserError as e:
            raise Refused(400, str(e)) from None
        await self.answer(parts, reader, writer)

    async def question(self, request: Request, reader: asyncio.StreamReader) -> Mapping[str, Any]:
        """The JSON object that a POST carries, if our page has sent it."""
        if not hmac.compare_digest(request.headers.get("x-token", "").encode("latin-1"),
                                   self.token.encode()):
            raise Refused(403, "this page is of an earlier start; load it anew")
        if request.headers.get("content-type") != "application/json":
            raise Refused(415, "a question is application/json")
        size = request.headers.get("content-length", "")
        if "transfer-encoding" in request.headers or not re.fullmatch(r"[0-9]{1,18}", size):
            raise Refused(411, "a question says its length")
        if int(size) > BODY:
            raise Refused(413, f"a question holds at most {BODY} bytes")
        try:
            question = json.loads(await reader.readexactly(int(size)))
            if not isinstance(question, dict):
                raise ValueError
            json.dumps(question, ensure_ascii=False).encode()  # no half characters
        except (ValueError, RecursionError):
            raise Refused(400, "a question is a JSON object, in UTF-8") from None
        return question

    async def answer(self, parts: Iterator[Mapping[str, Any]], reader: asyncio.StreamReader,
                     writer: asyncio.StreamWriter) -> None:
        """Send an answer's parts as they come, a JSON object a line, while somebody listens."""
        loop, ready, gone = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def tell(part: Mapping[str, Any] | None) -> None:
            loop.call_soon_threadsafe(ready.put_nowait, part)

        job = loop.run_in_executor(self.worker, work, parts, tell, gone)
        self.asked.add(job)
        job.add_done_callback(self.asked.discard)
        leaving = asyncio.create_task(reader.read(1))  # a browser says no more; it closes
        leaving.add_done_callback(lambda _: ready.put_nowait(None))
        try:
            await self.send(writer, self.head(200, "application/x-ndjson"))
            while (part := await ready.get()) is not None:
                line = json.dumps(part, ensure_ascii=False) + "\n"
                await self.send(writer, line.encode())
        except TimeoutError:  # it takes nothing any more
            writer.transport.abort()
        finally:
            gone.set()
            leaving.cancel()
            await asyncio.wait({job})  # it tells its last to a loop that still runs

    async def refuse(self, why: Refused, reader: asyncio.StreamReader,
                     writer: asyncio.StreamWriter) -> None:
        """Say why in a line, and let it finish: closed at once, it might never read the line."""
        text = f"{why}\n".encode()
        try:
            await self.send(writer, self.head(why.status, "text/plain", len(text)) + text)
            if self.open <= OPEN:
                writer.write_eof()
                async with asyncio.timeout(min(LINGER, self.patience)):
                    while await reader.read(HEAD):
                        pass
        except (OSError, TimeoutError):
            pass

    async def send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Write, and wait until the system has it; TimeoutError if it takes too long."""
        writer.write(data)
        async with asyncio.timeout(self.patience):
            await writer.drain()

    def head(self, status: int, kind: str, size: int | None = None) -> bytes:
        """An answer's first lines; `size` in bytes, where it is known."""
        lines = {"Content-Type": f"{kind}; charset=utf-8", **self.always}
        if size is not None:  # else: until the connection ends
            lines["Content-Length"] = str(size)
        words = "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        return f"HTTP/1.1 {int(status)} {HTTPStatus(status).phrase}\r\n{words}\r\n".encode()

    def page(self) -> str:
        """The page, with what it has to know; nothing in that can end its script."""
        facts = json.dumps({**self.facts, "token": self.token, "most": BODY}).replace("<", "\\u003c")
        return PAGE.replace("{style}", STYLE).replace("{script}", SCRIPT).replace("{facts}", facts)


def work(parts: Iterator[Mapping[str, Any]], tell: Callable[[Any], None],
         gone: threading.Event) -> None:
    """Make an answer, in the thread that answers; then, or where it fails, say so."""
    try:
        while not gone.is_set() and (part := next(parts, None)) is not None:
            tell(part)
    except UserError as e:
        tell({"error": str(e)})
    except Exception:  # one answer fails, with all that is known of it; the page stays
        traceback.print_exc()
        tell({"error": "sample.py failed; what went wrong stands in its terminal"})
    finally:
        parts.close()
        tell(None)


async def serve(address: str, reply: Reply, facts: Mapping[str, Any]) -> None:
    """Serve until interrupted."""
    server = await Door(reply, facts).listen(address)
    try:  # serve_forever, interrupted, would wait until every answer is whole
        await asyncio.get_running_loop().create_future()
    finally:
        server.close()
