"""Does control help an agent? Warm-up, then RL in TextWorld with and without a hold on entropy: games won, unseen ones.

    python bench/textworld.py [--seeds 0 1 2] [--out runs/textworld] [--only-table]

One small model of whole words is made and warmed up on the first 32 of 64 training games. From it, each recipe trains
on all 64, and 40 other games are played before and after, 4 episodes each at temperature 1. A finished run is a line of
docs/results/textworld.jsonl.gz and never runs again; the table and the figure are made of the lines that there are.
Needs the extra textworld; the games are generated once, in some minutes.
"""

import argparse
import json
import os
import platform
import sys
from datetime import date
from pathlib import Path

from results import ONE_THREAD, ROOT, append, pyplot, rows, save, save_figure, table

os.environ |= ONE_THREAD
# In this folder the package textworld would be this file.
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "bench"]
LINES = "textworld.jsonl.gz"
TASK = "textworld:coin_collector:level=103:train=64:test=40:text=brief:turns=12"
WARM_UP = {"steps": 400, "rows": 32}
RECIPES = {"grpo": "#d55e00", "isentropic": "#0072b2"}
SETTINGS = {
    "task": TASK,
    "steps": 120,
    "prompts": 8,
    "generations": 8,
    "updates": 4,
    "warmup": 20,
    "eval_k": 4,
    "save_every": 0,
}
CURVES = ("entropy/mean", "entropy/target", "episode/win_frac", "episode/turns", "entropy/turn_1", "entropy/turn_4")


def add(line):
    machine = {"cores": os.cpu_count(), "platform": platform.platform()}
    append(LINES, {**line, "date": str(date.today()), "machine": machine})


def warm(out):
    """The model that every run starts from."""
    from isentropic.models.warmup import WarmUp, make
    from isentropic.tasks import load_task

    home = out / "model"
    if not (home / "config.json").exists():
        figures = make(load_task(TASK), home, WarmUp(**WARM_UP), num=4)
        add({"cell": "warm-up", "task": TASK, "settings": WARM_UP, "figures": figures})
    return home


def run(recipe, seed, model, out):
    from isentropic.experiments.config import load
    from isentropic.experiments.train import train
    from isentropic.models.loading import quiet
    from isentropic.runs.record import Record

    quiet()
    home = out / f"{recipe}-s{seed}"
    target = {"target": "75%"} if recipe == "isentropic" else {}
    config = load(None, {**SETTINGS, **target, "model": str(model), "recipe": recipe, "seed": seed, "out": str(home)})
    if not (home / "summary.json").exists():
        begun = (home / "run.json").exists()
        train(config, resume=begun, say=lambda text: print(f"{recipe} {seed}: {text}", file=sys.stderr))
    summary = json.loads((home / "summary.json").read_text())
    metrics, (before, *_, after) = Record(home).rows("metrics"), Record(home).rows("evaluations")
    curves = {name: [row.get(name) for row in metrics] for name in CURVES}
    won = {"before": before["num_correct"], "after": after["num_correct"], "distinct": after["num_distinct"]}
    add(
        {
            "cell": recipe,
            "seed": seed,
            "settings": SETTINGS,
            "k": before["k"],
            "won": won,
            "summary": {k: v for k, v in summary.items() if not isinstance(v, dict)},
            "curves": curves,
        }
    )


def by_game(lines, when):
    """The share of episodes won of each game, over the seeds of a recipe."""
    import numpy as np

    return np.array([np.array(line["won"][when]) / line["k"] for line in lines]).mean(0)


def with_interval(values):
    from isentropic.runs.statistics import bootstrap_interval

    low, high = bootstrap_interval(values)
    return f"{values.mean():.3f} ({low:.3f} to {high:.3f})"


