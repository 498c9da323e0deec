"""Which method keeps entropy, and what does it buy? Seven experiments on the embedded task, one on SmolLM2.

    python bench/methods.py collapse|quality|journey|sequence|offpolicy|targets|rates|smollm2
                            [--seeds 0 1] [--jobs 2] [--only-table]

`isentropic compare` runs the missing runs of the experiment's grid in bench/grids/; a finished run is a line of
docs/results/methods.jsonl.gz, or smollm2.jsonl.gz, and never runs again. Then the table and the figure are made from
those lines, of as many seeds as there are.
"""

import argparse
import json
import os
import statistics

from results import ONE_THREAD, ROOT, pyplot, rows, save, save_figure, table

os.environ |= ONE_THREAD
GRIDS = ROOT / "bench" / "grids"
EXPERIMENTS = {
    "collapse": ["collapse"],
    "quality": ["quality"],
    "journey": ["collapse", "quality"],
    "sequence": ["sequence", "scratch"],
    "offpolicy": ["offpolicy"],
    "targets": ["targets", "targets-other"],
    "rates": ["rates"],
    "smollm2": ["smollm2"],
}
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#b2a500",
    "#8f2dcb",
    "#7a4a2b",
    GREY,
    "#f781bf",
    "#1b9e9e",
    "#a6d854",
)


def by_cell(lines):
    cells = {}
    for line in lines:
        cells.setdefault(line["cell"], []).append(line)
    return cells


def mean(lines, figure):
    values = [line["figures"][figure] for line in lines if line["figures"].get(figure) is not None]
    return statistics.mean(values) if values else None


def collapse(grids, plt):
    """Dots: what is left of entropy, and the scores, by method."""
    cells = by_cell(grids[0].lines())
    order = sorted(cells, key=lambda name: mean(cells[name], "entropy/end"))
    figure, axes = plt.subplots(1, 4, figsize=(11, 0.24 * len(order) + 1.2), sharey=True)
    panels = (
        ("entropy/end", "What is left of entropy?", "nats a token at the end"),
        ("pass@1", "Does it learn?", "pass@1, held-out"),
        ("pass@16", "Can it still search?", "pass@16, held-out"),
        ("distinct", "How many ways?", "different right answers of 16"),
    )
    for axis, (key, title, label) in zip(axes, panels, strict=True):
        for row, name in enumerate(order):
            held = any(line["settings"].get("target") for line in cells[name])
            values = [line["figures"][key] for line in cells[name]]
            colour = BLUE if held else ORANGE
            axis.plot(values, [row] * len(values), "|", color=colour, ms=7, alpha=0.6)
            axis.plot(statistics.mean(values), row, "o", color=colour, ms=4)
        axis.set(title=title, xlabel=label)
        axis.grid(axis="y", lw=0.3)
        if key == "pass@16":
            axis.set_xlim(min(0.9, axis.get_xlim()[0]), 1.01)
    targets = [line["target"] for line in grids[0].lines() if line["settings"].get("target")]
    if targets:
        axes[0].axvline(statistics.mean(targets), color=BLUE, lw=0.8, ls="--")
    axes[0].set_yticks(range(len(order)), order)
    axes[0].plot([], [], "o", color=BLUE, ms=4, label="has a target (dashed)")
    axes[0].plot([], [], "o", color=ORANGE, ms=4, label="has none")
    axes[0].legend(frameon=False, fontsize=7, loc="lower right")
    return figure, ""


def quality(grids, plt):
    """Scores against the entropy that was kept: a path a method, over three targets."""
    cells = by_cell(grids[0].lines())
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    methods = list(dict.fromkeys(name.rsplit(" ", 1)[0] for name in cells))
    named = {
        "entropy/mean": "nats a token, mean over the run",
        "pass@1": "pass@1, held-out",
        "distinct": "different right answers of 16",
    }
    panels = (("entropy/mean", "pass@1"), ("entropy/mean", "distinct"), ("pass@1", "distinct"))
    for axis, (across, up) in zip(axes, panels, strict=True):
        for colour, method in zip(COLOURS * 2, methods, strict=False):
            mine = [lines for name, lines in cells.items() if name.rsplit(" ", 1)[0] == method]
            mine.sort(key=lambda lines: mean(lines, "entropy/mean"))
            points = [(mean(lines, across), mean(lines, up)) for lines in mine]
            marker, colour = ("*", "k") if method == "grpo" else ("o", colour)
            axis.plot(*zip(*points, strict=True), marker + "-", color=colour, ms=5, lw=1, label=method)
        axis.set(xlabel=named[across], ylabel=named[up])
    axes[0].set_title("What does entropy cost?")
    axes[1].set_title("What does it buy?")
    axes[2].set_title("The bargain")
    axes[2].legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, ""


