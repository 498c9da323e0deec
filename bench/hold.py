"""Recipes side by side on the embedded task: which keeps its entropy, and what does that do to reward?

Every cell is one run of `isentropic train` in a process of its own, two at a time; a finished cell is never run again,
a killed one starts afresh. Then the table, the figures by run and the picture are made from the run directories.

    python bench/hold.py [--runs DIR] [--seeds 0 1 2] [--jobs 2] [--report-only]
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
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
    # How the learning rate was chosen, and whether ADAPO gets a hold where ratios move more.
    "grpo lr 3e-4": {"recipe": "grpo", "learning_rate": 3e-4},
    "grpo lr 8e-4": {"recipe": "grpo", "learning_rate": 8e-4},
    "adapo 16 updates": {"recipe": "adapo", "target": "80%", "updates": 16, "steps": 3200, "warmup": 200},
}


def run(cell, seed, home):
    out = where(home, cell, seed)
    if (out / "summary.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    settings = {**SHARED, **CELLS[cell], "seed": seed, "save_every": 0, "out": out}
    flags = [x for key, value in settings.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "isentropic.cli", "train", *flags],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"{cell}, seed {seed}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    print(f"{cell}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


def where(home, cell, seed):
    return home / f"{cell.replace(' ', '-').replace('%', '')}-s{seed}"


def collect(home, seeds):
    from isentropic.runs.record import Record

    found = {}
    for cell in CELLS:
        for seed in seeds:
            record = Record(where(home, cell, seed))
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
            found.setdefault(cell, {})[seed] = summary
    return found


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
    from isentropic.runs.record import Record, write_json

    found = collect(home, seeds)
    header = Record(where(home, next(iter(found)), seeds[0])).header()
    RESULTS.mkdir(parents=True, exist_ok=True)
    lines = ["| recipe | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for cell, by_seed in found.items():
        lines.append(
            f"| {cell} | " + " | ".join(show([f(s) for s in by_seed.values()]) for f in COLUMNS.values()) + " |"
        )
    text = "\n".join(lines)
    versions = ", ".join(f"{k} {v}" for k, v in header["versions"].items())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread a run"
    made = f"{date.today().isoformat()}; {machine}; {versions}; seeds {seeds}"
    (RESULTS / "hold-table.md").write_text(f"{text}\n\nMean over seeds (lowest..highest). {made}.\n")
    write_json(RESULTS / "hold.json", {"made": made, "cells": found, "shared": SHARED, "recipes": CELLS})
    draw(home, found)
    print(text)


def draw(home, found):
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    from isentropic.runs.record import Record

    plt.rcParams |= {"svg.hashsalt": "isentropic", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2))
    colours = {"grpo": "#d55e00", "isentropic": "#0072b2", "isentropic at 60%": "#56b4e9", "rloo": "#009e73"}
    for cell, colour in colours.items():
        for seed in found.get(cell, {}):
            rows = Record(where(home, cell, seed)).rows("metrics")
            samples = [row["samples/total"] / 1000 for row in rows]
            label = {"label": {"isentropic": "isentropic (75%)"}.get(cell, cell)} if seed == min(found[cell]) else {}
            for axis, name in ((left, "entropy/mean"), (middle, "reward/mean")):
                values = smooth([row[name] for row in rows])
                axis.plot(samples[::5], values[::5], color=colour, lw=1.1, alpha=0.85, **label)
            if rows[-1].get("entropy/target"):
                left.axhline(rows[-1]["entropy/target"], color=colour, lw=0.8, ls="--", alpha=0.6)
            end = found[cell][seed]["end"]
            right.plot(end["pass@1"], end["distinct"], "o", color=colour, ms=5, alpha=0.85)
            start = found[cell][seed]["start"]
            right.plot(start["pass@1"], start["distinct"], "x", color="#777777", ms=5)
    left.set(title="Does entropy stay where it was asked?", xlabel="thousand samples", ylim=(0, None))
    left.set_ylabel("nats per token")
    middle.set(title="Does it still learn?", xlabel="thousand samples", ylabel="reward", ylim=(0, 1))
    right.set(title="What does it buy?", xlabel="pass@1, held-out (x: before)", ylim=(0, None), xlim=(0, 1))
    right.set_ylabel("different right answers of 16")
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "hold.svg", metadata={"Date": None})


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
    options = parser.parse_args()
    if not options.report_only:
        from isentropic.models import resolve_model

        resolve_model("tiny")
        cells = [(cell, seed) for seed in options.seeds for cell in options.cells]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda cell: run(*cell, options.runs), cells))
    report(options.runs, options.seeds)


if __name__ == "__main__":
    main()
