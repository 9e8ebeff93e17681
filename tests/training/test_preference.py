"""What tuned modes minimise, against independent formulas on separate, unpacked sequences; packing
that cuts no example; shares with an epoch cap; runs of every mode as a person starts them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import lora
import prepare
import sample
import train
from checkpoints.peft_adapter import adapter_state
from data import IGNORE, Batch, Bin, Loader, PackedExamples, Source, validation_split
from goldens import trl_goldens as goldens_trl
from helpers import fork, tiny
from preparation.bin_writer import BinWriter
from runtime import console, flags
from runtime.console import UserError
from runtime.distributed import Distributed
from runtime.paths import ROOT
from tokenization.chat_template import ChatTemplate, encode_rendered
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training import optimizer as optim
from training import preference
from training.mixture import limited_weights
from training.objective import NLL, objective_of
from training.settings import Settings, read_settings

ALONE = Distributed(0, 1, torch.device("cpu"))
SETTINGS = Settings(mode="dpo", beta=0.3)


def make(folder: Path, kind: str, n: int, seed: int = 0, longest: int = 14) -> Bin:
    """A bin of n random examples with uneven masks: a prompt, then what is trained; in pairs, two
    answers to each prompt."""
    draw = np.random.default_rng(seed)
    writer = BinWriter(folder, "a" * 64, tiny.V, kind)
    for _ in range(n):
        prompt = draw.integers(3, tiny.V, draw.integers(1, longest // 2)).tolist()
        for _ in range(2 if kind == "pairs" else 1):
            said = draw.integers(3, tiny.V, draw.integers(1, longest // 2)).tolist()
            writer.add(Document(prompt + said, [False] * len(prompt) + [True] * len(said), 1))
    return writer.close({"documents": {}}, [])


def whole(bin: Bin, T: int = 48) -> PackedExamples:
    return PackedExamples(Source("x", bin, np.arange(len(bin)), 1.0), T, (1, 0))


def batch_of(stream: PackedExamples) -> Batch:
    return Batch.of([stream.row(i) for i in range(stream.rows)])


def logp(peer: torch.nn.Module, bin: Bin, i: int) -> torch.Tensor:
    """log p of the trained tokens of document i, alone in its row, (n,), by transformers."""
    ids = torch.tensor(bin.document(i).astype(np.int64))[None]
    logits = peer(ids).logits[0, :-1].log_softmax(-1)
    found = logits.gather(-1, ids[0, 1:, None])[:, 0]
    return found[torch.from_numpy(bin.trained(i)[1:].copy())]


@pytest.mark.parametrize("mode", ["dpo", "cpo", "arpo"])
@pytest.mark.parametrize("tune", ["full", "lora", "lora and embeddings"])
def test_losses_and_gradients_equal_a_formula_on_separate_sequences(tmp_path, mode, tune):
    bin = make(tmp_path / "bin", "pairs", 9)
    s = Settings(mode=mode.replace("arpo", "cpo"), beta=0.3, nll_weight=0.7,
                       arpo=mode == "arpo")
    peer, base = tiny.peer("llama3", seed=1), tiny.peer("llama3", seed=2)
    ours = tiny.ours(peer, "llama3")
    stream, reference = whole(bin), []
    if tune == "full":
        base_ours = tiny.ours(base, "llama3")
        if mode == "dpo":
            [reference] = preference.keep_reference(base_ours, [stream], tmp_path / "ref", "base",
                                                    2, ALONE)
        ours.train()
    else:
        base = tiny.peer("llama3", seed=1)  # the model with its adapter off
        lora.add_lora(ours, 4, 8, 0.0, ["all-linear"],
                    modules_to_save=["embed_tokens"] if "emb" in tune else [])
        for m in lora.adapters(ours).values():
            torch.nn.init.normal_(m.lora_B.weight, std=0.3)
            name = next(k for k, x in ours.named_modules() if x is m)
            W = peer.get_submodule(name)
            W.weight = torch.nn.Parameter(m.merged().detach().clone())
        if "emb" in tune:
            with torch.no_grad():
                ours.model.embed_tokens.weight += 0.1
                peer.model.embed_tokens.weight += 0.1
    rows = [Batch.of([stream.row(i)], [reference[stream.number(i)]] if len(reference) else [])
            for i in range(stream.rows)]
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], 0.0)
    kept = {}
    optimizer.zero_grad = lambda **_: kept.update(
        {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None})
    reported: dict[str, float] = {}
    loss, _ = train.train_step(ours, objective_of(s), rows, optimizer, ALONE, 1e9, None, reported)

    losses, nll, tokens, margins = [], [], 0, []
    for i in range(0, len(bin), 2):
        w, r = logp(peer, bin, i), logp(peer, bin, i + 1)
        if mode == "dpo":
            with torch.no_grad():
                before = logp(base, bin, i).sum() - logp(base, bin, i + 1).sum()
            margin = 0.3 * (w.sum() - r.sum() - before)
        else:
            factor = 1.0
            if mode == "arpo":
                factor = min(1.0, 0.9 * torch.exp(
                    0.4 * (w.mean() - r.mean()).abs()).item() - 1)
            margin = 0.3 * (w.sum() - factor * r.sum())
            nll.append(-w.sum())
            tokens += len(w)
        losses.append(-torch.log(torch.sigmoid(margin)))
        margins.append(margin.item())
    wanted = torch.stack(losses).mean()
    wanted = wanted + 0.7 * sum(nll) / tokens if nll else wanted
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert reported["margin"] == pytest.approx(np.mean(margins), rel=1e-4)
    assert reported["accuracy"] == pytest.approx(np.mean(np.array(margins) > 0))
    wanted.backward()
    theirs = {n: p.grad for n, p in peer.named_parameters()}
    for name, g in kept.items():
        if ".lora_" not in name:
            assert tiny.apart(g, theirs[name]) < 1e-5, name
            continue
        layer, part = name.split(".lora_")
        m, dW = ours.get_submodule(layer), theirs[f"{layer}.weight"]
        found = m.scale * (dW @ m.lora_A.weight.T if part[0] == "B" else m.lora_B.weight.T @ dW)
        assert tiny.apart(g, found) < 1e-5, name
    assert any(".lora_" in n for n in kept) == (tune != "full")


@pytest.mark.parametrize("mode,tune", goldens_trl.CASES)
def test_losses_and_gradients_of_packed_pairs_equal_trls_own_trainers(tmp_path, mode, tune):
    """As tests/goldens_trl.py kept them: what TRL's compute_loss makes of separate, padded rows."""
    golden = json.loads(goldens_trl.FILE.read_text())[f"{mode}-{tune}"]
    writer = BinWriter(tmp_path / "bin", "a" * 64, tiny.V, "pairs")
    for prompt, *answers in goldens_trl.pairs():
        for said in answers:
            mask = [False] * len(prompt) + [True] * len(said)
            writer.add(Document(prompt + said, mask, 1))
    stream = whole(writer.close({"documents": {}}, []))
    s = Settings(mode=mode, beta=goldens_trl.BETA,
                       nll_weight=goldens_trl.NLL_WEIGHT if mode == "cpo" else 1.0)
    ours, names, reference = tiny.ours(tiny.peer("llama3", seed=1), "llama3"), {}, []
    if tune == "lora":
        lora.add_lora(ours, goldens_trl.RANK, goldens_trl.ALPHA, 0.0, ["all-linear"])
        names = {n: f"base_model.model.{n}" for n, _ in ours.named_parameters()}
        with torch.no_grad():
            for name, p in ours.named_parameters():
                if p.requires_grad:
                    p.copy_(goldens_trl.drawn(names[name], p.shape))
    elif mode == "dpo":
        base = tiny.ours(tiny.peer("llama3", seed=2), "llama3")
        [reference] = preference.keep_reference(base, [stream], tmp_path / "ref", "base", 2, ALONE)
    rows = [stream.row(i) for i in range(stream.rows)]
    assert 1 < len(rows) < goldens_trl.PAIRS, "several pairs lie in a row"
    numbers = [stream.number(i) for i in range(stream.rows)]
    batch = Batch.of(rows, [reference[i] for i in numbers] if len(reference) else [])
    sums, counts = preference.loss_sums(ours.train(), batch, s), preference.loss_counts(batch, s)
    n = len(counts) - len(preference.REPORTED)
    loss = sum(x / k for x, k in zip(sums[:n], counts[:n], strict=True))
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-5)
    found = {names.get(name, name): goldens_trl.gradient_values(p.grad, names.get(name, name))
             for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == golden["gradients"].keys()
    for name, numbers in found.items():
        assert numbers == pytest.approx(golden["gradients"][name], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_trls_goldens_are_what_trl_computes_today():
    pytest.importorskip("trl", reason="trl is not installed: pip install trl==1.16.*")
    made, kept = goldens_trl.make(), json.loads(goldens_trl.FILE.read_text())
    for case in (f"{mode}-{tune}" for mode, tune in goldens_trl.CASES):
        assert made[case]["loss"] == pytest.approx(kept[case]["loss"], rel=1e-5)
        for name, numbers in kept[case]["gradients"].items():
            assert made[case]["gradients"][name] == pytest.approx(numbers, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("mode", ["dpo", "cpo"])
def test_accumulation_of_pairs_equals_one_batch(tmp_path, mode):
    stream = whole(make(tmp_path / "bin", "pairs", 12))
    s = replace(SETTINGS, mode=mode)
    found = []
    for size in (stream.rows, 1):
        model = tiny.ours(tiny.peer("llama2"))
        torch.manual_seed(0)
        lora.add_lora(model, 4, 8, 0.0, ["all-linear"])
        optimizer = optim.adamw(model, 1e-2, (0.9, 0.95), 0.1)
        batches = [Batch.of([stream.row(i) for i in range(at, min(at + size, stream.rows))])
                   for at in range(0, stream.rows, size)]
        for _ in range(3):
            loss, norm = train.train_step(model, objective_of(s), batches, optimizer, ALONE, 1.0)
        found.append((loss, norm, adapter_state(model)))
    (l1, n1, p1), (l2, n2, p2) = found
    assert l1 == pytest.approx(l2, rel=1e-5) and n1 == pytest.approx(n2, rel=1e-4)
    for name in p1:
        torch.testing.assert_close(p1[name], p2[name], atol=1e-5, rtol=1e-4)


def test_packed_conversations_give_the_gradient_of_padded_ones_as_transformers_trains_them(
        tmp_path):
    """Theirs are the ids, the mask (of the template's generation tags), the padding, the loss."""
    folder = tiny.folder(tmp_path / "model", "llama3")
    template = ChatTemplate.plain(Tokenizer.open(folder))
    words = "{{ message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}"
    assert words in template.source
    marked = template.source.replace(words, (
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ message['content'] | trim }}"))
    writer = BinWriter(tmp_path / "bin", "a" * 64, tiny.V, "chat")
    rows, masks = [], []
    for turns in range(1, 7):
        messages = [{"role": role, "content": f"{tiny.SENTENCES[(turns + i) % 10]} {i}"}
                    for i in range(turns) for role in ("user", "assistant")]
        [document] = encode_rendered(template.tokenizer, [template.render_with_mask(messages)])
        writer.add(document)
        theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
            messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True)
        assert theirs["input_ids"] == document.ids.tolist()
        rows.append(theirs["input_ids"])
        masks.append(theirs["assistant_masks"])
    T = max(map(len, rows))
    padded, labels, there = (torch.full((6, T), x) for x in (0, -100, 0))
    for i, (ids, mask) in enumerate(zip(rows, masks, strict=True)):
        padded[i, : len(ids)], there[i, : len(ids)] = torch.tensor(ids), 1
        labels[i, : len(ids)] = torch.where(torch.tensor(mask) > 0, torch.tensor(ids), -100)
    peer = tiny.peer("llama3").train()
    loss = peer(padded, attention_mask=there, labels=labels).loss
    loss.backward()
    ours = tiny.ours(tiny.peer("llama3"), "llama3").train()
    stream = whole(writer.close({"documents": {}}, []), T + 9)
    assert stream.rows < 6, "several lie in a row"
    b = batch_of(stream)
    assert NLL.count(b) == (labels != -100).sum() > 200
    found = NLL.sums(ours, b) / NLL.count(b)
    found.backward()
    assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    theirs = dict(peer.named_parameters())
    for name, p in ours.named_parameters():
        assert tiny.apart(p.grad, theirs[name].grad) < 1e-5, name


def test_neftune_is_uniform_noise_by_a_documents_own_length_and_only_in_training():
    from model import neftune_noise

    doc = torch.tensor([[0] * 4 + [1] * 12 + [-1] * 4])
    x = torch.zeros(1, 20, 4096)
    found = neftune_noise(x, doc, 5.0)
    for at, n in ((slice(0, 4), 4), (slice(4, 16), 12)):
        most = 5.0 / (n * 4096) ** 0.5
        assert 0.999 * most < found[0, at].abs().max() <= most
        assert found[0, at].std() == pytest.approx(most / 3**0.5, rel=0.02)
    ids = tiny.tokens(2, 16)
    plain = tiny.logits(tiny.ours(tiny.peer()), ids)
    model = tiny.ours(tiny.peer(), neftune_alpha=5.0)
    assert torch.equal(tiny.logits(model, ids), plain)
    assert not torch.equal(tiny.logits(model.train(), ids), plain)


# ------------------------------------------------------------------ rows

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), T=st.integers(26, 70), kind=st.sampled_from(["chat", "mt", "pairs"]),
       seed=st.integers(0, 9))
