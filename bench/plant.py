"""How well does every controller hold a first-order plant, if it acts once in 1 to 32 optimizer steps?

The plant of `isentropic.control.plant`: an entropy that a knob moves by 2 to 4 % of its target a step, read with noise,
with and without lag, delay, forecasts, a rate that decays and a sign that turns. A minute on one core.

    python bench/plant.py
"""

import os
from statistics import fmean

from results import ONE_THREAD, made, pyplot, save, save_figure, table, versions

os.environ |= ONE_THREAD

from isentropic.control.controllers import CONTROLLERS, Range, parse_controller
from isentropic.control.plant import Plant, bound_to_bound, rms_error, run
from isentropic.control.watchdog import Watchdog, WatchdogState

EVERY = [1, 2, 4, 8, 16, 32]
STEPS, AFTER, SEEDS = 800, 200, range(2)
RUNS = [(seed, sign) for seed in SEEDS for sign in (1, -1)]
LATE = "4 %, lag 10, delay 8"
DECAY, DECAY_LATE = "4 %, learning rate to 0", "8 %, learning rate to 0, noise 5 %, wander 1 %, delay 2"
PLANTS = {
    "2 % a step": Plant(authority=0.02),
    "4 % a step": Plant(authority=0.04),
    "4 %, noise 5 %": Plant(authority=0.04, noise=0.05),
    "4 %, lag 10": Plant(authority=0.04, lag=10),
    "4 %, delay 4": Plant(authority=0.04, delay=4),
    LATE: Plant(authority=0.04, lag=10, delay=8),
    "1 %": Plant(authority=0.01),
    "8 %": Plant(authority=0.08),
    "4 %, forecast every tenth step": Plant(authority=0.04, forecast_every=10),
    "4 %, no forecast": Plant(authority=0.04, forecast_every=0),
    DECAY: Plant(authority=0.04, warm_up=50, decays_at=STEPS),
    DECAY_LATE: Plant(authority=0.08, noise=0.05, wander=0.01, delay=2, warm_up=50, decays_at=STEPS),
}
DELAYS, AUTHORITIES = [0, 2, 4, 8, 16], [0.005, 0.01, 0.02, 0.04, 0.08]
COLOURS = {"pi": "#e69f00", "predictive": "#2f7fd1"}


def knob(sign):
    return Range(0.0, -1.0, 1.0, 1e-3, sign)


def cell(controller, plant, every, runs=RUNS):
    """RMS error, trips from bound to bound and share of the time at one, means over runs of a seed and a sign."""
    errors, trips, held = [], [], []
    for seed, sign in runs:
        span = knob(sign)
        rows = run(lambda span: parse_controller(controller, span), plant, span, steps=STEPS, every=every, seed=seed)
        errors.append(rms_error(rows, AFTER))
        trips.append(bound_to_bound(rows, span, AFTER))
        held.append(fmean(span.saturated(row.knob) for row in rows[AFTER:]))
    return fmean(errors), fmean(trips), fmean(held)


def section(title, names):
    """The table of a plant."""
    lines = [[name, *(f"{e:.1%}{f' ({t:.0f})' if round(t) else ''}" for e, t, _ in figures)] for name, figures in names]
    return f"## {title}\n\n{table(['controller', *(f'every {n}' for n in EVERY)], lines, right=len(EVERY))}"


def corners(controller):
    """The table of a controller over every authority, delay and wait; ``{delay}`` in its text is told."""
    lines = []
    for authority in AUTHORITIES:
        # A knob of ½ % can hold a fall of at most ¼ % a step.
        weak = Plant(authority=authority, fall=min(0.002, authority / 5))
        for delay in DELAYS:
            told, plant = controller.format(delay=delay), weak._replace(delay=delay)
            row = [cell(told, plant, every, RUNS[::3]) for every in EVERY]
            shown = [f"{error:.1%}{f' ({held:.0%})' if held >= 0.005 else ''}" for error, _, held in row]
            lines.append([f"{100 * authority:g} %", str(delay), *shown])
    head = ["authority", "delay", *(f"every {n}" for n in EVERY)]
    title = f"`{controller.replace('{delay}', 'D')}` at each authority, delay and wait"
    return f"## {title}\n\n{table(head, lines, right=len(EVERY) + 1)}"


