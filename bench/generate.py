"""Generation here beside transformers' generate, on this machine's CPU.

    python -m bench.generate [--quick] [--cases stream eight sixty-four ragged beam] [--write]

Random LLaMAs: of TinyLlama's shape (1.1 billion parameters, bf16) for one stream and for eight,
where reading the weights bounds the speed; of 110 million (float32) for many prompts of 16 to 256
ids. Both sides answer the same prompts, so many side by side, transformers' sorted by length and
padded on the left; `ragged` is also given to its continuous batching (`generate_batch`), which
fills a row as soon as its answer ends, as ours do. Answers end by chance: one id in 64 is an EOS,
and `ragged` draws ids, so that its answers are as uneven as real ones; in the other cases both
sides must give the same ids (in bf16 the first of them: later ones hang on rounding). `ours, int8`
answers as another model does, one of weights rounded to eight bits, and is held to that model's
first ids.

A turn is all prompts once; all sides of a case are there at once, which takes up to 16 GB, and take
turns. All figures are medians over these. Seconds of a step are those of a whole answer without
those of its prompt and first id, both measured. Its share of the limit is the bytes of the weights,
one a number where they are int8, over these seconds, over what the machine reads a second. That is
measured before and after each case that it bounds, and the larger of the two counts: what others do
on the machine then makes a share smaller, not larger.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench import Settings, Spread, alternate, child, installed, limits, main, ratio, std, table

HERE = "bench.generate"
SHAPES = {  # hidden_size, intermediate_size, layers, heads, kv heads, vocabulary
    "1.1B": (2048, 5632, 22, 32, 4, 32000), "110M": (768, 2048, 12, 12, 4, 32000),
    "tiny": (64, 128, 2, 4, 2, 512)}


@dataclass
class Case:
    """A model, prompts and their lengths, and how many of them are answered at once (rows)."""

    shape: str
    dtype: str
    prompts: int
    shortest: int
    longest: int
    rows: int
    new: int
    beams: int = 1
    temperature: float = 0.0

    @property
    def together(self) -> bool:
        """Whether all prompts take each step side by side: reading the weights bounds it."""
        return self.prompts == self.rows and self.beams == 1 and not self.temperature


CASES = {
    "stream": Case("1.1B", "bfloat16", 1, 128, 128, 1, 128),
    "eight": Case("1.1B", "bfloat16", 8, 128, 128, 8, 128),
    "sixty-four": Case("110M", "float32", 64, 16, 256, 64, 64),
    "ragged": Case("110M", "float32", 200, 16, 256, 32, 128, temperature=1.0),
    "beam": Case("110M", "float32", 40, 16, 128, 40, 48, beams=5)}
QUICK = ["ragged"]


def case_of(name: str, size: str) -> Case:
    """A case, in the size that is asked for."""
    case = CASES[name]
    if size == "tiny":
        longest = 4 if case.shortest == case.longest else 16
        case = Case("tiny", case.dtype, min(case.prompts, 12), 4, longest,
                    min(case.rows, 4 * case.beams), 8, case.beams, case.temperature)
    elif size == "quick":
        case = replace(case, prompts=min(case.prompts, 24), new=case.new // 4,
                       rows=min(case.rows, 24 if case.together else 8 * case.beams))
    return case


def draw(shape: str, folder: str) -> None:
    """Write a random model; its logits are as flat as a young model's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    C, M, L, H, K, V = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if shape == "1.1B" else torch.float32)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=C, intermediate_size=M, num_hidden_layers=L,
        num_attention_heads=H, num_key_value_heads=K, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=2048, initializer_range=std(C))).save_pretrained(
            folder, max_shard_size="1GB")


