"""When does control pay, which method, what target, and what of the next task? On the embedded task.

    python bench/methods.py pays|which|target|auto|sequence [--seeds 0 1] [--jobs 2] [--only-table]

`isentropic compare` runs the missing runs of the experiment's grids in bench/grids/; a finished run is a line of
docs/results/pays.jsonl.gz, and never runs again. Then the table and the figure are made from those lines, of as many
seeds as there are. What is compared, and how, was written down before: docs/results/protocol.md.
"""

import argparse
import json
import os
import statistics
from collections import Counter
from itertools import groupby
from math import exp, log
from typing import NamedTuple

from results import ONE_THREAD, ROOT, pyplot, rows, save, save_figure, table

os.environ |= ONE_THREAD
GRIDS = ROOT / "bench" / "grids"
BASELINE, DEFAULT = "grpo", "auto"
CONSTANT = "60%"  # the best constant target
MARGIN = 0.02  # how far below GRPO's best pass@1 the answers are counted
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
    "#17becf",
    "#a6d854",
    "#a50026",
)


class Scores(NamedTuple):
    """What a run's policy does on a task; see the protocol. ``best`` is pass@1 at its own best temperature."""

    greedy: float
    best: float
    distinct: float
    search: float
    at_1: float  # pass@1 and distinct right answers at temperature 1
    distinct_1: float


NAMES = {
    "greedy": "greedy accuracy",
    "best": "best pass@1",
    "distinct": "distinct answers at equal accuracy",
    "search": "pass@16",
}


def evaluated(line, task=None, step=None):
    """The evaluations of a run on a task, by default its last one, in order of steps."""
    task = task or line["evaluations"][-1]["task"]
    return [row for row in line["evaluations"] if row["task"] == task and step in (None, row["step"])]


def scores(row, floor):
    """The scores of an evaluation; ``floor`` is the accuracy at which answers are counted."""
    from isentropic.runs.frontier import frontier, points

    reached = frontier(row, floor)
    return Scores(
        row["greedy"],
        row["best_pass@1"],
        0.0 if reached is None else reached.distinct,
        max(p.search for p in points(row)),
        row["pass@1"],
        row["distinct"],
    )


def pairs(lines, ours, theirs=BASELINE, task=None, place=-1):
    """Scores of two cells at the seeds that both have: {seed: (ours, theirs)}. ``place`` picks the evaluation."""
    found = {}
    mine, other = ({x["seed"]: x for x in lines if x["cell"] == name} for name in (ours, theirs))
    for seed in sorted(mine.keys() & other.keys()):
        a, b = evaluated(mine[seed], task)[place], evaluated(other[seed], task)[place]
        floor = max(0.0, b["best_pass@1"] - MARGIN)
        found[seed] = scores(a, floor), scores(b, floor)
    return found


class Claim(NamedTuple):
    """A difference of two cells: means, mean difference over seeds, and its interval."""

    ours: float
    theirs: float
    difference: float
    interval: tuple | None
    num: int


def claim(found, figure):
    """The claim about one figure of :func:`pairs`."""
    from isentropic.runs.statistics import mean_interval

    ours, theirs = ([getattr(pair[i], figure) for pair in found.values()] for i in (0, 1))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    bound = 16.0 if "distinct" in figure else 1.0
    interval = mean_interval(differences, bounds=(-bound, bound)) if len(found) > 2 else None
    return Claim(mean(ours), mean(theirs), mean(differences), interval, len(found))


def mean(values):
    return statistics.mean(values) if values else float("nan")


def ratio(found):
    """Distinct answers at equal accuracy, as a ratio of the means."""
    ours, theirs = (mean([pair[i].distinct for pair in found.values()]) for i in (0, 1))
    return ours / theirs if theirs else float("inf")


def written(one, figure):
    """A claim in a cell of a table: means, difference with interval."""
    digits = 2 if "distinct" in figure else 3
    text = f"{one.ours:.{digits}f} / {one.theirs:.{digits}f}"
    if one.interval is None:
        return text if one.num < 3 else f"{text}<br>{one.difference:+.{digits}f} at every seed"
    low, high = one.interval
    difference = f"{one.difference:+.{digits}f} ({low:+.{digits}f}..{high:+.{digits}f})"
    return f"{text}<br>**{difference}**" if low > 0 or high < 0 else f"{text}<br>{difference}"


