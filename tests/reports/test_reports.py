"""The page a run ends with: it shows what is in the files, runs none of it, and never fails."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.browser import CHROMIUM, browser
from reports.evaluation_report import baseline_name, write_evaluation_report
from reports.training_report import format_duration, write_training_report

HOSTILE = "<script>alert(1)</script>&\"'$x^2$"
SAMPLES = """== step 0
-- Umwana
 one
two
-- == step 5 <b>
eng
== step 20
-- Umwana
 ari mu rugo
-- == step 5 <b>
kin
"""


class Page(HTMLParser):
    """A page's tags with their attributes, its visible text, and its table rows."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
        self.rows = [[re.sub(r"<[^>]*>", "", cell).strip()
                      for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in rows]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def step(n: int, **more: object) -> dict:
    return {"step": n, "tokens": 64 * n, "loss": 9 / n, "lr": 1e-3 / n, "grad_norm": 2.0,
            "tokens_per_second": 100.0 * n, "mfu": None, "memory_gb": 0.5,
            "share": {"kin": 0.75, "eng": 0.25}, **more}


def leave(out: Path, name: str = "kin", samples: str = SAMPLES, curves: bool = True) -> Path:
    """Write what a run of 20 steps leaves in its folder; without `curves` an empty metrics.jsonl,
    which saves the time of drawing."""
    lines = [{"step": 0, "bits_per_byte": {name: 4.0, "eng": 1.0}}, *map(step, range(1, 11)),
             {"step": 10, "bits_per_byte": {name: 1.5, "eng": 1.2}}, *map(step, range(11, 21)),
             {"step": 20, "bits_per_byte": {name: 2.0, "eng": 1.1},
              "held_out_loss": {name: 5.0, "eng": 2.5}}]
    text = "".join(json.dumps(x) + "\n" for x in lines)
    (out / "metrics.jsonl").write_text(text if curves else "")
    (out / "run.json").write_text(json.dumps({
        "command": f"python train.py --out '{name}'", "device": "CPU", "model": name,
        "started": "2026-12-01 10:00:00", "finished": "2026-12-01 12:05:59",
        "commit": "0123456789abcdef", "data": {"kin": "fedcba9876543210"},
        "parameters": {"total": 2000, "trained": 1000}, "changed_settings": {"lr": 1e-3}}))
    (out / "settings.toml").write_text(
        f'mode = "cpt"\nlr = 0.001\nseq_len = 128\nval = [{json.dumps(name)}]\n')
    (out / "samples.txt").write_text(samples)
    return out


def page_of(out: Path) -> Page:
    path = write_training_report(out)
    assert path == out / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_before_after_and_best_are_those_of_the_metrics(tmp_path):
    page = page_of(leave(tmp_path))
    assert ["kin", "4.0000", "2.0000", "-50.0 %", "1.5000 step 10"] in page.rows
    assert ["eng", "1.0000", "1.1000", "+10.0 %", "1.0000 step 0"] in page.rows
    assert ("1,000 of 2,000 parameters trained · 20 steps, 1,280 tokens · "
            "1,050 trained tokens per second (median) · 0.50 GB at most") in page.text


def test_the_report_says_when_a_run_started_and_how_long_it_took(tmp_path):
    # 64 tokens a step, step n at 100 n tokens per second
    seconds = round(sum(64 / (100 * n) for n in range(1, 21)))
    assert (f"started 2026-12-01 10:00:00 · finished after 2 h 5 min · steps took {seconds} s"
            in page_of(leave(tmp_path)).text)
    assert [format_duration(x) for x in (59, 61, 90_061)] == ["59 s", "1 min 1 s", "1 d 1 h"]
    (tmp_path / "metrics.jsonl").write_text("")
    run = json.loads((tmp_path / "run.json").read_text())
    del run["finished"]
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert "finished after" not in page_of(tmp_path).text
    write_training_report(tmp_path, finished="2026-12-01 10:00:07")
    assert "finished after 7 s" in (tmp_path / "report.html").read_text()
    for damaged in (5, [], "yesterday", "2026-13-41 99:00:00"):
        (tmp_path / "run.json").write_text(json.dumps({**run, "finished": damaged}))
        assert "finished after" not in page_of(tmp_path).text


def test_hashes_are_folded(tmp_path):
    page = write_training_report(leave(tmp_path, curves=False)).read_text()
    visible = re.sub(r"(?s)<details.*?</details>", "", page)
    for value in ("0123456789abcdef", "fedcba9876543210"):
        assert value in page and value not in visible
    assert "device" in visible


def test_a_model_that_is_not_the_last_one_is_named(tmp_path):
    assert "The model is that of" not in page_of(leave(tmp_path)).text
    about = json.loads((tmp_path / "run.json").read_text())
    for step in (20, 10):
        (tmp_path / "run.json").write_text(json.dumps({**about, "model_step": step}))
        (tmp_path / "settings.toml").write_text('best = "kin"\n')
        said = "The model is that of step 10, the best of kin." in page_of(tmp_path).text
        assert said == (step == 10)
    (tmp_path / "settings.toml").write_text("")  # of a run whose last look was not its last step
    assert "The model is that of" not in page_of(tmp_path).text


def test_a_text_first_seen_later_is_in_the_table_too(tmp_path):
    with open(leave(tmp_path) / "metrics.jsonl", "a") as f:
        f.write('{"step": 30, "bits_per_byte": {"kin": 1.0, "swa": 3.0}}\n')
    assert ["swa", "3.0000 step 30", "3.0000", "+0.0 %", "3.0000 step 30"] in page_of(tmp_path).rows


def test_a_change_is_coloured_unless_it_is_shown_as_0(tmp_path):
    lines = [{"step": 0, "bits_per_byte": {"kin": 4.0, "eng": 1.0, "swa": 2.0}},
             {"step": 9, "bits_per_byte": {"kin": 3.0, "eng": 1.5, "swa": 2.0}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    page_of(tmp_path)
    cells = dict(re.findall(r'<td class="n ?(\w*)">([+-][\d.]+ %)</td>',
                            (tmp_path / "report.html").read_text()))
    assert cells == {"good": "-25.0 %", "bad": "+50.0 %", "": "+0.0 %"}


def test_all_curves_are_drawn_in_the_page(tmp_path):
    page = page_of(leave(tmp_path))
    assert [a["aria-label"] for tag, a in page.tags if tag == "figure"] == [
        "bits per byte of held-out text", "loss", "learning rate", "gradient norm", "speed",
        "mixture"]
    assert sum(tag == "svg" for tag, _ in page.tags) == 6


def figures_of(out: Path) -> dict[str, str]:
    """The text in each plot of the report, by title."""
    page = write_training_report(out).read_text()
    return {title: Page(svg).text for title, svg in
            re.findall(r'(?s)<figure role="img" aria-label="(.*?)">(.*?)</figure>', page)}


def test_every_plot_names_its_axes_and_units(tmp_path):
    texts = figures_of(leave(tmp_path))
    for title, label in (("bits per byte of held-out text", "bits per byte"),
                         ("loss", "nats per token"), ("learning rate", "learning rate"),
                         ("gradient norm", "L2 norm before clipping"),
                         ("speed", "trained tokens per second"),
                         ("mixture", "share of all tokens so far")):
        lines = [x.strip() for x in texts[title].split("\n")]
        assert label in lines and "step" in lines, (title, lines)


def test_training_and_held_out_loss_are_in_one_plot_if_their_units_are_the_same(tmp_path):
    text = figures_of(leave(tmp_path))["loss"]
    assert "training" in text and "held-out kin" in text and "held-out eng" in text
    (tmp_path / "settings.toml").write_text('mode = "dpo"\n')
    texts = figures_of(tmp_path)
    assert "loss per pair" in texts["training loss"] and "held-out" not in texts["training loss"]
    assert "nats per token" in texts["loss of held-out text"]


def test_samples_stand_side_by_side_under_their_prompt(tmp_path):
    text = " ".join(page_of(leave(tmp_path, curves=False)).text.split())
    assert ("Umwana … step 0 one two step 20 ari mu rugo "
            "== step 5 <b> … step 0 eng step 20 kin") in text


def test_chosen_settings_come_first_and_all_can_be_unfolded(tmp_path):
    rows = page_of(leave(tmp_path, curves=False)).rows
    assert rows.count(["lr", "0.001"]) == 2 and rows.count(["seq-len", "128"]) == 1


def test_the_page_needs_no_other_file_and_its_ids_are_its_own(tmp_path):
    page = page_of(leave(tmp_path))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    refs = [v for _, a in page.tags for k, v in a.items() if k in ("href", "src", "xlink:href")]
    assert refs and all(v.startswith("#") for v in refs)
    ids = Counter(a["id"] for _, a in page.tags if "id" in a)
    assert max(ids.values()) == 1
    assert {v[1:] for v in refs} <= ids.keys()


def test_names_texts_and_commands_are_shown_and_not_run(tmp_path):
    samples = f"== step 0\n-- {HOSTILE}\n{HOSTILE}\n"
    out = leave(tmp_path, name=HOSTILE, samples=samples)
    page = page_of(out)
    assert "script" not in {tag for tag, _ in page.tags}
    page = re.sub(r"(?s).*?</style>", "", (out / "report.html").read_text(), count=1)
    legend = Page(page[page.index("<svg"):page.rindex("</svg>")])
    assert HOSTILE in legend.text and HOSTILE in Page(page).text
    assert "<script" not in (out / "report.html").read_text()


def test_the_same_run_gives_the_same_page(tmp_path):
    first = write_training_report(leave(tmp_path)).read_bytes()
    assert write_training_report(tmp_path).read_bytes() == first


def test_steps_that_were_not_finite_leave_a_gap_and_no_word(tmp_path):
    with open(leave(tmp_path) / "metrics.jsonl", "a") as f:
        f.write(json.dumps(step(21, loss=None, grad_norm=None)) + "\n")
        f.write('{"step": 22, "bits_per_byte": {"kin": NaN, "eng": null}}\n')
    page = page_of(tmp_path)
    assert ["kin", "4.0000", "2.0000", "-50.0 %", "1.5000 step 10"] in page.rows
    assert "nan" not in page.text.lower() and "left out" not in page.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "settings.toml", "samples.txt"])
def test_what_is_missing_is_said(tmp_path, name):
    (leave(tmp_path) / name).unlink()
    assert name in page_of(tmp_path).text


def test_an_empty_folder_still_gives_a_page(tmp_path):
    assert "No evaluation in metrics.jsonl." in page_of(tmp_path).text


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "settings.toml"])
@pytest.mark.parametrize("junk", [
    b'{"step": 2, "tok', b"3\n[]\nnull", b"\xff\xfe\x00", b"[" * 99_999, b'{"step": "x"'])
