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
    return out, run(model, out, policy_loss={**HELD, "folder": str(out / "run")})[0]


def test_the_engine_is_ours_and_logs_by_our_names(alone):
    out, result = alone
    assert result["engine"] == "IsentropicFSDPEngineWithLMHead"
    logged = [x for batch in result["logged"] for x in batch["entropy/mean"]]
    read = rows(out / "run")
    assert [row["entropy/mean"] for row in read] == logged
    assert [row["step"] for row in read] == [1, 2, 3, 4]


def test_the_knob_follows_the_controller_on_the_recorded_readings(alone):
    from isentropic.recipes import build_thermostat, compose
    from isentropic.types import EntropyReading

    out, result = alone
    thermostat = build_thermostat(compose(HELD["recipe"], target="3.0", **HELD["recipe_options"]))
    state = thermostat.init()
    for row in rows(out / "run"):
        assert state.value == row["knob/value"]
        tokens = row["entropy/tokens"]
        state = thermostat.update(state, EntropyReading(row["entropy/mean"] * tokens, tokens))
    assert state.value == result["state"]["controller"]["value"]
    assert len({row["knob/value"] for row in rows(out / "run")}) > 1


@pytest.mark.parametrize("options", [{"world": 2}, {"micro": 2}, {"packed": True}], ids=str)
def test_the_reading_is_over_the_step_however_it_is_cut(alone, model, tmp_path, options):
    out, _ = alone
    ranks = run(model, tmp_path, policy_loss={**HELD, "folder": str(tmp_path / "run")}, **options)
    assert all(rank["state"] == ranks[0]["state"] for rank in ranks)
    for ours, theirs in zip(rows(tmp_path / "run"), rows(out / "run"), strict=True):
        assert ours["entropy/tokens"] == theirs["entropy/tokens"]
        assert ours["knob/value"] == theirs["knob/value"]
        assert "mismatch/kl" not in ours
        assert "reward/mean" not in ours
        for name in ("length/mean", "length/truncated_frac", "policy/age"):
            assert ours[name] == theirs[name], name
        for name in ("entropy/mean", "cov/adv_logp", "adv/mean", "ratio/mean", "ratio/ess_frac", "clip/entropy_share"):
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


def test_an_automatic_target_is_told_of_the_groups_and_resumes(model, tmp_path):
    held = {**HELD, "target": "auto:success:failing=5%:memory=2:rate=0.1"}
    straight = run(model, tmp_path / "a", policy_loss={**held, "folder": str(tmp_path / "run")}, groups=True)[0]
    read = rows(tmp_path / "run")
    for row in read:
        assert sum(row[f"group/{name}_frac"] for name in ("failed", "mixed", "solved")) == pytest.approx(1.0)
        assert 0 <= row["group/repeats_frac"] <= 1
    assert read[-1]["entropy/target_why"].split(":")[0].split()[0] in ("raised", "lowered", "held")
    assert len({row["entropy/target"] for row in read}) > 1
    half = {**held, "folder": str(tmp_path / "half")}
    run(model, tmp_path / "b", policy_loss=half, groups=True, batches=1, save=str(tmp_path / "saved"))
    resumed = run(
        model, tmp_path / "c", policy_loss=half, groups=True, batches=1, first=1, resume=str(tmp_path / "saved")
    )[0]
    assert resumed["state"] == straight["state"]


def test_every_recipe_trains(model, tmp_path):
    """One worker, all recipes after another; those that read whole rows and old entropies also on packed rows."""
    from isentropic.recipes import RECIPES

    rows = ["aent", "lp-reg", "erc"]
    others = [name for name, recipe in RECIPES.items() if name not in rows and not recipe.redraws]
    padded = run(model, tmp_path / "padded", recipes=[*rows, *others], policy_loss={})[0]
    assert set(padded) == {*rows, *others}
    for name, recipe in padded.items():
        assert all(0 < x < 5 for x in recipe["entropy/mean"]), name
        assert recipe["moved"] > 0, name
    packed = run(model, tmp_path / "packed", recipes=rows, policy_loss={}, packed=True)[0]
    for name in rows:
        assert packed[name]["loss"] == pytest.approx(padded[name]["loss"], rel=1e-4, abs=1e-6), name
        assert packed[name]["grad_norm"] == pytest.approx(padded[name]["grad_norm"], rel=1e-3), name


