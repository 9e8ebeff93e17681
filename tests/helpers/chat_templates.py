"""Chat templates of the families, and a tiny tokenizer of each kind that they are used with.

The templates are our own. Each does what one family's template does: where BOS stands, how the
system message is given, what ends a turn, which features of Jinja it uses. The kinds of tokenizer:
SentencePiece's file, the same as tokenizer.json, Gemma's, byte-level as LLaMA 3's and Qwen's.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path

import sentencepiece
import tokenizers
import transformers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from helpers import tiny
from tokenization.chat_template import ChatTemplate
from tokenization.tokenizer import Tokenizer

TEMPLATES = {
    "llama2": """\
{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}\
{% set turns = messages[1:] %}{% else %}{% set told = false %}{% set turns = messages %}{% endif %}\
{% for m in turns %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('user and assistant must speak in turn') }}{% endif %}\
{% if loop.index0 == 0 and told %}\
{% set content = '<<SYS>>\\n' + told + '\\n<</SYS>>\\n\\n' + m['content'] %}\
{% else %}{% set content = m['content'] %}{% endif %}\
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}\
{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}\
{% endfor %}""",
    "llama3": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set told = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set told = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' + told + '<|eot_id|>' }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    "mistral": """\
{%- if messages[0].role == 'system' %}
    {%- set told = messages[0].content %}{%- set turns = messages[1:] %}
{%- else %}{%- set turns = messages %}{%- endif %}
{%- set ns = namespace(count=0) %}
{%- for m in turns | selectattr('role', 'in', ['user', 'assistant']) %}
    {%- if (m.role == 'user') != (ns.count is divisibleby 2) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for m in turns %}
    {%- if m.role == 'user' and loop.last and told is defined %}
        {{- '[INST] ' + told + '\\n\\n' + m.content + '[/INST]' }}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' ~ m.content ~ '[/INST]' }}
    {%- else %}
        {{- ' ' + m.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "qwen": """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' + tools | tojson }}{%- endif %}
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a helper.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for m in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and m.role == 'user' %}
        {%- set ns.searching = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
            {{- content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "gemma2": """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('no system here') }}{% endif %}\
{% for m in messages %}\
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate') }}{% endif %}\
{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}\
{% endif %}{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}""",
    "gemma3": """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set before = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set before = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set before = '' -%}{%- set turns = messages -%}
{%- endif -%}
{%- for m in turns -%}
    {%- set role = 'model' if m['role'] == 'assistant' else m['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (before if loop.first else '') }}
    {%- if m['content'] is string -%}
        {{ m['content'] | trim }}
    {%- elif m['content'] is iterable -%}
        {%- for part in m['content'] -%}{{ part['text'] | trim }}{%- endfor -%}
    {%- else -%}
        {{ raise_exception('no such content') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
""",
    "smollm2": """\
{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a small helper.<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "smollm3": """\
{# how it thinks by default #}
{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = '/think' if enable_thinking else '/no_think' -%}
{%- macro header(role) -%}<|im_start|>{{ role }}
{% endmacro -%}
{%- if messages[0].role == 'system' -%}
    {%- set told = messages[0].content -%}
    {%- if '/no_think' in told -%}{%- set mode = '/no_think' -%}{%- endif -%}
    {%- set told = told.replace('/no_think', '').rstrip() -%}
{%- endif -%}
{{ header('system') }}## Metadata

Today: {{ strftime_now('%d %B %Y') }}
Mode: {{ mode }}

{% if told %}
{{ told }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- if m.role == 'user' -%}
        {{ header('user') + m.content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' -%}
        {% generation %}
        {%- set words = m.content.lstrip('\\n') -%}
        {%- if mode == '/think' -%}
            {{ header('assistant') + words + '<|im_end|>\\n' }}
        {%- else -%}
            {{ header('assistant') + '<think>\\n\\n</think>\\n' + words + '<|im_end|>\\n' }}
        {%- endif -%}
        {% endgeneration %}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ header('assistant') }}{%- endif -%}
""",
}

LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>",
          "<|end_header_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMOLLM = (*QWEN, "<repo_name>")
SPECIAL = {"special": True, "lstrip": False, "rstrip": False, "normalized": False,
           "single_word": False}
KINDS: dict[str, dict] = {  # tokenizer_config.json of each
    "sentencepiece": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                      "add_bos_token": True, "legacy": False},
    "sentencepiece, legacy": {"tokenizer_class": "LlamaTokenizer", "bos_token": {
        "content": "<s>", **SPECIAL, "__type": "AddedToken"}, "eos_token": "</s>",
        "unk_token": "<unk>", "add_bos_token": True, "legacy": True},
    "sentencepiece, no BOS": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>",
                              "eos_token": "</s>", "add_bos_token": False, "legacy": False},
    "sentencepiece, tokens added": {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>",
        "add_bos_token": True, "legacy": False, "added_tokens_decoder": {
            str(tiny.V): {"content": "<|im_start|>", **SPECIAL},
            str(tiny.V + 1): {"content": "<|im_end|>", **SPECIAL}}},
    "llama json": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"},
    "gemma json": {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                   "unk_token": "<unk>", "pad_token": "</s>", "add_bos_token": True},
    "llama3 json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": LLAMA3[0],
                    "eos_token": LLAMA3[2]},
    "llama3 json that says no": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token":
                                 LLAMA3[0], "eos_token": LLAMA3[2], "add_bos_token": False},
    "qwen json": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": QWEN[2],
                  "pad_token": QWEN[0], "add_bos_token": False},
    "smollm json": {"tokenizer_class": "GPT2Tokenizer", "bos_token": QWEN[1],
                    "eos_token": QWEN[2], "unk_token": QWEN[0]},
}


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    """Messages from pairs such as ("u", "Amakuru?"): s system, u user, a assistant."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[k], "content": x} for k, x in turns]


def llamas(folder: Path) -> None:
    """tokenizer.model by sentencepiece, every blank kept and one put before a text, as LLaMA's."""
    folder.mkdir()
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.SENTENCES), model_writer=out, vocab_size=tiny.V,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(out.getvalue())


