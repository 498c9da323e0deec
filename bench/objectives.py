"""Does a prediction come true? Predicted against measured change of entropy, by objective, with exact tables of logits.

Every objective takes one plain gradient step on tables of logits, on-policy and after updates on the same answers, from
policies that are calibrated, anti-calibrated and uninformed about the reward. Gradients are the expected ones over all
answers and groups. The table is printed, and written to docs/results/objectives.md, .json.gz and .svg.

    python bench/objectives.py [--seeds 0 1 2] [--updates 4] [--only-table]
"""

import argparse
import os
import statistics
import time

from results import ONE_THREAD, load, made, pyplot, save, save_figure, table, versions

os.environ |= ONE_THREAD
import torch

from isentropic.engines import tabular
from isentropic.recipes import compose

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
WORLDS = {"trees": tabular.Tree(prompts=32, vocab=4, depth=3), "contexts": tabular.Tree(prompts=160, vocab=12)}
GROUP, SCALE = 8, 1.5
# A step of 1 moves a state that is visited as often as the average state by its whole expected gradient.
STEPS = (1.0, 0.3, 0.1, 0.03, 0.01)
SMALL = 0.01
# Step sizes of the updates before a later step, plain and natural.
BETWEEN = (0.3, 0.05)

PREAMBLE = """
One command, `python bench/objectives.py`, makes this page, [the figures by seed](objectives.json.gz) and
[the picture](objectives.svg). [What your objective does to it](../objectives.md) says what they mean.

Change of the mean entropy in 1e-3 nats per token for a unit step, read off a step of {small:g}. A unit step moves a
state that is visited as often as the average state by its whole expected gradient. `predicted` is the first-order form
for the step, exact or natural, from the weights of the loss itself; `measured` is at fixed prefixes. `error` is
|predicted − measured| over the sum of the absolute contributions of the tokens, the largest over seeds; other figures
are means over seeds. `shift` is the contribution of the changed state distribution to `measured`: no form predicts it,
and it is zero for contexts.

`{updates} updates later` is after {updates} steps, plain ones of {plain:g} or natural ones of {natural:g}, on the same
answers, with the clip as it then is; `clipped` is the share of tokens with an active clip. REINFORCE and RLOO are
strictly on-policy methods: their later columns show the effect of stale answers without a correction. Answers have one
length, so that Dr. GRPO and PPO's clip with a group mean coincide. Uninformed rewards are drawn at random: by seed the
on-policy figures scatter around 0, as the figures by seed show.

Natural-gradient steps of the entropy bonus are predicted from the sampled tokens alone, which is exact on-policy only.
""".strip()


def cell(name, world, regime, seed, updates):
    """The steps of one objective from one policy: plain and natural, on-policy (0) and after updates."""
    recipe, knob = OBJECTIVES[name]
    tree = WORLDS[world]
    unit = tree.prompts * tree.depth
    old = tabular.random_logits(tree, SCALE, seed)
    rewards = tabular.make_rewards(tree, old, regime, seed=seed + 100)
    expected = tabular.expected_batch(tree, old, rewards, recipe, GROUP)
    sampled = tabular.sampled_batch(tree, old, rewards, recipe, GROUP, seed)

    def policy(batch, k, natural=False):
        return tabular.advance(old, batch, recipe, BETWEEN[natural] * unit, k, knob, natural)

    def take(now, batch, size, natural=False):
        return tabular.step(tree, now, batch, recipe, size * unit, knob, natural)

    steps = {}
    for k in (0, updates):
        now = policy(expected, k)
        sweep = {size: take(now, expected, size) for size in STEPS}
        more = {"error sampled": take(policy(sampled, k), sampled, SMALL).error}
        more["errors"] = {str(size): round(out.error, 7) for size, out in sweep.items()}
        natural = take(policy(expected, k, True), expected, SMALL, True)
        steps[str(k)] = {"plain": figures(sweep[SMALL]) | more, "natural": figures(natural)}
    return steps


def figures(out):
    """The figures of a step, per unit step."""
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
            for regime in tabular.REGIMES
        }
        for world in WORLDS
    }


def average(cells, k, key, kind="plain"):
    return statistics.mean(c[str(k)][kind][key] for c in cells)


def at(cells, k, size):
    return max(c[str(k)]["plain"]["errors"][str(size)] for c in cells)


def worst(cells, k, key, kind="plain"):
    return max(c[str(k)][kind][key] for c in cells)


def step_table(by_name, updates, kind, with_shift):
    """One regime in one world as a Markdown table."""
    head = ["objective", "predicted", "measured", "error"] + ["shift"] * with_shift
    head += [f"predicted, {updates} updates later", "measured", "error"] + ["shift"] * with_shift + ["clipped"]
    rows = []
    for name, cells in by_name.items():
        row = [name]
        for k in (0, updates):
            row += [f"{1e3 * average(cells, k, key, kind):+.2f}" for key in ("predicted", "measured")]
            row.append(f"{worst(cells, k, 'error', kind):.2%}")
            row += [f"{1e3 * average(cells, k, 'shift', kind):+.2f}"] * with_shift
        rows.append([*row, f"{average(cells, updates, 'clipped', kind):.0%}"])
    return table(head, rows, right=len(head) - 1)


