"""The report without a browser: what is read, computed, written on the page, and refused."""

import json
import re
import subprocess
import sys
import time

import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs
from run_fixture import SCRIPT, make_run

from isentropic import report
from isentropic.cli import main
from isentropic.report import about, answers, bundle, control, figures, page, why
from isentropic.report.runs import read
from isentropic.runs import explain
from isentropic.runs.record import Record
from isentropic.runs.summary import summary

MAX_BYTES = 2_500_000
EVERY = """hold phase knob frontier passk distinct quadrants places predicted clip cov length samples precision
    config""".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one", steps=1000)


def ids(page):
    return re.findall(r'<section id="(\w+)" class="panel"', page)


def test_every_panel_is_there_and_the_page_is_small(run, tmp_path):
    began = time.process_time()
    out = report.write([run], tmp_path / "deep" / "report.html")
    assert time.process_time() - began < 5
    text = out.read_text(encoding="utf-8")
    assert ids(text) == EVERY
    # The first panel as SVG: target, entropy and reward, the latter two smoothed too.
    assert text.count("<polyline") == 5
    assert out.stat().st_size < MAX_BYTES
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_nothing_a_run_wrote_is_markup(run):
    text = report.render([run])
    assert SCRIPT not in text
    assert "&lt;script&gt;window.owned" in text
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL):
        assert "<" not in data
        json.loads(data)
    for act in ("\x1b", "\u202e", "\ud800"):
        assert act not in text.split("</main>")[0]


def test_a_panel_without_data_is_absent(tmp_path):
    bare = make_run(tmp_path / "bare", steps=40, full=False, hold=False)
    assert ids(report.render([bare])) == ["hold", "phase", "clip", "cov", "length", "config"]
    Record(tmp_path / "empty").start({}, {}, 0)
    assert ids(report.render([tmp_path / "empty"])) == ["config"]


def test_a_run_without_a_target_is_not_asked_whether_it_holds(tmp_path):
    free = make_run(tmp_path / "free", steps=40, full=False, hold=False)
    assert control.hold(read([free])).question == "Where do entropy and reward go?"


def test_figures_are_what_plotly_takes(run, tmp_path):
    other = make_run(tmp_path / "other", steps=60, recipe="grpo", hold=False, tasks=("expr", "sums"))
    for runs in (read([run]), read([run, other])):
        for panel in report.panels(runs):
            for figure in panel.figures:
                painted = json.loads(re.sub(r'"@\w+"', '"#123456"', json.dumps([figure.traces, figure.layout])))
                go.Figure(data=painted[0], layout=painted[1])
                assert any(trace.get("x") for trace in figure.traces)


