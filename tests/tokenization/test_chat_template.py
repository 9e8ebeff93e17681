"""Chat templates against transformers' apply_chat_template, in text and ids, and hostile ones.

The templates are our own, each with what one family's does: where BOS stands, how a system's words
are told, what ends a turn, which of Jinja's means it uses. The tokenizers are tiny, one of each
kind: SentencePiece's file, the same as tokenizer.json, Gemma's, LLaMA 3's and Qwen's byte-level.
"""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers import tiny
from helpers.chat_templates import KINDS, LLAMA3, TEMPLATES, pair, said, tokenizer_folders
from runtime.console import UserError
from runtime.paths import ROOT
from tokenization import chat_template as chat
from tokenization.chat_template import ChatTemplate
from tokenization.tokenizer import Segment, Tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer's folder of each kind."""
    return tokenizer_folders(tmp_path_factory.mktemp("kinds"))


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
        ids = template.encode(messages, add_generation_prompt=True)
        calm = template.encode(said(("s", "x"), ("u", "x"), ("a", "x")), add_generation_prompt=True)
        assert [ids.count(i) for i in tok.control] == [calm.count(i) for i in tok.control]
        text = template.render(messages, add_generation_prompt=True)
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
    @given(found=st.lists(st.builds(Segment, words, st.booleans(), st.booleans()), max_size=9))
    def check(found):
        together = tok.encode_segments(found)
        assert together == [tok.encode_segments([x])[0] for x in found]
        for part, ids in zip(found, together, strict=True):
            if not part.control:  # text stays text
                assert not tok.control.intersection(ids) or "<unk>" in map(tok.piece, ids)
                if part.first:
                    assert ids == tok.encode(part.text)

    check()
    again = pickle.loads(pickle.dumps(tok))  # a worker opens its file again
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
    assert ChatTemplate.from_folder(folder, tok) is None
    words = json.loads((folder / "tokenizer_config.json").read_text())

    def told(template) -> str:
        text = json.dumps({**words, "chat_template": template})
        (folder / "tokenizer_config.json").write_text(text)
        peer = transformers.AutoTokenizer.from_pretrained(folder)
        found = ChatTemplate.from_folder(folder, tok).render(CONVERSATIONS["a turn"])
        assert found == peer.apply_chat_template(CONVERSATIONS["a turn"], tokenize=False)
        return found

    assert told("one{{ eos_token }}{{ bos_token }}") == "one<|im_end|>"
    assert told([{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
                ) == "three"
    (folder / "chat_template.jinja").write_text("a file, é")
    assert told("one") == "a file, é"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: not UTF-8"):
        ChatTemplate.from_folder(folder, tok)
    (folder / "chat_template.jinja").unlink()
    for odd in (7, {"a": 1}):
        (folder / "tokenizer_config.json").write_text(json.dumps({**words, "chat_template": odd}))
        with pytest.raises(UserError, match="chat_template is not a text"):
            ChatTemplate.from_folder(folder, tok)


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
    template = ChatTemplate.from_folder(folder, Tokenizer.open(folder))
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
    with pytest.raises(UserError, match="divides the text of a message"):
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
        assert template.tokenizer.pieces[template.end_of_turn] == end
    template, _ = pair(folders["qwen json"], "{{ messages[1].content }}")
    assert template.end_of_turn is None


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
