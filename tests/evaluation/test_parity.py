"""Parity with lm-evaluation-harness 0.4.13: the text and ids of every request, likelihoods, answers
and metrics, for two kinds of tokenizer.

goldens/lm_eval_goldens.py computed the expected values; a slow test computes them again if lm_eval
is installed. Seven deliberate mistakes are each noticed by the comparison.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluating
from checkpoints.huggingface import load_model
from evaluation import eval_model, metrics
from evaluation.eval_model import EvalModel
from evaluation.suites import load_suite
from evaluation.tasks import DocumentLikelihood, MultipleChoice
from goldens import lm_eval_goldens as goldens
from goldens.lm_eval_goldens import KINDS, TASKS
from helpers import tiny
from tokenization.chat_template import ChatTemplate
from tokenization.tokenizer import Tokenizer

GOLDEN = json.loads(goldens.FILE.read_text(encoding="utf-8"))
CASES = [*((key, 0) for key in TASKS), *((key, goldens.SHOTS) for key in goldens.WITH_SHOTS)]
NAMES = {"acc,none": "acc", "acc_norm,none": "acc_norm", "acc_bytes,none": "acc_bytes",
         "f1,none": "f1", "bleu,none": "BLEU", "chrf,none": "chrF2",
         "exact_match,none": "exact_match", "exact_match,remove_whitespace": "exact_match",
         "exact_match,flexible-extract": "exact_match, last number", "f1,remove_whitespace": "f1"}
FILES = {"belebele": "belebele/kin_Latn.jsonl", "afrixnli": "afrixnli/{}.jsonl",
         "sib200": "sib200/{}.jsonl", "afrimmlu": "afrimmlu/{}.jsonl",
         "afrisenti": "afrisenti_kin/{}.tsv", "injongo": "injongo_intent/kin.{}.jsonl",
         "piqa-nonparallel": "global_piqa/nonparallel/kin_latn.jsonl",
         "piqa-parallel": "global_piqa/parallel/kin_latn.jsonl", "afrimgsm": "afrimgsm/{}.jsonl",
         "afriqa": "afriqa_kin/gold_passages.{}.jsonl", "ntrex": "ntrex/{}.jsonl",
         "mafand": "mafand/{}.jsonl"}
SPLITS = {"injongo": ("test", "dev"), "piqa-parallel": ("test",),
          "piqa-nonparallel": ("test",)} | goldens.SPLITS


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The artificial rows, in the files that the suites look for."""
    home = tmp_path_factory.mktemp("suites")
    for suite in dict.fromkeys(key[0] for key in TASKS):
        both = dict(zip(SPLITS.get(suite, ("test", "validation")), goldens.rows(suite),
                        strict=False))
        for split, rows in both.items():
            if suite == "flores":
                for side in ("kin_Latn", "eng_Latn"):
                    file = home / "flores200_dataset" / split / f"{side}.{split}"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_text("".join(r[f"sentence_{side}"] + "\n" for r in rows))
                continue
            file = home / FILES[suite].format(split)
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(r) for r in rows]
            if file.suffix == ".tsv":
                lines = ["\t".join(x) for x in (rows[0], *(r.values() for r in rows))]
            file.write_text("".join(x + "\n" for x in lines))
    return home


