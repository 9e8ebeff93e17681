"""Whatever happens while a checkpoint is written, the one before it stays: killed children, full
disks and damaged bytes, all on real files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints import resume_point
from checkpoints.resume_point import (
    AsyncCheckpointer,
    _find_fault,
    claim_run_folder,
    find_newest,
    lock_run_folder,
    read_checkpoint,
    save_checkpoint,
    write_safetensors,
)
from helpers import fork as fork_tools
from helpers.fork import quiet_child
from runtime.console import FLAGS, STORAGE, UserError
from runtime.distributed import Distributed
from runtime.paths import ROOT
from runtime.temporary import remove_leftovers

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
DEAD = 2**22 + 1  # above Linux's largest process id


def parts(step: int) -> dict[str, dict[str, Tensor]]:
    """Tensors of every dtype a run keeps, different at each step."""
    g = torch.Generator().manual_seed(step)
    return {"model": {"w": torch.randn(5, 7, generator=g).bfloat16(),
                      "v": torch.randn(11, generator=g)},
            "optimizer": {"w/step": torch.tensor(float(step)), "n": torch.tensor([step, -1])},
            "more": {"cpu": torch.randint(0, 256, (64,), generator=g, dtype=torch.uint8)}}


def save(root: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(root, step, parts(step), {"step": step, "why": "é"}, keep)


def assert_whole(folder: Path | None) -> int:
    """That a checkpoint holds, bit for bit, what was given for its step; which step that is."""
    assert folder is not None, "no checkpoint left"
    found, state = read_checkpoint(folder)
    wanted = parts(state["step"])
    assert folder.name == f"step-{state['step']:06}" and found.keys() == wanted.keys()
    for name, tensors in wanted.items():
        assert found[name].keys() == tensors.keys()
        for k, x in tensors.items():
            y = found[name][k]
            assert (y.dtype, y.shape) == (x.dtype, x.shape) and torch.equal(x, y), k
    return state["step"]


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def in_child(action: Callable[[], object]) -> int:
    """How a child that does this ends: its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(quiet_child(action), 0)[1])


