"""The demo: `python train.py --mode cpt` with no model named. Offline, on a CPU, in about two
minutes.

It is a toy and says so: a grammar of some 150 stems writes the text, and a model of a million
parameters learns it. But it is the real loop twice: a base is trained on English, then continued on
Kinyarwanda with a third of English, and both languages are measured before and after, as one would
with a real model.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

from checkpoints.huggingface import init_from_config
from languages.kinyarwanda.world import World
from model import ModelConfig
from preparation.text import prepare_text
from runtime import console as log
from tokenization.tokenizer import learn
from training.settings import LORA, PART, Settings

DOCUMENTS, HELD, SENTENCES = 4000, 60, 6  # for each language; held out; in a document
PROMPTS = ["Umwana", "Mu rugo hari", "Abahinzi bashaka", "The teacher will"]
BASE = {"steps": 220, "lr": 3e-3}
NEXT = {"steps": 200, "lr": 4e-4}  # 1e-3 learns faster, and by the seed forgets 2 to 8 %
BOTH = {"seq_len": 128, "rows": 16, "eval_every": 50, "eval_tokens": 6000, "weight_decay": 0.1}

INTRO = """\
This is a demo: its text comes from a grammar of some 150 stems, its model has a million parameters.
It shows the loop, not a language model of Kinyarwanda. Two runs: a tiny base learns English, then
goes on with Kinyarwanda.
"""


def texts(folder: Path, seed: int) -> dict[str, Path]:
    """Write eng.txt, kin.txt and their held-out eng-val.txt, kin-val.txt, a document a line; the
    paths by name.

    The two languages tell different stories, so that neither is learned as the other's translation;
    no held-out document, and no sentence of one, stands in the training text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for side, lang in enumerate(("kin", "eng")):
        world, held = (World(random.Random(f"{seed}/{lang}")),
                       World(random.Random(f"{seed}/{lang}/held")))
        train = [world.document(SENTENCES)[side] for _ in range(DOCUMENTS)]
        seen = {s for text in train for s in text.split(".")}
        fresh = (held.document(SENTENCES)[side] for _ in iter(int, 1))
        kept = []
        for text in fresh:
            new = [s.strip() + "." for s in text.split(".") if s and s not in seen]
            kept += [" ".join(new)] if len(new) > 1 else []
            if len(kept) == HELD:
                break
        for name, lines in ((lang, train), (f"{lang}-val", kept)):
            paths[name] = folder / f"{name}.txt"
            paths[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def run(s: Settings, origins: dict[str, str],
        train: Callable[[Settings, dict[str, str]], int]) -> int:
    """The two runs, by the loop that is handed in; `s` are train.Settings, of which flags win over
    the demo's."""
    out = Path(s.out)
    given = {k for k, origin in origins.items() if origin != "default"}
    if (out / "metrics.jsonl").exists():  # train says what to do about it
        return train(s, origins)
    log.say(INTRO)
    ours = {**BOTH, **NEXT, "prompts": PROMPTS}
    if log.speaking():
        paths = texts(out / "text", s.seed)
        both = "".join(paths[name].read_text(encoding="utf-8") for name in ("eng", "kin"))
        tokenizer = learn(both.splitlines(), 1024, out / "tokenizer")
        shape = ModelConfig(tokenizer.vocab_size, hidden_size=128, intermediate_size=352,
                            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                            head_dim=32, max_position_embeddings=256, tie_word_embeddings=True)
        if not (out / "seed").exists():
            init_from_config(shape, tokenizer, out / "seed", s.seed)
        for name in ("eng", "kin"):
            prepare_text([str(paths[name])], out / "seed", out / "text" / name, unit="line")
    base = dataclasses.replace(
        s, **{k: v for k, v in {**BOTH, **BASE}.items() if k not in given or k in BASE},
        **{k: getattr(Settings(), k) for k in (*LORA, *PART)},
        tune="full", embedding_lr=0.0, model=str(out / "seed"), data=[str(out / "text/eng")],
        val=_val(out), prompts=PROMPTS, out=str(out / "base"), suites=[], stop_if=[])
    if not (out / "base" / "model").exists():
        log.say("1. the base: English only")
        again = (out / "base" / "metrics.jsonl").exists()
        if (
            code := train(dataclasses.replace(base, resume=again), dict.fromkeys(origins, "demo"))
        ) or s.plan:
            return code
    log.say("\n2. continued pretraining: Kinyarwanda, with a third of English")
    goal = dataclasses.replace(
        s, **{k: v for k, v in ours.items() if k not in given}, model=str(out / "base" / "model"),
        data=[f"{out / 'text/kin'}:2", f"{out / 'text/eng'}:1"], val=_val(out))
    code = train(goal, origins)
    if code == 0 and log.speaking() and not s.plan:
        tell(out)
    return code


def _val(out: Path) -> list[str]:
    return [f"{lang}={out / 'text' / f'{lang}-val.txt'}" for lang in ("kin", "eng")]


def tell(out: Path) -> None:
    """What was shown: both languages before and after, continuations, and what to run next."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    looks = [json.loads(x) for x in lines]
    looks = [x["bits_per_byte"] for x in looks if "bits_per_byte" in x]
    print("\nbits per byte    before    after")
    for lang, name in (("kin", "Kinyarwanda"), ("eng", "English")):
        before, after = looks[0][lang], looks[-1][lang]
        print(f"{name:15}{before:8.3f} {after:8.3f}   {after / before - 1:+.1%}")
    first, last = (_samples(out / "samples.txt", i) for i in (0, -1))
    print("\ncontinuations, before and after:")
    for prompt in PROMPTS[:3]:
        print(f"  {prompt} ...\n    before:{first[prompt][:90]}\n    after: {last[prompt][:90]}")
    print(f"""
The model, as transformers opens it: {out}/model     the run on one page: {out}/report.html
Next:
  python sample.py --model {out}/model --prompt "Umugabo" "Abana"
  python eval.py --model {out}/model --text kin={out}/text/kin-val.txt eng={out}/text/eng-val.txt
  python train.py --mode cpt --model YOUR_LLAMA --data KIN.txt:3 ENG.txt:1 --out out/kin --plan""")


def _samples(path: Path, which: int) -> dict[str, str]:
    """The continuations of one evaluation, by prompt."""
    block = path.read_text(encoding="utf-8").split("== step ")[1:][which]
    pairs = (x.split("\n", 1) for x in block.split("\n-- ")[1:])
    return {prompt: text.replace("\n", " ") for prompt, text in pairs}
