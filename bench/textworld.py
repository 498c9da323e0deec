"""Does control help an agent? Warm-up, then RL in TextWorld with and without a hold on entropy: games won, unseen ones.

    python bench/textworld.py [EXPERIMENT ...] [--seeds 0 1 2] [--out runs/textworld] [--only-table]

Five experiments: `short`, on a game of which the warm-up wins a third; `again`, the same from another warm start, with
a target that sets itself; `hard`, on a game of which the warm-up wins less than a tenth; `sequence`, on another game
first and then on the hard one, in one run; and `longer`, the same with twice the steps, under `auto`.
A small model of whole words is made and warmed up on some of the training games; each recipe trains from it, and unseen
games are played before, at the switch and after. A finished run is a line of docs/results/textworld.jsonl.gz and never
runs again; the tables and the figure are made of the lines that there are. Needs the extra textworld; the games are
generated once, in some minutes.
"""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path
from typing import NamedTuple

from results import ONE_THREAD, ROOT, append, pyplot, rows, save, save_figure, table

os.environ |= ONE_THREAD
# In this folder the package textworld would be this file.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "bench"]
LINES = "textworld.jsonl.gz"
RECIPES = {
    "grpo": "#d55e00",
    "75%": "#0072b2",
    "auto": "#009e73",
    "auto, both ways": "#cc79a7",
    "auto, trust": "#56b4e9",
}
STOPPED = ", stopped"  # of the cell of a run that stopped itself: it has no evaluation after training, and no table
CURVES = ("entropy/mean", "entropy/target", "episode/win_frac", "episode/turns", "entropy/turn_1", "entropy/turn_4")
SETTINGS = {"prompts": 8, "generations": 8, "updates": 4, "warmup": 20, "eval_k": 4, "save_every": 20}


class Experiment(NamedTuple):
    """Runs of every recipe from one warm start.

    Attributes:
        task: to train on; a sequence is named as in `isentropic train`.
        steps: optimizer steps on each task.
        start: directory of the warm model, and the name of its line.
        shown: the task, or the sequence of tasks, whose demonstrations the model is warmed up on.
        warm_up: settings of the warm-up.
        title: of its table.
        recipes: of ``RECIPES``.
    """

    task: str
    steps: int
    start: str
    shown: str
    warm_up: dict
    title: str
    recipes: tuple[str, ...] = ("grpo", "75%")


COIN = "textworld:coin_collector:level=103:train=64:test=40:text=brief:turns=12"
BOTH = "textworld-two-games"
FAR_COIN = "textworld:coin_collector:level=105:train=24:test=20:text=brief:turns=16"
FEW_STEPS = {"steps": 150, "rows": 12}
EXPERIMENTS = {
    "short": Experiment(COIN, 120, "model", COIN, {"steps": 400, "rows": 32}, "a coin two moves away"),
    "again": Experiment(
        COIN,
        120,
        "model-again",
        COIN,
        {"steps": 400, "rows": 32},
        "from another warm start",
        ("grpo", "auto", "auto, both ways"),
    ),
    "hard": Experiment(FAR_COIN, 120, "model-two-games", BOTH, FEW_STEPS, "a coin four moves away, among dead ends"),
    "sequence": Experiment(BOTH, 80, "model-two-games", BOTH, FEW_STEPS, "a chain, then the coin among dead ends"),
    "longer": Experiment(
        BOTH,
        160,
        "model-rare",
        BOTH,
        {"steps": 185, "rows": 12},
        "the same two games, twice as long",
        ("grpo", "auto", "auto, trust"),
    ),
}


def add(line):
    from isentropic.runs.record import versions

    machine = {"cores": os.cpu_count(), "platform": platform.platform()}
    append(LINES, {**line, "date": str(date.today()), "machine": machine, "versions": versions()})


