"""Generate text: continue prompts, answer a file of prompts, chat, translate, serve a web page.

    python sample.py --model out/kin/model --prompt "Muraho"
    python sample.py --model out/kin/model --prompt "Umwana" "Inka" --temperature 0
    python sample.py --model ID_OR_FOLDER --file prompts.jsonl --samples 4 --out answers.jsonl
    python sample.py --model out/chat/model --chat
    python sample.py --model out/mt/model --translate eng-kin --beams 5 --file eng.txt > kin.txt
    python sample.py --model out/chat/model --web

The answer to one prompt streams. Several prompts are continued together and printed in order, each
answer when it is finished. With --dtype fp32 an answer depends on its prompt and --seed only (bf16
rounds differently in a larger batch). Text goes to stdout, notes go to stderr.

A model is prompted as it was trained: for a conversation by its chat template, for a translation by
the prompt that training wrote next to it (prompt.json).
"""

from __future__ import annotations

if __name__ == "__main__":  # before any import that needs this Python
    import os
    import sys

    if getattr(sys.flags, "safe_path", False):  # python -P does not search this folder
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from runtime.python_version import require_python

    require_python()

import asyncio
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from languages.language import read_direction, read_names
from runtime import console, flags
from runtime.console import FLAGS, STORAGE, UserError, info
from runtime.setting_metadata import Group, bounded

if TYPE_CHECKING:  # these import torch, which --help does not wait for
    from inference.decode import DecodeStep
    from inference.generate import Completion
    from inference.prompt_format import GenerationConfig, PromptFormat, PromptOrMessages
    from inference.sampling import SamplingParams, StoppingCriteria
    from model import Llama
    from tokenization.tokenizer import Tokenizer

CHAT_COMMANDS = ("/reset starts a new conversation, /save FILE writes it as a line of JSON, "
                 "/quit ends")


