"""What trackers get by `report_to`: our names, offline. Skipped where one is not installed; tensorboard: test_docs."""

import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("trl")
from trl_case import make

from isentropic.engines.trl import IsentropicConfig, IsentropicTrainer
from isentropic.runs.record import Record

ROOMS = ("entropy", "knob", "clip", "ratio", "cov", "adv", "predict")
EXPECTED = {"entropy/mean", "entropy/target", "knob/value", "clip/high_frac", "cov/adv_logp"}


def need(name):
    if find_spec(name) is None:
        pytest.skip(f"needs {name}, which no extra installs; see Trackers in docs/trl.md")


def two_steps(out, tracker, **settings):
    """Train two steps under a tracker; see numbers."""
    settings |= {"recipe": "dapo", "knob": "zeta", "recipe_options": {"every": 1}, "report_to": tracker}
    make(IsentropicTrainer, IsentropicConfig, out, 2, **settings, run_name="two-steps").train()
    return numbers(out)


def numbers(out):
    """The rows of metrics.jsonl, and what of the first a tracker must hold."""
    rows = Record(out).rows("metrics")
    assert len(rows) == 2
    return {k: v for k, v in rows[0].items() if k.split("/")[0] in ROOMS and isinstance(v, int | float)}, rows


def has_ours(seen, ours, rows, before="train/"):
    """A tracker has all our names behind what transformers puts before them, and the last entropy of metrics.jsonl."""
    assert EXPECTED - set(ours) <= {"entropy/target"}
    assert {before + name for name in ours} <= set(seen)
    assert seen[f"{before}entropy/mean"] == pytest.approx(rows[-1]["entropy/mean"], rel=1e-6)


def test_wandb_offline_has_our_names(tmp_path, monkeypatch):
    need("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    ours, rows = two_steps(tmp_path / "run", "wandb")
    import wandb

    summary = {key: wandb.run.summary[key] for key in wandb.run.summary.keys()}  # noqa: SIM118
    wandb.finish()
    has_ours(summary, ours, rows)
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert kept.stat().st_size > 0


def test_mlflow_in_sqlite_has_our_names(tmp_path, monkeypatch):
    need("mlflow")
    need("sqlalchemy")  # mlflow-skinny is without; its file store cannot hold TRL's `entropy` beside `entropy/mean`
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    ours, rows = two_steps(tmp_path / "run", "mlflow")
    import mlflow

    mlflow.flush_async_logging()
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    mlflow.end_run()
    has_ours(run.data.metrics, ours, rows, before="")


def test_trackio_in_the_run_directory_has_our_names(tmp_path):
    need("trackio")
    # Trackio reads its directory once, as it is imported, and TRL imports it: hence a process of its own.
    code = (
        "import sys; from test_trl_trackers import two_steps; two_steps(sys.argv[1], 'trackio', project='isentropic')"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[2] / "helpers"), *filter(None, sys.path)])
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "run" / "trackio"), "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=env, check=True, timeout=300)
    ours, rows = numbers(tmp_path / "run")
    with sqlite3.connect(tmp_path / "run" / "trackio" / "isentropic.db") as base:
        logged = [json.loads(text) for (text,) in base.execute("select metrics from metrics order by id")]
    has_ours({name: value for row in logged for name, value in row.items()}, ours, rows)
