"""Every recipe on a micro-batch of verl's: what verl's loss differentiates is what the core's does."""

import math
import os
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

try:
    version("verl")  # not by import: this directory would be found as a package of that name
except PackageNotFoundError:
    pytest.skip("verl has an environment of its own: make test-verl", allow_module_level=True)

os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}
import cpu_platform  # noqa: F401
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

from isentropic.engines.loop import EntropyReadingError
from isentropic.engines.verl import fallback
from isentropic.engines.verl.control import Control
from isentropic.engines.verl.engine import PolicyLoss
from isentropic.engines.verl.plugin import AGG_MODES, estimator_of, group_entry
from isentropic.losses.reduce import SumCount
from isentropic.recipes import RECIPES, advantages, build_thermostat, compose, load_recipe, loss, with_knob
from isentropic.types import TokenBatch

# verl draws one batch at one temperature.
DRAWN_ONCE = {name: recipe for name, recipe in RECIPES.items() if not recipe.redraws}

PROMPT, ANSWER, ROWS, VOCAB = 2, 5, 6, 7


class Case:
    """Six answers of uneven length, as verl's loss gets them, and as the core does; both from one leaf of logits."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        lengths = torch.tensor([5, 1, 3, 4, 2, 5])
        self.mask = (torch.arange(ANSWER) < lengths[:, None]).long()
        attention = torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.long), self.mask], 1)
        ids = torch.randint(VOCAB, (ROWS, PROMPT + ANSWER), generator=generator)
        self.ids = ids[:, PROMPT:]
        self.logits = torch.randn(ROWS, ANSWER, VOCAB, generator=generator).requires_grad_()
        with torch.no_grad():
            moved = self.logits + 0.4 * torch.randn(self.logits.shape, generator=generator)
        self.old = self.stats(moved)
        self.adv = torch.randn(ROWS, 1, generator=generator).expand(-1, ANSWER).contiguous()
        fields = {
            "input_ids": torch.nested.as_nested_tensor(
                [row[: PROMPT + n] for row, n in zip(ids, lengths, strict=True)], layout=torch.jagged
            ),
            "prompts": ids[:, :PROMPT],
            "responses": self.ids,
            "attention_mask": attention,
            "response_mask": self.mask,
            "old_log_probs": self.old[0],
            "entropy": self.old[1],
            "advantages": self.adv,
            "isentropic_reward": torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0]),
            "isentropic_group_rate": torch.tensor([0.5, 0.5, 1.0, 1.0, 0.0, 0.0]),
        }
        self.data = TensorDict(fields, batch_size=ROWS)
        settings = {"dp_size": 1, "batch_num_tokens": int(self.mask.sum()), "global_batch_size": ROWS}
        tu.assign_non_tensor(self.data, **settings, temperature=1.0)

    def stats(self, logits):
        logp = logits.log_softmax(-1)
        return logp.gather(-1, self.ids[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    def packed(self, x):
        """``[tokens ...]``: the row of a token is at the token before it, and there is one for the last token."""
        shape = (PROMPT - 1, *x.shape[2:]), (1, *x.shape[2:])
        return torch.cat(
            [
                torch.cat([x.new_zeros(shape[0]), row[:n], x.new_zeros(shape[1])])
                for row, n in zip(x, self.mask.sum(1), strict=True)
            ]
        )

    def core(self, recipe, knob):
        logp, entropy = self.stats(self.logits)
        rows = self.logits.log_softmax(-1) if "logp_rows" in recipe.reads else None
        groups = (self.data["isentropic_reward"], self.data["isentropic_group_rate"])
        batch = TokenBatch(logp, self.old[0], self.adv, self.mask, entropy, self.old[1], rows, *groups)
        total, _ = loss(recipe, batch, knob, ANSWER)
        return torch.autograd.grad(total.mean(), self.logits)[0]

    def verl(self, recipe, actor):
        control = Control(recipe)
        logp, entropy = self.stats(self.logits)
        output = {"log_probs": self.packed(logp), "entropy": self.packed(entropy)}
        if "logp_rows" in recipe.reads:
            control.logits._kept = self.packed(self.logits)
        total, _ = control.wrap(partial(ppo_loss, config=actor))(model_output=output, data=self.data)
        return torch.autograd.grad(total, self.logits)[0], control


def actor_of(name):
    recipe = RECIPES[name]
    # A clip of verl's that no recipe has: far enough to be out of the way.
    return ActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=ROWS,
        loss_agg_mode=AGG_MODES[recipe.reduction],
        loss_scale_factor=ANSWER if recipe.reduction == "constant" else None,
        clip_ratio_c=1e6,
        policy_loss=PolicyLoss(recipe=name),
    )


@pytest.mark.parametrize("name", DRAWN_ONCE)
def test_verls_loss_has_the_gradient_of_the_recipe(name):
    case, actor = Case(), actor_of(name)
    recipe = actor.policy_loss.checked(actor)
    thermostat = build_thermostat(recipe)
    knob = thermostat.init().value if thermostat else None
    torch.manual_seed(1)
    wanted = case.core(recipe, knob)
    torch.manual_seed(1)
    got, control = case.verl(recipe, actor)
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-7)
    # The reading: the entropy of the 20 tokens that count.
    entropy = (case.stats(case.logits)[1] * case.mask).sum().item()
    sums = control.loop.reduced(lambda vector: vector).of_tokens
    assert (sums.entropy, sums.tokens) == pytest.approx((entropy, 20.0), rel=1e-6)


def test_every_recipe_is_composed_with_an_estimator_that_verl_knows():
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY

    import isentropic.engines.verl.estimator  # noqa: F401

    for name, recipe in DRAWN_ONCE.items():
        entry = group_entry(recipe, name)
        assert entry["algorithm"]["adv_estimator"] in ADV_ESTIMATOR_REGISTRY, name
        ours = entry["actor_rollout_ref"].get("model", {}).get("external_lib")
        assert (ours is not None) == (entry["algorithm"]["adv_estimator"] == "isentropic"), name


@pytest.mark.parametrize("baseline", ["none", "mean", "mean_std", "leave_one_out", "quantile"])
def test_the_estimators_are_the_recipes_baselines(baseline):
    """Two groups of three whose members are mixed, rewards at the last token."""
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage, get_adv_estimator_fn

    import isentropic.engines.verl.estimator  # noqa: F401

    scores = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
    order, index = [0, 3, 1, 4, 2, 5], ["a", "b", "a", "b", "a", "b"]
    mask = torch.ones(6, 4)
    mask[1, 2:] = 0
    rewards = torch.zeros(6, 4)
    rewards[:, 1] = scores.flatten()[order]
    recipe = compose("dapo", baseline=baseline)
    wanted = advantages(recipe, scores)[order].unsqueeze(-1) * mask
    name, norm = estimator_of(recipe)
    arguments = {"token_level_rewards": rewards, "response_mask": mask, "index": index}
    if name == "grpo":
        got, _ = compute_grpo_outcome_advantage(**arguments, norm_adv_by_std_in_grpo=norm)
    else:
        options = {"recipe": "dapo", "recipe_options": {"baseline": baseline}}
        got, _ = get_adv_estimator_fn(name)(**arguments, config={"isentropic": options})
    torch.testing.assert_close(got, wanted, rtol=3e-4, atol=1e-5)  # what is added to the std differs


def rank(rewards, scale=1.0):
    return scale * rewards.argsort(1).argsort(1).flatten()


def test_a_baseline_of_ones_own_is_an_estimator_with_its_constants():
    from isentropic.engines.verl.estimator import estimate

    options = {"baseline": f"{__file__}:rank", "scale": 0.5, "zeta": 0.01, "every": 1}
    config = {"isentropic": {"recipe": "repo-r-loop", "recipe_options": options}}
    rewards, mask = torch.tensor([[0.0, 3.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([[1, 1], [1, 1], [1, 0]])
    got, _ = estimate(rewards, mask, config, ["a", "a", "a"])
    assert got.tolist() == [[1.0, 1.0], [0.0, 0.0], [0.5, 0.0]]
    assert estimator_of(compose("loop", baseline=rank)) == ("isentropic", None)


REFUSED = [
    ({"recipe": "qae", "adv_estimator": "grpo"}, "needs algorithm.adv_estimator=isentropic"),
    ({"recipe": "qae", "adv_estimator": "isentropic", "external_lib": "mine"}, "add isentropic.engines.verl.estimator"),
    ({"recipe": "ucpo", "adv_estimator": "isentropic"}, "uniform_correct needs the log-probabilities of sampling time"),
    ({"recipe": "grpo", "adv_estimator": "grpo", "norm_adv_by_std": False}, "norm_adv_by_std_in_grpo=True"),
    ({"recipe": "dapo", "recipe_options": {"dynamic_sampling": True}}, "algorithm.filter_groups.enable=True"),
    ({"recipe": "dapo", "recipe_options": {"overlong_buffer": 4}}, "overlong_buffer_cfg"),
    ({"recipe": "aepo"}, "verl draws no second batch, got redraw=0 and knob=redraw"),
    ({"recipe": "isentropic", "strategy": "megatron"}, "repo_r reads the entropies .* fsdp or fsdp2, or take one of "),
    ({"recipe": "aent", "strategy": "megatron"}, "whole rows of log-probabilities, .* got .*strategy=megatron"),
    ({"recipe": "entropy-bonus", "strategy": "veomni"}, "entropy bonus needs entropies with a gradient"),
    (
        {"recipe": "loop", "recipe_options": {"shaping": f"{__file__}:seen_more_often"}, "strategy": "megatron"},
        "test_verl_recipes.seen_more_often@.* reads the success rates of the groups, which verl's loss does not get",
    ),
    ({"strategy": "megatron"}, "monitor reads entropies from the engine, .* set .* to fsdp or fsdp2"),
    ({"knob": "zeta"}, "need a recipe"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_work_is_refused_before_anything_starts(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**settings)


def test_a_recipe_off_its_data_names_the_remedy():
    case, actor = Case(), actor_of("erc")
    del case.data["entropy"]
    with pytest.raises(ValueError, match="bypass_mode=True; set it to False"):
        case.verl(load_recipe("erc"), actor)


def seen_more_often(adv, group_rate):
    return adv * (2 - group_rate)[:, None]


def uncertain(logp, entropy):
    return -entropy


@pytest.mark.parametrize("changes", [{"shaping": seen_more_often}, {"penalty": uncertain, "penalty_coef": 0.1}])
def test_a_function_of_ones_own_reads_what_the_catalogues_do(changes):
    """The group's rate for a shaping, and entropies with their gradient for a penalty."""
    case, actor = Case(), actor_of("loop")
    recipe = compose("loop", **changes)
    plain = case.core(RECIPES["loop"], None)
    wanted = case.core(recipe, None)
    assert not torch.allclose(wanted, plain)
    torch.testing.assert_close(case.verl(recipe, actor)[0], wanted, rtol=2e-4, atol=2e-7)


