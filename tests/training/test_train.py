"""train.py as a person runs it: real processes, real files, real kills."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import train
from checkpoints.huggingface import init_from_config, load_model
from checkpoints.peft_adapter import PEFT_PREFIX
from checkpoints.resume_point import find_newest, read_checkpoint
from data import IGNORE, Batch, Bin
from helpers import tiny
from helpers.train_runs import ENV, call, read_losses, train_command
from layers import nf4
from model import Llama, ModelConfig
from preparation.text import prepare_text
from runtime import flags as config
from runtime.console import UserError
from runtime.distributed import Distributed
from runtime.paths import ROOT
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training import monitor
from training import optimizer as optim
from training.compile_model import compile_model
from training.flops import token_counts
from training.objective import NLL, Objective
from training.settings import (
    CAN_CHANGE_ON_RESUME,
    Settings,
    check_settings,
    read_settings,
    upgrade_settings,
)
from training.validation import measure_held_out

ALONE = Distributed(0, 1, torch.device("cpu"))


TUNES = {
    "full": ["--tune", "full"], "lora": ["--tune", "lora", "--lora-dropout", "0.1"],
    "bf16": ["--optimizer", "adamw-bf16", "--dtype", "bf16"],
    "best": ["--best", "kin"],
    "qlora": ["--tune", "qlora", "--double-quant", "--lora-dropout", "0.1", "--optimizer",
              "adamw8bit", "--lora-rank", "32"],
    "all of LoRA": ["--tune", "lora", "--lora-dropout", "0.1", "--rslora", "--dora", "--lora-plus",
                    "4", "--train-embeddings", "--embedding-lr", "5e-4", "--train-norms",
                    "--best", "eng"]}
SLOW = {"bf16", "best"}


@pytest.mark.parametrize("tune", [
    pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in TUNES])
def test_a_run_killed_in_the_middle_and_resumed_equals_one_that_was_not(workspace, tune):
    """20 steps = some + kill -9 + resume, bit for bit, past the end of an epoch of the smaller
    source."""
    flags = ["--steps", "20", *TUNES[tune], "--save-every", "5", "--eval-every", "10"]
    call(train_command(workspace, f"whole-{tune}", *flags))
    cut = workspace / f"cut-{tune}"
    going = subprocess.Popen(
        train_command(workspace, cut.name, *flags), env=ENV, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (cut / "checkpoints/step-000010").exists():
        assert going.poll() is None
        time.sleep(0.01)
    going.send_signal(signal.SIGKILL)
    assert going.wait() == -signal.SIGKILL, "it was to be killed before it was done"
    call([sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(cut)])
    whole = workspace / f"whole-{tune}"
    assert read_losses(cut) == read_losses(whole)
    said = [about(x)["changed_settings"] for x in (cut, whole)]
    assert [x.pop("out") for x in said] == [str(cut), str(whole)] and said[0] == said[1]
    assert "keep" not in said[0] and said[0]["save_every"] == 5
    assert (cut / "samples.txt").read_text() == (whole / "samples.txt").read_text()
    file = "model.safetensors" if tune in ("full", *SLOW) else "adapter_model.safetensors"
    one, two = load_file(whole / "model" / file), load_file(cut / "model" / file)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert sum(1 for _ in (cut / "checkpoints").iterdir()) == 2, "--keep 2"


def test_sigterm_saves_and_says_so_and_the_run_goes_on(workspace):
    out = workspace / "term"
    going = subprocess.Popen(train_command(workspace, "term", "--steps", "5000"), env=ENV, cwd=ROOT,
                             stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert going.poll() is None
        time.sleep(0.01)
    going.send_signal(signal.SIGTERM)
    said = going.communicate(timeout=60)[1]
    assert going.returncode == 143 and "--resume" in said
    step = max(read_losses(out))
    assert (out / f"checkpoints/step-{step:06}").exists()


def test_a_finished_run_has_nothing_to_do_and_is_not_overwritten(workspace):
    call(train_command(workspace, "done", "--steps", "2"))
    assert "nothing to do" in call(
        [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(workspace / "done")])
    assert "holds a run" in call(train_command(workspace, "done", "--steps", "2"), code=2)


def test_a_finished_run_names_the_command_that_trains_its_model_further(workspace):
    out = workspace / "short"
    call(train_command(workspace, "short", "--steps", "2"))
    resume = [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(out)]
    message = call([*resume, "--steps", "3"], code=2)
    assert "is finished, and --steps was 2, now 3; to train its model further:" in message
    command = shlex.split(message.split("further: ")[1])
    assert command[:2] == ["python", "train.py"]
    call([sys.executable, str(ROOT / "train.py"), *command[2:]])
    assert max(read_losses(workspace / "short-2")) == 3
    began = load_settings(workspace / "short-2/settings.toml")
    assert began.model == str(out / "model") and began.lr == 1e-3
    for text in (call(resume), call(train_command(workspace, "short", "--steps", "2"), code=2)):
        assert f"train.py {out}/settings.toml --model {out}/model --out {out}-2" in text


def load_settings(file: Path) -> Settings:
    return config.read(Settings, [str(file)], "train.py")[0]


def about(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())


def bits_per_byte(out: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["bits_per_byte"] for x in lines if "bits_per_byte" in x}


def test_the_model_saved_is_the_one_that_was_evaluated_and_best(workspace):
    """As the next run finds it at its step 0. The last is not the best: a decay of half the step's
    number shrinks strong weights first, and from the fifth step on makes them many times as
    strong."""
    call(
        train_command(
            workspace,
            "best",
            "--steps",
            "10",
            "--eval-every",
            "2",
            "--best",
            "kin",
            "--lr",
            "0.05",
            "--weight-decay",
            "100",
            "--warmup",
            "10",
        )
    )
    call(train_command(workspace, "last", "--steps", "4", "--eval-every", "2"))
    for name in ("best", "last"):
        seen = bits_per_byte(workspace / name)
        step = min(seen, key=lambda k: seen[k]["kin"]) if name == "best" else 4
        assert name == "last" or 0 < step < 10
        assert about(workspace / name)["model_step"] == step
        said = f"The model is that of step {step}, the best of kin."
        assert (said in (workspace / name / "report.html").read_text()) == (name == "best")
        call(
            train_command(
                workspace, f"after-{name}", "--steps", "1", "--model", f"{workspace}/{name}/model"
            )
        )
        assert bits_per_byte(workspace / f"after-{name}")[0] == pytest.approx(seen[step], rel=1e-6)


@pytest.mark.parametrize("flags, said", [
    (["--best", "fra"], "--best fra: no held-out text of that name; there are kin, eng"),
    (["--recompute", "light"], "recompute"),
    (["--tune", "lora", "--optimizer", "adamw-bf16"], "works only where all weights are trained"),
    (["--mode", "dpo", "--neftune", "5"], "--neftune: has no effect with --mode dpo"),
    (["--lora-rank", "64"], "--lora-rank: has no effect with --tune full"),
    (["--lora-plus", "16"], "--lora-plus: has no effect with --tune full"),
    (["--beta", "0.3"], "--beta: has no effect with --mode cpt"),
    (["--beta1", "1.5"], "--beta1 1.5: must be"), (["--beta2", "1"], "--beta2 1.0: must be"),
    (["--seed", "-1"], "--seed -1: must be"),
    (["--weight-decay", "-0.1"], "--weight-decay -0.1: must be"),
    (["--warmup", "inf"], "--warmup inf: must be"),
    (["--tune", "lora", "--embedding-lr", "1e-5"],
     "--embedding-lr: has no effect without --train-embeddings"),
    (["--tune", "lora", "--lora-dropout", "5"], "--lora-dropout 5.0: must be"),
    (["--dtype", "fp8"], "--dtype fp8: needs a GPU that multiplies eight bits")])
def test_a_setting_that_cannot_be_followed_is_refused_in_one_line(workspace, flags, said):
    lines = call(train_command(workspace, "refused", *flags), code=2).strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("error: ")


@pytest.mark.parametrize("name, value", [
    ("min_lr_ratio", -1.0), ("min_lr_ratio", 3.0), ("lr", math.inf), ("epochs", math.inf),
    ("eval_every", -3), ("save_every", -3), ("lora_rank", 0), ("lora_alpha", math.nan),
    ("weight_decay", math.nan), ("plan_price", math.inf)])
def test_a_number_that_no_run_could_have_is_out_of_range(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: must be") as e:
        check_settings(Settings(**{name: value}))
    assert e.value.code == 2
    check_settings(Settings(clip=math.inf, min_lr_ratio=1.0))


def test_a_run_on_pairs_names_its_bin_as_the_bin_does(workspace):
    """Of a bin with groups too: by that a card finds the ledger."""
    lines = [f"a child {i}\tumwana {i}\n" for i in range(40)]
    (workspace / "pairs.tsv").write_text("eng\tkin\n" + "".join(lines))
    wide = tiny.folder(workspace / "wide", "llama32", max_position_embeddings=256)
    args = train_command(workspace, "mt", "--mode", "mt", "--steps", "1", "--seq-len", "256",
                         "--tokens-per-step", "512", "--model", str(wide))
    at = args.index("--data")
    call([*args[: at + 1], f"{workspace}/pairs.tsv", *args[at + 3:]])
    meta = json.loads((workspace / "mt/bins/pairs/meta.json").read_text())
    assert "groups.bin" in meta["sha256"]
    assert about(workspace / "mt")["data"] == {"pairs": meta["sha256"]["tokens.bin"]}


def test_an_adapter_goes_on_in_its_own_shape_or_is_refused(workspace):
    call(train_command(workspace, "adapter", "--steps", "2", "--tune", "lora", "--lora-rank", "4"))
    more = ["--steps", "2", "--tune", "lora", "--model", f"{workspace}/adapter/model"]
    for flags, said in ((["--lora-rank", "8"], "--lora-rank: "), (["--dora"], "--dora: "),
                        (["--train-embeddings"], "--train-embeddings: "),
                        (["--lora-targets", "q_proj"], "--lora-targets: ")):
        assert (
            said in call(train_command(workspace, "other", *more, *flags), code=2).splitlines()[-1]
        )
    call(train_command(workspace, "further", *more, "--lora-rank", "4"))
    assert json.loads((workspace / "further/model/adapter_config.json").read_text())["r"] == 4


def test_what_a_resumed_run_may_change_is_in_range_too(workspace):
    call(train_command(workspace, "ranged", "--steps", "2"))
    again = [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(workspace / "ranged")]
    for flags in (["--keep", "1"], ["--eval-tokens", "0"], ["--rank-timeout", "0"]):
        assert f"{flags[0]} {flags[1]}" in call([*again, *flags], code=2).splitlines()[-1]


def test_settings_of_a_run_are_a_recipe_for_it(workspace):
    call(train_command(workspace, "first", "--steps", "3"))
    call([sys.executable, str(ROOT / "train.py"), str(workspace / "first/settings.toml"), "--out",
          str(workspace / "again")])
    assert read_losses(workspace / "first") == read_losses(workspace / "again")


def test_the_saved_model_opens_in_transformers_and_the_adapter_in_peft_with_equal_logits(workspace):
    import peft
    import transformers

    call(train_command(workspace, "open-full", "--steps", "3"))
    call(
        train_command(workspace, "open-lora", "--steps", "3", "--tune", "lora", "--lora-rank", "4")
    )
    ids = tiny.tokens(2, 20)
    doc, pos = torch.zeros_like(ids), torch.arange(20).repeat(2, 1)
    full = transformers.AutoModelForCausalLM.from_pretrained(
        workspace / "open-full/model", dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        workspace / "tied", dtype=torch.float32
    )
    adapted = peft.PeftModel.from_pretrained(base, workspace / "open-lora/model")
    call(train_command(workspace, "open-all", "--steps", "3", *TUNES["all of LoRA"]))
    base = transformers.AutoModelForCausalLM.from_pretrained(
        workspace / "tied", dtype=torch.float32
    )
    more = peft.PeftModel.from_pretrained(base, workspace / "open-all/model")
    for peer, folder in ((full, "open-full"), (adapted, "open-lora"), (more, "open-all")):
        model, _ = load_model(workspace / folder / "model")
        with torch.no_grad():
            torch.testing.assert_close(
                model.eval()(ids, doc, pos), peer.eval()(ids).logits[:, -1], atol=1e-5, rtol=1e-5)
    moved = load_file(workspace / "open-lora/model/adapter_model.safetensors")
    assert all(x.abs().sum() > 0 for x in moved.values()), "every B has left zero"


def test_a_tied_model_with_trained_embeddings_stays_tied_everywhere_and_says_so(
    workspace, tmp_path
):
    """In memory, in the resume point, in the adapter as peft opens it, and merged."""
    import peft
    import transformers

    flags = ["--tune", "lora", "--lora-rank", "4", "--train-embeddings", "--steps", "3"]
    said = call(train_command(workspace, "tied-run", *flags))
    assert said.count("the head is tied to the embeddings") == 1
    plan = subprocess.run(
        train_command(workspace, "tied-plan", *flags, "--plan"),
        capture_output=True,
        text=True,
        env=ENV,
        cwd=ROOT,
    )
    assert "model.embed_tokens.weight (also the head, which is tied)" in plan.stdout
    name, out = "model.embed_tokens.weight", workspace / "tied-run"
    moved = load_file(out / "model/adapter_model.safetensors")[PEFT_PREFIX + name]
    assert not torch.equal(moved, load_file(workspace / "tied/model.safetensors")[name])

    model, _ = load_model(out / "model")
    assert model.lm_head is None and model.head is model.model.embed_tokens.weight
    assert torch.equal(model.head, moved) and not any("head" in k for k in model.state_dict())
    saved, _ = read_checkpoint(find_newest(out / "checkpoints"))
    assert torch.equal(saved["model"][name], moved)
    assert not any("lm_head" in k for part in saved.values() for k in part)

    base = transformers.AutoModelForCausalLM.from_pretrained(
        workspace / "tied", dtype=torch.float32
    )
    peer = peft.PeftModel.from_pretrained(base, out / "model").eval()
    weight = {k: p for k, p in peer.named_parameters(remove_duplicate=False)
              if k.endswith(("embed_tokens.modules_to_save.default.weight",
                             "lm_head.modules_to_save.default.weight"))}
    assert len(weight) == 2 and len({p.data_ptr() for p in weight.values()}) == 1
    ids = tiny.tokens(2, 20)
    with torch.no_grad():
        wanted = tiny.logits(model, ids)
        torch.testing.assert_close(peer(ids).logits, wanted, atol=1e-5, rtol=1e-5)

    call([sys.executable, str(ROOT / "export.py"), "merge", "--model", str(out / "model"), "--out",
          str(tmp_path / "merged")])
    assert "lm_head.weight" not in load_file(tmp_path / "merged/model.safetensors")
    for opened in (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
                   peer.merge_and_unload()):
        head, table = opened.get_output_embeddings().weight, opened.get_input_embeddings().weight
        assert torch.equal(head, moved) and torch.equal(table, moved)
    merged, _ = load_model(tmp_path / "merged")
    assert merged.lm_head is None
    with torch.no_grad():
        torch.testing.assert_close(tiny.logits(merged, ids), wanted, atol=1e-5, rtol=1e-5)


def test_fp16_that_overflows_at_every_step_ends_with_4_and_no_nan_is_saved(workspace):
    """Weights of which a product is beyond fp16, as a process that trains them meets them."""
    model = Path(shutil.copytree(workspace / "tied", workspace / "loud"))
    tensors = load_file(model / "model.safetensors")
    save_file({k: 2000 * x if "up_proj" in k or "gate_proj" in k else x
               for k, x in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    said = call(
        train_command(
            workspace,
            "overflow",
            "--steps",
            "20",
            "--dtype",
            "fp16",
            "--hold-out",
            "0",
            "--model",
            str(model),
        ),
        code=4,
    )
    lines = [x for x in said.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and "three steps in a row were not finite, 3 in all" in lines[0]
    assert "--dtype fp32" in lines[0]
    out = workspace / "overflow"
    steps = [x for x in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
             if "loss" in x]
    assert [(x["loss"], x["skipped"]) for x in steps] == [(None, 1), (None, 2)]
    odd = [json.loads(x) for x in (out / "odd_steps.jsonl").read_text().splitlines()]
    assert [x["step"] for x in odd] == [1, 2, 3]
    saved, state = read_checkpoint(find_newest(out / "checkpoints"))
    assert all(x.isfinite().all() for part in saved.values() for x in part.values())
    assert state["skipped"] == state["step"] and not (out / "model").exists()


def test_only_the_chosen_layers_and_embeddings_move(workspace):
    call(
        train_command(
            workspace,
            "some",
            "--steps",
            "3",
            "--train-layers",
            "1",
            "--train-embeddings",
            "--embedding-lr",
            "1e-4",
        )
    )
    before = load_file(workspace / "tied/model.safetensors")
    after = load_file(workspace / "some/model/model.safetensors")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved == {k for k in before if ".layers.1." in k or "embed_tokens" in k}
    step = (after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]).abs().max()
    assert 0 < step < 4 * 1e-4, "its own, smaller learning rate"


def test_shares_evaluations_and_samples_are_in_the_run(workspace):
    call(train_command(workspace, "look", "--steps", "16", "--eval-every", "8"))
    lines = [json.loads(x) for x in (workspace / "look/metrics.jsonl").read_text().splitlines()]
    looks = [x for x in lines if "bits_per_byte" in x]
    assert [x["step"] for x in looks] == [0, 8, 16]
    assert set(looks[0]["bits_per_byte"]) == {"kin", "eng"}
    assert all(looks[-1]["bits_per_byte"][k] < looks[0]["bits_per_byte"][k] for k in ("kin", "eng"))
    assert abs([x for x in lines if "share" in x][-1]["share"]["kin"] - 0.75) < 32 / 2000
    samples = (workspace / "look/samples.txt").read_text()
    assert samples.count("== step ") == 3 and samples.count("\n-- ") in (9, 12), (
        "two a text, if it has two")
    made = json.loads((workspace / "look/run.json").read_text())
    assert made["parameters"]["total"] == made["parameters"]["trained"] > 0
    assert set(made["data"]) == {"kin", "eng"}


def test_held_out_bits_per_byte_are_those_that_eval_prints(workspace):
    val = workspace / "val.txt"
    val.write_text("\n".join(tiny.SENTENCES[:6]) + "\n")
    call(train_command(workspace, "same", "--steps", "2", "--val", f"v={val}"))
    last = [json.loads(x)
            for x in (workspace / "same/metrics.jsonl").read_text().splitlines()
            if "bits_per" in x][-1]
    call([sys.executable, str(ROOT / "eval.py"), "--model", str(workspace / "same/model"), "--text",
          f"v={val}", "--out", str(workspace / "same-eval"), "--dtype", "fp32", "--device", "cpu"])
    result = json.loads((workspace / "same-eval/results.json").read_text())["results"][0]
    assert result["value"] == pytest.approx(last["bits_per_byte"]["v"], abs=1e-5)
    nats = result["value"] * result["bytes"] * math.log(2)
    assert last["held_out_loss"]["v"] == pytest.approx(nats / result["tokens"], abs=1e-5)


def test_held_out_loss_is_the_mean_over_tokens_that_transformers_computes(tmp_path):
    tiny.write_tokenizer(tmp_path)
    tokenizer, peer = Tokenizer.open(tmp_path), tiny.peer()
    texts = [np.array(tokenizer.encode(x)) for x in tiny.SENTENCES[:3]]
    answers = []
    for ids in texts:
        mask = np.arange(len(ids) + 1) >= len(ids) // 2  # the second half is the answer
        answers.append(Document(np.array([tokenizer.bos, *ids]), mask, 0))
    val_sets = {"text": texts, "answers": answers, "empty": [np.array([], np.int64)]}
    _, losses = measure_held_out(tiny.ours(peer), val_sets, tokenizer)

    theirs = {"text": [], "answers": []}
    for document in answers:
        ids = torch.tensor(document.ids)
        with torch.no_grad():
            logits = peer(ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        theirs["text"].append(nll)
        theirs["answers"].append(nll[torch.tensor(document.mask[1:])])
    for name, nlls in theirs.items():
        assert losses[name] == pytest.approx(float(torch.cat(nlls).mean()), abs=1e-5)
    assert math.isnan(losses["empty"])


def packed(seed: int, rows: int, T: int = 24) -> Batch:
    """Rows of several documents with uneven masks."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        row = np.zeros((4, T), np.int64)
        row[0], row[1] = draw.integers(3, tiny.V, T), draw.integers(3, tiny.V, T)
        cut = int(draw.integers(1, T))
        row[2, cut:], row[3] = 1, np.r_[np.arange(cut), np.arange(T - cut)]
        row[1][draw.random(T) < draw.random()] = IGNORE
        made.append(row)
    return Batch.of(made)


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_step_of_eight_rows_equals_two_times_four_with_uneven_masks(tune):
    batch = packed(3, 8)
    halves = [Batch(*(x[i : i + 4] for x in (batch.tokens, batch.targets, batch.doc, batch.pos)))
              for i in (0, 4)]
    results = []
    for batches in ([batch], halves):
        model = tiny.ours(tiny.peer("llama3"), "llama3")
        torch.manual_seed(0)
        if tune == "lora":
            lora.add_lora(model, 4, 8, 0.0, ["all-linear"])
        optimizer = optim.adamw(model, 1e-2, (0.9, 0.95), 0.1)
        loss, norm = train.train_step(model, NLL, batches, optimizer, ALONE, clip=1.0)
        results.append((loss, norm, {n: p.detach().clone() for n, p in model.named_parameters()}))
    (l1, n1, p1), (l2, n2, p2) = results
    assert l1 == pytest.approx(l2, rel=1e-6) and n1 == pytest.approx(n2, rel=1e-5)
    for name in p1:
        torch.testing.assert_close(p1[name], p2[name], atol=1e-5, rtol=1e-4)