@functools.cache
def byte_level(specials: tuple[str, ...], first: str | None) -> str:
    """tokenizer.json of a byte-level BPE; `first` is what its post-processor puts before a text."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if specials == QWEN:  # in the shape of Qwen's own file, as transformers rebuilds it
        tok.normalizer = tokenizers.normalizers.NFC()
        tok.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRETOKENIZE_REGEX), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.train_from_iterator(tiny.SENTENCES * 20, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    if first:
        tok.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tok.token_to_id(first))])
    return tok.to_str()


def tokenizer_folders(root: Path) -> dict[str, Path]:
    """Write a tokenizer of each kind into a folder of its own; the folders by kind."""
    llamas(root / "source")
    (root / "source/tokenizer_config.json").write_text(json.dumps(KINDS["sentencepiece"]))
    transformers.AutoTokenizer.from_pretrained(root / "source").save_pretrained(root / "json")
    saved = json.loads((root / "json/tokenizer.json").read_text())
    folders = {}
    for i, (kind, config) in enumerate(KINDS.items()):
        folder = folders[kind] = root / f"kind{i}"
        folder.mkdir()
        if kind.startswith("sentencepiece"):
            shutil.copy(root / "source/tokenizer.model", folder)
        elif kind == "llama json":
            (folder / "tokenizer.json").write_text(json.dumps(saved))
        elif kind == "gemma json":
            (folder / "tokenizer.json").write_text(json.dumps(gemmas(saved)))
        else:
            names, first = (LLAMA3, LLAMA3[0]) if "llama3" in kind else (
                QWEN if "qwen" in kind else SMOLLM, None)
            (folder / "tokenizer.json").write_text(byte_level(names, first))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folders


def gemmas(saved: dict) -> dict:
    """A tokenizer.json as Gemma's: blanks become ▁ and none is put before a text; turns marked."""
    n = len(saved["model"]["vocab"])
    turns = [{"id": n + i, "content": x, **SPECIAL}
             for i, x in enumerate(("<start_of_turn>", "<end_of_turn>"))]
    return {**saved, "added_tokens": saved["added_tokens"] + turns,
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "pre_tokenizer": {"type": "Split", "pattern": {"String": " "},
                              "behavior": "MergedWithPrevious", "invert": False},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}]}}


def pair(folder: Path, source: str):
    """Our template and transformers' tokenizer with the same."""
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    peer.chat_template = source
    tok = Tokenizer.open(folder)
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return ChatTemplate.from_folder(folder, tok), peer
