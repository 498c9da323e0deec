"""The page of a comparison: what it computes, what it shows of every cell, and what is skipped among its arguments."""

import json
import re

import numpy as np
import pytest
from browser import Page, chromium
from run_fixture import SCRIPT, make_run

from isentropic import report
from isentropic.cli import main
from isentropic.experiments.compare import compare, remarks, tables
from isentropic.experiments.lines import line_of, name_cells
from isentropic.report import compared
from isentropic.runs.frontier import frontier
from isentropic.runs.record import Record

EVERY = "statistics what curves temperatures single".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    for recipe, hold in (("grpo", False), ("isentropic", True)):
        for seed in range(3):
            folder = make_run(home / f"{recipe}-{seed}", 60, seed, recipe, hold)
            header = json.loads((folder / "run.json").read_text())
            header["config"] |= {"model": f"m{SCRIPT}"}
            (folder / "run.json").write_text(json.dumps(header))
            end = Record(folder).rows("evaluations")[-1]
            (folder / "summary.json").write_text(json.dumps({"steps": 60, "seconds": 387.25 + seed, "end": end}))
    return home


@pytest.fixture(scope="module")
def found(home):
    paths = sorted(home.iterdir())
    lines = name_cells(line_of(Record(path)) for path in paths)
    comparison = compare(lines, "grpo")
    runs = {line["cell"]: path for line, path in reversed(list(zip(lines, paths, strict=True)))}
    return report.Compared(lines, tables(comparison), remarks(comparison), runs)


def traces_of(panel, i, cell):
    return [trace for trace in panel.figures[i].traces if trace["meta"]["run"] == cell]


def test_the_page_has_every_panel_and_nothing_a_run_wrote_is_markup(found):
    text = report.render_comparison(found)
    shown = re.findall(r'<section id="(\w+)" class="panel"', text)
    assert shown[: len(EVERY)] == EVERY
    assert "hold" in shown
    assert "2 cells, 6 runs compared" in text
    assert SCRIPT not in text
    assert "&lt;script&gt;window.owned" in text


def test_the_tables_are_those_of_the_console_with_their_intervals(found):
    panel = compared.panels(found, compared.read_cells(found))[0]
    assert panel.id == "statistics"
    _, head, rows = next(x for x in found.tables if "distinct" in x[1])
    text = next(row for row in rows if row[0] == "isentropic")[head.index("distinct")]
    mean, low, high = re.fullmatch(r"(\S+) \((\S+)\.\.(\S+)\)", text).groups()
    assert f"<span>{mean}<small>{low} to {high}</small></span>" in panel.body
    assert "Probability that a run beats one of grpo" in panel.body
    assert all(remark.split(" (")[0] in panel.body for remark in found.remarks)


def test_each_cell_says_what_its_runs_are(found):
    panel = compared.panels(found, compared.read_cells(found))[1]
    assert "knob zeta, controller pi, target 75%" in panel.body
    assert "3: expr; seed 0, 1, 2" in panel.body
    assert "A − ζ|A|·L" in panel.body
    assert "All 6 runs" in panel.body


def test_curves_are_means_with_a_band_that_holds_every_seed(found):
    runs = compared.read_cells(found)
    panel = compared.panels(found, runs)[2]
    low, high, mean = traces_of(panel, 0, "grpo")
    curves = np.array([line["curve"]["entropy"] for line in found.lines if line["cell"] == "grpo"])
    for trace, expected in ((mean, curves.mean(0)), (low, curves.min(0)), (high, curves.max(0))):
        assert trace["y"] == pytest.approx(expected.tolist(), abs=1e-4)
    assert (high["fill"], low["line"]["width"]) == ("tonexty", 0)
    assert len({run.colour for run in runs}) == 2