def fuse(root: Path, at: int, how: str) -> None:
    """Kill this process at its at-th touch of the disk: before, or after with half written."""
    count = 0

    def wrap(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def touch(*args, **kwargs):
            nonlocal count
            count += 1
            mine = count  # a touch may hold others
            if mine == at and how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if mine == at:
                for file in root.glob(".tmp-*/*"):
                    os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(owner, name, touch)

    for owner, name in ((os, "fsync"), (os, "unlink"), (os, "rmdir"), (Path, "rename"),
                        (Path, "mkdir"), (Path, "write_text"),
                        (resume_point, "write_safetensors")):
        wrap(owner, name)


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    root = tmp_path / "checkpoints"
    assert assert_whole(save(root, 200)) == 200
    assert names(root) == ["step-000200"]
    modes = {p.stat().st_mode & 0o777 for p in (root / "step-000200").iterdir()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


def test_a_file_that_stands_there_is_neither_written_over_nor_taken_away(tmp_path):
    (tmp_path / "other").write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "other", {"x": torch.zeros(2)})
    assert (tmp_path / "other").read_bytes() == b"somebody's"


def test_a_written_file_is_what_safetensors_reads_with_its_size_and_hash(tmp_path):
    tensors = {"w": torch.arange(3_000_000.0), "n": torch.arange(7)}  # several chunks
    size, digest = write_safetensors(tmp_path / "file", tensors)
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    assert size == (tmp_path / "file").stat().st_size
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_what_is_written_in_the_background_is_what_was_there_when_save_was_called(tmp_path):
    tensors = {"w": torch.arange(400.0), "n": torch.arange(7)}
    wanted = {f"{k}@0": x.clone() for k, x in tensors.items()}
    checkpointer = AsyncCheckpointer(tmp_path / "root", 2)
    checkpointer.save(1, {"model": tensors}, {"step": 1})
    for x in tensors.values():
        x.zero_()  # training goes on
    checkpointer.finish()
    assert not checkpointer.busy
    folder = find_newest(tmp_path / "root")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["model-0.safetensors"] == write_safetensors(tmp_path / "file", wanted)
    assert (folder / "model-0.safetensors").read_bytes() == (tmp_path / "file").read_bytes()


def test_a_transposed_and_a_shared_tensor_are_saved_as_they_look(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    folder = save_checkpoint(tmp_path, 1, {"a": {"t": x.T, "row": x[1]}}, {}, 2)
    found = read_checkpoint(folder)[0]["a"]
    assert torch.equal(found["t"], x.T) and torch.equal(found["row"], x[1])


def test_the_newest_are_kept_in_the_order_of_numbers_not_of_letters(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-1000000", "step-1000001", "step-999999"]
    assert assert_whole(find_newest(tmp_path)) == 1_000_001


def test_no_root_or_an_empty_one_has_no_newest(tmp_path):
    assert find_newest(tmp_path / "none") is None
    assert find_newest(tmp_path) is None


def test_all_is_flushed_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
    save(tmp_path, 1)
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (
        done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)) and None)
    monkeypatch.setattr(Path, "rename", lambda a, b: (
        done.append(f"{a.name} -> {Path(b).name}"), rename(a, b))[1])
    folder = save(tmp_path, 2)
    named = next(i for i, x in enumerate(done) if x.endswith(" -> step-000002"))
    aside = done[named].partition(" -> ")[0]
    assert aside.startswith(f".tmp-step-000002-{os.getpid()}-")
    assert set(done[:named]) == {p.name for p in folder.iterdir()} | {aside}
    assert done[named - 1] == aside and done[named + 1:] == [tmp_path.name]


@pytest.mark.parametrize("step", [3, 2])
def test_a_kill_at_any_touch_of_the_disk_loses_no_earlier_checkpoint(tmp_path, step):
    """Step 3 is new and drives step 1 out; step 2 is there already and is written again."""
    ready = tmp_path / "ready"
    save(ready, 1), save(ready, 2)
    found, points = [], 0
    for how in ("before", "half")[:step - 1]:
        for at in range(1, 100):
            root = tmp_path / f"{how}-{at}"
            shutil.copytree(ready, root)
            code = in_child(lambda root=root, at=at, how=how: (fuse(root, at, how),
                                                               save(root, step)))
            assert code in (0, -signal.SIGKILL)
            newest = assert_whole(find_newest(root))
            assert newest >= (2 if step == 3 else 1)
            assert sum(x.startswith(".") for x in names(root)) <= (1 if step == 3 else 2)
            save(root, 4)  # the next run goes on, and clears up
            assert assert_whole(find_newest(root)) == 4
            assert not [x for x in names(root) if x.startswith(".")]
            shutil.rmtree(root)
            found.append(newest)
            points += code != 0
            if code == 0:
                break
        else:
            raise AssertionError("save never came to its end")
    assert points > 20 * (step - 1)
    assert {step - 1, step} <= set(found)  # kills on both sides of the rename


def test_a_kill_while_the_only_checkpoint_is_replaced_leaves_it_or_the_new_one(tmp_path):
    ready = tmp_path / "ready"
    save(ready, 1)
    for at in range(1, 100):
        root = tmp_path / str(at)
        shutil.copytree(ready, root)
        code = in_child(lambda root=root, at=at: (fuse(root, at, "before"), save(root, 1)))
        assert assert_whole(find_newest(root)) == 1, at
        assert assert_whole(save(root, 2)) == 2
        if code == 0:
            break
    assert at > 20


def test_twenty_kills_at_random_moments_lose_nothing(tmp_path):
    draw, least = random.Random(0), 1
    save(tmp_path, 1)
    for _ in range(20):
        def forever(step=least):
            while True:
                step += 1
                save(tmp_path, step)

        pid = quiet_child(forever)
        deadline = time.monotonic() + 30  # however slow the machine: at least one save each
        while not (tmp_path / f"step-{least + 1:06}").exists() and time.monotonic() < deadline \
                and not (tmp_path / f"step-{least + 2:06}").exists():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = assert_whole(find_newest(tmp_path))
        assert found >= least
        assert sum(x.startswith(".") for x in names(tmp_path)) <= 1 and len(names(tmp_path)) <= 4
        least = found
    assert least > 20  # every child came further


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("two")
    save(root, 1), save(root, 2)
    return root


FILES = ["model-0.safetensors", "optimizer-0.safetensors", "more-0.safetensors", "state.json",
         "manifest.json"]


def test_a_thousand_changed_bytes_are_each_seen_and_the_earlier_one_taken(two, capsys):
    """Any byte of any file to any other value: a blank of the manifest to another blank too."""
    files = [two / "step-000002" / name for name in FILES]
    whole = {file: file.read_bytes() for file in files}
    draw, seen = random.Random(0), 0
    assert b"\n " in whole[files[-1]]
    spots = [(files[-1], i, 9) for i, c in enumerate(whole[files[-1]]) if c in b" \n"]  # a tab
    spots += [(file, draw.randrange(len(whole[file])), draw.randrange(256))
              for _ in range(2000) for file in [draw.choice(files)]]
    try:
        for file, at, byte in [x for x in spots if whole[x[0]][x[1]] != x[2]][:1000]:
            file.write_bytes(whole[file][:at] + bytes([byte]) + whole[file][at + 1:])
            assert assert_whole(find_newest(two)) == 1, (file.name, at, byte)
            file.write_bytes(whole[file])
            seen += 1
            said = capsys.readouterr().err
            assert said.startswith(f"{two}/step-000002: ") and "looking for an earlier one" in said
    finally:
        for file, was in whole.items():
            file.write_bytes(was)
    assert seen == 1000 and assert_whole(find_newest(two)) == 2


def test_every_shortened_longer_or_missing_file_is_seen(two):
    for file in [two / "step-000002" / name for name in FILES]:
        whole = file.read_bytes()
        try:
            for n in range(len(whole)):
                os.truncate(file, len(whole) - 1 - n)
                assert assert_whole(find_newest(two)) == 1, (file.name, n)
            half = len(whole) // 2
            for torn in (whole[:half].ljust(len(whole), b"\0"), bytes(len(whole)), whole + b"x"):
                file.write_bytes(torn)  # power was lost: the length is there, the bytes are not
                assert assert_whole(find_newest(two)) == 1
            file.unlink()
            assert assert_whole(find_newest(two)) == 1
        finally:
            file.write_bytes(whole)
    assert assert_whole(find_newest(two)) == 2


@pytest.mark.parametrize("manifest", [
    "[]", "3", '"x"', "null", "{}", '{"state.json": 3}', '{"state.json": [1]}',
    '{"state.json": null}', '{"state.json": {}}', '{"a\\u0000": [1, "x"]}', "[" * 5000,
    '{"/dev/zero": [0, ""], "state.json": [0, ""]}', '{"../step-000001/state.json": [0, ""]}'])
def test_a_manifest_that_makes_no_sense_is_no_checkpoint(tmp_path, manifest):
    save(tmp_path, 1), save(tmp_path, 2)
    (tmp_path / "step-000002" / "manifest.json").write_text(manifest)
    assert assert_whole(find_newest(tmp_path)) == 1


def test_all_damaged_means_none_and_each_is_named(two, tmp_path, capsys):
    shutil.copytree(two, tmp_path / "both")
    for step in (1, 2):
        (tmp_path / "both" / f"step-{step:06}" / "state.json").write_text("{}")
    assert find_newest(tmp_path / "both") is None
    said = capsys.readouterr().err
    assert "step-000001: state.json has 2 bytes, expected" in said and "step-000002: " in said


def test_going_back_behind_damaged_ones_keeps_what_is_saved_from_there(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step, keep=3)
    for step in (200, 300):
        (tmp_path / f"step-{step:06}" / "state.json").write_text("{}")
    assert assert_whole(find_newest(tmp_path)) == 100
    for step in (150, 200, 250):  # 200 again, now whole
        assert assert_whole(save(tmp_path, step)) == step
        assert assert_whole(find_newest(tmp_path)) == step
    assert names(tmp_path) == ["step-000200", "step-000250", "step-000300"]


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path):
    folder = save(tmp_path, 1)
    shutil.copy(folder / "model-0.safetensors", folder / "other.safetensors")
    (folder / ".DS_Store").write_text("a file manager was here")
    assert assert_whole(find_newest(tmp_path)) == 1


