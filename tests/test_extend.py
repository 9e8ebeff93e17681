"""The examples of docs/extend.md, applied to a copy of the code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from helpers import tiny
from runtime.paths import ROOT

PAGE = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
LOGITS = """
import sys, torch
from checkpoints.huggingface import load_model
from helpers import tiny
model, _ = load_model(sys.argv[1], tokenizer=False)
torch.save(tiny.logits(model, torch.arange(3, 40)[None]), sys.argv[2])
"""


def section(title: str) -> list[tuple[str, str]]:
    """The blocks of a section: (language, text)."""
    text = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of the code, with a tiny model and the reader's files."""
    code = tmp_path / "code"
    shutil.copytree(ROOT, code, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "docs", "out", "goldens", "bench"))
    tiny.folder(code / "MODEL", "llama32", max_position_embeddings=512)
    pairs = list(zip(tiny.SENTENCES[5:], tiny.SENTENCES[:5], strict=True))
    rows = [f"{eng} {i}\t{other} {i}" for i in range(20) for eng, other in pairs]
    (code / "pairs-lug.tsv").write_text("\n".join(["eng\tlug", *rows]) + "\n")
    (code / "eng.txt").write_text("\n".join(tiny.SENTENCES[5:]) + "\n")
    (code / "program.po").write_text("".join(
        f'msgid "{eng}"\nmsgstr "{kin}"\n\n' for eng, kin in pairs))
    (code / "DIR").mkdir()
    (code / "DIR/animals.jsonl").write_text("".join(
        json.dumps({"word": word, "label": label}) + "\n" for word, label in
        (("inka", "animal"), ("intebe", "thing"), ("ihene", "animal"), ("igitabo", "thing"))))
    return code


def apply(code: Path, blocks: list[tuple[str, str]]) -> None:
    """Write or change the files that blocks name."""
    for language, text in blocks:
        if language == "bash":
            continue
        first, _, rest = text.partition("\n")
        match = re.fullmatch(r"# (\S+?)(?:, (after|before) the line: (.*))?", first)
        path, where, anchor = code / match[1], match[2], match[3]
        if where is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(rest, encoding="utf-8")
            continue
        source = path.read_text(encoding="utf-8")
        assert source.count(f"\n{anchor}\n") == 1, f"{match[1]}: no single line {anchor!r}"
        lines = f"{anchor}\n{rest}" if where == "after" else f"{rest}{anchor}\n"
        path.write_text(source.replace(f"{anchor}\n", lines), encoding="utf-8")


def run(code: Path, blocks: list[tuple[str, str]]) -> str:
    """Run the commands of a section; what they print."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = ""
    for language, text in blocks:
        if language == "bash":
            text = text.replace("train.py ", "train.py --steps 2 --seq-len 256 --rows 2 ")
            done = subprocess.run(["bash", "-ec", text], cwd=code, env=env, capture_output=True,
                                  text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
            printed += done.stdout
    return printed


def test_another_language_is_a_folder(copy):
    blocks = section("Another language")
    apply(copy, blocks)
    assert len(run(copy, blocks).splitlines()) >= 5  # a translation for each line
    prompt = json.loads((copy / "out/lug/model/prompt.json").read_text())["translate"][0]
    assert prompt["languages"] == {"eng": "English", "lug": "Luganda"}
    program = ("from languages.language import identifier_for as f\n"
               "print(f(['eng', 'lug'])('Abantu baali mu kibuga era nga bangi.'), "
               "f(['eng', 'kin'])('Abana babiri bagiye ku ishuri.'))")
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert done.stdout.split() == ["lug", "kin"], done.stderr


def test_another_family_is_a_row_and_gives_the_logits_of_transformers(copy):
    apply(copy, section("Another model family"))
    config = transformers.GemmaConfig(
        vocab_size=tiny.V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, max_position_embeddings=128)
    peer = transformers.GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.normal_(0.0, 0.2 if "norm" not in name else 0.1)
    peer.save_pretrained(copy / "gemma")
    done = subprocess.run([sys.executable, "-c", LOGITS, "gemma", "logits.pt"], cwd=copy,
                          env={**os.environ, "PYTHONPATH": f"{copy}:{copy / 'tests'}"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = peer(torch.arange(3, 40)[None]).logits
    torch.testing.assert_close(torch.load(copy / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


def test_another_form_of_data_is_a_reader(copy):
    blocks = section("Another form of data")
    apply(copy, blocks)
    printed = run(copy, blocks)
    assert "10 documents" in printed and tiny.SENTENCES[0] in printed, printed


def test_another_suite_is_a_toml_file(copy):
    blocks = section("Another suite")
    apply(copy, blocks)
    run(copy, blocks)
    results = json.loads((copy / "out/animals/results.json").read_text())["results"]
    assert results[0]["suite"] == "animals" and results[0]["n"] == 4
