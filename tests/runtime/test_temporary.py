"""Temporary names: what killed writers left is removed, and what living writers hold stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoints.atomic_write import replace_folder
from helpers.fork import quiet_child
from runtime import temporary
from runtime.paths import ROOT
from runtime.temporary import (
    NAME,
    Temporary,
    remove_leftovers,
    set_aside,
    temporary_path,
    write_text,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def dead_pid() -> int:
    pid = quiet_child(lambda: None)
    os.waitpid(pid, 0)
    return pid


def names(folder: Path) -> list[str]:
    return sorted(x.name for x in folder.iterdir())


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_living_writer_keeps_its_temporary_and_a_killed_one_loses_it(tmp_path, is_folder):
    read, write = os.pipe()

    def hold() -> None:
        Temporary(tmp_path / "target", folder=is_folder)
        os.write(write, b"1")
        time.sleep(60)

    pid = quiet_child(hold)
    os.read(read, 1)
    (name,) = names(tmp_path)
    assert NAME.fullmatch(name)["target"] == "target" and NAME.fullmatch(name)["pid"] == str(pid)
    write_text(tmp_path / "other", "text")
    assert names(tmp_path) == [name, "other"]
    kill(pid)
    write_text(tmp_path / "other", "text")
    assert names(tmp_path) == ["other"]


def test_a_pid_that_lives_again_protects_no_leftover(tmp_path):
    for pid in (1, os.getppid(), os.getpid()):  # each exists, and holds no lock
        host = temporary_path(tmp_path / "x").name[-12:-8]
        (tmp_path / f".tmp-x-{pid}-{host}00000000").mkdir()
        old = tmp_path / f".tmp-x-{pid}"
        old.mkdir()
        os.utime(old, (1e9, 1e9))  # written before the process of today started
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_on_a_disk_without_locks_the_pid_and_its_start_decide(tmp_path, monkeypatch):
    monkeypatch.setattr(temporary, "_lock", lambda path, wait: None)
    host = temporary_path(tmp_path / "x").name[-12:-8]
    alive, reused, dead = (tmp_path / f".tmp-{name}-{pid}-{host}00000000" for name, pid in (
        ("alive", os.getppid()), ("reused", os.getppid()), ("dead", dead_pid())))
    for folder in (alive, reused, dead):
        folder.mkdir()
    os.utime(reused, (1e9, 1e9))
    remove_leftovers(tmp_path)
    assert names(tmp_path) == [alive.name]


def test_a_leftover_of_another_machine_stays_for_a_day_after_its_last_write(tmp_path):
    host = temporary_path(tmp_path / "x").name[-12:-8]
    other = f"{int(host, 16) ^ 1:04x}"
    fresh, old, growing = (tmp_path / f".tmp-{name}-{dead_pid()}-{other}00000000"
                           for name in ("fresh", "old", "growing"))
    for folder in (fresh, old, growing):
        folder.mkdir()
    (growing / "file").touch()
    for folder in (old, growing):
        os.utime(folder, (time.time() - 90_000,) * 2)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([fresh.name, growing.name])


def test_leftovers_of_earlier_versions_are_removed_and_other_names_stay(tmp_path):
    pid = dead_pid()
    gone = [f".tmp-model-{pid}", f".tmp-run.json-{pid}", f"results.tmp{pid}", ".tmp-kin-0a1b2c3d"]
    stay = [".tmp-notes", ".tmp-kin-fffffff0", "results.tmp", ".tmp-x-12-y", "notes.tmp", "model",
            f".tmp-a-{os.getppid()}", f"results.tmp{os.getppid()}"]
    for name in (*gone, *stay):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".tmp-kin-0a1b2c3d", (1e9, 1e9))  # a bin's; its name has no PID
    (tmp_path / f".tmp-link-{pid}").symlink_to("model")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*stay, f".tmp-link-{pid}"])


def test_a_folder_set_aside_by_a_killed_writer_gets_its_name_back(tmp_path):
    """The kill comes between the two renames that replace a folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")

    def replace() -> None:
        with set_aside(folder):
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(quiet_child(replace), 0)
    assert not folder.exists()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model"] and (folder / "weights").read_text() == "old"


def test_a_replaced_folder_that_was_not_yet_removed_is_removed(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()

    def replace() -> None:
        with set_aside(folder):
            folder.mkdir()
            (folder / "weights").write_text("new")
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(quiet_child(replace), 0)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model"] and (folder / "weights").read_text() == "new"


def test_kills_at_random_moments_leave_the_old_content_or_the_new_one(tmp_path):
    """The child replaces a folder and a file until it is killed. Then both must be complete."""
    folder, file = tmp_path / "model", tmp_path / "run.json"

    def replace_for_ever() -> None:
        for number in range(1_000_000):
            with replace_folder(folder, ("*",)) as new:
                for name in ("a", "b"):
                    (new / name).write_text(str(number))
            write_text(file, "x" * 1000)

    for i in range(25):
        pid = quiet_child(replace_for_ever)
        time.sleep(0.01 + 0.004 * i)
        kill(pid)
        existed = any(NAME.fullmatch(x) is None for x in names(tmp_path))
        remove_leftovers(tmp_path)
        assert set(names(tmp_path)) <= {"model", "run.json"}
        if existed:
            assert (folder / "a").read_text() == (folder / "b").read_text()
            assert not file.exists() or file.read_text() == "x" * 1000
    assert folder.exists() and file.exists()


def test_two_writers_of_one_target_do_not_remove_each_others_work(tmp_path):
    program = ("import sys\nfrom pathlib import Path\nfrom runtime.temporary import write_text\n"
               "for i in range(200): write_text(Path(sys.argv[1]), sys.argv[2] * 100)\n")
    writers = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "file"), letter],
                                cwd=ROOT, stderr=subprocess.PIPE) for letter in "ab"]
    for writer in writers:
        assert writer.communicate(timeout=120)[1] == b"" and writer.returncode == 0
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() in ("a" * 100, "b" * 100)


def test_a_long_name_and_one_in_several_bytes_have_a_temporary_name(tmp_path):
    for name in ("x" * 255, "é" * 127, "a-1-2", ".tmp-a-1"):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    assert len(names(tmp_path)) == 4
