"""Lines of finished runs, their estimates, and the tables."""

import csv
import json

import pytest

from isentropic.experiments.compare import compare, render, write
from isentropic.experiments.lines import fingerprint, line_of, name_cells
from isentropic.runs.record import Record, write_json
from isentropic.runs.statistics import mean_interval, paired_interval


def line(cell, seed, task="expr", settings=None, **figures):
    settings = settings or {}
    return {
        "cell": cell,
        "task": task,
        "seed": seed,
        "settings": settings,
        "fingerprint": fingerprint(settings, {}),
        "figures": figures,
    }


def test_a_hand_worked_comparison():
    lines = [line("a", seed, **{"pass@1": value}) for seed, value in enumerate([0.2, 0.4, 0.9])]
    lines += [line("b", seed, **{"pass@1": value}) for seed, value in enumerate([0.3, 0.5, 0.7])]
    comparison = compare(lines, "a")
    assert comparison.cells["a"]["pass@1"].mean == pytest.approx(0.5)
    assert comparison.cells["b"]["pass@1"].interval == mean_interval([0.3, 0.5, 0.7])
    # b beats a in (0.3 > 0.2), (0.5 > 0.2, 0.4), (0.7 > 0.2, 0.4): 5 of 9.
    chance, interval = comparison.better["b"]["pass@1"]
    assert chance == pytest.approx(5 / 9)
    assert interval.low < chance < interval.high
    assert "a" not in {name for name, row in comparison.better.items() if row}


def test_fewer_than_three_seeds_give_no_interval_and_it_says_so():
    comparison = compare([line("a", seed, **{"pass@1": 0.5}) for seed in (0, 1)])
    assert comparison.cells["a"]["pass@1"].interval is None
    assert "over runs for fewer than 3 seeds: a" in render(comparison)
    three = compare([line("a", seed, **{"pass@1": 0.5}) for seed in (0, 1, 2)])
    assert "fewer than" not in render(three)
    assert "0.500 (" not in render(three)  # equal runs show no spread


def test_every_task_weighs_the_same_and_the_interval_keeps_them_apart():
    lines = [line("a", seed, "easy", **{"pass@1": 0.9 + seed / 100}) for seed in range(6)]
    lines += [line("a", seed, "hard", **{"pass@1": 0.1 + seed / 100}) for seed in range(3)]
    estimate = compare(lines).cells["a"]["pass@1"]
    assert estimate.mean == pytest.approx((0.925 + 0.11) / 2)
    # Within a task there is little to vary; over all runs there would be much.
    assert estimate.interval.high - estimate.interval.low < 0.05


def test_bad_comparisons_are_refused():
    with pytest.raises(ValueError, match="no run has ended"):
        compare([])
    with pytest.raises(ValueError, match="baseline must be one of a; got 'b'"):
        compare([line("a", 0)], "b")


def test_one_name_for_several_settings_is_told_apart():
    lines = [line("x", 0, settings={"target": "80%"}), line("x", 0, settings={}), line("y", 0)]
    assert [row["cell"] for row in name_cells(lines)] == ["x target=80%", "x target=default", "y"]
    # The seed is what tells runs of a cell apart, not a setting.
    same = [line("x", seed, settings={"seed": seed}) for seed in (1, 2)]
    assert [row["cell"] for row in name_cells(same)] == ["x", "x"]


def test_fingerprint_ignores_the_place_and_hears_the_rest():
    assert fingerprint({"out": "a", "steps": 1}, {}) == fingerprint({"out": "b", "steps": 1}, {})
    assert fingerprint({"steps": 1}, {}) != fingerprint({"steps": 2}, {})
    assert fingerprint({}, {"clip_high": 0.2}) != fingerprint({}, {"clip_high": 0.3})
    assert fingerprint({}, {"source": "one paper"}) == fingerprint({}, {"source": "another"})


def run_directory(path, entropies=(1.0, 0.5), spent=(1.0, 2.0), **summary):
    record = Record(path)
    record.start({"recipe": "grpo", "steps": len(entropies), "out": str(path)}, {"clip_high": 0.2}, 3, task="expr")
    for step, (entropy, so_far) in enumerate(zip(entropies, spent, strict=True), 1):
        record.append("metrics", {"step": step, "seconds": so_far, "entropy/mean": entropy, "reward/mean": 0.25})
    record.append("evaluations", {"step": 2, "task": "expr", "k": 4, "pass@1": 0.5, "distinct": 1.5, "prompts": ["p"]})
    whole = {"steps": 2, "seconds": 2.5, "samples": 8, "entropy/mean": 0.75, "entropy/end": 0.5, "reward/end": 0.25}
    write_json(record.path / "summary.json", {**whole, "end": {"pass@1": 0.5, "distinct": 1.5}, **summary})
    return record