def test_seeds_of_a_recipe_share_a_colour_and_recipes_do_not(tmp_path):
    for recipe in ("isentropic", "grpo"):
        for seed in (0, 1):
            make_run(tmp_path / f"{recipe}-{seed}", steps=30, seed=seed, recipe=recipe, full=False)
    runs = read([tmp_path])
    assert [run.label for run in runs] == ["grpo, seed 0", "grpo, seed 1", "isentropic, seed 0", "isentropic, seed 1"]
    assert [(run.group, run.member) for run in runs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    looks = {(run.group, run.colour, run.dash, run.symbol) for run in runs}
    assert len(looks) == 2
    assert all(len({look[i] for look in looks}) == 2 for i in (1, 2, 3))


def test_a_run_is_shown_once_however_often_it_is_named(run):
    assert len(read([run, run, run.parent])) == 1


def test_a_switch_of_task_is_marked(tmp_path):
    runs = read([make_run(tmp_path / "two", steps=100, tasks=("expr", "sums"))])
    assert runs[0].switches() == [(51, "sums")]
    marked = control.hold(runs).figures[0].layout
    assert marked["shapes"][0]["x0"] == 50.5
    assert marked["annotations"][0]["text"] == "switch to sums"
    assert len(answers.sequence(runs).figures) == 2
    assert answers.sequence(read([make_run(tmp_path / "one", steps=100)])) is None
    header = json.loads((tmp_path / "two" / "run.json").read_text())
    header["config"]["then"] = ["sums"]
    (tmp_path / "two" / "run.json").write_text(json.dumps(header))
    assert "on expr, then sums</small>" in report.render([tmp_path / "two"])


def test_the_page_and_explain_show_the_same_calibration(run):
    text = explain.render(explain.explain(Record(run)))
    slope, drift = re.search(r"measured = (\S+) × predicted (\S+) per step", text).groups()
    correlation, blocks = re.search(r"correlation of (\S+) over (\d+) pairs of blocks", text).groups()
    body = why.predicted(read([run])).body
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", body)
    assert cells[:2] == ["isentropic", "exact form"]
    shown = [cell.replace("−", "-") for cell in cells[2:6]]
    assert (shown[0], shown[2:]) == (slope, [correlation, blocks])
    assert float(shown[1]) / 1000 == pytest.approx(float(drift), abs=5e-5)
    assert "without moments" in body


def test_predictions_add_up_over_the_steps_between_them(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {}, 0)
    # A step in five is explained; entropy moves by twice what was predicted, and by 0.001 a step beside it.
    level, levels = 1.0, []
    for step in range(1, 101):
        change = -0.001 * (1 + (step - 1) // 5 % 7)
        levels.append(level)
        explained = {"predict/change": change if step % 5 == 1 else None}
        record.append("metrics", {"step": step, "entropy/mean": level, **explained})
        level += 2 * change + 0.001
    panel = why.predicted(read([record.path]))
    total = panel.figures[0].traces[1]
    assert total["x"] == list(range(1, 101, 5))
    assert total["y"] == pytest.approx([level - 1.0 for level in levels[::5]], abs=1e-5)
    marks, fitted = panel.figures[1].traces
    assert len(marks["x"]) == 4
    # Per step, in thousandths of a nat: slope 2 and a drift of 0.001.
    assert fitted["y"] == pytest.approx([2 * x + 1 for x in fitted["x"]], abs=1e-3)
    titles = [panel.figures[1].layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
    assert titles == ["predicted, 10⁻³ nats per token", "measured, 10⁻³ nats per token"]
    assert ">2</td>" in panel.body


def test_a_short_run_is_not_calibrated(tmp_path):
    short = make_run(tmp_path / "short", steps=79)
    assert why.predicted(read([short])) is None


def test_a_band_target_is_drawn_at_its_own_edges(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {"target": "band:50%:0.9"}, 0)
    record.append("metrics", *[{"step": s, "entropy/mean": 1.2, "entropy/target": 0.75} for s in (1, 2, 3)])
    low, high, level = control.hold(read([record.path])).figures[0].traces[:3]
    assert (low["y"], high["y"], level["y"]) == ([0.6, 0.6], [0.9, 0.9], [0.75, 0.75, 0.75])


def test_an_automatic_target_says_why_it_moved(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {"target": "auto"}, 0)
    why = ["held: <a>", "lowered: 0.1", "lowered: 0.2"]
    rows = [
        {"step": s, "entropy/mean": 1.2, "entropy/target": 1 - s / 10, "entropy/target_why": why[s - 1]}
        for s in (1, 2, 3)
    ]
    record.append("metrics", *rows)
    panel = control.hold(read([record.path]))
    assert (
        "Why it moved: target 0.900, step 1: held: <a>; target 0.800 → 0.700, steps 2 to 3: lowered: 0.2." in panel.note
    )
    assert panel.figures[0].traces[2]["text"] == ["held: &lt;a&gt;", "lowered: 0.1", "lowered: 0.2"]


def test_stages_and_intervals_of_evaluations(run):
    (one,) = read([run])
    assert [name for name, _ in answers.stages(answers.evaluations(one, "expr"))] == ["start", "middle", "end"]
    row = answers.evaluations(one, "expr")[0]
    low, high = answers.interval(row, 1)
    assert low < row["pass@1"] < high
    assert answers.interval({**row, "num_correct": None}, 1) is None
    assert answers.interval({**row, "num_correct": [99] * 60}, 1) is None


def values(runs):
    return {key.name: (about._value(key, runs[0]), key.against(runs[0])) for key in about.keys(runs)}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"target": "auto"}, True),
        ({"target": "floor:60%"}, True),
        ({"target": "60%"}, False),
        ({"target": "auto", "knob_low": -1.0}, False),
        ({"target": "auto:settle=10%"}, False),
    ],
)
def test_the_page_says_that_entropy_above_a_floor_is_left_alone(tmp_path, recipe, said):
    record = Record(tmp_path / "run")
    record.start({}, {"knob": "zeta", **recipe}, 0)
    for step in range(1, 4):
        record.append("metrics", {"step": step, "entropy/mean": 1.0, "entropy/target": 0.8})
    assert ("entropy above it is left alone" in control.hold(read([record.path])).note) == said


