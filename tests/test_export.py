"""Merging against peft, checking against planted faults, cards against files, and the hub's
protocol."""

from __future__ import annotations

import base64
import dataclasses
import http.server
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import peft
import pytest
import safetensors.torch as st
import torch
import transformers
import yaml

import export
from checkpoints.huggingface import load_model
from checkpoints.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_config
from checkpoints.peft_adapter import adapter_state, save_adapter
from checkpoints.safetensors_header import INDEX_FILE
from helpers import tiny
from reports.model_card import results_section
from runtime import console
from runtime.console import FLAGS, STORAGE, UserError
from runtime.paths import ROOT

IDS = tiny.tokens(2, 24)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def pair(path: Path, shape: str = "llama31", kind: dict | None = None, **more,
         ) -> tuple[Path, Path]:
    """A base, and an adapter that peft made on it; `kind` goes into peft's LoraConfig."""
    base = tiny.folder(path / "base", shape, **more)
    torch.manual_seed(3)
    peer = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto"),
        peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False,
                        task_type="CAUSAL_LM", **(kind or {})))
    peer.save_pretrained(path / "adapter")
    return base, path / "adapter"


def merge(adapter: Path, out: Path, **more) -> Path:
    export.merge(export.Merge(str(adapter), str(out), **more))
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by safetensors' own reader."""
    return {k: x for f in sorted(folder.glob("model*.safetensors"))
            for k, x in st.load_file(f).items()}


