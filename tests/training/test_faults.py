"""What may happen to a run, done to real ones: kills, signals, full disks, lost ranks, flags."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from checkpoints import resume_point
from checkpoints.resume_point import (
    FORMAT,
    AsyncCheckpointer,
    find_newest,
    lock_run_folder,
    read_checkpoint,
    save_checkpoint,
)
from data import sha256
from helpers import fork
from helpers.train_runs import (
    ENV,
    load_result,
    make_settings,
    rank_action,
    read_losses,
    run_ranks,
    send_signal_at,
    write_recipe,
)
from runtime import flags as config
from runtime.console import BAD_INPUT, FLAGS, STORAGE, UserError
from runtime.device import compute_dtype, peak_flops
from runtime.distributed import Distributed
from runtime.paths import ROOT
from training import memory_estimate as memory
from training import plan
from training import validation as looks
from training.batch_size import MemoryTrial, largest_fitting
from training.objective import NLL, Objective
from training.settings import CAN_CHANGE_ON_RESUME, WARN_ON_RESUME, Settings

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def lines_of(out: Path) -> list[dict]:
    """metrics.jsonl without what a clock or the system says."""
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if k not in ("tokens_per_second", "memory_gb")}
            for line in lines]


def assert_the_same(killed: Path, calm: Path) -> None:
    """That what two runs leave behind is equal, bit for bit."""
    assert read_losses(killed) == read_losses(calm)
    assert lines_of(killed) == lines_of(calm)
    assert (killed / "samples.txt").read_text() == (calm / "samples.txt").read_text()
    a, b = load_result(killed), load_result(calm)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in b)
    assert not strays(killed)


def strays(out: Path) -> list[str]:
    """Folders that a kill left half made or half removed."""
    return [str(x) for folder in (out, out / "checkpoints") if folder.exists()
            for x in folder.iterdir() if x.name.startswith((".tmp-", ".del-")) and x.is_dir()]


def killed_at_random(workspace: Path, kills: int, steps: int) -> None:
    """So many kill -9 at random moments, every other one not before a step was begun: each process
    goes on with what the one before it left, run after run."""
    changes = {"steps": steps, "save_every": 3, "eval_every": 10, "tokens_per_step": 64,
               "tune": "lora", "lora_dropout": 0.1}
    begun = time.monotonic()
    calm = workspace / f"calm-{kills}"
    run_ranks(make_settings(workspace, calm.name, **changes))
    while_calm = time.monotonic() - begun
    draw, killed, whole, in_steps = random.Random(kills), 0, 0, 0
    out = workspace / f"killed-{kills}-0"
    said, kept, stepping = workspace / f"said-{kills}", 0, workspace / f"stepping-{kills}"
    while killed < kills or whole == 0:
        going = (out / "settings.toml").exists()
        stepping.unlink(missing_ok=True)
        s = make_settings(workspace, out.name, resume=going, **changes)
        (pid,) = fork.together(1, rank_action(s, lambda run: stepping.touch()), said)
        if killed < kills:
            look = os.WEXITED | os.WNOHANG | os.WNOWAIT
            while killed % 2 and not stepping.exists() and not os.waitid(os.P_PID, pid, look):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.3 * while_calm))
            os.kill(pid, signal.SIGKILL)  # of one that has ended too: it is not waited for yet
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), said.with_name(f"{said.name}-0").read_text()[-2000:]
        if code == 0:
            assert_the_same(out, calm)
            whole, kept = whole + 1, 0
            out = workspace / f"killed-{kills}-{whole}"
            continue
        killed += 1
        assert len(strays(out)) <= 1, strays(out)
        if not (out / "checkpoints").exists():
            continue
        newest = find_newest(out / "checkpoints")
        before, kept = kept, read_checkpoint(newest)[1]["step"] if newest else 0
        done = max((x["step"] for x in lines_of(out)), default=0)
        assert before <= kept <= done <= kept + 2 * changes["save_every"], (before, kept, done)
        in_steps += 0 < done < steps
    assert in_steps > kills / 4, "a good part of the kills was to come while it trained"


@pytest.mark.parametrize(("kills", "steps"), [
    (30, 30), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((100, 30), (200, 100)))])
def test_kills_at_random_moments_change_nothing(workspace, kills, steps):
    killed_at_random(workspace, kills, steps)


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_finishes_the_step_and_saves_it(workspace, number, code):
    name = f"signal-{number}"
    said = run_ranks(
        make_settings(workspace, name, save_every=100),
        codes={code},
        during=send_signal_at(7, 0, number),
    )
    assert max(read_losses(workspace / name)) == 7 and "stopped and saved at step 7" in said
    assert find_newest(workspace / name / "checkpoints").name == "step-000007"


@pytest.mark.parametrize("signals", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_a_signal_at_any_moment_loses_no_step(workspace, signals):
    """One that comes before training just ends the process."""
    changes = {"steps": 30, "save_every": 7, "eval_every": 10, "tokens_per_step": 64}
    begun = time.monotonic()
    run_ranks(make_settings(workspace, f"unasked-{signals}", **changes))
    while_calm, draw = time.monotonic() - begun, random.Random(signals)
    asked = rounds = in_steps = 0
    while asked < signals:
        out = workspace / f"asked-{signals}-{rounds}"
        going = (out / "settings.toml").exists()
        stepping = workspace / f"asked-stepping-{signals}"
        stepping.unlink(missing_ok=True)
        (pid,) = fork.together(
            1,
            rank_action(
                make_settings(workspace, out.name, resume=going, **changes),
                lambda run, file=stepping: file.touch(),
            ),
            workspace / f"said-asked-{signals}",
        )
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while asked % 4 and not stepping.exists() and not os.waitid(os.P_PID, pid, look):
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.2 * while_calm))
        number = draw.choice([signal.SIGTERM, signal.SIGHUP])
        os.kill(pid, number)
        (code,) = fork.ends([pid])
        asked += 1
        said = (workspace / f"said-asked-{signals}-0").read_text()
        assert code in (0, 128 + number, -number) and "Traceback" not in said, (code, said[-2000:])
        if code == 128 + number and stepping.exists():
            kept = read_checkpoint(find_newest(out / "checkpoints"))[1]["step"]
            assert kept == max(read_losses(out)), "every step that was taken"
            in_steps += 1
        if code == -number:  # before the first step, or behind the last
            assert not stepping.exists() or max(read_losses(out)) == 30
        if code == 0:
            assert_the_same(out, workspace / f"unasked-{signals}")
            rounds += 1
    assert in_steps > signals / 4


def test_sigusr1_to_any_rank_saves_and_the_run_goes_on(workspace):
    run_ranks(make_settings(workspace, "usr1", save_every=100, keep=9), world=2,
              during=send_signal_at(6, 1, signal.SIGUSR1))
    assert len(read_losses(workspace / "usr1")) == 20
    assert [x.name for x in sorted((workspace / "usr1/checkpoints").iterdir())] == [
        "step-000001", "step-000006", "step-000020"]


def test_a_second_signal_ends_at_once_and_a_forwarded_one_is_the_first(workspace):
    def twice(apart: float):
        def during(run):
            if run.step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(apart)
                os.kill(os.getpid(), signal.SIGTERM)
        return during

    run_ranks(make_settings(workspace, "forwarded"), codes={143}, during=twice(0.1))
    run_ranks(make_settings(workspace, "twice"), codes={-signal.SIGTERM}, during=twice(1.2))
    assert max(read_losses(workspace / "twice")) == 4
    assert find_newest(workspace / "twice/checkpoints").name in ("step-000001", "step-000004")


def test_a_signal_while_a_checkpoint_is_written_lets_it_be_written(workspace):
    def slow(run):
        if run.step == 8:
            real = resume_point.write_safetensors
            resume_point.write_safetensors = lambda *a: (time.sleep(0.7), real(*a))[1]
        if run.step == 9:
            assert run.checkpointer.busy, "training goes on while step 8 is written"
            os.kill(os.getpid(), signal.SIGTERM)

    run_ranks(make_settings(workspace, "slow", save_every=9), codes={143}, during=slow)
    found = sorted(x.name for x in (workspace / "slow/checkpoints").iterdir())
    assert found == ["step-000009", "step-000010"]


def no_file_above(size: int, first: int, last: int = 10**9, rank: int | None = None):
    """A full disk, from one step to another, for one rank or all: no file may grow beyond so many
    bytes."""
    def during(run):
        if rank not in (None, run.ranks.rank):
            return
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if run.step + 1 in (first, last):
            while run.checkpointer.busy:
                time.sleep(0.01)
            limit = size if run.step + 1 == first else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    return during


def test_a_full_disk_is_found_at_step_1(workspace):
    said = run_ranks(
        make_settings(workspace, "full-1"), codes={STORAGE}, during=no_file_above(30_000, 1)
    )
    assert "step-000001: cannot be written: needs " in said and "Traceback" not in said
    assert (
        len(read_losses(workspace / "full-1")) < 20
        and os.listdir(workspace / "full-1/checkpoints") == []
    )


@pytest.mark.parametrize("world,rank", [(1, 0), (2, None), (2, 1)])
def test_a_disk_that_is_full_for_a_while_is_said_and_tried_again(workspace, world, rank):
    """Also where one of two ranks alone cannot write: both know, and nobody waits."""
    name = f"full-while-{world}-{rank}"
    said = run_ranks(make_settings(workspace, name, save_every=4), world=world,
                     during=no_file_above(30_000, 3, 9, rank))
    assert rank != 1 or "(rank 1: " in said
    assert said.count("training goes on, the next save tries again") in (1, 2)
    assert "step-000004: cannot be written" in said and len(read_losses(workspace / name)) == 20
    assert find_newest(workspace / name / "checkpoints").name == "step-000020"


def test_a_disk_that_stays_full_ends_the_run_with_5_and_the_earlier_checkpoint(workspace):
    said = run_ranks(make_settings(workspace, "full-3", save_every=3), codes={STORAGE},
                     during=no_file_above(30_000, 3))
    assert "step-000009: cannot be written" in said and "Traceback" not in said
    assert os.listdir(workspace / "full-3/checkpoints") == ["step-000001"]


def test_a_disk_that_refuses_a_line_of_metrics_is_one_line_and_the_run_goes_on_later(
        workspace):
    def full(run):
        if run.step == 7:
            size = (run.out / "metrics.jsonl").stat().st_size + 40
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    said = run_ranks(
        make_settings(workspace, "full-log", save_every=3), codes={STORAGE}, during=full
    )
    assert "error: step 9: a file of the run cannot be written (File too large)" in said
    assert "Traceback" not in said
    run_ranks(make_settings(workspace, "full-log", resume=True))
    assert len(read_losses(workspace / "full-log")) == 20


def test_a_disk_with_too_little_room_is_refused_before_step_1(workspace, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100_000})())
    for words in ({}, {"plan": True}):
        said = run_ranks(make_settings(workspace, "little", **words), codes={STORAGE})
        (need,) = re.findall("resume points of this run need ([0-9,]+)", said)
        assert not (workspace / "little/metrics.jsonl").exists()
    assert f"{int(need.replace(',', '')) / 2**30:.2f} GB at the most for 2 checkpoints" in said


def test_a_run_that_keeps_fewer_points_than_stand_still_needs_room_for_one(
        workspace, monkeypatch):
    """Old ones go only once it is written."""
    run_ranks(
              make_settings(workspace, "fewer", save_every=1, keep=9),
              codes={143},
              during=send_signal_at(8),
    )
    assert len(list((workspace / "fewer/checkpoints").iterdir())) > 4
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    said = run_ranks(make_settings(workspace, "fewer", keep=2, resume=True), codes={STORAGE})
    assert "1,000 bytes are free, resume points of this run need" in said


@pytest.mark.parametrize("tune", [
    {}, *(pytest.param(x, marks=pytest.mark.slow) for x in (
        {"tune": "lora", "train_embeddings": True}, {"shard": "fsdp"},
        {"optimizer": "adamw-bf16"}, {"optimizer": "adamw8bit"}))], ids=str)
def test_the_disk_that_a_plan_names_is_the_most_that_the_run_then_takes(
        workspace, tune, monkeypatch):
    """While the third checkpoint is written and the first still stands, or in the end."""
    monkeypatch.setattr(plan, "GiB", 1)  # so that it is said in bytes
    world, name = 2 if "shard" in tune else 1, f"disk-{len(str(tune))}"

    def planned(**changes) -> int:
        said = run_ranks(
            make_settings(workspace, name, steps=3, save_every=1, plan=True, **tune, **changes),
            world,
        )
        words = re.search(r"disk +(\d+).* GB at the most for 2 checkpoints.*, of (\d+)", said)
        assert int(words[2]) > 10**6
        return int(words[1])

    def taken(*names: str) -> int:
        return sum(x.stat().st_size for part in names for x in (workspace / name / part).rglob("*")
                   if x.is_file() and (part == "checkpoints" or x.suffix == ".safetensors"))

    def watched(run):
        real = AsyncCheckpointer._publish

        def naming(self, files):
            with open(workspace / f"{name}-most", "a") as file:
                print(taken("checkpoints"), file=file)
            real(self, files)

        if run.step == 0:
            AsyncCheckpointer._publish = naming

    most, with_best = planned(), planned(best="kin")
    monkeypatch.undo()
    run_ranks(make_settings(workspace, name, steps=3, save_every=1, **tune), world, during=watched)
    seen = [int(x) for x in (workspace / f"{name}-most").read_text().split()]
    assert len(seen) == 3 and most == pytest.approx(
        max(*seen, taken("checkpoints", "model")), rel=0.1)
    weights = (workspace / name / "checkpoints/step-000003").glob("model-*")
    assert with_best - most == pytest.approx(3 * sum(x.stat().st_size for x in weights), rel=0.1)


CHANGED = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x + 0.5,
           list: lambda x: [*x, "more"], str: lambda x: f"{x}x"}


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda f: f.name)
def test_every_flag_is_fixed_or_may_change_when_a_run_goes_on(field, tmp_path):
    import typing

    (tmp_path / "settings.toml").write_text(config.to_toml(Settings(out=str(tmp_path))))
    kind = typing.get_type_hints(Settings)[field.name]
    old = getattr(Settings(out=str(tmp_path)), field.name)
    choices = [x for x in typing.get_args(kind) if isinstance(x, str) and x != old]
    new = choices[0] if choices else CHANGED[type(old)](old)
    if field.name == "mode":
        new = "sft"
    if field.name in ("lr", "seq_len"):
        new = 128
    flag = f"--{field.name.replace('_', '-')}"
    said = [flag if new else f"--no-{flag[2:]}"] if isinstance(new, bool) else \
        [flag, *map(str, new if isinstance(new, list) else [new])]
    kept = tmp_path / "settings.toml"
    may_change = CAN_CHANGE_ON_RESUME | WARN_ON_RESUME
    if field.name in may_change:
        found, _ = config.read_resumed(Settings, said, "train.py", kept, may_change)
        assert getattr(found, field.name) == new
    else:
        with pytest.raises(UserError, match="a resumed run cannot change") as e:
            config.read_resumed(Settings, said, "train.py", kept, may_change)
        assert e.value.code == FLAGS and f"{flag[2:]} was {old!r}, now {new!r}" in str(e.value)


def test_a_refusal_to_go_on_names_every_difference(tmp_path):
    kept = tmp_path / "settings.toml"
    kept.write_text(config.to_toml(Settings()))
    with pytest.raises(UserError, match=r"clip was 1\.0, now 3\.0; seed was 1, now 2"):
        config.read_resumed(Settings, ["--seed", "2", "--clip", "3"], "train.py", kept,
                     CAN_CHANGE_ON_RESUME | WARN_ON_RESUME)


def test_what_may_change_the_numbers_is_said_whether_a_flag_changed_it_or_a_hand(
        workspace):
    """Against what the resume point was written with: once, and not by the run after it."""
    run_ranks(
        make_settings(workspace, "warned", save_every=5), codes={143}, during=send_signal_at(8)
    )
    kept = workspace / "warned/settings.toml"
    text = kept.read_text()
    assert not CAN_CHANGE_ON_RESUME & WARN_ON_RESUME and "eval_tokens = 60\n" in text
    for was, now in (("eval_tokens = 60\n", "eval_tokens = 50\n"), ("keep = 2", "keep = 3"),
                     ('recompute = "none"', 'recompute = "full"')):
        text = text.replace(was, now)
    kept.write_text(text)
    may = "; from here on the numbers may differ from those of the run as it began"
    said = run_ranks(
        make_settings(workspace, "warned", resume=True), codes={143}, during=send_signal_at(10)
    )
    assert f"--resume: eval-tokens was 60, now 50{may}\n" in said and said.count(may) == 2
    assert f"--resume: recompute was 'none', now 'full'{may}\n" in said
    out = str(workspace / "warned")
    said = said_by(workspace, "warned", "--resume", "--out", out, "--eval-tokens", "40", code=0)
    assert f"--resume: eval-tokens was 50, now 40{may}\n" in said and said.count(may) == 1


@pytest.mark.parametrize("said,word", [
    ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set"),
    ({"WORLD_SIZE": "2", "RANK": "2"}, "do not describe a rank"),
    ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE=two"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT are not set")])
def test_half_an_environment_is_one_line(monkeypatch, said, word):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=word) as e:
        Distributed.start("cpu")
    assert e.value.code == FLAGS and "torchrun" in str(e.value)


def test_a_port_in_use_is_one_line(monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR":
                            "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match="--standalone finds a free port") as e:
            Distributed.start("cpu", timeout=5)
        assert e.value.code == FLAGS


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR":
                        "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"LOCAL_RANK 1: this machine has 1 GPUs; .*--nproc") as e:
        Distributed.start("auto")
    assert e.value.code == FLAGS


@pytest.mark.parametrize("asked,found,line", [
    ("auto", torch.float16, "this GPU has no bf16: matrix products are in fp16"),
    ("bf16", torch.bfloat16, "--dtype bf16 is slow on it"), ("fp16", torch.float16, ""),
    ("fp32", torch.float32, "")])
def test_a_gpu_without_bf16_is_said_once_and_changes_no_dtype_that_was_asked_for(
        monkeypatch, capsys, asked, found, line):
    """A run that goes on asks for the dtype that it was begun with."""
    gpu = Distributed(0, 1, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert compute_dtype(gpu.device, asked) == found
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == bool(line)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert compute_dtype(gpu.device, "auto") == torch.bfloat16 and not capsys.readouterr().err


@pytest.mark.parametrize("name, peak", [
    ("Tesla T4", 65e12), ("NVIDIA L4", 121e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA GeForce RTX 4090", 165e12),
    ("NVIDIA L40S", None), ("NVIDIA T400 4GB", None), ("NVIDIA A10", None)])
def test_a_gpus_peak_is_that_of_no_other(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_a_cpu_trains_a_large_model_only_where_it_was_asked_to(workspace, monkeypatch):
    monkeypatch.setattr(memory, "MAX_CPU_PARAMETERS", 1000)
    said = run_ranks(
        make_settings(workspace, "unasked", device="auto"), codes={FLAGS}, CUDA_VISIBLE_DEVICES=""
    )
    assert "no GPU that this torch can use" in said and "give --device cpu" in said
    assert not (workspace / "unasked/metrics.jsonl").exists()
    said = run_ranks(make_settings(workspace, "unasked", device="auto", plan=True), codes={FLAGS},
                     CUDA_VISIBLE_DEVICES="")
    assert said.count("no GPU that this torch can use") == 1, "the plan is shown, and says so too"
    assert said.index("the first row;") < said.index("no GPU that this torch can use")
    run_ranks(make_settings(workspace, "asked-for", device="cpu", steps=2))


def test_shards_without_ranks_and_ranks_without_shards_are_refused(workspace):
    assert "there is one process" in run_ranks(
        make_settings(workspace, "alone", shard="fsdp"), codes={FLAGS}
    )
    assert "cannot be used with 2 processes" in run_ranks(
        make_settings(workspace, "apart", shard="none"), world=2, codes={FLAGS}
    )
    assert "use --rows 1 or 3" in run_ranks(
        make_settings(workspace, "four", rows=4), world=2, codes={FLAGS}
    )
    assert "use a multiple of 64" in run_ranks(
        make_settings(workspace, "few", tokens_per_step=32), world=2, codes={FLAGS}
    )
    said = run_ranks(
        make_settings(workspace, "optim", shard="fsdp", optimizer="adamw8bit"), 2, {FLAGS}
    )
    assert "does not work with --shard fsdp" in said


def test_a_run_does_not_go_on_with_other_weights_beneath_its_adapter(workspace):
    """The commit of a hub's model is in the settings; a folder's weights are known by their mark.
    """
    model = workspace / "swapped"
    shutil.copytree(workspace / "tied", model)
    changes = {"model": str(model), "tune": "lora", "steps": 6}
    run_ranks(make_settings(workspace, "swap", **changes), codes={143}, during=send_signal_at(3))
    file = model / "model.safetensors"
    before = file.read_bytes()
    tensors = load_file(file)
    save_file({k: 1.01 * x for k, x in tensors.items()}, file)
    assert "holds other weights than those" in run_ranks(
        make_settings(workspace, "swap", resume=True), codes={BAD_INPUT}
    )
    file.write_bytes(before)
    run_ranks(make_settings(workspace, "swap", resume=True))
    assert len(read_losses(workspace / "swap")) == 6


def said_by(workspace, name: str, *words: str, world: int = 1, code: int,
            other: Sequence[str] = (), **env: str) -> str:
    """What the command says to these flags (rank 1 is given `other` ones too), which ends so; any
    error is one line."""
    said = workspace / f"said-{name}"

    def command() -> object:
        return fork.train(*words, *(other if os.environ.get("RANK") == "1" else ()))()

    assert fork.ends(fork.together(world, command, said, **env)) == [code] * world, \
        said.with_name(f"{said.name}-0").read_text()[-3000:]
    text = said.with_name(f"{said.name}-0").read_text()
    assert text.count("error: ") == (code != 0) and "Traceback" not in text
    return text


def test_ranks_that_do_not_fit_together_are_one_line_of_the_command(workspace):
    flags = [str(write_recipe(make_settings(workspace, "command")))]
    assert "rank 1 was started with another --lr: 0.5, rank 0 with 0.001" in said_by(
        workspace, "other", *flags, other=["--lr", "0.5"], world=2, code=FLAGS)
    assert "no multiple of 64 (rows 1 x seq-len 32 x ranks 2); use a multiple of 64" in said_by(
        workspace, "few", *flags, "--tokens-per-step", "32", world=2, code=FLAGS)
    assert "--tokens-per-step 100: no multiple of 32" in said_by(
        workspace, "parts", *flags, "--tokens-per-step", "100", code=FLAGS)
    assert "WORLD_SIZE=2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT are not set" in said_by(
        workspace, "alone", *flags, WORLD_SIZE="2", code=FLAGS)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        assert "--standalone finds a free port" in said_by(
            workspace, "port", *flags, "--rank-timeout", "5", code=FLAGS, RANK="0", WORLD_SIZE="2",
            LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
    (workspace / "command").mkdir(exist_ok=True)
    with lock_run_folder(workspace / "command"):
        assert "another run is writing there" in said_by(workspace, "two", *flags, code=FLAGS)
    assert not (workspace / "command/metrics.jsonl").exists()


def described(folder: Path) -> None:
    """Give a checkpoint's folder the manifest of the files that it holds."""
    names = [p for p in folder.iterdir() if p.name != "manifest.json"]
    (folder / "manifest.json").write_text(json.dumps(
        {p.name: [p.stat().st_size, sha256(p)] for p in names}, indent=1))


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_copied_folder_goes_on_by_itself_and_what_was_edited_in_it_is_seen(workspace):
    s = make_settings(workspace, "original", save_every=5)
    run_ranks(s, codes={143}, during=send_signal_at(8))
    before = snapshot(workspace / "original")

    def copy(name: str) -> Path:
        """As `cp -al` copies: its files are those of the original, until they are replaced."""
        return Path(
            shutil.copytree(workspace / "original", workspace / name, copy_function=os.link)
        )

    out = copy("copied")
    said_by(workspace, "copied", "--resume", "--out", str(out), code=0)
    assert "nothing to do" in said_by(workspace, "again", "--resume", "--out", str(out), code=0)

    out = copy("edited")
    state = out / "checkpoints/step-000008/state.json"
    text = state.read_text()
    state.unlink()
    state.write_text(text.replace('"step": 8', '"step": 7'))
    said = said_by(workspace, "edited", "--resume", "--out", str(out), code=0)
    assert "step-000008: state.json is damaged (sha256); looking for an earlier one" in said
    assert f"resumed from {out}/checkpoints/step-000005" in said
    assert_the_same(out, workspace / "copied")

    out = copy("resettled")
    text = (out / "settings.toml").read_text()
    (out / "settings.toml").unlink()
    (out / "settings.toml").write_text(text.replace("lr = 0.001", "lr = 0.01"))
    said = said_by(workspace, "resettled", "--resume", "--out", str(out), code=FLAGS)
    assert "settings.toml: differs from the settings of" in said
    assert "(lr was 0.001, now 0.01)" in said

    out = copy("newer")
    state = out / "checkpoints/step-000008/state.json"
    text = state.read_text()
    for path in (state, state.with_name("manifest.json")):
        path.unlink()
    state.write_text(text.replace('"format": 2', '"format": 3'))
    described(state.parent)
    said = said_by(workspace, "newer", "--resume", "--out", str(out), code=BAD_INPUT)
    assert "newer version of this program (format 3, this version reads up to 2)" in said
    assert snapshot(workspace / "original") == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt", "settings.toml", "checkpoints",
                                  "model", "bins", ".lock"])
