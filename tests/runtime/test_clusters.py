"""The commands for several machines in docs/clusters.md, run as they stand there: "machines" are
agents of torchrun on this one, which meet over TCP."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest

from helpers.train_runs import ENV, make_settings, read_losses, run_ranks, write_recipe
from runtime.paths import ROOT

PAGE = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")

TOOLS = {  # what stands in for SLURM's: they start, name and signal real processes
    "torchrun": """exec {python} -m torch.distributed.run "$@" """,
    "srun": """for node in $(seq "$SLURM_NNODES"); do
    setsid "$@" & echo $! >> "$STEP"
done
wait""",
    "scontrol": """case $1 in
    show) seq "$SLURM_NNODES" | sed "s/.*/localhost/" ;;
    requeue) echo "$2" >> "$STEP.requeued" ;;
    *) exit 1 ;;
esac""",
    "scancel": """[ "$1 $2" = "--signal=TERM $SLURM_JOB_ID.0" ] || exit 1
for group in $(cat "$STEP"); do kill -TERM -- "-$group"; done""",
}


def a_port() -> int:
    """One that is free, of those that the script may choose."""
    for port in range(23000, 39000):
        with socket.socket() as s:
            if s.connect_ex(("localhost", port)):
                return port
    raise AssertionError("no port is free")


@pytest.mark.slow
def test_the_command_for_two_machines_trains_as_one_rank_does(workspace):
    (line,) = re.findall(r"^torchrun --nnodes 2.*$", PAGE, re.M)
    s = make_settings(workspace, "machines", steps=6)
    words = shlex.split(line)
    here = {"--nproc-per-node": "1", "--rdzv-endpoint": f"localhost:{a_port()}"}
    at = words.index("train.py")
    words = [sys.executable, "-m", "torch.distributed.run",
             *(here.get(before, x) for before, x in itertools.pairwise(words[:at])),
             "train.py", str(write_recipe(s))]
    both = [subprocess.Popen(words, env=ENV, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    said = [x.communicate(timeout=120)[1] for x in both]
    assert [x.returncode for x in both] == [0, 0], said
    assert "2 x CPU" in "".join(said)
    run_ranks(make_settings(workspace, "one-machine", steps=6))
    one, two = read_losses(workspace / "one-machine"), read_losses(workspace / "machines")
    assert all(two[k] == pytest.approx(one[k], rel=1e-5) for k in one) and len(two) == 6


@pytest.mark.slow
def test_the_slurm_script_saves_before_its_time_is_up_and_goes_on_when_queued_again(
        workspace, tmp_path):
    script = PAGE.split("## SLURM")[1].split("```")[1].strip()
    s = make_settings(workspace, "slurm", steps=300, save_every=1000)
    for name, value in (("out", s.out), ("flags", write_recipe(s))):
        script, n = re.subn(rf"(?m)^{name}=.*$", f'{name}="{value}"', script)
        assert n == 1
    (tmp_path / "job.sh").write_text(script)
    for name, text in TOOLS.items():
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/bash\n{text.replace('{python}', sys.executable)}\n")
        tool.chmod(0o755)
    port = a_port()
    env = {**ENV, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_NNODES": "2",
           "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": str(port - 20000),
           "SLURM_GPUS_ON_NODE": "1"}

    def job(turn: int) -> subprocess.Popen:
        return subprocess.Popen(["bash", tmp_path / "job.sh"], cwd=ROOT, stderr=subprocess.PIPE,
                                env={**env, "STEP": str(tmp_path / f"step-{turn}")}, text=True)

    first = job(1)
    while not (workspace / "slurm/checkpoints/step-000001").exists():
        assert first.poll() is None, first.stderr.read()[-3000:]
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)  # as #SBATCH --signal=B:TERM@120 does
    said = first.communicate(timeout=60)[1]
    stopped = max(read_losses(workspace / "slurm"))
    assert f"stopped and saved at step {stopped}" in said and 1 <= stopped < 300, said[-3000:]
    assert (tmp_path / "step-1.requeued").read_text() == f"{port - 20000}\n"
    second = job(2)
    said = second.communicate(timeout=120)[1]
    assert f"resumed from {workspace}/slurm/checkpoints/step-{stopped:06}" in said, said[-3000:]
    assert len(read_losses(workspace / "slurm")) == 300 and (workspace / "slurm/model").exists()