def test_what_is_damaged_is_said_and_left_out(tmp_path, name, junk):
    (leave(tmp_path, curves=name == "metrics.jsonl") / name).write_bytes(junk)
    text = page_of(tmp_path).text
    assert re.search(rf"{re.escape(name)}.*left out", text)


def test_a_line_cut_short_by_a_kill_costs_only_itself(tmp_path):
    with open(leave(tmp_path) / "metrics.jsonl", "a") as f:
        f.write('{"step": 21, "loss": 0.')
    page = page_of(tmp_path)
    assert "metrics.jsonl: 1 unreadable line left out." in page.text
    assert ["kin", "4.0000", "2.0000", "-50.0 %", "1.5000 step 10"] in page.rows


@pytest.mark.parametrize("text", [
    "", "== step 0\n", "-- a\nb\n", "== step 0\n-- a\nb\n== step 5\n", "== step x\n-- a\n"])
def test_samples_of_any_shape_are_no_error(tmp_path, text):
    page_of(leave(tmp_path, samples=text, curves=False))


def result(metric: str, value: float, difference: float, p: float, **more: object) -> dict:
    """An entry of results.json, compared with a baseline; the interval's half width is 0.05."""
    return {"suite": "sib200", "part": "", "prompt": "1", "metric": metric, "value": value,
            "low": value - 0.05, "high": value + 0.05, "n": 200, "partial": False,
            "signature": "suite:sib200.1", "baseline": {
                "value": value - difference, "difference": difference, "low": difference - 0.01,
                "high": difference + 0.01, "p": p}, **more}