def finished():
    """(experiment, recipe, seed) of every line of a run, of those that stopped themselves too."""
    runs = [line for line in rows(LINES) if "seed" in line]
    return {(line.get("experiment", "short"), line["cell"].removesuffix(STOPPED), line["seed"]) for line in runs}


def short(task):
    """A task's name without its limits."""
    return "`" + ":".join(task.split(":")[1:3]) + "`"


def tasks_of(name):
    """The tasks of a task's or a sequence's name."""
    from isentropic.tasks.sequence import SEQUENCES

    return SEQUENCES[name].tasks if name in SEQUENCES else (name,)


def warm(experiment, out):
    """The model that every run of an experiment starts from."""
    from isentropic.models.warmup import WarmUp, make
    from isentropic.tasks import load_task

    home = out / experiment.start
    if not (home / "warmup.json").exists():
        make([load_task(name) for name in tasks_of(experiment.shown)], home, WarmUp(**experiment.warm_up), num=4)
    figures, known = json.loads((home / "warmup.json").read_text())["figures"], warmed_up(experiment)
    if not known:
        about = {"start": experiment.start, "task": experiment.shown, "settings": experiment.warm_up}
        add({"cell": "warm-up", **about, "figures": figures})
    elif abs(figures["loss"] - known["figures"]["loss"]) > 1e-6:
        raise SystemExit(
            f"{home} must be the start of the finished runs, with a loss of {known['figures']['loss']:.6f}, got one of "
            f"{figures['loss']:.6f}: runs from two starts cannot be compared; bring back that directory, or add an "
            "experiment with a start of another name"
        )
    return home


def warmed_up(experiment):
    """The line of an experiment's warm-up; None before there is one."""
    lines = [line for line in rows(LINES) if line["cell"] == "warm-up"]
    return next((line for line in lines if line.get("start", "model") == experiment.start), None)


def run(name, recipe, seed, out):
    from isentropic.experiments.config import load
    from isentropic.experiments.train import train
    from isentropic.models.loading import quiet
    from isentropic.runs.record import Record

    quiet()
    experiment, home = EXPERIMENTS[name], out / f"{name}-{recipe.replace(', ', '-').replace(' ', '-')}-s{seed}"
    model = warm(experiment, out)
    settings = {"task": experiment.task, "steps": experiment.steps, **SETTINGS}
    target, _, more = recipe.partition(", ")
    settings |= {"recipe": recipe} if recipe == "grpo" else {"recipe": "isentropic", "target": target}
    settings |= {"recipe_options": {"knob_low": -1.0}} if more == "both ways" else {}
    settings |= {"controller": "predictive:trust=25"} if more == "trust" else {}
    config = load(None, {**settings, "model": str(model), "seed": seed, "out": str(home)})
    if not (home / "summary.json").exists():
        begun = (home / "run.json").exists()
        train(config, resume=begun, say=lambda text: print(f"{name} {recipe} {seed}: {text}", file=sys.stderr))
    summary = json.loads((home / "summary.json").read_text())
    metrics, evaluations = Record(home).rows("metrics"), Record(home).rows("evaluations")
    add(
        {
            "experiment": name,
            "cell": recipe + STOPPED if "stopped" in summary else recipe,
            "seed": seed,
            "settings": settings,
            "evaluations": evaluations,
            "summary": {k: v for k, v in summary.items() if not isinstance(v, dict)},
            "curves": {curve: [row.get(curve) for row in metrics] for curve in CURVES},
        }
    )


def evaluated(line):
    """The evaluations of a run, a list for each task, in order of steps."""
    if "won" in line:  # The first lines have counts alone, of one temperature.
        num = {"task": line["settings"]["task"], "num_samples": [line["k"]] * len(line["won"]["before"])}
        return {num["task"]: [{**num, "num_correct": line["won"][when]} for when in ("before", "after")]}
    by_task = {}
    for row in line["evaluations"]:
        by_task.setdefault(row["task"], []).append(row)
    return by_task