def journey(grids, plt):
    """Does mean entropy over a run correlate with its final score? Spearman's ρ over runs and over methods."""
    import numpy as np

    lines = list({(x["fingerprint"], x["seed"]): x for grid in grids for x in grid.lines()}.values())
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    cells = []
    for axis, key in zip(axes, ("pass@1", "pass@16", "distinct"), strict=True):
        x, y = (
            np.array([line["figures"]["entropy/mean"] for line in lines]),
            np.array([line["figures"][key] for line in lines]),
        )
        held = np.array([line["target"] is not None for line in lines])
        for mask, colour, label in ((held, BLUE, "has a target"), (~held, ORANGE, "has none")):
            axis.plot(x[mask], y[mask], "o", color=colour, ms=3, alpha=0.6, label=label)
        axis.set(xlabel="nats a token, mean over the run", ylabel=f"{key}, held-out")
        groups = {}
        for line in lines:
            groups.setdefault(line["fingerprint"], []).append(line)
        means = np.array([[mean(group, "entropy/mean"), mean(group, key)] for group in groups.values()])
        cells.append([key, str(len(lines)), rank_interval(x, y), rank_interval(*means.T)])
    axes[0].set_title("Does entropy over the run predict the score?")
    axes[0].legend(frameon=False, fontsize=7)
    return figure, table(["score", "runs", "ρ over runs", "ρ over methods (means over seeds)"], cells)


def rank_interval(x, y, num=2000):
    """Spearman's ρ and its 95 % bootstrap interval over the points."""
    import numpy as np

    def ranks(v):
        order = np.argsort(np.argsort(v)).astype(float)
        return np.array([order[v == value].mean() for value in v])

    def rho(i):
        a, b = ranks(x[i]), ranks(y[i])
        return np.corrcoef(a, b)[0, 1] if a.std() and b.std() else 0.0

    everything, rng = np.arange(len(x)), np.random.default_rng(0)
    low, high = np.quantile([rho(rng.integers(len(x), size=len(x))) for _ in range(num)], [0.025, 0.975])
    return f"{rho(everything):+.2f} ({low:+.2f}..{high:+.2f})"


def scores_on(line, task):
    """Evaluations of a run on a task, by step."""
    return [row for row in line["evaluations"] if row["task"] == task]


def sequence(grids, plt):
    """B after A against B alone, and how much of A is kept."""
    after, alone = by_cell(grids[0].lines()), by_cell(grids[1].lines())
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4))
    head = ["recipe", "seeds", "pass@1 of A: before, after A, after B"]
    head += ["pass@1 of B: after A, alone, P(after A better)", "pass@16 of B: the same", "distinct of B: the same"]
    cells = []
    for colour, name in zip(COLOURS, [n for n in after if n in alone], strict=False):
        first = [scores_on(line, "expr") for line in after[name]]
        kept = ", ".join(f"{statistics.mean(run[i]['pass@1'] for run in first):.3f}" for i in (0, 1, -1))
        pairs = []
        for key in ("pass@1", "pass@16", "distinct"):
            a, b = ([scores_on(line, "expr-digit")[-1][key] for line in lines] for lines in (after[name], alone[name]))
            pairs.append(f"{span(a)}, {span(b)}, {better(a, b)}")
        cells.append([name, f"{len(after[name])}, {len(alone[name])}", kept, *pairs])
        for axis, lines, skip in ((left, after[name], 400), (left, alone[name], 0)):
            curve = lines[0]["curve"]
            steps = [s - skip for s in curve["step"] if s > skip]
            values = [
                statistics.mean(line["curve"]["reward"][i] for line in lines)
                for i, s in enumerate(curve["step"])
                if s > skip
            ]
            axis.plot(steps, values, color=colour, lw=1.2, ls="-" if skip else ":", label=name if skip else None)
        end = [scores_on(line, "expr-digit")[-1] for line in after[name]]
        base = [scores_on(line, "expr-digit")[-1] for line in alone[name]]
        for axis, key in ((middle, "pass@1"), (right, "pass@16")):
            axis.plot(
                statistics.mean(r[key] for r in base), statistics.mean(r[key] for r in end), "o", color=colour, ms=6
            )
    left.set(title="How is B learned?", xlabel="optimizer steps on B (dotted: from the warm start)", ylabel="reward")
    for axis, key in ((middle, "pass@1"), (right, "pass@16")):
        ends = [*axis.get_xlim(), *axis.get_ylim()]
        axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color=GREY, lw=0.6)
        axis.set(xlabel=f"{key} of B, from the warm start", ylabel=f"{key} of B, after A")
    middle.set_title("Where does B end?")
    left.legend(frameon=False, fontsize=6.5)
    return figure, table(head, cells)


def better(ours, theirs):
    """The probability that a run of ours beats one of theirs, with its interval if there are seeds enough."""
    from isentropic.runs.statistics import probability_of_improvement, stratified_interval

    value = f"**{probability_of_improvement([ours], [theirs]):.2f}**"
    interval = stratified_interval(probability_of_improvement, [ours], [theirs])
    return value if interval is None else f"{value} ({interval.low:.2f}..{interval.high:.2f})"


