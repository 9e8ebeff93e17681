"""Answers in, results out: what a model, or another system, said is counted and compared.

A **record** is one item answered, a line of OUT/items/NAME.jsonl, and holds all that its figures
need; so an earlier evaluation is compared from its files alone, and a file of another system's
translations is judged as ours are:

    text        nats, bytes
    choose      gold (an index), logp of each choice, choices
    match       gold, answer, end
    translate   source, reference, hypothesis, end
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation import metrics
from evaluation.metrics import Measure
from evaluation.suites import Prompt
from languages.kinyarwanda import identify, normalise
from runtime.console import FLAGS, UserError, say

VERSION = 2  # of how a figure is computed: one more whenever it would come out otherwise
Record = dict[str, Any]
Result = dict[str, Any]
# of a signature: what must agree
ALIKE = ("version", "suite", "prompt", "shots", "beams", "new", "unit", "compat", "chat")


def measures(kind: str, records: Sequence[Record], wanted: Sequence[str],
             answers: Sequence[dict[str, Any]] = (), part: str = "") -> list[Measure]:
    """The figures of some records, in the order they are reported."""
    if kind == "text":
        return [metrics.of_text(np.array([r["nats"] for r in records]),
                                np.array([r["bytes"] for r in records]))]
    if kind == "choose":
        return _choices(records, wanted)
    if kind == "match":
        return [m for how in answers for m in _matches(records, wanted, how)]
    return _translations(records, wanted, part)


def names(kind: str, wanted: Sequence[str], answers: Sequence[dict[str, Any]] = (),
          part: str = "") -> list[str]:
    """What `measures` will be called, before anything is measured: those of a made-up answer."""
    made = {"gold": 0, "logp": [0.0], "choices": ["a"]} if kind == "choose" else dict.fromkeys(
        ("gold", "answer", "source", "reference", "hypothesis", "end"), "eos")
    return [m.name for m in measures(kind, [made], wanted, answers, part)]


def _choices(records: Sequence[Record], wanted: Sequence[str]) -> list[Measure]:
    gold = [r["gold"] for r in records]
    per = {"acc": lambda c: 1.0, "acc_norm": len, "acc_bytes": lambda c: len(c.encode())}
    said = {name: [int(np.argmax(np.array(r["logp"]) / np.array([max(f(c), 1e-9) for c in
                                                                  r["choices"]])))
                   for r in records] for name, f in per.items() if name in wanted or name == "acc"}
    found = {name: metrics.mean(name, [float(a == b) for a, b in zip(gold, x, strict=True)])
             for name, x in said.items()}
    found["f1"] = metrics.weighted_f1(gold, said["acc"])
    return [found[name] for name in wanted]


def cut_out(answer: str, how: dict[str, Any]) -> str:
    """The answer proper: the whole without blanks around it, or the last match of a pattern."""
    if "last" not in how:
        return answer.strip()
    found = re.findall(how["last"], answer)
    if not found:
        return "[invalid]"
    last = found[-1] if isinstance(found[-1], str) else next(filter(None, found[-1]), "[invalid]")
    return last.strip()


def _matches(records: Sequence[Record], wanted: Sequence[str],
             how: dict[str, Any]) -> list[Measure]:
    compare = {"exact_match": metrics.exact, "f1": metrics.overlap_f1}
    note = "" if how["name"] == "whole" else f", {how['name']}"
    return [metrics.mean(name + note, [compare[name](r["gold"], cut_out(r["answer"], how))
                                       for r in records]) for name in wanted]


def _translations(records: Sequence[Record], wanted: Sequence[str], part: str) -> list[Measure]:
    """Scores raw, and with one apostrophe: the references mix two, which no reader sees."""
    said, true, source = ([r[k] for r in records] for k in ("hypothesis", "reference", "source"))
    found = []
    for note, texts in (("", (said, true)), (", one apostrophe", [
            [normalise.apostrophe(x)[0] for x in side] for side in (said, true)])):
        for name in wanted:
            if name != "spBLEU" or metrics.has_spbleu():
                m = metrics.translation(name, *texts)
                found.append(Measure(name + note, m.counts, m.figure, m.signature))
    target = part.partition("-")[2]
    ended = [r["end"] == "eos" for r in records if r["end"]]
    rates = {"copy_rate": [a.strip().casefold().startswith(b.strip().casefold()) for a, b in
                           zip(said, source, strict=True)],
             "language_rate": [identify.language(x) == target for x in said]}
    found += [metrics.mean("eos_rate", ended)] if len(ended) == len(records) else []
    found += [metrics.mean(name, x, rises=name != "copy_rate") for name, x in rates.items()]
    return [*found, metrics.ratio("length_ratio", [len(x) for x in said], [len(x) for x in true])]


def result(name: str, measure: Measure, signature: str, **more: Any) -> Result:
    """A result as results.json keeps it."""
    low, high = metrics.interval([measure]) or (None, None)
    signature = "|".join(filter(None, (signature, measure.signature)))
    return {"suite": name, "metric": measure.name, "value": measure.value, "low": low, "high": high,
            "n": len(measure.counts), "signature": signature, **more}


def mean_result(name: str, alike: Sequence[Measure], signature: str, **more: Any) -> Result:
    """The mean of one figure over several prompts, with the least and the most of them."""
    values = [m.value for m in alike]
    low, high = metrics.interval(alike) or (None, None)
    return {"suite": name, "metric": alike[0].name, "value": float(np.mean(values)), "low": low,
            "high": high, "n": len(alike[0].counts), "least": min(values), "most": max(values),
            "prompts": len(values), "signature": signature, **more}


def groups(name: str, measure: Measure, records: Sequence[Record], columns: Sequence[str],
           signature: str, **more: Any) -> list[Result]:
    """A figure again for the items of each value of a column: by noun class, by distance."""
    found = []
    for column in columns:
        values = np.array([str(r[column]) for r in records])
        for value in sorted(set(values), key=lambda v: (len(v), v)):
            found.append(result(name, measure.only(values == value), signature,
                                group=f"{column} {value}", **more))
    return found


def table(results: list[Result]) -> str:
    """Results for people, a line each, and below them how long texts are and what is in no mean."""
    lines = [("suite", "prompt", "metric", "value", "95 % interval", "items", "against baseline")]
    for r in results:
        interval = "-" if r["low"] is None else f"{r['low']:.4f} - {r['high']:.4f}"
        name = " ".join(filter(None, (r["suite"].removeprefix("text:"), r.get("part"),
                                      r.get("group"))))
        against = "" if "baseline" not in r else \
            f"{r['baseline']['difference']:+.4f} (p {r['baseline']['p']:.3f})"
        prompt = r.get("prompt", "") + "*" * ("aside" in r)
        if "least" in r:
            prompt = f"mean of {r['prompts']}"
        lines.append((name + " (PARTIAL)" * r["partial"], prompt, r["metric"], f"{r['value']:.4f}",
                      interval, f"{r['n']:,}", against))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = (0, 2)
    said = ["  ".join(cell.ljust(w) if i in left else cell.rjust(w)
                      for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
            for line in lines]
    said += [f"{r['suite']}: {r['bytes']:,} bytes, {r['tokens']:,} tokens, "
             f"{r['tokens'] / r['bytes']:.4f} tokens/byte" for r in results if "tokens" in r]
    aside = dict.fromkeys(f"{r['suite']} {r['prompt']} {r['aside']}"
                          for r in results if "aside" in r)
    return "\n".join(said + ["* not in the mean: " + "; ".join(aside)] * bool(aside))


def write_records(file: Path, records: Sequence[Record]) -> None:
    """One JSON object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records),
                    encoding="utf-8")


