"""A command of prepare.py tries --out before it reads its input, and loses no other file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import prepare
from data import Bin
from helpers import tiny
from preparation.bin_writer import BIN_FILES
from runtime.console import STORAGE, UserError
from runtime.output_paths import try_output_file

GOOD = {
    "text": ("good.txt", "\n".join(tiny.SENTENCES * 3)),
    "chat": ("chat.jsonl", json.dumps({"messages": [{"role": "user", "content": "a"},
                                                    {"role": "assistant", "content": "b"}]})),
    "mt": ("mt.tsv", "eng\tkin\nhello\tmuraho"),
    "pairs": ("pairs.jsonl", json.dumps({"prompt": "a", "chosen": "b c", "rejected": "d"})),
    "prefer": ("samples.jsonl", "\n".join(
        json.dumps({"prompt": "a", "text": text, "prompt_number": 1}) for text in ("aa bb", "z"))),
    "vocab": ("good.txt", "\n".join(tiny.SENTENCES * 3)),
}
BINS = ("text", "chat", "mt", "pairs")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("outputs") / "model")


@pytest.fixture
def prepare_into(model, tmp_path) -> Callable[..., None]:
    def run(command: str, out: Path | str, damaged: bool = False) -> None:
        """Prepare a few rows; `damaged`: from a file that is refused when it is read."""
        name, content = GOOD[command]
        file = tmp_path / name
        file.write_bytes(b"\xff\xfe{\n" * 9 if damaged else content.encode() + b"\n")
        settings_class, action = prepare.COMMANDS[command]
        settings = settings_class(files=[str(file)], out=str(out), **(
            {} if command in ("prefer", "vocab") else {"tokenizer": str(model)}))
        if command == "chat":
            settings.template = "plain"
        if command == "prefer":
            (tmp_path / "references.txt").write_text("aa bb\n")
            settings.references = str(tmp_path / "references.txt")
        if command == "vocab":
            settings.size = 300
        action(settings)

    return run


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file/out"


def circle(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "out")
    return folder / "out"


REFUSED = {
    "below a file": below_a_file,
    "links in a circle": circle,
    "a name that is too long": lambda folder: folder / ("x" * 300),
    "a folder that cannot be made": lambda folder: Path("/proc/none/out"),
}


@pytest.mark.parametrize("place", REFUSED)
@pytest.mark.parametrize("command", GOOD)
def test_an_out_that_cannot_be_written_is_refused_before_anything_is_read(
        prepare_into, tmp_path, command, place):
    folder = tmp_path / "place"
    folder.mkdir()
    out = REFUSED[place](folder)
    entries = sorted(folder.iterdir())
    with pytest.raises(UserError, match="cannot be written") as e:
        prepare_into(command, out, damaged=True)
    assert e.value.code == STORAGE and "\n" not in str(e.value)
    assert sorted(folder.iterdir()) == entries


@pytest.mark.parametrize("command", BINS)
def test_a_bin_that_holds_another_file_is_not_replaced(prepare_into, tmp_path, command):
    out = tmp_path / "bin"
    prepare_into(command, out)
    assert {x.name for x in out.iterdir()} <= BIN_FILES
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"'notes\.txt', which .* would be lost") as e:
        prepare_into(command, out, damaged=True)
    assert e.value.code == STORAGE and (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    prepare_into(command, out)
    Bin(out)


@pytest.mark.parametrize("command", GOOD)
@pytest.mark.parametrize("target", ["missing", "old"])
def test_an_out_that_is_a_link_is_written_where_the_link_leads(
        prepare_into, tmp_path, command, target):
    real, out = tmp_path / "disk/real", tmp_path / "out"
    real.parent.mkdir()
    if target == "old":
        prepare_into(command, real)
    out.symlink_to(real)
    prepare_into(command, out)
    assert out.is_symlink() and real.exists()
    assert [x.name for x in real.parent.iterdir()] == ["real"]
    if command in BINS:
        Bin(out)


def test_a_file_in_place_of_a_tokenizers_folder_is_refused_before_the_text_is_read(
        prepare_into, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        prepare_into("vocab", tmp_path / "out", damaged=True)
    (tmp_path / "folder/tokenizer.model").mkdir(parents=True)
    with pytest.raises(UserError, match="Is a directory"):
        prepare_into("vocab", tmp_path / "folder", damaged=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_trying_a_file_leaves_it_as_it_was(tmp_path):
    (tmp_path / "old").write_text("mine")
    for name in ("old", "new"):
        try_output_file(tmp_path / name)
    assert [(x.name, x.read_text()) for x in tmp_path.iterdir()] == [("old", "mine")]
    try_output_file("/dev/stdout")
