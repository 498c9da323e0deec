"""Does precision flip the direction of entropy? DAPO and ADAPO on the embedded task, log-probs in fp32 and in bf16.

Three ways to score the same policy, old and current log-probs alike: all in fp32; with the model's outputs rounded to
bf16 (log-probs and entropies, as FSDP2's output_dtype does it, gradients included); and with hidden states, head and
logits in bf16 before an fp32 log-softmax, as mixed precision does it. Weights and sampling stay fp32.

Every cell is one run in a process of its own; a finished cell is never run again, a killed one starts afresh. Then the
tables and the picture are made from the run directories: docs/results/numerics.md, .json.gz and .svg; `--only-table`
makes the page from the figures that are there.

    python bench/numerics.py [--runs DIR] [--seeds 0 1 2 3 4] [--jobs 2] [--steps 800] [--report-only | --only-table]
"""

import argparse
import json
import statistics
from pathlib import Path

from results import ROOT, load, made, pyplot, run_cells, save, save_figure, table

# The settings of a run on the embedded task.
SHARED = {"prompts": 32, "generations": 16, "updates": 4, "learning_rate": 5e-4, "warmup": 50}
# The fused head makes fp32 logits of bf16 hidden states, and so would undo the cast.
SHARED |= {"head": "trl"}
RECIPES = {"dapo": {"recipe": "dapo"}, "adapo": {"recipe": "adapo", "target": "80%"}}
CASTS = {"fp32": None, "bf16 log-probs": "returned", "bf16 head": "head"}
CELLS = [(recipe, cast) for recipe in RECIPES for cast in CASTS]
PROBE = 10  # optimizer steps between two comparisons with fp32
TAIL = 0.1


def trainer_class(cast):
    """IsentropicTrainer over a GRPOTrainer that scores with a cast, and that compares with fp32 now and then."""
    import torch
    from trl import GRPOTrainer

    from isentropic.engines.trl import EntropyControlMixin

    def to_bf16(module, args, output):
        output.last_hidden_state = output.last_hidden_state.bfloat16()
        return output

    class Casting(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, ids, attention, num, **kwargs):
            native = super()._get_per_token_logps_and_entropies
            if cast == "head":
                hook = self.accelerator.unwrap_model(model).base_model.register_forward_hook(to_bf16)
                try:
                    out = native(model, ids, attention, num, **kwargs)
                finally:
                    hook.remove()
            else:
                out = native(model, ids, attention, num, **kwargs)
            if cast == "returned":
                out = tuple(x if x is None else x.bfloat16().float() for x in out)
            if torch.is_grad_enabled() and self.state.global_step % PROBE == 0:
                with torch.no_grad():
                    exact = native(model, ids, attention, num, **kwargs)
                self._compare(out, exact, attention[:, -num:].bool())
            return out

        def _compare(self, out, exact, at):
            error = (out[0].detach() - exact[0])[at]
            row = {"step": self.state.global_step + 1, "entropy/exact": exact[1][at].mean().item()}
            row |= {"logp/error_mean": error.mean().item(), "logp/error_rms": error.square().mean().sqrt().item()}
            self.record.append("numerics", {**row, "entropy/read": out[1].detach()[at].mean().item()})

    class CastingTrainer(EntropyControlMixin, Casting):
        _name = "isentropic"

    return CastingTrainer


def work(recipe, cast, seed, steps, out):
    """One cell, in this process."""
    from isentropic.experiments import train as training
    from isentropic.experiments import trainer
    from isentropic.experiments.config import load
    from isentropic.models.loading import quiet

    trainer.IsentropicTrainer = trainer_class(CASTS[cast])
    quiet()
    settings = {**SHARED, **RECIPES[recipe], "steps": steps, "seed": seed, "save_every": 0, "out": str(out)}
    # The cast is what is studied: there is nothing to warn of.
    training.train(load(None, {**settings, "audit": "off"}))