def span(values):
    return f"{statistics.mean(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def offpolicy(grids, plt):
    """Entropy and score against the number of optimizer steps a generated batch."""
    cells = by_cell(grids[0].lines())
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    objectives = list(dict.fromkeys(name.split(",")[0] for name in cells))
    for axis, key in zip(axes, ("entropy/end", "pass@1", "distinct"), strict=True):
        for colour, name in zip(COLOURS, objectives, strict=False):
            points = [(u, mean(cells[f"{name}, {u}"], key)) for u in (1, 4, 16) if f"{name}, {u}" in cells]
            axis.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, lw=1, label=name)
        axis.set(xscale="log", xlabel="optimizer steps a generated batch", ylabel=key)
        axis.set_xticks([1, 4, 16], ["1", "4", "16"], minor=False)
    axes[0].set(title="Is collapse brought in by old samples?", ylabel="final nats a token")
    axes[0].legend(frameon=False, fontsize=6.5)
    return figure, ""


def targets(grids, plt):
    """Entropy and reward along the run, by target, and the final scores."""
    cells = by_cell(grids[0].lines())
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
    for colour, (name, lines) in zip(COLOURS, cells.items(), strict=False):
        for axis, key in ((left, "entropy"), (middle, "reward")):
            steps = lines[0]["curve"]["step"]
            axis.plot(
                steps,
                [statistics.mean(line["curve"][key][i] for line in lines) for i in range(len(steps))],
                color=colour,
                lw=1.2,
            )
        right.plot(mean(lines, "pass@1"), mean(lines, "distinct"), "o", color=colour, ms=6, label=name)
    left.set(title="Where does entropy go?", xlabel="optimizer steps", ylabel="nats a token", ylim=(0, None))
    middle.set(title="What does it cost?", xlabel="optimizer steps", ylabel="reward")
    right.set(title="What does it buy?", xlabel="pass@1, held-out", ylabel="different right answers of 16")
    right.legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure, ""


def rates(grids, plt):
    """Reward, entropy and different answers against the learning rate, and each recipe's best rate."""
    cells = by_cell(grids[0].lines())
    recipes = list(dict.fromkeys(name.split(", ")[0] for name in cells))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    head = ["recipe", "best rate", "reward at 2.5e-4, 5e-4, 1e-3"]
    head += [f"{score} at its best" for score in ("final entropy", "pass@1", "distinct")]
    best_rates = []
    for colour, recipe in zip(COLOURS, recipes, strict=False):
        mine = {name.split(", ")[1]: lines for name, lines in cells.items() if name.split(", ")[0] == recipe}
        for axis, key in zip(axes, ("reward/end", "entropy/end", "distinct"), strict=True):
            points = [(float(rate), mean(lines, key)) for rate, lines in mine.items()]
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=colour, ms=4, lw=1, label=recipe)
        best = max(mine, key=lambda rate: mean(mine[rate], "reward/end"))
        rewards = ", ".join(f"{mean(lines, 'reward/end'):.3f}" for lines in mine.values())
        ends = (f"{mean(mine[best], key):.3f}" for key in ("entropy/end", "pass@1", "distinct"))
        best_rates.append([recipe, best, rewards, *ends])
    labels = ("reward, training prompts", "nats a token at the end", "different right answers of 16")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xscale="log", xlabel="learning rate", ylabel=label)
        axis.set_xticks([2.5e-4, 5e-4, 1e-3], ["2.5e-4", "5e-4", "1e-3"])
        axis.set_xticks([], minor=True)
    axes[0].set_title("Which rate is best?")
    axes[0].legend(frameon=False, fontsize=6.5)
    return figure, table(head, best_rates)


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
    left.set(title="Does entropy fall?", xlabel="optimizer steps", ylabel="nats a token", ylim=(0, None))
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


def report(name, grids):
    from isentropic.experiments.compare import compare, render

    parts = []
    for grid in grids if name != "journey" else []:
        lines = grid.lines()
        base = grid.baseline if any(line["cell"] == grid.baseline for line in lines) else None
        parts.append(render(compare(lines, base), markdown=True))
    figure, extra = globals()[name](grids, pyplot(8))
    save_figure(figure, f"{name}.svg")
    lines = [line for grid in grids for line in grid.lines()]
    sets = sorted({json.dumps(line["versions"], sort_keys=True) for line in lines})
    packages = "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in sets)
    count = f"{sum(len(grid.lines()) for grid in grids)} of {sum(len(grid.cells) for grid in grids)} runs of the grid"
    dates, machines = ({line[key] for line in lines} for key in ("date", "machine"))
    days = " to ".join(dict.fromkeys((min(dates), max(dates))))
    line = f"{count}. {days}; {', '.join(sorted(machines))}, one thread a run; {packages}."
    text = "\n\n".join([*([extra] if extra else []), *parts, line])
    save(f"{name}-table.md", text + "\n")
    print(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    from isentropic.experiments.grid import load_grid, run

    os.chdir(ROOT)
    flags = {"seeds": options.seeds, "jobs": options.jobs}
    grids = [load_grid(str(GRIDS / f"{name}.toml"), dict(flags)) for name in EXPERIMENTS[options.experiment]]
    if not options.only_table:
        for grid in grids:
            run(grid, say=lambda text: print(text, flush=True))
            # Lines that were added one by one compress better together.
            save(grid.results.resolve(), rows(grid.results.resolve()))
    report(options.experiment, grids)


if __name__ == "__main__":
    main()
