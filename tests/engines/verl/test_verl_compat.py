"""A contract test for each name of verl that is touched: what a new version breaks fails here by name."""

import ast
import asyncio
import inspect
import math
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch

try:
    version("verl")  # not by import: this directory would be found as a package of that name
except PackageNotFoundError:
    pytest.skip("verl has an environment of its own: make test-verl", allow_module_level=True)

os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}
import cpu_platform  # noqa: F401
from tensordict import TensorDict
from verl import DataProto
from verl.single_controller.base.decorator import MAGIC_ATTR
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine.utils import prepare_micro_batches
from verl.workers.engine_workers import ActorRolloutRefWorker, TrainingWorker
from verl.workers.utils import losses
from verl.workers.utils.padding import left_right_2_no_padding

import isentropic.engines.verl.engine as ours
from isentropic.engines.loop import OffPolicySums, reduce
from isentropic.engines.verl import compat, control, groups
from isentropic.engines.verl.compat import Keys
from isentropic.engines.verl.plugin import AGG_MODES, ESTIMATOR_MODULE
from isentropic.types import TokenBatch

HERE = Path(ours.__file__).parent
WRAPPED = [EngineRegistry.get_engine_cls(compat.MODEL_TYPE, backend) for backend in compat.BACKENDS]


def parameters(function):
    return list(inspect.signature(function).parameters)


def actor(**changes):
    return ActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **changes)


# Loading.


def test_what_verl_loads_while_it_is_imported_is_light():
    from importlib.metadata import entry_points

    (place,) = [point.value for point in entry_points(group="verl.plugins") if point.name == "isentropic"]
    assert place == "isentropic.engines.verl.register"
    code = f"import sys, {place}; print(sorted({{'torch', 'verl'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_other_module_imports_verl():
    for path in HERE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and not node.level else []
            if path.name != "compat.py":
                assert not [name for name in names if name.split(".")[0] == "verl"], path.name


@pytest.mark.parametrize("name", compat.CONTRACT)
def test_every_name_keeps_the_contract(name):
    assert compat.breach(name) is None


def test_a_line_of_the_contract_by_hand():
    def called(a, b, c=1, *, d=2):
        return a

    for takes in ("a, b", "a, b, c", "a, ..., b, d", "..., a, b", "a, ..."):
        assert compat._accepts(called, takes), takes
    for takes in ("a", "b, a", "a, c", "a, b, ..., e", "..., e"):
        assert not compat._accepts(called, takes), takes


def test_an_older_version_is_refused(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: "0.8.9")
    with pytest.raises(
        ImportError, match=r"tested with verl 0\.9\.0 to 0\.9\.1, got verl 0\.8\.9, which is older; pip install verl=="
    ):
        compat._require_verl()


def test_a_newer_version_warns_if_it_keeps_the_contract(monkeypatch, caplog):
    for got, warned in (("0.9.0", 0), ("0.9.1.post1", 0), ("0.9.2.dev0", 1), ("0.10", 1), ("1.0.0", 1)):
        caplog.clear()
        monkeypatch.setattr(compat, "version", lambda name, got=got: got)
        compat._require_verl()
        assert [f"got verl {got}" in record.getMessage() for record in caplog.records] == [True] * warned, got


@pytest.mark.parametrize(
    ("name", "takes", "problem"),
    [
        ("verl.utils.device:get_seller", "", r"is missing \(module 'verl.utils.device' has no attribute"),
        ("verl.workers.gone:x", "", r"is missing \(No module named"),
        ("verl.workers.engine:EngineRegistry.register", "kind", r"takes \(model_type, .*\), expected \(kind\)"),
        ("verl.workers.config:ActorConfig", "..., width", r"takes \(.*, expected \(\.\.\., width\)"),
    ],
)
def test_a_newer_version_is_refused_by_the_names_that_changed(monkeypatch, name, takes, problem):
    monkeypatch.setitem(compat.CONTRACT, name, takes)
    monkeypatch.setattr(compat, "version", lambda name: "0.10.0")
    with pytest.raises(ImportError, match=rf"got verl 0\.10\.0, in which {name} {problem}.*; pip install verl=="):
        compat._require_verl()


def test_verl_makes_a_config_by_its_target_and_imports_what_it_is_told():
    from verl.utils.config import omega_conf_to_dataclass

    config = omega_conf_to_dataclass({"_target_": f"{ours.__name__}.PolicyLoss", "recipe": "dapo"})
    assert isinstance(config, ours.PolicyLoss)
    assert (HERE / f"{ESTIMATOR_MODULE.split('.')[-1]}.py").is_file()