def test_a_step_that_is_not_finite_moves_nothing():
    model = tiny.ours(tiny.peer())
    optimizer = optim.adamw(model, 1e-2, (0.9, 0.95), 0.1)
    bad = Objective(
        sums=lambda m, b: NLL.sums(m, b) * float("nan"), count=NLL.count)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(FloatingPointError):
        train.train_step(model, bad, [packed(0, 2)], optimizer, ALONE, clip=1.0)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not optimizer.state and all(p.grad is None for p in model.parameters())


def test_an_fp16_scale_gives_way_at_overflow_until_it_cannot_and_then_it_is_a_failure():
    model = tiny.ours(tiny.peer(), compute_dtype=torch.float16)
    optimizer = optim.adamw(model, 1e-2, (0.9, 0.95), 0.1)
    steep = Objective(  # a finite loss whose gradients are beyond fp16 at any scale
        sums=lambda m, b: NLL.sums(m, b) * 1e9, count=NLL.count)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    scale, narrow = optim.LossScale(2.0**16), []
    for _ in range(20):
        with pytest.raises(monitor.NotFinite) as fault:
            train.train_step(model, steep, [packed(0, 2)], optimizer, ALONE, 1.0, scale)
        narrow.append(fault.value.can_retry)
    assert narrow == [True] * 15 + [False] * 5 and scale.value == 2  # the third of these ends a run
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_compile_and_recompute_change_nothing_but_the_cost(recompute, compiled):
    def gradients(recompute="none", compiled=False):
        model = tiny.ours(tiny.peer("llama31"), "llama31", recompute=recompute).train()
        if compiled:
            torch._dynamo.reset()
            compile_model(model)
        for seed in (1, 2):  # another layout of documents: must not be another graph's mistake
            NLL.sums(model, packed(seed, 2)).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    plain, changed = gradients(), gradients(recompute, compiled)
    for name in plain:
        torch.testing.assert_close(plain[name], changed[name], atol=1e-4, rtol=1e-4)


