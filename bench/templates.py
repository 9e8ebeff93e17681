"""Rendering conversations by a chat template here against transformers' apply_chat_template.

    python -m bench.templates [--quick] [--rounds 3] [--write]

Both sides render 10,000 conversations of five turns, and the prompt before each of their answers,
which a loss mask needs. Our side renders in a process of its own, with limits of CPU time and
memory, and divides the text into segments with their loss; the peer renders in its own process
without limits. Both must write the same texts. Reading the file and encoding are not measured: on
both sides they take longer than the rendering.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import ROOT, Settings, Spread, in_turn, installed, limits, main, ratio, table

HERE = "bench.templates"
SIZES = {"full": 10_000, "quick": 2_000, "tiny": 20}  # conversations
TURNS = 5  # of each conversation: a question and its answer
SHARED = ROOT.parent / "shared/data"
TEXT, TOKENIZER = SHARED / "sft/eng_instructions_rasbt.json", SHARED / "tokenizers/llama2"
# Two templates with the features of published ones.
SOURCES = {
    "short": """\
{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '</s>' + '\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}""",
    "with thoughts": """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'assistant' %}
        {%- if '</think>' in content and loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|assistant|>\\n' + content + eos_token + '\\n' }}
    {%- else %}
        {{- '<|' + m.role + '|>\\n' + content | trim + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""}


def draw(size: str, folder: str) -> None:
    """Write the tokenizer and the conversations into a folder."""
    import shutil

    shutil.copy(TOKENIZER / "tokenizer.model", folder)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>"}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
    rows = [x for x in json.loads(TEXT.read_text(encoding="utf-8")) if x["output"].strip()]
    rng = random.Random(1)
    with open(Path(folder, "chat.jsonl"), "w", encoding="utf-8") as file:
        for _ in range(SIZES[size]):
            messages = []
            for row in rng.choices(rows, k=TURNS):
                question = "\n\n".join(filter(None, [row["instruction"], row["input"]]))
                messages += [{"role": "user", "content": question},
                             {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps(messages) + "\n")


def ours(name: str, folder: str) -> dict[str, Any]:
    """Seconds to render all conversations with their loss mask; a digest of the texts."""
    from tokenization.chat_template import ChatTemplate
    from tokenization.tokenizer import Tokenizer

    Path(folder, "chat_template.jinja").write_text(SOURCES[name])
    template = ChatTemplate.from_folder(Path(folder), Tokenizer.open(folder))
    conversations = read(folder)
    texts = []
    start = time.perf_counter()
    for i in range(0, len(conversations), 500):  # about a chunk of preparation
        for document in template.render_all_with_mask(conversations[i : i + 500]):
            texts.append("".join(segment.text for segment in document.segments))
    return {"seconds": time.perf_counter() - start, "texts": digest(texts)}


def theirs(name: str, folder: str) -> dict[str, Any]:
    """Seconds to render all conversations and their prompts; a digest of the texts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = SOURCES[name]
    conversations = read(folder)
    texts = []
    start = time.perf_counter()
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        for i in range(1, len(messages), 2):
            prompt = tokenizer.apply_chat_template(
                messages[:i], tokenize=False, add_generation_prompt=True)
            if not text.startswith(prompt):
                raise ValueError("the text does not continue its prompt")
        texts.append(text)
    return {"seconds": time.perf_counter() - start, "texts": digest(texts)}


def read(folder: str) -> list[list[dict[str, str]]]:
    return [json.loads(line) for line in open(Path(folder, "chat.jsonl"), encoding="utf-8")]


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def job(s: Settings) -> str:
    n, rows = SIZES[s.size], []
    with tempfile.TemporaryDirectory() as folder:
        draw(s.size, folder)
        for name in SOURCES:
            sides = {"ours": ("ours", [name, folder])}
            if installed("transformers"):
                sides["transformers"] = ("theirs", [name, folder])
            runs = in_turn(HERE, s.rounds, sides)
            seconds = {side: [run["seconds"] for run in done] for side, done in runs.items()}
            for side in runs:
                took = Spread.of(seconds[side])
                rows.append([name, side, f"{n / took.median:,.0f}",
                             f"{n / took.high:,.0f} to {n / took.low:,.0f}",
                             ratio(seconds[side], seconds["ours"])])
            if len({run["texts"] for done in runs.values() for run in done}) > 1:
                s.faults.append(f"{name}: the sides write different texts")
    head = ["template", "", "conversations/s", "range", "seconds, times ours"]
    return (f"{n:,} conversations of {TURNS} turns from {TEXT.name}, each rendered whole and up to "
            f"each answer: {TURNS + 1} renderings.\n\n{table(head, rows)}\n\n"
            + limits.description(limits.measured(s.size), "transformers"))


if __name__ == "__main__":
    sys.exit(main(HERE, "Rendering conversations", {"ours": ours, "theirs": theirs}, job, rounds=3))