def test_a_recipe_without_its_groups_names_the_keys():
    case, actor = Case(), actor_of("loop")
    for key in ("isentropic_reward", "isentropic_group_rate"):
        del case.data[key]
    with pytest.raises(
        ValueError, match=r"reads reward or group_rate, .* keys uid and token_level_scores or rm_scores"
    ):
        case.verl(compose("loop", shaping=seen_more_often), actor)


def test_a_first_step_without_entropies_is_refused_by_name():
    case = Case()
    output = {"log_probs": case.packed(case.stats(case.logits)[0])}
    control = Control(RECIPES["loop"])
    with pytest.raises(RuntimeError, match="calculate_entropy=True"):
        control.wrap(partial(ppo_loss, config=actor_of("loop")))(model_output=output, data=case.data)


def test_the_fallback_has_the_gradient_of_the_recipe_and_says_once_what_it_lacks(caplog):
    """verl's loss without our engine: the same gradient for recipes that need no entropy; the rest are refused."""
    able = [name for name in DRAWN_ONCE if not fallback.why_not(RECIPES[name])]
    assert {"adapo", "repo-r-loop", "gspo", "kl-cov", "rloo"} <= set(able)
    for name in able:
        case, actor = Case(), actor_of(name)
        actor = ActorConfig(**{**vars(actor), "strategy": "megatron"})
        object.__setattr__(actor.policy_loss, "loss_mode", "isentropic")
        recipe = actor.policy_loss.checked(actor)
        torch.manual_seed(1)
        wanted = case.core(recipe, build_thermostat(recipe).init().value if recipe.knob else None)
        torch.manual_seed(1)
        output = {"log_probs": case.packed(case.stats(case.logits)[0])}
        for _ in range(2):
            total, metrics = ppo_loss(actor, output, case.data)
        got = torch.autograd.grad(total, case.logits)[0]
        if recipe.selection != "clip_cov":  # draws anew in each call
            torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-7)
        assert "entropy/mean" not in metrics
    said = [record for record in caplog.records if "is not wrapped" in record.message]
    assert len(said) == len(able)


