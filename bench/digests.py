"""Digests of short reference runs: run it before and after a change that must not change a number.

Runs of 60 optimizer steps on the embedded task, two tasks in sequence, the tabular engine, and with `--verl` one worker
of verl. A digest is of metrics.jsonl without times, of the weights, of the controller's state (its numbers in their
order, whatever the fields are called), of the evaluations and of the samples. Digests depend on the processor and on
the versions: compare those of one machine.

    python bench/digests.py before.json              # at the old commit
    python bench/digests.py after.json --against before.json
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT = "--steps 60 --seed 0 --eval-k 4 --eval-rows 20 --save-every 20".split()
RUNS = {
    name: ["--recipe", name]
    for name in "isentropic grpo adapo repo-d-loop lp-reg stare dcpo clip-cov kl-cov aent erc qae entrocraft".split()
} | {
    "entropy-bonus under pi": "--recipe entropy-bonus --knob entropy_coef --controller pi".split(),
    "gspo with zeta": "--recipe gspo --knob zeta".split(),
    "TRL's head": "--recipe adapo --head trl --explain-every 3".split(),
    "then": "--recipe isentropic --then expr-digit --steps 40 --then-steps 20".split(),
}
TABULAR = "isentropic adapo stare aent kl-cov clip-cov repo-d-loop gspo dcpo entropic grpo erc".split()
# As tests/engines/verl holds one worker.
HELD = {"recipe": "repo-r-loop", "recipe_options": {"every": 1, "knob_start": 0.01}, "target": "3.0"}


def digest(value):
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def numbers(state):
    """The leaves of nested dicts and lists, in their order."""
    if isinstance(state, dict):
        return [x for value in state.values() for x in numbers(value)]
    return [x for value in state for x in numbers(value)] if isinstance(state, list) else [state]


def rows(path, drop=()):
    return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in path.read_text().splitlines()]


def controller_digest(state):
    return None if state is None else digest(numbers([state["controller"], state["target"]]))


def train(name, home):
    from safetensors import safe_open

    out = home / name.replace(" ", "-")
    command = [sys.executable, "-m", "isentropic.cli", "train", *SHORT, *RUNS[name], "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    weights = hashlib.sha256()
    with safe_open(str(last / "model.safetensors"), "np") as file:
        for key in sorted(file.keys()):
            weights.update(key.encode() + file.get_tensor(key).tobytes())
    return {
        "metrics": digest(rows(out / "metrics.jsonl", ("seconds",))),
        "weights": weights.hexdigest()[:16],
        "controller": controller_digest(json.loads((last / "isentropic.json").read_text())["state"]),
        "evaluations": digest(rows(out / "evaluations.jsonl")),
        "samples": digest(rows(out / "samples.jsonl")),
    }


def tabular(name):
    import numpy as np

    from isentropic.engines.tabular import simulate
    from isentropic.recipes import compose

    run = simulate(compose(name), 80, seed=1)
    return {field: digest(np.nan_to_num(getattr(run, field), nan=-9.0).tobytes()) for field in run._fields}


def verl_worker(home):
    """One worker of verl over fixed data, by its own environment's Python."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from trl_case import save_model

    model, out = save_model(home / "model"), home / "verl"
    out.mkdir()
    options = {"world": 1, "policy_loss": {**HELD, "folder": str(out / "run")}}
    launch = [
        str(ROOT / ".venv-verl/bin/python"),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "1",
    ]
    command = [*launch, str(ROOT / "tests/engines/verl/worker.py"), model, str(out), json.dumps(options)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rank = json.loads((out / "rank-0.json").read_text())
    return {
        "metrics": digest(rows(out / "run" / "metrics.jsonl", ("seconds",))),
        "weights": digest(rank["weights"]),
        "controller": controller_digest(rank["state"]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="where the digests are written, as JSON")
    parser.add_argument("--against", type=Path, help="digests of another commit; differences are printed, exit code 1")
    parser.add_argument("--verl", action="store_true", help="one worker of verl too")
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS), help="some of the runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        found = {f"tabular {name}": tabular(name) for name in TABULAR}
        if options.verl:
            found["verl worker"] = verl_worker(home)
        for i, name in enumerate(options.only, 1):
            found[name] = train(name, home)
            print(f"[{i}/{len(options.only)}] {name}: {found[name]}", flush=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.against is None:
        return 0
    before = json.loads(options.against.read_text())
    differ = [f"{run}: {key}" for run in found for key in found[run] if found[run][key] != before.get(run, {}).get(key)]
    print("\n".join(["equal" if not differ else "different:", *differ]))
    return 1 if differ else 0


if __name__ == "__main__":
    raise SystemExit(main())
