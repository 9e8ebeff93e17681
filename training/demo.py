"""The demo: `python train.py --mode cpt` with no model named. Offline, on a CPU, in about two
minutes.

A language writes its own text (`Language.demo`), and a model of a million parameters learns it by
the real loop, twice: a base is trained on English, then continued on the language with a third of
English. Both are measured before and after.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

from checkpoints.huggingface import init_from_config
from languages.language import DEFAULT_LANGUAGE, Demo, language_of
from model import ModelConfig
from preparation.text import prepare_text
from runtime import console
from tokenization.tokenizer import learn
from training.settings import LORA, PART, Settings

LANGUAGE = language_of(DEFAULT_LANGUAGE)
DOCUMENTS, HELD_OUT, SENTENCES = 4000, 60, 6  # for each language; held out; in a document
BASE = {"steps": 220, "lr": 3e-3}
CONTINUED = {"steps": 200, "lr": 4e-4}  # 1e-3 learns faster, but forgets 2 to 8 %, by the seed
BOTH = {"seq_len": 128, "rows": 16, "eval_every": 50, "eval_tokens": 6000, "weight_decay": 0.1}


def demo_text() -> Demo:
    assert LANGUAGE.demo, "the default language has a demo"
    return LANGUAGE.demo


def demo_codes() -> tuple[str, str]:
    """The codes of the language and of the language of its translations."""
    return LANGUAGE.code, demo_text().other


def write_texts(folder: Path, seed: int, documents: int = DOCUMENTS,
                held_out: int = HELD_OUT) -> dict[str, Path]:
    """Write CODE.txt and CODE-val.txt for both languages, one document a line; paths by name.

    The two languages tell different stories, so that one is not learned as a translation of the
    other. No held-out sentence occurs in the training text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = demo_text().document
    paths = {}
    for side, code in enumerate(demo_codes()):
        rng = random.Random(f"{seed}/{code}")
        training = [document(rng, SENTENCES)[side] for _ in range(documents)]
        known = {sentence for text in training for sentence in text.split(".")}
        held_rng = random.Random(f"{seed}/{code}/held")
        held: list[str] = []
        while len(held) < held_out:
            text = document(held_rng, SENTENCES)[side]
            new = [x.strip() + "." for x in text.split(".") if x and x not in known]
            if len(new) > 1:
                held.append(" ".join(new))
        for name, lines in ((code, training), (f"{code}-val", held)):
            paths[name] = folder / f"{name}.txt"
            paths[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def run(s: Settings, origins: dict[str, str], train: Callable[[Settings, dict[str, str]], int],
        documents: int = DOCUMENTS) -> int:
    """Run both trainings by the loop that is handed in. A person's flags win over the demo's
    settings."""
    code, other = demo_codes()
    name, other_name = LANGUAGE.english_name, language_of(other).english_name
    prompts = list(demo_text().prompts)
    out = Path(s.out)
    given = {k for k, origin in origins.items() if origin != "default"}
    if (out / "metrics.jsonl").exists():  # train says what to do about it
        return train(s, origins)
    console.info(f"This is a demo: {demo_text().about}, its model has a million parameters.\n"
                f"It shows the loop, not a language model of {name}. Two runs: a tiny base learns "
                f"{other_name}, then\ngoes on with {name}.\n")
    ours = {**BOTH, **CONTINUED, "prompts": prompts}
    if console.is_rank_zero():
        paths = write_texts(out / "text", s.seed, documents)
        both = "".join(paths[x].read_text(encoding="utf-8") for x in (other, code))
        tokenizer = learn(both.splitlines(), 1024, out / "tokenizer")
        shape = ModelConfig(tokenizer.vocab_size, hidden_size=128, intermediate_size=352,
                            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                            head_dim=32, max_position_embeddings=256, tie_word_embeddings=True)
        if not (out / "seed").exists():
            init_from_config(shape, tokenizer, out / "seed", s.seed)
        for x in (other, code):
            prepare_text([str(paths[x])], out / "seed", out / "text" / x, unit="line")
    base = dataclasses.replace(
        s, **{k: v for k, v in {**BOTH, **BASE}.items() if k not in given or k in BASE},
        **{k: getattr(Settings(), k) for k in (*LORA, *PART)},
        tune="full", embedding_lr=0.0, model=str(out / "seed"), data=[str(out / "text" / other)],
        val=_val(out), prompts=prompts, out=str(out / "base"), suites=[], stop_if=[])
    if not (out / "base" / "model").exists():
        console.info(f"1. the base: {other_name} only")
        base = dataclasses.replace(base, resume=(out / "base" / "metrics.jsonl").exists())
        exit_code = train(base, dict.fromkeys(origins, "demo"))
        if exit_code or s.plan:
            return exit_code
    console.info(f"\n2. continued pretraining: {name}, with a third of {other_name}")
    goal = dataclasses.replace(
        s, **{k: v for k, v in ours.items() if k not in given}, model=str(out / "base" / "model"),
        data=[f"{out / 'text' / code}:2", f"{out / 'text' / other}:1"], val=_val(out))
    exit_code = train(goal, origins)
    if exit_code == 0 and console.is_rank_zero() and not s.plan:
        print_result(out)
    return exit_code


def _val(out: Path) -> list[str]:
    return [f"{lang}={out / 'text' / f'{lang}-val.txt'}" for lang in demo_codes()]


def print_result(out: Path) -> None:
    """Print both languages before and after, continuations, and the next commands."""
    code, other = demo_codes()
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    bits_per_byte = [x["bits_per_byte"] for x in metrics if "bits_per_byte" in x]
    print("\nbits per byte    before    after")
    for x in (code, other):
        first, last = bits_per_byte[0][x], bits_per_byte[-1][x]
        print(f"{language_of(x).english_name:15}{first:8.3f} {last:8.3f}   {last / first - 1:+.1%}")
    before, after = (_samples(out / "samples.txt", i) for i in (0, -1))
    print("\ncontinuations, before and after:")
    for prompt in demo_text().prompts[:3]:
        print(f"  {prompt} ...\n    before:{before[prompt][:90]}\n"
              f"    after: {after[prompt][:90]}")
    prompt = demo_text().prompts[0]
    print(f"""
The model, as transformers opens it: {out}/model     the run on one page: {out}/report.html
Next:
  python sample.py --model {out}/model --prompt "{prompt}"
  python eval.py --model {out}/model --text {' '.join(_val(out))}
  python train.py --mode cpt --model MODEL --data {code}.txt:3 {other}.txt:1 --out out/{code} --plan
""".rstrip())


def _samples(path: Path, which: int) -> dict[str, str]:
    """The continuations of one evaluation, by prompt."""
    evaluation = path.read_text(encoding="utf-8").split("== step ")[1:][which]
    pairs = (x.split("\n", 1) for x in evaluation.split("\n-- ")[1:])
    return {prompt: text.replace("\n", " ") for prompt, text in pairs}
