"""Every block of commands in README.md and docs/ runs, with a tiny model and small files.

A block that is not run has a comment before it that says why: <!-- not run: REASON -->. Models that
a page names by hub id are replaced by a tiny folder, and what an earlier block would have made
(a run, an adapter, an evaluation) by a small one.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import pytest
import sacrebleu

import eval
import export
import prepare
import sample
import train
from helpers import fork, tiny
from runtime.paths import ROOT

# docs/extend.md changes the code: tests/test_extend.py runs it on a copy.
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))
                        if path.name != "extend.md")]
COMMAND = re.compile(r"\s*(python3?|torchrun|pip|git|srun|ollama)\s")
INPUTS = ("--model", "--tokenizer", "--tokenizers", "--run", "--results", "--baseline")
TRAIN_FLAGS = ["--seq-len", "256", "--rows", "1", "--tokens-per-step", "512", "--steps", "2",
               "--eval-every", "1000", "--eval-tokens", "200", "--device", "cpu", "--dtype", "fp32"]
FLAGS = {
    "sample.py": ["--max-new-tokens", "16", "--device", "cpu", "--dtype", "fp32"],
    "eval.py": ["--limit", "2", "--device", "cpu", "--dtype", "fp32"],
}
# A forked command need not import these and their modules.
IMPORTED = (train, sample, eval, prepare, export, matplotlib.figure, sacrebleu)
TYPED = "Muraho\n/quit\n"  # into a conversation


@dataclass
class Block:
    """A block of shell commands: its page, the line where it begins, why it is not run."""

    page: str
    line: int
    text: str
    reason: str


def blocks_of(page: str) -> list[Block]:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    blocks, start, reason = [], None, ""
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            if start is None and line.strip():
                match = re.fullmatch(r"<!-- not run: (.+) -->", line.strip())
                reason = match[1] if match else ""
            continue
        if start is None:
            start, language = number, line[3:]
            continue
        text = "\n".join(lines[start : number - 1])
        if language == "bash":
            blocks.append(Block(page, start + 1, text, reason))
        else:
            assert not any(map(COMMAND.match, text.splitlines())), \
                f"{page}, line {start}: a block of commands begins with ```bash"
        start, reason = None, ""
    return blocks


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command."""
    text = block.text.replace("\\\n", " ")
    commands = []
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            commands.append(words[: words.index("&&")])
            words = words[words.index("&&") + 1 :]
        commands.append(words)
    return [words for words in commands if words]