def comparison(sections, ours, theirs=BASELINE):
    """A table of claims, a row a setting: [(title, lines, task, place)]."""
    body = []
    for title, lines, task, place in sections:
        found = pairs(lines, ours, theirs, task, place)
        if found:
            cells = [written(claim(found, figure), figure) for figure in NAMES]
            body.append([title, str(len(found)), *cells])
    head = ["task", "seeds", *(f"{NAMES[f]}: {ours} / {theirs}" for f in NAMES)]
    return table(head, body) if body else ""


def settings_of(grids):
    """The settings of `pays`: (title, lines, task, place of the evaluation)."""
    base, hard, sequence, long = (grid.lines() for grid in grids)
    singles = [
        (task, list(lines), None, -1)
        for task, lines in groupby(sorted([*base, *hard], key=lambda x: x["task"]), key=lambda x: x["task"])
    ]
    return [
        *singles,
        ("`reversal`: second task", sequence, None, -1),
        ("`reversal`: first task, at the switch", sequence, "expr", 1),
        ("`expr:need=last,product`, 2,400 steps", long, None, -1),
    ]


def curve(axis, lines, cell, colour, task=None, place=-1, label=None, style="-"):
    """A policy's path over temperatures, means over seeds: pass@1 across, distinct right answers up."""
    from isentropic.runs.frontier import points

    runs = [points(evaluated(x, task)[place]) for x in lines if x["cell"] == cell]
    if not runs:
        return
    path = [(mean([p.accuracy for p in at]), mean([p.distinct for p in at])) for at in zip(*runs, strict=True)]
    axis.plot(*zip(*path, strict=True), f"o{style}", color=colour, ms=3.5, lw=1.4, label=label)
    axis.plot(*path[-1], "*", color=colour, ms=8)


