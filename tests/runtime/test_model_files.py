"""Files of a model's folder: what is opened, and what is refused in one line."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from runtime.console import UserError
from runtime.model_files import (
    copy_model_file,
    has_model_file,
    open_model_file,
    read_model_file,
    read_model_json,
    read_model_json_if_present,
    read_model_text,
    size_limit,
)


def put_entry(path, kind):
    """Put a FIFO, a socket, a folder or a link to a device or out of the folder at `path`."""
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(kind)


KINDS = ["FIFO", "socket", "folder", "/dev/zero", "/dev/stdin", "/dev/tty", "/proc/self/environ",
         "/etc/passwd", "../outside.json", "config.json", "nowhere", "../link.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_regular_file_of_the_folder_is_refused_at_once(tmp_path, monkeypatch, kind):
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "outside.json").write_text("{}")
    (tmp_path / "link.json").symlink_to("m/config.json")
    monkeypatch.chdir(folder)  # a socket's path has at most 108 bytes
    put_entry(Path("config.json"), kind)
    begin = time.perf_counter()
    with pytest.raises(UserError, match=r"config\.json") as e:
        open_model_file(folder, "config.json")
    assert time.perf_counter() - begin < 1 and "\n" not in str(e.value)
    assert has_model_file(folder, "config.json")


def test_an_unreadable_file_is_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"cannot be read .Permission denied"):
        open_model_file(tmp_path, "config.json")


@pytest.mark.parametrize("name", [
    "", ".", "..", "../x.json", "/etc/passwd", "a/b", "a\\b", "a\0b", "a\nb", "x" * 256, 3, None,
    "\udcff"])
def test_a_name_that_is_not_a_plain_file_name_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="leads outside the model folder"):
        open_model_file(tmp_path, name)


def test_names_with_spaces_brackets_and_letters_of_any_language_are_opened(tmp_path):
    for name in ("LICENSE (1).txt", "Uruhushya rw’u Rwanda.txt", "NOTICE [ç]"):
        (tmp_path / name).write_text("x", encoding="utf-8")
        assert read_model_text(tmp_path, name) == "x"


def test_a_link_within_the_folder_is_followed_and_copied_as_a_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_text("x")
    (tmp_path / "LICENSE").symlink_to("sub/a")
    copy_model_file(tmp_path, "LICENSE", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "x" and not (tmp_path / "copy").is_symlink()


def hub_cache(root, repo="models--org--name"):
    """A snapshot as the hub's cache has it, whose config.json is a link to a blob."""
    snapshot, blobs = root / repo / "snapshots" / "abc", root / repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1234").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    return snapshot


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = hub_cache(tmp_path)
    assert read_model_json(snapshot, "config.json") == {"a": 1}
    (tmp_path / "moved").symlink_to(snapshot)
    assert read_model_json(tmp_path / "moved", "config.json") == {"a": 1}


def test_other_links_out_of_a_snapshot_are_refused(tmp_path):
    snapshot = hub_cache(tmp_path)
    other = hub_cache(tmp_path, "models--org--other")
    (snapshot / "a.json").symlink_to(other / "config.json")
    (snapshot / "b.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "models--org--name" / "blobs" / "5678")
    (snapshot / "c.json").symlink_to("../../blobs/5678")
    (tmp_path / "plain" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "plain" / "blobs").symlink_to(tmp_path / "models--org--name" / "blobs")
    (tmp_path / "plain" / "snapshots" / "abc" / "a.json").symlink_to("../../blobs/1234")
    for folder, name in ((snapshot, "a.json"), (snapshot, "b.json"), (snapshot, "c.json"),
                         (tmp_path / "plain" / "snapshots" / "abc", "a.json")):
        with pytest.raises(UserError, match=name):
            open_model_file(folder, name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "LICENSE",
                                  "tokenizer.model", "tokenizer_config.json", "prompt.json",
                                  "model.safetensors.index.json", "adapter_config.json"])
def test_a_file_that_is_too_large_for_its_kind_is_refused_without_being_read(tmp_path, name):
    with open(tmp_path / name, "wb") as file:
        file.truncate(1 << 40)  # no bytes are stored
    with pytest.raises(UserError, match=f"{name}: 1048576 MB, expected at most"):
        read_model_file(tmp_path, name)
    with open(tmp_path / name, "wb") as file:
        file.truncate(size_limit(name))
    assert len(read_model_file(tmp_path, name)) == size_limit(name)


def test_a_file_that_says_its_size_is_0_is_read_up_to_the_limit(tmp_path):
    # files of /proc say so; here a whole folder of them is taken for a model
    assert read_model_file(Path("/proc/self"), "cmdline")


def test_weights_have_no_limit_of_size(tmp_path):
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(1 << 40)
    open_model_file(tmp_path, "model.safetensors").close()


def test_text_that_is_not_utf8_and_json_that_is_not_an_object_are_one_line(tmp_path):
    (tmp_path / "LICENSE").write_bytes(b"\xff")
    (tmp_path / "config.json").write_bytes(b"[]")
    with pytest.raises(UserError, match="LICENSE: not UTF-8 at byte 0"):
        read_model_text(tmp_path, "LICENSE")
    with pytest.raises(UserError, match=r"config\.json: a JSON list"):
        read_model_json(tmp_path, "config.json")
    assert read_model_json_if_present(tmp_path, "prompt.json") == {}
    os.mkfifo(tmp_path / "prompt.json")
    with pytest.raises(UserError, match=r"prompt\.json: a FIFO"):
        read_model_json_if_present(tmp_path, "prompt.json")