def small(tune: str, dtype: torch.dtype, compute: torch.dtype | None = None) -> Llama:
    """One layer that trains with all weights or an adapter that is not zero, as a run has it; its
    products in `compute`, or in `dtype` as frozen weights."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    model = tiny.ours(tiny.peer("llama31", **shape), "llama31", compute or dtype, **shape).train()
    if tune == "full":
        return model
    for name, m in list(model.to(dtype).named_modules()) if tune == "qlora" else ():
        if nf4.fits(name, m):
            model.set_submodule(name, nf4.NF4Linear(m.weight, m.bias, double=True))
    torch.manual_seed(0)
    lora.add_lora(model, 4, 8.0, 0.0, ["all-linear"], dora=tune == "dora")
    for m in lora.adapters(model).values():
        torch.nn.init.normal_(m.lora_B.weight, std=0.1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tune", ["full", "lora", "qlora",
                                  pytest.param("dora", marks=pytest.mark.slow)])
def test_compiled_steps_are_as_exact_as_plain_ones(tune, dtype):
    """Losses and gradients beside those of products in float32, at the weights of three steps."""
    torch._dynamo.reset()
    graphs, made = torch._dynamo.utils.counters["stats"], []
    models = _, _, fast = small(tune, dtype, torch.float32), small(tune, dtype), small(tune, dtype)
    compile_model(fast)
    optimizer, batch = optim.adamw(fast, 1e-2, (0.9, 0.95), 0.1), packed(1, 2)
    for _ in range(3):
        found = []
        for m in models:
            m.zero_grad(set_to_none=True)
            nll = m(batch.tokens, batch.doc, batch.pos, batch.targets)
            nll.sum().backward()
            found.append({"loss": nll.detach(), **{
                name: p.grad for name, p in m.named_parameters() if p.requires_grad}})
        for name, truth in found[0].items():
            near, far = (tiny.apart(x[name], truth) for x in found[1:])
            assert far <= 1.5 * near + 1e-5, name
        optimizer.step()
        for m in models[:2]:
            m.load_state_dict(fast.state_dict())
        made.append(graphs["unique_graphs"])
    assert made[0] == made[-1], "what repeats is not compiled anew"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_compiled_on_a_gpu_it_is_one_graph_that_finds_the_same(tune):
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    found = []
    for compiled in (False, True):
        model = tiny.ours(tiny.peer("llama31"), "llama31", torch.bfloat16).train().cuda()
        if tune == "lora":
            torch.manual_seed(0)
            lora.add_lora(model, 4, 8.0, 0.0, ["all-linear"])
            for m in lora.adapters(model).values():
                torch.nn.init.normal_(m.lora_B.weight, std=0.1)
        if compiled:
            compile_model(model)
        before = graphs["unique_graphs"]
        for seed in (1, 2, 3):  # the third has other numbers of documents and of trained tokens
            NLL.sums(model, packed(seed, 2).to("cuda")).backward()
            made = graphs["unique_graphs"] - before
        found.append([p.grad for p in model.parameters() if p.requires_grad])
        assert made <= (0, 4)[compiled]  # a block and the loss, each of one size and of any
    for a, b in zip(*found, strict=True):
        assert tiny.apart(b, a) < 3e-2


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_products_train_float32_weights(workspace, dtype):
    call(
        train_command(
            workspace, f"dtype-{dtype}", "--steps", "12", "--lr", "1e-2", "--dtype", dtype
        )
    )
    seen = read_losses(workspace / f"dtype-{dtype}")
    assert seen[12] < seen[1] - 0.2
    saved = load_file(workspace / f"dtype-{dtype}/model/model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}


def test_tensorboard_holds_the_numbers_of_metrics_jsonl(workspace):
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    call(train_command(workspace, "board", "--steps", "4", "--track", "tensorboard"))
    events = loading.EventAccumulator(str(workspace / "board/tensorboard"))
    events.Reload()
    assert [x.value for x in events.Scalars("loss")] == pytest.approx(
        list(read_losses(workspace / "board").values()), rel=1e-6)
    assert len(events.Scalars("bits_per_byte/kin")) >= 2


@pytest.mark.parametrize("mode", ["sft", "dpo"])
def test_mfu_is_of_all_tokens_of_documents_and_the_logits_of_those_that_are_trained(
    workspace, monkeypatch, tmp_path, mode
):
    """A step's time and the peak are taken out again."""
    from preparation.bin_writer import BinWriter
    from tokenization.document import Document

    monkeypatch.setattr(train, "peak_flops", lambda device: 1e9)  # a CPU has no known peak
    draw, sha = np.random.default_rng(0), Tokenizer.open(workspace / "tied").fingerprint
    kind, masks = {"sft": ("chat", {"all": None, "half": [0] * 6 + [1] * 5}),
                   "dpo": ("pairs", {"half": [0] * 6 + [1] * 5})}[mode]
    for name, mask in masks.items():
        writer = BinWriter(tmp_path / name, sha, tiny.V, kind)
        for _ in range(42):  # whole rows
            writer.add(Document([1, *draw.integers(3, tiny.V, 10).tolist()], mask, 11))
        writer.close({}, [])
        words = train_command(
            workspace,
            f"mfu-{mode}-{name}",
            "--mode",
            mode,
            "--steps",
            "2",
            "--tune",
            "lora",
            "--lora-rank",
            "4",
            "--hold-out",
            "0",
            "--prompts",
            "Umugore",
        )[2:]
        at = words.index("--data")
        words[at + 1 : at + 3] = [str(tmp_path / name)]
        assert train.train(*read_settings(words)) == 0
        model, _ = load_model(workspace / "tied")
        lora.add_lora(model, 4, 8.0, 0.0, ["all-linear"])
        work = model.flops_per_token(10) + (mode == "dpo") * model.flops_per_token(10, False)
        head = (4 + 2 * (mode == "dpo")) * model.head.numel()  # an untrained token has no logits
        lines = [json.loads(x) for x in
                 (workspace / f"mfu-{mode}-{name}/metrics.jsonl").read_text().splitlines()]
        one, two = (x for x in lines if "mfu" in x)
        documents = 4 * (3 if mode == "sft" else 2)  # in four rows of 32, of 10 predictions each
        assert one["tokens"] == documents * (10 if name == "all" else 5)
        for x, trained in ((one, one["tokens"]), (two, two["tokens"] - one["tokens"])):
            seconds = trained / x["tokens_per_second"]
            done = documents * 10 * work - (documents * 10 - trained) * head
            assert x["mfu"] * 1e9 * seconds == pytest.approx(done, rel=1e-2)