def test_the_first_micro_batch_is_audited_once(alone, model, tmp_path):
    """In fp32 nothing is found; in bf16, with a sampler that is off, rank 0 alone says what, and what to set."""
    calm = json.loads((alone[0] / "run/audit.json").read_text())
    assert calm["serious"] == 0
    assert calm["checked"]["logits"] == calm["checked"]["head"] == "float32"
    assert calm["checked"]["old_logp"] == "compared"
    assert calm["figures"]["ratio_error"] < 1e-5
    run(model, tmp_path, 2, policy_loss={"folder": str(tmp_path / "run")}, param_dtype="bf16", noise=0.2, batches=1)
    report = json.loads((tmp_path / "run/audit.json").read_text())
    findings = {f["code"]: f for f in report["findings"]}
    assert {"logits_dtype", "sampler_mismatch"} <= set(findings)
    assert findings["sampler_mismatch"]["nats"] == pytest.approx(0.2, rel=0.2)
    assert "mixed_precision.param_dtype=fp32" in findings["logits_dtype"]["remedy"]
    assert report["checked"]["autocast"] == "bfloat16"
    assert report["checked"]["sampler_logp"] == "compared"
    warnings = [line for line in (tmp_path / "stderr.txt").read_text().splitlines() if "audit: " in line]
    assert len(warnings) == report["serious"] >= 1


@pytest.mark.parametrize("world", [1, 2])
def test_answers_and_the_mismatch_by_the_data_that_went_in(model, tmp_path, world):
    """Lengths, rewards and the noise on the sampler's log-probs are drawn here as worker.py draws them."""
    import torch

    loss, noise = {**HELD, "folder": str(tmp_path / "run")}, 0.3
    ranks = run(model, tmp_path, world, policy_loss=loss, noise=noise, groups=True)
    read, size = rows(tmp_path / "run"), 16 // world
    for number, row in enumerate(read):
        seed, step = divmod(number, 2)
        generator = torch.Generator().manual_seed(seed)
        torch.randint(3, 90, (32, 12), generator=generator)
        lengths = torch.randint(1, 9, (32,), generator=generator)[step * 16 : step * 16 + 16]
        assert row["length/mean"] == lengths.double().mean().item()
        assert row["length/truncated_frac"] == (lengths == 8).double().mean().item()
        rewards = ranks[0]["rewards"][seed][step * 16 : step * 16 + 16]
        assert row["reward/mean"] == pytest.approx(sum(rewards) / 16)
        assert row["policy/age"] == step
        # Each rank draws the noise of its own rows, by the same seed.
        shift = noise * torch.randn((2 * size, 8), generator=torch.Generator().manual_seed(seed)).double()
        d = -shift[step * size : step * size + size].repeat(world, 1)[torch.arange(8) < lengths[:, None]]
        assert row["mismatch/kl"] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-4)
        assert row["mismatch/kl_k1"] == pytest.approx(-d.mean().item(), abs=1e-5)
        assert 0.5 < row["ratio/ess_frac"] <= 1 + 1e-9
        assert row["clip/dropped_frac"] == pytest.approx(row["clip/low_frac"] + row["clip/high_frac"])
    logged = {"length/mean", "length/truncated_frac", "reward/mean", "mismatch/kl", "policy/age", "ratio/ess_frac"}
    assert logged <= set(ranks[0]["logged"][0])


def test_without_our_engine_the_loss_alone_holds_by_sampled_entropies(model, tmp_path):
    loss = {"recipe": "adapo", "recipe_options": {"every": 1}, "target": "3.0", "loss_mode": "isentropic"}
    ranks = run(model, tmp_path, 2, policy_loss=loss, foreign=True)
    assert ranks[0]["engine"] == "FSDPEngineWithLMHead"
    (first, second) = (batch["knob/value"] for batch in ranks[0]["logged"])
    assert [*first, *second] == [batch for rank in ranks[1]["logged"] for batch in rank["knob/value"]]
    assert first[0] == 0.28
    assert len({*first, *second}) == 4
    sampled = [x for batch in ranks[0]["logged"] for x in batch["entropy/sampled"]]
    assert len(sampled) == 3  # the reading of a step is there in the next one
    # The tokens of these tests are drawn at random, not by the policy, so that −log π lies above its entropy of 2.7.
    assert all(6 < x < 7.5 for x in sampled)
    said = [line for line in (tmp_path / "stderr.txt").read_text().splitlines() if "is not wrapped" in line]
    assert len(said) == 1


MINE = """
import json
import os

from isentropic.control.controllers import Controller, Range, ValueState
from isentropic.control.targets import Target, TargetState
from isentropic.recipes import Knob, Shaping


def tilted(adv, reward, group_rate, tilt, floor):
    with open(f"{__file__}.{os.environ['RANK']}", "a") as seen:
        for pair in zip(reward.tolist(), group_rate.tolist(), strict=True):
            seen.write(json.dumps([*pair, floor]) + "\\n")
    return adv * (1 + tilt * group_rate.clamp(min=floor)[:, None])


TILTED = Shaping(
    "A·(1 + tilt·max(rate, floor))",
    tilted,
    reads={"reward", "group_rate"},
    constants={"tilt": 0.0, "floor": 0.25},
    knobs={"tilt": Knob(Range(0.5, 0.0, 2.0, 1e-3))},
)


def stepping(knob, size=0.1):
    def update(state, entropy, target):
        return ValueState(knob.clip(state.value + (size if entropy < target else -size)))

    return Controller(lambda: ValueState(knob.start), update)


def level(first, nats=1.0):
    def update(state, entropy, tokens):
        return state._replace(readings=state.readings + 1)

    return Target(TargetState, update, lambda state: nats, lambda state: False)
"""


