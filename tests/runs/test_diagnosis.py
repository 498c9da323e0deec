"""What `isentropic explain` says first: rules by hand, and real runs that were made to fail in one way each."""

from pathlib import Path

import pytest

from isentropic.cli import main
from isentropic.runs.calibration import Calibration, distrust
from isentropic.runs.diagnosis import clip_range, collapse_of, diagnose, spread
from isentropic.runs.explain import explain, render
from isentropic.runs.record import Record, read_rows

RECIPE = {"objective": "clipped", "bounds": "additive", "clip_low": 0.2, "clip_high": 0.28, "knob": "zeta"}
HEADER = {"config": {"temperature": 1.0}, "recipe": RECIPE}


def row(step, **fields):
    """A step of a healthy run: four steps on each generated batch, whose ratios spread slowly."""
    age = (step - 1) % 4
    healthy = {
        "entropy/mean": 0.9,
        "entropy/target": 0.9,
        "knob/value": 0.1,
        "knob/saturated": 0,
        "learning_rate": 5e-4,
        "policy/age": age,
        "ratio/ess_frac": 1 / (1 + (0.03 * age) ** 2),
        "ratio/outside_frac": 0.02 * age,
        "theorem2/violated_frac": 0.03 * age,
        "clip/low_frac": 0.01 * age,
        "clip/high_frac": 0.01 * age,
        "reward/mean": 0.4 + 0.01 * ((step - 1) // 4),
        "samples/total": 512 * (1 + (step - 1) // 4),
    }
    return {"step": step, **healthy, **fields}


def codes(rows, header=HEADER):
    return [problem.code for problem in diagnose(header, rows)]


def run(num=80, **fields):
    """Rows whose fields are numbers, or functions of the step."""
    return [
        row(t, **{k.replace("__", "/"): v(t) if callable(v) else v for k, v in fields.items()})
        for t in range(1, num + 1)
    ]


def with_recipe(**recipe):
    return {**HEADER, "recipe": {**RECIPE, **recipe}}


def test_a_healthy_run_has_no_problem():
    assert codes(run()) == []
    assert diagnose({}, []) == diagnose({"config": None, "recipe": 3}, [{"step": 1}]) == []


def test_spread_by_hand():
    # Ratios of 1 ± 0.5 have a second moment of 1.25.
    assert spread({"ratio/ess_frac": 1 / 1.25}) == pytest.approx(0.5)
    assert spread({"ratio/ess_frac": 1.0}) == 0


def test_a_step_that_moves_ratios_by_too_much_is_the_learning_rate():
    # √(1/0.8 − 1) = 0.5 at 5e-4: 5 % need a tenth of it.
    (problem,) = diagnose(HEADER, run(ratio__ess_frac=lambda t: 0.8 if t % 4 == 2 else 1.0))
    assert (problem.code, problem.headline) == (
        "learning_rate",
        "Learning rate too high: one step moves ratios by 50% rms.",
    )
    assert "2% of the ratios lie outside the clip and 3% of the rows" in problem.detail
    assert "near 5e-05, which moves them by 5%" in problem.remedy
    # 14 % after one step is usual; the same after three is what several steps do.
    assert codes(run(ratio__ess_frac=lambda t: 1 / (1 + 0.14**2) if t % 4 == 2 else 1.0)) == []
    assert codes(run(ratio__ess_frac=lambda t: 0.8 if t % 4 == 0 else 1.0)) == []


def test_what_too_large_steps_do_is_not_told_as_a_problem_of_its_own():
    fields = {"ratio__ess_frac": lambda t: 0.8 if t % 4 == 2 else 1.0, "theorem2__violated_frac": 0.9}
    fields |= {"knob__saturated": 1, "entropy__mean": 0.3, "reward__mean": lambda t: 0.5 if t < 41 else 0.001 * t}
    (problem,) = diagnose(HEADER, run(**fields))
    assert problem.headline.endswith("rms, and reward collapsed at step 41.")


def test_a_clip_that_stops_almost_nothing_of_almost_anything_is_too_wide():
    idle = run(clip__low_frac=0.0, clip__high_frac=0.0)
    (problem,) = diagnose(with_recipe(clip_low=0.9, clip_high=9.0), idle)
    assert (problem.code, problem.headline) == (
        "clip",
        "Clip too wide: it allows ratios from 0.1 to 10 and stops 0.0%.",
    )
    assert "up to 9% rms within the 3 steps" in problem.detail
    assert codes(idle) == []
    assert codes(run(), with_recipe(clip_low=0.9, clip_high=9.0)) == ["clip"]
    assert codes(run(clip__low_frac=0.06), with_recipe(clip_low=0.9, clip_high=9.0)) == []
    # On-policy every ratio is 1, whatever the clip.
    assert codes(run(policy__age=0, ratio__ess_frac=1.0), with_recipe(clip_low=0.9, clip_high=9.0)) == []


def test_ranges_of_clips():
    assert clip_range({**RECIPE, "bounds": "reciprocal", "clip_low": 1.0}) == (0.5, 1.28)
    assert clip_range({**RECIPE, "clip_low": 2.0}) == (0.0, 1.28)
    for other in ({"objective": "cispo"}, {"knob": "clip_high"}, {"bounds": "dcpo"}, {"clip_low": None}):
        assert clip_range({**RECIPE, **other}) is None


def test_ratios_that_leave_the_clip_and_entropies_that_leave_theorem_2():
    (problem,) = diagnose(HEADER, run(theorem2__violated_frac=lambda t: 0.3 if t % 4 != 1 else 0.0))
    assert (problem.code, problem.headline[:52]) == ("theorem2", "Theorem 2's bound is violated: the entropy of 30% of")
    assert codes(run(ratio__outside_frac=lambda t: 0.25 if t % 4 != 1 else 0.0)) == ["ratios"]
    assert codes(run(theorem2__violated_frac=lambda t: 0.24 if t % 4 != 1 else 0.0)) == []


def test_a_target_above_what_is_reached():
    fields = {
        "knob__saturated": lambda t: int(t > 30),
        "entropy__target": 3.0,
        "entropy__mean": lambda t: 1 + 0.005 * t,
    }
    (problem,) = diagnose(HEADER, run(**fields))
    start = "Target out of reach: 3 nats per token is 299% of the start, 1.4 the most reached."
    assert (problem.code, problem.headline) == ("target", start)
    assert "83% of the steps after 20" in problem.detail  # 50 of 60
    assert codes(run(**{**fields, "knob__saturated": lambda t: int(t > 51)})) == []  # 29 of 60


def test_a_knob_at_its_bound_and_one_that_swings():
    fields = {"knob__saturated": 1, "knob__value": 0.05, "entropy__mean": lambda t: 0.9 if t < 10 else 0.5}
    (problem,) = diagnose(HEADER, run(**fields))
    assert (problem.code, problem.headline) == (
        "knob",
        "Knob at its bound: zeta is at 0.05 in 100% of the steps after 20.",
    )
    assert "44% below its target of 0.9" in problem.detail
    assert codes(run(**{**fields, "entropy__mean": 0.85})) == []  # at a bound, and on target
    assert codes(run(**{**fields, "knob__value": lambda t: 1 if t % 3 else -1})) == ["oscillation"]


def test_a_temperature_other_than_1_matters_where_there_is_a_target():
    cold = {"config": {"temperature": 0.6}, "recipe": RECIPE}
    (problem,) = diagnose(cold, run())
    assert problem.headline.startswith("Sampling temperature 0.6, not 1")
    assert "lower than it would be" in problem.detail
    assert codes(run(entropy__target=None), cold) == []
    assert codes(run(), {**cold, "recipe": {**RECIPE, "knob": None}}) == []
    # A target out of reach comes first.
    far = run(knob__saturated=1, entropy__target=3.0)
    assert codes(far, cold) == ["target", "temperature"]


def test_a_reward_that_collapsed():
    rewards = [0.3, 0.4, 0.5, 0.5, 0.5, 0.2, 0.1, 0.0, 0.02, 0.01]
    rows = [row(t, **{"reward/mean": rewards[(t - 1) // 4]}) for t in range(1, 41)]
    assert collapse_of(rows) == (21, 0.5, pytest.approx(0.015))
    (problem,) = diagnose(HEADER, rows)
    assert (problem.code, problem.headline) == ("reward", "Reward collapsed at step 21, at a learning rate of 0.0005.")
    (problem,) = diagnose(HEADER, [{**r, "entropy/mean": 0.9 if r["step"] < 20 else 2.0} for r in rows])
    assert problem.headline == "Reward collapsed at step 21, while entropy rose to 2 nats."
    # One that recovers, one that falls by less than half, noise, and another task's reward are no collapse.
    assert collapse_of([{**r, "reward/mean": 0.4} if r["step"] > 36 else r for r in rows]) is None
    assert collapse_of([{**r, "reward/mean": 0.5 + r["reward/mean"]} for r in rows]) is None
    noise = (0.5, 0.05, 0.45, 0.1, 0.4, 0.02, 0.5, 0.1, 0.02, 0.05)
    assert collapse_of([{"step": t, "reward/mean": x} for t, x in enumerate(noise, 1)]) is None
    tasks = [{**r, "task": "a" if r["step"] < 21 else "b"} for r in rows]
    assert (
        collapse_of([{**r, "reward/mean": 0.1 * r["reward/mean"] if r["task"] == "a" else 0.01} for r in tasks]) is None
    )


def test_a_loss_of_a_reward_below_zero_is_measured_in_its_own_spread():
    rows = [{"step": t, "reward/mean": -1.0 - 0.01 * t - 2.0 * (t > 8), "reward/std": 1.0} for t in range(1, 17)]
    assert collapse_of(rows).step == 9
    assert collapse_of([{**r, "reward/std": 3.0} for r in rows]) is None


def test_predictions_with_the_wrong_sign_or_no_correlation_are_not_trusted(tmp_path):
    assert "wrong sign" in distrust(Calibration(-1.0, 0.0, -0.9, 5))
    assert "hardly follow" in distrust(Calibration(1.0, 0.0, 0.2, 5))
    assert distrust(Calibration(1.0, 0.0, 0.3, 5)) is distrust(None) is None
    record = Record(tmp_path)
    record.start({}, {}, seed=0)
    change, level, rows = 0.0, 1.0, []
    for t in range(1, 121):
        change = 1e-4 * (1 if t // 20 % 2 else -1)
        rows.append({"step": t, "entropy/mean": level, "predict/change": change, "predict/absolute": 1e-3})
        level -= 20 * change
    record.append("metrics", *rows)
    text = render(explain(record))
    assert "Do not trust the attribution below: predictions have the wrong sign: measured = -20 × predicted" in text


# Runs of 80 or 120 steps on the embedded task with one setting changed: a learning rate of 0.02, clip widths of 20, a
# temperature of 0.6, a target of 3.2 nats, three times the start; and none.
RUNS = {run["run"]: run for run in read_rows(Path(__file__).parents[1] / "helpers" / "broken_runs.jsonl.gz")}
FIRST_LINES = {
    "learning rate": "Learning rate too high: one step moves ratios by 23% rms, and reward collapsed at step 13.",
    "clip": "Clip too wide: it allows ratios from 0.048 to 21 and stops 0.0%.",
    "temperature": "Sampling temperature 0.6, not 1: entropy and its target are those of the tempered policy.",
    "target": "Target out of reach: 3.2 nats per token is 301% of the start, 1.36 the most reached.",
    "nothing": "{run}, steps 1 to 120",
}


@pytest.mark.parametrize("name", FIRST_LINES)
def test_the_first_line_of_explain_names_the_cause(name, tmp_path, capsys):
    record, real = Record(tmp_path / "run"), RUNS[name]
    record.start(real["config"], real["recipe"], seed=0)
    columns = real["columns"]
    record.append("metrics", *(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)))
    assert main(["explain", str(record.path)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == FIRST_LINES[name].format(run=record.path)
    assert len(first) <= 100 or name == "nothing"


def test_a_run_with_a_learning_rate_too_high_says_so(tmp_path, capsys):
    pytest.importorskip("trl")
    out, model = str(tmp_path / "run"), str(Path(__file__).parents[2] / "bench" / "warm-start")
    off = ["--model", model, "--out", out, "--eval-k", "0", "--audit", "off", "--save-every", "0"]
    assert main(["train", "--learning-rate", "0.02", "--warmup", "4", "--steps", "12", *off]) == 0
    capsys.readouterr()
    assert main(["explain", out]) == 0
    assert capsys.readouterr().out.startswith("Learning rate too high: one step moves ratios by ")
