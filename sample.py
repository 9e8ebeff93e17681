"""Ask a model: continue text, answer a file of prompts, converse, translate, from a page too.

    python sample.py --model out/kin/model --prompt "Muraho"
    python sample.py --model out/kin/model --prompt "Umwana" "Inka" --temperature 0
    python sample.py --model ID_OR_FOLDER --file prompts.jsonl --samples 4 --out answers.jsonl
    python sample.py --model out/chat/model --chat
    python sample.py --model out/mt/model --translate eng-kin --beams 5 --file eng.txt > kin.txt
    python sample.py --model out/chat/model --web

One prompt streams as its tokens come; several are continued side by side and printed in order,
each when it is done. With --dtype fp32 an answer depends on its prompt and --seed alone, whatever
is asked beside it (bf16 rounds otherwise in a larger batch). Text goes to stdout, notes to stderr;
on a terminal control characters are shown, not obeyed.

A model is asked as it was taught: in a conversation by its chat template, for a translation by the
prompt that training wrote beside it (prompt.json).
"""

from __future__ import annotations

if __name__ == "__main__":  # before any import that needs this Python
    from runtime.python_version import require_python

    require_python()

import asyncio
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from runtime import console as log
from runtime import flags as config
from runtime.console import FLAGS, STORAGE, UserError

COMMANDS = "/reset forgets what was said, /save FILE keeps it as a line of JSON, /quit ends"


@dataclass
class Settings:
    """Continue prompts with a model."""

    model: str = ""
    """A run's folder, a Hugging Face folder, a PEFT adapter, or a hub id (org/name@revision)."""
    prompt: list[str] = field(default_factory=list)
    """Texts to continue (with --translate: to translate); "" begins a text from nothing."""
    file: str = ""
    """In place of --prompt: a text file with one on each line, or .jsonl with "prompt" or
    "messages"."""
    chat: bool = False
    """A conversation, by the model's chat template; a base without one gets ours."""
    translate: Literal["", "eng-kin", "kin-eng"] = ""
    """Translate --prompt, --file or stdin, a text a line, by the prompt the model was taught."""
    web: bool = False
    """A page on this machine, for a browser: conversation and translation where the model was
    taught them, and text to continue, at most --max-new-tokens each."""
    address: str = "127.0.0.1:8000"
    """Where the page is. From afar: ssh -L 8000:127.0.0.1:8000 HOST, and open it there."""
    samples: int = 1
    """Answers to each prompt."""
    out: str = ""
    """With --file: write answers here, a JSON object a line; what a killed run has done is kept."""
    max_new_tokens: int = 128
    temperature: float | None = None
    """0 takes the likeliest token each time. Unless given 0.8; with --translate or --beams 0."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    top_p: float = 0.95
    """Draw from the fewest likeliest tokens that hold this probability; 1: from all."""
    min_p: float = 0.0
    """Draw from tokens at least this fraction as likely as the likeliest; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: what was already said becomes less likely."""
    beams: int = 1
    """Search the likeliest whole answer with so many hypotheses; ALMA translates with 5."""
    length_penalty: float = 1.0
    """Of a search: above 0 longer answers win more often, below it shorter ones."""
    early_stopping: Literal["false", "true", "never"] = "false"
    """When a search ends that has an answer for each beam, as in transformers: false, once the best
    that grows, at its present length, is no better; true, at once; never, once none can become
    better (differs where the length penalty is above 0)."""
    stop: list[str] = field(default_factory=list)
    """Strings that end an answer; they are not shown."""
    seed: int = 1
    rows: int = 32
    """Answers in the making side by side; each beam counts."""
    json: bool = False
    """A JSON object a line: prompt, text, tokens, end (eos, stop or length), prompt_number
    (from 1)."""
    compile: bool = False
    """On a GPU: steps are recorded as CUDA graphs and played back."""
    quant: Literal["none", "int8", "nf4"] = "none"
    """int8: matrices in eight bits a number, the head's too, half of what a CPU reads in bf16; nf4:
    the layers' matrices in four, which is for memory."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    SETTINGS, _ = log.run(lambda: config.read(Settings, sys.argv[1:], "sample.py"))

