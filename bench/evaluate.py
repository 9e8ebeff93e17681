"""Multiple choice, compared with lm-evaluation-harness's hf backend on the same model and items.

    python -m bench.evaluate [--quick] [--cases sib200 afrixnli injongo belebele] [--write]

The model is a random LLaMA with Llama 2's tokenizer, float32, on a CPU. Items are real, and both
sides use the same prompt. Only scoring is timed: from texts to the log-likelihood of each choice,
tokenization included; loading, metrics and files are not. The harness runs at several batch sizes
(with --quick only at 8), and ratios are against its best. (Its batch_size=auto is for GPUs: on a
CPU it tries 512 whole contexts at once.) Both sides must have the same accuracy and equal
log-likelihoods.

`belebele` is Belebele's first prompt over artificial questions: passages, questions and answers are
sentences of FLORES, because its file is not available here. A passage has two questions, as most
passages of Belebele (900 questions, 488 passages). Every choice is one letter, so the harness too
reads a prompt once: this is the case with the smallest possible gain.

Reasons for a difference: the harness reads a prompt once for each choice of several tokens, and
computes the softmax over the vocabulary at every position. Here a prompt is read once, a prefix
that several prompts share is read once, and only scored positions get logits. Items are the first
of a suite in its order, in which questions about one text are neighbours.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import ROOT, Settings, Spread, child, in_turn, installed, limits, main, ratio, table

HERE = "bench.evaluate"
SHARED = ROOT.parent / "shared/data"
TOKENIZER = SHARED / "tokenizers/llama2"
SHAPES = {  # hidden_size, intermediate_size, layers, heads, kv heads
    "110M": (768, 2048, 12, 12, 4), "25M": (256, 1024, 8, 8, 4), "tiny": (64, 128, 2, 4, 2)}
CASES = {  # suite: its task in the harness, and items in full, quick and tiny
    "sib200": ("afrobench/sib/prompt_1/sib_kin.yaml", (68, 34, 4)),
    "afrixnli": ("afrixnli/direct/prompt_1/afrixnli_kin.yaml", (60, 30, 4)),
    "injongo": ("afrobench/injongointent/prompt_1/injongointent_kin.yaml", (6, 4, 1)),
    "belebele": ("afrobench/belebele/prompt_1/belebele_kin.yaml", (60, 12, 4))}
SIZES = ("full", "quick", "tiny")
BATCHES = {"full": (1, 8, 32), "quick": (8,), "tiny": (8,)}
QUICK = ["sib200", "belebele"]
TOLERANCE = 1e-4  # relative, of a log-likelihood


def draw(size: str, folder: str) -> None:
    """Write a random model and its tokenizer, as both sides read it."""
    import shutil

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    C, M, L, H, K = SHAPES[{"full": "110M", "quick": "25M", "tiny": "tiny"}[size]]
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=32000, hidden_size=C, intermediate_size=M, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=2048, initializer_range=0.1)).save_pretrained(folder)
    shutil.copy(TOKENIZER / "tokenizer.model", folder)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>"}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    Path(folder, "tokenizer.model").unlink()  # transformers 5 reads a leading space differently


def suite_of(name: str, size: str) -> Any:
    """A suite's first items, with its first prompt."""
    from evaluation.suites import load_suite

    if name == "belebele":
        with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
            file.write("".join(json.dumps(x) + "\n" for x in questions()))
            file.flush()
            suite = load_suite(f"{name}={file.name}")
    else:
        suite = load_suite(name, str(SHARED / "eval"))
    suite.rows = suite.rows[: CASES[name][1][SIZES.index(size)]]
    suite.prompts = suite.prompts[:1]
    return suite


def questions() -> list[dict[str, str]]:
    """Return rows in Belebele's columns. Fourteen sentences of FLORES make two rows: the first four
    are the passage; the first words of five others are a question and its four answers."""
    lines = (SHARED / "eval/flores200/devtest.kin.txt").read_text(encoding="utf-8").splitlines()

    def first_words(line: str, n: int) -> str:
        return " ".join(line.split()[:n])

    rows = []
    for start in range(0, len(lines) - 13, 14):
        passage, *others = " ".join(lines[start : start + 4]), *lines[start + 4 : start + 14]
        for question, *answers in (others[:5], others[5:]):
            row = {"flores_passage": passage, "question": first_words(question, 12),
                   "correct_answer_num": "1"}
            for k, answer in enumerate(answers, 1):
                row[f"mc_answer{k}"] = first_words(answer, 4)
            rows.append(row)
    return rows


def ours(name: str, size: str, folder: str) -> dict[str, Any]:
    """Return seconds, and the log-likelihoods of each item, as eval.py computes them."""
    from checkpoints.huggingface import load_model
    from evaluation.eval_model import EvalModel
    from inference.cpu_linear import optimize_for_inference

    suite = suite_of(name, size)
    model, tokenizer = load_model(folder)
    optimize_for_inference(model.eval(), keep_head_weight=True)
    items = suite.items(suite.prompts[0])
    task, eval_model = suite.task(suite.prompts[0]), EvalModel(model, tokenizer)
    task.records(eval_model, items[:1])  # warm-up: starts all threads
    start = time.perf_counter()
    records = task.records(eval_model, items)
    return {"seconds": time.perf_counter() - start, "logp": [x["logp"] for x in records],
            "gold": [x["gold"] for x in records]}