def seen_after(name, plant):
    """Steps from the turn of the sign to the first warning, a number for each seed and sign."""
    steps = []
    for seed in SEEDS:
        for sign in (1, -1):
            dog, state, said = Watchdog("knob", knob(sign)), WatchdogState(), None
            rows = run(CONTROLLERS[name], plant, knob(sign), steps=STEPS, seed=seed)
            for step, row in enumerate(rows):
                state = dog.update(state, row.reading, 1.0, row.knob)
                if said is None and dog.message(state) and "turned round" in dog.message(state):
                    said = step - plant.turns_at
            steps.append(said)
    return "–" if None in steps else f"{min(steps)} to {max(steps)}"


def turned():
    """How soon the watchdog sees a sign that turns round."""
    plants = [Plant(turns_at=300), Plant(turns_at=300, noise=0.05), Plant(turns_at=300, forecast_every=0)]
    head = ["controller", "2 % a step", "noise 5 %", "no forecast"]
    # multiplicative cannot give its knob another sign, and so does not hold half of these plants before the turn.
    steers = [name for name in CONTROLLERS if CONTROLLERS[name](knob(1)).steers and name != "multiplicative"]
    lines = [[name, *(seen_after(name, plant) for plant in plants)] for name in steers]
    return f"## The sign turns round: optimizer steps until the watchdog says so\n\n{table(head, lines, right=3)}"


def draw(figures):
    plt = pyplot()
    picture, panels = plt.subplots(2, 3, figsize=(9, 5.2), sharex=True, sharey=True)
    shown = [*list(PLANTS)[:5], "4 %, no forecast"]
    for axis, title in zip(panels.flat, shown, strict=True):
        for name in CONTROLLERS:
            if name == "schedule":
                continue
            main = COLOURS.get(name)
            style = {"color": main or "#9a9a9a", "lw": 1.8 if main else 0.8, "marker": "o", "ms": 3 if main else 1.5}
            errors = [100 * error for error, *_ in figures[title][name]]
            axis.plot(EVERY, errors, zorder=3 if main else 2, label=name if main else None, **style)
        axis.set(title=title, xscale="log", yscale="log", xticks=EVERY, xticklabels=EVERY, ylim=(0.3, 100))
        axis.minorticks_off()
    for axis in panels[1]:
        axis.set_xlabel("optimizer steps between updates")
    for axis in panels[:, 0]:
        axis.set_ylabel("RMS error, % of the target")
    panels[0, 0].plot([], [], color="#9a9a9a", lw=0.8, label="the others")
    panels[0, 0].legend(frameon=False, loc="upper left")
    save_figure(picture, "plant.svg")


def main():
    names = [name for name in CONTROLLERS if name != "schedule"]
    told = {LATE: ["pi:delay=18", "predictive:delay=16"]}
    figures = {
        title: {n: [cell(n, plant, e) for e in EVERY] for n in [*names, *told.get(title, [])]}
        for title, plant in PLANTS.items()
    }
    facts = (
        f"{len(SEEDS)} seeds and both signs, {STEPS} steps, RMS error of the entropy itself after step {AFTER}",
        "python bench/plant.py",
    )
    note = (
        "RMS error, share of the target; in brackets, trips of the knob from one bound to the other, if there were any."
    )
    legend = (
        "The whole range of the knob moves entropy by the authority, a share of the target, in a step. RMS error; in "
        "brackets, share of the time at a bound; a seed for each sign. D: the controller is told the delay."
    )
    grids = [corners(name) for name in ("pi", "predictive", "predictive:delay={delay}")]
    text = [note, *(section(title, rows.items()) for title, rows in figures.items()), turned(), legend, *grids]
    save("plant-table.md", "\n\n".join([*text, made(versions("python", "isentropic"), *facts)]) + "\n")
    draw(figures)


if __name__ == "__main__":
    main()