def pefts(base: Path, adapter: Path) -> transformers.PreTrainedModel:
    """What peft itself merges, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def refusal(call, *args, **more) -> UserError:
    with pytest.raises(UserError) as e:
        call(*args, **more)
    assert "\n" not in str(e.value)
    return e.value


# merge

@pytest.mark.parametrize("shape, sharded", [("llama31", False), ("llama31", True),
                                            ("llama32", True), ("qwen2", False), ("gemma2", True)])
def test_a_merge_is_pefts_in_tensors_and_logits_and_laid_out_like_the_base(
        tmp_path, capsys, shape, sharded):
    base, adapter = pair(tmp_path, shape, sharded=sharded)
    before = {f.name: f.read_bytes() for f in base.iterdir()}
    out = merge(adapter, tmp_path / "out")
    peer, mine = pefts(base, adapter), tensors(out)
    state = peer.state_dict()
    if shape in ("llama32", "qwen2", "gemma2"):
        del state["lm_head.weight"]
    assert mine.keys() == state.keys()
    for k, x in mine.items():
        torch.testing.assert_close(x, state[k], atol=1e-6, rtol=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, peer(IDS).logits, atol=1e-6, rtol=1e-6)
    assert {f.name for f in out.iterdir()} == {f.name for f in base.iterdir()} | {"merge.json"}
    assert len(list(base.glob("model-*-of-*"))) > 2 or not sharded
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    if sharded:
        one, two = (json.loads((f / INDEX_FILE).read_text()) for f in (base, out))
        assert one["weight_map"] == two["weight_map"]
        assert one["metadata"]["total_size"] == two["metadata"]["total_size"]
    assert before == {f.name: f.read_bytes() for f in base.iterdir()}, "the base is as it was"
    said = capsys.readouterr().out.split("its base: ")[1]
    assert float(said.split(",")[0]) < 1e-4


@pytest.mark.skipif(not hasattr(export.lora.LoRALinear, "merged"), reason="plain LoRA only")
@pytest.mark.parametrize("shape, kind", [
    ("llama31", {"use_rslora": True}), ("llama31", {"use_dora": True}),
    ("llama31", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama31", {"layers_to_transform": [1]})], ids=str)
def test_other_kinds_of_adapter_merge_as_in_peft(tmp_path, shape, kind):
    base, adapter = pair(tmp_path, shape, kind, sharded=True)
    found = st.load_file(adapter / ADAPTER_WEIGHTS)
    for k in found:
        if "embed_tokens" in k or "lm_head" in k:
            found[k] = found[k] + 0.1
    st.save_file(found, adapter / ADAPTER_WEIGHTS)
    state = pefts(base, adapter).state_dict()
    mine, plain = tensors(merge(adapter, tmp_path / "out")), tensors(base)
    assert mine.keys() == state.keys()
    for k, x in mine.items():
        torch.testing.assert_close(x, state[k], atol=2e-6, rtol=0)
    assert sum(not torch.equal(x, plain[k]) for k, x in mine.items()) >= 3


@pytest.mark.parametrize("dtype, kind", [("keep", torch.bfloat16), ("fp16", torch.float16),
                                         ("fp32", torch.float32)])
def test_a_narrow_base_is_summed_in_float32_and_rounded_once(tmp_path, dtype, kind):
    base, adapter = pair(tmp_path, dtype=torch.bfloat16, sharded=True)
    out = merge(adapter, tmp_path / "out", dtype=dtype)
    plain, deltas = tensors(base), st.load_file(adapter / "adapter_model.safetensors")
    changed = 0
    for k, x in tensors(out).items():
        name = f"base_model.model.{k.removesuffix('.weight')}"
        wanted = plain[k].float()
        if f"{name}.lora_A.weight" in deltas:
            A, B = (deltas[f"{name}.lora_{x}.weight"].float() for x in "AB")
            wanted = wanted + 4.0 * (B @ A)
            changed += 1
        assert x.dtype == kind and torch.equal(x, wanted.to(kind)), k
    assert changed == 6
    words = json.loads((out / "config.json").read_text())
    assert words.get("dtype", words.get("torch_dtype")) == str(kind)[6:]


def test_the_adapters_tokenizer_wins_whole(tmp_path):
    base, adapter = pair(tmp_path)
    (base / "added_tokens.json").write_text("{}")
    (base / "chat_template.jinja").write_text("of the base {{ eos_token }}")
    (base / "LICENSE").write_text("as is")
    assert load_model(merge(adapter, tmp_path / "a"))[1].vocab_size == tiny.V  # the base's
    tiny.write_tokenizer(adapter)
    words = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps({**words, "own": 1}))
    out = merge(adapter, tmp_path / "b")
    assert json.loads((out / "tokenizer_config.json").read_text())["own"] == 1
    assert not (out / "added_tokens.json").exists()
    assert (out / "chat_template.jinja").exists() and (out / "LICENSE").exists()


def test_what_is_merged_opens_in_transformers_without_a_word(tmp_path):
    _, adapter = pair(tmp_path, "llama32", sharded=True)
    out = merge(adapter, tmp_path / "out", compare=False)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        peer, info = transformers.AutoModelForCausalLM.from_pretrained(
            out, dtype="auto", output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    assert not said and not any(info.values()), (said, info)
    with torch.no_grad():
        torch.testing.assert_close(tiny.logits(load_model(out)[0], IDS), peer.eval()(IDS).logits,
                                   atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", ["circle", "long", "below a file", "not UTF-8"])
def test_an_out_that_cannot_be_written_is_refused_before_the_merge(tmp_path, place):
    base, adapter = pair(tmp_path)
    out = {"circle": tmp_path / "circle", "long": tmp_path / ("x" * 300),
           "below a file": base / "config.json/x",
           "not UTF-8": Path(os.fsdecode(os.fsencode(tmp_path) + b"/o\xff"))}[place]
    if place == "circle":
        out.symlink_to(out)
    entries = sorted(tmp_path.iterdir())
    assert refusal(merge, adapter, out).code == STORAGE
    assert sorted(tmp_path.iterdir()) == entries


def test_an_adapter_is_merged_once_and_another_may_follow(tmp_path):
    base, adapter = pair(tmp_path)
    out = merge(adapter, tmp_path / "out", compare=False)
    (out / "README.md").write_text("mine")
    assert (merge(adapter, out, compare=False) / "README.md").read_text() == "mine"
    words = json.loads((adapter / "adapter_config.json").read_text())

    def on(name: str, base: Path, change: float) -> Path:
        folder = Path(shutil.copytree(adapter, tmp_path / name))
        text = json.dumps({**words, "base_model_name_or_path": str(base)})
        (folder / "adapter_config.json").write_text(text)
        found = {k: x + change for k, x in st.load_file(folder / ADAPTER_WEIGHTS).items()}
        st.save_file(found, folder / ADAPTER_WEIGHTS)
        return folder

    same = on("same", out, 0.0)
    shutil.copyfile(adapter / ADAPTER_WEIGHTS, same / ADAPTER_WEIGHTS)
    e = refusal(merge, same, tmp_path / "twice")
    assert "already merged" in str(e) and not (tmp_path / "twice").exists()
    (out / "merge.json").rename(tmp_path / "aside")  # who wrote the adapter here knows it anyway
    mine = tmp_path / "mine"
    save_adapter(load_model(adapter)[0], mine, base=base, source=base)
    assert "other weights" in str(refusal(merge, on_again(mine, out), tmp_path / "twice"))
    (tmp_path / "aside").rename(out / "merge.json")
    both = merge(on("next", out, 0.1), tmp_path / "both", compare=False)
    assert len(export.read_merge_record(both)) == 2
    assert "already merged" in str(refusal(merge, on_again(same, both), tmp_path / "x"))


def on_again(adapter: Path, base: Path) -> Path:
    """The same adapter's file, on another base."""
    file = adapter / "adapter_config.json"
    words = json.loads(file.read_text())
    file.write_text(json.dumps({**words, "base_model_name_or_path": str(base)}))
    return adapter