def test_documents_packed_into_a_row_cost_less_attention_than_one_that_fills_it():
    ids = tiny.tokens(1, 24)
    one = Batch(ids, ids, torch.zeros_like(ids), torch.arange(24)[None])
    two = Batch(ids, ids, torch.arange(24)[None] // 12, torch.arange(24)[None] % 12)
    tail = Batch(ids, ids, two.doc.where(two.doc == 0, -1), two.pos)
    assert [token_counts(x) for x in (one, two, tail)] == [(24, 576), (24, 288), (12, 144)]


def test_the_plan_says_what_it_takes_and_writes_no_run(workspace):
    done = subprocess.run(
        train_command(workspace, "plan", "--steps", "7", "--plan", "--seq-len", "64"),
        capture_output=True,
        text=True,
        env=ENV,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    answer = [line[:12].strip() for line in done.stdout.splitlines()[:7]]
    assert answer == ["plan", "memory", "", "time", "disk", "data", "steps"]
    for word in ("plan         fits", "steps        7 of 128 tokens", "parameters", "minutes"):
        assert word in done.stdout
    changed = done.stdout.split("settings that differ")[1].split("\nmachine")[0]
    assert re.search(r"seq-len +64 +flag", changed) and "weight-decay" not in changed
    assert any(s in done.stdout for s in tiny.SENTENCES), "the first row stands there to be read"
    assert not (workspace / "plan/metrics.jsonl").exists()


@pytest.mark.parametrize("words, flag", [(["train.py"], "--tokens-per-step"),
                                         (["prepare.py", "text"], "--without")])
def test_help_answers_at_once(words, flag):
    """prepare.py's workers begin with the same imports."""
    command = [str(ROOT / words[0]), *words[1:], "--help"]
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0 and flag in done.stdout
    imported = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True,
                              text=True, env=ENV).stderr
    assert "torch" not in imported, (
        f"torch was imported for --help ({time.perf_counter() - begun:.1f} s)")


BAD = {"an unknown flag": (["--stepps", "3"], 2, "did you mean steps"),
       "a flag of a wrong type": (["--steps", "three"], 2, "--steps"),
       "a row too short": (["--seq-len", "1"], 2, "seq-len"),
       "a row too long": (["--seq-len", "128"], 2, "context is 64"),
       "tokens that are no whole micro-batches": (["--tokens-per-step", "100"], 2,
                                                  "no multiple of 64"),
       "no such model": (["--model", "nowhere"], 3, "nowhere"),
       "no such data": (["--data", "nowhere.txt"], 3, "nowhere.txt"),
       "a weight below zero": (["--data", "x.txt:-1"], 2, "above 0"),
       "an unknown target": (["--tune", "lora", "--lora-targets", "q_pro"], 2, "q_proj"),
       "a rank too high": (["--tune", "lora", "--lora-rank", "999"], 2, "rank"),
       "no such layer": (["--tune", "lora", "--lora-layers", "0-7"], 2, "expected 0 to 1"),
       "layers that are no range": (["--train-layers", "3-1"], 2, "0-7 or 30"),
       "DoRA on embeddings": (["--tune", "lora", "--dora", "--lora-targets", "embed_tokens"], 2,
                              "--train-embeddings"),
       "a base that is quantised": (["--tune", "full", "--model", "QUANTISED"], 3,
                                    "quantization_config"),
       "a flag that says nothing": (["--dora"], 2, "--dora"),
       "four bits with all weights": (["--double-quant"], 2, "--double-quant"),
       "bf16 AdamW on an adapter": (["--tune", "lora", "--optimizer", "adamw-bf16"], 2,
                                    "adamw or adamw8bit"),
       "one checkpoint kept": (["--keep", "1"], 2, "keep"),
       "a held-out text without a name": (["--val", "val.txt"], 2, "NAME=SPEC"),
       "no GPU": (["--device", "cuda"], 2, "--device cpu")}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(workspace, name):
    flags, code, word = BAD[name]
    flags = [str(workspace / "quantised") if x == "QUANTISED" else x for x in flags]
    said = call(train_command(workspace, "bad", "--steps", "2", *flags), code=code)
    lines = [x for x in said.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and word in lines[0] and "Traceback" not in said
    assert not (workspace / "bad/metrics.jsonl").exists()


def test_a_folder_that_cannot_be_written_is_refused(workspace):
    (workspace / "file").write_text("not a folder")
    assert "cannot be written" in call(train_command(workspace, "file/out", "--steps", "2"), code=2)


def test_a_bin_of_another_tokenizer_is_refused(workspace, tmp_path):
    from preparation.bin_writer import BinWriter
    from tokenization.document import Document

    writer = BinWriter(tmp_path / "other", "f" * 64, 100)
    writer.add(Document([1, 5, 6, 2], None, 3))
    writer.close({}, [])
    assert "tokenizer" in call(
        train_command(workspace, "other", "--data", str(tmp_path / "other")), code=3
    )


@pytest.fixture(scope="module")
def stopped(workspace) -> Path:
    """A run of 6 steps whose last checkpoint is that of step 3."""
    call(train_command(workspace, "stopped", "--steps", "6", "--save-every", "3"))
    shutil.rmtree(workspace / "stopped/checkpoints/step-000006")
    shutil.rmtree(workspace / "stopped/model")
    return workspace / "stopped"


def test_resume_refuses_other_flags_and_other_data_and_takes_free_ones(workspace, stopped):
    again = [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(stopped)]
    assert "lr was 0.001, now 0.01" in call([*again, "--lr", "0.01"], code=2)
    kin = workspace / "kin"
    kin.rename(workspace / "aside")
    prepare_text([str(workspace / "eng.txt")], workspace / "tied", kin)
    assert "the data are not those" in call(again, code=3)
    shutil.rmtree(kin)
    (workspace / "aside").rename(kin)
    before = read_losses(stopped)
    call(
        [*again, "--rows", "4", "--eval-every", "2"]
    )  # the same tokens a step, in one micro-batch less
    after = read_losses(stopped)
    assert after.keys() == before.keys() and all(
        after[k] == pytest.approx(before[k], rel=1e-5) for k in after)


def test_resume_without_a_run_says_so(tmp_path):
    said = call(
        [sys.executable, str(ROOT / "train.py"), "--resume", "--out", str(tmp_path / "none")],
        code=3)
    assert "holds no run" in said


def test_every_setting_is_fixed_or_free_on_resume_and_is_read_somewhere():
    names = {f.name for f in dataclasses.fields(Settings)}
    assert CAN_CHANGE_ON_RESUME <= names
    files = {ROOT / "train.py", *(ROOT / "training").glob("*.py")}
    files -= {ROOT / "training/settings.py"}
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [n for n in names if f"s.{n}" not in code and f"settings.{n}" not in code] == []


def test_two_ranks_train_as_one(workspace):
    """torchrun with two real processes gives the losses of one, and writes the run once."""
    call(train_command(workspace, "one-rank", "--steps", "6"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "2"]
    call([*launcher, *train_command(workspace, "two-ranks", "--steps", "6")[1:]])
    one, two = read_losses(workspace / "one-rank"), read_losses(workspace / "two-ranks")
    assert one.keys() == two.keys() and all(one[k] == pytest.approx(two[k], rel=1e-5) for k in one)
    assert (workspace / "two-ranks/model/model.safetensors").exists()


def test_the_seed_model_learns_from_nothing(tmp_path):
    from tokenization.tokenizer import Tokenizer

    tiny.write_tokenizer(tmp_path / "tok")
    tokenizer = Tokenizer.open(tmp_path / "tok")
    shape = ModelConfig(tokenizer.vocab_size, 32, 64, 2, 4, 2, 8, max_position_embeddings=64)
    init_from_config(shape, tokenizer, tmp_path / "seed", seed=1)
    model, _ = load_model(tmp_path / "seed")
    assert isinstance(model, Llama) and model.config == shape
    init_from_config(shape, tokenizer, tmp_path / "twin", seed=1)
    twin, _ = load_model(tmp_path / "twin")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_bins_are_prepared_once_and_prepared_again_when_the_text_changed(workspace):
    data = ["--data", f"{workspace}/kin.txt", "--steps", "1"]
    call(train_command(workspace, "bins", *data))
    first = Bin(workspace / "bins/bins/kin").meta
    text = (workspace / "kin.txt").read_text()
    try:
        (workspace / "kin.txt").write_text(text + "Umwana mushya yaje.\n")
        said = call(train_command(workspace, "bins", *data, "--plan"))
        assert ("preparing" in said
                and Bin(workspace / "bins/bins/kin").meta["documents"] == first["documents"] + 1)
        assert "preparing" not in call(train_command(workspace, "bins", *data, "--plan"))
    finally:
        (workspace / "kin.txt").write_text(text)


def test_origins_are_told(tmp_path):
    (tmp_path / "r.toml").write_text("lr = 1e-4\nsteps = 5\n")
    settings, origins = config.read(
        Settings, [str(tmp_path / "r.toml"), "--steps", "7"], "train.py")
    assert (settings.lr, settings.steps) == (1e-4, 7)
    assert (origins["lr"].endswith("r.toml") and origins["steps"] == "flag"
            and origins["seed"] == "default")


def test_old_settings_that_name_a_removed_one_are_read_where_it_had_no_effect(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    text = config.to_toml(Settings(out=str(out), lr=3e-4))
    (out / "settings.toml").write_text(text + "ema = 0.0\nlabel_smoothing = 0.0\n")
    settings, _ = read_settings(["--resume", "--out", str(out)])
    assert settings.lr == 3e-4
    for line in ("ema = 0.999", "label_smoothing = 0.1"):
        (out / "settings.toml").write_text(f"{text}{line}\n")
        message = f"{line}: this setting was removed; commit 53f4a60"
        with pytest.raises(UserError, match=re.escape(message)):
            read_settings(["--resume", "--out", str(out)])


@pytest.mark.parametrize("old, new", [
    ({"recompute": True, "recompute_light": False}, "full"),
    ({"recompute": False, "recompute_light": True}, "selective"),
    ({"recompute": False, "recompute_light": False, "label_smoothing": 0.0}, "none"),
    ({"recompute": "selective"}, "selective")])
def test_settings_of_older_runs_are_read_by_todays_names(old, new):
    assert upgrade_settings(old) == {"recompute": new}