def test_every_example_lies_whole_in_one_row_once_an_epoch(tmp_path_factory, n, T, kind, seed):
    bin = make(tmp_path_factory.mktemp("bins") / "bin", kind, n, seed)
    each = 2 if kind == "pairs" else 1
    stream = PackedExamples(Source("x", bin, np.arange(len(bin)), 1.0), T, (seed, 0))
    for epoch in (0, 1):
        seen = []
        for i in range(epoch * stream.rows, (epoch + 1) * stream.rows):
            tokens, targets, doc, pos = stream.row(i)
            assert stream.tokens_in(i + 1) - stream.tokens_in(i) == (doc >= 0).sum()
            n_docs = int(doc.max()) + 1
            assert n_docs % each == 0 and (doc[1:][pos[1:] > 0] == doc[:-1][pos[1:] > 0]).all()
            for d in range(n_docs):
                at = np.flatnonzero(doc == d)
                assert (pos[at] == np.arange(len(at))).all()
                seen.append((*tokens[at].tolist(), int(targets[at][-1])))
            for d in range(0, n_docs, each if each == 2 else n_docs + 1):
                if each == 2:
                    pair = [tokens[doc == d + k][0] for k in (0, 1)]
                    assert pair[0] == pair[1]  # one prompt
        lengths = [len(bin.document(i)) for i in range(len(bin))]
        wanted = [tuple(bin.document(i).tolist()) for i in range(len(bin)) if lengths[i] > 1]
        assert sorted(seen) == sorted(wanted)


