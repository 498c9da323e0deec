"""What does a real small model do? SmolLM2-135M: forty steps of sums; two tasks with many right answers in turn.

    isentropic model smollm2
    python bench/smollm2_start.py
    python bench/smollm2.py smollm2|pretrained [--seeds 0 1] [--jobs 2] [--only-table]

As ``bench/methods.py``: the missing runs of the grids are run, and the table and the figure are made from the lines in
docs/results/. The start is needed for `pretrained` alone.
"""

import statistics

from methods import BASELINE, BLUE, COLOURS, DEFAULT, GREY, ORANGE, curve, evaluated, main
from results import table


def by_cell(lines):
    cells = {}
    for line in lines:
        cells.setdefault(line["cell"], []).append(line)
    return cells


def span(values):
    return f"{statistics.mean(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def smollm2(grids, plt):
    """Entropy and reward along the run, means over five steps and the seeds; scores before and after."""
    cells = by_cell(grids[0].lines())
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
    before = [line["start"] for lines in cells.values() for line in lines]
    keys = [key for key in ("pass@1", "pass@8") if key in before[0]]
    for place, key in enumerate(keys):
        value = statistics.mean(start[key] for start in before)
        right.plot([place - 0.3, place + 0.3], [value, value], color=GREY, lw=1, label=None if place else "before")
    for at, (colour, (name, lines)) in enumerate(zip(COLOURS, cells.items(), strict=False)):
        for axis, key in ((left, "entropy"), (middle, "reward")):
            runs = [line["curve"][key] for line in lines]
            values = [statistics.mean(step) for step in zip(*runs, strict=True)]
            windows = [values[i : i + 5] for i in range(0, len(values), 5)]
            steps = lines[0]["curve"]["step"][2::5]
            axis.plot(steps, [statistics.mean(w) for w in windows], "o-", color=colour, ms=3, lw=1.2, label=name)
        for place, key in enumerate(keys):
            values = [line["figures"][key] for line in lines]
            right.plot([place + 0.1 * (at - 2)] * len(values), values, "o", color=colour, ms=5)
    left.set(title="Does entropy fall?", xlabel="optimizer steps", ylabel="nats per token", ylim=(0, None))
    middle.set(title="Does it learn?", xlabel="optimizer steps", ylabel="reward, training prompts", ylim=(0, None))
    right.set(title="Held-out, before and after", ylabel="pass@k", ylim=(0, 1))
    right.set_xticks(range(len(keys)), keys)
    left.legend(frameon=False, fontsize=6.5)
    right.legend(frameon=False, fontsize=6.5)
    scores = (*keys, "distinct")
    seeds = {line["seed"] for lines in cells.values() for line in lines}
    scored = [["before", str(len(seeds)), *(span([start[key] for start in before]) for key in scores)]]
    for name, lines in cells.items():
        scored.append([name, str(len(lines)), *(span([line["figures"][key] for line in lines]) for key in scores)])
    return figure, table(["recipe", "seeds", *scores], scored)


def pretrained(grids, plt):
    """Two tasks in turn: entropy and reward along the run, and the frontier on each task; means over the seeds."""
    lines = grids[0].lines()
    first, second = dict.fromkeys(row["task"] for row in lines[0]["evaluations"])
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2))
    others = [cell for cell in dict.fromkeys(line["cell"] for line in lines) if cell not in (BASELINE, DEFAULT)]
    colours = {BASELINE: ORANGE, DEFAULT: BLUE} | dict(zip(others, COLOURS[2:], strict=False))
    for cell, colour in colours.items():
        mine = [line for line in lines if line["cell"] == cell]
        for axis, key in ((axes[0], "entropy"), (axes[1], "reward")):
            units = [line["entropy_start"] if key == "entropy" else 1.0 for line in mine]
            runs = [[value / unit for value in line["curve"][key]] for line, unit in zip(mine, units, strict=True)]
            axis.plot(
                mine[0]["curve"]["step"], [statistics.mean(at) for at in zip(*runs, strict=True)], color=colour, lw=1
            )
        curve(axes[2], lines, cell, colour, first, 1)
        curve(axes[3], lines, cell, colour, second, -1, label=cell)
    axes[0].set(
        title="Does entropy fall?", xlabel="optimizer steps", ylabel="entropy / initial entropy", ylim=(0, None)
    )
    axes[1].set(title="Does it learn?", xlabel="optimizer steps", ylabel="reward, training prompts", ylim=(0, None))
    for axis, title in ((axes[2], f"{first}, at the switch"), (axes[3], f"{second}, at the end")):
        axis.set(title=title, xlabel="pass@1", ylabel="distinct right answers of 8", ylim=(0, None))
    axes[3].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    parts = [by_seed(lines, first, 0, "before"), by_seed(lines, second, 0, "before")]
    parts += [by_seed(lines, first, 1, "at the switch"), by_seed(lines, second, -1, "at the end")]
    parts += [by_seed(lines, first, -1, "at the end"), entropies(lines)]
    parts += [over_prompts(lines, BASELINE, (second, first)), over_prompts(lines, DEFAULT, (second,))]
    return figure, "\n\n".join(parts)


