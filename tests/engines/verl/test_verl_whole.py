"""The whole of verl on the embedded task: main_ppo with Ray, transfer queue, agent loop, logger, checkpoints."""

import json
import os
import re
import signal
import time
from importlib.metadata import PackageNotFoundError, version

import pytest

try:
    version("verl")  # not by import: this directory would be found as a package of that name
except PackageNotFoundError:
    pytest.skip("verl has an environment of its own: make test-verl", allow_module_level=True)

from whole import lines, prepare, start

SECONDS = 400  # a run takes 40 to 60 s where two cores are free
UPDATES = 2  # optimizer steps a generated batch
SMALL = """
    data.train_batch_size=16 actor_rollout_ref.actor.ppo_mini_batch_size=8 actor_rollout_ref.rollout.n=8
    actor_rollout_ref.actor.optim.lr=5e-4 trainer.save_freq=1
""".split()
# What TRL's log and metrics.jsonl call the same figures.
NAMES = {
    *("entropy/mean", "entropy/tokens", "entropy/refused", "entropy/target", "entropy/error"),
    *("knob/value", "knob/saturated", "clip/low_frac", "clip/high_frac", "ratio/mean", "ratio/outside_frac"),
    *("cov/adv_logp", "adv/mean", "predict/change", "predict/gain"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from isentropic.models.tiny import TinySettings

    return prepare(tmp_path_factory.mktemp("home"), TinySettings(steps=300))


def run(home, out, *flags, workers=1):
    process = start(home, out, *SMALL, *flags, workers=workers)
    try:
        code = process.wait(timeout=SECONDS)
    finally:
        process.terminate()
    assert code == 0, (out / "output.txt").read_text()[-4000:]


def last_step(out):
    path = out / "checkpoints/latest_checkpointed_iteration.txt"
    return int(path.read_text()) if path.exists() else 0


def sidecar(out, step):
    return json.loads((out / f"checkpoints/global_step_{step}/actor/isentropic.json").read_text())


def rows(out):
    return lines(out / "checkpoints/isentropic/metrics.jsonl")


def replayed(recipe, read, steps=None):
    """The controller on the readings of these rows: its knob must be that of each row; its state in the end."""
    from isentropic.control.thermostat import to_json
    from isentropic.recipes import build_thermostat
    from isentropic.types import EntropyReading

    thermostat = build_thermostat(recipe, steps)
    state = thermostat.init()
    for row in read:
        assert row["knob/value"] == state.value
        tokens = row["entropy/tokens"]
        reading = EntropyReading(row["entropy/mean"] * tokens, tokens, rate=row["learning_rate"])
        state = thermostat.update(state, reading, act=row["step"] % UPDATES == 0)
    return to_json(state)


# A selection that keeps every token, and writes down what it sees of the groups.
SEEING = """
import json
import torch


def every(logp, reward, group_rate):
    with open(__file__ + ".seen", "a") as seen:
        seen.write(json.dumps([reward.tolist(), group_rate.tolist()]) + "\\n")
    return torch.ones_like(logp)
"""


@pytest.fixture(scope="module")
def held(home, tmp_path_factory):
    out = tmp_path_factory.mktemp("held")
    (out / "seeing.py").write_text(SEEING)
    options = f"{{selection: '{out}/seeing.py:every'}}"
    flags = ["+isentropic=repo-r-loop", "actor_rollout_ref.actor.policy_loss.target=anneal:80%:40%"]
    flags += [f"actor_rollout_ref.actor.policy_loss.recipe_options={options}"]
    run(home, out, *flags, "trainer.total_training_steps=3")
    return out


def test_verls_own_loggers_have_our_figures_by_the_names_of_trl(held):
    logged, ours = lines(held / "verl.jsonl"), rows(held)
    assert [x["step"] for x in logged] == [1, 2, 3]
    assert [x["step"] for x in ours] == [1, 2, 3, 4, 5, 6]
    for turn, entry in enumerate(logged):
        part = ours[turn * UPDATES : (turn + 1) * UPDATES]
        for name in NAMES:
            assert entry["data"][f"actor/{name}"] == pytest.approx(sum(row[name] for row in part) / UPDATES), name
    console = (held / "output.txt").read_text()
    assert re.search(r"step:3 .* actor/entropy/mean:\d\.\d+ .* actor/knob/value:\d", console)


def test_the_reading_is_the_entropy_that_verl_sees(held):
    for entry in lines(held / "verl.jsonl"):
        # verl's own mean, of the same batch before its first update: two small steps lie between them at most.
        assert entry["data"]["actor/entropy/mean"] == pytest.approx(entry["data"]["actor/entropy"], rel=0.1)


def test_a_falling_target_goes_over_the_steps_that_verls_trainer_plans(held):
    start = rows(held)[0]["entropy/mean"]
    wanted = [(0.8 - 0.4 * step / 5) * start for step in range(6)]
    assert [row["entropy/target"] for row in rows(held)] == pytest.approx(wanted)


def test_the_knob_follows_the_controller_exactly(held):
    from isentropic.recipes import compose

    assert replayed(compose("repo-r-loop", target="anneal:80%:40%"), rows(held), 6) == sidecar(held, 3)["state"]
    assert len({row["knob/value"] for row in rows(held)}) > 1


def test_a_component_from_a_file_sees_the_groups_of_the_batch(held):
    """16 prompts of 8 answers, right or wrong: rates are eighths, and their mean is the mean reward that verl logs."""
    seen = lines(held / "seeing.py.seen")
    assert len(seen) == 3 * UPDATES * 2  # batches, optimizer steps, micro-batches of 32
    for turn, entry in enumerate(lines(held / "verl.jsonl")):
        part = seen[turn * UPDATES * 2 : (turn + 1) * UPDATES * 2]
        rewards, rates = ([x for micro_batch in part for x in micro_batch[i]] for i in (0, 1))
        assert len(rewards) == len(rates) == 16 * 8
        assert set(rewards) <= {0.0, 1.0}
        assert all((8 * rate).is_integer() for rate in rates)
        assert all(rate > 0 for reward, rate in zip(rewards, rates, strict=True) if reward)
        mean = entry["data"]["critic/score/mean"]
        assert sum(rewards) / 128 == pytest.approx(mean) == pytest.approx(sum(rates) / 128)


def test_a_trainer_that_samples_ahead_is_read_and_controlled_and_says_how_old_its_samples_are(home, tmp_path):
    """The batch that is trained on was sampled while the one before was: one version, UPDATES optimizer steps."""
    from isentropic.recipes import compose

    flags = ["trainer.v1.trainer_mode=colocate_async", "algorithm.rollout_correction.rollout_is=token"]
    run(home, tmp_path, "+isentropic=adapo", *flags, "trainer.total_training_steps=3")
    read, logged = rows(tmp_path), [entry["data"] for entry in lines(tmp_path / "verl.jsonl")]
    assert [row["policy/age"] for row in read] == [0, 1, 2, 3, 2, 3]
    for turn, data in enumerate(logged):
        staleness = data["training/off_policy/trajectory_staleness/mean"]
        assert staleness == (turn > 0)
        assert data["actor/policy/age"] == UPDATES * staleness + 0.5
        # The sampler's log-probs are those of older weights: what verl calls rollout_corr is our mismatch.
        assert data["actor/mismatch/kl"] == pytest.approx(data["rollout_corr/k3_kl"], rel=0.02, abs=1e-6)
        assert data["actor/entropy/mean"] == pytest.approx(data["actor/entropy"], rel=0.1)
        assert (data["actor/mismatch/kl"] > 1e-3) == (turn > 0)
    assert replayed(compose("adapo"), read) == sidecar(tmp_path, 3)["state"]
    assert len({row["knob/value"] for row in read}) > 1


def test_a_killed_worker_ends_the_run_and_its_checkpoint_resumes(home, tmp_path):
    from isentropic.recipes import compose

    process = start(home, tmp_path, *SMALL, "+isentropic=adapo", "trainer.total_training_steps=99", workers=2)
    output = tmp_path / "output.txt"
    try:
        until = time.monotonic() + SECONDS
        while last_step(tmp_path) < 2 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        workers = sorted({int(pid) for pid in re.findall(r"WorkerDict pid=(\d+)", output.read_text())})
        assert len(workers) == 2
        os.kill(workers[1], signal.SIGKILL)
        assert process.wait(timeout=SECONDS) == 1
    finally:
        process.terminate()
    assert "ActorDiedError" in output.read_text()

    step = last_step(tmp_path)
    saved, recipe = sidecar(tmp_path, step), compose("adapo")
    before = [row for row in rows(tmp_path) if row["step"] <= saved["step"]]
    assert saved["step"] == step * UPDATES
    assert replayed(recipe, before) == saved["state"]

    run(home, tmp_path, "+isentropic=adapo", f"trainer.total_training_steps={step + 1}", workers=2)
    after = rows(tmp_path)
    assert after[: len(before)] == before
    assert [row["step"] for row in after] == list(range(1, (step + 1) * UPDATES + 1))
    assert after[len(before)]["knob/value"] == saved["state"]["controller"]["value"]
    assert replayed(recipe, after) == sidecar(tmp_path, step + 1)["state"]