def test_a_loader_of_whole_rows_seeks_and_is_the_same_on_two_ranks(tmp_path):
    def loader(rank: int = 0, world: int = 1, rows: int = 4) -> Loader:
        found = [Source(k, make(tmp_path / f"{k}{rank}{world}{rows}{random.random()}", k, 30, i),
                        np.arange(30 * (2 if k == "pairs" else 1)), w)
                 for i, (k, w) in enumerate((("chat", 3.0), ("mt", 1.0), ("text", 1.0)))]
        return Loader(found, 40, rows, 5, rank, world)

    alone = loader()
    batches = [alone.next() for _ in range(30)]
    share = np.array(alone.tokens) / sum(alone.tokens)
    assert abs(share - [0.6, 0.2, 0.2]).max() < 0.02
    apart = [loader(rank, 2, 2) for rank in (0, 1)]
    for b in batches:
        both = [x.next() for x in apart]
        assert torch.equal(b.tokens, torch.cat([x.tokens for x in both]))
        assert torch.equal(b.targets, torch.cat([x.targets for x in both]))
    again = loader()
    again.seek(alone.rows_consumed)
    assert torch.equal(again.next().tokens, alone.next().tokens)


def test_rows_are_well_filled(tmp_path):
    bin = make(tmp_path / "bin", "chat", 3000, longest=200)
    stream = whole(bin, 512)
    assert stream.tokens / (stream.rows * 512) > 0.95


