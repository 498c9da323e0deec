"""Runs in a notebook: tables, settings, figures."""

import sys

import pytest
from run_fixture import make_run

from isentropic import load_run, load_runs
from isentropic.runs import frames
from isentropic.runs.record import Record

pytest.importorskip("pandas")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "one", steps=30)


def test_a_row_per_line_of_the_files(run):
    metrics = frames.metrics(run)
    assert metrics["step"].tolist() == list(range(1, 31))
    assert metrics["entropy/target"].isna().tolist() == [True] + [False] * 29
    assert metrics["predict/change"].notna().sum() == 6
    assert frames.evaluations(Record(run))["step"].tolist() == [0, 15, 30]
    assert len(frames.evaluations(str(run))["num_correct"][0]) == 60
    assert isinstance(frames.samples(run)["tokens"][0], list)


def test_joined_runs_say_which_run_each_row_is_from(run, tmp_path):
    other = make_run(tmp_path / "two", steps=3, seed=4, recipe="grpo", hold=False, full=False)
    table = frames.join([run, Record(other)])
    assert table.columns[:4].tolist() == ["run", "recipe", "seed", "step"]
    assert len(table) == 33
    assert table.index.tolist() == list(range(33))
    assert table.iloc[-1][["run", "recipe", "seed", "step"]].tolist() == ["two", "grpo", 4, 3]
    assert len(frames.join([run, other], "evaluations")) == 3


def test_runs_with_the_same_name_are_named_by_path(tmp_path):
    runs = [make_run(tmp_path / folder / "run", steps=1, full=False) for folder in "ab"]
    assert frames.join(runs)["run"].tolist() == [str(run) for run in runs]


def test_an_empty_run_is_an_empty_table(tmp_path):
    Record(tmp_path).start({}, {}, 0)
    assert frames.metrics(tmp_path).empty
    assert frames.join([tmp_path]).columns.tolist() == ["run", "recipe", "seed"]


def test_mistakes_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="is not a run directory"):
        frames.metrics(tmp_path)
    with pytest.raises(ValueError, match="at least one run directory"):
        frames.join([])
    with pytest.raises(ValueError, match="did you mean metrics"):
        frames.join([run], "metric")


def test_without_pandas_the_remedy_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'isentropic\[notebook\]'"):
        frames.metrics(run)


def test_a_run_has_its_settings_figures_and_tables(run, tmp_path):
    loaded = load_run(run)
    assert (loaded.config["recipe"], loaded.recipe["knob"]) == ("isentropic", "zeta")
    assert (loaded.ended, loaded.summary) == (True, {"steps": 30})
    assert (len(loaded.metrics), len(loaded.evaluations)) == (30, 3)
    assert loaded.samples["tokens"].map(len).min() > 0
    last = loaded.metrics.iloc[-1]
    figures = f"entropy {last['entropy/mean']:.3g}, target 0.8, reward {last['reward/mean']:.3g}"
    assert repr(loaded) == f"<Run one: isentropic on expr, ended after step 30, {figures}>"
    live = load_run(make_run(tmp_path / "live", steps=4, ended=False))
    assert live.summary["steps"] == 4
    assert live.summary["end"]["step"] == 4
    assert "at step 4" in repr(live)


