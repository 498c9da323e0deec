"""What each objective does to entropy: predicted against measured change of a step, in the lab, where both are exact.

Every objective takes one plain gradient step on tables of logits, on-policy and after updates on the same answers,
where the policy is calibrated, anti-calibrated and uninformed about the reward. Gradients are the expected ones over
all answers and groups. The table is printed, and written to docs/results/objectives.{md,json,svg}.

    python bench/objectives.py [--seeds 0 1 2] [--updates 4]
"""

import argparse
import json
import os
import platform
import statistics
import time
from datetime import date
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1"}

import matplotlib
import torch

from isentropic import __version__
from isentropic.engines import tabular as lab
from isentropic.recipes import compose

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
# Name -> recipe, value of its knob. PPO's clip is taken with the mean of the group for a baseline: it has no critic.
OBJECTIVES = {
    "REINFORCE": (compose("reinforce"), None),
    "RLOO": (compose("rloo"), None),
    "GRPO": (compose("grpo"), None),
    "Dr. GRPO": (compose("dr-grpo"), None),
    "PPO clip": (compose("dr-grpo", reduction="token"), None),
    "LOOP": (compose("loop"), None),
    "DAPO": (compose("dapo"), None),
    "GSPO": (compose("gspo"), None),
    "CISPO": (compose("cispo"), None),
    "entropy bonus": (compose("entropy-bonus", entropy_coef=0.1), None),
    "REPO-R": (compose("repo-r-loop"), 0.05),
    "REPO-R centred": (compose("loop", knob="zeta"), 0.5),
    "REPO-D": (compose("repo-d-loop"), 4.0),
    "ADAPO low": (compose("adapo"), 0.07),
    "ADAPO high": (compose("adapo"), 1.12),
}
SETTINGS = {
    "entropy bonus": "GRPO, c = 0.1",
    "REPO-R": "LOOP, raw, ζ = 0.05",
    "REPO-R centred": "LOOP, ζ = 0.5",
    "REPO-D": "LOOP, batch mean, ζ = 4",
    "ADAPO low": "DAPO, ε_high at its lower bound, 0.07",
    "ADAPO high": "DAPO, ε_high at its upper bound, 1.12",
    "PPO clip": "group mean, ε = 0.2, token mean",
}
WORLDS = {"trees": lab.Tree(prompts=32, vocab=4, depth=3), "contexts": lab.Tree(prompts=160, vocab=12)}
GROUP, SCALE = 8, 1.5
# A step of 1 moves a state that is visited as often as the average one by its whole expected gradient.
STEPS = (1.0, 0.3, 0.1, 0.03, 0.01)
SMALL = 0.01
# Of the updates before a later step, plain and natural.
BETWEEN = (0.3, 0.05)

PREAMBLE = """
One command, `python bench/objectives.py`, makes this page, [the figures by seed](objectives.json) and
[the picture](objectives.svg). What they mean stands in [What your objective does to it](../objectives.md).

Change of the mean entropy in 1e-3 nats per token for a unit step, read off a step of {small:g}. A unit step moves a
state that is visited as often as the average one by its whole expected gradient. `predicted` is the first-order form
that belongs to the step, the exact one or the natural one, from the weights of the loss itself; `measured` is at fixed
prefixes. `error` is |predicted − measured| over the sum of the absolute contributions of the tokens, the largest over
seeds; other figures are means over seeds. `shift` is what the change of the visited states adds to `measured`: no form
predicts it, and contexts have none.

`{updates} updates on` is after {updates} steps, plain ones of {plain:g} or natural ones of {natural:g}, on the same
answers, with the clip where it then is; `clipped` is the share of tokens with an active clip. REINFORCE and RLOO are
strictly on-policy methods: their later columns show what stale answers do without a correction. Answers have one
length, so that Dr. GRPO and PPO's clip with a group mean are one. Uninformed rewards are drawn at random: by seed the
on-policy figures scatter around 0, as the figures by seed show.

Natural-gradient steps of the entropy bonus are predicted from the sampled tokens alone, which is exact on-policy only.
""".strip()