@dataclass
class Settings:
    """Continue prompts with a model."""

    model: Annotated[str, Group("Most used")] = ""
    """A run's folder, a Hugging Face folder, a PEFT adapter, or a hub id (org/name@revision)."""
    prompt: list[str] = field(default_factory=list)
    """Texts to continue (with --translate: to translate); "" starts a text from nothing."""
    file: str = ""
    """In place of --prompt: a text file with one prompt a line, or .jsonl with "prompt" or
    "messages"."""
    chat: bool = False
    """A conversation, by the model's chat template; a base model without one gets ours."""
    web: bool = False
    """A page on this machine, for a browser: conversation and translation if the model was trained
    for them, and text to continue, at most --max-new-tokens each."""
    translate: str = ""
    """Translate --prompt, --file or stdin line by line, as in eng-kin: two ISO 639-3 codes. Uses
    the prompt that the model was trained with."""
    samples: int = bounded(1, at_least=1, at_most=10_000)
    """Answers to each prompt."""
    out: str = ""
    """With --file: write answers here, a JSON object a line. A killed run continues from it."""
    max_new_tokens: int = 128
    """Tokens of an answer, at most."""
    temperature: float | None = None
    """0 takes the most likely token each time. Default 0.8; 0 with --beams, and with --translate
    unless --samples is above 1."""
    top_k: Annotated[int, Group("Sampling")] = 0
    """Sample from this many most likely tokens; 0: from all."""
    top_p: float = 0.95
    """Sample from the fewest most likely tokens that have this probability; 1: from all."""
    min_p: float = 0.0
    """Sample from tokens at least this fraction as likely as the most likely one; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that the text already has become less likely."""
    beams: Annotated[int, Group("Beam search")] = 1
    """Hypotheses of the search; 1: no search. ALMA translates with 5."""
    length_penalty: float = 1.0
    """Larger values favour longer answers."""
    early_stopping: Literal["false", "true", "never"] = "false"
    """When a search that has an answer for each beam ends, as in transformers. false: when the best
    hypothesis, at its present length, is no better than the answers. true: at once. never: when no
    hypothesis can become better (differs if the length penalty is above 0)."""
    stop: Annotated[list[str], Group("Input and output")] = field(default_factory=list)
    """Strings that end an answer; they are not shown."""
    seed: int = 1
    """Seed of all samples."""
    json: bool = False
    """Print a JSON object a line: prompt, text, tokens, end (eos, stop or length), prompt_number
    (from 1)."""
    language_names: list[str] = field(default_factory=list)
    """With --translate: English names of languages, CODE=NAME, as in lug=Luganda."""
    template_kwargs: list[str] = field(default_factory=list)
    """Variables of the chat template, KEY=VALUE or a JSON object, as in enable_thinking=false.
    Default: those that the model was trained with."""
    address: str = "127.0.0.1:8000"
    """Address of the page. From another machine: ssh -L 8000:127.0.0.1:8000 HOST, then open it."""
    rows: Annotated[int, Group("Speed and memory")] = bounded(32, at_least=1)
    """Prompts continued at once; each beam counts."""
    compile: bool = False
    """On a GPU: compile the decoding step, with CUDA graphs."""
    quant: Literal["none", "int8", "nf4"] = "none"
    """Quantised weights. int8: all matrices, half the memory of bf16; nf4: the matrices of the
    layers, a quarter."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of products. auto: bf16 if the device computes it natively, else fp16 on a GPU, fp32 on a
    CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""

    HINTS: ClassVar[dict[str, str]] = {
        "max_tokens": "--max-new-tokens", "max_length": "--max-new-tokens",
        "num_beams": "--beams", "num_return_sequences": "--samples", "n": "--samples",
        "batch_size": "--rows", "do_sample": "--temperature above 0", "prompts": "--prompt"}


def main(s: Settings) -> None:
    """Read the prompts, load the model, answer."""
    if not s.model:
        raise UserError("name a model: --model FOLDER or a hub id", FLAGS)
    check_settings(s)
    prompts = read_prompts(s)

    from training.errors import explain_out_of_memory  # imports torch, as all below

    with explain_out_of_memory("lower --rows or --max-new-tokens, or use --quant int8"):
        answerer = Answerer.load(s)
        if s.web:
            serve_page(answerer)
        elif s.chat:
            chat(answerer)
        elif s.out:
            write_file(answerer, prompts)
        elif len(prompts) == 1 and not s.json and not s.translate:
            print_one(answerer, prompts[0])
        else:
            print_all(answerer, prompts)


def check_settings(s: Settings) -> None:
    """Refuse flags that contradict each other; UserError."""
    inputs = [bool(s.prompt), bool(s.file), s.chat, s.web]
    if sum(inputs) > 1 or not (any(inputs) or s.translate):
        raise UserError("give one of --prompt TEXT ..., --file FILE, --chat and --web", FLAGS)
    if s.translate:
        read_direction(s.translate, "--translate")
    if s.out and not s.file:
        raise UserError(f"--out {s.out} needs --file. Without it, use --json > FILE", FLAGS)
    if s.chat and (s.json or s.translate or s.samples > 1 or s.beams > 1):
        raise UserError("--chat cannot be used with --json, --translate, --samples or --beams. "
                        "Use --file with messages", FLAGS)
    if s.address != Settings.address and not s.web:
        raise UserError(f"--address {s.address} needs --web", FLAGS)
    if s.web and (s.json or s.samples > 1):
        raise UserError("--web cannot be used with --json or --samples", FLAGS)
    if s.template_kwargs:
        from tokenization.chat_template import read_template_kwargs

        read_template_kwargs(s.template_kwargs)
        if s.prompt and not s.translate:
            raise UserError("--template-kwargs has no effect on --prompt, which is a text; use "
                            "--chat, or --file with messages", FLAGS)
    if s.samples > 1 and temperature_of(s, bool(s.translate)) == 0:
        raise UserError(f"--samples {s.samples}: at temperature 0 all samples are equal. Give "
                        "--temperature above 0", FLAGS)
    if "" in s.stop:
        raise UserError('--stop "": an empty string would end every answer. Remove it', FLAGS)
    sampling_params(s, bool(s.translate))  # checks ranges


def temperature_of(s: Settings, translates: bool) -> float:
    """--temperature, or its default: 0 for a translation or a search, 0.8 for several samples and
    everything else."""
    if s.temperature is not None:
        return s.temperature
    if s.beams > 1 or (translates and s.samples == 1):
        return 0.0
    return 0.8


def sampling_params(s: Settings, translates: bool) -> SamplingParams:
    """How tokens are chosen; UserError on a value out of range."""
    from inference.sampling import SamplingParams

    return SamplingParams(s.max_new_tokens, temperature_of(s, translates), s.top_k, s.top_p, s.seed,
                          s.min_p, s.repetition_penalty, s.beams, s.length_penalty,
                          s.early_stopping)


# ---- What is asked


def read_prompts(s: Settings) -> list[PromptOrMessages]:
    """The prompts of the flags, a file or stdin, each --samples times; an empty line is an empty
    prompt."""
    if s.chat or s.web:
        return []
    if s.file:
        prompts = read_file(s.file, s.translate)
    elif s.prompt:
        prompts = list(s.prompt)
    else:
        if sys.stdin.isatty():
            console.info("a text on each line; Ctrl-D ends")
        # bytes that are not UTF-8 become half characters, which are refused below
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
        prompts = [line.rstrip("\r\n") for line in sys.stdin]
    prompts = [prompt for prompt in prompts for _ in range(s.samples)]
    for number, prompt in enumerate(prompts, 1):
        try:
            json.dumps(prompt, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {number}: has bytes that are not UTF-8, or half a character. "
                            "Give it as UTF-8") from None
    return prompts


def read_file(name: str, translate: str) -> list[PromptOrMessages]:
    """The prompts of a file: one on each line; in .jsonl an object with `prompt` or `messages` (to
    translate: `text`, the source language's code, or `prompt`)."""
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"--file {name}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError as e:
        raise UserError(f"--file {name}: byte {e.start} is not UTF-8. Save it as UTF-8") from None
    if not text:
        raise UserError(f"--file {name}: empty, expected a prompt on each line")
    lines = text.removesuffix("\n").split("\n")  # read_text has turned \r\n into \n
    if not name.endswith(".jsonl"):
        return lines
    keys, types = ("prompt", "messages"), (str, list)
    if translate:
        keys, types = ("text", translate.partition("-")[0], "prompt"), (str,)
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        values = []
        if isinstance(row, dict):
            values = [row[key] for key in keys if key in row]
        if not values or not isinstance(values[0], types):
            raise UserError(f"--file {name}, line {number}: expected a JSON object with "
                            f"{' or '.join(map(repr, keys))}")
        prompts.append(values[0])
    return prompts


# ---- The model


@dataclass
class Answerer:
    """A loaded model, and how this run prompts it."""

    settings: Settings
    folder: Path
    model: Llama
    prompt_format: PromptFormat
    stop_ids: set[int]
    decode_step: DecodeStep

    @classmethod
    def load(cls, s: Settings) -> Answerer:
        """Load the model in the dtype of this device, made fast for decoding."""
        from checkpoints.huggingface import load_model
        from checkpoints.model_folder import base_model_dir, resolve_model_dir, stop_ids
        from inference.cpu_linear import optimize_for_inference
        from inference.decode import DecodeStep, compiled_decode_step
        from inference.prompt_format import PromptFormat
        from runtime.device import compute_dtype
        from runtime.distributed import Distributed
        from tokenization.chat_template import read_template_kwargs

        ranks = Distributed.start(s.device)
        dtype = compute_dtype(ranks.device, s.dtype)
        model, tokenizer = load_model(s.model, ranks.device, dtype, quant=s.quant)
        model.eval()
        if s.compile:
            decode_step = compiled_decode_step(model)
        else:
            optimize_for_inference(model)
            decode_step = DecodeStep(model)
        folder = resolve_model_dir(s.model)
        folders = (folder, base_model_dir(folder))
        prompt_format = PromptFormat.load(folders, tokenizer, s.translate,
                                          read_names(s.language_names),
                                          read_template_kwargs(s.template_kwargs))
        return cls(s, folder, model, prompt_format, stop_ids(folder, tokenizer),
                   decode_step)

    @property
    def sampling(self) -> SamplingParams:
        """How this run chooses tokens."""
        return sampling_params(self.settings, bool(self.settings.translate))

    def stopping_criteria(self, in_chat: bool, prompt_format: PromptFormat) -> StoppingCriteria:
        """What ends an answer: EOS; in a conversation also the end of a turn; in a translation also
        the end of a line, as in ALMA."""
        from inference.detokenizer import decode_tail
        from inference.sampling import StoppingCriteria

        stop_ids = self.stop_ids
        if in_chat or prompt_format.translation.as_chat:
            stop_ids = stop_ids | ({prompt_format.template.end_of_turn} - {None})
        if not stop_ids:
            console.info("the model has no EOS, so every answer continues to --max-new-tokens")
        strings = list(self.settings.stop)
        if prompt_format.direction:
            strings.append("\n")
        return StoppingCriteria(stop_ids, strings, partial(decode_tail, prompt_format.tokenizer))

    def stream(self, ids: Sequence[int], stopping: StoppingCriteria) -> Iterator[str]:
        """The answer to one prompt, in pieces of text."""
        from inference.detokenizer import stream_text
        from inference.generate import generate

        tokenizer = self.prompt_format.tokenizer
        steps = generate(self.model, [ids], self.sampling, stopping, tokenizer.bos,
                         decode_step=self.decode_step)
        return stream_text(tokenizer, ids, (token for _, token, _ in steps), stopping.strings)

    def answers(self, prompts: Sequence[PromptOrMessages],
                start: int = 0) -> Iterator[dict[str, Any]]:
        """The answers to prompts `start` and later, in order, as --json writes them.

        The translation of a blank line is blank.
        """
        from inference.generate import Completion, completions
        from inference.sampling import per_prompt_seeds

        s, prompt_format = self.settings, self.prompt_format
        in_chat = any(not isinstance(prompt, str) for prompt in prompts)
        stopping = self.stopping_criteria(in_chat, prompt_format)
        ids = [prompt_format.encode(prompt) for prompt in prompts]
        tell_unspelled(prompt_format.tokenizer, [x for x in prompts if isinstance(x, str)])
        seeds = per_prompt_seeds(ids, s.seed)
        is_blank = [bool(prompt_format.direction) and not prompt.strip() for prompt in prompts]
        indices = [i for i in range(start, len(prompts)) if not is_blank[i]]
        finished = completions(self.model, [ids[i] for i in indices], self.sampling, stopping,
                               prompt_format.tokenizer.bos, [seeds[i] for i in indices], s.rows,
                               self.decode_step)
        for i in range(start, len(prompts)):
            completion = Completion([], "eos") if is_blank[i] else next(finished)
            row = self._row(prompts[i], ids[i], completion, stopping.strings)
            yield {**row, "prompt_number": i // s.samples + 1}

    def _row(self, prompt: PromptOrMessages, ids: Sequence[int], completion: Completion,
             stop_strings: Sequence[str]) -> dict[str, Any]:
        """An answer as a JSON object."""
        from inference.detokenizer import decode_answer

        prompt_format = self.prompt_format
        text = decode_answer(prompt_format.tokenizer, ids, completion.ids, stop_strings)
        row: dict[str, Any] = {"prompt": prompt_format.render(prompt)}
        if prompt_format.direction:
            row["source"], text = prompt, text.strip()
        elif not isinstance(prompt, str):
            row["messages"] = prompt
        return {**row, "text": text, "tokens": len(completion.ids),
                "end": completion.finish_reason}


# ---- Text to the terminal


def tell_unspelled(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Say how many characters of the prompts the tokenizer cannot spell."""
    n = sum(map(tokenizer.count_unspelled, texts))
    if n:
        info(f"the tokenizer has no token for {n:,} characters of the prompts; the model does not "
             "see them")


def show(text: str) -> None:
    """Print at once. On a terminal, control characters of a model are shown, not obeyed."""
    print(console.printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def print_one(answerer: Answerer, prompt: PromptOrMessages) -> None:
    """A prompt and its answer as it is generated."""
    prompt_format = answerer.prompt_format
    stopping = answerer.stopping_criteria(not isinstance(prompt, str), prompt_format)
    show(prompt_format.render(prompt))
    for piece in answerer.stream(prompt_format.encode(prompt), stopping):
        show(piece)
    show("\n")


def print_all(answerer: Answerer, prompts: Sequence[PromptOrMessages]) -> None:
    """All answers, in order."""
    for number, row in enumerate(answerer.answers(prompts), 1):
        if answerer.settings.json:
            show(json.dumps(row, ensure_ascii=False) + "\n")
        elif answerer.settings.translate:
            show(row["text"] + "\n")
        else:
            show(f"== {number} of {len(prompts)}\n{row['prompt']}{row['text']}\n")


# ---- Answers to a file


def write_file(answerer: Answerer, prompts: Sequence[PromptOrMessages]) -> None:
    """Append the answers that --out does not hold yet."""
    s = answerer.settings
    rendered = [answerer.prompt_format.render(prompt) for prompt in prompts]
    fingerprint = settings_fingerprint(s, answerer.folder)
    try:
        n_done = count_done(Path(s.out), rendered, fingerprint)
        if n_done:
            console.info(f"{s.out}: {n_done} of {len(prompts)} answers are there")
        with open(s.out, "a", encoding="utf-8") as file, \
                console.progress(s.out, len(prompts), n_done) as progress:
            for row in answerer.answers(prompts, n_done):
                number = row.pop("prompt_number")
                row = {**row, "settings": fingerprint, "prompt_number": number}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                progress(1)
    except OSError as e:
        raise UserError(f"--out {s.out}: cannot be written ({e.strerror})", STORAGE) from None


def count_done(file: Path, prompts: Sequence[str], fingerprint: str) -> int:
    """How many answers a file holds, in order; a last line that was cut short is removed.

    UserError if it holds something else: other prompts, settings or weights.
    """
    if not file.exists():
        return 0
    n_bytes, n_done = 0, 0
    for line in file.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            matches = (row["settings"] == fingerprint and n_done < len(prompts)
                       and row["prompt"] == prompts[n_done])
        except (ValueError, KeyError, TypeError):
            matches = False
        if not matches:
            raise UserError(f"--out {file}, line {n_done + 1}: answers another prompt, or was made "
                            "with other settings or weights. Name another file, or delete it")
        n_bytes, n_done = n_bytes + len(line), n_done + 1
    with open(file, "r+b") as f:
        f.truncate(n_bytes)
    return n_done


def settings_fingerprint(s: Settings, folder: Path) -> str:
    """Eight hex digits of what an answer depends on besides its prompt: the settings, and rows of
    all weights, which change when the model is trained further in its folder."""
    from checkpoints.model_folder import weights_fingerprints

    no_effect = {"prompt", "file", "out", "rows", "json", "device", "chat", "compile", "web",
                 "address"}
    values = {name: value for name, value in dataclasses.asdict(s).items()
              if name not in no_effect}
    if not s.language_names:  # keeps the fingerprint of files from before there was this flag
        del values["language_names"]
    values["weights"] = weights_fingerprints(folder)
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


# ---- A conversation


def chat(answerer: Answerer) -> None:
    """A conversation: lines in, answers out, until /quit or the end of the input."""
    from inference.prompt_format import TRUNCATED_NOTICE

    console.info(CHAT_COMMANDS)
    prompt_format, messages = answerer.prompt_format, []
    stopping = answerer.stopping_criteria(True, prompt_format)
    context = answerer.model.config.max_position_embeddings
    room = context - answerer.settings.max_new_tokens
    sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages = []
        elif command == "/save":
            save_conversation(argument.strip(), messages)
        elif line.startswith("/"):
            console.info(f"{command}: unknown command; {CHAT_COMMANDS}")
        elif line:
            messages.append({"role": "user", "content": line})
            n = len(messages)
            messages, ids = prompt_format.truncate_conversation(messages, room)
            if len(messages) < n:
                console.info(TRUNCATED_NOTICE)
            answer = print_reply(answerer.stream(ids, stopping))
            messages.append({"role": "assistant", "content": answer.strip()})


def print_reply(pieces: Iterator[str]) -> str:
    """Print an answer as it is generated, and return it. Ctrl-C ends the answer only."""
    answer = ""
    try:
        for piece in pieces:
            show(piece)
            answer += piece
    except KeyboardInterrupt:
        pass
    show("\n")
    return answer


def save_conversation(name: str, messages: Sequence[Mapping[str, str]]) -> None:
    """Write a conversation as `prepare.py chat` reads it; a fault is reported, not raised."""
    if not name:
        console.info("/save: name a file, as in /save talk.jsonl")
        return
    try:
        text = json.dumps({"messages": messages}, ensure_ascii=False)
        Path(name).write_text(text + "\n", encoding="utf-8")
        console.info(f"wrote {name}: {len(messages)} messages")
    except OSError as e:
        console.info(f"/save {name}: cannot be written ({e.strerror})")


# ---- The web page


def serve_page(answerer: Answerer) -> None:
    """Serve the page until Ctrl-C."""
    from inference.prompt_format import PromptFormat
    from serving.replies import make_replier, page_facts
    from serving.server import serve

    s, chosen = answerer.settings, answerer.prompt_format
    formats = {s.translate: chosen} if s.translate else {}
    formats |= PromptFormat.load_all(chosen.folders, chosen.tokenizer, chosen.template_kwargs)
    configs = page_configs(answerer, formats)
    replier = make_replier(answerer.model, configs, answerer.decode_step)
    asyncio.run(serve(s.address, replier, page_facts(s.model, configs)))


def page_configs(answerer: Answerer,
                 formats: Mapping[str, PromptFormat]) -> dict[str, GenerationConfig]:
    """How the answers of the page's tabs are made: only translations are searched, and they are
    sampled only if --temperature says so."""
    from inference.prompt_format import GenerationConfig

    s = answerer.settings
    if s.beams > 1 and not any(prompt_format.direction for prompt_format in formats.values()):
        raise UserError(f"--beams {s.beams}: the page searches only translations, and this model "
                        "was not trained to translate. Name --translate, or remove --beams", FLAGS)
    configs = {}
    for name, prompt_format in formats.items():
        if prompt_format.direction:
            sampling = sampling_params(s, translates=True)
        else:
            sampling = sampling_params(dataclasses.replace(s, beams=1), translates=False)
        stopping = answerer.stopping_criteria(name == "chat", prompt_format)
        configs[name] = GenerationConfig(prompt_format, sampling, stopping)
    return configs


if __name__ == "__main__":
    console.run(lambda: main(flags.read(Settings, sys.argv[1:], "sample.py")[0]))