def test_what_cannot_be_merged_is_refused_in_one_line(tmp_path):
    base, adapter = pair(tmp_path)
    assert "no adapter_config.json" in str(refusal(merge, base, tmp_path / "out"))
    for place in (base, adapter):
        assert refusal(merge, adapter, place).code == FLAGS
    other = tiny.folder(tmp_path / "other", "llama31", hidden_size=64)
    e = str(refusal(merge, on_again(Path(shutil.copytree(adapter, tmp_path / "b")), other),
                    tmp_path / "out"))
    assert "belongs to another base" in e
    chained = on_again(Path(shutil.copytree(adapter, tmp_path / "c")), adapter)
    assert "is an adapter itself" in str(refusal(merge, chained, tmp_path / "out"))
    extra = Path(shutil.copytree(adapter, tmp_path / "d"))
    found = st.load_file(extra / ADAPTER_WEIGHTS)
    name = next(k for k in found if "layers.1." in k)
    found[name.replace("layers.1.", "layers.7.")] = found[name].clone()
    st.save_file(found, extra / ADAPTER_WEIGHTS)
    assert "layers.7." in str(refusal(merge, extra, tmp_path / "out"))
    found = {k: x * 1e6 for k, x in st.load_file(adapter / ADAPTER_WEIGHTS).items()}
    st.save_file(found, adapter / ADAPTER_WEIGHTS)
    assert "float16" in str(
        refusal(merge, adapter, tmp_path / "out", dtype="fp16", compare=False))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp*"))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
