"""Multiple choice here beside lm-evaluation-harness's hf backend, on one model and the same items.

    python -m bench.evaluate [--quick] [--cases sib200 afrixnli injongo belebele] [--write]

A random LLaMA with Llama 2's real tokenizer, float32, on a CPU; real items, with the prompt that
both sides have to the letter. What is timed is scoring alone: from texts to the log-likelihood of
each choice, tokenizing included; loading, metrics and files are not. The harness is run at several
batch sizes (by --quick at 8 alone), and ratios are against its best. (Its batch_size=auto is for
GPUs: on a CPU it tries 512 whole contexts at once.) Both sides must be right as often, and their
log-likelihoods be equal.

`belebele` is Belebele's first prompt over made-up questions: passages, questions and answers are
sentences of FLORES, as its file is not at hand; a passage has two questions, as most of Belebele's
do (900 about 488). There every choice is one letter, so that the harness too reads a prompt once:
the case with the least to gain.

What could make a difference: the harness reads a prompt once for each choice of several tokens, and
takes the softmax of every position over the whole vocabulary; here a prompt, and what the next one
begins with too, is read once, and only what is asked about gets logits. Items are the first of a
suite, in its order, in which questions about one text are neighbours.
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
APART = 1e-4  # of a log-likelihood, relative, at most


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
    words = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
             "unk_token": "<unk>"}
    Path(folder, "tokenizer_config.json").write_text(json.dumps(words))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    Path(folder, "tokenizer.model").unlink()  # transformers 5 reads a blank at its start otherwise


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
    """Rows in Belebele's columns, fourteen sentences of FLORES for two: a passage of four, and of
    others the first words, twelve as a question and four as an answer each."""
    lines = (SHARED / "eval/flores200/devtest.kin.txt").read_text(encoding="utf-8").splitlines()

    def some(line: str, n: int) -> str:
        return " ".join(line.split()[:n])

    return [{"flores_passage": " ".join(x[:4]), "question": some(x[at], 12),
             "correct_answer_num": "1",
             **{f"mc_answer{k}": some(x[at + k], 4) for k in range(1, 5)}}
            for x in (lines[i : i + 14] for i in range(0, len(lines) - 13, 14)) for at in (4, 9)]


def ours(name: str, size: str, folder: str) -> dict[str, Any]:
    """Seconds, and each item's log-likelihoods, as eval.py finds them."""
    from checkpoints.huggingface import load_model
    from evaluation.eval_model import EvalModel
    from inference.cpu_linear import optimize_for_inference

    suite = suite_of(name, size)
    model, tokenizer = load_model(folder)
    optimize_for_inference(model.eval(), keep_head_weight=True)
    items = suite.items(suite.prompts[0])
    task, eval_model = suite.task(suite.prompts[0]), EvalModel(model, tokenizer)
    task.records(eval_model, items[:1])  # every thread has begun
    begun = time.perf_counter()
    found = task.records(eval_model, items)
    return {"seconds": time.perf_counter() - begun, "logp": [x["logp"] for x in found],
            "gold": [x["gold"] for x in found]}


def theirs(name: str, size: str, folder: str, batch: int) -> dict[str, Any]:
    """The same by the harness: its own task, with its data replaced by our rows."""
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
        took, score = [], lm.loglikelihood

        def timed(*args: Any, **more: Any) -> Any:
            begun = time.perf_counter()
            found = score(*args, **more)
            took.append(time.perf_counter() - begun)
            return found

        lm._model_call(torch.ones(1, 64, dtype=int))  # every thread has begun
        lm.loglikelihood = timed
        out = lm_eval.simple_evaluate(model=lm, tasks=["ours"], bootstrap_iters=0,
                                      task_manager=TaskManager(include_path=home))
    samples = sorted(out["samples"]["ours"], key=lambda x: x["doc_id"])
    return {"seconds": sum(took), "acc": out["results"]["ours"]["acc,none"],
            "logp": [[float(r[0][0]) for r in x["resps"]] for x in samples]}


def apart(one: list[list[float]], two: list[list[float]]) -> float:
    """The largest relative difference of two sides' log-likelihoods."""
    return max(abs(a - b) / abs(b) for x, y in zip(one, two, strict=True)
               for a, b in zip(x, y, strict=True))


def accuracy(run: dict[str, Any]) -> float:
    """The share of items whose likeliest choice is the right one."""
    best = [max(range(len(x)), key=x.__getitem__) for x in run["logp"]]
    return sum(a == b for a, b in zip(best, run["gold"], strict=True)) / len(best)


def job(s: Settings) -> str:
    missing = [x for x in (SHARED / "eval", TOKENIZER) if not x.exists()]
    if missing or not installed("transformers"):
        print(f"{HERE}: skipped, {missing[0] if missing else 'transformers'} is not there",
              file=sys.stderr)
        sys.exit(0)
    batches = BATCHES[s.size] if installed("lm_eval") else ()
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        child(HERE, "draw", s.size, folder)
        for name in s.cases or (QUICK if s.size == "quick" else CASES):
            sides = {"ours": ("ours", [name, s.size, folder])}
            sides |= {f"lm-eval, batch {n}": ("theirs", [name, s.size, folder, n])
                      for n in batches}
            runs = in_turn(HERE, s.rounds, sides)
            took = {side: [x["seconds"] for x in done] for side, done in runs.items()}
            first = runs["ours"][0]
            for side, done in runs.items():
                if side == "ours":
                    continue
                for run in done:
                    worst = max(worst, gap := apart(first["logp"], run["logp"]))
                    if gap > APART or abs(run["acc"] - accuracy(first)) > 1e-9:
                        s.faults.append(f"{name}, {side}: log-likelihoods {gap:.1e} apart, "
                                        f"accuracy {run['acc']} beside {accuracy(first)}")
            spread = {side: Spread.of(x) for side, x in took.items()}
            best = min((x for x in took if x != "ours"), key=lambda x: spread[x].median,
                       default=None)
            for side, done in runs.items():
                x, N = spread[side], len(first["logp"])
                times = ratio(took[best], took[side]) if best else "-"
                rows.append([f"{name}: {N} items of {len(first['logp'][0])} choices", side,
                             f"{x.median:.2f}", f"{x.least:.2f} to {x.most:.2f}",
                             f"{N / x.median:.1f}", times, f"{max(r['gb'] for r in done):.2f}"])
    return (table(["suite", "", "seconds", "range", "items/s", "times lm-eval's best", "peak GB"],
                  rows)
            + f"\n\nThe same accuracy everywhere; log-likelihoods at most {worst:.1e} apart "
            "(relative).\n\n" + limits.words(limits.measured(s.size), "transformers", "lm_eval"))


if __name__ == "__main__":
    sys.exit(main(HERE, "Multiple choice", {"draw": draw, "ours": ours, "theirs": theirs}, job,
                  list(CASES), rounds=2))