def test_held_out_pairs_stay_together(tmp_path):
    bin = make(tmp_path / "bin", "pairs", 60)
    held = validation_split(bin, 0.2).reshape(-1, 2)
    assert (held[:, 0] == held[:, 1]).all() and 3 <= held[:, 0].sum() <= 25


def test_a_pair_longer_than_a_row_is_refused_with_the_flag_that_helps(tmp_path):
    with pytest.raises(UserError, match=r"\d+ of 20 pairs are longer than a row of 12, .*"
                                        "--max-tokens 12 --too-long drop"):
        whole(make(tmp_path / "bin", "pairs", 20), 12)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), n=st.integers(1, 5), epochs=st.floats(0.5, 6))
def test_capped_weights_keep_the_cap_and_else_the_shares(data, n, epochs):
    sizes = data.draw(st.lists(st.integers(10, 10_000), min_size=n, max_size=n))
    weights = data.draw(st.lists(st.floats(0.1, 9), min_size=n, max_size=n))
    budget = data.draw(st.floats(1, epochs * sum(sizes)))
    given_ = limited_weights(weights, sizes, budget, epochs)
    assert sum(given_) == pytest.approx(budget)
    full = [g >= epochs * s * (1 - 1e-9) for g, s in zip(given_, sizes, strict=True)]
    assert all(g <= epochs * s * (1 + 1e-9) for g, s in zip(given_, sizes, strict=True))
    free = {round(g / w, 6) for g, w, f in zip(given_, weights, full, strict=True) if not f}
    assert len(free) <= 1  # those that are not full share by their weights
    if free and any(full):  # and a full one would have had more
        rate = free.pop()
        assert all(epochs * s / w <= rate * (1 + 1e-6)
                   for s, w, f in zip(sizes, weights, full, strict=True) if f)