@pytest.mark.parametrize("world", [1, 2])
def test_components_a_controller_and_a_target_from_a_file_see_whole_groups(model, tmp_path, world):
    """A group that ranks, steps and micro-batches cut has the rate of the whole batch: (mean − min)/(max − min)."""
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    loss = {
        "recipe": "loop",
        "knob": "tilt",
        "controller": f"{path}:stepping:size=0.25",
        "folder": str(tmp_path / "run"),
    }
    loss |= {
        "target": f"{path}:level:nats=3",
        "recipe_options": {"shaping": f"{path}:TILTED", "floor": 0.3, "every": 1},
    }
    ranks = run(model, tmp_path / "out", world, policy_loss=loss, groups=True)
    seen = [Path(f"{path}.{rank}").read_text().splitlines() for rank in range(world)]
    rates = {reward: rate for lines in seen for reward, rate, floor in map(json.loads, lines) if floor == 0.3}
    assert sum(len(set(lines)) for lines in seen) == len(rates) == 2 * 32
    for rewards in ranks[0]["rewards"]:
        groups = {name: [] for name in ranks[0]["groups"]}
        for name, reward in zip(ranks[0]["groups"], rewards, strict=True):
            groups[name].append(reward)
        assert sorted(map(len, groups.values())) == [4, 4, 4, 5, 5, 10]
        for members in groups.values():
            rate = (sum(members) / len(members) - min(members)) / (max(members) - min(members))
            assert [rates[reward] for reward in members] == pytest.approx([rate] * len(members), rel=1e-5)
    read = rows(tmp_path / "run")
    # Half up from the start while entropy is below 3 nats, then down again above it; the target is in force at once.
    knobs = [row["knob/value"] for row in read]
    assert knobs[0] == 0.5
    for before, after, row in zip(knobs, knobs[1:], read, strict=False):
        assert after == before + (0.25 if row["entropy/mean"] < 3 else -0.25)
    assert {row["entropy/target"] for row in read} == {3.0}
    assert all(row["predict/gain"] != 0 for row in read)
    recipe = json.loads((tmp_path / "run/run.json").read_text())["recipe"]
    for name, function in (("shaping", "tilted"), ("controller", "stepping"), ("target", "level")):
        assert recipe[name].startswith(f"mine.{function}@")
    assert recipe["constants"]["floor"] == 0.3


def test_ten_refused_readings_save_and_stop_on_all_ranks(model, tmp_path):
    """The first step is read; from the second on entropies are 0, and the eleventh ends the run."""
    held = {**HELD, "folder": str(tmp_path / "run")}
    ranks = run(model, tmp_path / "a", 2, policy_loss=held, broken_after=1, batches=6)
    saved = tmp_path / "run/refused-step-11"
    for rank in ranks:
        assert rank["error"].startswith("EntropyReadingError: 10 entropy readings in a row were refused: entropy is ex")
        assert str(saved) in rank["error"]
    assert {path.name for path in saved.glob("model_world_size_2_rank_*.pt")} == {
        f"model_world_size_2_rank_{rank}.pt" for rank in range(2)
    }
    state = json.loads((saved / "isentropic.json").read_text())
    assert (state["step"], state["refused"], state["state"]) == (11, 10, ranks[0]["state"])
    read = rows(tmp_path / "run")
    assert [row["entropy/refused"] for row in read] == [*range(11)]
    assert len({row["knob/value"] for row in read[1:]}) == 1
    # The head is whole again: the checkpoint goes on with the eleventh step's weights and the held knob.
    resumed = run(model, tmp_path / "b", 2, policy_loss=held, batches=1, first=6, resume=str(saved))
    assert [row["entropy/refused"] for row in rows(tmp_path / "run")] == [*range(11), 0, 0]
    assert resumed[0]["state"]["readings"] == 3


def test_a_first_reading_that_is_refused_is_an_error_and_a_monitor_goes_on(model, tmp_path):
    held = run(model, tmp_path / "held", policy_loss=HELD, broken_after=0, batches=1)[0]
    assert held["error"].startswith("ValueError: the first entropy reading is refused: entropy is exactly 0")
    folder = str(tmp_path / "run")
    monitor = run(model, tmp_path / "monitor", policy_loss={"folder": folder}, broken_after=0, batches=6)[0]
    assert monitor["error"] is None
    assert rows(tmp_path / "run")[-1]["entropy/refused"] == 12
    warnings = [x for x in (tmp_path / "monitor/stderr.txt").read_text().splitlines() if "reading refused" in x]
    assert len(warnings) == 1
