"""Recipes side by side on the embedded task: which keeps its entropy, and how does reward change?

Every cell is one run of `isentropic train` in a process of its own, two at a time; a finished cell is never run again,
a killed one starts afresh. Then the table, the figures by run and the picture are made from the run directories;
`--only-table` makes the table from docs/results/hold.json.gz.

    python bench/hold.py [--runs DIR] [--seeds 0 1 2] [--jobs 2] [--report-only | --only-table]
"""

import argparse
import json
import statistics
from pathlib import Path

from results import ROOT, load, made, pyplot, run_cells, save, save_figure, table, train_arguments

# Chosen for plain GRPO's reward and fixed before the comparison; see docs/results/hold.md.
SHARED = {"steps": 800, "prompts": 32, "generations": 16, "updates": 4, "learning_rate": 5e-4, "warmup": 50}
CELLS = {
    "grpo": {"recipe": "grpo"},
    "isentropic": {"recipe": "isentropic", "controller": "pi", "target": "75%"},
    "loop": {"recipe": "loop"},
    "dapo": {"recipe": "dapo"},
    # Strictly on-policy: one step a batch, and a batch of the size the others step on. Steps and samples are the same.
    "rloo": {"recipe": "rloo", "prompts": 8, "updates": 1},
    "adapo": {"recipe": "adapo", "target": "80%"},
    "repo-r": {"recipe": "repo-r-loop", "target": "80%"},
    "isentropic at 100%": {"recipe": "isentropic", "controller": "pi", "target": "initial"},
    "isentropic at 80%": {"recipe": "isentropic", "controller": "pi", "target": "80%"},
    "isentropic at 60%": {"recipe": "isentropic", "controller": "pi", "target": "60%"},
    # How the learning rate was chosen, and whether ADAPO has more effect if ratios move more.
    "grpo lr 3e-4": {"recipe": "grpo", "learning_rate": 3e-4},
    "grpo lr 8e-4": {"recipe": "grpo", "learning_rate": 8e-4},
    "adapo 16 updates": {"recipe": "adapo", "target": "80%", "updates": 16, "steps": 3200, "warmup": 200},
}


def cell_of(cell, seed, home):
    out = directory(home, cell, seed)
    settings = {**SHARED, **CELLS[cell], "seed": seed, "save_every": 0, "out": out}
    return f"{cell}, seed {seed}", out, train_arguments(settings)


def directory(home, cell, seed):
    return home / f"{cell.replace(' ', '-').replace('%', '')}-s{seed}"


def collect(home, seeds):
    from isentropic.runs.record import Record

    cells = {}
    for cell in CELLS:
        for seed in seeds:
            record = Record(directory(home, cell, seed))
            if not (record.path / "summary.json").exists():
                continue
            summary = json.loads((record.path / "summary.json").read_text())
            rows = record.rows("metrics")
            settled = [row for row in rows if row["step"] > 20]
            summary["entropy/mean"] = sum(r["entropy/mean"] for r in settled) / len(settled)
            summary["clip/high_frac"] = sum(r["clip/high_frac"] for r in settled) / len(settled)
            summary["clip/low_frac"] = sum(r["clip/low_frac"] for r in settled) / len(settled)
            saturated = [r["knob/saturated"] for r in settled if r.get("knob/saturated") is not None]
            summary["knob/saturated"] = sum(saturated) / len(saturated) if saturated else None
            cells.setdefault(cell, {})[seed] = summary
    return cells


COLUMNS = {
    "H start": lambda s: s["entropy/start"],
    "H end": lambda s: s["entropy/end"],
    "H mean": lambda s: s["entropy/mean"],
    "RMS error": lambda s: s["entropy/rms_error"],
    "saturated": lambda s: s["knob/saturated"],
    "clipped high": lambda s: s["clip/high_frac"],
    "reward": lambda s: s["reward/end"],
    "pass@1": lambda s: s["end"]["pass@1"],
    "pass@16": lambda s: s["end"]["pass@16"],
    "distinct": lambda s: s["end"]["distinct"],
}


def show(values):
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.3f} ({min(values):.3f}..{max(values):.3f})"


def report(home, seeds):
    from isentropic.runs.record import Record

    cells = collect(home, seeds)
    header = Record(directory(home, next(iter(cells)), seeds[0])).header()
    line = made(header["versions"], f"seeds {seeds}", threads="one thread a run")
    save("hold.json.gz", {"made": line, "cells": cells, "shared": SHARED, "recipes": CELLS})
    draw(home, cells)


def write_table():
    facts = load("hold.json.gz")
    rows = [
        [cell, *(show([figure(summary) for summary in by_seed.values()]) for figure in COLUMNS.values())]
        for cell, by_seed in facts["cells"].items()
    ]
    text = table(["recipe", *COLUMNS], rows)
    save("hold-table.md", f"{text}\n\nMean over seeds (lowest..highest). {facts['made']}.\n")
    print(text)


def draw(home, cells):
    from isentropic.runs.record import Record

    plt = pyplot()
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
    colours = {"grpo": "#d55e00", "isentropic": "#0072b2", "isentropic at 60%": "#56b4e9", "rloo": "#009e73"}
    for cell, colour in colours.items():
        for seed in cells.get(cell, {}):
            rows = Record(directory(home, cell, seed)).rows("metrics")
            samples = [row["samples/total"] / 1000 for row in rows]
            label = {"label": {"isentropic": "isentropic (75%)"}.get(cell, cell)} if seed == min(cells[cell]) else {}
            for axis, name in ((left, "entropy/mean"), (middle, "reward/mean")):
                values = smooth([row[name] for row in rows])
                axis.plot(samples[::5], values[::5], color=colour, lw=1.1, alpha=0.85, **label)
            if rows[-1].get("entropy/target"):
                left.axhline(rows[-1]["entropy/target"], color=colour, lw=0.8, ls="--", alpha=0.6)
            end = cells[cell][seed]["end"]
            right.plot(end["pass@1"], end["distinct"], "o", color=colour, ms=5, alpha=0.85)
            start = cells[cell][seed]["start"]
            right.plot(start["pass@1"], start["distinct"], "x", color="#777777", ms=5)
    left.set(title="Does entropy stay where it was asked?", xlabel="thousand samples", ylim=(0, None))
    left.set_ylabel("nats per token")
    middle.set(title="Does it still learn?", xlabel="thousand samples", ylabel="reward", ylim=(0, 1))
    right.set(title="What does it buy?", xlabel="pass@1, held-out (x: before)", ylim=(0, None), xlim=(0, 1))
    right.set_ylabel("different right answers of 16")
    left.legend(frameon=False, fontsize=8)
    save_figure(figure, "hold.svg")


def smooth(values, share=0.1):
    level, out = values[0], []
    for value in values:
        level += share * (value - level)
        out.append(level)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "hold")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS))
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    if not options.report_only and not options.only_table:
        run_cells([cell_of(cell, seed, options.runs) for seed in options.seeds for cell in options.cells], options.jobs)
    if not options.only_table:
        report(options.runs, options.seeds)
    write_table()


if __name__ == "__main__":
    main()
