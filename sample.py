"""Continue text.

    python sample.py --model out/kin/model --prompt "Muraho"
    python sample.py --model out/kin/model --prompt "Umwana" "Inka" --temperature 0
    python sample.py --model ID_OR_FOLDER --file prompts.txt --json > answers.jsonl

One prompt streams as its tokens come; several are continued side by side and printed in order,
each when it is done. With --dtype fp32 an answer depends on its prompt and --seed alone, whatever
is asked beside it (bf16 rounds otherwise in a larger batch). Text goes to stdout, notes to stderr;
on a terminal control characters are shown, not obeyed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import config
import log
from log import FLAGS, UserError


@dataclass
class Settings:
    """Continue prompts with a model."""

    model: str = ""
    """A run's folder, a Hugging Face folder, a PEFT adapter, or a hub id (org/name@revision)."""
    prompt: list[str] = field(default_factory=list)
    """Texts to continue; "" begins a text from nothing."""
    file: str = ""
    """A text file with a prompt on each line, in place of --prompt."""
    max_new_tokens: int = 128
    temperature: float = 0.8
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    top_p: float = 0.95
    """Draw from the fewest likeliest tokens that hold this probability; 1: from all."""
    seed: int = 1
    json: bool = False
    """A JSON object a line: prompt, text, tokens, end (eos or length)."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"


if __name__ == "__main__":  # before torch is loaded, so that --help and a wrong flag answer at once
    SETTINGS, _ = log.run(lambda: config.read(Settings, sys.argv[1:], "sample.py"))

import weights  # noqa: E402
from generate import Stops, answers, stream  # noqa: E402
from ranks import Ranks  # noqa: E402
from sampling import Sampling  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402


def read_prompts(s: Settings) -> list[str]:
    """The prompts, from flags or a file's lines; an empty line is an empty prompt."""
    if bool(s.prompt) == bool(s.file):
        raise UserError("give one of --prompt TEXT ... and --file FILE", FLAGS)
    if s.prompt:
        return s.prompt
    try:
        text = Path(s.file).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"--file {s.file}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--file {s.file}: byte {e.start} is not UTF-8; save it as UTF-8") from None
    if not text:
        raise UserError(f"--file {s.file}: empty, expected a prompt on each line")
    return text.removesuffix("\n").split("\n")  # read_text has made \r\n into \n


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """A continuation's text, in pieces as they become certain; joined they are all of it.

    Decoded behind its prompt, so that spaces are right. Half a character decodes to U+FFFD: such an
    end waits for the tokens that complete it.
    """
    ids = list(prompt)
    text = tokenizer.decode(ids)
    shown = len(text)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        certain = len(text.rstrip("\ufffd"))
        if certain > shown:
            yield text[shown:certain]
            shown = certain
    yield text[shown:]


def main(s: Settings) -> None:
    """Read the prompts, load the model, continue and print."""
    if not s.model:
        raise UserError("name a model: --model FOLDER or a hub id", FLAGS)
    sampling = Sampling(s.max_new_tokens, s.temperature, s.top_k, s.top_p, s.seed)
    prompts = read_prompts(s)
    ranks = Ranks.start(s.device)
    dtype = ranks.compute_dtype(s.dtype)
    model, tokenizer = weights.load(s.model, ranks.device, dtype)
    model.eval().model.compute_dtype = dtype

    bos, stops = tokenizer.bos, Stops(weights.stop_ids(weights.find(s.model), tokenizer))
    ids = [([] if bos is None else [bos]) + tokenizer.encode(p) for p in prompts]
    shown = log.printable if sys.stdout.isatty() else str  # a model must not steer a terminal

    def show(text: str) -> None:
        print(shown(text), end="", flush=True)

    if len(prompts) == 1 and not s.json:
        show(prompts[0])
        new = (token for _, token, _ in stream(model, ids, sampling, stops, bos))
        for piece in pieces(tokenizer, ids[0], new):
            show(piece)
        show("\n")
        return
    for i, (new, end) in enumerate(answers(model, ids, sampling, stops, bos)):
        text = "".join(pieces(tokenizer, ids[i], new))
        if s.json:
            line = {"prompt": prompts[i], "text": text, "tokens": len(new), "end": end}
            show(json.dumps(line, ensure_ascii=False) + "\n")
        else:
            show(f"== {i + 1} of {len(prompts)}\n{prompts[i]}{text}\n")


if __name__ == "__main__":
    log.run(lambda: main(SETTINGS))