def by_recipe(cells):
    head = "recipe | seeds | won before | won after | gain | entropy, start | target | end | turns, end".split(" | ")
    out = []
    for recipe, lines in cells.items():
        before, after = by_game(lines, "before"), by_game(lines, "after")

        def mean(key, lines=lines):
            values = [line["summary"][key] for line in lines]
            return "none" if None in values else f"{sum(values) / len(values):.3f}"

        turns = [sum(line["curves"]["episode/turns"][-12:]) / 12 for line in lines]
        out.append(
            [
                f"`{recipe}`",
                " ".join(str(line["seed"]) for line in lines),
                with_interval(before),
                with_interval(after),
                with_interval(after - before),
                *(mean(key) for key in ("entropy/start", "entropy/target", "entropy/end")),
                f"{sum(turns) / len(turns):.1f}",
            ]
        )
    return table(head, out)


def difference(cells):
    """Isentropic less grpo, of the seeds that both have, game by game."""
    seeds = set.intersection(*({line["seed"] for line in lines} for lines in cells.values()))
    if len(cells) < 2 or not seeds:
        return ""
    ours, theirs = (
        by_game([line for line in cells[name] if line["seed"] in seeds], "after") for name in ("isentropic", "grpo")
    )
    return f"\nWon after, `isentropic` less `grpo`, game by game: {with_interval(ours - theirs)}, {len(seeds)} seeds.\n"


def page(cells):
    from isentropic.runs.record import versions

    last = rows(LINES)[-1]
    made = f"{last['date']}, {last['machine']['platform']}, one thread; " + ", ".join(
        f"{name} {number}" for name, number in versions().items() if name in ("python", "torch", "transformers", "trl")
    )
    (warmed,) = [line["figures"] for line in rows(LINES) if line["cell"] == "warm-up"] or [{}]
    start = f"Warm-up: {warmed.get('demonstrations')} demonstrations, {warmed.get('win_frac', 0):.3f} of episodes won."
    head = "# TextWorld: the table\n\nShares of episodes won on 40 unseen games, with 95 % intervals over games."
    return f"{head}\n\n{by_recipe(cells)}\n{difference(cells)}\n{start}\n\n{made}\n"


def figure(cells):
    drawn, axes = pyplot(8).subplots(1, 3, figsize=(9, 2.6))
    for recipe, lines in cells.items():
        colour = RECIPES[recipe]
        for i, line in enumerate(lines):
            name = recipe if i == 0 else None
            axes[0].plot(line["curves"]["entropy/mean"], color=colour, lw=0.9, label=name)
            axes[1].plot(line["curves"]["episode/win_frac"], color=colour, lw=0.9, label=name)
            shares = [sum(line["won"][when]) / line["k"] / len(line["won"][when]) for when in ("before", "after")]
            axes[2].plot([0, 1], shares, "o-", color=colour, ms=3, lw=0.9, label=name)
    targets = [line["curves"]["entropy/target"][-1] for line in cells.get("isentropic", [])]
    for target in targets:
        axes[0].axhline(target, color=RECIPES["isentropic"], lw=0.6, ls="--")
    for axis, title in zip(axes, ("nats an action token", "won, training games", "won, unseen games"), strict=True):
        axis.set(title=title, ylim=(0, None))
    for axis in axes[:2]:
        axis.set_xlabel("optimizer step")
    axes[2].set(xlim=(-0.2, 1.2), xticks=[0, 1], xticklabels=["before", "after"], ylim=(0, 1))
    axes[2].legend(frameon=False)
    save_figure(drawn, "textworld.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "textworld")
    parser.add_argument("--only-table", action="store_true")
    args = parser.parse_args()
    done = {(line["cell"], line.get("seed")) for line in rows(LINES)}
    missing = [(recipe, seed) for seed in args.seeds for recipe in RECIPES if (recipe, seed) not in done]
    if missing and not args.only_table:
        model = warm(args.out)
        for recipe, seed in missing:
            if (recipe, seed) not in {(line["cell"], line.get("seed")) for line in rows(LINES)}:
                run(recipe, seed, model, args.out)
    lines = sorted(rows(LINES), key=lambda line: line.get("seed", 0))
    cells = {name: [line for line in lines if line["cell"] == name] for name in RECIPES}
    cells = {name: lines for name, lines in cells.items() if lines}
    if cells:
        save("textworld-table.md", page(cells))
        figure(cells)
        print(by_recipe(cells), difference(cells), sep="\n")


if __name__ == "__main__":
    main()
