"""--template-kwargs: variables of a chat template, from preparation to the finished model."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

import eval as evaluate
import prepare
import sample
from data import Bin
from evaluation.eval_model import EvalModel
from helpers import tiny
from helpers.chat_templates import TEMPLATES, pair, said, tokenizer_folders
from helpers.train_runs import run_ranks
from inference.prompt_format import PromptFormat
from preparation.examples import open_template
from runtime.console import UserError
from tokenization.chat_template import ChatTemplate, read_template_kwargs
from tokenization.tokenizer import Tokenizer
from training.datasets import is_fresh
from training.settings import Settings, check_settings

MESSAGES = said(("s", "Be short."), ("u", "Amakuru?"), ("a", "Ni meza."), ("u", "Ejo?"),
                ("a", "Nzaza."))
THINKING = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] "
            "{% if m.role == 'assistant' and not enable_thinking %}<think></think>{% endif %}"
            "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] "
            "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
            "{{ strftime_now('%d %b %Y') if with_date }}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return tokenizer_folders(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tiny model whose template has variables, and a file of conversations."""
    home = tmp_path_factory.mktemp("home")
    model = tiny.folder(home / "model", "llama32", max_position_embeddings=256)
    (model / "chat_template.jinja").write_text(THINKING)
    rows = [{"messages": said(("u", f"{text} {i}?"), ("a", text))}
            for i in range(4) for text in tiny.SENTENCES[:5]]
    (home / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": row["messages"][:1], "chosen": "Yego.", "rejected": "Oya."} for row in rows]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return home


@pytest.mark.parametrize("name, kind, kwargs", [
    ("smollm3", "smollm json", {"enable_thinking": False}),
    ("smollm3", "smollm json", {"enable_thinking": True}),
    ("llama3", "llama3 json", {"date_string": "26 Jul 2024"}),
    ("llama3", "llama3 json", {"bos_token": "x", "unused": [1, {"a": None}]})])
def test_text_and_ids_are_those_of_transformers_with_the_same_variables(
        folders, name, kind, kwargs):
    template, peer = pair(folders[kind], TEMPLATES[name])
    template = template.with_kwargs(kwargs)
    for generation in (False, True):
        wanted = peer.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=generation, **kwargs)
        assert template.render(MESSAGES, generation) == wanted
        assert template.encode(MESSAGES, generation) == peer.apply_chat_template(
            MESSAGES, add_generation_prompt=generation, return_dict=False, **kwargs)
    assert template.render(MESSAGES) != pair(folders[kind], TEMPLATES[name])[0].with_kwargs(
        {"enable_thinking": "other", "date_string": "other", "bos_token": ""}).render(MESSAGES)


def test_words_become_variables():
    words = ["enable_thinking=false", "n=3", "date_string=26 Jul 2024", 'quoted="26"', "empty=",
             "equation=a=b", '{"style": {"short": true}, "n": 4}']
    assert read_template_kwargs(words) == {
        "enable_thinking": False, "n": 4, "date_string": "26 Jul 2024", "quoted": "26", "empty": "",
        "equation": "a=b", "style": {"short": True}}
    assert read_template_kwargs([]) == {}


@pytest.mark.parametrize("word", [
    "enable_thinking", "[1]", '{"a": 1', "a-b=1", "=1", "messages=1", "tools=[]", "self=1",
    "documents=1", "add_generation_prompt=true", "x=NaN", '{"x": 1e999}', '{"not a name": 1}'])
def test_what_cannot_be_a_variable_is_one_line_before_any_work(word):
    calls = (
        lambda: read_template_kwargs([word]),
        lambda: check_settings(Settings(mode="sft", template_kwargs=[word])),
        lambda: sample.check_settings(sample.Settings(chat=True, template_kwargs=[word])),
        lambda: evaluate.check_settings(evaluate.Settings(
            model="x", suites=["sib200"], chat_template=True, template_kwargs=[word])),
        lambda: prepare.chat(prepare.Chat(["none.jsonl"], "none", "none", template_kwargs=[word])))
    for call in calls:
        with pytest.raises(UserError, match="--template-kwargs") as error:
            call()
        assert error.value.code == 2 and "\n" not in str(error.value)


def test_variables_without_a_template_are_refused():
    for mode in ("cpt", "mt"):
        with pytest.raises(UserError, match="--template-kwargs: has no effect with --mode"):
            check_settings(Settings(mode=mode, template_kwargs=["a=1"]))
    with pytest.raises(UserError, match="no effect without --chat-template"):
        evaluate.check_settings(evaluate.Settings(
            model="x", suites=["sib200"], template_kwargs=["a=1"]))
    with pytest.raises(UserError, match="no effect on --prompt"):
        sample.check_settings(sample.Settings(prompt=["x"], template_kwargs=["a=1"]))
    with pytest.raises(UserError, match="give --as-chat"):
        prepare.mt(prepare.Mt(["x.tsv"], "x", "x", template_kwargs=["a=1"]))


def test_a_date_can_be_given(home):
    template = ChatTemplate.from_folder(home / "model", Tokenizer.open(home / "model"))
    template = template.with_kwargs({"with_date": True})
    before = time.strftime("%d %b %Y")
    assert template.render(MESSAGES)[-11:] in (before, time.strftime("%d %b %Y"))
    for given, written in (("2024-07-26", "26 Jul 2024"), ("Friday", "Friday"), (2024, "2024")):
        assert template.with_kwargs({"date_string": given}).render(MESSAGES).endswith(written)
    assert not template.with_kwargs({"date_string": ""}).render(MESSAGES).endswith("</s>")


