"""The benchmarks' frame: sections replace themselves, peaks come from the system, faults fail."""

import subprocess
import sys

import pytest

import bench
from bench import __main__ as everything


def test_a_section_replaces_itself_and_touches_nothing_else(tmp_path, monkeypatch):
    page = tmp_path / "benchmarks.md"
    monkeypatch.setattr(bench, "PAGE", page)
    page.write_text("# Head\n")
    bench.write("bench.a", "first\n")
    bench.write("bench.b", "beside\n")
    bench.write("bench.a", "second\n")
    text = page.read_text()
    assert text.startswith("# Head\n") and "first" not in text
    assert text.index("second") < text.index("beside") and text.count("<!-- bench.a -->") == 1


def test_an_exponent_is_that_of_the_power_law_it_was_drawn_from():
    x = [512, 1024, 4096]
    assert bench.exponent(x, [3 * v**1.5 for v in x]) == pytest.approx(1.5)


def test_a_column_of_numbers_is_set_to_the_right():
    lines = bench.table(["a", "b"], [["x1", "1.5"], ["2", "3 to 4"]]).splitlines()
    assert lines[1] == "| --- | ---: |" and lines[3] == "| 2 | 3 to 4 |"


def test_a_childs_peak_is_the_systems_and_its_limits_are_positive():
    result = bench.child("bench.limits", "peaks", "tiny")
    assert all(result[k] > 0 for k in ("bfloat16", "float32", "read", "threads"))
    assert 0.05 < result["gb"] < 8


def test_a_child_that_fails_stops_the_program_with_what_it_said():
    with pytest.raises(SystemExit, match="KeyError"):
        bench.child("bench.limits", "peaks", "no such size")


@pytest.mark.slow
@pytest.mark.parametrize("job", everything.JOBS)
def test_a_job_runs_and_its_sides_agree(job):
    command = [sys.executable, "-m", f"bench.{job}", "--tiny"]
    process = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    if f"bench.{job}: skipped" in process.stderr:
        pytest.skip(process.stderr.strip())
    assert f"python -m bench.{job} --tiny" in process.stdout and "FAULT" not in process.stderr


@pytest.mark.parametrize("flags, said", [
    (["--rounds", "2"], "unrecognized arguments: --rounds 2"),
    (["--cases", "anything"], "unrecognized arguments: --cases anything")])
def test_an_option_that_a_job_has_no_use_for_is_refused(monkeypatch, capsys, flags, said):
    monkeypatch.setattr(sys, "argv", ["", *flags])
    with pytest.raises(SystemExit) as stop:
        bench.main("bench.a", "A", {}, lambda s: "never", rounds=0)
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("flags, said", [
    (["--cases", "other"], "invalid choice: 'other'"), (["--rounds", "0"], "--rounds 0"),
    (["--tiny", "--write"], "--tiny: not with")])
def test_a_value_that_means_nothing_is_refused(monkeypatch, capsys, flags, said):
    monkeypatch.setattr(sys, "argv", ["", *flags])
    with pytest.raises(SystemExit) as stop:
        bench.main("bench.a", "A", {}, lambda s: "never", ["one", "two"])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_jobs_options_reach_it(monkeypatch):
    received = []
    monkeypatch.setattr(sys, "argv", ["", "--rounds", "3", "--cases", "two"])
    assert bench.main("bench.a", "A", {}, lambda s: received.append(s) or "", ["one", "two"]) == 0
    monkeypatch.setattr(sys, "argv", ["", "--quick"])
    assert bench.main("bench.a", "A", {}, lambda s: received.append(s) or "", ["one", "two"]) == 0
    options = [(s.size, s.rounds, s.cases) for s in received]
    assert options == [("full", 3, ["two"]), ("quick", 1, [])]


def test_a_ratio_has_the_range_of_its_rounds_and_the_quartiles_of_many():
    assert bench.ratio([4, 6], [2, 4], " times") == "1.75 times (1.50 to 2.00 by round)"
    assert bench.ratio([4], [2]) == "2.00"
    assert bench.ratio([1, 2, 3, 4, 100], [1] * 5) == "3.00 (quartiles 1.50, 52.00)"
    assert bench.ratio([2, 20], [1, 10]) == "2.00 (2.00 to 2.00 by round)"  # a slow minute: of both


JOB = """
import os, sys
import bench

def turns(name, file):
    print("a library's words")
    os.system("echo a program's words")
    yield {"name": name}
    for i in range(3):
        with open(file, "a") as f:
            f.write(f"{name}{i} ")
        yield {"i": i, "pid": os.getpid(), "loss": float(os.environ["LOSS"])}

def job(s):
    found = bench.alternate("job", s.rounds, {x: ("turns", [x, s.cases[0]]) for x in "ab"})
    assert {first["gb"] > 0 for first, _ in found.values()} == {True}
    assert [first["name"] for first, _ in found.values()] == ["a", "b"]
    assert [[x["i"] for x in turns] for _, turns in found.values()] == [list(range(s.rounds))] * 2
    assert len({x["pid"] for _, turns in found.values() for x in turns}) == 2
    return "done"

if __name__ == "__main__":
    sys.exit(bench.main("job", "A job", {"turns": turns}, job, [sys.argv[-1]], unit="turns"))
"""


@pytest.mark.parametrize("rounds, loss, code, said, seen", [
    (3, "1", 0, "", "a0 b0 a1 b1 a2 b2 "), (4, "1", 1, "StopIteration", "a0 b0 a1 b1 a2 b2 "),
    (3, "nan", 1, "not JSON compliant", "a0 ")])
def test_sides_that_stand_side_by_side_take_turns(tmp_path, monkeypatch, rounds, loss, code, said,
                                                  seen):
    """In two real processes; one that has no further turn, or gives a number that is none, ends the
    program with what it said."""
    (tmp_path / "job.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("LOSS", loss)
    process = subprocess.run(
        [sys.executable, "-m", "job", "--rounds", str(rounds), "--cases", str(tmp_path / "seen")],
        cwd=bench.ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == code and said in process.stderr, process.stderr
    assert (tmp_path / "seen").read_text() == seen