class Workspace:
    """A folder in which the commands of a page run."""

    def __init__(self, folder: Path, templates: Path, block: str = ""):
        self.folder, self.templates, self.block = folder, templates, block
        shutil.copytree(templates / "files", folder, dirs_exist_ok=True)
        (folder / "recipes").symlink_to(ROOT / "recipes")
        self.model = templates / "model"

    def add_bins(self, bins: Path) -> None:
        shutil.copytree(bins, self.folder / "bins")

    def run(self, words: list[str], where: str) -> None:
        """Run one command; it must end with exit code 0."""
        if words[0] == "torchrun":
            program = ["torchrun", *words[1:]]
            program[program.index("--nproc-per-node") + 1] = "2"
            at = next(i for i, word in enumerate(program) if word.endswith(".py"))
            args = self.arguments("train.py", program[at + 1 :])
            self.run_process([f"{Path(sys.executable).parent}/torchrun", *program[1:at],
                              str(ROOT / "train.py"), *args], where)
            return
        assert words[0] == "python", f"{where}: {words[0]} is not run; give the reason in a comment"
        if words[1] == "-m":
            self.run_process([sys.executable, *words[1:]], where)
            return
        program = words[1]
        command = f"{program} {words[2]}" if program in ("prepare.py", "export.py") else program
        self.run_fork(program, self.arguments(command, words[2:]), where)

    def arguments(self, command: str, words: list[str]) -> list[str]:
        """The arguments with models replaced, and with flags that make the command small."""
        args = list(words)
        for i, word in enumerate(args):
            if word == "MODEL":
                args[i] = str(self.model)
            elif i and args[i - 1] in INPUTS and not self.is_made(args[i - 1], word):
                args[i] = self.stand_in(args[i - 1], word)
        if command != "train.py":
            return args + FLAGS.get(command, [])
        if "--resume" in args:
            out = self.folder / args[args.index("--out") + 1]
            if not out.exists():
                shutil.copytree(self.templates / "lora", out)
            return args
        settings: dict = {}
        for word in args:
            if word.endswith(".toml"):
                settings |= tomllib.loads((self.folder / word).read_text(encoding="utf-8"))
        if "--model" not in args and not (self.folder / settings.get("model", ".")).exists():
            args += ["--model", str(self.model)]
        if "--plan-for" in args:
            return args
        args += TRAIN_FLAGS
        if "--lora-rank" in args or "lora_rank" in settings:
            args += ["--lora-rank", "8"]
        return args

    def is_made(self, flag: str, word: str) -> bool:
        """Whether an earlier command of the block made what a flag names."""
        path = self.folder / word
        return (path / "run.json").exists() if flag == "--run" else path.exists()

    def stand_in(self, flag: str, word: str) -> str:
        """The small model, run or evaluation that stands for one that an earlier page makes."""
        if not word.startswith("out/"):
            return str(self.model)
        if flag == "--run":
            source = self.templates / "lora"
        elif flag in ("--results", "--baseline"):
            source = self.templates / "results.json"
        elif f"export.py merge --model {word}" in self.block:
            source = self.templates / "lora/model"
        else:
            source = self.model
        target = self.folder / word
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        return word

    def run_fork(self, program: str, args: list[str], where: str) -> None:
        """Run a program in a forked child: what a process costs is the import of torch."""
        said = self.folder / "output.txt"

        def action() -> None:
            os.chdir(self.folder)
            (self.folder / "typed.txt").write_text(TYPED)
            os.dup2(os.open(self.folder / "typed.txt", os.O_RDONLY), 0)
            sys.stdin = open(0, encoding="utf-8")
            sys.argv = [program, *args]
            runpy.run_path(str(ROOT / program), run_name="__main__")

        (code,) = fork.ends([fork.child(action, said)])
        assert code == 0, f"{where}: {shlex.join([program, *args])}\n{said.read_text()[-3000:]}"

    def run_process(self, words: list[str], where: str) -> None:
        line = " ".join(word if word in (">", "|") else shlex.quote(word) for word in words)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(["bash", "-c", line], cwd=self.folder, env=env, capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == 0, f"{where}: {line}\n{done.stderr[-3000:]}"


def write_files(folder: Path) -> None:
    """The files that pages name as the reader's own."""
    kin, eng = tiny.SENTENCES[:5], tiny.SENTENCES[5:]

    def numbered(sentences: list[str], n: int) -> list[str]:
        return [f"{sentence} {i}" for i in range(n) for sentence in sentences]

    def write(name: str, lines: list[str]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write_jsonl(name: str, rows: list[dict]) -> None:
        write(name, [json.dumps(row, ensure_ascii=False) for row in rows])

    pairs = list(zip(numbered(kin, 12), numbered(eng, 12), strict=True))
    for language, sentences in (("kin", kin), ("eng", eng)):
        write(f"{language}.txt", numbered(sentences, 12))
        write(f"val_{language}.txt", [f"{sentence} Ejo." for sentence in sentences])
        write_jsonl(f"{language}/a.jsonl", [{"text": x} for x in numbered(sentences, 15)])
    write_jsonl("rwwiki.jsonl", [{"text": x} for x in numbered(kin, 10)])
    write("pairs.tsv", ["eng\tkin", *(f"{e}\t{k}" for k, e in pairs)])
    chats = [{"messages": [{"role": "user", "content": e}, {"role": "assistant", "content": k}]}
             for k, e in pairs]
    write_jsonl("chats.jsonl", chats)
    write_jsonl("eng.jsonl", [{"prompt": e} for _, e in pairs])
    write_jsonl("asked.jsonl", [{"messages": chat["messages"][:1]} for chat in chats[:3]])
    write("votes.tsv", ["prompt\tbest\tworst", "1\t1\t2", "2\t3\t1", "3\t2\t4"])
    write_jsonl("preferences.jsonl", [{"prompt": e, "chosen": k, "rejected": k + " oya"}
                                      for k, e in pairs])
    for language in ("eng", "kin"):
        rows = [{"instruction": e, "input": "", "output": k} for k, e in pairs]
        write(f"alpaca-{language}.json", [json.dumps(rows, ensure_ascii=False)])
    for language, sentences in (("kin", kin), ("eng", eng)):
        write(f"DIR/flores200/devtest.{language}.txt", sentences)
    write("DIR/flores200/dev_subset_from_sib200.tsv",
          ["kin\teng", *(f"{k} 9\t{e} 9" for k, e in zip(kin, eng, strict=True))])
    topics = ["science/technology", "travel", "politics", "sports", "health"]
    write("DIR/sib200/sib200_kin_eng.tsv", ["sib_split\tcategory\tkin\teng", *(
        f"{split}\t{topic}\t{k} {split}\t{e} {split}" for split in ("test", "dev")
        for topic, k, e in zip(topics, kin, eng, strict=True))])


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> Path:
    """A tiny model, the reader's files, and a LoRA run with its evaluation."""
    root = tmp_path_factory.mktemp("docs")
    tiny.folder(root / "model", "llama32", max_position_embeddings=1024)
    write_files(root / "files")
    (root / "work").mkdir()
    workspace = Workspace(root / "work", root)
    workspace.run(shlex.split("python train.py --model MODEL --data kin.txt --tune lora "
                              "--out lora"), "the LoRA run")
    shutil.move(root / "work/lora", root / "lora")
    workspace.run(shlex.split("python eval.py --model MODEL --text kin=val_kin.txt --out eval"),
                  "the evaluation")
    shutil.move(root / "work/eval/results.json", root / "results.json")
    return root


@pytest.fixture(scope="module")
def bins(templates) -> Path:
    """The bins that docs/data.md makes, and two more that recipes name."""
    folder = templates / "data"
    folder.mkdir()
    workspace = Workspace(folder, templates)
    for block in blocks_of("docs/data.md"):
        run_block(block, workspace)
    for name in ("code", "math"):
        workspace.run(shlex.split(f"python prepare.py text eng.txt --tokenizer MODEL "
                                  f"--out bins/{name}"), name)
    return folder / "bins"


def run_block(block: Block, workspace: Workspace) -> None:
    for words in commands_of(block):
        workspace.run(words, f"{block.page}, line {block.line}")


@pytest.mark.parametrize("block", [
    pytest.param(block, id=f"{block.page}-{block.line}") for page in PAGES
    for block in blocks_of(page) if not block.reason and page != "docs/data.md"])
def test_a_block_of_commands_runs(block, templates, bins, tmp_path):
    workspace = Workspace(tmp_path, templates, block.text)
    workspace.add_bins(bins)
    run_block(block, workspace)


def test_the_commands_of_the_page_on_data_make_the_bins_that_recipes_name(bins):
    made = {path.name for path in bins.iterdir()}
    for recipe in (ROOT / "recipes").glob("*.toml"):
        for source in tomllib.loads(recipe.read_text(encoding="utf-8"))["data"]:
            name = source.removeprefix("bins/").partition(":")[0]
            assert name in made or name == "pairs", f"{recipe.name}: {source}"


@pytest.mark.parametrize("page", PAGES)
def test_a_block_that_is_not_run_says_why(page):
    for block in blocks_of(page):
        if block.reason:
            assert len(block.reason.split()) >= 2, f"{page}, line {block.line}"