from checkpoints.huggingface import load_model  # noqa: E402
from checkpoints.model_folder import resolve_model_dir, stop_ids, weights_fingerprints  # noqa: E402
from inference.decode import hasten, pack  # noqa: E402
from inference.generate import Answer, answers, stream  # noqa: E402
from inference.prompt_format import (  # noqa: E402
    DIRECTIONS,
    OUTGROWN,
    Asked,
    Manner,
    Way,
    facts,
    pieces,
    replies,
    whole,
)
from inference.sampling import Sampling, Stops, own_seeds  # noqa: E402
from model import Llama  # noqa: E402
from runtime.distributed import Ranks  # noqa: E402
from serving import server as web  # noqa: E402
from training.monitor import memory_ends  # noqa: E402


def sampling_of(s: Settings) -> Sampling:
    """How tokens are chosen; UserError on flags that contradict each other."""
    temperature = s.temperature
    if temperature is None:
        temperature = 0.0 if s.translate or s.beams > 1 else 0.8
    sampling = Sampling(s.max_new_tokens, temperature, s.top_k, s.top_p, s.seed, s.min_p,
                        s.repetition_penalty, s.beams, s.length_penalty, s.early_stopping)
    if s.samples < 1 or s.rows < 1:
        raise UserError(f"--samples {s.samples} --rows {s.rows}: expected 1 or more", FLAGS)
    if s.samples > 1 and temperature == 0:
        raise UserError(f"--samples {s.samples}: without chance all are the same; give "
                        "--temperature above 0", FLAGS)
    if "" in s.stop:
        raise UserError('--stop "": an empty string ends every answer; leave it out', FLAGS)
    return sampling


def read_asked(s: Settings) -> list[Asked]:
    """What is asked, from flags, a file or stdin; an empty line is an empty text."""
    ways = [bool(s.prompt), bool(s.file), s.chat, s.web]
    if sum(ways) > 1 or not (any(ways) or s.translate):
        raise UserError("give one of --prompt TEXT ..., --file FILE, --chat and --web", FLAGS)
    if s.out and not s.file:
        raise UserError(f"--out {s.out}: goes with --file; without it, take --json > FILE", FLAGS)
    if s.chat and (s.json or s.translate or s.samples > 1 or s.beams > 1):
        raise UserError("--chat: a conversation takes no --json, --translate, --samples or "
                        "--beams; --file takes messages", FLAGS)
    if s.address != Settings.address and not s.web:
        raise UserError(f"--address {s.address}: goes with --web", FLAGS)
    if s.web and (s.json or s.samples > 1):
        raise UserError("--web: a page takes no --json or --samples", FLAGS)
    if s.chat or s.web:
        return []
    if s.file:
        return read_file(s.file, s.translate)
    if not s.prompt:
        if sys.stdin.isatty():
            log.say("a text on each line; Ctrl-D ends")
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # see `checked`
        return [line.rstrip("\r\n") for line in sys.stdin]
    return list(s.prompt)


def checked(asked: list[Asked]) -> list[Asked]:
    """The same; UserError on text that no file could hold."""
    for i, x in enumerate(asked, 1):
        try:
            json.dumps(x, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {i}: holds bytes that are not UTF-8, or half a character; "
                            "give it as UTF-8") from None
    return asked


def read_file(name: str, translate: str) -> list[Asked]:
    """What a file asks: a line each, in .jsonl an object with `prompt` (or, to translate, `text`
    or the language's name), or `messages`."""
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"--file {name}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--file {name}: byte {e.start} is not UTF-8; save it as UTF-8") from None
    if not text:
        raise UserError(f"--file {name}: empty, expected a prompt on each line")
    lines = text.removesuffix("\n").split("\n")  # read_text has made \r\n into \n
    if not name.endswith(".jsonl"):
        return lines
    keys = ("text", translate[:3], "prompt") if translate else ("prompt", "messages")
    asked = []
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        found = [row[k] for k in keys if k in row] if isinstance(row, dict) else []
        if not found or not isinstance(found[0], str | list) or (
                translate and isinstance(found[0], list)):
            raise UserError(f"--file {name}, line {i}: expected a JSON object with "
                            f"{' or '.join(map(repr, keys))}")
        asked.append(found[0])
    return asked


