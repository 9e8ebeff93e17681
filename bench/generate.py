"""Generation on a CPU, compared with transformers' generate.

    python -m bench.generate [--quick] [--cases stream eight sixty-four ragged beam] [--write]

The models are random LLaMAs. One stream and eight streams use TinyLlama's shape (1.1 billion
parameters, bf16), where reading the weights limits the speed. The cases with many prompts of 16 to
256 ids use 110 million parameters (float32). Both sides answer the same prompts with the same
number of rows. transformers gets batches sorted by length and padded on the left. `ragged` also
measures its continuous batching (`generate_batch`), which refills a row when its answer ends, as
ours does.

One id in 64 ends an answer. `ragged` samples, so that its answers have different lengths. In the
other cases both sides must give the same ids; in bf16 only the first ids, because later ones depend
on rounding. `ours, int8` is compared with the first ids of a model whose weights are rounded to
eight bits.

In a turn, a side answers all prompts once. All sides of a case exist at the same time, which needs
up to 16 GB, and take turns. All figures are medians over the turns. The time of a step is the time
of whole answers minus the time of the prompts and first ids, both measured. The share of the read
limit is the bytes of the weights (one byte per number for int8), divided by this time and by the
bytes that the machine reads per second. The read limit is measured before and after each case that
it limits, and the larger value counts, so that other programs can only make the share smaller.
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
    """A model, its prompts, and how they are answered."""

    shape: str
    dtype: str
    prompts: int
    shortest: int  # ids in a prompt
    longest: int
    rows: int  # in a batch
    new: int  # ids in an answer, at most
    beams: int = 1
    temperature: float = 0.0

    @property
    def together(self) -> bool:
        """Whether all prompts share every step, so that reading the weights limits the speed."""
        return self.prompts == self.rows and self.beams == 1 and not self.temperature


CASES = {
    "stream": Case("1.1B", "bfloat16", 1, 128, 128, 1, 128),
    "eight": Case("1.1B", "bfloat16", 8, 128, 128, 8, 128),
    "sixty-four": Case("110M", "float32", 64, 16, 256, 64, 64),
    "ragged": Case("110M", "float32", 200, 16, 256, 32, 128, temperature=1.0),
    "beam": Case("110M", "float32", 40, 16, 128, 40, 48, beams=5)}
QUICK = ["ragged"]


def case_of(name: str, size: str) -> Case:
    """Return a case in the given size."""
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
    """Write a random model."""
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


def prompts_of(case: Case) -> tuple[list[list[int]], list[int]]:
    """Return the prompts, and the ids that end an answer; the same in every process."""
    V, generator = SHAPES[case.shape][-1], random.Random(1)
    prompts = [[generator.randrange(3, V)
                for _ in range(generator.randint(case.shortest, case.longest))]
               for _ in range(case.prompts)]
    return prompts, generator.sample(range(V), V // 64)


def ours(case: Case, folder: str, ends: list[int], quant: str = "none") -> Any:
    """Return a function that answers prompts with at most `new` ids, as sample.py does."""
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
    """Return the same function by transformers: batches of similar lengths, padded on the left."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype)).eval()
    options: dict[str, Any] = {"do_sample": False}
    if case.temperature:
        options = {"do_sample": True, "temperature": case.temperature, "top_k": 0}

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        n, answers = max(1, case.rows // case.beams), {}
        for start in range(0, len(order), n):
            indices = order[start : start + n]
            T = max(len(prompts[i]) for i in indices)
            ids = torch.zeros(len(indices), T, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(indices):
                ids[row, T - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, T - len(prompts[i]) :] = 1
            out = model.generate(ids, attention_mask=mask, num_beams=case.beams, pad_token_id=0,
                                 max_new_tokens=new, eos_token_id=ends, **options)[:, T:].tolist()
            for i, answer in zip(indices, out, strict=True):
                end = next((k for k, x in enumerate(answer) if x in ends), len(answer) - 1)
                answers[i] = answer[: end + 1]
        return [answers[i] for i in range(len(prompts))]

    return run


def continuous(case: Case, folder: str, ends: list[int]) -> Any:
    """Return the same function by transformers' continuous batching: as many rows, and a cache that
    holds all of them."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, case.dtype)).eval()
    page = 256  # tokens
    batching = ContinuousBatchingConfig(
        page_size=page, num_blocks=case.rows * -(-(case.longest + case.new) // page) + case.rows,
        max_requests_per_batch=case.rows, max_batch_tokens=512)

    def run(prompts: list[list[int]], new: int) -> list[list[int]]:
        config = GenerationConfig(max_new_tokens=new, eos_token_id=ends, pad_token_id=0, top_k=0,
                                  do_sample=case.temperature > 0, temperature=case.temperature)
        outputs = model.generate_batch(prompts, config, batching).values()  # keeps the order
        return [x.generated_tokens for x in outputs]

    return run


def measure(side: str, name: str, size: str, folder: str) -> Iterator[dict[str, Any]]:
    """Yield in each turn the seconds for the first ids and for whole answers, and the answers."""
    import torch

    case = case_of(name, size)
    prompts, ends = prompts_of(case)
    ends = [] if case.together else ends
    torch.manual_seed(0)
    sides = {"ours": ours, "ours, int8": partial(ours, quant="int8"), "transformers": theirs,
             "transformers, continuous": continuous}
    run = sides[side](case, folder, ends)
    run(prompts[:1], 2)  # warm-up: reads all weights and starts all threads
    yield {}
    while True:
        seconds = {}
        for key, new in (("first", 1), ("whole", case.new)):
            start = time.perf_counter()
            ids = run(prompts, new)
            seconds[key] = time.perf_counter() - start
        yield {**seconds, "ids": ids}


def likely(name: str, size: str, folder: str, int8: bool = False) -> list[list[int]]:
    """Return the ids that are accepted as the first of each answer, by transformers' logits: those
    at most two bf16 steps (2^-6 of the value) below the largest. With `int8`, each row of a weight
    is rounded to multiples of its largest value / 127, and the model computes in float32."""
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
        for ids in prompts_of(case)[0]:
            logits = model(torch.tensor([ids]), logits_to_keep=1).logits[0, -1].float()  # (V,)
            largest = logits.max()
            candidates.append((logits >= largest - largest.abs() / 64).nonzero()[:, 0].tolist())
    return candidates


def agree(case: Case, runs: dict[str, list[dict]],
          may: dict[str, list[list[int]]] | None = None) -> bool:
    """Return whether the sides gave the same answers.

    Each side must give one answer per prompt. Nine in ten must be equal, because two logits may be
    equal. In bf16 later ids depend on rounding, so only the first ids are compared: `may` holds the
    accepted ids of each prompt, per side.
    """
    if not all(len(run["ids"]) == case.prompts and all(run["ids"]) for turns in runs.values()
               for run in turns):
        return False  # continuous batching logs an error and goes on
    if case.temperature:
        return True
    if may:
        return all(ids[0] in accepted for side, turns in runs.items() for run in turns
                   for ids, accepted in zip(run["ids"], may[side], strict=True))
    n = 1 if case.dtype == "bfloat16" else case.new
    first = runs["ours"][0]["ids"]
    return all(sum(a[:n] == b[:n] for a, b in zip(first, run["ids"], strict=True))
               >= 0.9 * len(first) for turns in runs.values() for run in turns)


def job(s: Settings) -> str:
    """Run all cases; return the table."""
    sides = ["ours", *(["transformers"] if installed("transformers") else [])]
    rows, peaks = [], limits.measured(s.size)
    with tempfile.TemporaryDirectory() as home:
        written: set[str] = set()
        for name in s.cases or (QUICK if s.size == "quick" else CASES):
            case = case_of(name, s.size)
            folder = f"{home}/{case.shape}"
            if case.shape not in written:
                child(HERE, "draw", case.shape, folder)
                written.add(case.shape)
            bf16 = case.dtype == "bfloat16"
            case_sides = list(sides)
            if bf16:
                case_sides.append("ours, int8")
            if name == "ragged" and "transformers" in sides:
                case_sides.append("transformers, continuous")
            read_before = peaks["read"]
            if case.together and rows:
                read_before = limits.measured(s.size)["read"]
            measured = alternate(HERE, s.rounds, {side: ("measure", [side, name, s.size, folder])
                                                  for side in case_sides})
            runs = {side: turns for side, (_, turns) in measured.items()}
            gb = {side: setup["gb"] for side, (setup, _) in measured.items()}
            read_after = limits.measured(s.size)["read"] if case.together else read_before
            may = None
            if bf16 and "transformers" in sides:
                may = {side: child(HERE, "likely", name, s.size, folder, side == "ours, int8")
                       for side in ("ours", "ours, int8")}
                may["transformers"] = may["ours"]
            if not agree(case, runs, may):
                s.faults.append(f"{name}: the sides give different ids")
            rows += table_rows(name, case, runs, gb, max(read_before, read_after))
    head = ["case", "", "prompts, side by side", "ids/s", "range",
            "times transformers' best", "ms a step", "of the read limit, GB/s", "peak GB"]
    return table(head, rows) + "\n\n" + limits.description(peaks, "transformers")


def table_rows(name: str, case: Case, runs: dict[str, list[dict]], gb: dict[str, float],
               read: float) -> list[list[str]]:
    """Return the rows of the table for a case. `gb` is the peak memory of each side, `read` the
    GB/s that the machine reads."""
    C, M, L, H, K, V = SHAPES[case.shape]
    # The numbers that a step reads: with the output head, without the embedding.
    matrices = V * C + L * (2 * C * C + 2 * C * C * K // H + 3 * C * M)
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
                      f"{gb[side]:.2f}"])
    return rows


if __name__ == "__main__":
    sys.exit(main(HERE, "Generation", {"draw": draw, "likely": likely, "measure": measure},
                  job, list(CASES), unit="turns"))