def test_equal_weights_with_a_cap_are_unimax():
    """Chung et al. 2023: languages from the smallest on, each an even part of what is left, or its
    cap."""
    sizes, budget, epochs = [100, 5000, 700, 20_000], 12_000, 4
    left, unimax = budget, {}
    for k, i in enumerate(sorted(range(4), key=sizes.__getitem__)):
        unimax[i] = min(left / (4 - k), epochs * sizes[i])
        left -= unimax[i]
    found = limited_weights([1.0] * 4, sizes, budget, epochs)
    assert found == pytest.approx([unimax[i] for i in range(4)])


# ------------------------------------------------------------------ runs

@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, and files for each mode."""
    root = tmp_path_factory.mktemp("tuned")
    tiny.folder(root / "model", "llama32", max_position_embeddings=256)
    kin, eng = tiny.SENTENCES[:5], tiny.SENTENCES[5:]
    both = [(f"{k} {i}", f"{e} {i}") for i in range(8) for k, e in zip(kin, eng, strict=True)]
    (root / "mt.tsv").write_text("kin\teng\n" + "".join(f"{k}\t{e}\n" for k, e in both))
    rows = {"chat": [{"messages": [{"role": "user", "content": k},
                                   {"role": "assistant", "content": e}]} for k, e in both],
            "pairs": [{"prompt": f"{k}\n", "chosen": e, "rejected": k} for k, e in both]}
    for name, found in rows.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in found))
    (root / "text.txt").write_text("\n".join(k for k, _ in both) + "\n")
    return root


def run(place: Path, out: str, *words: str, code: int = 0, ranks: int = 1) -> str:
    program = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(ranks)]
    done = subprocess.run(
        [*program, str(ROOT / "train.py"), "--model", f"{place}/model", "--out", f"{place}/{out}",
         "--seq-len", "200", "--dtype", "fp32", "--device", "cpu", "--lr", "1e-3", "--eval-every",
         "9", *words],
        capture_output=True, text=True, timeout=170, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr[-2000:]
    return done.stderr


def metrics(place: Path, out: str) -> list[dict]:
    lines = (place / out / "metrics.jsonl").read_text().splitlines()
    return [x for x in map(json.loads, lines) if "loss" in x]


def test_files_become_bins_of_the_modes_kind_and_the_result_says_how_to_ask(place):
    said = run(place, "mt", "--mode", "mt", "--data", f"{place}/mt.tsv", "--steps", "3")
    assert "prepare.py mt" in said and "--max-tokens 200" in said
    told = json.loads((place / "mt/model/prompt.json").read_text())
    assert told["translate"][0]["name"] == "alma"
    assert Bin(place / "mt/bins/mt").meta["kind"] == "mt"
    found = metrics(place, "mt")
    assert len(found) == 3 and all(np.isfinite(x["loss"]) for x in found)
    # the next stage keeps what it does not teach anew, and teaches a template
    subprocess.run([sys.executable, str(ROOT / "train.py"), "--model", f"{place}/mt/model", "--out",
                    f"{place}/sft", "--mode", "sft", "--data", f"{place}/chat.jsonl:2",
                    f"{place}/mt/bins/mt:1", "--steps", "2", "--seq-len", "200", "--device", "cpu"],
                   check=True, capture_output=True, cwd=ROOT, timeout=170)
    told = json.loads((place / "sft/model/prompt.json").read_text())
    assert told["translate"][0]["name"] == "alma" and "message['role']" in told["chat"]
    assert (place / "sft/model/chat_template.jinja").read_text() == told["chat"]


def test_preference_runs_report_margins_and_keep_the_reference(place):
    run(place, "dpo", "--mode", "dpo", "--data", f"{place}/pairs.jsonl", "--steps", "6")
    found = metrics(place, "dpo")
    assert found[0]["loss"] == pytest.approx(np.log(2), rel=1e-5) and found[0]["margin"] == 0
    assert found[-1]["loss"] < 0.6 and found[-1]["accuracy"] > 0.5 and found[-1]["margin"] > 0
    assert found[-1]["chosen_logp"] < 0 and len(list((place / "dpo/reference").glob("*.bin"))) == 1
    run(place, "dpo-plan", "--mode", "dpo", "--data", f"{place}/dpo/bins/pairs", "--steps", "6",
        "--plan")
    assert not (place / "dpo-plan/metrics.jsonl").exists()


def command(said: Path, main: Callable[[list[str]], object], *words: str, code: int = 0) -> str:
    """What a command says in a process of its own, which ends with this exit code."""
    ended = fork.ends([fork.child(lambda: console.run(lambda: main(list(words))), said)])
    assert ended == [code], said.read_text()
    return said.read_text()


def prepares(words: list[str]) -> None:
    sys.argv = ["prepare.py", *words]
    prepare.main()


def trains(words: list[str]) -> int:
    return train.main(*read_settings(words))


def samples(words: list[str]) -> None:
    sample.main(flags.read(sample.Settings, words, "sample.py")[0])


def test_a_bin_that_trains_no_token_is_refused_by_the_run(place, tmp_path):
    tok = Tokenizer.open(place / "model")
    writer = BinWriter(tmp_path / "bin", tok.fingerprint, tok.vocab_size, "chat")
    for _ in range(9):
        writer.add(Document([1, 5, 6, 7, 2], [False] * 5, 3))
    writer.close({"documents": {}}, [])

    told = command(tmp_path / "said", trains, "--mode", "sft", "--model", f"{place}/model",
                   "--data", f"{tmp_path}/bin", "--out", f"{tmp_path}/out", "--steps", "2",
                   "--seq-len", "48", "--device", "cpu", code=3)
    assert told.splitlines()[-1] == (
        f"error: {tmp_path}/bin: no token to train on in 9 documents: the mask excludes all "
        "tokens, or no document has two; prepare it again")


def test_text_conversations_and_translations_mix_under_a_cap_as_the_plan_says(place, tmp_path):
    said = tmp_path / "said"
    for kind, file in (("chat", "chat.jsonl"), ("mt", "mt.tsv"), ("text", "text.txt")):
        command(said, prepares, kind, f"{place}/{file}", "--tokenizer", f"{place}/model", "--out",
                f"{tmp_path}/{kind}", *(["--documents", "line"] if kind == "text" else []))
    words = ["--mode", "sft", "--model", f"{place}/model", "--data", f"{tmp_path}/chat:1",
             f"{tmp_path}/mt:1", f"{tmp_path}/text:1", "--max-epochs-per-source", "1.5", "--rows",
             "4", "--seq-len", "250", "--hold-out", "0", "--device", "cpu", "--dtype", "fp32"]
    told = command(said, trains, *words, "--steps", "9", "--out", f"{tmp_path}/plan", "--plan")
    found = re.findall(r"(\w+) ([\d.]+)% \(([\d,]+) tokens an epoch; ([\d,]+) in this run, "
                       r"([\d.]+) epochs\)", told)
    planned = {x[0]: float(x[1]) / 100 for x in found}
    times = {x[0]: float(x[4]) for x in found}
    assert list(planned) == ["chat", "mt", "text"]
    assert times["text"] == 1.5 and max(times.values()) == 1.5, "the smallest gives what it may"
    assert times["mt"] < 1.5 and planned["mt"] > planned["text"]
    assert sum(int(x[3].replace(",", "")) for x in found) == pytest.approx(9 * 1000, abs=3)
    command(said, trains, *words, "--steps", "9", "--out", f"{tmp_path}/run")
    share = metrics(tmp_path, "run")[-1]["share"]
    assert share == pytest.approx(planned, abs=0.04)  # to a row of each
    told = command(said, trains, *words, "--steps", "999", "--out", f"{tmp_path}/no", code=2)
    assert "error: --max-epochs-per-source 1.5: the sources hold" in told


def test_answers_in_conversations_become_preferences_that_dpo_trains(place, tmp_path):
    """The way of docs/recipes.md: sft, sample.py, prepare.py prefer and pairs, dpo; each command
    in a process, and the pairs are asked for with the very ids that the samples were."""
    said = tmp_path / "said"
    usual = ["--seq-len", "250", "--dtype", "fp32", "--device", "cpu", "--steps", "2"]
    command(said, prepares, "chat", f"{place}/chat.jsonl", "--tokenizer", f"{place}/model", "--out",
            f"{tmp_path}/chat", "--max-tokens", "250")
    command(said, trains, "--mode", "sft", "--model", f"{place}/model", "--data",
            f"{tmp_path}/chat", "--out", f"{tmp_path}/sft", *usual)
    asked = [[{"role": "system", "content": "Subiza."}, {"role": "user", "content": f"{x} {i}"}]
             for i, x in enumerate(tiny.SENTENCES[:6])]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n"
                                                  for x in asked))
    command(said, samples, "--model", f"{tmp_path}/sft/model", "--file", f"{tmp_path}/asked.jsonl",
            "--samples", "4", "--max-new-tokens", "16", "--out", f"{tmp_path}/samples.jsonl")
    found = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [x["messages"] for x in found] == [x for x in asked for _ in range(4)]
    (tmp_path / "right.txt").write_text("\n".join(tiny.SENTENCES[:6]) + "\n")
    told = command(said, prepares, "prefer", f"{tmp_path}/samples.jsonl", "--references",
            f"{tmp_path}/right.txt", "--gap", "0", "--out", f"{tmp_path}/preferences.jsonl")
    cut = sum(x["end"] == "length" for x in found)
    assert cut and f"{cut} of 24 answers were cut" in told
    made = [json.loads(x) for x in (tmp_path / "preferences.jsonl").read_text().splitlines()]
    assert made and all(x["prompt"] in asked for x in made)
    assert all({x["chosen"], x["rejected"]} <= {y["text"] for y in found
                                                if y["messages"] == x["prompt"]} for x in made)
    command(said, prepares, "pairs", f"{tmp_path}/preferences.jsonl", "--tokenizer",
            f"{tmp_path}/sft/model", "--out", f"{tmp_path}/pairs", "--max-tokens", "250")
    bin, tok = Bin(tmp_path / "pairs"), Tokenizer.open(tmp_path / "sft/model")
    template = ChatTemplate.from_folder(tmp_path / "sft/model", tok)
    for i, row in enumerate(made):
        for j in (2 * i, 2 * i + 1):
            ids = template.encode(row["prompt"], add_generation_prompt=True)
            assert bin.document(j)[: len(ids)].tolist() == ids
            assert not bin.trained(j)[: len(ids)].any() and bin.trained(j)[len(ids)]
    command(said, trains, "--mode", "dpo", "--model", f"{tmp_path}/sft/model", "--data",
            f"{tmp_path}/pairs", "--out", f"{tmp_path}/dpo", *usual)
    losses = [x["loss"] for x in metrics(tmp_path, "dpo")]
    assert len(losses) == 2 and losses[0] == pytest.approx(np.log(2), rel=1e-5)


@pytest.mark.slow
def test_a_fresh_adapter_needs_no_kept_reference(place):
    run(place, "dpo-lora", "--mode", "dpo", "--data", f"{place}/pairs.jsonl", "--steps", "6",
        "--tune", "lora")
    assert not (place / "dpo-lora/reference").exists()
    assert metrics(place, "dpo-lora")[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)


@pytest.mark.slow
def test_pairs_are_not_trained_by_their_nll(place):
    run(place, "cpo", "--mode", "cpo", "--data", f"{place}/pairs.jsonl", "--steps", "1")
    said = run(place, "no", "--mode", "sft", "--data", f"{place}/cpo/bins/pairs", code=3)
    assert "a bin of pairs, --mode sft trains on text, chat, mt" in said


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sft", "mt", "dpo", "cpo"])
def test_two_ranks_equal_one(place, mode):
    data = {"sft": "chat.jsonl", "mt": "mt.tsv"}.get(mode, "pairs.jsonl")
    words = ["--mode", mode, "--data", f"{place}/{data}", "--steps", "4", "--tokens-per-step",
             "800"]
    run(place, f"{mode}1", *words, "--rows", "2")
    run(place, f"{mode}2", *words, "--rows", "1", ranks=2)
    one, two = metrics(place, f"{mode}1"), metrics(place, f"{mode}2")
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["tokens"] == b["tokens"]
        if "margin" in a:
            assert a["margin"] == pytest.approx(b["margin"], rel=1e-3, abs=1e-5)


def test_an_adapter_trained_further_is_its_own_reference(tmp_path):
    """Switched off it would be the base, not the model that preference training starts from."""
    bin = make(tmp_path / "bin", "pairs", 6)
    model = tiny.ours(tiny.peer())
    lora.add_lora(model, 4, 8, 0.0, ["all-linear"])
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.lora_B.weight, std=0.3)
    stream, cut = whole(bin), []
    part = type("Segment", (), {"reshard": lambda self: cut.append(self)})()
    alone = dataclasses.replace(ALONE, fsdp_modules=[part])
    [reference] = preference.keep_reference(model, [stream], tmp_path / "ref", "m", 2, alone)
    assert cut == [part]  # fsdp's: what a pass gathers is freed by the next
    b = Batch.of([stream.row(0)], [reference[stream.number(0)]])
    sums = preference.loss_sums(model, b, SETTINGS)
    counts = preference.loss_counts(b, SETTINGS)
    assert float(sums[0].detach()) / counts[0] == pytest.approx(np.log(2), rel=1e-5)
    assert (b.targets != IGNORE).sum() > 0 and F.relu(sums[1]).abs() < 1e-4
