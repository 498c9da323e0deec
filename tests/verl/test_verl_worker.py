"""verl's own worker, FSDP2 on gloo: the reading, the controller and the loss, in one process and in two."""

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

try:
    version("verl")  # not by import: this directory would be found as a package of that name
except PackageNotFoundError:
    pytest.skip("verl has an environment of its own: make test-verl", allow_module_level=True)

HERE = Path(__file__).parent
HELD = {"recipe": "repo-r-loop", "recipe_options": {"every": 1, "knob_start": 0.01}, "target": "3.0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sys.path.insert(0, str(HERE.parent / "engines"))
    from trl_case import save_model

    return save_model(tmp_path_factory.mktemp("model"))


def run(model, out, world=1, fails=None, **options):
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", port]
    command = [*launch, str(HERE / "worker.py"), model, str(out), json.dumps({"world": world, **options})]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=200)
    if fails:
        assert done.returncode != 0
        assert fails in done.stderr
        return None
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world)]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    found = run(model, out, policy_loss={**HELD, "folder": str(out / "run")})
    return out, found[0]


def test_the_engine_is_ours_and_logs_by_our_names(alone):
    out, found = alone
    assert found["engine"] == "IsentropicFSDPEngineWithLMHead"
    logged = [x for batch in found["logged"] for x in batch["entropy/mean"]]
    read = rows(out / "run")
    assert [row["entropy/mean"] for row in read] == logged
    assert [row["step"] for row in read] == [1, 2, 3, 4]


def test_the_knob_follows_the_controller_on_the_recorded_readings(alone):
    from isentropic.recipes import build_thermostat, compose
    from isentropic.types import EntropyReading

    out, found = alone
    thermostat = build_thermostat(compose(HELD["recipe"], target="3.0", **HELD["recipe_options"]))
    state = thermostat.init()
    for row in rows(out / "run"):
        assert state.value == row["knob/value"]
        tokens = row["entropy/tokens"]
        state = thermostat.update(state, EntropyReading(row["entropy/mean"] * tokens, tokens))
    assert state.value == found["state"]["controller"]["value"]
    assert len({row["knob/value"] for row in rows(out / "run")}) > 1


@pytest.mark.parametrize("options", [{"world": 2}, {"micro": 2}, {"packed": True}], ids=str)
def test_the_reading_is_over_the_step_however_it_is_cut(alone, model, tmp_path, options):
    out, _ = alone
    found = run(model, tmp_path, policy_loss={**HELD, "folder": str(tmp_path / "run")}, **options)
    assert all(rank["state"] == found[0]["state"] for rank in found)
    for ours, theirs in zip(rows(tmp_path / "run"), rows(out / "run"), strict=True):
        assert ours["entropy/tokens"] == theirs["entropy/tokens"]
        assert ours["knob/value"] == theirs["knob/value"]
        for name in ("entropy/mean", "cov/adv_logp", "adv/mean", "ratio/mean"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), name
        for name in ("predict/change", "predict/gain"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-7), name


def test_with_shaping_off_weights_are_verls_bit_for_bit(model, tmp_path):
    plain = run(model, tmp_path / "plain")[0]
    assert plain["engine"] == "FSDPEngineWithLMHead"
    watched = run(model, tmp_path / "watched", policy_loss={})[0]
    zero = {"recipe": "dapo", "recipe_options": {"shaping": "repo_r", "zeta": 0.0, "clip_high": 0.2}}
    through = run(model, tmp_path / "through", policy_loss=zero)[0]
    assert plain["weights"] == watched["weights"] == through["weights"]


def test_a_resumed_worker_ends_where_the_uninterrupted_one_does(alone, model, tmp_path):
    out, straight = alone
    saved, held = str(tmp_path / "saved"), {**HELD, "folder": str(tmp_path / "run")}
    run(model, tmp_path / "a", policy_loss=held, batches=1, save=saved)
    resumed = run(model, tmp_path / "b", policy_loss=held, batches=1, first=1, resume=saved)[0]
    assert resumed["state"] == straight["state"]
    assert resumed["weights"] == straight["weights"]
    strip = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(tmp_path / "run")]
    assert strip == [{k: v for k, v in row.items() if k != "seconds"} for row in rows(out / "run")]


@pytest.mark.parametrize("name", ["adapo", "gspo", "isentropic", "entropy-bonus-adaptive", "kl-cov", "sapo"])
def test_recipes_train(model, tmp_path, name):
    from isentropic.engines.verl_plugin import AGG_MODES
    from isentropic.recipes import RECIPES

    actor = {"loss_agg_mode": AGG_MODES[RECIPES[name].reduction]}
    found = run(model, tmp_path, policy_loss={"recipe": name}, actor=actor, batches=1)[0]
    assert all(x > 0 for x in found["logged"][0]["entropy/mean"])


def test_what_cannot_work_is_refused_with_the_remedy(model, tmp_path):
    loss = {"recipe": "loop", "adv_estimator": "grpo"}
    run(model, tmp_path, policy_loss=loss, fails="needs algorithm.adv_estimator=rloo")
    run(model, tmp_path, policy_loss={"recipe": "grpo"}, fails="loss_agg_mode=seq-mean-token-mean, got token-mean")