@pytest.mark.parametrize("kwargs", [[1], "text", {"a-b": 1}, {"messages": []}, 3])
def test_broken_variables_of_a_model_name_their_file(home, tmp_path, kwargs):
    folder = shutil.copytree(home / "model", tmp_path / "model")
    (folder / "prompt.json").write_text(json.dumps({"template_kwargs": kwargs}))
    with pytest.raises(UserError, match=r"prompt\.json: template_kwargs") as error:
        ChatTemplate.from_folder(folder, Tokenizer.open(folder))
    assert error.value.code == 3


def test_a_model_is_asked_with_the_variables_that_it_was_taught_with(home, tmp_path):
    tokenizer = Tokenizer.open(home / "model")
    settings = Settings(
        mode="sft", model=str(home / "model"), data=[str(home / "chat.jsonl")],
        out=str(tmp_path / "sft"), template_kwargs=["enable_thinking=false"], seq_len=200, steps=1,
        dtype="fp32", device="cpu")
    log = run_ranks(settings)
    assert "--template-kwargs enable_thinking=false" in log
    out = tmp_path / "sft"
    taught = Bin(out / "bins/chat")
    prompt = {"chat": THINKING, "template_kwargs": {"enable_thinking": False}}
    assert taught.meta["prompt"] == prompt
    assert "[assistant] <think></think>" in tokenizer.decode(taught.document(0).tolist())
    cleaning = {"clean_chat": {"languages": ["kin"], "steps": ["nfc", "apostrophe"]}}
    assert json.loads((out / "model/prompt.json").read_text()) == prompt | cleaning

    question = said(("u", "Amakuru?"))
    asked = PromptFormat.load([out / "model"], tokenizer)
    assert asked.render(question).endswith("[assistant] <think></think>")
    other = PromptFormat.load([out / "model"], tokenizer,
                              template_kwargs={"enable_thinking": True})
    assert other.render(question).endswith("[assistant] ")
    assert PromptFormat.load([home / "model"], tokenizer, template_kwargs={
        "enable_thinking": True}).render(question).endswith("[assistant] ")

    # the next stage: preferences with the same variables, then a template without any
    prepare.pairs(prepare.Pairs([str(home / "pairs.jsonl")], str(out / "model"),
                                str(tmp_path / "pairs"), processes=1))
    bin = Bin(tmp_path / "pairs")
    assert bin.meta["prompt"] == {"template_kwargs": {"enable_thinking": False}}
    assert "<think></think>" in tokenizer.decode(bin.document(0).tolist())
    prepare.chat(prepare.Chat([str(home / "chat.jsonl")], str(out / "model"),
                              str(tmp_path / "plain"), template="plain", processes=1))
    assert set(Bin(tmp_path / "plain").meta["prompt"]) == {"chat"}
    run_ranks(Settings(mode="sft", model=str(out / "model"), data=[str(tmp_path / "plain")],
                       out=str(tmp_path / "next"), seq_len=200, steps=1, dtype="fp32",
                       device="cpu"))
    final = json.loads((tmp_path / "next/model/prompt.json").read_text())
    assert set(final) == {"chat", "clean_chat"} and "message['role']" in final["chat"]


def test_a_bin_is_prepared_again_for_other_variables_and_for_another_template(home, tmp_path):
    folder = shutil.copytree(home / "model", tmp_path / "model")
    tokenizer = Tokenizer.open(folder)
    spec = str(home / "chat.jsonl")
    prepare.chat(prepare.Chat([spec], str(folder), str(tmp_path / "bin"), processes=1,
                              template_kwargs=["a=1"]))

    def fresh(**kwargs: object) -> bool:
        prompt = open_template("model", folder, tokenizer, kwargs).to_prompt()
        return is_fresh(tmp_path / "bin", spec, tokenizer, "chat", 200, prompt)

    assert fresh(a=1) and not fresh(a=2) and not fresh() and not fresh(a=1, b=1)
    (folder / "chat_template.jinja").write_text(THINKING + " ")
    assert not fresh(a=1)


def test_the_signature_of_an_evaluation_knows_the_variables(home):
    template = ChatTemplate.from_folder(home / "model", Tokenizer.open(home / "model"))
    models = [SimpleNamespace(template=lambda taught_as, x=x: x) for x in (
        template, template.with_kwargs({"a": 1, "b": 2}), template.with_kwargs({"b": 2, "a": 1}),
        template.with_kwargs({"a": 2}))]
    signatures = [EvalModel.chat_signature(model)["chat"] for model in models]
    assert signatures[1] == signatures[2] and len(set(signatures)) == 3


def test_other_programs_render_the_kept_variables_alike(home, tmp_path):
    folder = shutil.copytree(home / "model", tmp_path / "model")
    (folder / "prompt.json").write_text(
        json.dumps({"template_kwargs": {"enable_thinking": False}}))
    peer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = ChatTemplate.from_folder(folder, Tokenizer.open(folder))
    assert ours.render(MESSAGES, True) == peer.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True, enable_thinking=False)
