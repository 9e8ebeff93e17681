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