def test_a_run_does_not_begin_in_a_folder_that_holds_a_link(workspace, tmp_path, name):
    outside, out = tmp_path / "outside", workspace / f"linked-{name}"
    outside.mkdir()
    (outside / "canary").write_text("as it was")
    out.mkdir(exist_ok=True)
    (out / name).symlink_to(outside if name in ("checkpoints", "model", "bins")
                            else outside / "canary")
    said = run_ranks(make_settings(workspace, out.name), codes={FLAGS})
    assert f"{out / name}: is a link, and a run writes only inside its own folder" in said
    assert snapshot(outside) == {outside / "canary": b"as it was"}


def test_a_link_to_the_folder_is_followed_once_and_one_that_comes_into_it_never(
        workspace, tmp_path):
    for name in ("first", "other"):
        (tmp_path / name).mkdir()
    (workspace / "followed").symlink_to(tmp_path / "first")

    def swapped(run):
        if run.step == 5:
            (workspace / "followed").unlink()
            (workspace / "followed").symlink_to(tmp_path / "other")

    run_ranks(make_settings(workspace, "followed", save_every=3), during=swapped)
    assert len(read_losses(tmp_path / "first")) == 20 and (tmp_path / "first/model").is_dir()
    assert not snapshot(tmp_path / "other")

    def put(run):
        if run.step == 5:
            run.checkpointer.finish()
            (run.out / "checkpoints").rename(run.out / "aside")
            (run.out / "checkpoints").symlink_to(tmp_path / "other")

    said = run_ranks(make_settings(workspace, "swapped", save_every=3), codes={STORAGE}, during=put)
    assert "checkpoints: is a link, and a run writes only inside its own folder" in said
    assert not snapshot(tmp_path / "other")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="drops to Linux's nobody")
