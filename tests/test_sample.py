"""sample.py as it is run: prompts, files that are taken up again, conversations, translations."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ask
import config
import sample
import tiny
from generate import generate
from log import UserError
from sampling import Sampling
from test_eval import bytewise_folder, command
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny model (context 128)."""
    home = tmp_path_factory.mktemp("sample")
    tiny.folder(home / "run" / "model")
    return home


def test_a_wrong_flag_of_sampling_stops_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean prompt"):
        config.read(sample.Settings, ["--promt", "a"], "sample.py")


def sampled(home: Path, **values) -> None:
    """sample.py in this process."""
    usual = {"model": str(home / "run"), "device": "cpu", "dtype": "fp32", "max_new_tokens": 12}
    sample.main(sample.Settings(**{**usual, **values}))


def continued(home: Path, prompt: str, sampling: Sampling) -> str:
    """A prompt with its continuation, decoded at once."""
    tokenizer, model = Tokenizer.open(home / "run" / "model"), tiny.ours(tiny.peer())
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    new = [t for _, t in generate(model, [ids], sampling, {tokenizer.eos})]
    return prompt + tokenizer.decode(ids + new)[len(tokenizer.decode(ids)):]


def test_one_prompt_streams_and_on_a_terminal_nothing_steers_it(home):
    ours, theirs = pty.openpty()
    at = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    flags = ["--model", home / "run", "--prompt", "\x1b[31mInka\x9b2J", "--max-new-tokens", "60",
             "--temperature", "2", "--dtype", "fp32"]
    with subprocess.Popen([sys.executable, ROOT / "sample.py", *flags], stdout=theirs,
                          stderr=subprocess.PIPE, env=at) as running:
        os.close(theirs)
        said = b""
        try:
            while more := os.read(ours, 4096):
                said += more
        except OSError:  # the terminal's other end is closed
            pass
        assert running.wait() == 0, running.stderr.read()
    os.close(ours)
    text = said.decode()
    assert text.startswith("\\x1b[31mInka\\x9b2J") and len(text) > 30
    assert all(c.isprintable() or c in "\r\n\t" for c in text)


def test_prompts_of_a_file_are_answered_in_order_as_alone(home):
    prompts = ["Inka", "", "Amazi y'umugezi", "Inka"]
    (home / "prompts.txt").write_bytes("\ufeffInka\r\n\r\nAmazi y'umugezi\r\nInka\r\n".encode())
    done = command("sample.py", "--model", home / "run/model", "--file", "prompts.txt", "--json",
                   "--seed", "4", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9",
                   "--max-new-tokens", "20", "--dtype", "fp32", "--device", "cpu", cwd=home)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [x["prompt"] for x in found] == prompts
    sampling = Sampling(20, 1.5, 50, 0.9, seed=4)
    for x in found[:3]:
        assert x["prompt"] + x["text"] == continued(home, x["prompt"], sampling)
        assert x["tokens"] == 20 if x["end"] == "length" else x["tokens"] <= 20
    assert found[3]["text"] != found[0]["text"]  # a copy is another draw


def test_several_prompts_are_printed_one_after_another_and_each_as_alone(home, capsys):
    prompts = ["Inka", "Abana babiri", "Umugore"]
    sampled(home, prompt=prompts, temperature=1.2)
    wanted = [continued(home, p, Sampling(12, 1.2, 0, 0.95)) for p in prompts]
    assert capsys.readouterr().out == "".join(
        f"== {i} of 3\n{text}\n" for i, text in enumerate(wanted, 1))
    sampled(home, prompt=prompts[:1], temperature=1.2)
    assert capsys.readouterr().out == wanted[0] + "\n"


def test_a_prompt_beyond_the_context_is_cut_and_that_is_said(home, capsys):
    prompt = "Inka zacu " * 40
    sampled(home, prompt=[prompt], max_new_tokens=100, temperature=0.0)
    said = capsys.readouterr()
    assert "tokens are left out at the start; the context of 128 holds 28" in said.err
    tokenizer, model = Tokenizer.open(home / "run" / "model"), tiny.ours(tiny.peer())
    read = [tokenizer.bos, *tokenizer.encode(prompt)[-27:]]
    new = [t for _, t in generate(model, [read], Sampling(100, 0), {tokenizer.eos})]
    assert said.out == prompt + tokenizer.decode(read + new)[len(tokenizer.decode(read)):] + "\n"


@pytest.mark.parametrize(("values", "words", "code"), [
    ({}, "give one of --prompt", 2), ({"prompt": ["a"], "file": "x"}, "give one of --prompt", 2),
    ({"file": "none.txt"}, "none.txt: cannot be read", 3),
    ({"file": "nil.txt"}, "nil.txt: empty", 3), ({"file": "latin.txt"}, "byte 2 is not UTF-8", 3),
    ({"prompt": ["a"], "model": ""}, "name a model", 2),
    ({"prompt": ["a"], "top_p": 2.0}, "--top-p 2.0", 2),
    ({"prompt": ["a"], "model": "nowhere"}, "nowhere", 3),
    ({"prompt": ["a"], "max_new_tokens": 128}, "leaves no room", 2)])
def test_what_cannot_be_continued_is_one_line(home, monkeypatch, values, words, code):
    monkeypatch.chdir(home)
    (home / "nil.txt").write_text("")
    (home / "latin.txt").write_bytes(b"ca\xe9\n")
    with pytest.raises(UserError) as e:
        sampled(home, **values)
    assert words in str(e.value) and e.value.code == code and "\n" not in str(e.value)


def test_a_model_without_eos_is_said_to_have_none_and_one_without_bos_needs_text(home, capsys):
    neither = bytewise_folder(home / "neither", [])
    (neither / "generation_config.json").unlink()
    sampled(home, model=str(neither), prompt=["Inka"])
    assert "no EOS, so every answer goes on to --max-new-tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="no BOS to begin from"):
        sampled(home, model=str(neither), prompt=[""])


@pytest.fixture(scope="module", params=["sentencepiece", "bytewise"])
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bytewise":
        return Tokenizer.open(bytewise_folder(folder, ["<s>", "</s>"]))
    tiny.write_tokenizer(folder)
    return Tokenizer.open(folder)


MIXED = st.text(st.sampled_from("Inka zi\u0301\u00e9 \u2600\U0001f600\n  '\u4e2d"), max_size=30)


@given(MIXED, MIXED)
@settings(max_examples=150, deadline=None)
def test_pieces_joined_are_the_text_and_none_ends_in_half_a_character(tokenizer, prompt, more):
    ids = tokenizer.encode(prompt)
    tokens = tokenizer.encode(prompt + more)[len(ids):]
    pieces = list(ask.pieces(tokenizer, ids, tokens))
    assert "".join(pieces) == tokenizer.decode(ids + tokens)[len(tokenizer.decode(ids)):]
    assert not any(p.endswith("\ufffd") for p in pieces[:-1])
    assert all(pieces[:-1])  # nothing is printed for nothing


def test_a_character_of_four_bytes_is_shown_when_its_last_byte_comes(tokenizer):
    tokens = tokenizer.encode("a\U0001f600b")
    found = list(ask.pieces(tokenizer, tokenizer.encode("Inka"), tokens))
    assert "\U0001f600" in found and "".join(found).endswith("a\U0001f600b")
    stopped = list(ask.pieces(tokenizer, tokenizer.encode("Inka"), tokens[:-2]))
    assert "".join(stopped).endswith("\ufffd")  # the end came before the character was whole
