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
    found = bench.child("bench.limits", "peaks", "tiny")
    assert all(found[k] > 0 for k in ("bfloat16", "float32", "read", "threads"))
    assert 0.05 < found["gb"] < 8


def test_a_child_that_fails_stops_the_program_with_what_it_said():
    with pytest.raises(SystemExit, match="KeyError"):
        bench.child("bench.limits", "peaks", "no such size")


@pytest.mark.slow
@pytest.mark.parametrize("job", everything.JOBS)
def test_a_job_runs_and_its_sides_agree(job):
    command = [sys.executable, "-m", f"bench.{job}", "--tiny"]
    done = subprocess.run(command, cwd=bench.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if f"bench.{job}: skipped" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert f"python -m bench.{job} --tiny" in done.stdout and "FAULT" not in done.stderr


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
    found = []
    monkeypatch.setattr(sys, "argv", ["", "--rounds", "3", "--cases", "two"])
    assert bench.main("bench.a", "A", {}, lambda s: found.append(s) or "", ["one", "two"]) == 0
    monkeypatch.setattr(sys, "argv", ["", "--quick"])
    assert bench.main("bench.a", "A", {}, lambda s: found.append(s) or "", ["one", "two"]) == 0
    assert [(s.size, s.rounds, s.cases) for s in found] == [("full", 3, ["two"]), ("quick", 1, [])]


def test_a_ratio_has_the_range_of_its_rounds():
    theirs, ours = [[3, 4, 5], [6, 6, 9]], [[2, 2, 2], [4, 4, 3]]
    assert bench.ratio(theirs, ours, " times") == "1.75 times (1.50 to 2.00 by round)"
    assert bench.ratio([[3, 4, 5]], [[2]]) == "2.00"
