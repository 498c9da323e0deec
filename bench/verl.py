"""verl's main_ppo on the embedded task, with entropy under control and without, by its own log.

Each cell is one whole run on the CPU: Ray, transfer queue, agent loop, FSDP2 on gloo, and the rollout of the tests. A
finished cell is never run again. Needs the environment of `make test-verl`.

    .venv-verl/bin/python bench/verl.py [--out runs/verl] [--steps 50] [--report-only | --only-table]
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

from results import ROOT, load, made, save, table, versions

# In this folder the package verl would be this file.
sys.path = [str(ROOT / "tests/engines/verl"), *(x for x in sys.path if Path(x or ".").resolve() != ROOT / "bench")]
UPDATES, PROMPTS, GROUP = 4, 32, 8
SHARED = [
    f"data.train_batch_size={PROMPTS}",
    f"actor_rollout_ref.actor.ppo_mini_batch_size={PROMPTS // UPDATES}",
    f"actor_rollout_ref.rollout.n={GROUP}",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=64",
    "actor_rollout_ref.actor.optim.lr=5e-4",
    "trainer.save_freq=-1",
]
# verl's own GRPO, read and not touched; and the default recipe, which names its estimator and reduction itself.
CELLS = {
    "verl's GRPO": ["+isentropic=monitor", "algorithm.adv_estimator=grpo"],
    "isentropic at 75%": ["+isentropic=isentropic", "actor_rollout_ref.actor.policy_loss.target=75%"],
    "repo-r-loop at 80%": ["+isentropic=repo-r-loop", "actor_rollout_ref.actor.policy_loss.target=80%"],
}
HEAD = [
    "run",
    "entropy, first batch",
    "last ten",
    "target",
    "RMS error from batch 5 on",
    "reward, first ten",
    "last ten",
]


def run(cell, home, out, steps):
    from whole import start

    if (out / "done").exists():
        return
    shutil.rmtree(out, ignore_errors=True)
    began = time.monotonic()
    process = start(home, out, *SHARED, *CELLS[cell], f"trainer.total_training_steps={steps}")
    try:
        code = process.wait()
    finally:
        process.terminate()
    if code:
        raise SystemExit(f"{cell} ended with {code}; its output is in {out}/output.txt")
    (out / "done").write_text(f"{time.monotonic() - began:.0f}")


def read(out):
    """A row a generated batch, of verl's own file logger."""
    rows = [json.loads(line)["data"] for line in (out / "verl.jsonl").read_text().splitlines()]
    names = {
        "entropy": "actor/entropy/mean",
        "target": "actor/entropy/target",
        "knob": "actor/knob/value",
        "reward": "critic/score/mean",
        "seconds": "timing_s/step",
    }
    return [{ours: row.get(theirs) for ours, theirs in names.items()} for row in rows]


def row_of(cell, rows):
    mean = statistics.fmean
    target = rows[-1]["target"]
    off = [(row["entropy"] / row["target"] - 1) ** 2 for row in rows[5:] if row["target"]]
    return [
        cell,
        f"{rows[0]['entropy']:.3f}",
        f"{mean(r['entropy'] for r in rows[-10:]):.3f}",
        "" if target is None else f"{target:.3f}",
        f"{mean(off) ** 0.5:.1%}" if off else "",
        f"{mean(r['reward'] for r in rows[:10]):.3f}",
        f"{mean(r['reward'] for r in rows[-10:]):.3f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs/verl")
    parser.add_argument("--steps", type=int, default=50, help=f"generated batches, {UPDATES} optimizer steps each")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--only-table", action="store_true")
    options = parser.parse_args()
    if not options.only_table:
        measure(options.out.resolve(), options)
    facts = load("verl.json")
    text = table(HEAD, [row_of(cell, rows) for cell, rows in facts["rows"].items()])
    save("verl-table.md", f"{text}\n\n{facts['made']}.\n")
    print(text)


def measure(out, options):
    out.mkdir(parents=True, exist_ok=True)
    if not options.report_only:
        from whole import prepare

        home = out / "home"
        if not (home / "heldout.parquet").exists():
            home.mkdir(exist_ok=True)
            shutil.rmtree(home / "model", ignore_errors=True)
            prepare(home)
        for i, cell in enumerate(CELLS):
            run(cell, home, out / f"cell-{i}", options.steps)
    rows = {cell: read(out / f"cell-{i}") for i, cell in enumerate(CELLS) if (out / f"cell-{i}/done").exists()}
    packages = versions("isentropic", "ray", "tensordict", "torch", "transformers", "verl")
    line = made(packages, threads="one thread a process")
    save("verl.json", {"made": line, "flags": SHARED, "cells": {cell: CELLS[cell] for cell in rows}, "rows": rows})


if __name__ == "__main__":
    main()