def test_a_part_that_is_a_link_or_a_pipe_is_not_read(tmp_path):
    root = tmp_path / "checkpoints"
    save(root, 1), save(root, 2)
    part = root / "step-000002" / "model-0.safetensors"
    part.rename(tmp_path / "outside.safetensors")
    part.symlink_to(tmp_path / "outside.safetensors")
    assert assert_whole(find_newest(root)) == 1
    part.unlink()
    os.mkfifo(part)
    assert assert_whole(find_newest(root)) == 1


def test_a_rename_that_fails_puts_the_one_of_the_same_step_back(tmp_path, monkeypatch):
    save(tmp_path, 1)
    rename = Path.rename

    def full(a: Path, b: Path):
        if a.name.startswith(".tmp-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(a, b)

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(UserError):
        save(tmp_path, 1)
    assert names(tmp_path) == ["step-000001"]
    assert assert_whole(find_newest(tmp_path)) == 1


def test_any_fault_of_a_disk_is_told_to_the_other_ranks_and_tried_again(tmp_path, monkeypatch):
    """Also one that says nothing of room, as a server's that went away, and a folder that did."""
    saver, told = AsyncCheckpointer(tmp_path / "checkpoints", 2), []
    monkeypatch.setattr(saver.ranks, "all_gather_text", lambda text: told.append(text) or [text])

    def stale(_):
        raise OSError(errno.ESTALE, "Stale file handle")

    def gone(_):
        shutil.rmtree(saver.root)
        raise OSError(errno.ENOENT, "No such file or directory")

    def away(m):
        """All that asks for the folder."""
        for name in ("lstat", "stat", "mkdir", "iterdir"):
            real = getattr(Path, name)
            m.setattr(Path, name, lambda self, *args, real=real, **more: stale(self)
                      if saver.root in (self, self.parent) else real(self, *args, **more))

    for step, fault in enumerate((None, stale, gone, None, away, None), 1):
        with monkeypatch.context() as m:
            if fault is away:
                away(m)
            elif fault:
                m.setattr(saver, "_write", fault)
            saver.save(step, parts(step), {"step": step})
            saver.finish()
    reports = [json.loads(x) for x in told if x.startswith("[")]  # the others are paths
    assert [fault for _, fault in reports if fault] == [
        f"[Errno {errno.ESTALE}] Stale file handle", "[Errno 2] No such file or directory",
        f"[Errno {errno.ESTALE}] Stale file handle"]
    assert assert_whole(find_newest(saver.root)) == 6
    first = AsyncCheckpointer(tmp_path / "first", 2)
    monkeypatch.setattr(first, "_write", stale)
    first.save(1, parts(1), {"step": 1})
    with pytest.raises(UserError, match="Stale file handle") as e:
        first.finish()
    assert e.value.code == STORAGE


def test_a_best_that_is_found_before_one_of_lost_work_takes_its_place(tmp_path):
    """A run that goes on from an earlier step, and looks at others: what was later is worse."""
    for step, later in ((10, True), (20, True), (15, False)):
        saver = AsyncCheckpointer(tmp_path, 2, keep_later=later)
        saver.save(step, parts(step), {"step": step})
        saver.finish(must_succeed=True)
    assert names(tmp_path) == ["step-000010", "step-000015"]
    assert assert_whole(find_newest(tmp_path)) == 15


def test_keeping_fewer_than_two_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 2") as e:
        save(tmp_path, 1, keep=1)
    assert e.value.code == FLAGS


def test_a_folder_is_not_claimed_through_a_link_in_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="lock: is a link") as e:
        claim_run_folder(tmp_path / "out")
    assert e.value.code == FLAGS and not (tmp_path / "elsewhere").exists()