def test_key_numbers(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {}, 0)
    for step in range(1, 41):
        mean = 0.9 if step > 20 else 2.0
        record.append(
            "metrics", {"step": step, "entropy/mean": mean, "entropy/target": 1.0, "entropy/error": mean - 1.0}
        )
    figures = {"entropy, nats per token": ("0.900", "target 1.000, from 2.000")}
    figures |= {"RMS error to target": ("10.0%", "after step 20")}
    assert values(read([record.path])) == figures
    record.append("evaluations", {"step": 0, "task": "expr", "pass@1": 0.25, "pass@8": 0.5, "distinct": 1.25})
    figures |= {"pass@1, held-out": ("0.250", ""), "pass@8, held-out": ("0.500", "")}
    figures |= {"distinct right answers": ("1.25", "")}
    assert values(read([record.path])) == figures
    record.append("evaluations", {"step": 40, "task": "expr", "pass@1": 0.75, "pass@8": 0.875, "distinct": 3.0})
    figures |= {"pass@1, held-out": ("0.750", "from 0.250"), "pass@8, held-out": ("0.875", "from 0.500")}
    figures |= {"distinct right answers": ("3.00", "from 1.25")}
    assert values(read([record.path])) == figures


def test_key_numbers_at_any_temperature(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {}, 0)
    counts = {"num_samples": [2] * 4, "num_correct": [1] * 4, "pass@1": 0.5, "pass@2": 1.0, "distinct": 1.0}
    for step, right in ((0, 1), (9, 2)):
        cold = {"0.5": {"num_correct": [right] * 4, "pass@1": right / 2, "pass@2": 1.0, "distinct": 1.0}}
        record.append("evaluations", {"step": step, "task": "expr", "k": 2, **counts, "at": cold, "greedy": right / 4})
    assert values(read([record.path])) == {
        "greedy, held-out": ("0.500", "from 0.250"),
        "best pass@1, held-out": ("1.000", "from 0.500"),
        "distinct right answers": ("1.00", "from 1.00"),
    }


def test_the_curve_over_temperatures_ends_in_greedy_answers(run, tmp_path):
    panel = answers.frontier(read([run]))
    (figure,) = panel.figures
    start, end = figure.traces
    row = Record(run).rows("evaluations")[-1]
    assert end["x"] == pytest.approx(
        [
            row["at"]["1.5"]["pass@1"],
            row["pass@1"],
            row["at"]["0.6"]["pass@1"],
            row["at"]["0.3"]["pass@1"],
            row["greedy"],
        ]
    )
    assert end["y"][1] == pytest.approx(row["distinct"], abs=1e-4)
    assert end["text"] == ["1.5", "1", "0.6", "0.3", ""]
    assert [trace["line"]["dash"] for trace in (start, end)] == ["dot", "solid"]
    assert (start["marker"]["symbol"][-1], end["marker"]["symbol"][-1]) == ("star-open", "star")
    # Labels of several runs: one curve of each colour.
    other = make_run(tmp_path / "other", steps=40, recipe="grpo", hold=False)
    again = make_run(tmp_path / "again", steps=40, seed=1, recipe="grpo", hold=False)
    modes = [trace["mode"] for trace in answers.frontier(read([run, other, again])).figures[0].traces]
    assert modes == [*["lines+markers", "lines+markers+text"] * 2, *["lines+markers"] * 2]


def test_one_temperature_has_no_curve(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {}, 0)
    figures = {"k": 2, "pass@1": 0.5, "pass@2": 1.0, "distinct": 1.0, "greedy": 0.5}
    record.append("evaluations", {"step": 0, "task": "expr", **figures}, {"step": 1, "task": "b", **figures, "at": "x"})
    assert answers.frontier(read([record.path])) is None


def test_the_page_shows_the_figures_of_the_summary(run):
    (one,) = read([run])
    record = Record(run)
    assert one.summary == summary(record.rows("metrics"), record.rows("evaluations"))
    text = report.render([run])
    assert f"<dd>{one.summary['entropy/end']:.3f}<small>" in text
    assert f"after step 20: isentropic: {one.summary['knob/saturated']:.0%}." in text


def test_small_quantities_have_axes_without_exponents(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {}, 0)
    rows = [{"step": t, "predict/knob": 2e-5 * t, "clip/low_frac": 0.01, "length/mean": 9.0} for t in range(1, 4)]
    record.append("metrics", *rows)
    (run,) = read([record.path])
    knob = figures.over_steps([run], "predict/knob")
    assert knob.caption == "What the knob adds to entropy, predicted, 10⁻⁶ nats per token and step"
    assert knob.traces[0]["y"] == [20.0, 40.0, 60.0]
    assert figures.over_steps([run], "clip/low_frac").layout["yaxis"]["tickformat"] == ".2~%"
    assert "tickformat" not in figures.over_steps([run], "length/mean").layout["yaxis"]