def write_results(out: Path, results: list[dict], **settings: object) -> Path:
    """Write results.json with these results and settings, and its report; returns the report."""
    (out / "results.json").write_text(json.dumps({
        "model": "out/kin/model", "command": "python eval.py", "results": results,
        "settings": {"model": "out/kin/model", "baseline": "out/eval/base", **settings}}))
    return write_evaluation_report(out)


@pytest.mark.parametrize(("row", "colour"), [
    (result("acc", 0.60, 0.1, 0.01, chance=0.5), "good"),
    (result("acc", 0.54, 0.1, 0.01, chance=0.5), ""),  # a gain that ends at chance
    (result("acc", 0.60, 0.1, 0.06, chance=0.5), ""),
    (result("acc", 0.50, -0.1, 0.01, chance=0.5), "bad"),
    (result("acc", 0.40, -0.1, 0.01, chance=0.5), ""),  # a loss that began at chance
    (result("chrF2++", 30.0, 1.0, 0.01), "good"), (result("chrF2++", 30.0, -1.0, 0.01), "bad"),
    (result("copy_rate", 0.3, 0.1, 0.01), "bad"), (result("length_ratio", 0.9, 0.1, 0.01), "")])
def test_a_difference_is_coloured_by_its_p_and_by_chance(tmp_path, row, colour):
    page = write_results(tmp_path, [row]).read_text()
    cells = re.findall(r'<td class="n (\w*)">([+-][\d.]+)\s', page)
    assert cells == [(colour, f"{row['baseline']['difference']:+.4f}")]