def test_the_fallback_turns_its_knob_at_the_optimizer_step():
    case = Case()
    loss_config = PolicyLoss(recipe="adapo", loss_mode="isentropic", target="0.5", strategy="megatron")
    actor = ActorConfig(
        strategy="megatron", rollout_n=1, ppo_micro_batch_size_per_gpu=ROWS, policy_loss=loss_config, clip_ratio_c=1e6
    )
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    output = {"log_probs": case.packed(case.stats(case.logits)[0])}
    ppo_loss(actor, output, case.data)
    start = actor.policy_loss.fallback.loop.value
    parameter.grad = torch.zeros(1)
    optimizer.step()
    behind = actor.policy_loss.fallback
    sampled = -(case.stats(case.logits)[0] * case.mask).sum().item() / 20
    assert behind.last == pytest.approx(sampled, rel=1e-6)
    assert behind.last > 0.5
    # ADAPO lowers ε_high by 5 % if entropy is above its target.
    assert behind.loop.value == pytest.approx(start / 1.05, rel=0.01)
    _, metrics = ppo_loss(actor, output, case.data)
    assert metrics["entropy/sampled"].aggregate() == pytest.approx(sampled, rel=1e-6)
    optimizer.step()
    optimizer.step()  # another optimizer in the process: nothing was computed, nothing is read
    assert behind.step == 2