def by_game(lines, task, place):
    """The share of episodes won of each game at an evaluation, over the seeds of a recipe."""
    import numpy as np

    found = [evaluated(line)[task][place] for line in lines]
    return np.array([np.array(row["num_correct"]) / row["num_samples"] for row in found]).mean(0)


def with_interval(values, less=None):
    """The mean over games of shares, or of what they exceed the shares of the same games by, and its interval."""
    from isentropic.runs.statistics import paired_interval, proportion_interval

    low, high = proportion_interval(values) if less is None else paired_interval(values, less)
    return f"{(values if less is None else values - less).mean():.3f} ({low:.3f} to {high:.3f})"


def mean(values, digits=3):
    """The mean as text; `none` if one is missing."""
    values = list(values)
    return "none" if None in values else f"{sum(values) / len(values):.{digits}f}"


def at_the_end(lines, task):
    """Greedy, at the policy's own best temperature, and distinct wins of 4 episodes: means over seeds, as texts."""
    from isentropic.runs.frontier import best_temperature

    found = [evaluated(line)[task][-1] for line in lines]
    greedy = mean(row.get("greedy") for row in found)
    best = mean(best_temperature(row).accuracy if "at" in row else None for row in found)
    return [greedy, best, mean(row.get("distinct") for row in found)]


def by_recipe(cells):
    """The tables of an experiment: shares won for every task, and entropy."""
    tasks = list(evaluated(next(iter(cells.values()))[0]))
    whens = ["before", "at the switch", "after"] if len(tasks) > 1 else ["before", "after"]
    head = ["game"] * (len(tasks) > 1) + ["recipe", "seeds", *(f"won {when}" for when in whens), "gain"]
    head += ["greedy", "best temperature", "distinct wins of 4"]
    won, entropy = [], []
    for task in tasks:
        for recipe, lines in cells.items():
            shares = [by_game(lines, task, place) for place in range(len(whens))]
            first = [short(task)] * (len(tasks) > 1)
            first += [f"`{recipe}`", " ".join(str(line["seed"]) for line in lines), *map(with_interval, shares)]
            won.append([*first, with_interval(shares[-1], shares[0]), *at_the_end(lines, task)])
    for recipe, lines in cells.items():
        figures = [mean(x["summary"][f"entropy/{key}"] for x in lines) for key in ("start", "target", "end")]
        turns = mean((sum(x["curves"]["episode/turns"][-12:]) / 12 for x in lines), 1)
        entropy.append([f"`{recipe}`", *figures, turns, mean((x["summary"]["seconds"] for x in lines), 0)])
    head_entropy = ["recipe", "entropy, start", "target", "end", "turns, end", "seconds"]
    return f"{table(head, won)}\n\n{table(head_entropy, entropy)}"


def differences(cells):
    """Each recipe less grpo after training, at the seeds that both have, game by game: a line for each task."""
    out = []
    for name in cells.keys() - {"grpo"}:
        seeds = {line["seed"] for line in cells[name]} & {line["seed"] for line in cells["grpo"]}
        for task in evaluated(cells["grpo"][0]) if seeds else ():
            ours, theirs = (
                by_game([line for line in cells[of] if line["seed"] in seeds], task, -1) for of in (name, "grpo")
            )
            out.append(
                f"Won after, `{name}` less `grpo`, games of {short(task)}: {with_interval(ours, theirs)}; "
                f"seeds of both: {' '.join(map(str, sorted(seeds)))}."
            )
    return "\n\n".join(sorted(out))


def section(name, cells):
    """An experiment's part of the page."""
    experiment = EXPERIMENTS[name]
    figures = (warmed_up(experiment) or {}).get("figures", {})
    games = figures.get("by_task", {experiment.task: figures})
    start = "; ".join(f"`{task}` {won.get('win_frac', 0):.3f}" for task, won in games.items())
    shown = f"Warm-up: {figures.get('demonstrations')} demonstrations. Episodes of unseen games won after it: {start}."
    parts = [f"## `{name}`: {experiment.title}", by_recipe(cells), differences(cells), shown]
    return "\n\n".join(filter(None, parts))