def test_a_seed_that_stopped_early_counts_for_its_own_steps(found):
    lines = [
        {"curve": {"step": [1, 2, 3], "entropy": [1.0, 1.0, 1.0]}},
        {"curve": {"step": [1, 2], "entropy": [3.0, 3.0]}},
    ]
    low, high, mean = compared._band(lines, "entropy", compared.read_cells(found)[0])
    assert (mean["x"], mean["y"]) == ([1, 2, 3], [2.0, 2.0, 1.0])
    assert (low["y"], high["y"]) == ([1.0] * 3, [3.0, 3.0, 1.0])
    assert len(compared._band(lines[:1], "entropy", compared.read_cells(found)[0])) == 1
    assert compared._band([{"curve": {}}], "entropy", compared.read_cells(found)[0]) == []


def test_the_frontier_is_the_mean_of_the_seeds_at_the_same_accuracy(found):
    panel = compared.panels(found, compared.read_cells(found))[3]
    curve, marks = traces_of(panel, 0, "isentropic")
    rows = [line["evaluations"][-1] for line in found.lines if line["cell"] == "isentropic"]
    for x, y in list(zip(curve["x"], curve["y"], strict=True))[5:-1:10]:
        assert y == pytest.approx(np.mean([frontier(row, x).distinct for row in rows]), rel=1e-2)
    # It ends where the least accurate seed ends, and never rises.
    reach = min(max(row["at"]["0.3"]["pass@1"], row["greedy"]) for row in rows)
    assert curve["x"][-1] == pytest.approx(reach, abs=1e-4)
    assert all(a >= b - 1e-9 for a, b in zip(curve["y"], curve["y"][1:], strict=False))
    assert marks["customdata"] == ["temperature 1.5", "temperature 1", "temperature 0.6", "temperature 0.3", "greedy"]
    assert marks["x"][1] == pytest.approx(np.mean([row["pass@1"] for row in rows]))


def test_lines_without_directories_make_a_page_of_tables(found):
    text = report.render_comparison(found._replace(runs={}))
    assert re.findall(r'<section id="(\w+)" class="panel"', text) == ["statistics", "what"]


def test_stray_files_are_skipped_with_a_word(home, tmp_path, capsys):
    stray, empty = tmp_path / "compare.csv", tmp_path / "empty"
    stray.write_text("cell\n")
    empty.mkdir()
    runs = [str(path) for path in sorted(home.iterdir())]
    out = tmp_path / "out"
    assert main(["compare", *runs, str(stray), str(empty), "--baseline", "grpo", "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"skipped {stray}: not a run directory" in shown.err
    assert f"skipped {empty}: not a run directory" in shown.err
    assert "P(greedy better)" in shown.out
    assert "Which is better, and how sure is that?" in (out / "report.html").read_text()
    wrong = {"no run directory among": [str(stray)], "nowhere is not a run directory": [runs[0], "nowhere"]}
    for says, argv in wrong.items():
        with pytest.raises(SystemExit) as stop:
            main(["compare", *argv])
        error = capsys.readouterr().err
        assert (stop.value.code, error.count("\n")) == (2, 1)
        assert says in error


@pytest.mark.parametrize("width", [1400, 380])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(found, tmp_path, width, scheme):
    url = report.write_comparison(found, tmp_path / "page.html").as_uri()
    with chromium() as browser:
        view = Page(browser, width, scheme=scheme)
        page = view.open(url)
        assert view.complaints == []
        assert view.requests == [url]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for name in ("curves-0", "temperatures-0"):
            assert page.query_selector(f"#{name} .scatterlayer .js-line"), name
        # A cell that is switched off leaves every figure.
        page.uncheck(".toggle >> nth=0")
        data = "document.querySelector('#curves-0 .plot').data.filter(t => t.visible === false).map(t => t.meta.run)"
        assert page.evaluate(data) == ["grpo"] * 3
        view.context.close()


def test_a_large_mean_and_its_interval_have_the_same_digits_and_no_thousandths():
    lines = [
        {"cell": "a", "task": "t", "seed": s, "settings": {}, "figures": {"reward/end": 387.0 + 38.25 * (s - 1)}}
        for s in range(3)
    ]
    (table,) = tables(compare(lines))
    # Student's t of three values: 4.303 · 38.25 / √3.
    assert table.rows[0][table.head.index("reward")] == "387.0 (292.0..482.0)"
    assert "387.0<small>292.0 to 482.0" in compared._estimate("387.0 (292.0..482.0)")