def test_the_line_of_a_run_holds_its_figures_and_curve(tmp_path):
    row = line_of(run_directory(tmp_path / "run"))
    assert (row["cell"], row["task"], row["seed"]) == ("grpo", "expr", 3)
    assert row["figures"]["pass@1"] == 0.5
    assert row["figures"]["seconds"] == 2.5
    assert row["curve"]["entropy"] == [1.0, 0.5]
    assert "prompts" not in row["evaluations"][0]
    assert json.loads(json.dumps(row)) == row


def test_seconds_of_a_resumed_run_add_up(tmp_path):
    row = line_of(run_directory(tmp_path / "run", (1.0, 0.9, 0.8, 0.7), (1.0, 2.0, 0.5, 4.0), seconds=5.0))
    assert row["figures"]["seconds"] == 7.0  # 2 before it was killed, 5 after


def test_a_run_that_has_not_ended_is_not_compared(tmp_path):
    record = run_directory(tmp_path / "run")
    (record.path / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"has not ended.*--resume"):
        line_of(record)


def test_what_is_written_reads_back(tmp_path):
    lines = [line("a", seed, **{"pass@1": 0.25 * seed, "seconds": 1.0}) for seed in range(3)]
    comparison = compare(lines)
    write(comparison, lines, tmp_path)
    with (tmp_path / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["pass@1"]) for row in rows] == [0.0, 0.25, 0.5]
    estimates = json.loads((tmp_path / "compare.json").read_text())
    assert estimates["cells"]["a"]["pass@1"]["mean"] == pytest.approx(0.25)
    assert len(estimates["cells"]["a"]["pass@1"]["interval"]) == 2


def test_the_largest_k_has_a_column_of_its_own_once():
    def table(**passed):
        lines = [line("a", s, **{"pass@1": 0.5}) for s in range(3)]
        for row in lines:
            row["figures"] |= {f"pass@{k[1:]}": v for k, v in passed.items()}
        return render(compare(lines), markdown=True).splitlines()[0]

    assert table(k4=0.6, k8=0.7) == "| cell | seeds | pass@1 | pass@4 | pass@8 |"
    assert table(k2=0.5, k4=0.6) == "| cell | seeds | pass@1 | pass@4 |"


def test_the_largest_k_is_scored_whichever_it_is():
    lines = [
        line(c, s, **{"pass@1": 0.5 + s / 10, "pass@4": x + s / 10})
        for c, x in (("a", 0.6), ("b", 0.9))
        for s in range(3)
    ]
    comparison = compare(lines, "a")
    assert comparison.better["b"]["pass@4"][0] == 1.0
    assert "P(pass@4 better)" in render(comparison)
    assert "IQM pass@4" in render(compare(lines))
    assert comparison.as_json()["cells"]["a"]["pass@4"]["mean"] == pytest.approx(0.7)
    assert comparison.as_json()["better"]["b"]["pass@4"]["probability"] == 1.0


def test_a_run_counts_once():
    with pytest.raises(ValueError, match="a on expr has 2 runs of seed 1, which count once"):
        compare([line("a", 0), line("a", 1), line("a", 1)])
    assert compare([line("a", 1), line("a", 1, "other")]).seeds == {"a": 1}


def evaluated(cell, seed, by_temperature, greedy, **more):
    """A line of two temperatures, by each the right and the distinct answers of four prompts among 2."""
    points = {
        t: {"pass@1": sum(right) / 8, "pass@2": 1.0, "distinct": sum(kinds) / 4}
        for t, (right, kinds) in by_temperature.items()
    }
    counts = {t: ["".join(map(str, column)) for column in columns] for t, columns in by_temperature.items()}
    entry = {"task": "expr", "k": 2, **points["1"], "at": {"0.5": points["0.5"]}, "greedy": sum(greedy) / 4}
    entry["counts"] = counts | {"greedy": "".join(map(str, greedy))}
    best = max(point["pass@1"] for point in points.values())
    return line(cell, seed, greedy=sum(greedy) / 4, **{"best_pass@1": best}) | {"evaluations": [entry]} | more


WARM = {"1": ([1, 1, 1, 1], [1, 1, 1, 1]), "0.5": ([2, 2, 1, 1], [1, 1, 1, 1])}
VARIED = {"1": ([2, 2, 1, 1], [2, 2, 1, 1]), "0.5": ([2, 2, 2, 1], [1, 1, 1, 1])}
WRONG = {"1": ([0, 0, 0, 0], [0, 0, 0, 0]), "0.5": ([1, 1, 0, 0], [1, 1, 0, 0])}


def test_a_baseline_that_learned_nothing_asks_for_no_accuracy():
    wrong = {"1": ([0, 0, 0, 0], [0, 0, 0, 0]), "0.5": ([0, 0, 0, 0], [0, 0, 0, 0])}
    lines = [evaluated("base", 0, wrong, [0, 0, 0, 0]), evaluated("other", 0, WARM, [1, 1, 1, 0])]
    comparison = compare(lines, "base")
    assert comparison.floors == {"expr": 0.0}
    assert comparison.cells["base"]["distinct/equal"].mean == 0.0