def test_a_key_number_and_what_it_is_compared_with_have_the_digits_a_person_reads(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {}, 0)
    record.append("metrics", *({"step": t, "reward/mean": 95.07 if t == 1 else 387.25} for t in (1, 2)))
    assert values(read([record.path])) == {"reward": ("387", "from 95.1")}


def test_at_a_bound_is_one_count_on_the_page_in_explain_and_in_the_summary(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {"knob": "zeta"}, 0)
    fields = {"entropy/mean": 1.0, "knob/value": 1.0}
    record.append("metrics", *({"step": t, **fields, "knob/saturated": int(t < 29)} for t in range(1, 41)))
    (run,) = read([record.path])
    # 8 of the 20 steps after the first 20; of all 40 it would be 70 %.
    assert run.summary["knob/saturated"] == explain.explain(Record(record.path))["saturated"] == 0.4
    assert "after step 20: run: 40%." in control.knob([run]).note


def test_an_attribution_that_is_not_to_be_trusted_says_so(run, tmp_path):
    assert "Do not trust" not in why.quadrants(read([run])).note
    record = Record(tmp_path / "run")
    record.start({}, {}, 0)
    rows = [{"step": t, "entropy/mean": 1 - 1e-5 * t * t, "predict/change": 1e-4 * t} for t in range(1, 101)]
    record.append("metrics", *({**row, "predict/likely_up": row["predict/change"]} for row in rows))
    assert why.quadrants(read([record.path])).note.startswith("Do not trust the attribution of run: predictions have")


def test_thinning_keeps_spikes():
    y = [0.0] * 10_000
    y[5003], y[7001] = 9.0, -9.0
    x, thinned = figures.thin(range(10_000), y)
    assert len(x) <= figures.MAX_POINTS
    assert (max(thinned), min(thinned)) == (9, -9)
    assert x == sorted(x)


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {}, 0)
    lines = ['{"step": 1, "entropy/mean": NaN}', '{"step": 2, "entropy/mean": "x"}', '{"step": true}', '{"no": 1}']
    lines += ['{"step": 3, "entropy/mean": 0.5, "predict/top_tokens": [1, ["a"]]}', "[3]", '{"step": 4, "entr']
    (record.path / "metrics.jsonl").write_text("\n".join(lines))
    (record.path / "audit.json").write_text("{")
    (run,) = read([record.path])
    assert run.column("entropy/mean") == ([3], [0.5])
    assert "audit.json cannot be read" in report.render([record.path])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "RUN"),
        (["nowhere"], "nowhere is not a run directory"),
        (["{run}", "-o", "{dir}"], "is a directory; name a file in it"),
        (["{run}", "-o", "/dev/null/x.html"], "cannot be written"),
        (["{run}", "--ot", "x"], "--out"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, argv, says):
    argv = [word.format(run=run, dir=tmp_path) for word in argv]
    began = time.process_time()
    with pytest.raises(SystemExit) as stop:
        main(["report", *argv])
    assert time.process_time() - began < 2
    text = capsys.readouterr().err
    assert (stop.value.code, len(text.splitlines())) == (2, 1)
    assert says in text


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}'])
def test_a_run_json_that_cannot_be_read(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        read([tmp_path])


def test_plotly_is_cut_to_what_is_drawn_where_its_version_was_tested():
    whole = get_plotlyjs()
    assert any(f"plotly.js {version}\n" in whole[:100] for version in bundle.TESTED), "see report/bundle.py"
    text = bundle.cut(whole)
    assert len(text) < 1_300_000
    assert 'moduleType:"trace",name:"bar"' in text
    assert "createREGL" in whole
    assert "createREGL" not in text
    # Licences stay.
    assert text[: text.index("*/")] == whole[: whole.index("*/")]
    assert whole[whole.rindex("})();\n/*!") : whole.rindex("}));")] in text
    other = whole.replace(bundle.TESTED[0], "v99.0.0", 1)
    assert bundle.cut(other) is other


def test_without_plotly_the_remedy_is_named(run, monkeypatch, capsys):
    page.plotly_js.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(run)])
    page.plotly_js.cache_clear()
    assert (stop.value.code, "pip install 'isentropic[report]'" in capsys.readouterr().err) == (2, True)


def test_the_command_names_the_page_and_needs_no_torch(run):
    code = "import sys\nfrom isentropic.cli import main\nmain(sys.argv[1:])\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "report", run], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(run / "report.html")), done.stderr
    assert (run / "report.html").exists()
