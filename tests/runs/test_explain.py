"""What `isentropic explain` makes of a run directory, on rows whose answers are known."""

import json

import pytest

from isentropic.cli import main
from isentropic.runs.explain import explain, parse_steps, render, top_tokens, verdict
from isentropic.runs.record import Record

CHANGES = {"likely_up": -3.0, "rare_up": 1.0, "likely_down": 0.5, "rare_down": -0.5, "bonus": 0.0}


def row(step, entropy, **changes):
    """A step; with changes, in units of 1e-4 nats, it is an explained one."""
    fields = {"step": step, "entropy/mean": entropy, "knob/value": 0.1, "knob/saturated": 0, "clip/high_frac": 0.01}
    fields |= {"clip/low_frac": 0.02, "ratio/outside_frac": 0.03}
    if changes:
        change = sum(changes.values())
        fields |= {f"predict/{name}": value * 1e-4 for name, value in changes.items()}
        fields |= {
            "predict/change": change * 1e-4,
            "predict/absolute": 1e-4 * sum(map(abs, changes.values())),
            "predict/positive": change * 1e-4,
            "predict/unclipped": change * 1e-4,
            "predict/knob": 0.2e-4,
            "predict/gain": 2e-4,
            "predict/numerics": 0.0,
            "predict/moments": 1,
            "numerics/logp_rms": 3e-7,
            "numerics/entropy_bias": 1e-8,
            "predict/top_tokens": [["a", -2e-4, 5], ["<b>", 1e-4, 2]],
        }
    return fields


@pytest.fixture
def run(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {}, seed=0)
    return record


def test_a_fall_is_measured_and_attributed(run):
    run.append("metrics", *(row(t, 1.0 - 0.001 * t, **CHANGES) for t in range(1, 101)))
    explanation = explain(run)
    # Means of the first and of the last ten readings: steps 1..10 and 91..100.
    assert explanation["entropy"]["change"] == pytest.approx(-0.09)
    assert explanation["predicted"]["change"] == pytest.approx(-2e-4 * 100)
    assert explanation["predicted"]["likely_up"] == pytest.approx(-0.03)
    assert "gain" not in explanation["predicted"]
    assert explanation["tokens"][0] == {"text": "a", "change": pytest.approx(-0.02), "count": 500}
    text = verdict(explanation)
    assert "fell by 0.090 nats" in text
    assert "likely tokens pushed up (60% of all" in text  # 3 of 5
    assert "raises it most is rare tokens pushed up (20%)" in text
    assert "knob raises it by 4%" in text
    assert "Precision is not the cause" in text


def test_one_step_is_measured_against_the_next_reading(run):
    run.append("metrics", *(row(t, h, **CHANGES) for t, h in ((1, 1.0), (2, 0.9), (3, 0.7))))
    assert explain(run, "2")["entropy"] == pytest.approx({"first": 0.9, "last": 0.7, "change": -0.2})
    assert explain(run, "3")["entropy"]["change"] == 0.0


def test_an_explained_step_counts_for_those_up_to_the_next(run):
    run.append("metrics", *(row(t, 1.0, **(CHANGES if t % 10 == 1 else {})) for t in range(1, 41)))
    explanation = explain(run, "1:40")
    assert explanation["explained"] == 4
    assert explanation["predicted"]["change"] == pytest.approx(-2e-4 * 40)
    assert sum(block["change"] for block in explanation["rows"] if block["change"]) == pytest.approx(-2e-4 * 40)


def test_tokens_are_ranked_by_what_they_moved():
    tokens = [["a", 1.0, 1], ["b", -3.0, 1], ["c", None, 1]]
    rows = [{"step": s, "predict/change": 0.0, "predict/top_tokens": tokens} for s in (1, 2)]
    rows.append({**rows[0], "step": 3, "entropy/refused": 1})
    # Step 2 counts for step 3 too, whose reading was refused.
    assert top_tokens(rows) == [{"text": "b", "change": -9.0, "count": 3}, {"text": "a", "change": 3.0, "count": 3}]
    assert top_tokens(rows, num=1)[0]["text"] == "b"
    assert top_tokens([]) == []


def test_rounding_that_is_compared_now_and_then_counts_for_all_steps(run):
    rows = [{**row(t, 1.0, **CHANGES), "predict/numerics": 1e-6 if t % 10 == 1 else None} for t in range(1, 41)]
    run.append("metrics", *rows)
    assert explain(run)["predicted"]["numerics"] == pytest.approx(40e-6)


def test_a_refused_reading_explains_nothing(run):
    run.append("metrics", *({**row(t, 1.0, **CHANGES), "entropy/refused": max(0, t - 8)} for t in range(1, 17)))
    explanation = explain(run)
    assert explanation["explained"] == 8
    run.append("metrics", *({**row(t, 0.0, **CHANGES), "entropy/refused": t} for t in range(17, 30)))
    assert "13 readings were refused and are not explained; run `isentropic audit`" in verdict(explain(run, "17:29"))


