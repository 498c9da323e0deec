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
    from trl_case import save_model

    return save_model(tmp_path_factory.mktemp("model"))


def run(model, out, world=1, **options):
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world), "--master_port", port]
    command = [*launch, str(HERE / "worker.py"), model, str(out), json.dumps({"world": world, **options})]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    (out / "stderr.txt").write_text(done.stderr)
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


def test_every_recipe_trains(model, tmp_path):
    """One worker, all recipes after another; those that read whole rows and old entropies also on packed rows."""
    from isentropic.recipes import RECIPES

    rows = ["aent", "lp-reg", "erc"]
    found = run(
        model, tmp_path / "padded", recipes=[*rows, *(name for name in RECIPES if name not in rows)], policy_loss={}
    )[0]
    assert set(found) == set(RECIPES)
    for name, recipe in found.items():
        assert all(0 < x < 5 for x in recipe["entropy/mean"]), name
        assert recipe["moved"] > 0, name
    packed = run(model, tmp_path / "packed", recipes=rows, policy_loss={}, packed=True)[0]
    for name in rows:
        assert packed[name]["loss"] == pytest.approx(found[name]["loss"], rel=1e-4, abs=1e-6), name
        assert packed[name]["grad_norm"] == pytest.approx(found[name]["grad_norm"], rel=1e-3), name


def test_the_first_micro_batch_is_audited_once(alone, model, tmp_path):
    """In fp32 nothing is found; in bf16, with a sampler that is off, rank 0 alone says what, and what to set."""
    calm = json.loads((alone[0] / "run/audit.json").read_text())
    assert calm["serious"] == 0
    assert calm["checked"]["logits"] == calm["checked"]["head"] == "float32"
    assert calm["checked"]["old_logp"] == "compared"
    assert calm["figures"]["ratio_error"] < 1e-5
    run(model, tmp_path, 2, policy_loss={"folder": str(tmp_path / "run")}, param_dtype="bf16", noise=0.05, batches=1)
    report = json.loads((tmp_path / "run/audit.json").read_text())
    found = {f["code"]: f for f in report["findings"]}
    assert {"logits_dtype", "sampler_mismatch"} <= set(found)
    assert found["sampler_mismatch"]["nats"] == pytest.approx(0.05, rel=0.2)
    assert "mixed_precision.param_dtype=fp32" in found["logits_dtype"]["remedy"]
    assert report["checked"]["autocast"] == "bfloat16"
    assert report["checked"]["sampler_logp"] == "compared"
    warnings = [line for line in (tmp_path / "stderr.txt").read_text().splitlines() if "audit: " in line]
    assert len(warnings) == report["serious"] >= 2


def test_without_our_engine_the_loss_alone_holds_by_sampled_entropies(model, tmp_path):
    loss = {"recipe": "adapo", "recipe_options": {"every": 1}, "target": "3.0", "loss_mode": "isentropic"}
    found = run(model, tmp_path, 2, policy_loss=loss, foreign=True)
    assert found[0]["engine"] == "FSDPEngineWithLMHead"
    (first, second) = (batch["knob/value"] for batch in found[0]["logged"])
    assert [*first, *second] == [batch for rank in found[1]["logged"] for batch in rank["knob/value"]]
    assert first[0] == 0.28
    assert len({*first, *second}) == 4
    sampled = [x for batch in found[0]["logged"] for x in batch["entropy/sampled"]]
    assert len(sampled) == 3  # the reading of a step is there in the next one
    # The tokens of these tests are drawn at random, not by the policy, so that −log π lies above its entropy of 2.7.
    assert all(6 < x < 7.5 for x in sampled)
    said = [line for line in (tmp_path / "stderr.txt").read_text().splitlines() if "is not wrapped" in line]
    assert len(said) == 1