def asked_of(case: Case) -> tuple[list[list[int]], list[int]]:
    """The prompts and the ids that end an answer, the same in every process."""
    V, chance = SHAPES[case.shape][-1], random.Random(1)
    prompts = [[chance.randrange(3, V) for _ in range(chance.randint(case.shortest, case.longest))]
               for _ in range(case.prompts)]
    return prompts, chance.sample(range(V), V // 64)


def ours(case: Case, folder: str, ends: list[int], quant: str = "none") -> Any:
    """A function that answers prompts with up to so many ids, as sample.py does."""
    import torch

    from checkpoints.huggingface import load_model
    from inference.cpu_linear import optimize_for_inference
    from inference.generate import completions
    from inference.sampling import SamplingParams, StoppingCriteria

    dtype = getattr(torch, case.dtype)
    model, _ = load_model(folder, dtype=dtype, tokenizer=False, quant=quant)
    model.eval()
    optimize_for_inference(model)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        sampling = SamplingParams(new, case.temperature, beams=case.beams)
        return [x.ids for x in completions(model, prompts, sampling, StoppingCriteria(set(ends)),
                                           rows=case.rows)]

    return run


def theirs(case: Case, folder: str, ends: list[int]) -> Any:
    """The same by transformers: batches of prompts of like lengths, padded on the left."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype)).eval()
    drawn = {"do_sample": True, "temperature": case.temperature, "top_k": 0} \
        if case.temperature else {"do_sample": False}
    ending = set(ends)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        n, answers = max(1, case.rows // case.beams), {}
        for start in range(0, len(order), n):
            indices = order[start : start + n]
            T = max(len(prompts[i]) for i in indices)
            pads = [T - len(prompts[i]) for i in indices]
            ids = torch.tensor([[0] * p + prompts[i] for p, i in zip(pads, indices, strict=True)])
            mask = torch.tensor([[0] * p + [1] * (T - p) for p in pads])
            out = model.generate(ids, attention_mask=mask, num_beams=case.beams, pad_token_id=0,
                                 max_new_tokens=new, eos_token_id=ends, **drawn)[:, T:].tolist()
            for i, row in zip(indices, out, strict=True):
                end = next((k for k, x in enumerate(row) if x in ending), len(row) - 1)
                answers[i] = row[: end + 1]
        return [answers[i] for i in range(len(prompts))]

    return run


def continuous(case: Case, folder: str, ends: list[int]) -> Any:
    """The same by transformers' continuous batching, as many rows at once, with room for all."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype)).eval()
    page = 256  # tokens
    room = ContinuousBatchingConfig(
        page_size=page, num_blocks=case.rows * -(-(case.longest + case.new) // page) + case.rows,
        max_requests_per_batch=case.rows, max_batch_tokens=512)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        drawn = GenerationConfig(max_new_tokens=new, eos_token_id=ends, pad_token_id=0, top_k=0,
                                 do_sample=case.temperature > 0, temperature=case.temperature)
        outputs = model.generate_batch(prompts, drawn, room).values()  # in the order of the prompts
        return [x.generated_tokens for x in outputs]

    return run


def measure(side: str, name: str, size: str, folder: str) -> Iterator[dict[str, Any]]:
    """Each turn: seconds for the first ids alone and for whole answers, and the answers."""
    import torch

    case = case_of(name, size)
    prompts, ends = asked_of(case)
    ends = [] if case.together else ends
    torch.manual_seed(0)
    sides = {"ours": ours, "ours, int8": partial(ours, quant="int8"), "transformers": theirs,
             "transformers, continuous": continuous}
    run = sides[side](case, folder, ends)
    run(prompts[:1], 2)  # every weight is in memory, every thread has begun
    yield {}
    while True:
        seconds = {}
        for key, new in (("first", 1), ("whole", case.new)):
            begun = time.perf_counter()
            ids = run(prompts, new)
            seconds[key] = time.perf_counter() - begun
        yield {**seconds, "ids": ids}


def likely(name: str, size: str, folder: str, int8: bool = False) -> list[list[int]]:
    """The ids that may come first in each answer, as transformers has their logits: the largest,
    and what is no further from it than two of the steps that bf16 has there (2^-6 of it). `int8`:
    of the model whose rows are multiples of a 127th of their largest weight, in float32."""
    import torch
    from transformers import LlamaForCausalLM

    case = case_of(name, size)
    dtype = torch.float32 if int8 else getattr(torch, case.dtype)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    candidates = []
    with torch.inference_mode():
        for m in model.modules():
            if int8 and isinstance(m, torch.nn.Linear):
                step = m.weight.abs().amax(1, keepdim=True) / 127
                m.weight.copy_((m.weight / step).round() * step)
        for ids in asked_of(case)[0]:
            logits = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()  # (V,)
            largest = logits.max()
            candidates.append((logits >= largest - largest.abs() / 64).nonzero()[:, 0].tolist())
    return candidates


def agree(case: Case, runs: dict[str, list[dict]],
          may: dict[str, list[list[int]]] | None = None) -> bool:
    """Whether the sides gave the same answers, as far as they can: one to each prompt, and nine in
    ten the same, for of two equal logits either side may take either. In bf16 an answer soon goes
    its own way: every first id must be one that `may` come first on that side."""
    if not all(len(run["ids"]) == case.prompts and all(run["ids"]) for turns in runs.values()
               for run in turns):
        return False  # a side that logs its faults and goes on
    if case.temperature:
        return True
    if may:
        return all(ids[0] in ok for side, turns in runs.items() for run in turns
                   for ids, ok in zip(run["ids"], may[side], strict=True))
    n = 1 if case.dtype == "bfloat16" else case.new
    first = runs["ours"][0]["ids"]
    return all(sum(a[:n] == b[:n] for a, b in zip(first, run["ids"], strict=True))
               >= 0.9 * len(first) for turns in runs.values() for run in turns)


def job(s: Settings) -> str:
    sides = ["ours", *(["transformers"] if installed("transformers") else [])]
    rows, peaks = [], limits.measured(s.size)
    with tempfile.TemporaryDirectory() as home:
        drawn: set[str] = set()
        for name in s.cases or (QUICK if s.size == "quick" else CASES):
            case = case_of(name, s.size)
            folder = f"{home}/{case.shape}"
            if case.shape not in drawn:
                child(HERE, "draw", case.shape, folder)
                drawn.add(case.shape)
            narrow = case.dtype == "bfloat16"
            case_sides = list(sides)
            if narrow:
                case_sides.append("ours, int8")
            if name == "ragged" and "transformers" in sides:
                case_sides.append("transformers, continuous")
            read_before = peaks["read"]
            if case.together and rows:
                read_before = limits.measured(s.size)["read"]
            measured = alternate(HERE, s.rounds, {side: ("measure", [side, name, s.size, folder])
                                              for side in case_sides})
            runs, gb = ({side: x[i] for side, x in measured.items()} for i in (1, 0))
            read_after = limits.measured(s.size)["read"] if case.together else read_before
            may = None
            if narrow and "transformers" in sides:
                plain, rounded = (child(HERE, "likely", name, s.size, folder, x)
                                  for x in (False, True))
                may = {side: rounded if side == "ours, int8" else plain for side in runs}
            if not agree(case, runs, may):
                s.faults.append(f"{name}: the sides give different ids")
            rows += lines(name, case, runs, gb, max(read_before, read_after))
    head = ["case", "", "prompts, side by side", "ids/s", "range",
            "times transformers' best", "ms a step", "of the read limit, GB/s", "peak GB"]
    return table(head, rows) + "\n\n" + limits.words(peaks, "transformers")


def lines(name: str, case: Case, runs: dict[str, list[dict]], held: dict[str, dict],
          read: float) -> list[list[str]]:
    """A case's rows of the table."""
    C, M, L, H, K, V = SHAPES[case.shape]
    matrices = V * C + L * (2 * C * C + 2 * C * C * K // H + 3 * C * M)  # the head, not the table
    speeds = {side: [sum(map(len, x["ids"])) / x["whole"] for x in turns]
              for side, turns in runs.items()}
    peers = [side for side in runs if side.startswith("transformers")]
    best = max(peers, key=lambda side: statistics.median(speeds[side]), default=None)
    rows = []
    for side, turns in runs.items():
        speed = Spread.of(speeds[side])
        bytes_per_weight = 2 if case.dtype == "bfloat16" else 4
        if side == "ours, int8":
            bytes_per_weight = 1
        size = matrices * bytes_per_weight
        step = statistics.median((x["whole"] - x["first"]) / (case.new - 1) for x in turns)
        times = ratio(speeds[side], speeds[best]) if best else "-"
        beams = f" x {case.beams} beams" if case.beams > 1 else ""
        rows.append([f"{name}: {case.shape}, {case.dtype}", side,
                      f"{case.prompts}, {case.rows // case.beams}{beams}", f"{speed.median:.1f}",
                      f"{speed.low:.1f} to {speed.high:.1f}", times,
                      f"{1000 * step:.1f}" if case.together else "-",
                      f"{size / step / 1e9 / read:.0%} of {read:.1f}" if case.together else "-",
                      f"{held[side]['gb']:.2f}"])
    return rows


if __name__ == "__main__":
    sys.exit(main(HERE, "Generation", {"draw": draw, "likely": likely, "measure": measure},
                  job, list(CASES), unit="turns"))