def test_precision_is_blamed_if_it_moves_entropy(run):
    run.append("metrics", *({**row(t, 1.0, **CHANGES), "numerics/logp_rms": 0.02} for t in range(1, 9)))
    assert "run `isentropic audit`" in verdict(explain(run))


def test_a_run_without_explained_steps_says_how_to_get_them(run):
    run.append("metrics", *(row(t, 1.0 - 0.01 * t) for t in range(1, 9)))
    text = render(explain(run))
    assert "--explain-every 1" in text
    assert "What moved" not in text


COMPLETIONS = {"finished": 0.25, "truncated": 0.75, "short": 0.1, "middle": 0.2, "long": 0.7}


def by_completion(step, **shares):
    fields = {f"predict/{name}": value * 1e-4 for name, value in zip(COMPLETIONS, (-3, 1, -2, 0.5, -0.5), strict=True)}
    return {**row(step, 1.0, **CHANGES), **fields, **{f"tokens/{name}_frac": x for name, x in shares.items()}}


def test_completions_are_told_apart_by_end_and_length(run):
    """Step 1 counts for 1 to 3, step 4 for itself: shares of 0.75 three times, and of 0.35 once."""
    late = {**COMPLETIONS, "finished": 0.65, "truncated": 0.35}
    plain = ({**row(t, 1.0)} for t in (2, 3))
    run.append("metrics", by_completion(1, **COMPLETIONS), *plain, by_completion(4, **late))
    explanation = explain(run)
    assert explanation["shares"] == pytest.approx({**COMPLETIONS, "finished": 0.35, "truncated": 0.65})
    assert explanation["predicted"]["truncated"] == pytest.approx(4e-4)
    lines = render(explanation).splitlines()
    at = lines.index("Which completions?")
    assert lines[at + 1].split()[:8] == "ended by themselves (35% of tokens) -1.20e-03 -60.0%".split()  # 3 of 5
    assert lines[at + 2].split()[:9] == "cut at the limit (65% of tokens) +4.00e-04 +20.0%".split()
    assert lines[at + 4] == "Of which length?"
    assert [line.split(" (")[0].strip() for line in lines[at + 5 : at + 8]] == [
        "shortest third", "middle third", "longest third",
    ]  # fmt: skip
    assert max(map(len, lines)) <= 110


def test_a_split_of_which_one_part_alone_has_tokens_is_left_out(run):
    run.append("metrics", by_completion(1, **{**COMPLETIONS, "finished": 0.995, "truncated": 0.005}))
    text = render(explain(run))
    assert "Which completions?" not in text
    assert "Of which length?" in text


def test_a_run_that_does_not_tell_completions_apart(run):
    run.append("metrics", *(row(t, 1.0, **CHANGES) for t in range(1, 9)))
    assert explain(run)["shares"] == {}
    assert "length?" not in render(explain(run))


def test_nulls_are_left_out(run):
    rows = [{**row(t, 1.0, **CHANGES), "predict/knob": None, "predict/numerics": None} for t in range(1, 9)]
    rows[3]["entropy/mean"] = None
    run.append("metrics", *rows)
    explanation = explain(run)
    assert "knob" not in explanation["predicted"]
    assert "acts through the clip" in render(explanation)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a:b", "steps must be A:B"), ("5:2", "hold no step"), ("90:", "hold no step"), ("0:2", "hold no"), ("", "must")],
)
def test_bad_steps_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_steps(text, 80)


def test_the_command_prints_text_or_json(run, capsys):
    run.append("metrics", *(row(t, 1.0 - 0.001 * t, **CHANGES) for t in range(1, 101)))
    assert main(["explain", str(run.path), "--steps", "10:90"]) == 0
    out = capsys.readouterr().out
    for question in ("What moved entropy?", "In which answers?", "What did the clip do?", "Which tokens?"):
        assert question in out
    assert max(map(len, out.splitlines())) <= 110
    assert main(["explain", str(run.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["explained"] == 100


@pytest.mark.parametrize("arguments", [["nowhere"], ["{run}"], ["{run}", "--steps", "x"]])
def test_mistakes_are_one_line_and_exit_two(run, arguments, capsys):
    if "--steps" in arguments:
        run.append("metrics", row(1, 1.0))
    with pytest.raises(SystemExit) as stop:
        main(["explain", *(a.format(run=run.path) for a in arguments)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_automatic_target_says_where_it_was_and_why(run):
    run.append("metrics", row(1, 0.9))
    assert "Where was the target" not in render(explain(run))
    why = ["held at its ceiling: a nat costs 0.01 of reward and is worth 0.05", "lowered: a nat costs 0.2 of reward"]
    for step, level, reason in ((7, 1.0, why[0]), (8, 1.0, why[0]), (9, 0.9, why[1])):
        run.append("metrics", {**row(step, 0.9), "entropy/target": level, "entropy/target_why": reason})
    lines = render(explain(run)).splitlines()
    at = lines.index("Where was the target, and why?")
    assert lines[at + 1] == f"  target 1.000, steps 7 to 8: {why[0]}"
    assert lines[at + 2] == f"  target 0.900, step 9: {why[1]}"