def cell(name, world, regime, seed, updates):
    """The steps of one objective from one policy: plain and natural, on-policy (0) and after updates."""
    recipe, knob = OBJECTIVES[name]
    tree = WORLDS[world]
    unit = tree.prompts * tree.depth
    old = lab.random_logits(tree, SCALE, seed)
    rewards = lab.make_rewards(tree, old, regime, seed=seed + 100)
    expected = lab.expected_batch(tree, old, rewards, recipe, GROUP)
    sampled = lab.sampled_batch(tree, old, rewards, recipe, GROUP, seed)

    def policy(batch, k, natural=False):
        return lab.advance(old, batch, recipe, BETWEEN[natural] * unit, k, knob, natural)

    def take(now, batch, size, natural=False):
        return lab.step(tree, now, batch, recipe, size * unit, knob, natural)

    found = {}
    for k in (0, updates):
        now = policy(expected, k)
        sweep = {size: take(now, expected, size) for size in STEPS}
        more = {"error sampled": take(policy(sampled, k), sampled, SMALL).error}
        more["errors"] = {size: round(out.error, 7) for size, out in sweep.items()}
        natural = take(policy(expected, k, True), expected, SMALL, True)
        found[k] = {"plain": figures(sweep[SMALL]) | more, "natural": figures(natural)}
    return found


def figures(out):
    """What is kept of a step, per unit step."""
    parts = ("likely_up", "rare_up", "likely_down", "rare_down", "bonus")
    per_step = {
        "predicted": out.predicted,
        "measured": out.fixed,
        "shift": out.shift,
        "absolute": out.absolute,
        "simple": out.simple,
        **{part: out.parts[part] for part in parts},
    }
    shares = {
        "clipped": out.clipped,
        "error": out.error,
        "error simple": abs(out.simple - out.fixed) / (out.absolute or 1.0),
    }
    return {name: round(x / SMALL, 9) for name, x in per_step.items()} | {n: round(x, 9) for n, x in shares.items()}


def measure(seeds, updates):
    return {
        world: {
            regime: {name: [cell(name, world, regime, seed, updates) for seed in seeds] for name in OBJECTIVES}
            for regime in lab.REGIMES
        }
        for world in WORLDS
    }


def average(cells, k, key, kind="plain"):
    return statistics.mean(c[k][kind][key] for c in cells)


def at(cells, k, size):
    return max(c[k]["plain"]["errors"][size] for c in cells)


def worst(cells, k, key, kind="plain"):
    return max(c[k][kind][key] for c in cells)


def table(by_name, updates, kind, with_shift):
    """One regime in one world as lines of markdown."""
    head = ["objective", "predicted", "measured", "error"] + ["shift"] * with_shift
    later = [f"predicted, {updates} updates on", "measured", "error"] + ["shift"] * with_shift + ["clipped"]
    lines = ["| " + " | ".join(head + later) + " |", "|---" + "|---:" * (len(head + later) - 1) + "|"]
    for name, cells in by_name.items():
        row = [name]
        for k in (0, updates):
            row += [f"{1e3 * average(cells, k, key, kind):+.2f}" for key in ("predicted", "measured")]
            row.append(f"{worst(cells, k, 'error', kind):.2%}")
            row += [f"{1e3 * average(cells, k, 'shift', kind):+.2f}"] * with_shift
        lines.append("| " + " | ".join([*row, f"{average(cells, updates, 'clipped', kind):.0%}"]) + " |")
    return lines


def error_table(found, updates):
    """The largest errors over regimes, seeds, worlds, on-policy and later."""
    head = [*(f"step {s:g}" for s in STEPS), "sampled groups", "without moments", "natural step"]
    lines = ["| objective | " + " | ".join(head) + " |", "|---" + "|---:" * len(head) + "|"]
    for name in OBJECTIVES:
        cells, both = cells_of(found, name), (0, updates)
        row = [max(at(cells, k, s) for k in both) for s in STEPS]
        row += [max(worst(cells, k, key) for k in both) for key in ("error sampled", "error simple")]
        row.append(max(worst(cells, k, "error", "natural") for k in both))
        lines.append(f"| {name} | " + " | ".join(f"{x:.2%}" for x in row) + " |")
    return lines


def cells_of(found, name):
    return [c for by_regime in found.values() for by_name in by_regime.values() for c in by_name[name]]


