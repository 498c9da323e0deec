"""Which controller holds entropy best? In the tabular engine, whose runs take seconds, and on the embedded task.

Every controller turns the same knob at every optimizer step, from the same start. Embedded cells are runs of
`isentropic train`, each in a process of its own; a finished cell is never run again, a killed one starts afresh.

    python bench/controllers.py tabular [--seeds 0 1 2 3 4]
    python bench/controllers.py embedded [--runs DIR] [--seeds 0 1 2 3 4] [--jobs 2]
    python bench/controllers.py report          # the table and the picture from the figures that are there
"""

import argparse
import json
import os
import time
from pathlib import Path

from results import ONE_THREAD, ROOT, exists, load, made, pyplot, run_cells, save, save_figure, table, train_arguments

os.environ |= ONE_THREAD
import numpy as np

CONTROLLERS = ["double_halve", "multiplicative", "sign_step", "pi", "predictive"]
BASELINE = "pi"
# What is controlled in the tabular engine: a knob on a recipe, and a step size.
PLANTS = {
    "ζ on LOOP": ({"recipe": "loop", "knob": "zeta", "target": "75%"}, 4.0),
    "ζ on LOOP, steps four times as large": ({"recipe": "loop", "knob": "zeta", "target": "75%"}, 16.0),
    "β on DAPO, target annealed": ({"recipe": "dapo", "knob": "beta", "target": "anneal:100%:60%:300"}, 4.0),
    "entropy bonus on GRPO, c up to 1": (
        {"recipe": "grpo", "knob": "entropy_coef", "knob_high": 1.0, "target": "75%"},
        4.0,
    ),
}
STEPS = 400  # half of the default run, learning rate decayed over them
TABULAR_STEPS = 500
SETTLED, BAND, WINDOW = 20, 0.05, 20


def figures(entropy, target, knob, low, high):
    """The figures of the table, from readings, targets in force and knobs, a number a step."""
    entropy, target = np.asarray(entropy, float), np.asarray(target, float)
    target = np.where(np.isfinite(target), target, target[np.isfinite(target)][0])
    error = (entropy - target) / target
    smooth = np.convolve(error, np.ones(WINDOW) / WINDOW, mode="valid")
    inside = np.abs(smooth) <= BAND
    settling = int(np.argmax(inside)) if inside.any() else len(entropy)
    # How far it overshoots: beyond the target, on the other side from its start, once it has reached it.
    after = smooth[settling:] * -np.sign(smooth[0])
    knob = np.asarray(knob, float)
    return {
        "settling": settling,
        "rms": float(np.sqrt(np.mean(error[SETTLED:] ** 2))),
        "rms after 100": float(np.sqrt(np.mean(error[100:] ** 2))),
        "overshoot": float(max(after.max(initial=0.0), 0.0)),
        "at a bound": float(np.mean((knob[SETTLED:] <= low) | (knob[SETTLED:] >= high))),
        "knob motion": float(np.sqrt(np.mean(np.diff(knob[SETTLED:]) ** 2)) / (high - low)),
    }


def tabular(seeds):
    import torch

    from isentropic.engines.tabular import simulate
    from isentropic.recipes import compose, knob_range

    torch.set_num_threads(1)
    plants = {}
    for plant, (settings, rate) in PLANTS.items():
        for controller in CONTROLLERS:
            recipe = compose(**settings, controller=controller, every=1)
            span = knob_range(recipe)
            began = time.monotonic()
            rows = []
            for seed in seeds:
                run = simulate(recipe, TABULAR_STEPS, seed, lr=rate)
                row = figures(run.entropy, run.target, run.knob, span.low, span.high)
                # The policy's own entropy is known here: the error without the noise of readings.
                exact = figures(run.exact, run.target, run.knob, span.low, span.high)
                row["true rms after 100"] = exact["rms after 100"]
                rows.append(row | {"reward": float(run.reward[-100:].mean())})
            plants.setdefault(plant, {})[controller] = rows
            print(f"{plant}, {controller}: {time.monotonic() - began:.0f} s", flush=True)
    keep("tabular", plants)


def embedded(home, seeds, jobs):
    shared = {"target": "75%", "steps": STEPS, "save_every": 0}
    cells = []
    for seed in seeds:
        for controller in CONTROLLERS:
            out = home / f"{controller}-s{seed}"
            settings = {**shared, "controller": controller, "seed": seed, "out": out}
            cells.append((f"{controller}, seed {seed}", out, train_arguments(settings)))
    run_cells(cells, jobs)
    collect(home, seeds)


