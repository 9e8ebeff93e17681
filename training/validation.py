"""Evaluations during training: bits per byte of held-out text, suites, and continued prompts.

An evaluation does not change the state of training. samples.txt and metrics.jsonl hold each
evaluation once, however often the run was interrupted and resumed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.model_folder import base_model_dir
from data import Source
from evaluation.eval_model import EvalModel, Truncation, start_token, warn_truncated
from evaluation.likelihood import answer_nats, document_nats
from evaluation.metrics import bits_per_byte
from evaluation.suites import Item, Prompt, Suite, evenly_spaced, load_suite
from evaluation.taught import Taught
from inference.detokenizer import decode_answer
from inference.generate import completions
from inference.prompt_format import read_normalisers
from inference.sampling import SamplingParams, StoppingCriteria
from model import Llama
from runtime import console
from runtime.console import FLAGS, UserError
from runtime.distributed import Distributed
from runtime.temporary import write_text
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training.compile_model import uncompiled
from training.datasets import ValidationSets, prompts_of
from training.early_stopping import Metrics
from training.settings import Settings
from training.state import Run

MAX_NEW_TOKENS = 40  # of a continued prompt


def evaluate(run: Run) -> dict[str, Any]:
    """Measure the model as it is now -> the entries of metrics.jsonl.

    Also adds to samples.txt, saves the best model, and applies the stop conditions. All ranks take
    part, and all use the metrics of rank 0.
    """
    with uncompiled():
        values, losses = measure_held_out(run.model, run.val_sets, run.tokenizer)
        metrics = {"bits_per_byte": finite(values), "held_out_loss": finite(losses)}
        if run.suites:
            values = measure_suites(run.suites, run.model, run.tokenizer, run.ranks,
                                    run.stop_ids)
            metrics["suites"] = finite(values)
        metrics = json.loads(run.ranks.all_gather_text(json.dumps(metrics))[0])
        samples = continue_prompts(run.model, run.val_sets, run.tokenizer, run.settings.prompts)
    if run.ranks.rank == 0:
        write_samples(run.out / "samples.txt", run.step, samples)
    run.save_if_best(metrics["bits_per_byte"])
    for module in run.ranks.fsdp_modules:
        module.reshard()  # FSDP's root module stays unsharded after a forward pass
    suite_metrics = metrics.get("suites", {})
    run.early_stopping.update(run.step, {**suite_metrics, **metrics["bits_per_byte"]})
    parts = [describe_bits_per_byte(metrics["bits_per_byte"]),
             describe_suites(run.suites, suite_metrics)]
    console.info(f"step {run.step}: " + "; ".join(part for part in parts if part))
    if run.early_stopping.stop_reason:
        metrics["stopped"] = run.early_stopping.stop_reason
    return metrics


def finite(metrics: Metrics) -> dict[str, float | None]:
    """Metrics for JSON, which has no NaN: what is not finite becomes None."""
    return {name: x if x is not None and math.isfinite(x) else None for name, x in metrics.items()}


def describe_bits_per_byte(metrics: Metrics) -> str:
    """The bits per byte of each held-out text as one line; "" if there is none."""
    if not metrics:
        return ""
    values = [f"{name} {x}" if x is None else f"{name} {x:.4f}" for name, x in metrics.items()]
    return "bits per byte " + ", ".join(values)


# -- held-out text ---------------------------------------------------------------------------------


def measure_held_out(model: Llama, val_sets: ValidationSets,
                     tokenizer: Tokenizer) -> tuple[dict[str, float], dict[str, float]]:
    """Bits per byte of each held-out text, as eval.py measures it, and its loss in nats per token;
    of answers, given the prompt."""
    values, losses = {}, {}
    model.eval()
    for name, texts in val_sets.items():
        if isinstance(texts[0], Document):
            nats = answer_nats(model, texts)
            n_bytes = sum(int(tokenizer.byte_lengths[d.ids[d.mask]].sum()) for d in texts)
            n_tokens = sum(int(d.mask[1:].sum()) for d in texts)
        else:
            nats = document_nats(model, texts, start_token(tokenizer))
            n_bytes = sum(tokenizer.count_bytes(ids) for ids in texts)
            n_tokens = sum(map(len, texts))
        values[name] = bits_per_byte(float(np.sum(nats)), n_bytes)
        losses[name] = float(np.sum(nats)) / n_tokens if n_tokens else math.nan
    model.train()
    return values, losses


# -- suites ----------------------------------------------------------------------------------------


def load_suites(s: Settings) -> list[Suite]:
    """The suites of --suites: a part of the items, and the first prompt of each part."""
    suites: list[Suite] = []
    for spec in s.suites:
        suite = load_suite(spec, s.suite_data)
        if suite.name in (x.name for x in suites):
            raise UserError(f"--suites {spec}: {suite.name} is named twice", FLAGS)
        suite.rows = evenly_spaced(suite.rows, s.suite_items)
        first_prompts: dict[str, Prompt] = {}
        for prompt in suite.prompts:
            first_prompts.setdefault(prompt.part, prompt)
        suite.prompts = list(first_prompts.values())
        for prompt in suite.prompts:
            suite.items(prompt)  # a faulty item is refused now, not at the first evaluation
        suites.append(suite)
    return suites


def clean_suites(suites: Sequence[Suite], sources: Sequence[Source],
                 model_dir: Path) -> list[Suite]:
    """The suites with their questions cleaned as the training text is; `model_dir`: of the model
    that is trained further."""
    folders = [model_dir, base_model_dir(model_dir)]
    taught = Taught(normalisers=read_normalisers(folders, prompts_of(sources)))
    return [taught.suite_for(suite, add_prompts=False) for suite in suites]


def metric_names(suites: Sequence[Suite]) -> list[str]:
    """The names of all metrics of the suites, the main one of each part first."""
    return [name for suite in suites for prompt in suite.prompts
            for name in _full_names(suite, prompt, suite.task(prompt).metric_names())]


def main_metrics(suites: Sequence[Suite]) -> dict[str, list[str]]:
    """The main metric of each part of each suite, by suite."""
    return {suite.name: [_full_names(suite, prompt, suite.metrics[:1])[0]
                         for prompt in suite.prompts]
            for suite in suites}


def _full_names(suite: Suite, prompt: Prompt, metrics: Sequence[str]) -> list[str]:
    """SUITE.METRIC, or SUITE.PART.METRIC for a suite with parts."""
    prefix = f"{suite.name}.{prompt.part}" if prompt.part else suite.name
    return [f"{prefix}.{metric}" for metric in metrics]


def describe_suites(suites: Sequence[Suite], metrics: Metrics) -> str:
    """The main metrics of the suites as one line."""
    names = [name for names in main_metrics(suites).values() for name in names]
    return ", ".join(f"{name} {metrics[name]:.4f}" for name in names
                     if metrics.get(name) is not None)


def measure_suites(suites: Sequence[Suite], model: Llama, tokenizer: Tokenizer, ranks: Distributed,
                   stop_ids: Collection[int] = ()) -> dict[str, float]:
    """The metrics of all suites by name.

    Answers are greedy, at most half a context long, and end at EOS or at one of `stop_ids`.
    """
    values: dict[str, float] = {}
    longest_answer = model.config.max_position_embeddings // 2
    eval_model = EvalModel(model, tokenizer, stop_ids=frozenset(stop_ids))
    model.eval()
    for suite in suites:
        for prompt in suite.prompts:
            task = suite.task(prompt, min(suite.new_tokens, longest_answer))
            records = _split_among_ranks(partial(task.records, eval_model), suite.items(prompt),
                                         ranks)
            metrics = task.metrics(records)
            names = _full_names(suite, prompt, [x.name for x in metrics])
            values |= dict(zip(names, (x.value for x in metrics), strict=True))
    model.train()
    return values


def _split_among_ranks(answer_items: Callable[..., list[Any]], items: Sequence[Item],
                       ranks: Distributed) -> list[Any]:
    """The records of all items; each rank answers every `world`-th item.

    With FSDP all ranks answer all items, because each forward pass needs every rank.
    """
    if ranks.world_size == 1 or ranks.fsdp_modules:
        return answer_items(items)
    own_items = items[ranks.rank :: ranks.world_size]
    truncations: list[Truncation] = []
    own_records: list[Any] | None = []
    try:
        if own_items:
            own_records = answer_items(own_items, on_truncation=truncations.append)
    except UserError:
        own_records = None
    message = json.dumps([own_records, truncations], default=str)
    per_rank = [json.loads(text) for text in ranks.all_gather_text(message)]
    if any(records is None for records, _ in per_rank):
        return answer_items(items)  # every rank gets the error, with the item's number among all
    truncated = [x for _, rank_truncations in per_rank for x in rank_truncations]
    if truncated:
        warn_truncated(Truncation(sum(x[0] for x in truncated), sum(x[1] for x in truncated),
                                  truncated[0][2]))
    records: list[Any] = [None] * len(items)
    for rank, (rank_records, _) in enumerate(per_rank):
        records[rank :: ranks.world_size] = rank_records
    return records


# -- samples ---------------------------------------------------------------------------------------


def continue_prompts(model: Llama, val_sets: ValidationSets, tokenizer: Tokenizer,
                     prompts: Sequence[str]) -> str:
    """Continue the prompts greedily -> a block for samples.txt.

    Without prompts, the beginnings of held-out texts. All ranks call this: FSDP needs every rank.
    """
    if prompts:
        bos = [] if tokenizer.bos is None else [tokenizer.bos]
        prompt_ids = [bos + tokenizer.encode(prompt) for prompt in prompts]
    else:
        prompt_ids = default_prompts(val_sets, tokenizer)
        prompts = [tokenizer.decode(ids) for ids in prompt_ids]
    sampling = SamplingParams(min(MAX_NEW_TOKENS, model.config.max_position_embeddings // 2),
                              temperature=0.0)
    model.eval()
    answers = list(completions(model, prompt_ids, sampling, StoppingCriteria({tokenizer.eos}),
                               tokenizer.bos))
    model.train()
    block = ""
    for prompt, ids, answer in zip(prompts, prompt_ids, answers, strict=True):
        continuation = decode_answer(tokenizer, ids, answer.ids)
        block += f"-- {prompt}\n{console.printable(continuation)}\n"
    return block


def default_prompts(val_sets: ValidationSets, tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of two prompts of each held-out text: the first words, or what precedes an answer."""
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    prompts = []
    for texts in val_sets.values():
        for text in texts[:2]:
            if isinstance(text, Document):
                prompts.append(text.ids[: int(np.argmax(text.mask))].tolist())
            else:
                prompts.append(bos + tokenizer.encode(tokenizer.decode(text[:8].tolist())))
    return prompts


def write_samples(file: Path, step: int, block: str) -> None:
    """Append a step's samples to samples.txt; those of this step and later ones are replaced."""
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    for match in re.finditer(r"^== step (\d+)$", text, re.M):
        if int(match[1]) >= step:
            text = text[: match.start()]
            break
    write_text(file, f"{text}== step {step}\n{block}")