def report(found, seeds, updates, seconds):
    lines = ["# Does a prediction of the entropy change come true?", ""]
    lines += [PREAMBLE.format(small=SMALL, plain=BETWEEN[0], natural=BETWEEN[1], updates=updates), ""]
    lines += ["Settings: " + "; ".join(f"{name}: {text}" for name, text in SETTINGS.items()) + ".", ""]
    lines += ["![Does a prediction of the entropy change come true?](objectives.svg)"]
    for world, by_regime in found.items():
        for kind, step in (("plain", "plain step"), ("natural", "natural-gradient step")):
            for regime, by_name in by_regime.items():
                lines += ["", f"## {regime.capitalize()}, {world}, {step}", ""]
                lines += table(by_name, updates, kind, WORLDS[world].depth > 1)
    lines += ["", "## Largest errors over regimes, worlds, seeds, on-policy and later", ""]
    lines += [*error_table(found, updates), ""]
    shapes = "; ".join(f"{name}: {t.prompts} prompts, {t.vocab} tokens, depth {t.depth}" for name, t in WORLDS.items())
    made = (
        f"{date.today().isoformat()}; {platform.machine()}, {os.cpu_count()} cores, one thread; "
        f"isentropic {__version__}, "
        f"torch {torch.__version__}, python {platform.python_version()}; seeds {seeds}; logits of standard deviation "
        f"{SCALE:g} in float64, groups of {GROUP}; {shapes}; {seconds:.0f} s"
    )
    lines += [f"{made}."]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "objectives.md").write_text("\n".join(lines) + "\n")
    facts = {"made": made, "settings": SETTINGS, "updates": updates, "cells": found}
    (RESULTS / "objectives.json").write_text(json.dumps(facts, ensure_ascii=False) + "\n")
    draw(found, updates)
    print("\n".join(lines))


def draw(found, updates):
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "isentropic", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), width_ratios=[1, 1, 1.5])
    colours = dict(zip(lab.REGIMES, ("#d55e00", "#0072b2", "#777777"), strict=True))
    for regime, colour in colours.items():
        for world, mark in zip(WORLDS, "os", strict=True):
            cells = [c[k] for rows in found[world][regime].values() for c in rows for k in (0, updates)]
            points = [[1e3 * c["plain"][key] for c in cells] for key in ("predicted", "measured")]
            left.plot(*points, mark, color=colour, ms=3, alpha=0.6, label=regime if mark == "o" else None)
    low, high = left.get_xlim()
    left.plot([low, high], [low, high], color="#bbbbbb", lw=0.8, zorder=0)
    left.set(title="Does the prediction come true?", xlabel="predicted, 1e-3 nats per token", ylabel="measured")
    left.legend(frameon=False, fontsize=8)
    for name in OBJECTIVES:
        cells = cells_of(found, name)
        errors = [max(at(cells, k, s) for k in (0, updates)) for s in STEPS]
        middle.loglog(STEPS, errors, lw=1, alpha=0.8, color="#0072b2")
    middle.axhline(0.01, color="#bbbbbb", lw=0.8, ls="--")
    middle.set(title="Does the error fall with the step?", xlabel="step size")
    middle.set_ylabel("largest error / Σ |contributions|")
    width = 0.27
    for i, (regime, colour) in enumerate(colours.items()):
        rows = found["trees"][regime]
        places = [j + (i - 1) * width for j in range(len(rows))]
        right.barh(places, [1e3 * average(cells, 0, "measured") for cells in rows.values()], width, color=colour)
        ends = [1e3 * average(cells, updates, "measured") for cells in rows.values()]
        right.plot(ends, places, "|", color="black", ms=5)
    right.set_yticks(range(len(OBJECTIVES)), list(OBJECTIVES))
    right.invert_yaxis()
    right.axvline(0, color="black", lw=0.6)
    right.set(title="What does a step do, in trees?")
    right.set_xlabel(f"1e-3 nats per token (bar: on-policy, stroke: {updates} updates on)")
    figure.tight_layout()
    figure.savefig(RESULTS / "objectives.svg", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=4, help="updates on the same answers before the later step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    found = measure(options.seeds, options.updates)
    report(found, options.seeds, options.updates, time.monotonic() - began)


if __name__ == "__main__":
    main()