def directory(home, recipe, cast, seed):
    return home / f"{recipe}-{cast.replace(' ', '-')}-s{seed}"


def cell_of(recipe, cast, seed, options):
    work = ["--work", recipe, cast, seed, "--steps", options.steps, "--runs", options.runs]
    return f"{recipe}, {cast}, seed {seed}", directory(options.runs, recipe, cast, seed), [__file__, *work]


def mean(rows, name):
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else None


def figures(record):
    """One run in numbers; entropy is that of the fp32 comparison, whatever the run itself read."""
    summary = json.loads((record.path / "summary.json").read_text(encoding="utf-8"))
    rows, probes = record.rows("metrics"), record.rows("numerics")
    last = rows[-1]["step"]
    tail = [row for row in probes if row["step"] > (1 - TAIL) * last] or probes[-1:]
    start, end = probes[0]["entropy/exact"], mean(tail, "entropy/exact")
    return {
        "steps": last,
        "H start": start,
        "H end": end,
        "change": end / start - 1,
        "lowest H": min(row["entropy/exact"] for row in probes),
        "highest H": max(row["entropy/exact"] for row in probes),
        "reading off": mean([{"x": abs(row["entropy/read"] - row["entropy/exact"])} for row in probes], "x"),
        "log-prob error": mean(probes, "logp/error_rms"),
        "log-prob bias": mean(probes, "logp/error_mean"),
        "ratio mean − 1": mean(rows, "ratio/mean") - 1,
        "clipped high": mean(rows, "clip/high_frac"),
        "clipped low": mean(rows, "clip/low_frac"),
        "reward": summary["reward/end"],
        "pass@1": summary.get("end", {}).get("pass@1"),
        "distinct": summary.get("end", {}).get("distinct"),
    }


def collect(options):
    from isentropic.runs.record import Record

    cells = {}
    for recipe, cast in CELLS:
        for seed in options.seeds:
            record = Record(directory(options.runs, recipe, cast, seed))
            if (record.path / "summary.json").exists():
                cells.setdefault(f"{recipe}, {cast}", {})[str(seed)] = figures(record)
    return cells


def show(values):
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.3g} ({min(values):.3g}..{max(values):.3g})"


def by_cell(cells):
    names = list(next(iter(next(iter(cells.values())).values())))
    rose = [f"{sum(f['change'] > 0 for f in by_seed.values())} of {len(by_seed)}" for by_seed in cells.values()]
    rows = [["entropy rose in", *rose]]
    rows += [[name, *(show([f[name] for f in by_seed.values()]) for by_seed in cells.values())] for name in names]
    return table(["", *cells], rows)


def differences(cells):
    """bf16 minus fp32 at the same seed: the mean, and its 95 % interval over seeds."""
    from isentropic.runs.statistics import mean_interval

    rows, result = [], {}
    for recipe, cast in CELLS:
        exact, other = cells.get(f"{recipe}, fp32", {}), cells.get(f"{recipe}, {cast}", {})
        seeds = sorted(set(exact) & set(other), key=int)
        if cast == "fp32" or not seeds:
            continue
        flips = sum((exact[s]["change"] > 0) != (other[s]["change"] > 0) for s in seeds)
        row = {"pairs": len(seeds), "flips": flips}
        for name in ("H end", "reward", "pass@1"):
            gaps = [other[s][name] - exact[s][name] for s in seeds if None not in (other[s][name], exact[s][name])]
            row[name] = {"by_seed": gaps}
            if gaps:
                bounds = mean_interval(gaps)
                row[name] |= {"mean": statistics.mean(gaps), "interval": None if bounds is None else list(bounds)}
        result[f"{recipe}, {cast}"] = row
        gaps = [interval(row[name]) for name in ("H end", "reward", "pass@1")]
        rows.append([f"{recipe}, {cast} − fp32", str(len(seeds)), str(flips), *gaps])
    return table(["", "pairs", "directions that differ", "H end", "reward", "pass@1"], rows), result


