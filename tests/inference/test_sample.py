"""sample.py as it is run: prompts, files that a second run continues, chats, translations."""

import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import sample
from helpers import tiny
from helpers.commands import command
from helpers.tiny import bytewise_folder
from inference import cpu_linear
from inference.generate import completions
from inference.prompt_format import PromptFormat
from inference.sampling import SamplingParams, StoppingCriteria
from model import Llama
from runtime import flags
from runtime.console import FLAGS, STORAGE, UserError
from runtime.paths import ROOT
from tokenization.chat_template import ChatTemplate
from tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny model (context 128)."""
    home = tmp_path_factory.mktemp("sample")
    tiny.folder(home / "run" / "model")
    return home


def test_a_wrong_flag_of_sampling_stops_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean prompt"):
        flags.read(sample.Settings, ["--promt", "a"], "sample.py")


def sampled(home: Path, **values) -> None:
    """sample.py in this process."""
    usual = {"model": str(home / "run"), "device": "cpu", "dtype": "fp32", "max_new_tokens": 12}
    sample.main(sample.Settings(**{**usual, **values}))


def continuation(model: Llama, tokenizer: Tokenizer, ids: list[int],
                 sampling: SamplingParams) -> list[int]:
    """The ids that follow a prompt."""
    [answer] = completions(model, [ids], sampling, StoppingCriteria({tokenizer.eos}))
    return answer.ids


def continued(home: Path, prompt: str, sampling: SamplingParams, peer=tiny.peer) -> str:
    """A prompt with its continuation, decoded as a whole."""
    tokenizer, model = Tokenizer.open(home / "run" / "model"), tiny.ours(peer())
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    new = continuation(model, tokenizer, ids, sampling)
    return prompt + tokenizer.decode(ids + new)[len(tokenizer.decode(ids)):]


def test_one_prompt_streams_and_on_a_terminal_no_control_character_acts(home):
    ours, theirs = pty.openpty()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    flags = ["--model", home / "run", "--prompt", "\x1b[31mInka\x9b2J", "--max-new-tokens", "60",
             "--temperature", "2", "--dtype", "fp32"]
    with subprocess.Popen([sys.executable, ROOT / "sample.py", *flags], stdout=theirs,
                          stderr=subprocess.PIPE, env=env) as running:
        os.close(theirs)
        printed = b""
        try:
            while chunk := os.read(ours, 4096):
                printed += chunk
        except OSError:  # the terminal's other end is closed
            pass
        assert running.wait() == 0, running.stderr.read()
    os.close(ours)
    text = printed.decode()
    assert text.startswith("\\x1b[31mInka\\x9b2J") and len(text) > 30
    assert all(c.isprintable() or c in "\r\n\t" for c in text)


def test_prompts_of_a_file_are_answered_in_order_as_alone(home):
    prompts = ["Inka", "", "Amazi y'umugezi", "Inka"]
    (home / "prompts.txt").write_bytes("\ufeffInka\r\n\r\nAmazi y'umugezi\r\nInka\r\n".encode())
    process = command("sample.py", "--model", home / "run/model", "--file", "prompts.txt", "--json",
                   "--seed", "4", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9",
                   "--max-new-tokens", "20", "--dtype", "fp32", "--device", "cpu", cwd=home)
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in process.stdout.splitlines()]
    assert [x["prompt"] for x in answers] == prompts
    assert [x["prompt_number"] for x in answers] == [1, 2, 3, 4]
    sampling = SamplingParams(20, 1.5, 50, 0.9, seed=4)
    for x in answers[:3]:
        assert x["prompt"] + x["text"] == continued(home, x["prompt"], sampling)
        assert x["tokens"] == 20 if x["end"] == "length" else x["tokens"] <= 20
    assert answers[3]["text"] != answers[0]["text"]  # a copy is another draw


def test_several_prompts_are_printed_one_after_another_and_each_as_alone(home, capsys):
    prompts = ["Inka", "Abana babiri", "Umugore"]
    sampled(home, prompt=prompts, temperature=1.2)
    expected = [continued(home, p, SamplingParams(12, 1.2, 0, 0.95)) for p in prompts]
    assert capsys.readouterr().out == "".join(
        f"== {i} of 3\n{text}\n" for i, text in enumerate(expected, 1))
    sampled(home, prompt=prompts[:1], temperature=1.2)
    assert capsys.readouterr().out == expected[0] + "\n"


def test_int8_answers_as_the_rounded_model_does(home, capsys):
    prompts = ["Inka", "Abana babiri", "Umugore"]
    sampled(home, prompt=prompts, temperature=0.0, quant="int8", rows=2, max_new_tokens=40)
    expected, plain = ([continued(home, p, SamplingParams(40, 0), peer) for p in prompts]
                     for peer in (lambda: tiny.rounded(tiny.peer()), tiny.peer))
    assert capsys.readouterr().out == "".join(
        f"== {i} of 3\n{text}\n" for i, text in enumerate(expected, 1))
    assert expected != plain


def test_a_prompt_beyond_the_context_is_cut_with_a_message(home, capsys):
    prompt = "Inka zacu " * 40
    sampled(home, prompt=[prompt], max_new_tokens=100, temperature=0.0)
    captured = capsys.readouterr()
    assert "tokens are left out at the start; the context of 128 holds 28" in captured.err
    tokenizer, model = Tokenizer.open(home / "run" / "model"), tiny.ours(tiny.peer())
    read = [tokenizer.bos, *tokenizer.encode(prompt)[-27:]]
    new = continuation(model, tokenizer, read, SamplingParams(100, 0))
    continuation_text = tokenizer.decode(read + new)[len(tokenizer.decode(read)):]
    assert captured.out == prompt + continuation_text + "\n"


@pytest.mark.parametrize(("values", "message", "code"), [
    ({}, "give one of --prompt", 2), ({"prompt": ["a"], "file": "x"}, "give one of --prompt", 2),
    ({"file": "none.txt"}, "none.txt: cannot be read", 3),
    ({"file": "nil.txt"}, "nil.txt: empty", 3), ({"file": "latin.txt"}, "byte 2 is not UTF-8", 3),
    ({"prompt": ["a"], "model": ""}, "name a model", 2),
    ({"prompt": ["a"], "top_p": 2.0}, "--top-p 2.0", 2),
    ({"prompt": ["a"], "model": "nowhere"}, "nowhere", 3),
    ({"prompt": ["a"], "chat": True}, "give one of --prompt", 2),
    ({"prompt": ["a"], "out": "x"}, "needs --file", 2),
    ({"prompt": ["a"], "compile": True}, "--compile needs a GPU", 2),
    ({"web": True, "chat": True}, "give one of --prompt", 2),
    ({"web": True, "samples": 2}, "--web cannot be used with --json or --samples", 2),
    ({"web": True, "address": "8000"}, "--address 8000: expected one address", 2),
    ({"web": True, "beams": 2}, "the page searches only translations", 2),
    ({"prompt": ["a"], "address": "127.0.0.1:1"}, "--address 127.0.0.1:1 needs --web", 2),
    ({"chat": True, "json": True}, "--chat cannot be used with --json", 2),
    ({"prompt": ["a"], "samples": 2, "temperature": 0.0}, "at temperature 0 all samples are equal",
     2),
    ({"prompt": ["a"], "beams": 2, "temperature": 0.7}, "--beams 2 cannot be used", 2),
    ({"prompt": ["a"], "stop": [""]}, "an empty string would end every answer", 2),
    ({"prompt": ["a\udcff"]}, "prompt 1: has bytes that are not UTF-8", 3),
    ({"file": "odd.jsonl"}, "odd.jsonl, line 2: expected a JSON object with 'prompt' or", 3),
    ({"file": "odd.jsonl", "translate": "kin-eng"}, "line 2: expected a JSON object", 3),
    ({"prompt": ["a"], "max_new_tokens": 128}, "leaves no room", 2)])
def test_what_cannot_be_continued_is_one_line(home, monkeypatch, values, message, code):
    monkeypatch.chdir(home)
    (home / "nil.txt").write_text("")
    (home / "odd.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    (home / "latin.txt").write_bytes(b"ca\xe9\n")
    with pytest.raises(UserError) as e:
        sampled(home, **values)
    assert message in str(e.value) and e.value.code == code and "\n" not in str(e.value)


def test_a_model_without_eos_gets_a_message_and_one_without_bos_needs_text(home, capsys):
    neither = bytewise_folder(home / "neither", [])
    (neither / "generation_config.json").unlink()
    config = json.loads((neither / "config.json").read_text())
    (neither / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    sampled(home, model=str(neither), prompt=["Inka"])
    assert "no EOS, so every answer continues to --max-new-tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="no BOS to start from"):
        sampled(home, model=str(neither), prompt=[""])


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_prompts_killed_and_continued_holds_what_one_run_writes(home):
    rows = [{"prompt": f"{x} {i}"} for i in range(3) for x in tiny.SENTENCES[:5]]
    (home / "asked.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows * 2))
    values = {"file": str(home / "asked.jsonl"), "samples": 2, "max_new_tokens": 40, "rows": 4,
              "seed": 3}
    flags = [x for k, v in values.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    out, complete = home / "killed.jsonl", home / "complete.jsonl"
    run = [sys.executable, ROOT / "sample.py", "--model", home / "run", "--dtype", "fp32",
           "--device", "cpu", "--out", out, *flags]
    with subprocess.Popen(run, stderr=subprocess.DEVNULL) as running:
        while not out.exists() or out.read_bytes().count(b"\n") < 3:
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
    n_done = out.read_bytes().count(b"\n")
    assert 3 <= n_done < 60
    with open(out, "ab") as f:
        f.write(b'{"prompt": "half a li')
    sampled(home, **values, out=str(out))
    sampled(home, **values, out=str(complete))
    assert out.read_bytes() == complete.read_bytes()
    answers = lines_of(out)
    assert [x["prompt"] for x in answers] == [x["prompt"] for x in rows * 2 for _ in range(2)]
    assert [x["prompt_number"] for x in answers] == [i // 2 + 1 for i in range(60)]
    same = [x["text"] for x in answers if x["prompt"] == answers[0]["prompt"]]
    assert len(same) == len(set(same)) == 4  # copies, and samples of each, are all different
    sampled(home, **values, out=str(out))  # nothing is left to do
    assert out.read_bytes() == complete.read_bytes()

    shutil.copytree(home / "run", home / "moved")
    moved = {"model": str(home / "moved")}
    for other in ({"seed": 4}, {"temperature": 0.5}, {"samples": 1}, moved):
        with pytest.raises(UserError, match=r"line [12]: answers another prompt, or was made with"):
            sampled(home, **{**values, **other}, out=str(out))
    tiny.folder(home / "moved" / "model", seed=5)  # trained further, say
    sampled(home, **values, **moved, out=str(home / "other.jsonl"))
    shutil.copytree(home / "run" / "model", home / "moved" / "model", dirs_exist_ok=True)
    with pytest.raises(UserError, match="with other settings or weights"):
        sampled(home, **values, **moved, out=str(home / "other.jsonl"))
    out.write_text("not ours\n")
    with pytest.raises(UserError, match=r"killed\.jsonl, line 1: answers another prompt"):
        sampled(home, **values, out=str(out))
    assert out.read_text() == "not ours\n"


TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """A tiny model with a chat template."""
    folder = tiny.folder(tmp_path_factory.mktemp("talker"), seed=2)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def greedy_answer(folder: Path, messages: list[dict], new: int) -> str:
    """The greedy answer to a conversation."""
    tokenizer, model = Tokenizer.open(folder), tiny.ours(tiny.peer(seed=2))
    ids = ChatTemplate.from_folder(folder, tokenizer).encode(messages, add_generation_prompt=True)
    answer = continuation(model, tokenizer, ids, SamplingParams(new, 0))
    return tokenizer.decode(ids + answer)[len(tokenizer.decode(ids)):]


def talk(monkeypatch, folder: Path, lines: list[str], **values) -> None:
    """A conversation with these lines typed."""
    typed = io.TextIOWrapper(io.BytesIO("".join(x + "\n" for x in lines).encode()))
    monkeypatch.setattr(sys, "stdin", typed)
    sampled(folder, model=str(folder), chat=True, temperature=0.0, **values)


def test_a_conversation_continues_is_saved_and_is_reset(talker, monkeypatch, capsys, tmp_path):
    file = tmp_path / "talk.jsonl"
    talk(monkeypatch, talker, ["Muraho", "", "Amakuru?", f"/save {file}", "/save", "/sav x",
                               "/reset", "Muraho", "/quit", "never read"])
    first = greedy_answer(talker, [{"role": "user", "content": "Muraho"}], 12)
    messages = [{"role": "user", "content": "Muraho"},
                {"role": "assistant", "content": first.strip()},
                {"role": "user", "content": "Amakuru?"}]
    second = greedy_answer(talker, messages, 12)
    shown = capsys.readouterr()
    assert shown.out == f"{first}\n{second}\n{first}\n"
    messages.append({"role": "assistant", "content": second.strip()})
    assert lines_of(file) == [{"messages": messages}]
    assert "/save: name a file" in shown.err and "/sav: unknown command; /reset" in shown.err
    talk(monkeypatch, talker, ["/save /no/such/folder/x"])
    assert "cannot be written" in capsys.readouterr().err


def test_a_conversation_that_outgrows_the_context_loses_its_first_exchange(talker, monkeypatch,
                                                                          capsys):
    talk(monkeypatch, talker, ["Inka zacu zirya ubwatsi"] * 5, max_new_tokens=24)
    shown = capsys.readouterr()
    assert "outgrows the context; its first messages are left out" in shown.err
    assert "left out at the start" not in shown.err and shown.out.count("\n") >= 5


def test_messages_of_a_file_are_answered_by_the_template(talker):
    conversations = [[{"role": "user", "content": "Muraho"}],
             [{"role": "system", "content": "</s>"}, {"role": "user", "content": "Amakuru?"}]]
    (talker / "asked.jsonl").write_text(
        "".join(json.dumps({"messages": x}) + "\n" for x in conversations))
    sampled(talker, model=str(talker), file=str(talker / "asked.jsonl"), temperature=0.0,
            out=str(talker / "out.jsonl"))
    answers = lines_of(talker / "out.jsonl")
    assert [x["text"] for x in answers] == [greedy_answer(talker, x, 12) for x in conversations]
    assert answers[0]["prompt"] == "<s>[user] Muraho</s>[assistant] "


def test_the_token_that_ends_a_turn_ends_an_answer_even_if_it_is_not_eos(tmp_path):
    folder = bytewise_folder(tmp_path, ["<s>", "</s>", "<end>"])
    text = TEMPLATE.replace("eos_token", "'<end>'")
    (folder / "chat_template.jinja").write_text(text)
    tokenizer = Tokenizer.open(folder)
    prompt_format, end = PromptFormat((folder,), tokenizer), tokenizer.pieces.index("<end>")
    answerer = sample.Answerer(sample.Settings(), folder, None, prompt_format, {1}, None)
    assert answerer.stopping_criteria(True, prompt_format).ids == {1, end}
    assert answerer.stopping_criteria(False, prompt_format).ids == {1}


def test_a_base_model_without_a_template_is_prompted_by_ours(home, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Muraho\n")))
    sampled(home, chat=True, temperature=0.0)
    tokenizer, model = Tokenizer.open(home / "run" / "model"), tiny.ours(tiny.peer())
    ids = ChatTemplate.plain(tokenizer).encode([{"role": "user", "content": "Muraho"}],
                                               add_generation_prompt=True)
    answer = continuation(model, tokenizer, ids, SamplingParams(12, 0))
    assert capsys.readouterr().out == tokenizer.decode(ids + answer)[len(tokenizer.decode(ids)):] \
        + "\n"


def test_a_translation_uses_the_prompt_of_alma_and_ends_with_its_line(home, capsys, monkeypatch):
    lines = ["Our cows eat grass.", "The water is {text} {good}.", ""]
    (home / "eng.txt").write_text("\n".join(lines) + "\n")
    sampled(home, file=str(home / "eng.txt"), translate="eng-kin", beams=3, max_new_tokens=40)
    translations = capsys.readouterr().out.split("\n")
    tokenizer, peer = Tokenizer.open(home / "run" / "model"), tiny.peer()
    for line, text in zip(lines, translations, strict=False):
        prompt = f"Translate this from English to Kinyarwanda:\nEnglish: {line}\nKinyarwanda:"
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        new = peer.generate(torch.tensor([ids]), num_beams=3, do_sample=False, max_new_tokens=40,
                            eos_token_id=tokenizer.eos, pad_token_id=0)[0].tolist()
        text_of_peer = tokenizer.decode(new)[len(tokenizer.decode(ids)):]
        if "\n" not in text_of_peer:
            assert text == (text_of_peer.strip() if line else "")  # a blank line is not translated
    assert len(translations) == 4 and translations[3] == ""  # a line each

    lines = "\ufeffInka\r\n \nAmazi\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))
    sampled(home, translate="kin-eng", json=True)
    rows = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert [x["source"] for x in rows] == ["Inka", " ", "Amazi"]
    assert [bool(x["tokens"]) for x in rows] == [True, False, True]
    assert (rows[1]["text"], rows[1]["end"]) == ("", "eos")
    assert rows[0]["prompt"].endswith("\nKinyarwanda: Inka\nEnglish:")


def test_a_translation_uses_the_prompt_that_training_wrote(talker, tmp_path):
    prompt_json = {"translate": [{"name": "x", "text": "Shyira mu {target}: {text}\n",
                             "languages": {"eng": "Cyongereza", "kin": "Kinyarwanda"}}]}
    tokenizer = Tokenizer.open(talker)
    (talker / "prompt.json").write_text(json.dumps(prompt_json))
    try:
        prompt_format = PromptFormat.load([talker], tokenizer, "kin-eng")
        assert prompt_format.render("Inka\n{source}") == "Shyira mu Cyongereza: Inka {source}\n"
        ids = tokenizer.encode("Shyira mu Cyongereza: a\n")
        assert prompt_format.encode("a") == [tokenizer.bos, *ids]
        spaced = prompt_format.encode(" a\u00a0 b\t\r\nc ")
        assert spaced == prompt_format.encode("a b c"), "as pairs are trained"
        prompt_json["translate"][0]["as_chat"] = True
        (talker / "prompt.json").write_text(json.dumps(prompt_json))
        prompt_format = PromptFormat.load([talker], tokenizer, "kin-eng")
        message = {"role": "user", "content": "Shyira mu Cyongereza: a\n"}
        ids = prompt_format.template.encode([message], add_generation_prompt=True)
        assert prompt_format.encode("a") == ids
        for broken in ("{", "[]", '{"translate": []}', '{"translate": [{"text": "no place"}]}'):
            (talker / "prompt.json").write_text(broken)
            with pytest.raises(UserError, match="expected a translation prompt"):
                PromptFormat.load([talker], tokenizer, "kin-eng")
        (talker / "prompt.json").write_text('{"chat": "a template"}')  # a run of conversations
        assert PromptFormat.load([talker], tokenizer, "kin-eng") == PromptFormat(
            (talker,), tokenizer, "kin-eng")
        assert list(PromptFormat.load_all([talker], tokenizer)) == ["chat", "text"]
    finally:
        (talker / "prompt.json").unlink()


def test_samples_of_a_translation_are_drawn_as_the_recipe_says(home, tmp_path):
    """docs/recipes.md: --translate eng-kin --file eng.jsonl --samples 4 --out samples.jsonl."""
    rows = [{"eng": "Our cows eat grass."}, {"text": "The water is good."}]
    (tmp_path / "eng.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampled(home, file=str(tmp_path / "eng.jsonl"), translate="eng-kin", samples=4,
            out=str(tmp_path / "samples.jsonl"))
    answers = lines_of(tmp_path / "samples.jsonl")
    assert [x["prompt_number"] for x in answers] == [1] * 4 + [2] * 4
    assert len({x["text"] for x in answers}) > 4 and answers[4]["source"] == "The water is good."


@pytest.mark.parametrize(("direction", "names", "prompt"), [
    ("kin-swa", [], "Translate this from Kinyarwanda to Swahili:\nKinyarwanda: Inka\nSwahili:"),
    ("xyz-kin", ["xyz=Xyzish"],
     "Translate this from Xyzish to Kinyarwanda:\nXyzish: Inka\nKinyarwanda:")])
def test_any_two_languages_can_be_asked_for(home, capsys, direction, names, prompt):
    sampled(home, prompt=["Inka"], translate=direction, language_names=names, json=True)
    assert json.loads(capsys.readouterr().out)["prompt"] == prompt


@pytest.mark.parametrize(("direction", "message"), [
    ("english", "--translate english: expected two ISO 639-3 codes, as in eng-kin"),
    ("eng-eng", "--translate eng-eng: expected two"), ("xyz-kin", "--language-names xyz=NAME")])
def test_a_direction_that_is_unknown_is_one_line(home, direction, message):
    with pytest.raises(UserError, match=message) as e:
        sampled(home, prompt=["Inka"], translate=direction)
    assert e.value.code == FLAGS


def test_stdin_that_is_not_utf8_is_one_line(home, monkeypatch):
    piped = io.TextIOWrapper(io.BytesIO("Mwaramutse \xe9\n".encode("latin-1")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", piped)
    with pytest.raises(UserError, match="prompt 1: has bytes that are not UTF-8"):
        sampled(home, translate="kin-eng")


def test_out_of_memory_is_one_line(home, monkeypatch):
    def grow(*_, **__):
        torch.empty(1 << 60)

    monkeypatch.setattr(cpu_linear, "optimize_for_inference", grow)
    with pytest.raises(UserError, match=r"out of memory .*; lower --rows") as e:
        sampled(home, prompt=["Inka"])
    assert e.value.code == FLAGS


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_output_that_is_full_is_one_line(home):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, ROOT / "sample.py", "--model", home / "run", "--device", "cpu",
             "--prompt", "Inka"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == STORAGE
    assert process.stderr == "error: the output: refused by the system (No space left on device)\n"