def test_merging_a_base_in_shards_takes_a_part_of_its_memory(tmp_path):
    base = tmp_path / "base"
    words = tiny.config("llama2", hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
                        num_attention_heads=8, torch_dtype="bfloat16")
    base.mkdir()
    (base / "config.json").write_text(json.dumps(words))
    with torch.device("meta"):
        model = export.Llama(read_config(base))
    shapes = {k: p.shape for k, p in model.named_parameters()}
    where = {k: f"model-0000{int(k.split('.')[2]) + 1 if 'layers' in k else 1}-of-00008.safetensors"
             for k in shapes}
    for file in set(where.values()):
        st.save_file({k: torch.empty(shapes[k], dtype=torch.bfloat16).uniform_(-0.02, 0.02)
                      for k in shapes if where[k] == file}, base / file)
    (base / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    size = sum(f.stat().st_size for f in base.glob("*.safetensors")) / 2**20
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj", "down_proj"]}))
    export.lora.add_lora(model, 4, 8.0, 0.0, ["q_proj", "up_proj", "down_proj"])
    st.save_file({k: torch.randn(x.shape) * 0.01
                  for k, x in adapter_state(model).items()},
                 adapter / ADAPTER_WEIGHTS)
    code = f"""if True:
        import re, export, torch
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
        torch.randn(512, 512) @ torch.randn(512, 512)
        with torch.device("meta"):  # the code for this is as large as the model
            export.Llama(export.read_config(export.Path({str(base)!r})))
        before = peak()
        export.merge(export.Merge({str(adapter)!r}, {str(tmp_path / "out")!r}, compare=False))
        print((peak() - before) / 1024)
    """
    # what is held, not what glibc keeps of what was freed: that varies from run to run
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"})
    assert done.returncode == 0, done.stderr
    print(f"{size:.0f} MiB of weights, {done.stdout.split()[-1]} MiB more at the peak")
    assert size > 150 and float(done.stdout.split()[-1]) < 0.5 * size
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 8


# check

def checked(folder: Path, capsys) -> tuple[int, str]:
    """Exit code and what is said."""
    code = 0
    try:
        export.check(export.Check(str(folder)))
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().out


def change(folder: Path, file: str, **words) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **words}))