def test_the_evaluation_report_names_the_baseline_and_the_number_of_comparisons(tmp_path):
    rows = [result("acc", 0.6, 0.1, 0.01, prompt=prompt, chance=0.25) for prompt in "12"]
    rows.append({**rows[0], "prompt": "mean", "prompts": 2, "least": 0.5, "most": 0.7})
    page = Page(write_results(tmp_path, rows, baseline_model="org/SmolLM2").read_text())
    text = " ".join(page.text.split())
    assert "3 comparisons with SmolLM2. Between equal models 0.15 of 3" in text
    assert "mean of 2 prompts value, 95 % difference, 95 % SmolLM2" in text
    assert text.count("chance 0.250") == 3 and text.count("p 0.010") == 3
    assert baseline_name({"baseline": "out/eval/base"}) == "base"  # of an older eval.py
    assert baseline_name({}) == "the baseline"


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here to open the page")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_of_it_on_a_wide_and_on_a_narrow_screen(tmp_path, width):
    """Not wider than the screen, plots drawn, and no name broken into a column of letters."""
    long = "kin_news_val " + "mu-rwanda/" * 30
    write_training_report(leave(tmp_path, "kin_news_validation", f"== step 0\n-- a\n{long}\n"))
    with browser(tmp_path / "profile") as tab:
        tab.open((tmp_path / "report.html").as_uri(), width)
        plots, rows = (tab.run(f"[...document.querySelectorAll({q!r})]"
                               ".map(x => x.getBoundingClientRect().height)")
                       for q in ("figure svg", "table:not(.facts) tr"))
        wide = tab.run("document.documentElement.scrollWidth")
    assert wide <= width and min(plots) > 100 and max(rows) < 80