def test_distinct_answers_are_compared_at_equal_accuracy():
    lines = [evaluated("base", 0, WARM, [1, 1, 1, 0]), evaluated("varied", 0, VARIED, [1, 1, 1, 0])]
    lines.append(evaluated("wrong", 0, WRONG, [0, 0, 0, 0]))
    comparison = compare(lines, "base")
    assert comparison.floors == {"expr": pytest.approx(0.73)}
    distinct = {name: cell["distinct/equal"].mean for name, cell in comparison.cells.items()}
    # The varied one has 1.5 at 0.75; the wrong one is below at any temperature.
    assert distinct == {"base": 1.0, "varied": 1.5, "wrong": 0.0}
    assert comparison.better["varied"]["distinct/equal"][0] == 1.0
    text = render(comparison)
    assert "distinct answers at a pass@1 of at least 0.730 on expr" in text
    assert "Not as accurate as the baseline at any temperature" in text
    assert "equal accuracy: wrong on expr, seed 0." in text
    assert "distinct/equal" not in compare(lines).cells["base"]


def test_differences_of_one_seed_are_bounded_over_prompts(tmp_path):
    lines = [evaluated("base", 0, WARM, [1, 1, 1, 0]), evaluated("wrong", 0, WRONG, [0, 0, 0, 0])]
    comparison = compare(lines, "base")
    mean, interval = comparison.differences["wrong"]["greedy"]
    assert mean == -0.75
    assert interval == paired_interval([0, 0, 0, 0], [1, 1, 1, 0])
    mean, interval = comparison.differences["wrong"]["best_pass@1"]
    assert mean == -0.5
    assert interval == paired_interval([0.5, 0.5, 0, 0], [1, 1, 0.5, 0.5])
    assert "-0.750 (" in render(comparison)
    assert comparison.as_json()["differences"]["wrong"]["greedy"]["mean"] == -0.75
    write(comparison, lines, tmp_path)
    with (tmp_path / "compare.csv").open() as file:
        assert [row["distinct/equal"] for row in csv.DictReader(file)] == ["1.0", "0.0"]
    # Without counts there is a mean alone.
    for row in lines:
        del row["evaluations"][0]["counts"]
    assert compare(lines, "base").differences["wrong"]["greedy"] == (-0.75, None)


def test_differences_of_several_seeds_are_paired_by_seed():
    # Seeds scatter widely, their differences little.
    lines = [line("a", seed, greedy=0.2 * seed) for seed in range(4)]
    lines += [line("b", seed, greedy=0.2 * seed + 0.1 + 0.01 * seed) for seed in (3, 2, 1, 0)]
    lines.append(line("b", 9, greedy=0.0))
    mean, interval = compare(lines, "a").differences["b"]["greedy"]
    assert mean == pytest.approx(0.115)
    assert interval == pytest.approx(mean_interval([0.1, 0.11, 0.12, 0.13]))
    assert "+0.115 (+0.094..+0.136)" in render(compare(lines, "a"))
    assert compare(lines).differences["b"] == {}


def test_the_table_is_split_so_that_it_can_be_read():
    figures = {"entropy/mean": 1.0, "seconds": 3.0, "greedy": 0.5, "best_pass@1": 0.5, "pass@1": 0.4, "pass@16": 1.0}
    text = render(compare([line(name, s, **figures) for name in "ab" for s in range(3)], "a"))
    first, second = text.split("\n\n")[:2]
    assert first.splitlines()[0].split("  ") == ["cell", "seeds", "mean H", "seconds"]
    assert second.splitlines()[0].split("  ") == ["cell", "seeds", "greedy", "best pass@1", "pass@1", "pass@16"]
    assert max(map(len, text.splitlines()[:-1])) <= 165


def test_what_makes_a_comparison_unfair_is_said():
    lines = [line("a", 0, samples=8), line("a", 0, "hard", samples=8), line("b", 0, samples=16)]
    lines[0]["stopped"] = "entropy stood above 3 x 1.0 nats"
    text = render(compare(lines))
    assert (
        "Stopped early, and counted with the figures at that step: a on expr, seed 0: entropy stood above 3 x 1.0 nats."
        in text
    )
    assert "Not run on every task, so no fair mean: b (hard)." in text
    assert "Not the same number of generated answers: a 8; b 16." in text
    assert compare([line("a", 0, samples=8), line("b", 0, samples=8)]).notes == []


def test_markdown_is_a_table():
    text = render(compare([line("a", 0, **{"pass@1": 0.5})]), markdown=True)
    assert text.splitlines()[:2] == ["| cell | seeds | pass@1 |", "| --- | --- | --- |"]
