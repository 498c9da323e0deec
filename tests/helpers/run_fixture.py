"""Run directories written in plain Python: every documented field, seeded, of any length."""

import json
import math
import random

from isentropic.runs.record import Record

SCRIPT = "<script>window.owned = 1; document.title = 'owned'</script><img src=x onerror='window.owned = 2'>"
NASTY = f"a {SCRIPT} b \u202e \x1b[31mred\x1b[0m </td></script> \u2028 \ud800 & &lt;"
FINDINGS = [
    {
        "severity": "note",
        "code": "head-dtype",
        "what": "the head runs in float32",
        "where": "lm_head",
        "effect": "none",
        "remedy": "none needed",
    },
    {
        "severity": "serious",
        "code": "logp-bf16",
        "what": f"log-probabilities in bfloat16 {SCRIPT}",
        "where": "trainer",
        "effect": "ratios are biased upwards",
        "remedy": "compute log-probabilities in float32",
    },
]


def make_run(path, steps=300, seed=0, recipe="isentropic", hold=True, tasks=("expr",), full=True, ended=True):
    """A run directory at ``path``.

    Args:
        steps: rows of metrics; a run that has not ended was to take twice as many.
        hold: entropy stays at its target, else it decays.
        tasks: trained one after another.
        full: with predictions, clip and numerics fields, samples, evaluations and an audit.
        ended: with summary.json.
    """
    rng = random.Random(f"{recipe} {seed}")
    record = Record(path)
    planned = steps if ended else 2 * steps
    config = {"recipe": recipe, "steps": planned, "seed": seed, "out": str(path), "target": "75%" if hold else None}
    control = {"knob": "zeta", "controller": "pi", "target": "75%"} if hold else {"knob": None, "target": None}
    record.start(config, {"formula": "A − ζ|A|·L", **control}, seed, task=tasks[0], model="tiny")
    record.append("metrics", *metrics(rng, steps, hold, tasks, full))
    if full:
        # Escaped, since half a surrogate pair has no UTF-8.
        (path / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in samples(rng, steps)))
        record.append("evaluations", *evaluations(rng, steps, tasks, hold))
        (path / "audit.json").write_text(json.dumps({"findings": FINDINGS}))
    if ended:
        (path / "summary.json").write_text(json.dumps({"steps": steps}))
    return path


