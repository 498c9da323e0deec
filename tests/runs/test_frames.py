"""Run directories as pandas tables."""

import sys

import pytest
from run_fixture import make_run

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
    with pytest.raises(ImportError, match="pip install pandas"):
        frames.metrics(run)
