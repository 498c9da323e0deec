"""What a run and an evaluation print."""

import pytest

from isentropic.cli import main
from isentropic.experiments.terminal import at_best, best_shares, evaluation_table, floors
from isentropic.runs.summary import closing_table

RUN = {
    "steps": 24,
    "seconds": 60.0,
    "entropy/start": 1.0,
    "entropy/target": 0.8,
    "entropy/end": 0.81,
    "entropy/rms_error": 0.02,
    "knob/saturated": 0.1,
    "reward/start": 0.3,
    "reward/end": 0.6,
}


def scored(step):
    return {"step": step, "pass@1": 0.3, "pass@2": 0.4, "pass@16": 0.9, "distinct": 5.125} | {
        "greedy": 0.6 + step / 100,
        "best_pass@1": 0.5 + step / 100,
        "best_temperatures": [0.3, 0.6],
    }


def sequence(num, steps):
    before = {f"expr:need=digit,different:within={i}, a long name": [scored(s) for s in steps] for i in range(num - 1)}
    return {**RUN, "start": scored(0), "end": scored(24), "stopped": "entropy stood above 2 nats"} | {"before": before}


def test_the_closing_table_of_a_run_of_one_task():
    lines = closing_table({**RUN, "start": scored(0), "end": scored(24)}, "runs/x").splitlines()
    assert lines[1].split() == ["24", "steps,", "60", "seconds", "start", "target", "end"]
    head = next(i for i, line in enumerate(lines) if line.startswith("held-out"))
    assert lines[head].split() == ["held-out", "step", "greedy", "best", "pass@1*", "pass@16", "distinct"]
    assert lines[head + 1].split() == ["start", "0", "0.600", "0.500", "0.900", "5.12"]
    assert lines[head + 2].split() == ["end", "24", "0.840", "0.740", "0.900", "5.12"]
    assert lines[head + 3].startswith("* temperature chosen on one half of the prompts, scored on the other")
    assert lines[-1] == "run directory: runs/x"


@pytest.mark.parametrize("num", [1, 2, 3, 4, 9])
def test_the_closing_table_is_short_and_narrow(num):
    steps = range(0, 25, 24 // num) if 24 % num == 0 else (0, 5, 24)
    lines = closing_table(sequence(num, steps), "runs/x").splitlines()
    assert len(lines) < 20
    assert max(map(len, lines)) <= 100
    assert ("summary.json" in "".join(lines)) == (num > 3)


def test_each_task_is_shown_at_the_switch_from_it():
    lines = closing_table(sequence(3, (0, 8, 16, 24)), "x").splitlines()
    switches = [line.split() for line in lines if "switch" in line]
    assert [words[words.index("switch") + 1] for words in switches] == ["8", "16"]
    # With further evaluations in between, the switch is not known.
    assert "switch" not in closing_table(sequence(3, range(0, 25, 4)), "x")


def test_a_summary_without_the_newer_figures_is_printed():
    plain = {"step": 0, "pass@1": 0.25, "pass@4": 0.5, "distinct": 2.0}
    text = closing_table({**RUN, "start": plain, "end": {**plain, "step": 9}}, "x")
    assert "held-out         step  pass@1  pass@4  distinct" in text
    assert "temperature chosen" not in text
    assert "held-out" not in closing_table(RUN, "x")


def evaluation(model="m", cold=(2, 2, 1, 1), greedy=(1, 1, 1, 0), majority=0.75):
    def figures(right):
        more = {} if majority is None else {"majority": majority}
        return {"pass@1": sum(right) / 8, "pass@2": 1.0, "distinct": 1.25, "num_correct": list(right), **more}

    return {
        "model": model,
        "step": None,
        "dtype": "float32",
        "task": "expr",
        "k": 2,
        "temperature": 1.0,
        **figures((1, 1, 1, 1)),
        "truncated_frac": 0.125,
        "tokens_per_second": 99.6,
        "prompts": ["p"] * 4,
        "num_samples": [2] * 4,
        "greedy": sum(greedy) / 4,
        "greedy_correct": list(greedy),
        "at": {"0.5": figures(cold)},
    }


def test_the_table_of_a_model():
    lines = evaluation_table([evaluation()]).splitlines()
    assert lines[0].startswith("task expr, 4 prompts, 2 samples each")
    assert lines[2] == "m  (float32, 12.5% truncated at temperature 1, 100 tokens per second)"
    by_temperature = {line.split()[0]: line.split() for line in lines[4:8]}
    assert by_temperature["1"][1] == "0.500"
    assert by_temperature["1"][-3:] == ["1.000", "1.25", "0.750"]
    assert by_temperature["greedy"][1] == "0.750"
    assert by_temperature["greedy"][-3:] == ["–"] * 3
    assert by_temperature["best"][1] == "0.750"
    assert "at 0.5: chosen on one half" in lines[7]
    assert lines[-1].split() == ["m", "1.25,", "1.000", "1.25,", "1.000", "1.25,", "1.000"]
    assert "difference" not in "".join(lines)
    assert "too narrow" not in "".join(lines)


def test_episodes_have_no_vote():
    assert evaluation_table([evaluation(majority=None)]).count("–") == 5


def test_models_are_compared_on_the_same_prompts_and_at_the_same_accuracies():
    rows = [evaluation(), evaluation("other", (1, 0, 1, 0), (0, 0, 1, 0))]
    *_, title, head, last = evaluation_table(rows).splitlines()
    assert title == "difference from m on the same prompts"
    assert head.split() == ["model", "greedy", "best", "pass@1"]
    words = last.split()
    assert (words[0], words[1], words[3]) == ("other", "-0.500", "-0.250")
    text = evaluation_table(rows, [0.6, 0.8])
    assert "pass@1 >= 0.600  pass@1 >= 0.800" in text
    reached = {
        line.split()[0]: line.split()[1:] for line in text.splitlines() if "1.25, " in line or line.endswith("–")
    }
    assert reached["m"] == ["1.25,", "1.000", "–"]
    assert reached["other"] == ["–", "–"]


def test_the_figures_at_its_best():
    row = evaluation()
    assert floors(row) == pytest.approx([0.7425, 0.7125, 0.675])
    assert at_best(row, [0.5, 0.9]) == {
        "best_pass@1": 0.75,
        "best_temperatures": [0.5, 0.5],
        "frontier": [
            {"at_least": 0.5, "distinct": 1.25, "pass@2": 1.0},
            {"at_least": 0.9, "distinct": None, "pass@2": None},
        ],
    }
    assert best_shares(row).tolist() == [1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("value", ["0", "1.5", "-1", "nan"])
def test_an_accuracy_is_a_share(value, capsys):
    with pytest.raises(SystemExit):
        main(["eval", "tiny", "--task", "expr", f"--at-least={value}"])
    assert f"--at-least: got {value}, must be > 0 and at most 1; write 80 % as 0.8" in capsys.readouterr().err