def by_seed(lines, task, place, when):
    """The figures of every cell at an evaluation of a task, by seed; before training those of the start alone."""
    cells = by_cell(lines if when != "before" else lines[:1])
    keys = {"greedy": "greedy", "best_pass@1": "best pass@1", "pass@8": "pass@8", "distinct": "distinct of 8"}
    body = []
    for name, of_cell in cells.items():
        found = [evaluated(line, task)[place] for line in sorted(of_cell, key=lambda line: line["seed"])]
        figures = [", ".join(f"{row[key]:.3f}" for row in found) for key in keys]
        body.append(["the start" if when == "before" else name, *figures])
    return table([f"`{task}`, {when}, by seed", *keys.values()], body)


def entropies(lines):
    """Entropy by seed, of its first step: the last five points of the curve before the switch, and of the run."""
    body = []
    for name, of_cell in by_cell(lines).items():
        shares = []
        for line in sorted(of_cell, key=lambda line: line["seed"]):
            values, steps = line["curve"]["entropy"], line["curve"]["step"]
            switch = sum(step <= line["evaluations"][2]["step"] for step in steps)
            shares.append(
                [statistics.mean(values[at - 5 : at]) / line["entropy_start"] for at in (switch, len(values))]
            )
        body.append([name, *(", ".join(f"{share:.0%}" for share in at) for at in zip(*shares, strict=True))])
    return table(["entropy, of its start, by seed", "at the switch", "at the end"], body)


def over_prompts(lines, baseline, tasks):
    """Differences to a cell at the end, means over the seeds that both have, with intervals over the prompts."""
    body = []
    for task in tasks:
        base = {line["seed"]: line for line in lines if line["cell"] == baseline}
        for name, of_cell in by_cell(lines).items():
            mine = {line["seed"]: line for line in of_cell}
            seeds = sorted(base.keys() & mine.keys())
            if name != baseline and seeds:
                body.append([f"`{task}`: {name}", " ".join(map(str, seeds))])
                body[-1] += [
                    difference([shares(mine[s], task, key) for s in seeds], [shares(base[s], task, key) for s in seeds])
                    for key in ("greedy", "0.3", "1", "found")
                ]
    heads = ["greedy", "pass@1 at 0.3", "pass@1 at 1", "pass@8 at 1"]
    return table([f"less {baseline}, at the end", "seeds", *heads], body)


def shares(line, task, key):
    """By prompt: right greedy answers, right samples at a temperature, or whether a sample at 1 is right."""
    from isentropic.experiments.lines import unpacked

    row = evaluated(line, task)[-1]
    if key == "greedy":
        return unpacked(row["counts"]["greedy"])
    right = unpacked(row["counts"]["1" if key == "found" else key][0])
    return [float(n > 0) for n in right] if key == "found" else [n / row["k"] for n in right]


def difference(ours, theirs):
    """Means over seeds, prompt by prompt, and the paired interval of their difference."""
    from isentropic.runs.statistics import paired_interval

    ours, theirs = ([statistics.mean(prompt) for prompt in zip(*runs, strict=True)] for runs in (ours, theirs))
    low, high = paired_interval(ours, theirs)
    text = f"{statistics.mean(ours) - statistics.mean(theirs):+.3f} ({low:+.3f}..{high:+.3f})"
    return f"**{text}**" if low > 0 or high < 0 else text


EXPERIMENTS = {"smollm2": (smollm2, ["smollm2"]), "pretrained": (pretrained, ["smollm2-long"])}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], EXPERIMENTS)