@pytest.mark.parametrize("name", ["", "out", "out/deep"])
def test_a_folder_that_may_not_be_written_is_refused_before_the_model_is_looked_for(
        workspace, name):
    root = Path(tempfile.mkdtemp())  # that anybody may pass, unlike pytest's
    root.chmod(0o555)
    s = dataclasses.replace(make_settings(workspace, "x"), out=str(root / name), model="nowhere")

    def as_nobody() -> object:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return rank_action(s)()

    try:
        assert fork.ends(fork.together(1, as_nobody, workspace / "said-nobody")) == [FLAGS]
        said = (workspace / "said-nobody-0").read_text()
        assert f"error: --out {root / name}: cannot be written (Permission denied)" in said
        assert "nowhere" not in said and list(root.iterdir()) == []
    finally:
        root.chmod(0o755)
        shutil.rmtree(root)


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def apart(action, *mounts: Sequence[str | Path], keep: tuple[Path, Path] | None = None):
    """What a child does where these are mounted, which nobody else sees; what it leaves there goes
    when it ends, but `keep`: from where, to where."""
    def act() -> object:
        assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
        for words in (("--make-rprivate", "/"), *mounts):
            mount(*words)
        try:
            return action()
        finally:
            if keep:
                shutil.copytree(*keep)

    return act