def test_a_full_disk_is_one_error_and_leaves_nothing_behind(tmp_path):
    save(tmp_path, 1), save(tmp_path, 2)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    largest = max(map(len, before.values()))
    for limit in (0, 1, 7, 8, 9, *random.Random(0).sample(range(10, largest), 45)):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(UserError) as e:
                save(tmp_path, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert e.value.code == STORAGE
        assert "step-000003: cannot be written: needs " in str(e.value)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
        assert names(tmp_path) == ["step-000001", "step-000002"]
    assert assert_whole(save(tmp_path, 3)) == 3


def test_one_run_at_a_time_writes_a_folder_and_a_killed_one_lets_go(tmp_path):
    program = "import sys\nfrom pathlib import Path\n" \
              "from checkpoints.resume_point import lock_run_folder\n" \
              "with lock_run_folder(Path(sys.argv[1])):\n    print('held', flush=True)\n" \
              "    sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another run is writing there") as e:
            with lock_run_folder(tmp_path):
                raise AssertionError("two hold one lock")
        assert e.value.code == FLAGS
        other.kill()
        other.wait()
        with lock_run_folder(tmp_path):
            pass


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    living = quiet_child(lambda: time.sleep(60))
    try:
        for kind in ("tmp", "del"):
            for pid in (DEAD, os.getpid(), living, os.getppid()):
                (tmp_path / f".{kind}-step-000001-{pid}").mkdir()
        (tmp_path / ".tmp-notes").mkdir()
        (tmp_path / "step-notes").mkdir()
        save(tmp_path, 5)
        assert names(tmp_path) == sorted(
            [f".{kind}-step-000001-{pid}" for kind in ("tmp", "del")
             for pid in (living, os.getppid())] + [".tmp-notes", "step-000005", "step-notes"])
    finally:
        os.kill(living, signal.SIGKILL)
        os.waitpid(living, 0)


