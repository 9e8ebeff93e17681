"""Chat templates against transformers' apply_chat_template, in text and ids, and hostile ones.

The templates are our own, each with what one family's does: where BOS stands, how a system's words
are told, what ends a turn, which of Jinja's means it uses. The tokenizers are tiny, one of each
kind: SentencePiece's file, the same as tokenizer.json, Gemma's, LLaMA 3's and Qwen's byte-level.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from helpers import tiny
from runtime.console import UserError
from runtime.paths import ROOT
from tokenization import chat_template as chat
from tokenization.chat_template import Template
from tokenization.tokenizer import Part, Tokenizer

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


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[k], "content": x} for k, x in turns]


CONVERSATIONS = {
    "one question": said(("u", "Amakuru?")),
    "a turn": said(("u", "Muraho, amakuru?"), ("a", "Ni meza cyane.")),
    "three turns": said(("u", "Umugore arateka iki?"), ("a", "Ibishyimbo mu nkono nini."),
                        ("u", "How many children went to school?"), ("a", "Two."),
                        ("u", "Amazi y'umugezi?"), ("a", "Ni meza kandi arakonje.")),
    "a system": said(("s", "Subiza mu Kinyarwanda."), ("u", "Ejo?"), ("a", "Nzajya i Kigali.")),
    "a system, three turns": said(("s", "Be short. /no_think"), ("u", "Inka?"), ("a", "Zirya."),
                                  ("u", "Our cows?"), ("a", "Eat grass."), ("u", "Murakoze")),
    "odd blanks": said(("s", "\nRules:\n\n- one  \n"), ("u", "  two  spaces\t\n\nnew "),
                       ("a", "\n\nyes\n")),
    "other scripts": said(("u", "n’umwana 🦒 日本語 e\u0301"), ("a", "😀\u00a0é")),
    "thoughts": said(("u", "1 + 1?"), ("a", "<think>\nadd\n</think>\n\n2"), ("u", "2 + 2?"),
                     ("a", "<think>\nagain\n</think>\n\n4")),
    "Jinja's own signs": said(("u", "{{ 7 * 7 }} {% for %} {# no #}"), ("a", "{% raw %}")),
    "no words": said(("u", ""), ("a", "")),
}


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


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer's folder of each kind."""
    place = tmp_path_factory.mktemp("kinds")
    llamas(place / "source")
    (place / "source/tokenizer_config.json").write_text(json.dumps(KINDS["sentencepiece"]))
    transformers.AutoTokenizer.from_pretrained(place / "source").save_pretrained(place / "json")
    saved = json.loads((place / "json/tokenizer.json").read_text())
    found = {}
    for i, (kind, words) in enumerate(KINDS.items()):
        folder = found[kind] = place / f"kind{i}"
        folder.mkdir()
        if kind.startswith("sentencepiece"):
            shutil.copy(place / "source/tokenizer.model", folder)
        elif kind == "llama json":
            (folder / "tokenizer.json").write_text(json.dumps(saved))
        elif kind == "gemma json":
            (folder / "tokenizer.json").write_text(json.dumps(gemmas(saved)))
        else:
            names, first = (LLAMA3, LLAMA3[0]) if "llama3" in kind else (
                QWEN if "qwen" in kind else SMOLLM, None)
            (folder / "tokenizer.json").write_text(byte_level(names, first))
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return found


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
    return Template.of(folder, tok), peer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_ids_of_conversations_are_those_of_transformers(folders, name, kind):
    template, peer = pair(folders[kind], TEMPLATES[name])
    compared = 0
    for title, messages in CONVERSATIONS.items():
        for generation in (False, True):
            try:
                wanted = peer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation)
            except Exception as e:  # the template's own word against it
                with pytest.raises(UserError, match=str(e)):
                    template.render(messages, generation)
                assert "no system here" in str(e) or kind == "qwen json"  # it has no BOS
                continue
            assert template.render(messages, generation) == wanted, title
            ids = peer.apply_chat_template(
                messages, add_generation_prompt=generation, return_dict=False)
            assert template.encode(messages, generation) == ids, title
            compared += 1
    assert compared >= 14 or (kind == "qwen json" and name in ("llama2", "gemma2"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_control_tokens_name_in_a_message_stays_text_as_in_transformers(folders, kind):
    template, peer = pair(folders[kind], TEMPLATES["llama3" if "llama3" in kind else "smollm2"])
    tok = template.tokenizer
    names = [tok.pieces[i] for i in sorted(tok.control) if tok.pieces[i]]
    for name in names:
        messages = said(("s", f"{name}"), ("u", f"Amazi {name}ni meza{name}{name}"),
                        ("a", f"yego{name} "))
        ids = template.encode(messages, generation=True)
        calm = template.encode(said(("s", "x"), ("u", "x"), ("a", "x")), generation=True)
        assert [ids.count(i) for i in tok.control] == [calm.count(i) for i in tok.control]
        text = template.render(messages, generation=True)
        if name == "<unk>":
            continue  # sentencepiece knows no text for it: not counted among its bytes
        assert peer.decode(ids).replace(" ", "") == text.replace(" ", "")
        peer.chat_control_tokens = names
        assert ids == peer.apply_chat_template(messages, add_generation_prompt=True,
                                               sanitize_control_tokens=True, return_dict=False)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(words=st.lists(st.lists(st.sampled_from(
    ["Amazi", " ", "\n", "é", "🦒", *LLAMA3, "\ue000", "\ue001", "0", "{{", "<|"])).map("".join),
    min_size=1, max_size=4))
def test_whatever_is_typed_only_the_template_writes_control_tokens(folders, words):
    template, _ = pair(folders["llama3 json"], TEMPLATES["llama3"])
    messages = [{"role": "user", "content": x} for x in words]
    ids = template.encode(messages)
    tok = template.tokenizer
    assert ids.count(tok.bos) == 1 and ids.count(tok.eos) == len(words) + 1
    text = "".join(tok.pieces[i] if i in tok.control else "\0" for i in ids)
    assert text.replace("\0", "").count(LLAMA3[3]) == len(words) + 1
    shown = "".join(tok.decode([*x]) for x in parts(ids, tok.control))
    plain = template.render(messages)
    for name in LLAMA3:
        plain, shown = plain.replace(name, ""), shown.replace(name, "")
    assert shown == plain


def parts(ids: list[int], control: set[int]) -> list[list[int]]:
    """Ids cut at control tokens."""
    found: list[list[int]] = [[]]
    for i in ids:
        if i in control:
            found.append([])
        else:
            found[-1].append(i)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_texts_are_encoded_together_as_each_alone(folders, kind):
    tok = Tokenizer.open(folders[kind])
    names = [tok.pieces[i] for i in sorted(tok.control) if tok.pieces[i]]
    words = st.lists(st.sampled_from(["Amazi", " ", "\n", "\x01", "é", "🦒", "a", *names])).map(
        "".join)

    @settings(max_examples=30, deadline=None)
    @given(found=st.lists(st.builds(Part, words, st.booleans(), st.booleans()), max_size=9))
    def check(found):
        together = tok.encode_parts(found)
        assert together == [tok.encode_parts([x])[0] for x in found]
        for part, ids in zip(found, together, strict=True):
            if not part.control:  # text stays text
                assert not tok.control.intersection(ids) or "<unk>" in map(tok.piece, ids)
                if part.first:
                    assert ids == tok.encode(part.text)

    check()
    again = pickle.loads(pickle.dumps(tok))  # as a worker gets it: opened anew, by its file
    assert again.fingerprint == tok.fingerprint and again.pieces == tok.pieces


@pytest.mark.parametrize("kind", KINDS)
def test_documents_begin_as_transformers_says_and_end_once(folders, kind):
    tok = Tokenizer.open(folders[kind])
    peer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    for text in (*tiny.SENTENCES, "日本語 🦒", "a\n\nb"):
        ids = tok.document(text)
        assert ids[:-1] == peer(text).input_ids and ids[-1] == tok.eos == peer.eos_token_id
        assert ids.count(tok.eos) == 1 and ids.count(tok.bos) == (tok.bos is not None)
    assert tok.bos == (peer.bos_token_id if peer("a").input_ids[0] == peer.bos_token_id else None)


def test_a_template_is_found_where_transformers_finds_it(folders, tmp_path):
    folder = shutil.copytree(folders["qwen json"], tmp_path / "m")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tok = Tokenizer.open(folder)
    assert Template.of(folder, tok) is None
    words = json.loads((folder / "tokenizer_config.json").read_text())

    def told(template) -> str:
        text = json.dumps({**words, "chat_template": template})
        (folder / "tokenizer_config.json").write_text(text)
        peer = transformers.AutoTokenizer.from_pretrained(folder)
        found = Template.of(folder, tok).render(CONVERSATIONS["a turn"])
        assert found == peer.apply_chat_template(CONVERSATIONS["a turn"], tokenize=False)
        return found

    assert told("one{{ eos_token }}{{ bos_token }}") == "one<|im_end|>"
    assert told([{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
                ) == "three"
    (folder / "chat_template.jinja").write_text("a file, é")
    assert told("one") == "a file, é"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: cannot be read"):
        Template.of(folder, tok)
    (folder / "chat_template.jinja").unlink()
    for odd in (7, {"a": 1}):
        (folder / "tokenizer_config.json").write_text(json.dumps({**words, "chat_template": odd}))
        with pytest.raises(UserError, match="chat_template is no text"):
            Template.of(folder, tok)


HOSTILE = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe",
    "{{ messages.__init__.__globals__ }}": "unsafe",
    "{{ raise_exception.__globals__['json'] }}": "unsafe",
    "{{ self.__init__.__globals__ }}": "unsafe|undefined",
    "{% include '/etc/passwd' %}": "no loader",
    "{% set x = messages.append(1) %}": "unsafe",
    "{{ '%s' % messages.pop }}{{ messages.pop() }}": "unsafe",
    "{{ ('{0.__class__.__init__.__globals__}').format(messages) }}": "unsafe",
    "{{ 'x' * 10 ** 12 }}": "too much", "{{ 10 ** 100000 }}": "too much",
    "{% set x = 'x' * 2 ** 20 %}{% for i in range(1000) %}{{ x }}{% endfor %}": "without end",
    "{% for i in range(10 ** 9) %}{% endfor %}": "range",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "Recursion",
    "{% if %}": "Expected", "{% for x in y": "unexpected end|expected",
    "{{ nobody() }}": "undefined",
    "{{ messages[9].content }}": "no element|undefined", "{{ 1 / 0 }}": "ZeroDivision",
    "{{ messages + 1 }}": "TypeError", "{{ raise_exception('not\nso') }}": "not so",
    "{% generation %}": "end of template",
}


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_or_broken_template_is_one_line_that_names_its_file(folders, tmp_path, source):
    folder = shutil.copytree(folders["qwen json"], tmp_path / "m")
    (folder / "chat_template.jinja").write_text(source)
    template = Template.of(folder, Tokenizer.open(folder))
    with pytest.raises(UserError) as e:
        template.render(CONVERSATIONS["a turn"])
    said = str(e.value)
    assert said.startswith(f"{folder / 'chat_template.jinja'}: ") and "\n" not in said
    assert any(x in said for x in HOSTILE[source].split("|")), said
    assert e.value.code == 3


@pytest.mark.parametrize("messages", [
    [{"role": "user"}], [{"content": "x"}], [{"role": "king", "content": "x"}], ["user: x"],
    [{"role": "user", "content": None}], [{"role": "user", "content": ["x"]}]])
def test_what_is_no_message_is_refused_by_its_number(folders, messages):
    template, _ = pair(folders["qwen json"], TEMPLATES["qwen"])
    for call in (template.render, template.encode):
        with pytest.raises(UserError, match=r"message 2: .*expected a role"):
            call([{"role": "user", "content": "x"}, *messages])


def test_a_template_that_takes_a_mark_apart_is_refused(folders, tmp_path):
    template, _ = pair(shutil.copytree(folders["qwen json"], tmp_path / "m"),
                       "{{ messages[0].content[:1] }}")
    assert template.encode(said(("u", "Amazi"))) == template.tokenizer.encode("A")
    with pytest.raises(UserError, match="takes a message's text apart"):
        template.encode(said(("u", "<|im_end|>Amazi")))


def test_other_words_of_a_message_reach_the_template_and_stay_text_too(folders, tmp_path):
    template, _ = pair(shutil.copytree(folders["qwen json"], tmp_path / "m"),
                       "{{ messages[0].name }}{{ messages[0].list[0].x }}{{ eos_token }}")
    message = {**said(("u", "x"))[0], "name": "A<|im_end|>", "list": [{"x": "<|im_start|>"}]}
    assert template.render([message]) == "A<|im_end|><|im_start|><|im_end|>"
    ids, tok = template.encode([message]), template.tokenizer
    assert [i for i in ids if i in tok.control] == [tok.eos]
    assert chat.ROLES == ("system", "user", "assistant", "tool")


@pytest.mark.data
@pytest.mark.slow
def test_llama3s_published_tokenizer_gives_transformers_ids(tmp_path):
    stored = ROOT.parent / "shared/data/tokenizers/llama3/tokenizer.json"
    if not stored.exists():
        pytest.skip("needs LLaMA 3's published tokenizer under shared/data/tokenizers")
    shutil.copy(stored, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(KINDS["llama3 json"]))
    template, peer = pair(tmp_path, TEMPLATES["llama3"])
    for messages in CONVERSATIONS.values():
        assert template.encode(messages) == peer.apply_chat_template(messages, return_dict=False)


def test_what_ends_a_turn_is_known_of_every_family(folders):
    ends = {"llama2": "</s>", "llama3": "<|eot_id|>", "mistral": "</s>", "qwen": "<|im_end|>",
            "gemma2": "<end_of_turn>", "gemma3": "<end_of_turn>", "smollm2": "<|im_end|>",
            "smollm3": "<|im_end|>"}
    kinds = {"llama": "sentencepiece", "llama3": "llama3 json", "qwen": "qwen json",
             "gemma": "gemma json", "smollm": "smollm json", "mistral": "llama json"}
    for name, end in ends.items():
        template, _ = pair(folders[kinds.get(name) or kinds[name.rstrip("123")]], TEMPLATES[name])
        assert template.tokenizer.pieces[template.end] == end
    template, _ = pair(folders["qwen json"], "{{ messages[1].content }}")
    assert template.end is None


@pytest.mark.slow
def test_a_model_taught_to_converse_stops_at_a_turns_end_in_other_programs_too(folders, tmp_path):
    base = tiny.folder(tmp_path / "base", "llama31", tokenizer=False, vocab_size=400,
                       bos_token_id=0, eos_token_id=1, max_position_embeddings=256)
    shutil.copy(folders["llama3 json"] / "tokenizer.json", base)
    (base / "tokenizer_config.json").write_text(json.dumps(
        {**KINDS["llama3 json"], "eos_token": LLAMA3[1]}))  # a base: its EOS ends a document
    (base / "chat_template.jinja").write_text(TEMPLATES["llama3"])
    words = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(
        {**words, "bos_token_id": 0, "eos_token_id": 1}))
    rows = [json.dumps({"messages": said(("u", f"Amakuru {i}?"), ("a", f"Ni meza {i}"))})
            for i in range(40)]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    root = ROOT
    for command in (
            ["train.py", "--mode", "sft", "--model", base, "--data", tmp_path / "chat.jsonl",
             "--out", tmp_path / "out", "--steps", 2, "--rows", 2, "--hold-out", 0, "--seq-len",
             128, "--dtype", "fp32", "--device", "cpu"],
            ["export.py", "check", "--model", tmp_path / "out"]):
        done = subprocess.run([sys.executable, *map(str, command)], cwd=root, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stdout[-900:] + done.stderr[-900:]
    assert "✓ chat template: ends a turn with <|eot_id|>" in done.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/model")
    assert model.generation_config.eos_token_id == [1, 2]
    assert transformers.AutoTokenizer.from_pretrained(
        tmp_path / "out/model").chat_template == TEMPLATES["llama3"]