def read_only(folder: Path) -> list[tuple[str | Path, ...]]:
    return [("--bind", folder, folder), ("-o", "remount,ro,bind", folder)]


MOUNTS = shutil.which("unshare") and not subprocess.run(
    ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
mounts = pytest.mark.skipif(not MOUNTS, reason="this system lets this process mount nothing, as "
                            "root may where a container does not forbid it")


@mounts
@pytest.mark.parametrize("name,where", [("", ""), ("new", ""), ("", "checkpoints"), ("", "best")])
def test_a_place_that_nobody_can_write_is_refused_before_the_model_is_looked_for(
        workspace, tmp_path, name, where):
    """Not even root: the whole folder, its parent, or the folder of resume points alone."""
    root = tmp_path / "root"
    (root / where).mkdir(parents=True)
    s = dataclasses.replace(make_settings(workspace, "x"), out=str(root / name), model="nowhere")
    act = apart(rank_action(s), *read_only(root / where))
    begun = time.monotonic()
    assert fork.ends(fork.together(1, act, workspace / "said-ro")) == [FLAGS]
    said = (workspace / "said-ro-0").read_text()
    assert f"error: --out {root / name / where}: cannot be written (Read-only file" in said
    assert said.count("\n") == 1 and "nowhere" not in said and time.monotonic() - begun < 5
    assert {x.name for x in root.rglob("*")} <= {where, ".lock"}


def filled(first: int, last: int = 10**9, room: int = 64 << 10):
    """A disk that somebody else fills before one step, up to so many bytes, and empties before
    another."""
    def during(run):
        if run.step + 1 in (first, last):
            run.checkpointer.finish()
            filler = run.out / "filler"
            filler.unlink(missing_ok=True)
            if run.step + 1 == first:
                free = shutil.disk_usage(run.out).free - room
                filler.write_bytes(bytes(free))
    return during


@mounts
def test_a_disk_that_is_really_full_is_found_by_the_trial_save_or_before_it(
        workspace, tmp_path):
    """8 MB of memory as a disk, filled by somebody else; and a disk that is too small."""
    out, kept = workspace / "really-full", tmp_path / "kept"
    out.mkdir()
    s = make_settings(workspace, "really-full")
    for size, during, words in (
            ("8m", filled(1), f"error: {out}/checkpoints/step-000001: cannot be written: needs "),
            ("512k", id, f"error: --out {out}: ")):
        act = apart(rank_action(s, during), ("-t", "tmpfs", "-o", f"size={size}", "none", out),
                    keep=(out, kept / size))
        assert fork.ends(fork.together(1, act, workspace / "said-full")) == [STORAGE]
        said = (workspace / "said-full-0").read_text()
        assert words in said and ("No space left on device" in said) == (size == "8m")
        assert "Traceback" not in said and said.count("error: ") == 1
        found = [x.name for x in (kept / size).rglob("*") if "step-" in x.name]
        assert not found and not strays(kept / size)


@mounts
@pytest.mark.parametrize("last,code", [(10, 0), (10**9, STORAGE)])
def test_a_disk_that_fills_up_in_the_middle_of_a_run_is_tried_again_or_ends_it(
        workspace, tmp_path, last, code):
    name = f"fills-{code}"
    out, kept = workspace / name, tmp_path / "kept"
    out.mkdir()
    act = apart(rank_action(make_settings(workspace, name, save_every=4), filled(6, last)),
                ("-t", "tmpfs", "-o", "size=8m", "none", out), keep=(out, kept))
    assert fork.ends(fork.together(1, act, workspace / "said-fills")) == [code]
    said = (workspace / "said-fills-0").read_text()
    assert "step-000008: cannot be written: needs " in said and "No space left on device" in said
    assert "earlier checkpoints are complete" in said and "Traceback" not in said
    steps = (16, 20) if code == 0 else (1, 4)
    assert sorted(os.listdir(kept / "checkpoints")) == [f"step-{x:06}" for x in steps]
    assert find_newest(kept / "checkpoints").name == f"step-{steps[-1]:06}"
    assert len(read_losses(kept)) >= (20 if code == 0 else 16) and not strays(kept)


@mounts
def test_resume_points_whose_disk_turns_read_only_for_a_while_are_tried_again(
        workspace):
    """As a system remounts one that has faults; the run's other files are elsewhere."""
    folder = workspace / "turns/checkpoints"
    folder.mkdir(parents=True)

    def during(run):
        if run.step + 1 in (6, 10):
            run.checkpointer.finish()
            mount("-o", f"remount,{'ro' if run.step + 1 == 6 else 'rw'},bind", folder)

    act = apart(
        rank_action(make_settings(workspace, "turns", save_every=4), during),
        ("--bind", folder, folder),
    )
    assert fork.ends(fork.together(1, act, workspace / "said-turns")) == [0]
    said = (workspace / "said-turns-0").read_text()
    assert said.count("the next save tries again") == 1 and "Traceback" not in said
    assert "step-000008: cannot be written" in said and "Read-only file system" in said
    assert (
        find_newest(folder).name == "step-000020"
        and len(read_losses(workspace / "turns")) == 20
    )


def test_metrics_that_are_rotated_away_and_a_clock_that_jumps_end_no_run(workspace):
    def odd(run):
        if run.step == 10:
            (run.out / "metrics.jsonl").rename(run.out / "metrics.jsonl.1")
        now = time.time()
        time.time = lambda: now + (-1e9 if run.step % 2 else 1e9)

    run_ranks(make_settings(workspace, "rotated"), during=odd)
    run_ranks(make_settings(workspace, "not-rotated"))
    a, b = load_result(workspace / "rotated"), load_result(workspace / "not-rotated")
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_ranks_with_other_code_or_other_data_are_refused_by_name(workspace, monkeypatch):
    """With other settings too, by the command: above."""
    from data import Source
    from training import setup

    with monkeypatch.context() as m:
        m.setattr(Source, "sha", property(lambda self: f"{os.environ['RANK']}" * 64))
        said = run_ranks(make_settings(workspace, "other-data"), world=2, codes={FLAGS})
        assert "rank 1 was started with another sha256 of kin: 1111" in said
    monkeypatch.setattr(setup, "code_sha256", lambda: os.environ["RANK"])
    assert "another code" in run_ranks(
        make_settings(workspace, "other-code"), world=2, codes={FLAGS}
    )


@pytest.mark.parametrize("rank,when", [
    (1, "a step"), *(pytest.param(rank, when, marks=pytest.mark.slow) for rank in (0, 1)
                     for when in ("an evaluation", "a save"))])
def test_a_rank_that_dies_ends_the_others_with_the_reason(workspace, rank, when):
    def dies(run):
        if run.step != 4 or run.ranks.rank != rank:
            return
        owner, touch = {"a step": (train, "train_step"),
                        "a save": (resume_point, "write_safetensors"),
                        "an evaluation": (looks, "bits")}[when]
        setattr(owner, touch, lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    begun, name = time.monotonic(), f"dies-{rank}-{when}"
    said = run_ranks(make_settings(workspace, name, save_every=3, eval_every=5), world=2,
                     codes={FLAGS, -signal.SIGKILL}, during=dies)
    assert f"rank {1 - rank}: another rank does not answer" in said and "Traceback" not in said
    assert time.monotonic() - begun < 60
    assert find_newest(workspace / name / "checkpoints") is not None
    run_ranks(make_settings(workspace, name, resume=True), world=2)
    assert len(read_losses(workspace / name)) == 20


def test_a_rank_that_hangs_is_given_up(workspace):
    def hang(run):
        if run.step == 3 and run.ranks.rank == 1:
            time.sleep(8)

    said = run_ranks(make_settings(workspace, "hangs", rank_timeout=2.0), 2, {FLAGS}, during=hang)
    assert "rank 0: another rank does not answer" in said


@pytest.mark.parametrize("world", [1, 2])
def test_memory_that_ends_is_one_line_that_says_what_to_lower(workspace, world):
    def ends(run):
        if run.step == 2 and run.ranks.rank == world - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    said = run_ranks(make_settings(workspace, f"oom-{world}"), world, {FLAGS}, during=ends)
    assert "out of memory with --rows 1 x --seq-len 32" in said and "--recompute" in said
    assert "Traceback" not in said
    run_ranks(make_settings(workspace, f"oom-{world}", resume=True), world)
    assert len(read_losses(workspace / f"oom-{world}")) == 20


def test_rows_auto_takes_the_most_that_fit_and_changes_nothing(workspace):
    """Of two ranks, where one has no more memory and the other would go on."""
    run_ranks(make_settings(workspace, "by-hand"))
    for name, world, fits in (("auto-6", 1, 6), ("auto-1", 2, 1)):
        real = NLL.sums

        def total(model, batch, real=real, fits=fits):
            ranks = torch.distributed
            if len(batch.tokens) > fits and not (ranks.is_initialized() and ranks.get_rank() == 0):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(model, batch)

        object.__setattr__(NLL, "sums", total)
        try:
            said = run_ranks(make_settings(workspace, name, rows="auto", rank_timeout=30.0), world)
        finally:
            object.__setattr__(NLL, "sums", real)
        assert f"--rows auto: {fits}\n" in said
        assert "--rows auto: trying 1 x " in said  # minutes on a CPU: each trial is announced
        one, two = read_losses(workspace / "by-hand"), read_losses(workspace / name)
        assert all(one[k] == pytest.approx(two[k], rel=1e-5) for k in one)
        assert f"rows = {fits}\n" in (workspace / name / "settings.toml").read_text()


def test_rows_auto_never_tries_what_the_last_sizes_let_expect_not_to_fit():
    tried = []

    def peak_gb(_):
        return 1.0 + 0.5 * max(tried, default=0)

    class Nothing:
        def to(self, _):
            return self

    model = torch.nn.Linear(1, 1)
    objective = Objective(lambda m, b: m(torch.ones(1)).sum(), len)
    cpu = Distributed(0, 1, torch.device("cpu"))
    memory = MemoryTrial(model, objective, cpu, "adamw", 3.3 / 0.92, peak_gb)
    assert largest_fitting(
        24, lambda n: memory.fits(n, 1, lambda: (tried.append(n), Nothing())[1])) == 4
    assert tried == [1, 2, 3, 4]
    assert not memory.fits(4, 2, lambda: (tried.append(5), Nothing())[1])  # the second pass' more
    limits = {kind: MemoryTrial(torch.nn.Linear(512, 512), objective, cpu, kind, 3.3 / 0.92,
                                 peak_gb).limit for kind in ("adamw", "adamw-bf16")}
    assert limits["adamw-bf16"] > limits["adamw"]
    with pytest.raises(UserError, match="not even one row"):
        largest_fitting(24, lambda n: False)


def test_a_checkpoint_of_a_newer_format_is_refused_and_one_of_the_first_is_read(tmp_path):
    root = tmp_path / "checkpoints"
    folder = save_checkpoint(root, 3, {"model": {"w": torch.ones(2)}}, {"step": 3}, 2)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format": FORMAT + 1}))

    described(folder)
    with pytest.raises(UserError, match=r"\(format 3, this version reads up to 2\)"):
        read_checkpoint(find_newest(root))
    first = root / "step-000004"  # as version 0.1 wrote it, before there were ranks in it
    first.mkdir()
    tensors = {"a": torch.arange(6.0).view(3, 2), "b/step": torch.tensor(3.0)}
    save_file(tensors, first / "model.safetensors")
    (first / "state.json").write_text('{"step": 4}')
    described(first)
    parts, state = read_checkpoint(find_newest(root))
    assert state == {"step": 4} and all(torch.equal(parts["model"][k], x)
                                        for k, x in tensors.items())


def test_a_loss_that_jumps_is_said_with_its_documents(workspace):
    def jump(run):
        if run.step == 29:
            objective = NLL.sums
            object.__setattr__(NLL, "sums", lambda m, b: 5 * objective(m, b))
        elif run.step == 30:
            object.__setattr__(NLL, "sums", REAL)

    def cut(run):  # what the losses were goes with the resume point
        if run.step == 27:
            os.kill(os.getpid(), signal.SIGTERM)

    run_ranks(make_settings(workspace, "jump-cut", steps=32), codes={143}, during=cut)
    for name in ("jump", "jump-cut"):
        said = run_ranks(
            make_settings(workspace, name, steps=32, resume=name == "jump-cut"), during=jump
        )
        assert "step 30: loss" in said and "far above" in said
        (line,) = (workspace / name / "odd_steps.jsonl").read_text().splitlines()
        odd = json.loads(line)
        assert (odd["step"], odd["what"]) == (30, "spike")
        assert set(odd["documents"]) == {"kin", "eng"}


REAL = NLL.sums


TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def launched(s: Settings, until: str, *flags: str,
             machines: int = 1) -> tuple[list[subprocess.Popen], list[int]]:
    """A run on two ranks that has come to a checkpoint: the torchruns, one for each "machine", and
    the ranks' processes."""
    if machines == 1:
        flags = ("--standalone", *flags)
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        flags = ("--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint",
                 f"localhost:{port}", *flags)
    going = [subprocess.Popen([*TORCHRUN, "--nproc-per-node", str(2 // machines), *flags,
                               "train.py", str(write_recipe(s))],
                              env=ENV, cwd=ROOT, stderr=subprocess.PIPE, text=True)
             for _ in range(machines)]
    while not (Path(s.out) / "checkpoints" / until).exists():
        for x in going:
            assert x.poll() is None, x.stderr.read()[-2000:]
        time.sleep(0.02)
    ranks = subprocess.run(["pgrep", "-P", ",".join(str(x.pid) for x in going)],
                           capture_output=True, text=True)
    return going, [int(x) for x in ranks.stdout.split()]


@pytest.mark.parametrize("how,rank", [
    ("ddp", 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in
                  (("ddp", 0), ("fsdp", 0), ("fsdp", 1)))])
def test_torchrun_is_down_soon_after_a_rank_was_killed_and_says_which(
        workspace, how, rank):
    """Not a matter of speed (0.6 s here) but of not hanging: nobody waits for the dead."""
    s = make_settings(workspace, f"down-{how}-{rank}", steps=5000, save_every=5, shard=how)
    (going,), ranks = launched(s, "step-000010")
    os.kill(ranks[rank], signal.SIGKILL)
    said = going.communicate(timeout=15)[1]
    assert going.returncode == 1 and f"Signal 9 (SIGKILL) received by PID {ranks[rank]}" in said
    assert rank == 0 or "rank 0: another rank does not answer" in said
    assert not any(Path(f"/proc/{x}").exists() for x in ranks)
    assert find_newest(Path(s.out) / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_starts_again_after_a_rank_was_killed_and_the_run_goes_on_by_itself(
        workspace, machines):
    s = make_settings(workspace, f"elastic-{machines}", steps=60, save_every=5, eval_every=1000)
    going, ranks = launched(s, "step-000010", "--max-restarts", "1", machines=machines)
    os.kill(ranks[1], signal.SIGKILL)
    said = "".join(x.communicate(timeout=120)[1] for x in going)
    assert [x.returncode for x in going] == [0] * machines, said[-4000:]
    assert "resumed from" in said and len(read_losses(Path(s.out))) == 60


@pytest.mark.parametrize("counted", [0, 1])
def test_all_ranks_go_on_if_one_machines_torchrun_alone_counted_the_restart(
        workspace, counted):
    s = make_settings(workspace, f"counted-{counted}", rank_timeout=20.0)
    run_ranks(s, world=2, codes={143}, during=send_signal_at(7))

    def again() -> None:
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(int(os.environ["RANK"]) == counted))
        fork.train(str(write_recipe(s)))()

    said = workspace / f"said-counted-{counted}"
    ends = fork.ends(fork.together(2, again, said))
    text = "".join(said.with_name(f"{said.name}-{i}").read_text() for i in range(2))
    assert ends == [0, 0], text[-2000:]
    assert "resumed from" in text and len(read_losses(Path(s.out))) == 20


def test_the_plan_of_several_ranks_is_printed_once(workspace):
    """And nothing of a run is written."""
    said = run_ranks(make_settings(workspace, "planned", plan=True), world=2)
    assert said.count("\nmachine      2 x CPU") == 1 and said.count("the first row;") == 1
    assert not (workspace / "planned/settings.toml").exists()


def test_the_documents_of_a_row_are_those_whose_tokens_it_holds(workspace):
    """Found without reading the row, and found by looking every token up."""
    from data import Bin, Loader, Source
    from preparation.bin_writer import BinWriter
    from tokenization.document import Document

    sources = []
    for kind in ("text", "pairs"):
        writer = BinWriter(workspace / f"known-{kind}", "f" * 64, 1000, kind)
        draw = random.Random(3)
        for i in range(40):  # a document's tokens say which document it is
            writer.add(Document([i + 10] * draw.randint(0 if kind == "text" else 2, 9), None, 1))
        writer.close({}, [])
        keep = torch.tensor([i for i in range(40) if i // 2 % 5]).numpy()
        sources.append(Source(kind, Bin(workspace / f"known-{kind}"), keep, 1.0))
    for source in sources:
        stream = Loader([source], 20, 1, seed=5).streams[0]
        for i in range(3 * stream.rows):
            row = stream.row(i)
            held = sorted({int(t) - 10 for t in row[0][row[2] >= 0]})
            assert sorted(stream.documents_in(i)) == held, (source.name, i)


def test_the_scale_of_an_fp16_loss_halves_doubles_and_is_off_at_one():
    from training.optimizer import LossScale

    scale = LossScale(65536.0)
    scale.update(finite=False)
    assert scale.value == 32768.0
    for _ in range(1999):
        scale.update(finite=True)
    assert scale.value == 32768.0
    scale.update(finite=True)
    assert (scale.value, scale.good_steps) == (65536.0, 0)
    for _ in range(100):
        scale.update(finite=False)
    assert scale.value == 2.0
    off = LossScale()
    off.update(finite=False)
    assert off == LossScale(1.0, 0)


def test_a_run_that_goes_on_keeps_the_dtype_and_the_step_that_it_began_with(workspace):
    run_ranks(
              make_settings(workspace, "kept", dtype="auto", tokens_per_step=0, steps=4),
              codes={143},
              during=send_signal_at(2),
    )
    kept = (workspace / "kept/settings.toml").read_text()
    assert 'dtype = "auto"' not in kept and "tokens_per_step = 32\n" in kept
    assert "no multiple of 64" in run_ranks(
        make_settings(workspace, "kept", resume=True), 2, {FLAGS}
    )