def test_what_the_knob_does_is_what_its_recipe_says():
    """One step of a knob changes the gradient as the core's recipe does: the knob in force is the one that is read."""
    case, actor = Case(), actor_of("adapo")
    recipe = with_knob(load_recipe("adapo"), 0.05)
    near = case.core(recipe, 0.05)
    assert not torch.allclose(near, case.core(recipe, 1.0))
    control = Control(recipe)
    state = control.loop.state
    control.loop.state = state._replace(controller=state.controller._replace(value=0.05))
    logp, entropy = case.stats(case.logits)
    output = {"log_probs": case.packed(logp), "entropy": case.packed(entropy)}
    total, _ = control.wrap(partial(ppo_loss, config=actor))(model_output=output, data=case.data)
    torch.testing.assert_close(torch.autograd.grad(total, case.logits)[0], near, rtol=2e-4, atol=2e-7)


@pytest.mark.parametrize("name", ["entropy-bonus", "repo-d-loop", "isentropic", "aent"])
def test_a_broken_entropy_never_reaches_the_loss(name):
    """The loss and its gradient are those of the core, which leaves the token out; the reading is refused."""
    case, actor = Case(), actor_of(name)
    recipe = actor.policy_loss.checked(actor)
    whole = case.verl(recipe, actor)[0]
    intact, broken = case.stats, torch.zeros(ROWS, ANSWER, dtype=torch.bool)
    broken[2, 1] = True

    def stats(logits):
        logp, entropy = intact(logits)
        return logp, torch.where(broken, float("nan"), entropy)

    case.stats = stats
    control = Control(recipe)
    logp, entropy = case.stats(case.logits)
    output = {"log_probs": case.packed(logp), "entropy": case.packed(entropy)}
    if "logp_rows" in recipe.reads:
        control.logits._kept = case.packed(case.logits)
    total, _ = control.wrap(partial(ppo_loss, config=actor))(model_output=output, data=case.data)
    assert total.isfinite()
    got = torch.autograd.grad(total, case.logits)[0]
    assert got.isfinite().all()
    assert not torch.equal(got[2], whole[2]) or recipe.shaping == "repo_r"  # ζ starts at 0
    sums = control.loop.reduced(lambda vector: vector).of_tokens
    assert not math.isfinite(sums.entropy)


class Strategy:
    """An actor's config, as far as the fallback asks for it."""

    strategy = "megatron"


def refuse(control, times):
    """So many optimizer steps over no tokens at all."""
    for _ in range(times):
        control.loop.observe(SumCount(torch.tensor(0.0), torch.tensor(0.0)))
        control.end_step()


def test_the_fallback_refuses_as_every_engine_does():
    first = fallback.ByLoss(compose("adapo"), Strategy, 1)
    with pytest.raises(ValueError, match="the first entropy reading is refused: entropy was read over 0 tokens"):
        refuse(first, 1)
    held = fallback.ByLoss(compose("adapo"), Strategy, 1)
    held.loop.observe(SumCount(torch.tensor(3.0), torch.tensor(2.0)))
    held.end_step()
    value = held.loop.value
    refuse(held, 9)
    assert (held.loop.value, held.last) == (value, pytest.approx(float("nan"), nan_ok=True))
    with pytest.raises(EntropyReadingError, match=r"10 entropy readings .*; resume from the last checkpoint"):
        refuse(held, 1)


def test_the_fallback_reads_the_learning_rate_of_the_step():
    control = fallback.ByLoss(compose("adapo"), Strategy, 1)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)
    control.loop.observe(SumCount(torch.tensor(3.0), torch.tensor(2.0)))
    control.end_step(optimizer, (), {})
    assert control.loop.state.rate == 0.25


def test_the_fallback_only_monitors_if_nothing_is_under_control(caplog):
    control = fallback.ByLoss(compose("dapo"), Strategy, 1)
    refuse(control, 12)
    assert (control.step, control.loop.refused) == (12, 12)
    assert len([record for record in caplog.records if "reading refused" in record.message]) == 1