def edit(folder: Path, do) -> None:
    path = min(folder.glob("*.safetensors"))
    found = st.load_file(path)
    do(found)
    st.save_file({k: x.clone() for k, x in found.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("shape", ["llama31", "llama32", "gemma2"])
def test_a_good_folder_and_a_good_adapter_have_no_cross(tmp_path, capsys, shape):
    base, adapter = pair(tmp_path, shape, sharded=True)
    for folder in (base, adapter):
        code, said = checked(folder, capsys)
        assert code == 0 and "✗" not in said and said.count("✓") == 9, said
        assert "continuation: " in said


FAULTS = {
    "nan": (lambda f: edit(f, lambda x: x["model.norm.weight"].__setitem__(3, float("nan"))),
            "✗ numbers: model.norm.weight"),
    "missing": (lambda f: edit(f, lambda x: x.pop("model.layers.1.mlp.up_proj.weight")),
                "✗ tensors: model.layers.1.mlp.up_proj.weight missing"),
    "shape": (lambda f: edit(f, lambda x: x.__setitem__("model.norm.weight", torch.ones(7))),
              "✗ shapes: model.norm.weight (7,)"),
    "untied": (lambda f: edit(f, lambda x: x.__setitem__("lm_head.weight", torch.ones(tiny.V, 32))),
               "✗ head: tied, and its copy in the file is another"),
    "stop": (lambda f: change(f, "generation_config.json", eos_token_id=[2, tiny.V]),
             "✗ stop ids"),
    "not eos": (lambda f: change(f, "generation_config.json", eos_token_id=1), "✗ stop ids: [1]"),
    "none": (lambda f: (change(f, "generation_config.json", eos_token_id=None),
                        change(f, "config.json", eos_token_id=None)), "✗ stop ids: []"),
    "vocabulary": (lambda f: (
        edit(f, lambda x: x.update({"model.embed_tokens.weight": x[
            "model.embed_tokens.weight"][:300]})), change(f, "config.json", vocab_size=300)),
        "✗ vocabulary: 300 in config.json, 300 embeddings, the tokenizer's 320 ids are used up to "
        "319"),
    "no end": (lambda f: template(f, "{{ bos_token }}{{ messages[1].content }}"),
               "✗ chat template: ends a turn with no control token, which is no stop id"),
    "no tokens": (lambda f: (change(f, "tokenizer_config.json", add_bos_token=False),
                             template(f, "{{ messages[1].content }}")),
                  "✗ chat template: ends a turn with no control token, which is no stop id"),
    "no BOS": (lambda f: template(f, "{{ messages[0].content }}</s>"),
               "✗ chat template: writes BOS 0 times"),
    "twice BOS": (lambda f: template(f, "<s>{{ bos_token }}{{ eos_token }}"),
                  "✗ chat template: writes BOS 2 times"),
    "another end": (lambda f: (change(f, "tokenizer_config.json", added_tokens_decoder={
        "320": {"content": "<|im_end|>", "special": True}}),
        template(f, "<s>{{ messages[0].content }}<|im_end|>")),
        "✗ chat template: <|im_end|> is beyond the vocabulary"),
    "broken template": (lambda f: template(f, "{% if %}"), "✗ chat template: "),
}


def template(folder: Path, source: str) -> None:
    (folder / "chat_template.jinja").write_text(source)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_has_its_cross(tmp_path, capsys, fault):
    folder = tiny.folder(tmp_path / "m", "llama32")
    plant, cross = FAULTS[fault]
    plant(folder)
    code, said = checked(folder, capsys)
    assert code == 3 and cross in said, said


@pytest.mark.parametrize("source", [
    "{{ bos_token }}{{ messages[1].content }}{{ eos_token }}",
    "<s>{{ messages[1].content }}</s>\n"])
def test_a_template_that_ends_its_turns_is_good_and_a_broken_folder_is_one_line(
        tmp_path, capsys, source):
    folder = tiny.folder(tmp_path / "m", "llama32")
    change(folder, "tokenizer_config.json", chat_template=source)
    code, said = checked(folder, capsys)
    assert code == 0 and "✓ chat template: ends a turn with </s>" in said
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert "truncated" in str(refusal(export.check, export.Check(str(folder))))
    assert "no such folder" in str(refusal(export.check, export.Check(str(tmp_path / "none"))))


# card

@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder as train.py leaves it: settings, metrics, a bin, a model."""
    out = tmp_path / "run"
    base = tiny.folder(tmp_path / "base" / "model")
    shutil.copytree(base, out / "model")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (out / "bins" / "kin").mkdir(parents=True)
    ledger = {"documents": {"read": 55291, "kept": 55139, "duplicate": 152},
              "bytes": {"read": 12749818, "kept": 12719284, "duplicate": 30534}, "changes": {}}
    (out / "bins/kin/meta.json").write_text(json.dumps(
        {"tokens": 3593584, "documents": 55139, "ledger": ledger, "sha256": {"tokens.bin": "ab"}}))
    (out / "settings.toml").write_text(f'data = ["/secret/kin.txt"]\nout = "{out}"\n')
    (out / "run.json").write_text(json.dumps({
        "commit": "c0ffee", "device": "CPU", "dtype": "float32", "model": str(base), "steps": 20,
        "data": {"kin": "ab", "gone": "cd"},
        "changed_settings": {"data": ["/secret/kin.txt"], "lr": 5e-4, "lora_targets": ["q|v"]}}))
    lines = [{"step": 0, "bits_per_byte": {"kin": 4.40197, "eng": 3.04}},
             {"step": 20, "tokens": 81920, "share": {"kin": 0.75, "gone": 0.25}},
             {"step": 20, "bits_per_byte": {"kin": 2.40197, "eng": 3.10}}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"ste')
    (tmp_path / "results.json").write_text(json.dumps({"model": str(out / "model"), "results": [
        {"suite": "text:kin", "metric": "bits_per_byte", "value": 2.345678, "low": 2.1, "high": 2.5,
         "n": 1234, "signature": "unit:line|start:bos", "partial": False}]}))
    return out


def card(folder: Path, **more) -> tuple[dict, str]:
    """The front matter, and the text below it."""
    export.card(export.Card(str(folder), **more))
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_card_holds_what_the_files_say_and_no_path(run, tmp_path):
    front, text = card(run / "model", run=str(run), results=[str(tmp_path / "results.json")])
    assert front == {"language": ["rw", "en"], "license": "apache-2.0",
                     "library_name": "transformers", "pipeline_tag": "text-generation",
                     "tags": ["kinyarwanda_ft_llm"]}
    for fact in ("| kin | 55,291 | 55,139 | 152 | 12,749,818 | 12,719,284 | 30,534 | 3,593,584 | "
                 "0.7500 |", "The ledger of gone no longer exists", "| lr | 0.0005 |", "c0ffee",
                 "81,920 trained tokens", "| kin | 4.4020 | 2.4020 |", "| eng | 3.0400 | 3.1000 |",
                 "| text:kin | - | bits_per_byte | 2.3457 | 2.1000 to 2.5000 | 1,234 |",
                 "Its base is base, a local folder, commit unknown", "## Limits", "sample.py",
                 "AutoModelForCausalLM.from_pretrained"):
        assert fact in text, f"{fact}\n{text}"
    assert "secret" not in text and str(tmp_path) not in text
    assert r"q\|v" in text
    assert checked_hub_card(run / "model/README.md")


def test_a_card_says_which_figure_is_which_and_what_is_known_of_the_tests(run, tmp_path):
    one = {"metric": "acc", "value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "signature": "s",
           "partial": False}
    found = {"model": "m", "results": [
        {"suite": "flores", **one, "part": "eng-kin", "prompt": "1"},
        {"suite": "flores", **one, "part": "kin-eng", "prompt": "1", "partial": True},
        {"suite": "flores", **one, "part": "kin-eng", "prompt": "mean", "prompts": 3},
        {"suite": "agreement", **one, "part": "", "prompt": "1", "group": "class 7"},
        {"suite": "xnli", **one, "part": "", "prompt": "5", "aside": "its labels | are swapped"}]}
    file = tmp_path / "found.json"

    def section(**more) -> str:
        file.write_text(json.dumps({**found, **more}))
        return results_section(file)

    text = section()
    for fact in ("| flores | eng-kin 1 | acc |", "| flores (PARTIAL) | kin-eng 1 | acc |",
                 "| flores | kin-eng mean of 3 | acc |", "| agreement | 1 class 7 | acc |",
                 r"| xnli | 5\* | acc |", r"\* not in the mean: xnli, prompt 5: its labels \| are",
                 "PARTIAL: only the first items", "Contamination: not known"):
        assert fact in text, f"{fact}\n{text}"
    assert text.count("(PARTIAL)") == 1
    summary, _, signatures = text.split("<details>")
    assert [x.split(" | ")[:2] for x in summary.splitlines() if "0.5000" in x] == [
        ["| flores", "eng-kin 1"], ["| flores", "kin-eng mean of 3"]]
    assert "(acc): s\n" in signatures
    tests = {"flores": {"items": 1012, "whole": 3, "run": 2, "any": 4},
             "xnli": {"items": 600, "whole": 0, "run": 0, "any": 0}}
    *_, last = section(
        contamination={"read": [str(run)], "gone": [f"{run}/x"], "tests": tests}).splitlines()
    assert last == (
        "Contamination: 4 of 1,012 items of flores (3 whole, 2 by a run of words) are in the "
        "training text; none found of xnli; 1 source(s) of it could not be read, or only in part.")
    *_, last = section(
        contamination={"read": [], "gone": [f"{run}/x"], "tests": {}}).splitlines()
    assert "not known" in last and "none found" not in last and str(run) not in last


def test_a_card_tells_what_became_of_each_document_and_what_is_cut_is_not_left_out(run):
    """By a bin as prepare.py chat --too-long cut leaves it."""
    file = run / "bins/kin/meta.json"
    meta = json.loads(file.read_text())
    meta["ledger"]["documents"] = {"read": 60, "kept": 40, "cut": 10, "duplicate": 3,
                                   "contaminated": 5, "masked": 2}
    meta["ledger"]["bytes"] = {"read": 600, "kept": 400, "cut": 100, "duplicate": 30,
                               "contaminated": 50, "masked": 20}
    file.write_text(json.dumps(meta))
    text = card(run / "model", run=str(run))[1]
    assert "| kin | 60 | 50 | 3 | 600 | 500 | 30 |" in text
    assert "10 that were kept of kin are cut to fit a row." in text
    assert "Also left out of kin: 5 contaminated, 2 masked." in text


def test_a_card_of_a_run_that_keeps_its_best_says_what_that_one_measured(run):
    lines = [{"step": 10, "bits_per_byte": {"kin": 2.01, "eng": 3.07}}]
    whole = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([whole[0], json.dumps(lines[0]), *whole[1:3]]))
    about = json.loads((run / "run.json").read_text())
    changed = {**about.get("changed_settings", {}), "best": "kin"}
    (run / "run.json").write_text(json.dumps(
        {**about, "model_step": 10, "changed_settings": changed}))
    text = card(run / "model", run=str(run))[1]
    assert "The model is that of step 10, the best that was evaluated." in text
    assert "| kin | 4.4020 | 2.0100 |" in text and "| eng | 3.0400 | 3.0700 |" in text


def checked_hub_card(file: Path) -> bool:
    """Whether huggingface_hub reads the card as the hub does."""
    from huggingface_hub import ModelCard

    return ModelCard.load(file).data.language == ["rw", "en"]


def test_a_persons_readme_stays_unless_forced_and_our_own_is_replaced(run):
    folder = run / "model"
    (folder / "README.md").write_text("# Mine\n")
    e = refusal(export.card, export.Card(str(folder)))
    assert e.code == STORAGE and (folder / "README.md").read_text() == "# Mine\n"
    card(folder, force=True)
    front, text = card(folder, language=["rw"], licence="mit")
    assert front["license"] == "mit" and front["language"] == ["rw"]
    assert "made without a run" in text


def test_an_adapters_card_names_its_base_commit_and_licence(tmp_path):
    repo = tmp_path / "models--org--name" / "snapshots"
    _, adapter = pair(tmp_path)
    base = repo / "0123abcd"
    repo.mkdir(parents=True)
    shutil.move(tmp_path / "base", base)
    (base / "LICENSE.txt").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n")
    on_again(adapter, base)
    (adapter / "README.md").unlink()  # an empty form, by peft
    front, text = card(adapter)
    assert front["base_model"] == "org/name" and front["license"] == "llama3.2"
    assert front["library_name"] == "peft" and "rank 4" in text and "commit 0123abcd" in text
    assert "AutoPeftModelForCausalLM" in text
    out = merge(adapter, tmp_path / "out", compare=False)
    front, text = card(out)
    assert front["base_model"] == "org/name" and "commit 0123abcd" in text
    assert front["license"] == "llama3.2" and "1 LoRA adapter(s) were merged" in text
    change(adapter, "adapter_config.json", base_model_name_or_path="nobody/knows")
    front, text = card(adapter)
    assert front["license"] == "other" and "licence is not known here" in text


def test_a_card_from_what_is_no_run_or_no_result_is_refused(run, tmp_path):
    for more, says in (({"run": str(tmp_path)}, "no run.json"),
                       ({"results": [str(run / "run.json")]}, "not as eval.py writes it"),
                       ({"results": ["none.json"]}, "cannot be read"),
                       ({"licence": "a b"}, "--licence")):
        assert says in str(refusal(export.card, export.Card(str(run / "model"), **more)))
    assert not (run / "model/README.md").exists()
    assert not list((run / "model").glob("*.tmp"))


# push

class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as create_repo, repo_info and upload_folder need; all files are small."""

    seen: ClassVar[dict] = {}

    def log_message(self, *_) -> None:
        pass

    def answer(self, words: dict, status: int = 200) -> None:
        body = json.dumps(words).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if "private" not in self.seen:
            self.answer({"error": "Repository not found"}, 404)
            return
        self.answer({"id": "org/name", "_id": "1", "private": self.seen["private"], "sha": "a" * 40,
                     "siblings": [], "tags": [], "downloads": 0, "likes": 0})

    def do_POST(self) -> None:
        n = self.headers.get("Content-Length")
        if n is None:  # in chunks
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(n))
        self.seen["token"] = self.headers.get("Authorization")
        if self.seen.get("status"):
            self.answer({"error": f"no, {self.headers.get('Authorization')}"}, self.seen["status"])
        elif self.path == "/api/repos/create":
            self.seen["created"] = json.loads(body)
            self.seen.setdefault("private", self.seen["created"]["visibility"] == "private")
            url = f"http://{self.headers['Host']}/org/name"
            self.answer({"url": url, "name": "org/name", "id": "1"})
        elif "/preupload/" in self.path:
            files = [x["path"] for x in json.loads(body)["files"]]
            self.answer({"files": [{"path": x, "uploadMode": "regular", "shouldIgnore": False}
                                   for x in files]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                x = json.loads(line)
                if x["key"] == "file":
                    self.seen["files"][x["value"]["path"]] = base64.b64decode(x["value"]["content"])
            url = f"http://{self.headers['Host']}/org/name/commit/{'b' * 40}"
            self.answer({"commitUrl": url,
                         "commitOid": "b" * 40, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})


@pytest.fixture
def hub():
    """A small hub on this machine; what it was given lies in `seen`."""
    handler = type("Own", (Hub,), {"seen": {"files": {}}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.seen
    server.shutdown()
    server.server_close()


@pytest.fixture
def push(hub, monkeypatch, capsys, tmp_path):
    """`export.py push` to that hub; gives its exit code and all that is said."""
    for name, value in (("HF_HUB_OFFLINE", False), ("HF_TOKEN_PATH", str(tmp_path / "no-token")),
                        ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def call(folder: Path, url: str = hub[0], token: str = "hf_geheim123", **more):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        monkeypatch.setenv("HF_TOKEN", token)
        code = 0
        try:
            console.run(lambda: export.push(export.Push(str(folder), "org/name", **more)))
        except SystemExit as e:
            code = e.code
        said = "".join(capsys.readouterr())
        assert not token or token not in said
        return code, said

    return call


def test_a_push_shows_sends_and_stays_private(hub, push, tmp_path, monkeypatch):
    seen = hub[1]
    folder = tiny.folder(tmp_path / "m")
    (folder / "notes.txt").write_text("not for the hub")
    code, said = push(folder)
    assert code == FLAGS and "--yes" in said and not seen["files"] and "created" not in seen
    assert "model.safetensors" in said and "to org/name, private" in said
    code, said = push(folder, yes=True)
    assert code == 0, said
    assert seen["created"]["visibility"] == "private" and seen["token"] == "Bearer hf_geheim123"
    assert seen["files"] == {
        f.name: f.read_bytes() for f in folder.iterdir() if f.name != "notes.txt"}
    assert "not uploaded: notes.txt" in said and "commit/bbbb" in said
    seen.update(private=False, files={})
    code, said = push(folder, yes=True)
    assert code == FLAGS and "public" in said and not seen["files"]
    assert push(folder, yes=True, public=True)[0] == 0 and seen["files"]
    seen["files"] = {}
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _: "n")
    assert "nothing was uploaded" in push(folder, public=True)[1] and not seen["files"]
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert push(folder, public=True)[0] == 0 and seen["files"]


def test_each_way_a_push_can_fail_is_one_line(hub, push, tmp_path, monkeypatch):
    seen = hub[1]
    folder = tiny.folder(tmp_path / "m")
    for status, says in ((401, "token is not valid"), (403, "may not write"), (404, "no such org"),
                         (400, "answered 400")):
        seen["status"] = status
        code, said = push(folder, yes=True)
        assert code == STORAGE and says in said, said
        assert sum(x.startswith("error: ") for x in said.splitlines()) == 1
    code, said = push(folder, url="http://127.0.0.1:9", yes=True)
    assert code == STORAGE and "cannot be reached" in said
    code, said = push(folder, token="", yes=True)
    assert code == FLAGS and "no token" in said
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, said = push(folder, yes=True)
    assert code == STORAGE and "HF_HUB_OFFLINE" in said
    assert not seen["files"]


def test_a_push_of_what_is_no_folder_or_to_no_name_is_refused(tmp_path):
    folder = tiny.folder(tmp_path / "m")
    good = export.Push(str(folder), "org/name")
    for bad in (dataclasses.replace(good, repo="name"), dataclasses.replace(good, model="org/x")):
        assert refusal(export.push, bad).code == FLAGS
    secret = tmp_path / "secret"
    secret.write_text("x")
    (folder / "LICENSE").symlink_to(secret)
    assert "outside" in str(refusal(export.push, good))