def collect(home, seeds):
    from isentropic.recipes import compose, knob_range
    from isentropic.runs.record import Record

    span, by_controller = knob_range(compose("isentropic", target="75%")), {}
    for controller in CONTROLLERS:
        for seed in seeds:
            record = Record(home / f"{controller}-s{seed}")
            if not (record.path / "summary.json").exists():
                continue
            rows = record.rows("metrics")
            columns = ([row[name] for row in rows] for name in ("entropy/mean", "entropy/target", "knob/value"))
            entropy, target, knob = columns
            target = [np.nan if x is None else x for x in target]
            summary = json.loads((record.path / "summary.json").read_text())
            row = figures(entropy, target, knob, span.low, span.high) | {"reward": summary["reward/end"], "seed": seed}
            row |= {name: summary["end"][name] for name in ("pass@1", "pass@16", "distinct")}
            row["trace"] = [round(float(x), 4) for x in np.convolve(entropy, np.ones(WINDOW) / WINDOW, "valid")[::8]]
            row["target"] = target[-1]
            by_controller.setdefault(controller, []).append(row)
    keep("embedded", {f"the embedded task, {STEPS} steps": by_controller})


def keep(part, plants):
    from isentropic.runs.record import versions

    line = made(versions(), threads="one thread a run")
    save(f"controllers-{part}.json.gz", {"made": line, "plants": plants})
    report()


COLUMNS = {
    "settling": "{:.0f}",
    "rms": "{:.1%}",
    "rms after 100": "{:.1%}",
    "true rms after 100": "{:.1%}",
    "overshoot": "{:.1%}",
    "at a bound": "{:.0%}",
    "knob motion": "{:.1%}",
    "reward": "{:.3f}",
    "pass@1": "{:.3f}",
    "pass@16": "{:.3f}",
    "distinct": "{:.1f}",
}


def cell(values, form):
    from isentropic.runs.statistics import mean_interval

    mean = form.format(float(np.mean(values)))
    interval = mean_interval(values, bounds=(-np.inf if "+" in form else 0.0, np.inf))
    return mean if interval is None else f"{mean} ({form.format(interval.low)}..{form.format(interval.high)})"


def report():
    lines = []
    for part in ("embedded", "tabular"):
        if not exists(f"controllers-{part}.json.gz"):
            continue
        facts = load(f"controllers-{part}.json.gz")
        for plant, by_controller in facts["plants"].items():
            names = [n for n in COLUMNS if n in next(iter(by_controller.values()))[0]]
            cells = []
            for controller, rows in by_controller.items():
                pairs = [a["rms"] - b["rms"] for a, b in zip(rows, by_controller[BASELINE], strict=False)]
                gap = "" if controller == BASELINE else cell(pairs, "{:+.1%}")
                cells.append([controller, *(cell([row[name] for row in rows], COLUMNS[name]) for name in names), gap])
            number = len(next(iter(by_controller.values())))
            lines += [f"## {plant}", "", table(["controller", *names, f"rms − {BASELINE}'s"], cells), ""]
            lines += [f"Mean over {number} seeds (0 to {number - 1}), 95 % interval over seeds (Student's t).", ""]
        lines += [f"{facts['made']}.", ""]
        if part == "embedded":
            draw(facts["plants"])
    save("controllers-table.md", "\n".join(lines))
    print("\n".join(lines))


def draw(plants):
    plt = pyplot()
    colours = dict(zip(CONTROLLERS, ["#999999", "#e69f00", "#009e73", "#d55e00", "#0072b2"], strict=True))
    (by_controller,) = plants.values()
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for controller, rows in by_controller.items():
        for i, row in enumerate(rows):
            label = {"label": controller} if i == 0 else {}
            values = [x / row["target"] for x in row["trace"]]
            axis.plot(np.arange(len(values)) * 8 + WINDOW / 2, values, color=colours[controller], lw=0.9, **label)
    axis.axhline(1.0, color="#333333", lw=0.8, ls="--")
    axis.set(
        title="Which controller holds entropy?", xlabel="optimizer steps", ylabel="entropy / target, 20 steps' mean"
    )
    axis.set_ylim(0.7, 1.4)
    axis.legend(frameon=False, fontsize=8, ncols=3)
    save_figure(figure, "controllers.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["tabular", "embedded", "report"])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "controllers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.part == "tabular":
        tabular(options.seeds)
    elif options.part == "embedded":
        embedded(options.runs, options.seeds, options.jobs)
    else:
        report()


if __name__ == "__main__":
    main()