def page(experiments):
    from isentropic.runs.record import versions

    last = rows(LINES)[-1]
    made = f"{last['date']}, {last['machine']['platform']}, one thread; " + ", ".join(
        f"{name} {number}"
        for name, number in (last.get("versions") or versions()).items()
        if name in ("python", "torch", "transformers", "trl")
    )
    head = (
        "# TextWorld: the tables\n\nShares of episodes won on unseen games at temperature 1, with 95 % intervals over "
        "games. *Greedy*: the same with greedy answers, after training. *Best temperature*: of 1.5, 1.0, 0.6 and 0.3, "
        "chosen on one half of the games and scored on the other. Entropy in nats per action token."
    )
    return "\n\n".join([head, *(section(name, cells) for name, cells in experiments.items()), made]) + "\n"


def figure(experiments):
    num = len(experiments)
    drawn, axes = pyplot(8).subplots(num, 3, figsize=(9, 2.4 * num), squeeze=False)
    for row, (name, cells) in zip(axes, experiments.items(), strict=True):
        draw(row, name, cells)
    save_figure(drawn, "textworld.svg")


def draw(axes, name, cells):
    """An experiment's row of the figure."""
    steps = EXPERIMENTS[name].steps
    for recipe, lines in cells.items():
        colour = RECIPES[recipe]
        for i, line in enumerate(lines):
            label, by_task = recipe if i == 0 else None, evaluated(line)
            axes[0].plot(line["curves"]["entropy/mean"], color=colour, lw=0.9, label=label)
            axes[1].plot(line["curves"]["episode/win_frac"], color=colour, lw=0.9)
            for style, (task, evaluations) in zip(("-", "--"), reversed(by_task.items()), strict=False):
                shares = [by_game([line], task, place).mean() for place in range(len(evaluations))]
                axes[2].plot(shares, f"o{style}", color=colour, ms=3, lw=0.9)
        for target in {line["curves"]["entropy/target"][-1] for line in lines} - {None}:
            axes[0].axhline(target, color=colour, lw=0.6, ls="--")
    for axis, title in zip(axes, ("nats per action token", "won, training games", "won, unseen games"), strict=True):
        axis.set(title=f"{name}: {title}", ylim=(0, None))
    whens = ["before", "switch", "after"] if len(by_task) > 1 else ["before", "after"]
    for axis in axes[:2]:
        axis.set_xlabel("optimizer step")
        for switch in range(1, len(by_task)):
            axis.axvline(switch * steps, color="0.6", lw=0.6)
    axes[2].set(xlim=(-0.2, len(whens) - 0.8), xticks=range(len(whens)), xticklabels=whens, ylim=(0, 1))
    axes[0].legend(frameon=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS), help=", ".join(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "textworld")
    parser.add_argument("--only-table", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        parser.error(f"unknown experiment {min(unknown)!r}; allowed: {', '.join(EXPERIMENTS)}")
    wanted = [
        (name, cell, seed) for seed in args.seeds for name in args.experiments for cell in EXPERIMENTS[name].recipes
    ]
    for cell in [] if args.only_table else wanted:
        if cell not in finished():
            run(*cell, args.out)
    lines = sorted((line for line in rows(LINES) if "seed" in line), key=lambda line: line["seed"])
    experiments = {}
    for name in EXPERIMENTS:
        of_name = [line for line in lines if line.get("experiment", "short") == name]
        cells = {recipe: [line for line in of_name if line["cell"] == recipe] for recipe in RECIPES}
        if cells := {recipe: found for recipe, found in cells.items() if found}:
            experiments[name] = cells
    if experiments:
        save("textworld-table.md", page(experiments))
        figure(experiments)
        print(page(experiments))


if __name__ == "__main__":
    main()