def read_records(file: Path) -> list[Record]:
    """What `write_records` wrote; OSError, ValueError. Only \\n ends a record: an answer may hold
    what Unicode calls a line's end."""
    return [json.loads(x) for x in file.read_text(encoding="utf-8").split("\n") if x]


def write_sides(stem: Path, records: Sequence[Record]) -> None:
    """A translation's .src, .hyp and .ref, one line a sentence, for sacrebleu and neural metrics
    (COMET, MetricX), which run outside. What would break a line becomes a blank."""
    for ending, key in ((".src", "source"), (".hyp", "hypothesis"), (".ref", "reference")):
        lines = [" ".join(re.split(r"[\r\n\x0b\x0c\x1c-\x1e\x85\u2028\u2029]+", r[key]))
                 for r in records]
        stem.with_name(stem.name + ending).write_text(
            "".join(x + "\n" for x in lines), encoding="utf-8")


def read_hypotheses(file: Path, n: int, name: str) -> list[str]:
    """Another system's translations, a line each."""
    try:
        lines = file.read_bytes().decode().split("\n")
    except OSError as e:
        raise UserError(f"--hypotheses {name}: {file} cannot be read ({e.strerror})", FLAGS) \
            from None
    except UnicodeDecodeError as e:
        raise UserError(f"{file}: not UTF-8 (byte {e.start})") from None
    lines = [x.removesuffix("\r") for x in (lines[:-1] if lines[-1] == "" else lines)]
    if len(lines) != n:
        raise UserError(f"{file}: {len(lines):,} lines, {name} has {n:,} sentences; line n must be "
                        "the translation of sentence n, an empty line where there is none")
    return lines