def error_table(cells, updates):
    """The largest errors over regimes, seeds, worlds, on-policy and later."""
    head = ["objective", *(f"step {s:g}" for s in STEPS), "sampled groups", "without moments", "natural step"]
    rows = []
    for name in OBJECTIVES:
        mine, both = cells_of(cells, name), (0, updates)
        row = [max(at(mine, k, s) for k in both) for s in STEPS]
        row += [max(worst(mine, k, key) for k in both) for key in ("error sampled", "error simple")]
        row.append(max(worst(mine, k, "error", "natural") for k in both))
        rows.append([name, *(f"{x:.2%}" for x in row)])
    return table(head, rows, right=len(head) - 1)


def cells_of(cells, name):
    return [c for by_regime in cells.values() for by_name in by_regime.values() for c in by_name[name]]


def page(facts):
    """The Markdown page of what the JSON file holds."""
    updates = facts["updates"]
    lines = ["# Does a prediction of the entropy change come true?", ""]
    lines += [PREAMBLE.format(small=SMALL, plain=BETWEEN[0], natural=BETWEEN[1], updates=updates), ""]
    lines += ["Settings: " + "; ".join(f"{name}: {text}" for name, text in facts["settings"].items()) + ".", ""]
    lines += ["![Does a prediction of the entropy change come true?](objectives.svg)"]
    for world, by_regime in facts["cells"].items():
        for kind, step in (("plain", "plain step"), ("natural", "natural-gradient step")):
            for regime, by_name in by_regime.items():
                lines += ["", f"## {regime.capitalize()}, {world}, {step}", ""]
                lines.append(step_table(by_name, updates, kind, WORLDS[world].depth > 1))
    lines += ["", "## Largest errors over regimes, worlds, seeds, on-policy and later", ""]
    lines += [error_table(facts["cells"], updates), "", f"{facts['made']}.", ""]
    return "\n".join(lines)


def line_of(seeds, seconds):
    shapes = "; ".join(f"{name}: {t.prompts} prompts, {t.vocab} tokens, depth {t.depth}" for name, t in WORLDS.items())
    how = f"logits of standard deviation {SCALE:g} in float64, groups of {GROUP}"
    return made(versions("isentropic", "torch", "python"), f"seeds {seeds}", how, shapes, f"{seconds:.0f} s")


def draw(facts):
    cells, updates, plt = facts["cells"], facts["updates"], pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4), width_ratios=[1, 1, 1.5])
    colours = dict(zip(tabular.REGIMES, ("#d55e00", "#0072b2", "#777777"), strict=True))
    for regime, colour in colours.items():
        for world, mark in zip(WORLDS, "os", strict=True):
            steps = [c[str(k)]["plain"] for rows in cells[world][regime].values() for c in rows for k in (0, updates)]
            points = [[1e3 * step[key] for step in steps] for key in ("predicted", "measured")]
            left.plot(*points, mark, color=colour, ms=3, alpha=0.6, label=regime if mark == "o" else None)
    low, high = left.get_xlim()
    left.plot([low, high], [low, high], color="#bbbbbb", lw=0.8, zorder=0)
    left.set(title="Does the prediction come true?", xlabel="predicted, 1e-3 nats per token", ylabel="measured")
    left.legend(frameon=False, fontsize=8)
    for name in OBJECTIVES:
        mine = cells_of(cells, name)
        errors = [max(at(mine, k, s) for k in (0, updates)) for s in STEPS]
        middle.loglog(STEPS, errors, lw=1, alpha=0.8, color="#0072b2")
    middle.axhline(0.01, color="#bbbbbb", lw=0.8, ls="--")
    middle.set(title="Does the error fall with the step?", xlabel="step size")
    middle.set_ylabel("largest error / Σ |contributions|")
    width = 0.27
    for i, (regime, colour) in enumerate(colours.items()):
        rows = cells["trees"][regime]
        places = [j + (i - 1) * width for j in range(len(rows))]
        right.barh(places, [1e3 * average(mine, 0, "measured") for mine in rows.values()], width, color=colour)
        ends = [1e3 * average(mine, updates, "measured") for mine in rows.values()]
        right.plot(ends, places, "|", color="black", ms=5)
    right.set_yticks(range(len(OBJECTIVES)), list(OBJECTIVES))
    right.invert_yaxis()
    right.axvline(0, color="black", lw=0.6)
    right.set(title="What does a step do, in trees?")
    right.set_xlabel(f"1e-3 nats per token (bar: on-policy, stroke: {updates} updates later)")
    save_figure(figure, "objectives.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=4, help="updates on the same answers before the later step")
    parser.add_argument("--only-table", action="store_true", help="the page and the picture from the figures there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.only_table:
        began = time.monotonic()
        cells = measure(options.seeds, options.updates)
        line = line_of(options.seeds, time.monotonic() - began)
        facts = {"made": line, "settings": SETTINGS, "updates": options.updates, "cells": cells}
        save("objectives.json.gz", facts)
    facts = load("objectives.json.gz")
    save("objectives.md", page(facts))
    draw(facts)
    print(page(facts))


if __name__ == "__main__":
    main()