def metrics(rng, steps, hold, tasks, full):
    """Rows in which entropy moves by what is predicted, and is read with noise."""
    true, target, zeta = 1.06, 0.8, 0.0
    for step in range(1, steps + 1):
        reward = 0.36 + 0.45 * (1 - math.exp(-3 * step / steps)) + rng.gauss(0, 0.02)
        change = (0.1 if hold else 0.004) * ((target if hold else 0.15) - true) + rng.gauss(0, 0.004)
        read = true + rng.gauss(0, 0.004)
        zeta = min(0.6, max(-0.6, zeta + 0.4 * (target - read)))
        row = {
            "step": step,
            "seconds": 0.1 * step,
            "entropy/mean": read,
            "entropy/tokens": 1024,
            "entropy/target": target if hold and step > 1 else None,
            "entropy/error": read / target - 1 if hold and step > 1 else None,
            "knob/value": zeta if hold else None,
            "knob/saturated": int(abs(zeta) >= 0.6) if hold else None,
            "clip/low_frac": 0.02 + rng.random() * 0.01,
            "clip/high_frac": 0.01 + rng.random() * 0.01,
            "cov/adv_logp": 0.1 * math.exp(-step / steps) + rng.gauss(0, 0.01),
            "reward/mean": reward,
            "length/mean": 8 + 2 * step / steps + rng.gauss(0, 0.1),
            "length/truncated_frac": max(0.0, rng.gauss(0.004, 0.002)),
            "samples/total": 128 * step,
        }
        if len(tasks) > 1:
            row["task"] = tasks[(step - 1) * len(tasks) // steps]
        if full:
            row |= numerics(rng) | (prediction(rng, change) if step % 5 == 1 else {})
        true += change
        yield row


def numerics(rng):
    return {
        "ratio/outside_frac": 0.05 + 0.02 * rng.random(),
        "theorem2/violated_frac": 0.01 * rng.random(),
        "numerics/logp_rms": 1e-3 * (1 + rng.random()),
        "numerics/entropy_bias": rng.gauss(0, 1e-4),
    }


def prediction(rng, change):
    """The fields of a predicted change: quadrants and bonus add up to it."""
    noisy = change + rng.gauss(0, 0.0005)
    quadrants = {"likely_up": -0.006, "rare_up": 0.004, "rare_down": -0.003, "bonus": 0.001}
    quadrants["likely_down"] = noisy - sum(quadrants.values())
    split = {f"position_{i}": noisy / 8 * (1 + 0.3 * rng.gauss(0, 1)) for i in range(1, 9)}
    clip = {"unclipped": 0.9 * noisy, "clipped_low": 0.04 * noisy, "clipped_high": 0.06 * noisy}
    clip |= {"removed_low": 0.0004, "removed_high": -0.0006}
    sign = {"positive": 0.7 * noisy, "negative": 0.3 * noisy, "neutral": 0.0}
    forms = {"change": noisy, "change_simple": 0.6 * noisy, "change_natural": 1.4 * noisy, "absolute": 0.02}
    changes = forms | quadrants | split | clip | sign | {"knob": 0.001, "gain": 0.01}
    fields = {f"predict/{name}": value for name, value in changes.items()}
    fields["predict/top_tokens"] = [["+", -0.004, 90], ["7", 0.002, 61], [SCRIPT, 0.001, 3]]
    return fields


def samples(rng, steps):
    for step in range(1, steps + 1, max(1, steps // 60)):
        tokens = ["7", "*", "5", "+", "\n", " ", str(rng.randint(0, 9)), "<eos>"]
        if step == 1:
            tokens = [NASTY, "</script>", "x"]
        surprisal = [rng.expovariate(1.0) for _ in tokens]
        yield {
            "step": step,
            "prompt": "42 8>" if step > 1 else NASTY,
            "completion": "".join(tokens),
            "reward": float(rng.random() < 0.6),
            "advantage": rng.gauss(0, 0.5),
            "tokens": tokens,
            "surprisal": surprisal,
            "entropy": surprisal[::-1],
        }


def evaluations(rng, steps, tasks, hold):
    for step in (0, steps // 2, steps):
        for task in tasks:
            chance = 0.38 + 0.4 * step / steps
            correct = [sum(rng.random() < chance for _ in range(16)) for _ in range(60)]
            distinct = [min(c, max(1, round(c * (0.9 if hold else 0.9 - 0.5 * step / steps)))) for c in correct]
            row = {"step": step, "task": task, "k": 16, "temperature": 1.0}
            for k in (1, 2, 4, 8, 16):
                miss = [math.comb(16 - c, k) / math.comb(16, k) for c in correct]
                row[f"pass@{k}"] = 1 - sum(miss) / len(miss)
            row |= {"distinct": sum(distinct) / 60, "num_samples": [16] * 60, "num_correct": correct}
            yield row | {"num_distinct": distinct, "prompts": ["42 8>"] * 60} | at_other_temperatures(row, correct)


def at_other_temperatures(row, correct):
    """A hotter policy is worse, a cooler one better and less varied; greedy is better still."""
    others = {}
    for temperature, share in (("1.5", 0.6), ("0.6", 1.15), ("0.3", 1.25)):
        right = [min(16, round(share * c)) for c in correct]
        kinds = [min(c, round(9 * float(temperature) ** 0.5)) for c in right]
        figures = {"pass@1": sum(right) / 960, "pass@16": sum(c > 0 for c in right) / 60, "distinct": sum(kinds) / 60}
        others[temperature] = figures | {"num_correct": right, "num_distinct": kinds}
    greedy = [int(c >= 5) for c in correct]
    return {"at": others, "greedy": sum(greedy) / 60, "greedy_correct": greedy}