def test_links_are_neither_read_nor_written_nor_removed_through(tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    save(outside, 9)
    canary = outside / "step-000009"
    before = {p: p.read_bytes() for p in canary.iterdir()}
    root.mkdir()
    (root / "step-000009").symlink_to(canary)  # a checkpoint's name
    (root / "step-000002").symlink_to(tmp_path / "nowhere")
    (root / f".tmp-step-000003-{DEAD}").symlink_to(canary)  # a leftover's name
    (root / f".del-step-000003-{DEAD}").symlink_to(canary)
    assert find_newest(root) is None
    for step in (1, 2, 3, 9, 10, 11):  # onto the links, and driving others out
        assert assert_whole(save(root, step)) == step
        assert not (root / f"step-{step:06}").is_symlink()
        assert {p: p.read_bytes() for p in canary.iterdir()} == before
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_a_checkpoints_place_is_put_aside_by_the_checkpoint(tmp_path):
    (tmp_path / "step-000004").write_text("not a folder")
    assert assert_whole(save(tmp_path, 4)) == 4


def test_what_was_saved_is_what_json_and_safetensors_alone_can_read(tmp_path):
    folder = save(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == set(FILES) - {"manifest.json"}
    assert json.loads((folder / "state.json").read_text()) == {
        "format": 2, "step": 7, "why": "é"}


@pytest.mark.parametrize("n", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_a_hundred_thousand_checkpoints_are_looked_through_and_all_but_the_kept_go(
        tmp_path, n, monkeypatch):
    """Whole ones, linked. Only the newest is read, and nothing takes longer for each than a few
    touches of the disk."""
    root, source = tmp_path / "root", tmp_path / "source"
    for i in range(n):
        if i % 30_000 == 0:  # ext4 links a file 65,000 times at most
            source = save_checkpoint(tmp_path / f"source-{i}", 1, {}, {"step": 1}, 2)
        folder = root / f"step-{i + 1:06}"
        folder.mkdir(parents=True)
        for name in ("state.json", "manifest.json"):
            os.link(source / name, folder / name)
    for pid in (DEAD, os.getpid()):
        (root / f".del-step-000000-{pid}").mkdir()
    read, fault = [], _find_fault
    monkeypatch.setattr(resume_point, "_find_fault", lambda x: (read.append(x.name), fault(x))[1])
    begun = time.monotonic()
    assert find_newest(root).name == f"step-{n:06}" and read == [f"step-{n:06}"]
    remove_leftovers(root, restore=False)
    assert len(os.listdir(root)) == n and time.monotonic() - begun < 5 + n / 10_000
    assert assert_whole(save(root, n + 1, keep=3)) == n + 1
    assert names(root) == [f"step-{x:06}" for x in (n - 1, n, n + 1)]
    assert time.monotonic() - begun < 10 + n / 1000


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_at_any_touch_of_the_disk_loses_no_earlier_checkpoint(tmp_path, rank):
    """Two ranks write one checkpoint; one is killed, and the other then too, as torchrun does."""
    found, code = [], None
    for at in range(1, 60, 2 if rank == 0 else 1):
        root = tmp_path / str(at)
        save(root, 1), save(root, 2)

        def two(root=root, at=at) -> int:
            ranks = Distributed.start("cpu", 20)
            saver = AsyncCheckpointer(root, 2, ranks)
            if ranks.rank == rank:
                fuse(root, at, "before")
            saver.save(3, parts(3), {"step": 3, "why": "é"})
            saver.finish()
            return 0

        pids = fork_tools.together(2, two, tmp_path / f"said-{at}")
        code = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
        if code:
            os.kill(pids[1 - rank], signal.SIGKILL)
        os.waitpid(pids[1 - rank], 0)
        found.append(assert_whole(find_newest(root)))
        assert found[-1] in (2, 3) and sum(x.startswith(".") for x in names(root)) <= 1
        assert assert_whole(save(root, 4)) == 4
        assert not [x for x in names(root) if x.startswith(".")]
        if code == 0:
            break
    assert code == 0 and len(found) > 5 and 2 in found and found[-1] == 3
