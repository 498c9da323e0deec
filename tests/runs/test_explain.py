"""What `isentropic explain` makes of a run directory, on rows whose answers are known."""

import json

import pytest

from isentropic.cli import main
from isentropic.runs.explain import calibrate, explain, parse_steps, render, verdict
from isentropic.runs.record import Record

PARTS = {"likely_up": -3.0, "rare_up": 1.0, "likely_down": 0.5, "rare_down": -0.5, "bonus": 0.0}


def row(step, entropy, **parts):
    """A step; with parts it is an explained one, in units of 1e-4 nats."""
    found = {"step": step, "entropy/mean": entropy, "knob/value": 0.1, "knob/saturated": 0, "clip/high_frac": 0.01}
    found |= {"clip/low_frac": 0.02, "ratio/outside_frac": 0.03}
    if parts:
        change = sum(parts.values())
        found |= {f"predict/{name}": value * 1e-4 for name, value in parts.items()}
        found |= {
            "predict/change": change * 1e-4,
            "predict/absolute": 1e-4 * sum(map(abs, parts.values())),
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
    return found


@pytest.fixture
def run(tmp_path):
    record = Record(tmp_path / "run")
    record.start({}, {}, seed=0)
    return record


def test_a_fall_is_measured_and_attributed(run):
    run.append("metrics", *(row(t, 1.0 - 0.001 * t, **PARTS) for t in range(1, 101)))
    found = explain(run)
    # Means of the first and of the last ten readings: steps 1..10 and 91..100.
    assert found["entropy"]["change"] == pytest.approx(-0.09)
    assert found["predicted"]["change"] == pytest.approx(-2e-4 * 100)
    assert found["predicted"]["likely_up"] == pytest.approx(-0.03)
    assert "gain" not in found["predicted"]
    assert found["tokens"][0] == {"text": "a", "change": pytest.approx(-0.02), "count": 500}
    text = verdict(found)
    assert "fell by 0.090 nats" in text
    assert "likely tokens pushed up (60% of all" in text  # 3 of 5
    assert "raises it most is rare tokens pushed up (20%)" in text
    assert "knob raises it by 4%" in text
    assert "Precision is not the cause" in text


def test_one_step_is_measured_against_the_next_reading(run):
    run.append("metrics", *(row(t, h, **PARTS) for t, h in ((1, 1.0), (2, 0.9), (3, 0.7))))
    assert explain(run, "2")["entropy"] == pytest.approx({"first": 0.9, "last": 0.7, "change": -0.2})
    assert explain(run, "3")["entropy"]["change"] == 0.0


def test_an_explained_step_stands_for_those_up_to_the_next(run):
    run.append("metrics", *(row(t, 1.0, **(PARTS if t % 10 == 1 else {})) for t in range(1, 41)))
    found = explain(run, "1:40")
    assert found["explained"] == 4
    assert found["predicted"]["change"] == pytest.approx(-2e-4 * 40)
    assert sum(block["change"] for block in found["rows"] if block["change"]) == pytest.approx(-2e-4 * 40)


def test_calibration_finds_slope_and_drift_through_noise():
    changes = [-1e-4 * (1 + (t // 100) % 3) for t in range(600)]
    level, rows = 5.0, []
    for t, change in enumerate(changes):
        rows.append({"step": t + 1, "entropy/mean": level + (0.01 if t % 2 else -0.01), "predict/change": change})
        level += 7 * change + 2e-4
    found = calibrate(rows)
    assert found.slope == pytest.approx(7, rel=1e-6)
    assert found.drift == pytest.approx(2e-4, rel=1e-6)
    assert found.correlation == pytest.approx(1.0)
    assert found.blocks == 29
    assert calibrate(rows[:60]) is None
    assert calibrate([{"step": 1, "entropy/mean": 1.0}] * 200) is None


def test_rounding_that_is_compared_now_and_then_stands_for_all_steps(run):
    rows = [{**row(t, 1.0, **PARTS), "predict/numerics": 1e-6 if t % 10 == 1 else None} for t in range(1, 41)]
    run.append("metrics", *rows)
    assert explain(run)["predicted"]["numerics"] == pytest.approx(40e-6)


def test_a_refused_reading_explains_nothing(run):
    run.append("metrics", *({**row(t, 1.0, **PARTS), "entropy/refused": max(0, t - 8)} for t in range(1, 17)))
    found = explain(run)
    assert found["explained"] == 8
    run.append("metrics", *({**row(t, 0.0, **PARTS), "entropy/refused": t} for t in range(17, 30)))
    assert "13 readings were refused, and explain nothing; run `isentropic audit`" in verdict(explain(run, "17:29"))


def test_precision_is_blamed_where_it_moves_entropy(run):
    run.append("metrics", *({**row(t, 1.0, **PARTS), "numerics/logp_rms": 0.02} for t in range(1, 9)))
    assert "run `isentropic audit`" in verdict(explain(run))


def test_a_run_without_explained_steps_says_how_to_get_them(run):
    run.append("metrics", *(row(t, 1.0 - 0.01 * t) for t in range(1, 9)))
    text = render(explain(run))
    assert "--explain-every 1" in text
    assert "What moved" not in text


def test_nulls_are_left_out(run):
    rows = [{**row(t, 1.0, **PARTS), "predict/knob": None, "predict/numerics": None} for t in range(1, 9)]
    rows[3]["entropy/mean"] = None
    run.append("metrics", *rows)
    found = explain(run)
    assert "knob" not in found["predicted"]
    assert "acts through the clip" in render(found)


@pytest.mark.parametrize(
    ("text", "says"),
    [("a:b", "steps must be A:B"), ("5:2", "hold no step"), ("90:", "hold no step"), ("0:2", "hold no"), ("", "must")],
)
def test_bad_steps_are_named(text, says):
    with pytest.raises(ValueError, match=says):
        parse_steps(text, 80)


def test_the_command_prints_text_or_json(run, capsys):
    run.append("metrics", *(row(t, 1.0 - 0.001 * t, **PARTS) for t in range(1, 101)))
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