def test_a_plot_draws_what_a_run_holds(run, tmp_path):
    pytest.importorskip("matplotlib")
    loaded = load_run(run)
    free = load_run(make_run(tmp_path / "free", steps=9, hold=False, recipe="grpo", full=False))
    entropy, knob, reward, frontier = loaded.plot(free).axes
    # The target is missing at the first step, and the second run has neither target nor knob.
    assert [len(line.get_xdata()) for line in entropy.lines] == [29, 30, 9]
    assert entropy.lines[1].get_ydata().tolist() == loaded.metrics["entropy/mean"].tolist()
    assert (knob.get_title(), len(knob.lines)) == ("Knob: zeta", 1)
    assert reward.lines[1].get_ydata().tolist() == free.metrics["reward/mean"].tolist()
    before, after = frontier.lines
    last = loaded.evaluations.iloc[-1]
    accuracies = [last["at"]["1.5"]["pass@1"], last["pass@1"], *(last["at"][t]["pass@1"] for t in ("0.6", "0.3"))]
    assert after.get_xdata().tolist() == [*accuracies, last["greedy"]]
    assert after.get_ydata()[1] == last["distinct"]
    assert before.get_xdata()[1] == loaded.evaluations.iloc[0]["pass@1"]
    assert [text.get_text() for text in frontier.texts] == ["1.5", "1", "0.6", "0.3", "greedy"]
    assert len(free.plot().axes) == 2
    (legend,) = loaded.plot(free).legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "free"]


def test_a_plot_of_an_empty_run_is_empty(tmp_path):
    pytest.importorskip("matplotlib")
    Record(tmp_path).start({}, {}, 0)
    (axes,) = load_run(tmp_path).plot().axes
    assert not axes.lines


def test_without_matplotlib_the_remedy_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'isentropic\[notebook\]'"):
        load_run(run).plot()


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Two cells of two seeds, a run that has not ended, and a file beside them."""
    home = tmp_path_factory.mktemp("grid")
    for seed in (0, 1):
        for recipe, hold in (("isentropic", True), ("grpo", False)):
            make_run(home / f"{recipe}-s{seed}", steps=20, seed=seed, recipe=recipe, hold=hold)
    make_run(home / "live", steps=4, ended=False)
    (home / "notes.txt").write_text("mine")
    return home


def test_the_runs_of_a_grid_are_one_tidy_table(grid):
    table = load_runs(grid)
    assert table[["cell", "task", "seed", "steps"]].values.tolist() == [
        ["grpo", "expr", 0, 20],
        ["grpo", "expr", 1, 20],
        ["isentropic", "expr", 0, 20],
        ["isentropic", "expr", 1, 20],
    ]
    assert table["config/target"].isna().tolist() == [True, True, False, False]
    assert "config/steps" not in table, "a setting that does not differ"
    assert load_runs(grid / "grpo-s1")["seed"].tolist() == [1]


def test_evaluations_and_curves_are_tables_too(grid):
    table = load_runs(grid, "evaluations")
    assert len(table) == 4 * 3 * 5
    one = table[(table["cell"] == "grpo") & (table["seed"] == 1) & (table["step"] == 20)]
    assert one["temperature"].tolist() == [1.5, 1.0, 0.6, 0.3, 0.0]
    last = load_run(grid / "grpo-s1").evaluations.iloc[-1]
    assert one["pass@1"].tolist()[1] == last["pass@1"]
    assert one["pass@1"].tolist()[-1] == last["greedy"]
    assert one["distinct"].tolist()[0] == last["at"]["1.5"]["distinct"]
    curves = load_runs(grid, "curves")
    assert curves.groupby(["cell", "seed"])["step"].max().tolist() == [20] * 4
    assert {"entropy", "reward", "knob"} <= set(curves)


@pytest.mark.parametrize("name", ["results.jsonl", "results.jsonl.gz"])
def test_a_results_file_is_the_same_table_as_its_runs(grid, tmp_path, name):
    from isentropic.experiments.lines import line_of
    from isentropic.runs.record import append_row

    for run in sorted(grid.glob("*-s*")):
        append_row(tmp_path / name, line_of(Record(run)))
    for table in ("figures", "evaluations", "curves"):
        assert load_runs(tmp_path / name, table).to_json() == load_runs(grid, table).to_json()


def test_no_ended_run_and_another_table_are_refused(grid, tmp_path):
    with pytest.raises(ValueError, match="no run has ended in"):
        load_runs(tmp_path)
    with pytest.raises(ValueError, match="no run has ended in"):
        load_runs(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"table must be one of .* \(did you mean curves\?\)"):
        load_runs(grid, "curve")