# The engine.


def test_the_registry_takes_an_engine_by_device_and_vendor():
    for backend, wrapped in zip(compat.BACKENDS, WRAPPED, strict=True):
        known = EngineRegistry._engines[compat.MODEL_TYPE][backend]
        assert known["cuda", "nvidia"] is wrapped
        assert wrapped.__mro__[1:3] == (ours.EntropyControl, compat.EngineHooks)
        assert wrapped.__mro__[3] is known["cuda"]
        assert wrapped.__module__ == ours.__name__
    with pytest.raises(RuntimeError, match="load the other package first"):
        compat.install(ours.EntropyControl)


def test_the_engines_that_are_wrapped_are_those_of_the_contract():
    for wrapped in WRAPPED:
        base = wrapped.__mro__[3]
        assert f"{base.__module__}:{base.__qualname__}.train_batch" in compat.CONTRACT


def test_the_engine_sets_what_the_adapter_reads():
    source = "".join(inspect.getsource(c) for c in WRAPPED[0].__mro__[3:-1])
    for name in [*compat.Engine.__annotations__, "ulysses_sequence_parallel_size"]:
        assert f"self.{name} = " in source or f"self.{name}, " in source, name


def test_a_worker_announces_its_batch_and_keeps_verls_dispatch():
    announced = TrainingWorker.train_mini_batch
    assert announced.__module__ == TrainingWorker.__module__
    native = announced.__wrapped__
    assert getattr(announced, MAGIC_ATTR) is getattr(native, MAGIC_ATTR)
    assert parameters(inspect.unwrap(native)) == ["self", "data"]
    seen = []

    class Engine(compat.EngineHooks):
        def batch_generated(self, data, loss_function):
            seen.append((data, loss_function))

    class Worker:
        loss_fn = "loss"

    data = TensorDict({}, batch_size=2)
    for engine, expected in ((object(), []), (Engine(), [(data, "loss")])):
        Worker.engine = engine
        with pytest.raises(AssertionError):  # verl's own: nobody said how large a mini-batch is
            announced(Worker(), data=data)
        assert seen == expected


def test_a_worker_announces_the_weights_that_go_to_the_sampler_and_keeps_verls_dispatch():
    announced = ActorRolloutRefWorker.update_weights
    assert announced.__module__ == ActorRolloutRefWorker.__module__
    assert getattr(announced, MAGIC_ATTR) is getattr(announced.__wrapped__, MAGIC_ATTR)
    assert inspect.iscoroutinefunction(announced)
    seen = []

    class Engine(compat.EngineHooks):
        def weights_sent(self, version):
            seen.append(version)

    class Worker:
        actor = None

    for engine, number, expected in ((object(), 1, []), (Engine(), None, []), (Engine(), 7, [7])):
        Worker.actor = type("Actor", (), {"engine": engine})
        with pytest.raises(AttributeError):  # verl's own: a worker without a config
            asyncio.run(announced(Worker(), global_steps=number, mode="auto"))
        assert seen == expected


# The loss.


def test_the_loss_is_bound_to_the_actors_config():
    config, other = actor(), actor(clip_ratio_high=0.4)
    loss = partial(losses.ppo_loss, config=config)
    assert compat.actor_config(loss) is config
    assert compat.actor_config(losses.ppo_loss) is None
    assert compat.actor_config(compat.with_config(loss, other)) is other


def test_the_losses_that_recipes_use_are_registered():
    takes = ["old_log_prob", "log_prob", "advantages", "response_mask", "loss_agg_mode", "config", "rollout_is_weights"]
    for mode in ("cispo", "isentropic"):
        assert parameters(compat.get_policy_loss_fn(mode))[: len(takes)] == takes
    assert "isentropic" in core_algos.POLICY_LOSS_REGISTRY


def test_estimators_are_registered():
    import isentropic.engines.verl.estimator as estimator

    assert core_algos.ADV_ESTIMATOR_REGISTRY["isentropic"] is estimator.estimate