def interval(gap):
    if "mean" not in gap:
        return "-"
    bounds = gap["interval"]
    return f"{gap['mean']:+.3f}" + ("" if bounds is None else f" [{bounds[-2]:+.3f}, {bounds[-1]:+.3f}]")


def report(options):
    from isentropic.runs.record import Record

    cells = collect(options)
    if not cells:
        raise SystemExit(f"no finished run under {options.runs}; run without --report-only first")
    recipe, cast = next((r, c) for r, c in CELLS if f"{r}, {c}" in cells)
    seed = next(iter(cells[f"{recipe}, {cast}"]))
    header = Record(directory(options.runs, recipe, cast, seed)).header()
    line = made(header["versions"], f"seeds {options.seeds}", threads="one thread a run")
    shared = {**SHARED, "steps": header["config"]["steps"]}
    facts = {"made": line, "shared": shared, "cells": cells, "differences": differences(cells)[1]}
    save("numerics.json.gz", facts)
    draw(options, cells)


def page(facts):
    """The Markdown page of what the JSON file holds."""
    return f"""# Does precision flip the direction of entropy?

One command, `python bench/numerics.py`, makes this page, [the figures by seed](numerics.json.gz) and
[the picture](numerics.svg). {facts["made"]}.

The embedded task and model; batches of 32 prompts x 16 samples, four optimizer steps each; learning rate 5e-4 with
linear decay. Three ways to score the same policy, old and current log-probs alike: in fp32; with returned log-probs
and entropies rounded to bf16; with hidden states, head and logits in bf16. Weights and sampling are fp32 throughout.
ADAPO is asked for 80 % of the initial entropy. Entropy is measured in fp32 on the tokens of every {PROBE}th step,
whatever the run itself read; *end* is the last tenth of the steps, and log-prob errors are against fp32, in nats.

## By cell: mean over seeds (lowest..highest)

{by_cell(facts["cells"])}

## The same seed in bf16 and in fp32: mean difference [95 % interval over seeds, Student's t]

{differences(facts["cells"])[0]}

![Entropy by step](numerics.svg)
"""


def draw(options, cells):
    from isentropic.runs.record import Record

    plt = pyplot()
    figure, axes = plt.subplots(1, len(RECIPES), figsize=(9, 3.2), sharey=True)
    colours = {"fp32": "#0072b2", "bf16 log-probs": "#d55e00", "bf16 head": "#009e73"}
    for axis, recipe in zip(axes, RECIPES, strict=True):
        for cast, colour in colours.items():
            by_seed = cells.get(f"{recipe}, {cast}", {})
            for seed in by_seed:
                rows = Record(directory(options.runs, recipe, cast, seed)).rows("numerics")
                label = {"label": cast} if seed == min(by_seed) else {}
                first = {row["step"]: row["entropy/exact"] for row in rows}
                axis.plot(list(first), list(first.values()), color=colour, lw=1, alpha=0.7, **label)
        axis.set(title=recipe, xlabel="optimizer steps", ylim=(0, None))
    axes[0].set_ylabel("nats per token, in fp32")
    axes[0].legend(frameon=False, fontsize=8)
    save_figure(figure, "numerics.svg")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "numerics")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("--work", nargs=3, metavar=("RECIPE", "CAST", "SEED"), help="run this one cell here")
    options = parser.parse_args()
    if options.work:
        recipe, cast, seed = options.work
        work(recipe, cast, int(seed), options.steps, directory(options.runs, recipe, cast, seed))
        return
    if not options.report_only and not options.only_table:
        cells = [cell_of(recipe, cast, seed, options) for seed in options.seeds for recipe, cast in CELLS]
        run_cells(cells, options.jobs)
    if not options.only_table:
        report(options)
    text = page(load("numerics.json.gz"))
    save("numerics.md", text)
    print(text)


if __name__ == "__main__":
    main()