def theirs(name: str, size: str, folder: str, batch: int) -> dict[str, Any]:
    """Return the same from the harness: its own task, with its data replaced by our rows."""
    import lm_eval
    import torch
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    suite = suite_of(name, size)
    with tempfile.TemporaryDirectory() as home:
        rows = Path(home, "rows.jsonl")
        rows.write_text("".join(json.dumps(r) + "\n" for r in suite.rows), encoding="utf-8")
        shipped = Path(lm_eval.__file__).parent / "tasks" / CASES[name][0]
        splits = {"test": str(rows), "validation": str(rows)}
        Path(home, "task.yaml").write_text(yaml.dump({
            "include": str(shipped), "task": "ours", "tag": None, "dataset_path": "json",
            "dataset_name": None, "dataset_kwargs": {"data_files": splits}}))
        lm = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=batch)
        seconds, loglikelihood = [], lm.loglikelihood

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            scores = loglikelihood(*args, **kwargs)
            seconds.append(time.perf_counter() - start)
            return scores

        lm._model_call(torch.ones(1, 64, dtype=int))  # warm-up: starts all threads
        lm.loglikelihood = timed
        out = lm_eval.simple_evaluate(model=lm, tasks=["ours"], bootstrap_iters=0,
                                      task_manager=TaskManager(include_path=home))
    samples = sorted(out["samples"]["ours"], key=lambda x: x["doc_id"])
    return {"seconds": sum(seconds), "acc": out["results"]["ours"]["acc,none"],
            "logp": [[float(r[0][0]) for r in x["resps"]] for x in samples]}


def largest_difference(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Return the largest relative difference between the log-likelihoods of two sides."""
    return max(abs(a - b) / abs(b) for x, y in zip(ours, theirs, strict=True)
               for a, b in zip(x, y, strict=True))


def accuracy(run: dict[str, Any]) -> float:
    """Return the share of items whose likeliest choice is the right one."""
    best = [max(range(len(x)), key=x.__getitem__) for x in run["logp"]]
    return sum(a == b for a, b in zip(best, run["gold"], strict=True)) / len(best)


def job(s: Settings) -> str:
    """Run all cases; return the table and the conditions."""
    missing = [x for x in (SHARED / "eval", TOKENIZER) if not x.exists()]
    if missing or not installed("transformers"):
        print(f"{HERE}: skipped, {missing[0] if missing else 'transformers'} is not there",
              file=sys.stderr)
        sys.exit(0)
    batches = BATCHES[s.size] if installed("lm_eval") else ()
    rows, largest = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        child(HERE, "draw", s.size, folder)
        for name in s.cases or (QUICK if s.size == "quick" else CASES):
            sides = {"ours": ("ours", [name, s.size, folder])}
            for n in batches:
                sides[f"lm-eval, batch {n}"] = ("theirs", [name, s.size, folder, n])
            runs = in_turn(HERE, s.rounds, sides)
            largest = max(largest, compare(s, name, runs))
            rows += table_rows(name, runs)
    return (table(["suite", "", "seconds", "range", "items/s", "times lm-eval's best", "peak GB"],
                  rows)
            + f"\n\nThe same accuracy everywhere; log-likelihoods at most {largest:.1e} apart "
            "(relative).\n\n"
            + limits.description(limits.measured(s.size), "transformers", "lm_eval"))


def compare(s: Settings, name: str, runs: dict[str, list[dict[str, Any]]]) -> float:
    """Record a fault for each run of the harness that differs from ours; return the largest
    relative difference between log-likelihoods."""
    ours, largest = runs["ours"][0], 0.0
    for side, side_runs in runs.items():
        if side == "ours":
            continue
        for run in side_runs:
            gap = largest_difference(ours["logp"], run["logp"])
            largest = max(largest, gap)
            if gap > TOLERANCE or abs(run["acc"] - accuracy(ours)) > 1e-9:
                s.faults.append(f"{name}, {side}: log-likelihoods {gap:.1e} apart, "
                                f"accuracy {run['acc']}, ours {accuracy(ours)}")
    return largest


def table_rows(name: str, runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Return a row of the table for each side."""
    seconds = {side: [run["seconds"] for run in side_runs] for side, side_runs in runs.items()}
    spread = {side: Spread.of(x) for side, x in seconds.items()}
    best = min((x for x in seconds if x != "ours"), key=lambda x: spread[x].median, default=None)
    logp = runs["ours"][0]["logp"]
    rows = []
    for side, side_runs in runs.items():
        x = spread[side]
        times = ratio(seconds[best], seconds[side]) if best else "-"
        rows.append([f"{name}: {len(logp)} items of {len(logp[0])} choices", side,
                     f"{x.median:.2f}", f"{x.low:.2f} to {x.high:.2f}",
                     f"{len(logp) / x.median:.1f}", times,
                     f"{max(run['gb'] for run in side_runs):.2f}"])
    return rows


if __name__ == "__main__":
    sys.exit(main(HERE, "Multiple choice", {"draw": draw, "ours": ours, "theirs": theirs}, job,
                  list(CASES), rounds=2))