def test_every_reduction_by_hand():
    """Two answers of two tokens and one, of a batch of three tokens and two answers; the longest answer has 4."""
    values, mask = torch.tensor([[1.0, 2.0], [5.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
    wanted = {"token": 8 / 3, "sequence": (1.5 + 5) / 2, "constant": 8 / (2 * 4)}
    for name, mode in AGG_MODES.items():
        config = actor(loss_agg_mode=mode)
        info = {"dp_size": 1, "batch_num_tokens": 3, "global_batch_size": 2, "loss_scale_factor": 4}
        config.global_batch_info.update(info)
        assert compat.aggregated(values, mask, config).item() == pytest.approx(wanted[name]), name


def test_configs_are_frozen_and_copied():
    config = actor()
    with pytest.raises(FrozenInstanceError):
        config.clip_ratio_high = 0.5
    assert compat.replaced(config, clip_ratio_high=0.5).clip_ratio_high == 0.5
    assert config.clip_ratio_high != 0.5


# Data.


def batch(uids, rewards, key="token_level_scores"):
    """Two prompt tokens and up to three of an answer, as verl's trainer sends them; the reward is at the last one."""
    lengths = torch.arange(len(uids)) % 3 + 1
    mask = (torch.arange(3) < lengths[:, None]).long()
    attention = torch.cat([torch.ones(len(uids), 2, dtype=torch.long), mask], 1)
    ids = torch.arange(attention.numel()).reshape(attention.shape)
    scores = torch.zeros(mask.shape)
    scores[torch.arange(len(uids)), lengths - 1] = torch.tensor(rewards)
    tensors = {
        "input_ids": ids,
        "prompts": ids[:, :2],
        "responses": ids[:, 2:],
        "attention_mask": attention,
        "position_ids": attention.cumsum(1) - 1,
        "response_mask": mask,
        key: scores,
        "uid": np.array(uids, dtype=object),
    }
    return left_right_2_no_padding(DataProto.from_single_dict(tensors).to_tensordict())


def test_settings_that_travel_with_the_data():
    data = batch(["a", "b"], [1.0, 0.0])
    assert (compat.temperature_of(data), compat.ends_batch(data)) == (1.0, True)
    tu.assign_non_tensor(data, temperature=0.7, update_lr_scheduler=False)
    compat.ask_for_entropy(data)
    assert (compat.temperature_of(data), compat.ends_batch(data)) == (0.7, False)
    assert tu.get(data, "calculate_entropy") is True


def test_answers_are_cut_out_of_packed_rows_and_put_back():
    data = batch(["a", "b", "c"], [1.0, 0.0, 0.0])
    # Rows of 3, 4 and 5 tokens; the row of a token is that of the token before it.
    answers = compat.answers_of(torch.arange(12.0), data)
    assert answers.tolist() == [[1, 0, 0], [4, 5, 0], [8, 9, 10]]
    lengths = data["response_mask"].sum(1).tolist()
    jagged = torch.nested.as_nested_tensor([torch.ones(n) for n in lengths], layout=torch.jagged)
    assert compat.aligned(jagged, 4).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    data["response_mask"] = torch.nested.as_nested_tensor(
        [torch.ones(n, dtype=torch.long) for n in lengths], layout=torch.jagged
    )
    again = compat.in_layout_of(jagged, answers, data)
    assert again.is_nested
    assert torch.equal(compat.aligned(again, 3), answers)
    assert compat.in_layout_of(torch.zeros(1, dtype=torch.float16), answers, data).dtype == torch.float16


def test_lengths_and_the_limit_of_answers():
    data = batch(["a", "b", "c"], [1.0, 0.0, 0.0])
    assert (compat.answer_lengths(data).tolist(), compat.answer_limit(data)) == ([1, 2, 3], 3)
    data["responses"] = torch.nested.as_nested_tensor([torch.ones(n) for n in (1, 2, 2)], layout=torch.jagged)
    assert (compat.answer_lengths(data).tolist(), compat.answer_limit(data)) == ([1, 2, 2], 3)
    bare = {"responses": data["responses"]}
    assert compat.answer_limit(TensorDict(bare, batch_size=[3])) is None


def sums_of(rows, reward, num_real=4):
    """Of answers of 1, 2, 3 and 1 tokens, limited to 3, of which the last may have none to train on."""
    data = batch(["a", "b", "c", "d"], [0.0] * 4)
    mask = data["response_mask"] * (torch.arange(4) < num_real)[:, None]
    still = TokenBatch(torch.zeros(4, 3)[rows], None, torch.zeros(4)[rows], mask[rows], reward=reward)
    part = {name: data[name][rows] for name in ("responses", "attention_mask")}
    return reduce(control.answer_sums(still, part), lambda vector: vector)


def test_answers_add_up_over_micro_batches_by_hand():
    reward = torch.tensor([1.0, 0.25, float("nan"), 1.0])
    whole = sums_of(slice(0, 4), reward)
    assert whole == (4, 7, 1, 4, 2.25, 3)
    parts = [sums_of(slice(0, 1), reward[:1]), sums_of(slice(1, 4), reward[1:])]
    assert tuple(a + b for a, b in zip(*parts, strict=True)) == whole
    row = {"length/mean": 7 / 4, "length/truncated_frac": 0.25, "reward/mean": 0.75}
    assert control.answer_row(whole) == row
    assert sums_of(slice(0, 4), reward, num_real=3) == (3, 6, 1, 3, 1.25, 2)
    assert "reward/mean" not in control.answer_row(sums_of(slice(0, 4), None))


def test_old_log_probs_that_are_the_samplers_tell_no_mismatch():
    known = OffPolicySums(*[1.0] * 8)
    assert control._known(known) == known
    assert control._known(known._replace(kl=0.0)) == known._replace(kl=0.0, known=0.0, kl_entropy=0.0)


@pytest.mark.parametrize("uids", [["a", "b", "a"], ["a", "a", "a"]], ids="".join)
def test_groups_are_told_by_their_names(uids):
    """Also if all are alike, which a TensorDict keeps in another way."""
    assert compat.groups_of(batch(uids, [0.0, 0.0, 0.0])) == uids
    assert compat.groups_of(tu.get_tensordict({"uid": uids, "x": torch.zeros(3)})) == uids


def test_figures_are_logged_as_lists():
    output = {"metrics": {"loss": [1.0]}}
    compat.log_row(output, {"entropy/mean": 2.0})
    assert output["metrics"] == {"loss": [1.0], "entropy/mean": [2.0]}


class Ranks:
    """An engine of several ranks, of which this process is one, and the others' shares are known."""

    def __init__(self, monkeypatch, others):
        self.calls = 0
        self.others = others
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 1 + len(others))
        monkeypatch.setattr(torch.distributed, "all_gather_object", self.gather)

    def get_data_parallel_group(self):
        return "ranks"

    def gather(self, shares, mine, group):
        assert group == "ranks"
        self.calls += 1
        shares[:] = [mine, *self.others]


@pytest.mark.parametrize("key", Keys.REWARDS)
@pytest.mark.parametrize("jagged", [False, True], ids=["padded", "jagged"])
def test_groups_are_put_together_over_ranks_by_one_call(monkeypatch, key, jagged):
    """Group a: 1, 0 here and 1, 1 there; group b: 0 here alone; group c is elsewhere."""
    data = batch(["a", "b", "a"], [1.0, 0.0, 0.0], key)
    if jagged:
        lengths = data["response_mask"].sum(1).tolist()
        rows = [row[:n] for row, n in zip(data[key], lengths, strict=True)]
        data[key] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    engine = Ranks(monkeypatch, [[("a", 1.0, 7), ("c", 1.0, 7)], [("a", 1.0, 7)]])
    groups.attach_groups(engine, data)
    assert data[Keys.REWARD].tolist() == [1.0, 0.0, 0.0]
    assert data[Keys.GROUP_RATE].tolist() == [0.75, 0.0, 0.75]
    assert data[Keys.GROUP_REWARD].tolist() == [0.75, 0.0, 0.75]
    # Of three right answers to a, the two from elsewhere are equal.
    distinct = data[Keys.GROUP_DISTINCT].tolist()
    assert distinct[0] == distinct[2] == pytest.approx(2 / 3)
    assert math.isnan(distinct[1])
    # One of their three pairs.
    assert data[Keys.GROUP_REPEATS].tolist()[0] == pytest.approx(1 / 3)
    assert engine.calls == 1


def test_equal_answers_have_equal_hashes(monkeypatch):
    """Whatever follows the end of an answer; and padded as jagged."""
    data = batch(["a", "b", "a"], [1.0, 0.0, 0.0])
    answers, lengths = data[Keys.ANSWERS], compat.answer_lengths(data).tolist()
    answers[:] = torch.arange(answers.shape[1])
    first = compat.answer_hashes(data)
    assert len(set(first)) == len(set(lengths))
    answers[0, lengths[0] :] = 99
    assert compat.answer_hashes(data) == first
    answers[0, 0] = 98
    assert compat.answer_hashes(data)[0] != first[0]


def test_rates_of_graded_rewards_by_hand():
    """(mean − min)/(max − min) of each group, whatever its size; a sample that was not scored does not count."""
    samples = [("a", 3.0), ("b", 2.0), ("a", 1.0), ("a", 2.5), ("b", float("nan")), ("b", 6.0), ("c", -1.0)]
    known = groups.by_group((*sample, i % 3) for i, sample in enumerate(samples))
    assert {name: one.rate for name, one in known.items()} == pytest.approx(
        {"a": (6.5 / 3 - 1) / 2, "b": 0.5, "c": 0.0}
    )
    assert {name: one.mean for name, one in known.items()} == pytest.approx({"a": 6.5 / 3, "b": 4.0, "c": -1.0})
    assert [known[name].distinct for name in "ab"] == pytest.approx([2 / 3, 1.0])


@pytest.mark.parametrize("as_verls", ["v1", "v0"])
def test_leads_are_the_optimizer_steps_since_the_weights_that_sampled(as_verls):
    """Steps 2, 4 and 6 were done when versions 3, 4 and 6 were sent; now it is step 7."""
    data, versions = batch(list("aabbcd"), [0.0] * 6), [3, 6, 5, 4, None, 1]
    data["advantages"] = data["response_mask"]
    if as_verls == "v1":
        tu.assign_non_tensor_stack(data, "extra_fields", [{"max_global_steps": version} for version in versions])
    else:
        tu.assign_non_tensor_stack(data, "max_global_steps", versions)
    groups.attach_lead(data, 7, {3: 2, 4: 4, 6: 6})
    # Version 5 was not sent: its weights are those of 4. Version 1 is from before a resume.
    assert data[Keys.LEAD].tolist() == [5, 1, 3, 3, 0, 5]


def test_no_lead_is_attached_if_the_data_does_not_say():
    data = batch(["a", "b"], [0.0, 0.0])
    groups.attach_lead(data, 7, {3: 2})
    tu.assign_non_tensor_stack(data, "extra_fields", [{"turn": 1}, {}])
    groups.attach_lead(data, 7, {3: 2})
    assert not compat.holds(data, Keys.LEAD)


@pytest.mark.parametrize("missing", ["uid", "token_level_scores"])
def test_nothing_is_attached_if_the_data_does_not_say(monkeypatch, missing):
    data = batch(["a", "b", "a"], [1.0, 0.0, 0.0])
    del data[missing]
    engine = Ranks(monkeypatch, [])
    groups.attach_groups(engine, data)
    assert not compat.holds(data, Keys.REWARD)
    assert not compat.holds(data, Keys.GROUP_RATE)
    assert engine.calls == 0


def test_answers_that_are_not_known_are_not_taken_for_equal_ones(monkeypatch):
    data = batch(["a", "a", "a"], [1.0, 1.0, 0.0])
    del data[Keys.ANSWERS]
    groups.attach_groups(Ranks(monkeypatch, []), data)
    assert data[Keys.GROUP_RATE].tolist() == pytest.approx([2 / 3] * 3)
    assert not compat.holds(data, Keys.GROUP_DISTINCT)
    assert not compat.holds(data, Keys.GROUP_REPEATS)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_attached_goes_with_its_sample_through_verls_cuts(monkeypatch, dynamic):
    uids, rewards = list("aabbccdd"), [0.1 * i for i in range(8)]
    data = batch(uids, rewards)
    groups.attach_groups(Ranks(monkeypatch, []), data)
    wanted = dict(zip(data[Keys.REWARD].tolist(), data["prompts"][:, 0].tolist(), strict=True))
    tu.assign_non_tensor(data, use_dynamic_bsz=dynamic, max_token_len_per_gpu=12, micro_batch_size_per_gpu=2)
    seen = {}
    for mini_batch in tu.make_iterator(data, 4, epochs=1, seed=0, dataloader_kwargs={"shuffle": True}):
        micro_batches, _ = prepare_micro_batches(mini_batch, same_micro_num_in_dp=False)
        assert len(micro_batches) >= 2
        for part in micro_batches:
            seen |= zip(part[Keys.REWARD].tolist(), part["prompts"][:, 0].tolist(), strict=True)
            assert part[Keys.GROUP_RATE].tolist() == pytest.approx([0.5] * len(part))
    assert seen == wanted