@pytest.fixture(scope="session")
def homes(tmp_path_factory) -> dict[str, Path]:
    """The models' folders, by kind of tokenizer."""
    home = tmp_path_factory.mktemp("models")
    return {kind: goldens.model(home / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def models(homes):
    """The models, by kind of tokenizer."""
    return {kind: load_model(str(folder), torch.device("cpu"), torch.float32)
            for kind, folder in homes.items()}


def task_and_items(key, shots, data):
    """The task of a suite's prompt, with as few new tokens as the goldens, and its items."""
    suite = load_suite(key[0], str(data))
    prompt = next(p for p in suite.prompts if (p.name, p.part) == key[1:])
    return suite.task(prompt, goldens.NEW), suite.items(prompt, shots)


@pytest.mark.parametrize(("key", "shots"), CASES, ids=lambda x: str(x))
def test_texts_are_those_of_the_harness(key, shots, data):
    task, items = task_and_items(key, shots, data)
    golden = GOLDEN["tasks"][goldens.name(key, shots)]["texts"]
    assert [x.context for x in items] == [x["context"] for x in golden]
    if isinstance(task, MultipleChoice):
        requests = [task.requests(x, x.context, task.suite.delimiter) for x in items]
        assert [[request.text for request in x] for x in requests] == \
            [x["continuations"] for x in golden]


def compare(key, shots, kind, data, models, template=None) -> None:
    """Ids, likelihoods to 1e-5 with the same best choice, answers, and metrics of one task."""
    model = EvalModel(*models[kind], goldens.CONTEXT, chat_template=template)
    task, items = task_and_items(key, shots, data)
    golden = (GOLDEN["chat"][kind] if template else GOLDEN["tasks"])[goldens.name(key, shots)]
    contexts = model.contexts(items)
    assert contexts == [x["context"] for x in golden["texts"]]
    golden = golden[kind]
    records = task.records(model, items)
    if isinstance(task, MultipleChoice):
        delimiter = model.delimiter(task.suite.delimiter)
        requests = [task.requests(*x, delimiter) for x in zip(items, contexts, strict=True)]
        ids = [[goldens.digest(eval_model.encode_pair(model.tokenizer, x.context, x.text))
                for x in item] for item in requests]
        assert ids == golden["ids"]
        for record, theirs in zip(records, golden["resps"], strict=True):
            np.testing.assert_allclose(record["logp"], theirs, rtol=1e-5)
            assert np.argmax(record["logp"]) == np.argmax(theirs)
    else:
        ids = [goldens.digest(eval_model.encode_context(model.tokenizer, x)) for x in contexts]
        assert ids == golden["ids"]
        assert [x.get("answer", x.get("hypothesis")) for x in records] == golden["resps"]
    ours = {m.name: m.value for m in task.metrics(records)}
    compared = {NAMES[k]: v for k, v in golden["metrics"].items() if k in NAMES}
    assert compared and all(name in ours for name in compared if name != "acc_norm")
    for name, value in compared.items():
        if name in ours:  # Belebele's acc_norm is its acc: all choices are one letter
            assert ours[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("key", "shots"), CASES, ids=lambda x: str(x))
def test_ids_likelihoods_answers_and_metrics_are_those_of_the_harness(key, shots, kind, data,
                                                                      models):
    compare(key, shots, kind, data, models)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("key", "shots"), [(key, shots) for shots in (0, goldens.SHOTS) for key in
                                            goldens.IN_CHAT if not shots or
                                            key in goldens.WITH_SHOTS], ids=lambda x: str(x))
def test_conversations_are_those_of_the_harness_with_apply_chat_template(key, shots, kind, data,
                                                                        models, homes):
    template = ChatTemplate.from_folder(homes[kind], models[kind][1])
    compare(key, shots, kind, data, models, template)


def bits(kind, models) -> tuple[np.ndarray, float]:
    model = EvalModel(*models[kind], goldens.CONTEXT)
    documents = goldens.texts()
    ids = model.tokenizer.encode_batch(documents)
    assert max(map(len, ids)) > goldens.CONTEXT
    nats = model.rolling_nats(ids)
    task = DocumentLikelihood()
    records = [task.record(x, len(y.encode())) for x, y in zip(nats, documents, strict=True)]
    return nats, task.metrics(records)[0].value


def compare_texts(kind, models) -> None:
    nats, value = bits(kind, models)
    np.testing.assert_allclose(nats, GOLDEN["texts"][kind]["nats"], rtol=1e-5)
    assert value == pytest.approx(GOLDEN["texts"][kind]["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_rolling_bits_per_byte_are_those_of_the_harness(kind, models):
    compare_texts(kind, models)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "key", "rel"), [("fp32", "texts_as_it_comes", 1e-6),
                                                   ("bf16", "texts_bf16", 5e-3)])
def test_lm_eval_compat_scores_bos_as_the_harness_does_by_default(kind, dtype, key, rel, tmp_path):
    """Through eval.py. In bf16 our products round otherwise than transformers', in some digit."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": x}) + "\n" for x in goldens.texts()))
    evaluating.main(evaluating.Settings(
        model=str(goldens.model(tmp_path / "model", kind)), text=[f"a={file}"], dtype=dtype,
        lm_eval_compat=True, device="cpu", overlap=False, out=str(tmp_path / "out")))
    result = json.loads((tmp_path / "out/results.json").read_text())["results"][0]
    golden = GOLDEN[key][kind]
    assert result["value"] == pytest.approx(golden["bits_per_byte"], rel=rel)
    assert golden["bits_per_byte"] > GOLDEN["texts"][kind]["bits_per_byte"] * 1.001
    lines = (tmp_path / "out/items/text.a.jsonl").read_text().splitlines()
    nats = [json.loads(x)["nats"] for x in lines]
    np.testing.assert_allclose(nats, golden["nats"], rtol=10 * rel)
    assert result["signature"].count(f"dtype:{dtype}|sum:{dtype}|compat:lm-eval,0.4.13") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_compat_rounds_log_p_to_the_compute_dtype(kind, data, tmp_path):
    """As the harness's formula does with the same logits, exactly; and beside its own in bf16."""
    model, tokenizer = load_model(str(goldens.model(tmp_path, kind)), dtype=torch.bfloat16)
    model.eval()
    rounded = EvalModel(model, tokenizer, goldens.CONTEXT, lm_eval_compat=True)
    assert rounded.logprob_dtype == torch.bfloat16
    for key in goldens.IN_BF16:
        task, items = task_and_items(key, 0, data)
        records = task.records(rounded, items)
        golden = GOLDEN["bf16"][kind][goldens.name(key, 0)]
        for x, theirs in zip(records, golden, strict=True):
            assert x["logp"] == torch.tensor(x["logp"]).bfloat16().tolist()
            np.testing.assert_allclose(x["logp"], theirs, rtol=0.02)
        request = task.requests(items[0], items[0].context, task.suite.delimiter)[0]
        context_ids, ids = eval_model.encode_pair(tokenizer, request.context, request.text)
        with torch.inference_mode():
            logits = tiny.logits(model, torch.tensor([context_ids + ids]))[0].bfloat16()
        logp = logits[len(context_ids) - 1 : -1].log_softmax(-1)
        logp = logp.gather(1, torch.tensor(ids)[:, None])
        [alone] = rounded.loglikelihood([request])
        assert alone == float(logp.sum())


@pytest.fixture(scope="session")
def pieces(tmp_path_factory) -> Path:
    """A tokenizer.model that adds a space before every text."""
    global PIECES
    PIECES = tmp_path_factory.mktemp("pieces")
    tiny.write_tokenizer(PIECES)
    return PIECES


def compare_boundary(pieces: Path) -> None:
    """A continuation is the rest of one text, as sentencepiece itself encodes it."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "tokenizer.model"))
    context_ids, ids = eval_model.encode_pair(Tokenizer.open(pieces), "Inka za", "cu zirya ubwatsi")
    assert context_ids == [1, *sp.encode("Inka za")]
    assert ids == [1, *sp.encode("Inka zacu zirya ubwatsi")][len(context_ids) :]


def compare_norm(pieces: Path) -> None:
    """acc_norm divides by characters, acc_bytes by bytes, of the choice without its blank."""
    records = [{"gold": 0, "logp": [-12.0, -4.0], "choices": ["ubwatsi ku", "zxq"]},
               {"gold": 1, "logp": [-4.0, -12.0], "choices": ["zxq", "ikirere \u2600\ufe0f"]}]
    suite = load_suite("agreement")
    suite.metrics = ["acc", "acc_norm", "acc_bytes"]
    task = suite.task(suite.prompts[0])
    correct = {m.name: m.counts[:, 0].tolist() for m in task.metrics(records)}
    assert correct == {"acc": [0.0, 0.0], "acc_norm": [1.0, 1.0], "acc_bytes": [1.0, 1.0]}


@pytest.mark.parametrize("check", [compare_boundary, compare_norm])
def test_the_boundary_of_a_continuation_and_the_lengths_of_choices(check, pieces):
    check(pieces)


PAIR, CONTEXT, SCORE = eval_model.encode_pair, eval_model.encode_context, eval_model.score
METRICS, PIECES = MultipleChoice.metrics, Path()


def strip_the_prompt(patch):
    patch(eval_model, "encode_pair", lambda t, context, cont: PAIR(t, context.rstrip(), cont))


def encode_the_choice_alone(patch):
    def pair(t, context, cont):
        if not context:
            return [eval_model.start_token(t)], t.encode(cont)
        bare = context.rstrip()
        return eval_model.encode_context(t, bare), t.encode(context[len(bare) :] + cont)
    patch(eval_model, "encode_pair", pair)


def drop_bos(patch):
    patch(eval_model, "encode_context", lambda t, text: t.encode(text))


def bos_twice(patch):
    patch(eval_model, "encode_context", lambda t, text: [t.bos, *CONTEXT(t, text)])


def mean_of_documents(patch):
    patch(metrics, "bits_per_byte_of", lambda nats, n: metrics.mean(
        "bits_per_byte", nats / n / np.log(2)))


def half_precision_softmax(patch):
    def rough(*args):
        nats, greedy = SCORE(*args)
        return nats.bfloat16().double(), greedy
    patch(eval_model, "score", rough)


def divide_by_tokens(patch):
    def metrics_by_tokens(task, records):
        tokenizer = Tokenizer.open(PIECES)
        return METRICS(task, [{**r, "choices": ["x" * len(tokenizer.encode(c))
                                                for c in r["choices"]]} for r in records])
    patch(MultipleChoice, "metrics", metrics_by_tokens)


MUTANTS = [strip_the_prompt, encode_the_choice_alone, drop_bos, bos_twice, mean_of_documents,
           half_precision_softmax, divide_by_tokens]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda f: f.__name__)
def test_each_of_the_seven_mistakes_is_noticed(mutant, data, models, pieces, monkeypatch):
    mutant(monkeypatch.setattr)
    for kind in KINDS:
        for check, args in ((compare_boundary, (pieces,)), (compare_norm, (pieces,)),
                            (compare_texts, (kind, models)), *(
                (compare, (key, 0, kind, data, models)) for key in
                (("sib200", "1", ""), ("afrixnli", "3", ""), ("piqa-parallel", "cloze", ""),
                 ("flores", "1", "kin-eng")))):
            try:
                check(*args)
            except AssertionError:
                return
    pytest.fail(f"{mutant.__name__} makes no difference")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_the_goldens_are_what_the_harness_gives():
    again = goldens.make()
    assert again["tasks"].keys() == GOLDEN["tasks"].keys()
    for key in ("texts", "texts_as_it_comes", "texts_bf16"):
        for kind in KINDS:
            np.testing.assert_allclose(again[key][kind]["nats"], GOLDEN[key][kind]["nats"],
                                       rtol=1e-5)
    pairs = [(task, GOLDEN["tasks"][name], KINDS) for name, task in again["tasks"].items()]
    pairs += [(task, GOLDEN["chat"][kind][name], (kind,)) for kind in KINDS
              for name, task in again["chat"][kind].items()]
    for task, golden, kinds in pairs:
        assert task["texts"] == golden["texts"]
        for kind in kinds:
            assert task[kind]["ids"] == golden[kind]["ids"]
            assert task[kind]["metrics"] == pytest.approx(golden[kind]["metrics"])
            if isinstance(golden[kind]["resps"][0], str):
                assert task[kind]["resps"] == golden[kind]["resps"]
            else:
                for a, b in zip(task[kind]["resps"], golden[kind]["resps"], strict=True):
                    np.testing.assert_allclose(a, b, rtol=1e-5)