def done_before(file: Path, asked: Sequence[str], mark: str) -> int:
    """How many answers a file holds of those asked, in order; a line cut short by a kill goes.

    UserError if it holds something else: other prompts, settings or weights.
    """
    if not file.exists():
        return 0
    kept, n = 0, 0
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            found = json.loads(line)
            same = found["settings"] == mark and n < len(asked) and found["prompt"] == asked[n]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise UserError(f"--out {file}, line {n + 1}: answers another prompt, or was made with "
                            "other settings or weights; name another file, or delete it")
        kept, n = kept + len(line), n + 1
    with open(file, "r+b") as f:
        f.truncate(kept)
    return n


def mark_of(s: Settings, folder: Path) -> str:
    """Eight hex digits for what an answer depends on besides its prompt: the settings, and rows of
    all weights, which are others when the model's folder has been trained into again."""
    apart = ("prompt", "file", "out", "rows", "json", "device", "chat", "compile", "web",
             "address")
    values: dict[str, Any] = {k: v for k, v in dataclasses.asdict(s).items() if k not in apart}
    values["weights"] = weights_fingerprints(folder)
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def write_file(s: Settings, model: Llama, way: Way, asked: Sequence[Asked], sampling: Sampling,
               stops: Stops) -> None:
    """Answer into --out, behind what it already holds."""
    texts, mark = [way.text(x) for x in asked], mark_of(s, way.folder)
    try:
        first = done_before(Path(s.out), texts, mark)
        if first:
            log.say(f"{s.out}: {first} of {len(asked)} answers are there")
        with open(s.out, "a", encoding="utf-8") as file, log.progress(s.out, len(asked),
                                                                      first) as move:
            found = answered(s, model, way, asked, sampling, stops, first)
            for i, (new, end) in enumerate(found, first):
                line = {**answer(way, asked[i], new, end, stops), "settings": mark,
                        "prompt_number": i // s.samples + 1}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                move(1)
    except OSError as e:
        raise UserError(f"--out {s.out}: cannot be written ({e.strerror})", STORAGE) from None


def answered(s: Settings, model: Llama, way: Way, asked: Sequence[Asked], sampling: Sampling,
             stops: Stops, first: int = 0) -> Iterator[Answer]:
    """Answers in order, from `first` on; a blank line has no translation, and is not asked."""
    ids = [way.ids(x) for x in asked]
    seeds = own_seeds(ids, s.seed)
    blank = [bool(way.direction) and not x.strip() for x in asked]
    real = [i for i in range(first, len(asked)) if not blank[i]]
    found = answers(model, [ids[i] for i in real], sampling, stops, way.tokenizer.bos,
                    [seeds[i] for i in real], s.rows)
    for nothing in blank[first:]:
        yield Answer([], "eos") if nothing else next(found)


def answer(way: Way, asked: Asked, new: Sequence[int], end: str, stops: Stops) -> dict[str, Any]:
    """An answer as a line of JSON holds it."""
    text = whole(way.tokenizer, way.ids(asked), new, stops.strings)
    source = {"source": asked} if way.direction else {} if isinstance(asked, str) else {
        "messages": asked}
    text = text.strip() if way.direction else text
    return {"prompt": way.text(asked), **source, "text": text, "tokens": len(new), "end": end}


def converse(model: Llama, way: Way, sampling: Sampling, stops: Stops,
             shown: Callable[[str], str]) -> None:
    """A conversation: lines in, answers out, until /quit or the end of the input."""
    log.say(COMMANDS)
    said: list[dict[str, str]] = []
    room = model.config.max_position_embeddings - sampling.max_new_tokens
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/reset":
            said = []
        elif word == "/save":
            save(rest.strip(), said)
        elif line.startswith("/"):
            log.say(f"{word}: no such command; {COMMANDS}")
        elif line:
            said.append({"role": "user", "content": line})
            before = len(said)
            said, ids = way.recent(said, room)
            if len(said) < before:
                log.say(OUTGROWN)
            new = (token for _, token, _ in stream(model, [ids], sampling, stops,
                                                 way.tokenizer.bos))
            text = ""
            try:
                for piece in pieces(way.tokenizer, ids, new, stops.strings):
                    print(shown(piece), end="", flush=True)
                    text += piece
            except KeyboardInterrupt:  # stops the answer, not the conversation
                pass
            print(flush=True)
            said.append({"role": "assistant", "content": text.strip()})


def save(name: str, said: Sequence[Mapping[str, str]]) -> None:
    """Write a conversation as `prepare.py chat` reads it; what goes wrong is said."""
    if not name:
        log.say("/save: name a file, as in /save talk.jsonl")
        return
    try:
        text = json.dumps({"messages": said}, ensure_ascii=False)
        Path(name).write_text(text + "\n", encoding="utf-8")
        log.say(f"wrote {name}: {len(said)} messages")
    except OSError as e:
        log.say(f"/save {name}: cannot be written ({e.strerror})")


def manners_of(s: Settings, ways: Mapping[str, Way], ends: set[int]) -> dict[str, Manner]:
    """How a page's answers are made: only translations are searched for, and nothing of them is
    drawn unless --temperature says so."""
    if s.beams > 1 and not any(way.direction for way in ways.values()):
        raise UserError(f"--beams {s.beams}: a page searches only for translations, and this model "
                        "was taught none; name --translate", FLAGS)
    drawn = sampling_of(dataclasses.replace(s, beams=1, translate=""))
    sought = sampling_of(dataclasses.replace(s, translate=DIRECTIONS[0]))
    return {name: Manner(way, sought if way.direction else drawn, stops_of(s, way, ends, name))
            for name, way in ways.items()}


def stops_of(s: Settings, way: Way, ends: set[int], name: str = "") -> Stops:
    """What ends an answer: an EOS, in a conversation the end of a turn, in a translation a line."""
    if name == "chat" or way.as_chat:
        ends = ends | ({way.template.end} - {None})
    if not ends:
        log.say("the model has no EOS, so every answer goes on to --max-new-tokens")
    strings = [*s.stop, "\n"] if way.direction else s.stop  # ALMA cuts there too
    return Stops(ends, strings, way.tail)


@memory_ends("lower --rows or --max-new-tokens, or take --quant int8")
def main(s: Settings) -> None:
    """Read what is asked, load the model, answer."""
    if not s.model:
        raise UserError("name a model: --model FOLDER or a hub id", FLAGS)
    sampling = sampling_of(s)
    asked = [x for x in checked(read_asked(s)) for _ in range(s.samples)]
    ranks = Ranks.start(s.device)
    dtype = ranks.compute_dtype(s.dtype)
    model, tokenizer = load_model(s.model, ranks.device, dtype, quant=s.quant)
    model.eval().model.compute_dtype = dtype
    (hasten if s.compile else pack)(model)
    folder = resolve_model_dir(s.model)
    way = Way.of(folder, tokenizer, s.translate)
    ends = stop_ids(folder, tokenizer)
    if s.web:
        ways = {**({s.translate: way} if s.translate else {}), **Way.taught(folder, tokenizer)}
        manners = manners_of(s, ways, ends)
        return asyncio.run(web.serve(s.address, replies(model, manners), facts(s.model, manners)))
    in_chat = s.chat or any(not isinstance(x, str) for x in asked)
    stops = stops_of(s, way, ends, "chat" if in_chat else "")
    shown = log.printable if sys.stdout.isatty() else str  # a model must not steer a terminal

    def show(text: str) -> None:
        print(shown(text), end="", flush=True)

    if s.chat:
        return converse(model, way, sampling, stops, shown)
    if s.out:
        return write_file(s, model, way, asked, sampling, stops)
    if len(asked) == 1 and not s.json and not s.translate:
        show(way.text(asked[0]))
        ids = way.ids(asked[0])
        new = (token for _, token, _ in stream(model, [ids], sampling, stops, tokenizer.bos))
        for piece in pieces(tokenizer, ids, new, stops.strings):
            show(piece)
        return show("\n")
    found = answered(s, model, way, asked, sampling, stops)
    for i, (new, end) in enumerate(found):
        line = answer(way, asked[i], new, end, stops) | {"prompt_number": i // s.samples + 1}
        if s.json:
            show(json.dumps(line, ensure_ascii=False) + "\n")
        elif s.translate:
            show(line["text"] + "\n")
        else:
            show(f"== {i + 1} of {len(asked)}\n{line['prompt']}{line['text']}\n")


if __name__ == "__main__":
    log.run(lambda: main(SETTINGS))
