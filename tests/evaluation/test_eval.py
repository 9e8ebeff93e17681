"""Bits per byte against the plain rule and transformers; eval.py as it is run."""

import functools
import gzip
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as evaluating
from checkpoints.huggingface import load_model
from evaluation import likelihood, metrics
from evaluation.significance import confidence_interval
from helpers import tiny
from helpers.commands import command
from helpers.tiny import bytewise_folder
from model import Llama
from runtime import flags
from runtime.console import UserError
from tokenization.tokenizer import Tokenizer

CONTEXT, BOS = 16, 1


def interval(nats, n_bytes):
    return confidence_interval([metrics.bits_per_byte_of(nats, n_bytes)])

def rolling(tokens, prefix, length):
    """lm-evaluation-harness's get_rolling_token_windows with a context of one token."""
    if not tokens:
        return
    first = min(length, len(tokens))
    yield [prefix, *tokens[: first - 1]], tokens[:first]
    predicted = first
    while predicted < len(tokens):
        n = min(len(tokens) - predicted, length)
        end = predicted + n
        yield tokens[end - length - 1 : end - 1], tokens[end - n : end]
        predicted += n


@given(st.lists(st.integers(3, 90), max_size=60), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_windows_are_those_of_the_harness(ids, length):
    windows = list(likelihood.windows(ids, BOS, length))
    assert windows == list(rolling(ids, BOS, length))
    assert [t for _, targets in windows for t in targets] == ids  # each token once, in order
    assert all(len(targets) <= len(inputs) <= length for inputs, targets in windows)
    assert all(len(inputs) == length for inputs, _ in windows[1:])  # full left context


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_every_piece_is_packed_once_and_no_row_is_too_full(lengths, width):
    rows = likelihood.pack_rows(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= width
    firsts = [lengths[row[0]] for row in rows]
    assert firsts == sorted(firsts, reverse=True)
    full = [sum(lengths[i] for i in row) for row in rows]
    assert not any(a + b <= width for a in full[:-1] for b in full[-1:] if len(rows) > 1)


@functools.cache
def peer() -> transformers.LlamaForCausalLM:
    """A random model of a short context."""
    return tiny.peer("llama3", max_position_embeddings=CONTEXT)


@functools.cache
def ours() -> Llama:
    """The same weights in our model."""
    return tiny.ours(peer(), "llama3", max_position_embeddings=CONTEXT)


@torch.inference_mode()
def by_hand(model, ids, start, length) -> float:
    """Nats of a document by transformers' logits, window after window."""
    total = 0.0
    for inputs, targets in rolling(ids, start, length):
        logp = model(torch.tensor([inputs])).logits[0].float().log_softmax(-1)
        positions = torch.arange(len(inputs) - len(targets), len(inputs))
        total -= logp[positions, torch.tensor(targets)].double().sum().item()
    return total


def random_documents(lengths, seed=0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, tiny.V, n).tolist() for n in lengths]


@pytest.mark.parametrize(("row_tokens", "batch_tokens"), [(2048, 8192), (40, 100), (8, 20)])
@pytest.mark.parametrize("length", [0, 1, 7])
def test_nats_equal_transformers_however_windows_are_packed(row_tokens, batch_tokens, length):
    documents = random_documents([5, 0, 16, 1, 17, 40, 3, 33, 15, 2, 64, 9])
    progress = []
    nats = likelihood.document_nats(ours(), documents, BOS, length, progress.append,
                                    row_tokens=row_tokens, batch_tokens=batch_tokens)
    expected = [by_hand(peer(), ids, BOS, length or CONTEXT) for ids in documents]
    np.testing.assert_allclose(nats, expected, rtol=1e-5, atol=1e-5)
    assert sum(progress) == sum(map(len, documents)) and nats[1] == 0


def test_bits_per_byte_is_nats_over_bytes_in_bits():
    assert metrics.bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    assert math.isnan(metrics.bits_per_byte(0.0, 0))


def test_no_document_and_an_empty_document_have_zero_nats():
    assert likelihood.document_nats(ours(), [], BOS).shape == (0,)
    assert likelihood.document_nats(ours(), [[], []], BOS).tolist() == [0, 0]


def test_a_documents_nats_do_not_change_with_its_neighbours():
    documents = random_documents([12, 30, 5])
    together = likelihood.document_nats(ours(), documents, BOS)
    alone = [likelihood.document_nats(ours(), [ids], BOS)[0] for ids in documents]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_the_interval_covers_the_true_value_about_95_percent_of_the_time():
    rng = np.random.default_rng(0)
    hit = 0
    for _ in range(60):
        n_bytes = rng.integers(50, 400, 80)
        nats = n_bytes * rng.normal(1.0, 0.2, 80)
        low, high = interval(nats, n_bytes)
        assert low < nats.sum() / n_bytes.sum() / math.log(2) < high
        hit += low <= 1 / math.log(2) <= high
    assert 50 <= hit <= 60


def test_the_interval_is_deterministic_and_of_a_ratio_of_sums():
    nats, n_bytes = np.array([10.0, 400.0]), np.array([10, 200])
    assert interval(nats, n_bytes) == interval(nats, n_bytes)
    # two documents: a resample is one of them twice, or both
    assert interval(nats, n_bytes) == pytest.approx((1 / math.log(2), 2 / math.log(2)))
    assert interval(nats[:1], n_bytes[:1]) is None
    assert interval(np.ones(40), np.full(40, 4)) == pytest.approx([0.25 / math.log(2)] * 2)


TEXTS = ["Inka zacu zirya ubwatsi ku musozi.", "Amazi y'umugezi ni meza!",
         "ikirere \u2600\ufe0f 3 km", "The water of the river is good and cold. " * 12, "a",
         " two  spaces "]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny model (context 128), and texts."""
    home = tmp_path_factory.mktemp("eval")
    tiny.folder(home / "run" / "model")
    lines = [json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(TEXTS)]
    (home / "kin.jsonl").write_text("".join(lines))
    with gzip.open(home / "kin.jsonl.gz", "wt") as f:
        f.write("".join(lines))
    (home / "eng.txt").write_text("".join(t + "\n" for t in tiny.SENTENCES))
    return home


def run_eval(home: Path, **values) -> dict:
    """results.json of an evaluation in this process."""
    values = {"model": str(home / "run"), "device": "cpu", "out": str(home / "out"), **values}
    evaluating.main(evaluating.Settings(**values))
    return json.loads((Path(values["out"]) / "results.json").read_text())


@functools.cache
def reference(folder: Path) -> transformers.LlamaForCausalLM:
    """The model of a folder, opened by transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_eval_prints_and_writes_the_bits_per_byte_that_transformers_gives(home):
    process = command("eval.py", "--model", home / "run", "--text", f"kin={home}/kin.jsonl",
                   f"eng={home}/eng.txt", "--out", home / "written", cwd=home)
    assert process.returncode == 0, process.stderr
    evaluation = json.loads((home / "written" / "results.json").read_text())
    assert list(evaluation) == ["model", "command", "settings", "results", "contamination"]
    assert {p.name for p in (home / "written").iterdir()} == {"results.json", "report.html",
                                                               "items"}

    import sentencepiece
    file = home / "run" / "model" / "tokenizer.model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for result, texts in zip(evaluation["results"], (TEXTS, tiny.SENTENCES), strict=True):
        nats = [by_hand(reference(home / "run" / "model"), pieces.encode(t), 1, 128) for t in texts]
        n_bytes = sum(len(t.encode()) for t in texts)
        assert result["value"] == pytest.approx(sum(nats) / math.log(2) / n_bytes, abs=1e-4)
        assert (result["n"], result["bytes"]) == (len(texts), n_bytes)
        assert result["tokens"] == sum(len(pieces.encode(t)) for t in texts)
        assert result["low"] < result["value"] < result["high"]
        assert not result["partial"]
        name = result["suite"].removeprefix("text:")
        assert any(line.startswith(name) and f"{result['value']:.4f}" in line
                   for line in process.stdout.splitlines())
    assert evaluation["results"][1]["files"] == [{
        "path": f"{home}/eng.txt",
        "sha256": hashlib.sha256((home / "eng.txt").read_bytes()).hexdigest()}]
    assert evaluation["results"][0]["signature"] == (
        "unit:record.text|start:bos|window:128|dtype:fp32|sum:fp64|ci:documents,1000,12345|"
        "version:2")
    assert evaluation["results"][1]["signature"].startswith("unit:line|")


def test_gzip_changes_nothing_and_a_shorter_context_changes_the_result(home):
    plain = run_eval(home, text=[f"a={home}/kin.jsonl"])["results"][0]
    zipped = run_eval(home, text=[f"a={home}/kin.jsonl.gz"])["results"][0]
    assert (zipped["value"], zipped["signature"]) == (plain["value"], plain["signature"])
    short = run_eval(home, text=[f"a={home}/kin.jsonl"], max_length=20)["results"][0]
    assert short["value"] != plain["value"] and "|window:20|" in short["signature"]
    texts = [Tokenizer.open(home / "run" / "model").encode(t) for t in TEXTS]
    nats = sum(by_hand(reference(home / "run" / "model"), ids, 1, 20) for ids in texts)
    assert short["value"] == pytest.approx(nats / math.log(2) / plain["bytes"], abs=1e-4)


def test_the_unit_of_documents_changes_the_result_and_is_in_the_signature(home):
    results = {u: run_eval(home, text=[f"a={home}/eng.txt"], documents=u)["results"][0]
             for u in ("line", "file")}
    assert results["line"]["n"] == 10 and results["file"]["n"] == 1
    assert results["file"]["low"] is None  # one document has no interval
    assert results["line"]["value"] != results["file"]["value"]
    assert all(x["signature"].startswith(f"unit:{u}|") for u, x in results.items())


def test_a_result_with_a_limit_is_marked_partial_everywhere(home, capsys):
    result = run_eval(home, text=[f"a={home}/eng.txt"], limit=3)["results"][0]
    assert result["n"] == 3 and result["partial"] and "|limit:3|" in result["signature"]
    assert "a (PARTIAL)" in capsys.readouterr().out
    result = run_eval(home, text=[f"a={home}/eng.txt"], limit=10)["results"][0]
    assert not result["partial"] and "limit" not in result["signature"]


def test_bf16_is_in_the_signature_and_close_to_fp32(home):
    exact = run_eval(home, text=[f"a={home}/eng.txt"])["results"][0]
    rough = run_eval(home, text=[f"a={home}/eng.txt"], dtype="bf16")["results"][0]
    assert "|dtype:bf16|" in rough["signature"]
    assert rough["value"] != exact["value"]
    assert rough["value"] == pytest.approx(exact["value"], rel=0.02)


def test_nf4_is_measured_with_the_quantised_weights_and_is_in_the_signature(home):
    exact = run_eval(home, text=[f"a={home}/eng.txt"])["results"][0]
    rough = run_eval(home, text=[f"a={home}/eng.txt"], quant="nf4", dtype="fp32")["results"][0]
    assert "|quant:nf4|" in rough["signature"] and "quant" not in exact["signature"]
    model, tokenizer = load_model(home / "run" / "model", quant="nf4")
    ids = tokenizer.encode_batch(tiny.SENTENCES)
    nats = likelihood.document_nats(model.eval(), ids, BOS)
    assert rough["value"] == pytest.approx(nats.sum() / math.log(2) / rough["bytes"], rel=1e-6)
    assert 1e-4 < abs(rough["value"] / exact["value"] - 1) < 0.1


def test_int8_is_measured_with_the_quantised_head_and_is_in_the_signature(home):
    """By transformers' logits with rounded weights."""
    exact = run_eval(home, text=[f"a={home}/eng.txt"])["results"][0]
    narrow = run_eval(home, text=[f"a={home}/eng.txt"], quant="int8")["results"][0]
    assert "|quant:int8|" in narrow["signature"]
    folder = home / "run" / "model"
    tokenizer, peer = Tokenizer.open(folder), tiny.rounded(reference(folder))
    nats = sum(by_hand(peer, tokenizer.encode(x), BOS, 128) for x in tiny.SENTENCES)
    assert narrow["value"] == pytest.approx(nats / math.log(2) / narrow["bytes"], rel=2e-6)
    assert 2e-5 < abs(narrow["value"] / exact["value"] - 1) < 0.02


def test_without_bos_a_document_starts_from_eos_and_without_both_it_is_refused(home):
    with_eos = bytewise_folder(home / "eos", ["</s>"])
    result = run_eval(home, model=str(with_eos), text=[f"a={home}/eng.txt"])["results"][0]
    assert "|start:eos|" in result["signature"]
    tokenizer = Tokenizer.open(with_eos)
    assert (tokenizer.bos, tokenizer.eos) == (None, 0)
    nats = sum(by_hand(reference(with_eos), tokenizer.encode(t), 0, 128) for t in tiny.SENTENCES)
    assert result["value"] == pytest.approx(nats / math.log(2) / result["bytes"], abs=1e-4)

    neither = bytewise_folder(home / "neither", [])
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        run_eval(home, model=str(neither), text=[f"a={home}/eng.txt"])


@pytest.mark.parametrize(("values", "message", "code"), [
    ({"text": []}, "nothing to measure", 2), ({"text": ["kin.jsonl"]}, "expected NAME=FILE", 2),
    ({"text": ["a=eng.txt", "a=kin.jsonl"]}, "name a is taken", 2),
    ({"limit": -1}, "--limit -1", 2),
    ({"text": ["a=none.txt"]}, "none.txt: no such file", 3),
    ({"text": ["a=empty.txt"]}, "no text", 3),
    ({"text": ["a=kin.jsonl"], "text_key": "body"}, "line 1: no text under 'body'", 3),
    ({"text": ["a=bad.txt"]}, "document 2 is undecodable", 3), ({"model": ""}, "name a model", 2),
    ({"max_length": 129}, "expected 1 to 128", 2), ({"max_length": -1}, "expected 1 to 128", 2),
    ({"model": "nowhere"}, "nowhere", 3), ({"out": "eng.txt/x"}, "cannot be written", 5)])
def test_an_error_of_the_user_is_one_line(home, monkeypatch, values, message, code):
    monkeypatch.chdir(home)
    (home / "empty.txt").write_text("\n \n")
    (home / "bad.txt").write_bytes(b"one\nt\xffo\nthree\n")
    with pytest.raises(UserError) as e:
        run_eval(home, **{"text": ["a=eng.txt"], **values})
    assert message in str(e.value) and e.value.code == code and "\n" not in str(e.value)
    assert not list((home / "out").glob("*tmp*"))


@pytest.mark.parametrize("name", ["results.json", "report.html", "items/text.a.jsonl", "long", ""])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(home, name):
    out = home / f"refused-{name[:5]}"
    if name == "":
        out.mkdir()
        (out / "items").write_text("a file")
    elif name != "long":
        (out / name).mkdir(parents=True)
    text = f"{'x' * 300 if name == 'long' else 'a'}={home}/eng.txt"
    with pytest.raises(UserError, match="cannot be written") as e:
        run_eval(home, model="no-model", text=[text], out=str(out))
    assert e.value.code == 5 and not list(out.glob("*tmp*"))


def test_an_unknown_flag_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean limit"):
        flags.read(evaluating.Settings, ["--limt", "3"], "eval.py")
