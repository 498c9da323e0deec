"""The run directory: rows, cut lines, rewinding, and which checkpoints count."""

import json

import pytest

from isentropic.runs.record import SCHEMA, Record, append_row, plain, read_rows, write_json


def test_numbers_that_json_cannot_hold_become_null():
    assert plain({"a": [float("inf"), 1.0], "b": True, "c": None, 3: object}) == {
        "a": [None, 1.0],
        "b": True,
        "c": None,
        "3": "<class 'object'>",
    }


def test_rows_survive_a_write_that_was_cut_short(tmp_path):
    run = Record(tmp_path)
    run.append("metrics", {"step": 1}, {"step": 2, "text": "two\nlines é <script>"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "entro')
    assert run.rows("metrics") == [{"step": 1}, {"step": 2, "text": "two\nlines é <script>"}]
    run.rewind(1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert run.rows("samples") == []


def test_header(tmp_path):
    run = Record(tmp_path / "new" / "run")
    run.start({"steps": 3}, {"knob": "zeta"}, seed=7, task="expr")
    header = run.header()
    assert (header["schema"], header["seed"], header["task"], header["config"]) == (SCHEMA, 7, "expr", {"steps": 3})
    assert "torch" in header["versions"]
    write_json(run.path / "run.json", {**header, "schema": 99})
    with pytest.raises(ValueError, match="schema 99"):
        run.header()


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="is not a run directory"):
        Record(tmp_path).header()


def test_only_complete_checkpoints_count(tmp_path):
    for step, complete in ((8, True), (16, True), (100, True), (24, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "isentropic.json").write_text("{}")
    (tmp_path / "checkpoint-x").mkdir()
    assert [step for step, _ in Record(tmp_path).checkpoints()] == [8, 16, 100]


def test_writing_is_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    circular = []
    circular.append(circular)
    with pytest.raises(RecursionError):
        write_json(path, circular)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_row_that_a_kill_cut_short_costs_no_other(tmp_path, name):
    path = tmp_path / name
    for i in range(3):
        append_row(path, {"i": i, "text": "é" * 50})
    whole = path.read_bytes()
    for cut in range(2, 40, 3):
        path.write_bytes(whole[:-cut])
        assert [row["i"] for row in read_rows(path)] == [0, 1]
        append_row(path, {"i": 9, "text": "é"})
        assert [row["i"] for row in read_rows(path)] == [0, 1, 9]


def test_a_row_that_lacks_its_line_break_alone_is_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"i": 0}\n{"i": 1}')
    append_row(path, {"i": 2})
    assert path.read_text() == '{"i": 0}\n{"i": 1}\n{"i": 2}\n'