def stem(name: str, prompt: Prompt | None = None) -> str:
    """What the records of a suite's prompt, or of a text, are called in OUT/items."""
    return ".".join(filter(None, (name.replace("text:", "text."), prompt and prompt.part,
                                  prompt and prompt.name)))


def _choices_of(signature: str) -> dict[str, str]:
    """Its choices by name; ours come first, and sacrebleu's, behind, has a version of its own."""
    return dict(x.split(":", 1) for x in reversed(signature.split("|")) if ":" in x)


class Baseline:
    """An earlier evaluation, from its folder."""

    def __init__(self, folder: Path):
        try:
            found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            self.results, self.model = found["results"], found["model"]
        except FileNotFoundError:
            raise UserError(f"--baseline {folder}: no results.json there; give the --out of an "
                            "earlier evaluation", FLAGS) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"--baseline {folder}: results.json is damaged") from None
        self.folder = folder

    def find(self, name: str, choices: dict[str, Any], records: Sequence[Record],
             ) -> list[Record] | None:
        """The baseline's records of NAME (a suite, a part, a prompt), or of the same part's first
        prompt where a file of translations is compared; UserError where they were made otherwise
        than by these choices of a signature, or are of other items than these records."""
        parts = {x["items"]: x for x in reversed(self.results) if "items" in x}
        if name not in parts and name.endswith(".file"):
            name = min((x for x in parts if x.startswith(name.removesuffix("file"))), default=name)
        if name not in parts:
            return None
        file = self.folder / "items" / f"{name}.jsonl"
        try:
            old = read_records(file)
        except (OSError, ValueError):
            raise UserError(f"--baseline {self.folder}: {file.name} is missing or damaged, and a "
                            "paired test needs it") from None
        before = _choices_of(parts[name]["signature"])
        now = {"version": str(VERSION)} | {k: str(v) for k, v in choices.items()}
        for of_a_model in (x for x in (now, before) if "dtype" in x):
            of_a_model.setdefault("compat", "none")
            of_a_model.setdefault("chat", "none")
        for key in ALIKE:
            if key in now and key in before and now[key] != before[key]:
                raise UserError(f"--baseline {self.folder}: {name} has {key} {before[key]} there "
                                f"and {now[key]} here; measure it again to compare")
        ours, theirs = ([[r.get(k) for k in ("gold", "source", "reference", "bytes")] for r in x]
                        for x in (records, old))
        if ours != theirs:
            raise UserError(f"--baseline {self.folder}: {name} was measured on other items "
                            f"({len(old)} there, {len(records)} here); measure it again to compare")
        return old

    def compare(self, name: str, ours: list[Result], found: list[Measure], kind: str,
                records: Sequence[Record], wanted: Sequence[str],
                answers: Sequence[dict[str, Any]], part: str) -> None:
        """Add to each of our results what the baseline has, the difference and its p."""
        old = self.find(name, _choices_of(ours[0]["signature"]), records)
        if old is None:
            say(f"{name}: not in the baseline {self.folder}, so not compared")
            return
        baseline = {m.name: m for m in measures(kind, old, wanted, answers, part)}
        for r, m in zip(ours, found, strict=True):
            if m.name in baseline:
                r["baseline"] = {"value": baseline[m.name].value,
                                 **metrics.paired(m, baseline[m.name])}