def pays(grids, plt):
    """The frontier of the default and of GRPO, a panel a setting, and the table of claims."""
    sections = settings_of(grids)
    drawn = [s for s in sections if any(x["cell"] == DEFAULT for x in s[1]) and "first task" not in s[0]]
    columns = -(-len(drawn) // 2) or 1
    figure, axes = plt.subplots(2, columns, figsize=(2.7 * columns, 5.4), squeeze=False)
    for axis, (title, lines, task, place) in zip(axes.flat, drawn, strict=False):
        curve(axis, lines, BASELINE, ORANGE, task, place, "plain GRPO")
        curve(axis, lines, DEFAULT, BLUE, task, place, "held by the default")
        axis.set(title=title.replace("`", "").replace(", ", ",\n"), xlabel="pass@1", ylim=(0, None))
    for axis in list(axes.flat)[len(drawn) :]:
        axis.set_axis_off()
    for row in axes:
        row[0].set_ylabel("distinct right answers of 16")
    axes[0][0].legend(frameon=False, fontsize=7)
    parts = [comparison(sections, DEFAULT), comparison(sections, CONSTANT), comparison(sections, DEFAULT, CONSTANT)]
    best = [(f"{title}, at the best step", *rest) for title, *rest in sections if "2,400" in title]
    parts.append(stopped_early(best[0][1]) if best else "")
    parts.append("At temperature 1, which is how the runs were compared before:\n\n" + at_one(sections))
    return figure, "\n\n".join(filter(None, parts))


def stopped_early(lines):
    """The long runs at the step that was best on one half of the prompts, scored on the other."""
    body = []
    for name in (BASELINE, DEFAULT, CONSTANT):
        mine = [x for x in lines if x["cell"] == name and x.get("best")]
        if mine:
            values = [mean([x["best"][key] for x in mine]) for key in ("step", "greedy", "accuracy", "distinct")]
            end = mean([evaluated(x)[-1]["greedy"] for x in mine])
            body.append([name, str(len(mine)), f"{values[0]:.0f}", *(f"{v:.3f}" for v in values[1:]), f"{end:.3f}"])
    head = ["2,400 steps", "seeds", "best step", "greedy there", "pass@1 there", "distinct there", "greedy at the end"]
    return table(head, body) if body else ""


def at_one(sections):
    body = []
    for title, lines, task, place in sections:
        found = pairs(lines, DEFAULT, BASELINE, task, place)
        if found:
            body.append([title, *(written(claim(found, f), f) for f in ("at_1", "distinct_1"))])
    return table(["task", f"pass@1: {DEFAULT} / {BASELINE}", "distinct right answers"], body)


def which(grids, plt):
    """Every method on hard tasks and on the second task of a sequence, as differences to GRPO at the same seeds."""
    finalists, hard, after, rates = (grid.lines() for grid in grids)
    sections = [(t, [x for x in finalists if x["task"] == t]) for t in dict.fromkeys(x["task"] for x in finalists)]
    drawn = [("expr:need=last,product", hard), ("reversal: second task", after)]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4))
    colours = {}
    for axis, (title, lines) in zip(axes, drawn, strict=True):
        seeds = Counter(x["cell"] for x in lines)
        for cell, num in seeds.items():
            # The cells of one seed, and those that vary the default or GRPO, would hide the others.
            if (num > 1 or max(seeds.values()) == 1) and not any(part in cell for part in ("two steps", "trust")):
                same = cell.removesuffix(", on-policy")
                colour = colours.setdefault(same, COLOURS[len(colours) % len(COLOURS)])
                curve(axis, lines, cell, colour, label=cell, style="--" if "on-policy" in cell else "-")
        axis.set(title=title, xlabel="pass@1", ylim=(0, None))
    axes[0].set_ylabel("distinct right answers of 16")
    named = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[1].legend(
        named.values(), named, frameon=False, fontsize=7, handlelength=3.5, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    parts = []
    for title, lines in (*sections, *drawn):
        cells = [cell for cell in dict.fromkeys(x["cell"] for x in lines) if cell != BASELINE]
        found = {cell: pairs(lines, cell) for cell in cells}
        body = [
            [cell, str(len(f)), *(written(claim(f, name), name) for name in NAMES)] for cell, f in found.items() if f
        ]
        parts.append(table([title, "seeds", *(f"{NAMES[f]}: it / {BASELINE}" for f in NAMES)], body) if body else "")
    on_policy = ("rloo, 1e-3", "grpo, on-policy", "auto, on-policy")
    beside = [("opefo", other) for other in on_policy] + [("auto, on-policy", "grpo, on-policy")]
    parts += [comparison([(drawn[0][0], hard, None, -1)], *pair) for pair in beside]
    if rates:
        body = [[x["cell"], f"{x['figures']['reward/end']:.3f}", f"{x['figures']['greedy']:.3f}"] for x in rates]
        parts.append(table(["learning rate", "reward, end", "greedy"], body))
    return figure, "\n\n".join(filter(None, parts))


def target(grids, plt):
    """The candidates for the default: what they have beside GRPO on the tasks of the choice."""
    singles, sequence = (grid.lines() for grid in grids)
    tasks = list(dict.fromkeys(x["task"] for x in singles))
    sections = [(t, [x for x in singles if x["task"] == t]) for t in tasks] + [("second task", sequence)]
    figure, axes = plt.subplots(1, len(sections), figsize=(2.6 * len(sections), 3.2))
    names = list(dict.fromkeys(x["cell"] for x in singles))
    for axis, (title, lines) in zip(axes, sections, strict=True):
        for colour, cell in zip(COLOURS, names, strict=False):
            curve(axis, lines, cell, colour, label=cell)
        axis.set(title=title, xlabel="pass@1", ylim=(0, None))
    axes[0].set_ylabel("distinct right answers of 16")
    axes[-1].legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    body = sorted((candidate(name, sections) for name in names if name != BASELINE), key=lambda c: (c[0], -c[1]))
    head = ["candidate", "seeds", "least Δ greedy", "least Δ best pass@1", "distinct over GRPO's, geometric mean"]
    head += [f"{title}: Δ greedy, Δ best pass@1, × distinct" for title, _ in sections] + ["out?"]
    return figure, table(head, [row for *_, row in body])


def candidate(name, sections):
    """A candidate's row, with what orders it: whether it is out, and its geometric mean."""
    found = [(title, pairs(lines, name)) for title, lines in sections]
    missing = [title for title, pair in found if not pair]
    greedy, best = ({t: claim(p, figure).difference for t, p in found if p} for figure in ("greedy", "best"))
    ratios = {t: ratio(p) for t, p in found if p}
    factors = [log(max(r, 1e-3)) for r in ratios.values()]
    geometric = exp(mean(factors)) if factors else 0.0
    reasons = [f"not run: {', '.join(missing)}"] if missing else []
    reasons += ["accuracy"] if min([*greedy.values(), *best.values()], default=0) < -MARGIN else []
    last = found[-1][1]
    reasons += ["pass@16 of the second task"] if last and claim(last, "search").difference <= 0 else []
    seeds = min((len(p) for _, p in found if p), default=0)
    cells = [f"{greedy[t]:+.3f}, {best[t]:+.3f}, {ratios[t]:.2f}" if t in ratios else "–" for t, _ in sections]
    least = [f"{min(values.values(), default=0):+.3f}" for values in (greedy, best)]
    row = [name, str(seeds), *least, f"{geometric:.2f}", *cells, "; ".join(reasons) or "no"]
    return bool(reasons), geometric, row


def auto(grids, plt):
    """Targets that set themselves: where each task's entropy went, its best constant target, and what that gave."""
    sections = [
        (task, [x for x in lines if x["task"] == task], None)
        for lines in (grids[0].lines(), grids[2].lines())
        for task in dict.fromkeys(x["task"] for x in lines)
    ]
    sections.append(("second task of the tuning", grids[1].lines(), None))
    sections.append(("reversal: second task", grids[3].lines(), None))
    last = grids[4].lines()
    names = dict.fromkeys(row["task"] for x in last for row in x["evaluations"])
    sections += [(f"reversal-3: {task}", last, task) for task in names]
    sections = [section for section in sections if len({x["cell"] for x in section[1]}) > 1]
    parts = []
    for title, lines, task in sections:
        best = best_constant(lines, task)
        cells = list(dict.fromkeys(x["cell"] for x in lines if x["cell"] != BASELINE))
        body = [
            [f"**{cell}**" if cell == best else cell, str(len(found)), *(written(claim(found, f), f) for f in NAMES)]
            for cell in cells
            if (found := pairs(lines, cell, task=task))
        ]
        parts.append(table([title, "seeds", *(f"{NAMES[f]}: it / {BASELINE}" for f in NAMES)], body))
        if best is not None:
            parts.append(beside_best(title, lines, best, cells, task))
    # The tasks of reversal-3 are parts of the same runs.
    drawn = [section for section in sections if section[2] in (None, next(iter(names), None))]
    return courses(drawn, plt), "\n\n".join(filter(None, parts))


def courses(sections, plt):
    """The course of entropy under each automatic target, a panel a task."""
    columns = min(len(sections) + 1, 4)
    num_rows = -(-(len(sections) + 1) // columns)
    figure, axes = plt.subplots(num_rows, columns, figsize=(3 * columns, 2.8 * num_rows), squeeze=False)
    colours = {DEFAULT: BLUE}
    for axis, (title, lines, task) in zip(axes.flat, sections, strict=False):
        for cell in sorted({x["cell"] for x in lines if x["cell"].startswith("auto")}, key=lambda c: c == DEFAULT):
            trace(axis, lines, cell, colours.setdefault(cell, COLOURS[len(colours)]))
        if (best := best_constant(lines, task)) is not None:
            axis.axhline(share_of(best), color=GREY, ls="--", lw=1, label="the task's best constant target")
        title = title.partition(": ")[0] if task else title
        axis.set(title=title, xlabel="optimizer steps", ylim=(0, 1.1))
    for axis in list(axes.flat)[len(sections) :]:
        axis.set_axis_off()
    handles = {
        name: handle for axis in axes.flat for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    axes.flat[-1].legend(handles.values(), handles, frameon=False, fontsize=7, loc="center")
    for row in axes:
        row[0].set_ylabel("entropy / initial entropy")
    return figure


def share_of(cell):
    """The constant target of a cell, as a share."""
    return float(cell.removesuffix("%")) / 100


def best_constant(lines, task):
    """The constant target with the most distinct answers, of those as accurate as GRPO; see the protocol."""
    scored, num = [], 0
    for cell in dict.fromkeys(x["cell"] for x in lines):
        found = pairs(lines, cell, task=task) if cell[:-1].isdigit() else {}
        num += bool(found)
        if found and min(claim(found, f).difference for f in ("greedy", "best")) >= -MARGIN:
            scored.append((claim(found, "distinct").ours, cell))
    return max(scored)[1] if scored and num > 1 else None


def beside_best(title, lines, best, cells, task):
    """Each automatic target beside the best constant one, at the seeds that both have."""
    body = []
    for cell in cells:
        found = pairs(lines, cell, best, task) if cell.startswith("auto") or "settled" in cell else {}
        if found:
            body.append([cell, str(len(found)), *(written(claim(found, f), f) for f in (*NAMES, "at_1"))])
    heads = [f"{name}: it / {best}" for name in (*NAMES.values(), "pass@1 at temperature 1")]
    return table([f"{title}, beside the best constant target", "seeds", *heads], body) if body else ""


def trace(axis, lines, cell, colour):
    """The entropy of each run of a cell along its steps, as a share of its start."""
    for i, line in enumerate(x for x in lines if x["cell"] == cell):
        values = [entropy / line["entropy_start"] for entropy in line["curve"]["entropy"]]
        axis.plot(line["curve"]["step"], values, color=colour, lw=1, label=None if i else cell)


def sequence(grids, plt):
    """The second task after the first, beside the second task alone."""
    after, alone, others = (grid.lines() for grid in grids)
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2))
    first = 800
    for cell, colour in ((BASELINE, ORANGE), (DEFAULT, BLUE)):
        for line in (x for x in after if x["cell"] == cell):
            steps = line["curve"]["step"]
            kept = [i for i, step in enumerate(steps) if step > first]
            axes[0].plot(
                [steps[i] - first for i in kept], [line["curve"]["reward"][i] for i in kept], color=colour, lw=0.9
            )
        curve(axes[1], after, cell, colour, label=f"{cell}, after the first task")
        curve(axes[2], alone, cell, colour, label=f"{cell}, alone")
    axes[0].set(title="How is the second task learned?", xlabel="optimizer steps on it", ylabel="reward")
    for axis in axes[1:]:
        axis.set(xlabel="pass@1", ylabel="distinct right answers of 16", ylim=(0, None))
    axes[1].set_title("After the first task")
    axes[2].set_title("Alone, from the warm start")
    both = [{**x, "cell": f"{x['cell']} alone"} for x in alone] + after
    sections = [("second task", both, None, -1)]
    parts = [comparison(sections, DEFAULT), comparison(sections, DEFAULT, f"{BASELINE} alone")]
    parts += [comparison(sections, name, f"{name} alone") for name in (DEFAULT, BASELINE)]
    body = []
    for cell in dict.fromkeys(x["cell"] for x in [*after, *others]):
        runs = [evaluated(x)[-1] for x in {x["seed"]: x for x in [*after, *others] if x["cell"] == cell}.values()]
        body.append(
            [cell, *(", ".join(f"{row[key]:.2f}" for row in runs) for key in ("greedy", "pass@16", "distinct"))]
        )
    parts.append(
        table(["second task, by seed", "greedy", "pass@16 at temperature 1", "distinct at temperature 1"], body)
    )
    return figure, "\n\n".join(filter(None, parts))


def report(name, draw, grids):
    """Save the figure and the table of an experiment, with what a reader needs to make them again."""
    figure, text = draw(grids, pyplot(8))
    save_figure(figure, f"{name}.svg")
    lines = [line for grid in grids for line in grid.lines()]
    sets = sorted({json.dumps(line["versions"], sort_keys=True) for line in lines})
    packages = "; ".join(", ".join(f"{k} {v}" for k, v in json.loads(text).items()) for text in sets)
    count = f"{sum(len(grid.lines()) for grid in grids)} of {sum(len(grid.cells) for grid in grids)} runs of the grids"
    machines = sorted({line["machine"] for line in lines})
    days = ", ".join(f"{num} on {day}" for day, num in sorted(Counter(line["date"] for line in lines).items()))
    made = f"{count}: {days}; {', '.join(machines)}, one thread a run; {packages}; {origins(lines)}."
    save(f"{name}-table.md", f"{text}\n\n{made}\n")
    print(f"{text}\n\n{made}")


def origins(lines):
    """The warm start and the version of the code that lines come from, which must be one."""
    found = {(line["origin"]["model"], line["origin"]["numbers"]) for line in lines if line.get("origin")}
    unknown = sum(not line.get("origin") for line in lines)
    text = ", ".join(f"warm start {model}, numbers {numbers}" for model, numbers in sorted(found))
    return "; ".join(filter(None, [text, f"{unknown} lines without a record of their origin" if unknown else ""]))


def main(about, experiments):
    """The command line of experiments.

    Args:
        about: one line of help.
        experiments: by name, what draws one, (grids, pyplot) -> (figure, text), and the names of its grids.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("experiment", choices=list(experiments))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    from isentropic.experiments.grid import load_grid, run

    os.chdir(ROOT)
    flags = {"seeds": options.seeds, "jobs": options.jobs}
    draw, names = experiments[options.experiment]
    grids = [load_grid(str(GRIDS / f"{name}.toml"), dict(flags)) for name in names]
    if not options.only_table:
        for grid in grids:
            run(grid, say=lambda text: print(text, flush=True))
            # Lines that were added one by one compress better together.
            save(grid.results.resolve(), rows(grid.results.resolve()))
    report(options.experiment, draw, grids)


EXPERIMENTS = {
    "pays": (pays, ["pays-base", "pays-hard", "pays-sequence", "pays-long"]),
    "which": (which, ["choice-long", "which-hard", "which-sequence", "rates"]),
    "target": (target, ["choice", "choice-sequence"]),
    "auto": (auto, ["auto-tune", "auto-tune-sequence", "auto-score", "auto-reversal", "auto-score-sequence"]),
    "sequence": (sequence, ["pays-sequence", "pays-alone", "which-sequence"]),
}


if __name__ == "__main__":
    main(__doc__.splitlines()[0], EXPERIMENTS)
