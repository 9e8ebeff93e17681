"""Files whose names are not UTF-8 are refused before the work, and numbers that make no sense."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import prepare
from preparation.readers import list_files
from runtime import flags
from runtime.console import FLAGS, UserError


def test_a_file_whose_name_is_not_utf_8_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "good.txt").write_text("Amazi\n")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("Inka\n")
    with pytest.raises(UserError, match="not UTF-8") as e:
        list_files([str(tmp_path)])
    str(e.value).encode()  # the message itself can be printed


@pytest.mark.parametrize("words", [["--shots", "-1"], ["--join", "0"], ["--max-ratio", "-1"],
                                   ["--processes", "0"], ["--max-tokens", "-1"]], ids=" ".join)
def test_numbers_below_the_smallest_sensible_one_are_refused(words):
    with pytest.raises(UserError, match=words[0]) as e:
        flags.read(prepare.Mt, ["x.tsv", "--tokenizer", "t", "--out", "o", *words], "prepare.py mt")
    assert e.value.code == FLAGS
